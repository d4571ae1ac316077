"""Returns and advantages against sums written out, with random ends of episodes."""

from __future__ import annotations

import numpy as np
import pytest

from agents.returns import discounted, gae, lambda_returns, next_values


class Case:
    """A random rollout (T, N): rewards, values, successors' values, and masks that may be true at once."""

    def __init__(self, seed: int, ends: float = 0.3, shape: tuple[int, ...] = (17, 5)) -> None:
        rng = np.random.default_rng(seed)
        self.reward, self.value, last = (
            rng.normal(size=shape),
            rng.normal(size=shape),
            rng.normal(size=shape[1:]),
        )
        self.terminated, truncated = rng.random(shape) < ends, rng.random(shape) < ends
        self.ended = self.terminated | truncated
        following = np.concatenate([self.value[1:], last[None]])
        self.next_value = np.where(
            self.ended, rng.normal(size=shape), following
        )  # V(s') where s' is not the next row
        self.gamma, self.lam = rng.uniform(0.8, 1), rng.uniform(0.3, 1)

    def gae(self, lam: float | None = None) -> np.ndarray:
        lam = self.lam if lam is None else lam
        masks = (self.terminated, self.ended)
        return gae(self.reward, self.value, self.next_value, *masks, self.gamma, lam)


def double_sum(case: Case, lam: float) -> np.ndarray:
    """A_t = sum_k (gamma lam)^k delta_{t+k} up to the end of the episode or the rollout, step by step."""
    result = np.zeros(case.reward.shape)
    for t, n in np.ndindex(*case.reward.shape):
        for k in range(len(case.reward) - t):
            at = (t + k, n)
            after = 0.0 if case.terminated[at] else case.next_value[at]
            delta = case.reward[at] + case.gamma * after - case.value[at]
            result[t, n] += (case.gamma * lam) ** k * delta
            if case.ended[at]:
                break
    return result


def return_sum(case: Case) -> np.ndarray:
    """The discounted rewards up to the end, and the value of what follows it, of every step."""
    result = np.zeros(case.reward.shape)
    for t, n in np.ndindex(*case.reward.shape):
        factor = 1.0
        for u in range(t, len(case.reward)):
            result[t, n] += factor * case.reward[u, n]
            factor *= case.gamma
            if case.ended[u, n] or u == len(case.reward) - 1:
                result[t, n] += 0.0 if case.terminated[u, n] else factor * case.next_value[u, n]
                break
    return result


