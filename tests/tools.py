"""Small helpers that several tests share."""

from __future__ import annotations

import hashlib
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

import envs
from agents.dqn import DQN
from agents.loop import off_policy, on_policy
from agents.qtable import QTable
from agents.sarsa import SARSA
from backbones.compute import Compute
from envs import Collector
from replay import Batch, Ring

CPU = Compute("cpu", "fp32", 1, False)
VECTOR = spaces.Box(-1, 1, (3,), np.float32)


PAYS = "chordate/Pays-v0"  # CartPole with rewards of 2.5, so that clipping them shows


def register() -> None:
    """Register the environments that only tests need."""
    if PAYS not in gymnasium.registry:
        gymnasium.register(PAYS, _pays)


def _pays() -> gymnasium.Env:
    return gymnasium.wrappers.TransformReward(gymnasium.make("CartPole-v1"), lambda reward: 2.5 * reward)


class Quiet:
    """A watch that writes nothing; it keeps what it was told."""

    def __init__(self, between: Any = None) -> None:
        self.stopping, self.updates, self.episodes, self.between = False, [], [], between
        self.carried: dict[str, np.ndarray] = {}

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
    net = knobs.pop("net", {"hidden": (32,)})
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
    config = agent.config
    replay = Ring(
        config.capacity,
        num_envs,
        env.single_observation_space,
        env.single_action_space,
        stack=envs.frame_stack(env),
        rng=np.random.default_rng(seed),
        **config.replay,
    )
    watch, collector = Quiet(between), Collector(env, seed, overlap=overlap)
    off_policy(agent, collector, replay, watch, steps)  # type: ignore[arg-type]  # duck-typed watch
    collector.close()
    return agent, watch


def tabular(
    agent: QTable | SARSA,
    env_id: str,
    steps: int,
    *,
    seed: int = 0,
    num_envs: int = 1,
    between: Any = None,
) -> Quiet:
    """Train one of the agents that hold Q in a table or a net, through its real loop."""
    register()
    torch.set_num_threads(1)
    env = envs.make(env_id, num_envs, seed)
    collector, watch = Collector(env, seed), Quiet(between)
    seen, acted = env.single_observation_space, env.single_action_space
    agent.build(seen, acted, CPU, np.random.SeedSequence(seed), print)
    if agent.loop == "off_policy":
        config = agent.config
        ring = Ring(config.capacity, num_envs, seen, acted, rng=np.random.default_rng(seed), **config.replay)
        off_policy(agent, collector, ring, watch, steps)  # type: ignore[arg-type]  # duck-typed watch
    else:
        on_policy(agent, collector, watch, steps)  # type: ignore[arg-type]  # duck-typed watch
    collector.close()
    return watch


def digest(agent: DQN | QTable | SARSA) -> str:
    """A hash of all that it acts by, bit by bit."""
    weights = agent.state_dict()["weights"].values()
    data = b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in weights)
    return hashlib.sha256(data).hexdigest()
