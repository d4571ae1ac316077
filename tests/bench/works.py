"""What both sides do. The peer's settings are derived from ours, so that they cannot drift apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from agents.presets import PRESETS

QUIET = {"device": "cpu", "eval_every": 0, "checkpoint_every": 0, "final_episodes": 1, "video": False}
# Pong's steps are never reached: a run stopped early makes the choices (compile or not) of a long one
PONG = (
    {
        "steps": 10_000_000,
        "backbone": "cnn",
        "net": "nature",
        "clip_reward": True,
        "n_step": 1,
        "double": "off",
    }
    | {
        "lr": 1e-4,
        "batch": 32,
        "train_every": 4,
        "updates": 1,
        "target_every": 2_500,
        "learning_starts": 1_000,
    }
    | {"capacity": 50_000, "epsilon_start": 0.05, "epsilon_end": 0.05}
)
CARTPOLE = PRESETS["cartpole"].settings | {"backbone": "mlp", "double": "off", "epsilon_start": 0.04}
# without end; skrl learns from every step from the first on, at one epsilon
LAKE = PRESETS["qtable-lake"].settings | {"steps": 10**9, "gamma": 0.99, "updates": 1, "learning_starts": 1}
LAKE |= {"epsilon_start": 0.3, "log_every": 40_960}
ZOO = {"target_update_interval": 10, "policy_kwargs": {"net_arch": [256, 256]}}


@dataclass(frozen=True)
class Work:
    """One comparison: our settings by flag, and what the peer needs beyond their translation."""

    env: str
    frame_skip: int
    target: float  # ratio of speeds that is promised
    settings: dict[str, Any]
    peers: tuple[str, ...] = ("DummyVecEnv",)  # vector envs that the peer is tried with; its best one counts
    agent: str = "dqn"  # qtable races with skrl, which alone has a tabular agent
    threads: int = 0  # torch threads of the peer; 0 leaves its default
    extra: dict[str, Any] = field(default_factory=dict)  # the peer's arguments that have no counterpart

    @property
    def num_envs(self) -> int:
        return self.settings.get("num_envs", 1)

    @property
    def updates_per_step(self) -> float:
        return self.settings["updates"] / self.settings["train_every"]

    def peer(self) -> dict[str, Any]:
        """The same work in the peer's words; its `train_freq` counts steps of the vector env."""
        s, frequency = self.settings, max(self.settings["train_every"] // self.num_envs, 1)
        return {
            "learning_rate": s["lr"],
            "batch_size": s["batch"],
            "buffer_size": s["capacity"],
            "learning_starts": s["learning_starts"],
            "exploration_initial_eps": s["epsilon_start"],
            "exploration_final_eps": s["epsilon_end"],
            "train_freq": frequency,
            "gradient_steps": round(frequency * self.num_envs * self.updates_per_step),
            "target_update_interval": round(s["target_every"] / self.updates_per_step),
        } | self.extra


WORKS = {
    "dqn-pong-1": Work("ALE/Pong-v5", 4, 2.5, PONG | QUIET),
    "dqn-pong-8": Work(
        "ALE/Pong-v5", 4, 2.5, PONG | QUIET | {"num_envs": 8}, ("DummyVecEnv", "SubprocVecEnv")
    ),
    "qtable-frozenlake": Work(
        "FrozenLake-v1", 1, 1.0, LAKE | QUIET, ("sync", "table"), agent="qtable", threads=1
    ),
    # the peer is faster on one thread here
    "dqn-cartpole": Work("CartPole-v1", 1, 3.0, CARTPOLE | QUIET, threads=1, extra=ZOO),
}
