"""What both sides do. The peer's settings are derived from ours, so that they cannot drift apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from agents.presets import PRESETS
from agents.training import parts, resolve
from backbones.mlp import ACTIVATIONS

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
# policy gradients: nothing is scheduled or normalised; long runs that are stopped early here too
SCREEN = {"steps": 10_000_000, "backbone": "cnn", "net": "nature", "separate": False, "clip_reward": True}
VECTOR = {"steps": 10_000_000, "backbone": "mlp", "hidden": (64, 64), "activation": "tanh", "separate": True}
PPO = {"num_envs": 8, "rollout": 256, "batch": 256, "epochs": 4}

# the peers' words for our knobs
ALL = {"lr": "learning_rate", "rollout": "n_steps", "gamma": "gamma", "lam": "gae_lambda"}
LOSS = ALL | {"max_grad_norm": "max_grad_norm", "entropy": "ent_coef", "value_weight": "vf_coef"}
WORDS = {
    "ppo": LOSS
    | {"batch": "batch_size", "epochs": "n_epochs", "target_kl": "target_kl"}
    | {"clip": "clip_range", "clip_value": "clip_range_vf"},
    "a2c": LOSS | {"optimizer_eps": "rms_prop_eps"},
    "trpo": ALL
    | {"batch": "batch_size", "epochs": "n_critic_updates", "delta": "target_kl"}
    | {"cg_steps": "cg_max_steps", "damping": "cg_damping"}
    | {"shrink": "line_search_shrinking_factor", "tries": "line_search_max_iter"},
}
RIVALS = {"qtable": "skrl", "trpo": "sb3_contrib"}  # by agent; the rest is in stable_baselines3


@dataclass(frozen=True)
class Work:
    """One comparison: our settings by flag, and what the peer needs beyond their translation."""

    env: str
    frame_skip: int
    target: float  # ratio of speeds that is promised; 0: nothing is
    settings: dict[str, Any]
    peers: tuple[str, ...] = ("DummyVecEnv",)  # vector envs that the peer is tried with; its best one counts
    agent: str = "dqn"
    threads: int = 0  # torch threads of the peer; 0 leaves its default
    extra: dict[str, Any] = field(default_factory=dict)  # the peer's arguments that have no counterpart
    plain: dict[str, Any] = field(default_factory=dict)  # our settings on the side "plain"
    needs: tuple[str, ...] = ()  # modules that the environment imports

    @property
    def num_envs(self) -> int:
        return self.settings.get("num_envs", 1)

    @property
    def on_policy(self) -> bool:
        return self.agent in WORDS

    @property
    def memory(self) -> bool:
        """Whether a memory lies on top of its encoder."""
        return "encoder" in self.settings

    @property
    def image(self) -> bool:
        return self.settings.get("encoder", self.settings.get("backbone")) == "cnn"

    @property
    def rival(self) -> str:
        """The package to compare with."""
        return "sb3_contrib" if self.memory else RIVALS.get(self.agent, "stable_baselines3")

    @property
    def rival_agent(self) -> tuple[str, str]:
        """The class to compare with and its policy, by name."""
        kind, policy = self.agent.upper(), "Cnn" if self.image else "Mlp"
        return (f"Recurrent{kind}", f"{policy}LstmPolicy") if self.memory else (kind, f"{policy}Policy")

    @cached_property
    def whole(self) -> dict[str, Any]:
        """Our settings, those left at their defaults too."""
        return resolve(self.agent, self.settings | {"env": self.env}, {}, "none", lambda _: None)

    @property
    def updates_per_step(self) -> float:
        """Gradient steps in one agent step; of trpo those of the critic."""
        if self.on_policy:
            return parts(self.whole).agent.rounds(self.whole["steps"], self.num_envs) / self.whole["steps"]
        return self.settings["updates"] / self.settings["train_every"]

    def compare(self, name: str, side: str, found: dict[str, Any]) -> None:
        """Raises: RuntimeError if a side did more or fewer updates in its steps than this work has."""
        steps, updates = found["steps"] - self.settings.get("learning_starts", 0), found["updates"]
        slack = 2 * max(self.settings.get("updates", 1), self.num_envs * self.updates_per_step)
        if abs(updates - steps * self.updates_per_step) > slack:
            raise RuntimeError(f"{name}, {side}: {updates} updates in {steps} steps are other work")

    def peer(self) -> dict[str, Any]:
        """The same work in the peer's words."""
        return (self._on_policy() if self.on_policy else self._off_policy()) | self.extra

    def _off_policy(self) -> dict[str, Any]:
        """DQN; its `train_freq` counts steps of the vector env."""
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
        }

    def _on_policy(self) -> dict[str, Any]:
        s = self.whole
        found = {theirs: s[ours] for ours, theirs in WORDS[self.agent].items()}
        found["normalize_advantage"] = s["normalize_advantage"] in (True, "minibatch")
        if self.image:
            net: dict[str, Any] = {"share_features_extractor": not s["separate"]}
        else:  # whose actor and critic are always apart
            widths = list(s["hidden"])
            net = {"net_arch": {"pi": widths, "vf": widths}, "activation_fn": ACTIVATIONS[s["activation"]]}
        if self.memory:
            net["lstm_hidden_size"] = s["width"]
            net |= {"enable_critic_lstm": s["separate"], "shared_lstm": not s["separate"]}
        return found | {"policy_kwargs": net}


