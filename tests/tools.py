"""Small helpers that several tests share."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

import envs
from agents import load
from agents.actor import PolicyAgent
from agents.dqn import DQN
from agents.loop import off_policy, on_policy
from agents.qtable import QTable
from agents.sarsa import SARSA
from agents.training import replay_of
from backbones.base import Backbone
from backbones.compute import Compute
from envs import Collector, EnvConfig
from envs.atari import DEFAULT
from replay import Batch
from runs import checkpoint

CPU = Compute("cpu", "fp32", 1, False)
VECTOR = spaces.Box(-1, 1, (3,), np.float32)

SMALL: dict[str, Any] = dict(  # settings of a run of a second
    learning_starts=40,
    batch=8,
    train_every=4,
    target_every=7,
    n_step=2,
    capacity=300,
    log_every=30,
    eval_every=0,
    final_episodes=1,
    checkpoint_every=64,
    threads=1,
    compile="off",
    precision="fp32",
    video=False,
)
PAYS = "chordate/Pays-v0"  # CartPole with rewards of 2.5, so that clipping them shows


NESTED = "chordate/Nested-v0"  # CartPole seen through a Dict with a Tuple in it, cut after 7 steps
UNBOUNDED = "chordate/Unbounded-v0"  # a Box of actions without bounds
TEXTS = "chordate/Texts-v0"  # actions that no agent draws


def register() -> None:
    """Register the environments that only tests need."""
    made = {PAYS: _pays, NESTED: Nested, UNBOUNDED: lambda: Odd(spaces.Box(-np.inf, np.inf, (2,))),
            TEXTS: lambda: Odd(spaces.Text(5))}  # fmt: skip
    for name, make in made.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, make)


class Nested(gymnasium.ObservationWrapper):
    """See `NESTED`."""

    def __init__(self) -> None:
        super().__init__(gymnasium.wrappers.TimeLimit(gymnasium.make("CartPole-v1"), 7))
        one, two = (spaces.Box(-np.inf, np.inf, (size,), np.float32) for size in (1, 2))
        self.observation_space = spaces.Dict(cart=two, pole=spaces.Tuple((one, one)))

    def observation(self, observation: np.ndarray) -> Any:
        return {"cart": observation[:2], "pole": (observation[2:3], observation[3:])}


class Odd(gymnasium.Env):
    """Actions of any space, all of them worth nothing."""

    def __init__(self, actions: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = VECTOR, actions

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(3, np.float32), 0.0, False, True, {}


def _pays() -> gymnasium.Env:
    return gymnasium.wrappers.TransformReward(gymnasium.make("CartPole-v1"), lambda reward: 2.5 * reward)


class Elman(Backbone):
    """The plainest memory, one step after the other: h = tanh(W x + U h + b)."""

    memory = True

    def __init__(self, size: int, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner, self.outer = nn.Linear(width, width, bias=False), nn.Linear(size, width)
        self.features = width

    def initial(self, n: int) -> tuple[Tensor, ...]:
        return (torch.zeros(n, self.features),)

    def forward(self, obs: Any, state: Any = (), first: Any = None) -> Any:
        flat = obs["obs"] if isinstance(obs, dict) else obs
        h = state[0] if state else torch.zeros(*flat.shape[-2:-1], self.features)
        begins = torch.zeros(flat.shape[:-1], dtype=torch.bool) if first is None else first
        features = []
        steps = zip(flat, begins, strict=True) if flat.ndim == 3 else [(flat, begins)]
        for x, new in steps:
            h = torch.tanh(self.outer(x) + self.inner(torch.where(new[:, None], 0.0, h)))
            features.append(h)
        return (torch.stack(features) if flat.ndim == 3 else h), (h,)


class Quiet:
    """A watch that writes nothing; it keeps what it was told."""

    def __init__(self, between: Any = None) -> None:
        self.stopping, self.updates, self.episodes, self.between = False, [], [], between
        self.decision: Any = None

    def after(self, before: int, step: int, episodes: list[Any], update: Any) -> None:
        self.episodes += [(step, episode.return_, episode.length) for episode in episodes]
        if update is not None:
            self.updates.append({name: float(value) for name, value in update.metrics.items()})
        if self.between is not None:
            self.between(step)


def built(
    seed: int = 0, space: spaces.Space[Any] = VECTOR, actions: int = 2, compute: Compute = CPU, **knobs: Any
) -> DQN:
    """A small DQN with networks."""
    torch.set_num_threads(compute.threads)
    net = knobs.pop("net", {} if "backbone" in knobs else {"hidden": (32,)})
    agent = DQN(net=net, **knobs)
    agent.build(space, spaces.Discrete(actions), compute, np.random.SeedSequence(seed), print)
    return agent


def batch_of(size: int, actions: int = 2, seed: int = 0) -> Batch:
    """Random samples over VECTOR."""
    draw = torch.Generator().manual_seed(seed)
    return Batch(
        obs=torch.randn(size, 3, generator=draw),
        action=torch.randint(actions, (size,), generator=draw),
        reward=torch.randn(size, generator=draw) * 2,
        next_obs=torch.randn(size, 3, generator=draw),
        discount=0.9 * torch.randint(2, (size,), generator=draw).float(),
        weight=torch.rand(size, generator=draw) + 0.5,
        index=torch.arange(size),
    )


def trained(
    env_id: str, steps: int, *, seed: int = 0, num_envs: int = 1, overlap: bool = True, **knobs: Any
) -> tuple[DQN, Quiet]:
    """Train a DQN on an environment through the real loop."""
    register()
    between, of_env = knobs.pop("between", None), knobs.pop("env_config", envs.EnvConfig())
    env = envs.make(env_id, num_envs, seed, of_env)
    agent = built(seed, env.single_observation_space, int(env.single_action_space.n), **knobs)  # type: ignore[attr-defined]
    replay = replay_of(agent, env, np.random.default_rng(seed))
    watch, collector = Quiet(between), Collector(env, seed, overlap=overlap)
    off_policy(agent, collector, replay, watch, steps)  # type: ignore[arg-type]  # duck-typed watch
    collector.close()
    return agent, watch


def acted(
    name: str,
    env_id: str,
    steps: int,
    *,
    seed: int = 0,
    num_envs: int = 1,
    between: Any = None,
    env_config: EnvConfig = DEFAULT,
    **knobs: Any,
) -> tuple[PolicyAgent, Quiet]:
    """Train a policy-gradient agent on a small net through its real loop."""
    agent = load(name)(**{"net": {"hidden": (32,)}, **knobs})
    how: Any = dict(seed=seed, num_envs=num_envs, between=between, env_config=env_config)
    return agent, tabular(agent, env_id, steps, **how)


def tabular(
    agent: QTable | SARSA | PolicyAgent,
    env_id: str,
    steps: int,
    *,
    seed: int = 0,
    num_envs: int = 1,
    between: Any = None,
    env_config: EnvConfig = DEFAULT,
) -> Quiet:
    """Train an agent whose `loop` says how, through that loop."""
    register()
    torch.set_num_threads(1)
    env = envs.make(env_id, num_envs, seed, env_config)
    collector, watch = Collector(env, seed), Quiet(between)
    seen, acted = env.single_observation_space, env.single_action_space
    agent.build(seen, acted, CPU, np.random.SeedSequence(seed), print)
    if agent.loop == "off_policy":
        replay = replay_of(agent, env, np.random.default_rng(seed))
        off_policy(agent, collector, replay, watch, steps)  # type: ignore[arg-type]  # duck-typed watch
    else:
        on_policy(agent, collector, agent.memory(collector.obs), watch, steps)  # type: ignore[arg-type]  # duck-typed watch
    collector.close()
    return watch


def digest(agent: DQN | QTable | SARSA | PolicyAgent) -> str:
    """A hash of all that it acts by, bit by bit."""
    weights = agent.state_dict()["weights"].values()
    data = b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in weights)
    return hashlib.sha256(data).hexdigest()


def rows(path: Path, *timed: str) -> list[dict[str, str]]:
    """A table without its columns of times."""
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimiser, replay, envs and logs, bit by bit; times aside."""
    assert rows(one / "scores.csv", "seconds") == rows(other / "scores.csv", "seconds")
    speed = ("speed/steps_per_second", "speed/frames_per_second")
    assert rows(one / "metrics.csv", *speed) == rows(other / "metrics.csv", *speed)
    assert rows(one / "evaluations.csv", "seconds") == rows(other / "evaluations.csv", "seconds")
    last = [run / "checkpoints" / str(checkpoint.steps(run / "checkpoints")[-1]) for run in (one, other)]
    assert last[0].name == last[1].name
    assert_same_checkpoint(*last)
    assert (one / "best").exists() == (other / "best").exists()
    if (one / "best").exists():
        assert_same_checkpoint(one / "best", other / "best")


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Every file bit by bit; times aside."""
    files = [json.loads((folder / "manifest.json").read_text())["files"] for folder in (one, other)]
    assert files[0].keys() == files[1].keys()
    differ = [name for name in files[0] if files[0][name] != files[1][name]]
    assert differ in ([], ["counters.json"])
    counters = [json.loads((folder / "counters.json").read_text()) for folder in (one, other)]
    for each in counters:
        for timed in ("seconds", "saving", "first_update"):
            each.pop(timed, None)
    assert counters[0] == counters[1]
