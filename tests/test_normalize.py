"""Normalisers: statistics against numpy over all that was seen, and when they change what."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.normalize import CLIP, EPSILON, ObsNormalizer, RewardScaler, merged
from runs import UserError

VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)


def rollout(seed: int, shape: tuple[int, ...] = (7, 4, 3), dtype: type = np.float32) -> np.ndarray:
    """Observations of different size and place in each column."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * [0.1, 2.0, 30.0] + [5.0, -1.0, 200.0 + seed]).astype(dtype)


def through(normalizer: ObsNormalizer, obs: np.ndarray) -> np.ndarray:
    return normalizer(torch.from_numpy(obs)).numpy()


def test_merged_moments_are_those_of_all_rows() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(1e3, 1 + k, (size, 2)) for k, size in enumerate((1, 5, 1, 200, 17))]
    mean, var, count = np.zeros(2), np.ones(2), 0.0
    for k, part in enumerate(parts):
        mean, var, count = merged(mean, var, count, part)
        every = np.concatenate(parts[: k + 1])
        assert count == len(every)
        np.testing.assert_allclose(mean, every.mean(0), rtol=1e-13)
        np.testing.assert_allclose(var, every.var(0), rtol=1e-9, atol=1e-12)


def test_merged_by_hand() -> None:
    # {0, 2} has mean 1 and variance 1; with {4, 6}: mean 3, variance (9 + 1 + 1 + 9) / 4
    mean, var, count = merged(np.array([1.0]), np.array([1.0]), 2, np.array([[4.0], [6.0]]))
    assert (mean.tolist(), var.tolist(), count) == ([3], [5], 4)


def test_moments_of_float32_keep_their_digits() -> None:
    rows = (np.random.default_rng(0).normal(size=(50_000, 1)) * 0.01 + 1000).astype(np.float32)
    mean, var, _ = merged(np.zeros(1), np.ones(1), 0.0, rows)
    assert mean.dtype == var.dtype == np.float64
    np.testing.assert_allclose(var, rows.astype(np.float64).var(0), rtol=1e-9)


# -- observations ----------------------------------------------------------------------------------------------------


