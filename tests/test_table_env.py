"""Environments stepped from their tables do what the scalar ones do."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

import envs
from envs import Collector, EnvConfig
from envs.table import LAKES, TABLED, TableEnv, dynamics, tabled
from runs import UserError

STOCHASTIC = ("FrozenLake-v1", "FrozenLake8x8-v1", "CliffWalkingSlippery-v1")
DETERMINISTIC = ("CliffWalking-v1", "Taxi-v4", *(f"chordate/{name}-v0" for name in LAKES))


@pytest.mark.parametrize("env_id", [*STOCHASTIC, *DETERMINISTIC])
def test_the_table_is_that_of_the_scalar_env(env_id: str) -> None:
    table = dynamics(envs.resolve(env_id))
    assert table.probability.sum(2) == pytest.approx(np.ones(table.probability.shape[:2]))
    assert table.initial.sum() == pytest.approx(1)
    scalar: Any = gymnasium.make(env_id).unwrapped
    for state, row in scalar.P.items():
        for action, outcomes in row.items():
            columns = (array[state, action].tolist() for array in table[:4])
            found = [outcome for outcome in zip(*columns, strict=True) if outcome[0] > 0]
            assert found == [tuple(outcome) for outcome in outcomes]


@pytest.mark.parametrize("env_id", DETERMINISTIC)
def test_deterministic_copies_step_as_the_scalar_env(env_id: str) -> None:
    """The same actions from the same states, over episode ends of both kinds."""
    vector, rng = envs.make(env_id, 20, seed=3), np.random.default_rng(0)
    assert isinstance(vector, TableEnv)
    singles: list[Any] = [gymnasium.make(env_id) for _ in range(20)]
    obs, _ = vector.reset(seed=5)
    for single, state in zip(singles, obs, strict=True):
        single.reset(seed=0)
        single.unwrapped.s = int(state)
    ends = np.zeros(2, int)
    for _ in range(450):
        action = rng.integers(vector.single_action_space.n, size=20)  # type: ignore[attr-defined]
        action[::4] = 0  # on a lake these stay at the edge until they are cut
        obs, reward, terminated, truncated, info = vector.step(action)
        for i, single in enumerate(singles):
            seen, paid, over, cut, _ = single.step(int(action[i]))
            last = info["final_obs"][i] if over or cut else obs[i]
            assert (seen, paid, over, cut) == (last, reward[i], terminated[i], truncated[i])
            if over or cut:
                ends += (over, cut)
                single.reset()
                single.unwrapped.s = int(obs[i])
    assert ends[1] > 0 or vector.limit is None
    assert ends[0] > 0 or "Frozen" not in env_id


@pytest.mark.parametrize("env_id", STOCHASTIC)
def test_outcomes_are_drawn_as_often_as_the_table_says(env_id: str) -> None:
    """A chi-square test over every state and action: at 4.5 sigma of its distribution."""
    table, count = dynamics(envs.resolve(env_id)), 3_000
    states, actions, outcomes = table.probability.shape
    env = TableEnv(envs.resolve(env_id), count)
    env.reset(seed=1)
    square, freedom = 0.0, 0
    for state in range(states):
        for action in range(actions):
            env.set_state(
                env.get_state() | {"state": np.full(count, state), "age": np.zeros(count, np.int64)}
            )
            drawn = env._drawn_outcomes(np.full(count, state * actions + action))
            found = np.bincount(drawn - (state * actions + action) * outcomes, minlength=outcomes)
            expected = table.probability[state, action] * count
            assert not found[expected == 0].any()
            likely = expected > 0
            square += ((found - expected)[likely] ** 2 / expected[likely]).sum()
            freedom += int(likely.sum()) - 1
    assert abs(square - freedom) < 4.5 * np.sqrt(2 * freedom)


def test_first_states_are_drawn_as_often_as_the_table_says() -> None:
    table, env = dynamics(envs.resolve("Taxi-v4")), TableEnv(envs.resolve("Taxi-v4"), 60_000)
    found = np.bincount(env.reset(seed=0)[0], minlength=500)
    expected = table.initial * 60_000
    assert not found[expected == 0].any()
    likely = expected > 0
    square = ((found - expected)[likely] ** 2 / expected[likely]).sum()
    assert abs(square - (likely.sum() - 1)) < 4.5 * np.sqrt(2 * likely.sum())


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Taxi-v4"])
def test_random_play_returns_as_the_scalar_copies(env_id: str) -> None:
    """Mean return and length of an episode agree within the noise of both."""

    def play(vectorization: str, num_envs: int, steps: int) -> np.ndarray:
        env = envs.make(env_id, num_envs, 0, vectorization=vectorization)
        collector, rng, found = Collector(env, 0), np.random.default_rng(1), []
        for _ in range(steps):
            collector.send(rng.integers(env.single_action_space.n, size=num_envs))  # type: ignore[attr-defined]
            collector.recv()
            found += [(episode.return_, episode.length) for episode in collector.episodes]
        collector.close()
        return np.array(found)

    # whole rounds of the limit, so that no long episode is left out
    many, few = play("vector", 1_000, 800), play("sync", 8, 2_400)
    noise = np.sqrt(many.var(0) / len(many) + few.var(0) / len(few))
    assert (np.abs(many.mean(0) - few.mean(0)) < 4.5 * noise + 1e-9).all()
    assert many[:, 1].max() == few[:, 1].max() or env_id != "Taxi-v4"  # the limit


def test_borders_and_counts_of_episodes() -> None:
    env = envs.make("FrozenLake-v1", 300, 0)
    collector, rng = Collector(env, 0), np.random.default_rng(0)
    returns, lengths, expected, found = np.zeros(300), np.zeros(300, int), [], []
    ended = np.ones(300, bool)
    for _ in range(400):
        collector.send(rng.integers(4, size=300))
        step = collector.recv()
        assert np.array_equal(step.first, ended) and (step.obs[ended] == 0).all()
        returns, lengths = returns + step.reward, lengths + 1
        ended = step.terminated | step.truncated
        assert np.isin(step.next_obs[step.terminated], (5, 7, 11, 12, 15)).all()
        assert np.array_equal(step.truncated, lengths == 100)
        expected += [(i, returns[i], lengths[i]) for i in np.flatnonzero(ended)]
        found += [tuple(episode) for episode in collector.episodes]
        returns[ended], lengths[ended] = 0, 0
    assert found == expected and len(found) > 10_000


def test_the_line_says_what_steps() -> None:
    line = envs.describe(envs.make("FrozenLake-v1", 2))
    assert line.endswith("at most 100 steps, stepped from its transition table")
    assert "table" not in envs.describe(envs.make("FrozenLake-v1", 2, vectorization="sync"))
    assert "at most" not in envs.describe(envs.make("CliffWalking-v1", 2))
    assert envs.frame_skip(envs.make("Taxi-v4")) == 1


def test_what_the_table_does_not_say_is_stepped_as_it_is() -> None:
    spec = envs.resolve("Taxi-v4")
    fickle = gymnasium.envs.registration.EnvSpec("Fickle-v0", TABLED[2], kwargs={"fickle_passenger": True})
    assert tabled(spec) and not tabled(fickle) and not tabled(envs.resolve("CartPole-v1"))
    with pytest.raises(ValueError, match="Fickle-v0 has no transition table"):
        dynamics(fickle)
    with pytest.raises(UserError, match="no vectorised version"):
        envs.make("Blackjack-v1", 2, 0, EnvConfig(), vectorization="vector")


def test_seeds_and_state() -> None:
    def play(env: Any, obs: Any, steps: int) -> list[Any]:
        rng, found = np.random.default_rng(0), [obs]
        for _ in range(steps):
            found.append(env.step(rng.integers(4, size=6))[0])
        return found

    env = envs.make("FrozenLake8x8-v1", 6, 0)
    one, two, other = (np.array(play(env, env.reset(seed=seed)[0], 50)) for seed in (1, 1, 2))
    assert np.array_equal(one, two) and not np.array_equal(one, other)
    state = {name: np.array(value) for name, value in env.get_state().items()}  # type: ignore[attr-defined]
    on = np.array(play(env, state["state"], 300))
    again = envs.make("FrozenLake8x8-v1", 6, 9)
    again.set_state(state)  # type: ignore[attr-defined]
    assert np.array_equal(on, np.array(play(again, state["state"], 300)))
