"""Environments with hidden velocities are the originals, seen in part."""

from __future__ import annotations

import importlib.util
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv

from envs import Collector, make, resolve
from envs.hidden import HIDDEN, SHOWN, HiddenVector
from envs.make import ENOUGH
from runs import UserError

BOX2D = (
    pytest.mark.skipif(importlib.util.find_spec("Box2D") is None, reason="the extra box2d is missing"),
    # raised as an error, it ends the interpreter in Box2D's own code
    pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning"),
)
IDS = [pytest.param(name, marks=BOX2D if "Lunar" in name else ()) for name in HIDDEN]
POLE = "chordate/CartPoleNoVel-v1"


def test_what_is_called_a_velocity_is_one() -> None:
    """Each number that is left out moves a number that stays, as the equations of motion say."""

    def step(name: str) -> tuple[np.ndarray, np.ndarray]:
        env = gymnasium.make(name)
        obs, _ = env.reset(seed=1)
        for _ in range(5):
            before, obs = obs, env.step(env.action_space.sample())[0]
        return before, obs

    before, after = step("CartPole-v1")
    hidden = [i for i in range(4) if i not in SHOWN["CartPole-v1"]]
    moved = [after[i] - before[i] for i in SHOWN["CartPole-v1"]]
    assert moved == pytest.approx(0.02 * before[hidden], rel=1e-3)
    for name in ("MountainCar-v0", "MountainCarContinuous-v0"):
        before, after = step(name)
        assert SHOWN[name] == (0,) and after[0] - before[0] == pytest.approx(after[1], rel=1e-3)
    before, after = step("Pendulum-v1")
    angle = np.arctan2(after[1], after[0]) - np.arctan2(before[1], before[0])
    assert SHOWN["Pendulum-v1"] == (0, 1) and angle == pytest.approx(0.05 * after[2], rel=1e-3)
    before, after = step("Acrobot-v1")
    assert SHOWN["Acrobot-v1"] == (0, 1, 2, 3)
    for i in (0, 1):  # a step of 0.2 s, so that the mean of both ends is the velocity but for its curvature
        angle = np.arctan2(after[2 * i + 1], after[2 * i]) - np.arctan2(before[2 * i + 1], before[2 * i])
        assert angle == pytest.approx(0.1 * (before[4 + i] + after[4 + i]), rel=0.1)


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("num_envs", [2, 8])
def test_all_but_what_is_seen_is_the_original(env_id: str, num_envs: int) -> None:
    """The same seed and actions, over ends of episodes: same rewards, flags and true successors, to the bit."""
    original, limit = HIDDEN[env_id], resolve(env_id).max_episode_steps or 0
    shown, ends = list(SHOWN[original]), 0
    left, right = (Collector(make(name, num_envs), 3) for name in (env_id, original))
    left.env.action_space.seed(0)
    for _ in range(min(limit, 250) + 10):
        assert np.array_equal(left.obs, right.obs[:, shown])
        action = left.env.action_space.sample()
        left.send(action)
        right.send(action)
        part, whole = left.recv(), right.recv()
        for name in ("obs", "next_obs"):
            assert np.array_equal(getattr(part, name), getattr(whole, name)[:, shown])
        for name in ("action", "reward", "terminated", "truncated", "first"):
            assert np.array_equal(getattr(part, name), getattr(whole, name))
        assert left.episodes == right.episodes
        ends += len(left.episodes)
    assert ends > 0 or limit > 250
    assert left.env.single_observation_space.shape == (len(shown),)
    for collector in (left, right):
        collector.close()


def test_the_successor_of_a_truncated_step_on_the_vectorised_path() -> None:
    """Env 0 balances until it is cut; the others fall."""
    part, whole = make(POLE, 8), make("CartPole-v1", 8)
    left, right = Collector(part, 0), Collector(whole, 0)
    for step in range(1, 501):
        x, x_dot, theta, theta_dot = right.obs[0]
        action = np.full(8, int(theta + 0.3 * theta_dot + 0.02 * x + 0.05 * x_dot > 0))
        action[1:] = step % 2
        left.send(action)
        right.send(action)
        seen, full = left.recv(), right.recv()
        assert np.array_equal(seen.next_obs, full.next_obs[:, [0, 2]])
    assert seen.truncated[0] and not seen.terminated[0]
    assert abs(seen.next_obs[0] - seen.obs[0]).max() < 0.1 and left.first[0]
    assert not np.array_equal(left.obs[0], seen.next_obs[0]) and abs(left.obs[0]).max() <= 0.05


def test_many_poles_are_stepped_at_once() -> None:
    assert isinstance(make(POLE, ENOUGH), HiddenVector)
    assert isinstance(make(POLE, ENOUGH - 1), SyncVectorEnv)
    assert isinstance(make(POLE, ENOUGH, vectorization="sync"), SyncVectorEnv)
    with pytest.raises(UserError, match="PendulumNoVel-v1 has no vectorised version"):
        make("chordate/PendulumNoVel-v1", 8, vectorization="vector")


def test_processes_know_the_ids() -> None:
    collector = Collector(make(POLE, 2, vectorization="async"), 0)
    assert collector.obs.shape == (2, 2)
    collector.close()


@pytest.mark.filterwarnings("ignore:.*is different from the unwrapped version")
@pytest.mark.filterwarnings("ignore:.*we recommend using a symmetric")  # of the pendulum's actions
@pytest.mark.parametrize("env_id", IDS)
def test_gymnasium_finds_nothing_wrong(env_id: str) -> None:
    """Also when it is made without this package's `make`, as other libraries do."""
    env: Any = gymnasium.make(resolve(env_id).id)
    check_env(env, skip_render_check=True)
    assert env.spec.reward_threshold == gymnasium.spec(HIDDEN[env_id]).reward_threshold
    again = gymnasium.make(env.spec)
    assert again.observation_space == env.observation_space


def test_without_a_version_the_newest_is_meant() -> None:
    assert resolve("chordate/CartPoleNoVel").id == POLE