def test_observations_pass_at_first_and_are_normalised_later() -> None:
    normalizer, seen = ObsNormalizer(VECTOR), []
    small = rollout(0) / 100
    assert np.array_equal(through(normalizer, small), small)
    assert through(normalizer, np.full((1, 3), 11, np.float32)).tolist() == [[CLIP] * 3]
    for seed in range(3):
        seen.append(rollout(seed))
        normalizer.learn(seen[-1])
        every = np.concatenate(seen).reshape(-1, 3).astype(np.float64)
        new = rollout(10)
        expected = (new - every.mean(0)) / np.sqrt(every.var(0) + EPSILON)
        np.testing.assert_allclose(through(normalizer, new), np.clip(expected, -10, 10), rtol=1e-4, atol=1e-3)
        assert float(normalizer.count) == len(every)
    own = through(normalizer, np.concatenate(seen)).reshape(-1, 3)
    np.testing.assert_allclose(own.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(own.std(0), 1, atol=1e-4)


def test_observations_far_away_are_cut_off() -> None:
    normalizer = ObsNormalizer(VECTOR)
    normalizer.learn(rollout(0))
    far = through(normalizer, np.array([[1e6, -1e6, 200.0]], np.float32))
    assert far[0, :2].tolist() == [CLIP, -CLIP] and abs(far[0, 2]) < CLIP


def test_a_column_that_never_changes_stays_finite() -> None:
    normalizer = ObsNormalizer(VECTOR)
    normalizer.learn(np.full((6, 2, 3), 0.1, np.float32))
    assert through(normalizer, np.full((1, 3), 0.1, np.float32)).tolist() == [[0, 0, 0]]
    assert through(normalizer, np.full((1, 3), 5, np.float32)).tolist() == [[CLIP] * 3]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_numpy_form_is_the_same_and_follows_every_change(dtype: type) -> None:
    normalizer = ObsNormalizer(spaces.Box(-100, 400, (3,), dtype))
    quick, other = normalizer.quick(), ObsNormalizer(spaces.Box(-100, 400, (3,), dtype))
    other.learn(rollout(5, dtype=dtype))
    changes = (
        lambda: None,
        lambda: normalizer.learn(rollout(0, dtype=dtype)),
        lambda: normalizer.learn(rollout(1, dtype=dtype)),
        lambda: normalizer.load_state_dict(other.state_dict()),
    )
    results = []
    for change in changes:
        change()
        obs = rollout(7, (quick.rows, 3), dtype)
        results.append(quick(obs))
        assert results[-1].dtype == np.float32 and np.array_equal(results[-1], through(normalizer, obs))
    assert not any(np.array_equal(a, b) for a, b in itertools.pairwise(results))


def test_statistics_are_saved_with_the_net_and_not_learned_by_it() -> None:
    normalizer = ObsNormalizer(VECTOR)
    assert not list(normalizer.parameters())
    normalizer.learn(rollout(0))
    state = {name: tensor.clone() for name, tensor in normalizer.state_dict().items()}
    assert set(state) == {"mean", "var", "count", "shift", "scale"}
    assert {str(state[name].dtype) for name in ("mean", "var", "count")} == {"torch.float64"}
    resumed = ObsNormalizer(VECTOR)
    resumed.load_state_dict(state)
    for each in (normalizer, resumed):
        each.learn(rollout(1))
    assert all(
        torch.equal(resumed.state_dict()[name], kept) for name, kept in normalizer.state_dict().items()
    )


def test_looking_changes_nothing() -> None:
    normalizer = ObsNormalizer(VECTOR)
    normalizer.learn(rollout(0))
    before = {name: tensor.clone() for name, tensor in normalizer.state_dict().items()}
    obs = rollout(3)
    kept = obs.copy()
    for mode in (True, False):
        normalizer.train(mode)
        through(normalizer, obs)
        normalizer.quick()(obs[0])
    assert all(torch.equal(normalizer.state_dict()[name], old) for name, old in before.items())
    assert np.array_equal(obs, kept)


def test_shapes_with_and_without_time() -> None:
    normalizer, obs = ObsNormalizer(VECTOR), rollout(0)
    normalizer.learn(obs)
    whole = through(normalizer, obs)
    assert whole.shape == obs.shape and np.array_equal(whole[2], through(normalizer, obs[2]))


def test_only_vectors_are_normalised() -> None:
    for space, name in [
        (spaces.Box(0, 255, (84, 84, 3), np.uint8), r"Box\(0, 255, \(84, 84, 3\), uint8\)"),
        (spaces.Discrete(5), r"Discrete\(5\)"),
        (spaces.Dict({"a": VECTOR}), r"Dict\('a'"),
        (spaces.Box(-1, 1, (), np.float32), r"Box\(-1.0, 1.0, \(\), float32\)"),
    ]:
        with pytest.raises(
            UserError, match=f"--normalize-obs works on vectors, observations here are {name}"
        ):
            ObsNormalizer(space)


# -- rewards ---------------------------------------------------------------------------------------------------------


def rewards(seed: int, ends: float = 0.2, shape: tuple[int, int] = (9, 3)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (rng.normal(2, 5, shape)).astype(np.float32), rng.random(shape) < ends


class Naive:
    """Every discounted return so far, of single environments, in a list."""

    def __init__(self, gamma: float, count: int) -> None:
        self.gamma, self.running, self.seen = gamma, [0.0] * count, []

    def __call__(self, reward: np.ndarray, ended: np.ndarray) -> np.ndarray:
        for row, over in zip(reward.tolist(), ended.tolist(), strict=True):
            for n, (r, end) in enumerate(zip(row, over, strict=True)):
                self.running[n] = self.gamma * self.running[n] + r
                self.seen.append(self.running[n])
                self.running[n] = 0.0 if end else self.running[n]
        return np.clip(reward / np.sqrt(np.var(self.seen) + EPSILON), -CLIP, CLIP)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("ends", [0.0, 0.2, 1.0])
def test_rewards_are_divided_by_the_spread_of_returns(gamma: float, ends: float) -> None:
    scaler, naive = RewardScaler(gamma), Naive(gamma, 3)
    for seed in range(4):
        reward, ended = rewards(seed, ends)
        kept = reward.copy()
        found = scaler(reward, ended)
        assert found.dtype == np.float32 and np.array_equal(reward, kept)
        np.testing.assert_allclose(found, naive(reward, ended), rtol=1e-5)


def test_scaled_rewards_by_hand() -> None:
    reward = np.array([[1.0], [1.0], [3.0]], np.float32)
    ended = np.array([[False], [True], [False]])
    # returns so far: 1, 1.5 and, in a new episode, 3
    spread = np.std([1, 1.5, 3])
    found = RewardScaler(0.5)(reward, ended)
    np.testing.assert_allclose(found[:, 0], [1 / spread, 1 / spread, 3 / spread], rtol=1e-6)


def test_scaled_rewards_are_cut_off_and_zeros_stay_zero() -> None:
    scaler, no = RewardScaler(0.99), np.zeros((40, 1), bool)
    assert not scaler(np.zeros((40, 1), np.float32), no).any()
    reward = np.zeros((400, 1), np.float32)
    reward[7] = -1e6
    assert RewardScaler(0.0)(reward, np.zeros((400, 1), bool)).min() == -CLIP


def test_a_saved_scaler_goes_on_in_the_middle_of_an_episode() -> None:
    whole, part = RewardScaler(0.9), RewardScaler(0.9)
    for seed in range(2):
        for each in (whole, part):
            each(*rewards(seed, 0.05))
    state = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    assert set(state) == {"mean", "var", "count", "running"}
    resumed = RewardScaler(0.9)
    resumed.load_state_dict(state)
    forgetful = RewardScaler(0.9)
    forgetful.load_state_dict({name: tensor for name, tensor in state.items() if name != "running"})
    found = [each(*rewards(2, 0.05)) for each in (whole, resumed, forgetful)]
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
    before, after = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(state["mean"], part.state_dict()["mean"])  # what was given is not written into


def test_a_new_scaler_is_saved_too() -> None:
    fresh, other = RewardScaler(0.9), RewardScaler(0.9)
    other(*rewards(0))
    other.load_state_dict(fresh.state_dict())
    assert np.array_equal(other(*rewards(1)), fresh(*rewards(1)))
