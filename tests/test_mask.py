"""Masks of forbidden actions, from the environment to every agent with Discrete actions."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import agents
import envs
from agents.base import epsilon_greedy
from agents.dqn import DQN
from agents.loop import off_policy, on_policy
from envs import Collector
from envs.mask import MASK, OBS
from replay import Batch, Ring
from runs import UserError
from tests.tools import CPU, Quiet

ENV = "chordate-test/Forbidding-v0"
DQN_SMALL: dict[str, Any] = dict(
    learning_starts=32, train_every=4, batch=16, lr=3e-3, target_every=20, epsilon_steps=200
)
SMALL: dict[str, dict[str, Any]] = {
    "dqn": DQN_SMALL,
    "dqn twin": DQN_SMALL | dict(double="twin"),
    "dqn munchausen": DQN_SMALL | dict(munchausen=0.9, n_step=2),
    "dqn c51": DQN_SMALL | dict(distributional="c51", noisy="factorised", alpha=0.5),
    "dqn quantile": DQN_SMALL | dict(distributional="quantile", dueling="mean", acting="target", tau=0.1),
    "sarsa": dict(epsilon_steps=200),
    "reinforce": dict(episodes=4),
    "a2c": dict(),
    "trpo": dict(rollout=64, batch=64),
    "ppo": dict(rollout=32, batch=32),
}


class Forbidding(gymnasium.Env):
    """Shows a number, forbids that action and one more; a forbidden action is an error. Ten steps."""

    def __init__(self, none: bool = False) -> None:
        self.observation_space, self.action_space = spaces.Box(0, 1, (4,), np.float32), spaces.Discrete(4)
        self.none, self.time, self.mask = none, 0, np.ones(4, np.int8)

    def _show(self) -> tuple[np.ndarray, dict[str, Any]]:
        shown = int(self.np_random.integers(4))
        self.mask = np.ones(4, np.int8)
        self.mask[[shown, (shown + 1) % 4]] = 0
        if self.none and self.time:
            self.mask[:] = 0
        return np.eye(4, dtype=np.float32)[shown], {"action_mask": self.mask}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        return self._show()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.mask[action], "forbidden"
        self.time += 1
        over = self.time >= 10
        obs, info = self._show()
        return obs, 1.0, over, False, info


@pytest.fixture(autouse=True)
def _registered() -> None:
    for name, keywords in ((ENV, {}), ("chordate-test/Stuck-v0", {"none": True})):
        if name not in gymnasium.registry:
            gymnasium.register(name, Forbidding, kwargs=keywords)


def test_the_mask_is_part_of_what_is_seen_and_remembered() -> None:
    env = envs.make(ENV, 3, 0)
    assert "masked" in envs.describe(env)
    collector, rng = Collector(env, 0), np.random.default_rng(0)
    before = None
    for _ in range(30):
        mask = collector.obs[MASK]
        shown = collector.obs[OBS].argmax(1)
        assert mask.shape == (3, 4) and (mask.sum(1) == 2).all()
        assert not mask[np.arange(3), shown].any()
        collector.send((rng.random((3, 4)) * mask).argmax(1))
        step = collector.recv()
        if before is not None:
            same = ~step.first
            assert np.array_equal(before.next_obs[MASK][same], step.obs[MASK][same])
        before = step
    collector.close()


@pytest.mark.parametrize("name", SMALL)
def test_no_agent_takes_a_forbidden_action(name: str) -> None:
    """The environment breaks at the first one."""
    torch.set_num_threads(1)
    env = envs.make(ENV, 2, 0)
    agent = agents.load(name.split()[0])(net={"hidden": (16,)}, backbone="mlp", **SMALL[name])
    seen, acted = env.single_observation_space, env.single_action_space
    agent.build(seen, acted, CPU, np.random.SeedSequence(0), print)
    collector, watch = Collector(env, 0), Quiet()
    if agent.loop == "off_policy":
        config = agent.config
        ring = Ring(500, 2, seen, acted, rng=np.random.default_rng(0), **config.replay)
        off_policy(agent, collector, ring, watch, 400)  # type: ignore[arg-type]  # duck-typed watch
    else:
        on_policy(agent, collector, agent.memory(collector.obs), watch, 400)  # type: ignore[arg-type]
    assert watch.updates and all(np.isfinite(list(update.values())).all() for update in watch.updates)
    assert (
        max(abs(update.get("q/target", 0.0)) for update in watch.updates) < 100
    )  # no value is that of a mask
    for _ in range(20):
        collector.send(agent.greedy(collector.obs, collector.first, ()).action)
        collector.recv()
    collector.close()


def test_exploration_draws_evenly_from_what_is_allowed() -> None:
    rng, mask = np.random.default_rng(0), np.tile(np.array([0, 1, 1, 0, 1], np.int8), (3_000, 1))
    drawn = epsilon_greedy(rng, 1.0, 3_000, 5, lambda: np.zeros((3_000, 5)), mask)
    counts = np.bincount(drawn, minlength=5)
    assert counts[0] == counts[3] == 0
    assert (np.abs(counts[[1, 2, 4]] - 1_000) < 4 * np.sqrt(3_000 * 2 / 9)).all()


@pytest.mark.parametrize("double", ["off", "online"])
def test_targets_bootstrap_from_the_best_allowed_action(double: str) -> None:
    torch.set_num_threads(1)
    space = spaces.Dict({OBS: spaces.Box(-1, 1, (3,), np.float32), MASK: spaces.MultiBinary(4)})
    agent = DQN(net={"hidden": (8,)}, double=double, gamma=0.9)
    agent.build(space, spaces.Discrete(4), CPU, np.random.SeedSequence(0), print)
    draw = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]])
    obs, later = ({OBS: torch.randn(2, 3, generator=draw), MASK: mask} for _ in range(2))
    agent.target.head.q.bias.data += torch.tensor([0.0, 5.0, 0.0, 0.0])  # type: ignore[union-attr]  # forbidden in row 0
    with torch.no_grad():
        q, online = agent.target(later), agent.online(later)
    picked = q if double == "off" else online
    rows = [max((0, 3), key=lambda a: float(picked[0, a])), max((1, 2), key=lambda a: float(picked[1, a]))]
    expected = torch.stack([1 + 0.9 * q[0, rows[0]], 1 + 0.9 * q[1, rows[1]]])
    zero = torch.zeros(2, dtype=torch.long)
    batch = Batch(obs, zero, torch.ones(2), later, torch.full((2,), 0.9), torch.ones(2), zero)
    _, metrics, _ = agent.loss(batch)
    assert float(metrics["q/target"]) == pytest.approx(float(expected.mean()), abs=1e-6)


def test_where_nothing_is_allowed_the_run_ends_with_one_line() -> None:
    env = envs.make("chordate-test/Stuck-v0", 1, 0)
    collector = Collector(env, 0)
    with pytest.raises(UserError, match="every action is masked"):
        collector.send(collector.obs[MASK].argmax(1))
        collector.recv()
    env.close()