# all of DQN's parts at once, against ours without any
PLAIN = {
    "double": "off",
    "dueling": "off",
    "noisy": "off",
    "distributional": "off",
    "n_step": 1,
    "alpha": 0.0,
}
PARTS = {
    "double": "online",
    "dueling": "mean",
    "noisy": "factorised",
    "distributional": "c51",
    "n_step": 3,
    "alpha": 0.5,
}
BOTH = ("DummyVecEnv", "SubprocVecEnv")
# memory: the zoo's settings of RecurrentPPO for both, but for 128 steps on CartPole instead of 32 and narrower cells
ALONE = VECTOR | PPO | QUIET | {"rollout": 128, "epochs": 20, "lr": 1e-3, "gamma": 0.98, "lam": 0.8}
POLE = ALONE | {"backbone": "lstm", "encoder": "mlp", "width": 64}
GAME = SCREEN | PPO | QUIET | {"rollout": 128, "lr": 2.5e-4, "clip": 0.1, "entropy": 0.01, "stack": 1}
SCREEN_MEMORY = {"backbone": "lstm", "encoder": "cnn", "width": 256}
WORKS = {
    "dqn-pong-1": Work("ALE/Pong-v5", 4, 2.5, PONG | QUIET, needs=("cv2",)),
    "dqn-pong-8": Work("ALE/Pong-v5", 4, 2.5, PONG | QUIET | {"num_envs": 8}, BOTH, needs=("cv2",)),
    "dqn-parts": Work(
        "ALE/Pong-v5",
        4,
        0.7,
        PONG | QUIET | {"num_envs": 8} | PARTS,
        ("plain",),
        plain=PONG | QUIET | {"num_envs": 8} | PLAIN,
    ),
    "qtable-frozenlake": Work(
        "FrozenLake-v1", 1, 0, LAKE | QUIET, ("sync", "table"), agent="qtable", threads=1
    ),
    # the peer is faster on one thread here, and with all other small nets
    "dqn-cartpole": Work("CartPole-v1", 1, 3.0, CARTPOLE | QUIET, threads=1, extra=ZOO),
    "ppo-pong": Work(
        "ALE/Pong-v5",
        4,
        2.7,
        SCREEN | PPO | QUIET | {"rollout": 128, "lr": 2.5e-4, "clip": 0.1, "entropy": 0.01},
        BOTH,
        agent="ppo",
        needs=("cv2",),
    ),
    "a2c-pong": Work(
        "ALE/Pong-v5",
        4,
        2.7,
        SCREEN | QUIET | {"num_envs": 16, "rollout": 5, "entropy": 0.01},
        BOTH,
        agent="a2c",
        needs=("cv2",),
    ),
    "ppo-cartpole": Work("CartPole-v1", 1, 3.0, VECTOR | PPO | QUIET, agent="ppo", threads=1),
    "a2c-cartpole": Work(
        "CartPole-v1", 1, 3.0, VECTOR | QUIET | {"num_envs": 8, "rollout": 5}, agent="a2c", threads=1
    ),
    "trpo-cartpole": Work(
        "CartPole-v1", 1, 3.0, VECTOR | QUIET | {"num_envs": 2, "rollout": 512}, agent="trpo", threads=1
    ),
    "ppo-halfcheetah": Work(
        "HalfCheetah-v5",
        1,
        2.5,
        VECTOR | PPO | QUIET | {"batch": 64, "epochs": 10},
        BOTH,
        agent="ppo",
        threads=1,
        needs=("mujoco",),
    ),
    "ppo-lstm-cartpole": Work("chordate/CartPoleNoVel-v1", 1, 4.0, POLE, agent="ppo", threads=1),
    "ppo-lstm-pong": Work("ALE/Pong-v5", 4, 2.5, GAME | SCREEN_MEMORY, BOTH, agent="ppo", needs=("cv2",)),
    **{
        f"{kind}-cost": Work(
            "chordate/CartPoleNoVel-v1", 1, 0, POLE | {"backbone": kind}, ("plain",), agent="ppo", plain=ALONE
        )
        for kind in ("lstm", "transformer")
    },
    "lstm-cost-pong": Work("ALE/Pong-v5", 4, 0, GAME | SCREEN_MEMORY, ("plain",), agent="ppo", plain=GAME),
}