@pytest.mark.parametrize("ends", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_gae_is_the_double_sum(seed: int, ends: float) -> None:
    case = Case(seed, ends)
    np.testing.assert_allclose(case.gae(), double_sum(case, case.lam), rtol=0, atol=1e-12)


def test_gae_with_lam_0_is_the_error_of_one_step() -> None:
    case = Case(7)
    delta = case.reward + case.gamma * np.where(case.terminated, 0, case.next_value) - case.value
    np.testing.assert_allclose(case.gae(0.0), delta, rtol=0, atol=1e-12)


def test_gae_with_lam_1_is_the_return_less_the_value() -> None:
    case = Case(8, 0.1)
    np.testing.assert_allclose(case.gae(1.0), return_sum(case) - case.value, rtol=0, atol=1e-12)


def test_gae_of_one_environment_and_of_one_step() -> None:
    case, line = Case(9), Case(9)
    for name in ("reward", "value", "next_value", "terminated", "ended"):
        setattr(line, name, getattr(case, name)[:, 2])
    assert np.array_equal(line.gae(), case.gae()[:, 2])
    single = Case(10, 0.3, (1, 50))
    np.testing.assert_allclose(single.gae(), double_sum(single, single.lam), rtol=0, atol=1e-12)


def test_gae_by_hand() -> None:
    reward, value = np.array([[1.0], [2.0], [3.0]]), np.array([[10.0], [20.0], [30.0]])
    next_value = np.array([[20.0], [6.0], [40.0]])  # the second step was cut in a state of value 6
    no, cut = np.zeros((3, 1), bool), np.array([[False], [True], [False]])
    found = gae(reward, value, next_value, no, cut, 0.5, 0.5)
    # deltas: 1 + 10 - 10,  2 + 3 - 20,  3 + 20 - 30
    assert found[:, 0].tolist() == [1 - 0.25 * 15, -15, -7]
    assert gae(reward, value, next_value, cut, cut, 0.5, 0.5)[:, 0].tolist() == [1 - 0.25 * 18, -18, -7]


def test_terminated_and_truncated_at_once_is_terminated() -> None:
    case = Case(11)
    case.terminated[4] = case.ended[4] = True
    other = Case(11)
    other.terminated[4] = other.ended[4] = True
    other.next_value[4] = 1e6
    assert np.array_equal(case.gae(), other.gae())
    masks = (case.terminated, case.ended, case.gamma)
    assert np.array_equal(
        discounted(case.reward, case.next_value, *masks), discounted(case.reward, other.next_value, *masks)
    )


def test_discounted_by_hand() -> None:
    reward, next_value = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([9.0, 9.0, 32.0, 9.0, 64.0])
    terminated = np.array([False, True, False, False, False])
    ended = np.array([False, True, True, False, False])  # terminated, cut, and still running in the end
    found = discounted(reward, next_value, terminated, ended, 0.5)
    assert found.tolist() == [2, 2, 4 + 16, 8 + 0.5 * (16 + 32), 16 + 32]


@pytest.mark.parametrize("ends", [0.0, 0.2, 1.0])
def test_discounted_is_the_sum_to_the_end(ends: float) -> None:
    case = Case(12, ends)
    found = discounted(case.reward, case.next_value, case.terminated, case.ended, case.gamma)
    np.testing.assert_allclose(found, return_sum(case), rtol=0, atol=1e-12)


def test_lambda_returns_are_those_of_rlax() -> None:
    # the first case of rlax's own test of lambda_returns
    reward, discount = np.array([1.0, 0.0, -1.0, 0.0, 1.0]), np.array([0.5, 0.9, 1.0, 0.5, 0.8])
    found = lambda_returns(reward, discount, np.array([3.0, 1.0, 5.0, -5.0, 3.0]), 0.75)
    np.testing.assert_allclose(found, [1.6460547, 0.72281253, 0.7375001, 0.6500001, 3.4], rtol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_lambda_returns_are_advantages_and_values(lam: float) -> None:
    case = Case(13, 0.2)
    case.ended = case.terminated  # a cut in the middle is no case for them
    case.next_value = np.where(case.terminated, 5.0, np.concatenate([case.value[1:], case.next_value[-1:]]))
    returns = lambda_returns(case.reward, case.gamma * ~case.terminated, case.next_value, lam)
    np.testing.assert_allclose(returns, case.gae(lam) + case.value, rtol=0, atol=1e-12)


def test_next_values_by_hand() -> None:
    value = np.arange(12.0).reshape(4, 3)
    truncated = np.zeros((4, 3), bool)
    truncated[1, [0, 2]] = truncated[3, 1] = True
    kept = value.copy()
    found = next_values(value, np.array([100.0, 101.0, 102.0]), truncated, np.array([-1.0, -2.0, -3.0]))
    assert found.tolist() == [[3, 4, 5], [-1, 7, -2], [9, 10, 11], [100, -3, 102]]
    assert np.array_equal(value, kept)
    none = next_values(value, value[0], np.zeros((4, 3), bool), np.zeros(0))
    assert np.array_equal(none, np.roll(value, -1, 0))


def test_float32_stays_float32_and_nothing_is_written_into_what_is_given() -> None:
    case = Case(14)
    given = [part.astype(np.float32) for part in (case.reward, case.value, case.next_value)]
    reward, value, following = given
    kept = [part.copy() for part in given]
    masks = (case.terminated, case.ended)
    found = [
        gae(reward, value, following, *masks, 0.99, 0.95),
        discounted(reward, following, *masks, 0.99),
        lambda_returns(reward, (0.99 * ~case.terminated).astype(np.float32), following, 0.95),
        next_values(value, value[0], case.ended, np.zeros(int(case.ended.sum()), np.float32)),
    ]
    assert [each.dtype for each in found] == [np.float32] * 4
    assert all(map(np.array_equal, given, kept))
    case.gamma, case.lam = 0.99, 0.95
    np.testing.assert_allclose(found[0], double_sum(case, 0.95), atol=1e-5)
    np.testing.assert_allclose(found[1], return_sum(case), atol=1e-5)


def test_lambda_returns_are_gae_plus_values_also_where_episodes_end() -> None:
    rng = np.random.default_rng(5)
    reward, value, last = rng.normal(size=(12, 3)), rng.normal(size=(12, 3)), rng.normal(size=3)
    terminated, truncated = rng.random((12, 3)) < 0.2, rng.random((12, 3)) < 0.3
    truncated &= ~terminated
    following = next_values(value, last, truncated, rng.normal(size=int(truncated.sum())))
    ended = terminated | truncated
    expected = gae(reward, value, following, terminated, ended, 0.9, 0.7) + value
    assert np.allclose(lambda_returns(reward, 0.9 * ~terminated, following, 0.7, ended), expected, atol=1e-12)
    assert not np.allclose(lambda_returns(reward, 0.9 * ~terminated, following, 0.7), expected, atol=1e-3)
