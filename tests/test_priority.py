"""The sum tree against plain arrays, and what prioritised sampling promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from replay import Ring, Transition
from replay.priority import EPSILON, Priority, SumTree, weights
from replay.ring import FINAL
from tests.tools import VECTOR

PRIORITY = Priority(alpha=0.6, beta_start=0.4, beta_end=1.0, beta_steps=100)


def filled(steps: int, *, num_envs: int = 2, slots: int = 30, stack: int = 1, n_step: int = 1) -> Ring:
    """A ring with episodes of length 7 and 11."""
    space = spaces.Box(0, 255, (stack, 2, 2), np.uint8) if stack > 1 else VECTOR
    ring = Ring(
        num_envs * slots,
        num_envs,
        space,
        spaces.Discrete(2),
        stack=stack,
        n_step=n_step,
        priority=PRIORITY,
        rng=np.random.default_rng(0),
    )
    obs, no = np.zeros((num_envs, *space.shape), space.dtype), np.zeros(num_envs, bool)
    first = ~no
    for step in range(1, steps + 1):
        ended = np.array([step % length == 0 for length in (7, 11)[:num_envs]])
        action = np.full(num_envs, step % 2)
        ring.add(Transition(obs, action, np.full(num_envs, step, np.float32), obs, ended, no, first))
        first = ended
    return ring


@pytest.mark.parametrize("size", (1, 15, 16, 17, 300, 5_000))
def test_tree_finds_what_a_running_sum_finds(size: int) -> None:
    rng = np.random.default_rng(size)
    tree, plain = SumTree(size), np.zeros(size)
    for _ in range(5):
        index = rng.integers(size, size=64)
        value = rng.random(64) * (rng.random(64) < 0.7)
        tree.set(index, value)
        for i, v in zip(index, value, strict=True):  # the last value of an index stays
            plain[i] = v
        np.testing.assert_array_equal(tree.leaves[:size], plain)
        assert tree.total == pytest.approx(plain.sum())
        if not tree.total:
            continue
        mass = rng.random(200) * tree.total
        np.testing.assert_array_equal(tree.find(mass), np.searchsorted(plain.cumsum(), mass, side="right"))


def test_tree_never_finds_a_zero() -> None:
    tree = SumTree(300)
    tree.set(np.array([5, 6, 40, 290]), np.array([0.1, 0.2, 0.3, 1e-9]))
    total = tree.total
    found = tree.find(np.array([0.0, np.nextafter(total, 0), total, total * (1 + 1e-12)]))
    assert found[0] == 5 and set(found[1:]) <= {40, 290}


def test_tree_sums_stay_exact_after_many_changes() -> None:
    rng, tree = np.random.default_rng(0), SumTree(1_000)
    for _ in range(3_000):
        tree.set(rng.integers(1_000, size=32), 10.0 ** rng.uniform(-8, 8, 32))
    assert tree.total == pytest.approx(tree.leaves.sum(), rel=1e-13)
    copy = SumTree(1_000)
    copy.refill(tree.leaves)
    assert copy.total == tree.total


@pytest.mark.parametrize("steps", (3, 12, 29, 30, 31, 35, 200))
@pytest.mark.parametrize(("stack", "n_step"), ((1, 1), (1, 3), (4, 1), (4, 3)))
def test_exactly_the_possible_starts_have_a_priority(steps: int, stack: int, n_step: int) -> None:
    ring = filled(steps, stack=stack, n_step=n_step)
    low, high = ring._window()
    possible = {
        lane * ring.slots + position % ring.slots
        for lane in range(2)
        for position in range(low[lane], high[lane])
        if ring._flag[lane * ring.slots + position % ring.slots] != FINAL
    }
    assert ring.preferred is not None
    assert set(np.flatnonzero(ring.preferred.tree.leaves)) == possible


def test_samples_come_by_priority_and_are_the_same_data() -> None:
    ring = filled(100)
    assert ring.preferred is not None
    batch = ring.sample(4_000)
    error = torch.linspace(0, 3, 4_000)
    ring.update_priority(batch.index, error)
    expected = (float(error[-1]) + EPSILON) ** 0.6
    assert ring.preferred.tree.leaves[int(batch.index[-1])] == pytest.approx(expected)
    leaves = ring.preferred.tree.leaves
    drawn = ring.sample(50_000)
    slots = np.flatnonzero(leaves)
    counts = np.bincount(drawn.index.numpy(), minlength=len(leaves))
    assert counts.sum() == counts[slots].sum()
    expected_counts = leaves[slots] / leaves.sum() * 50_000
    chi_square, freedom = ((counts[slots] - expected_counts) ** 2 / expected_counts).sum(), len(slots) - 1
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)  # four standard deviations
    # rewards are the numbers of their steps: the rows belong to the slots they claim
    np.testing.assert_array_equal(drawn.reward.numpy(), ring._reward[drawn.index.numpy()])
    np.testing.assert_array_equal(drawn.action.numpy(), ring._action[drawn.index.numpy()])


def test_weighted_mean_is_unbiased_at_beta_one() -> None:
    ring = filled(100)  # past beta_steps: beta is 1
    assert ring.preferred is not None
    slots = np.flatnonzero(ring.preferred.tree.leaves)
    value = ring._reward[slots]
    ring.update_priority(torch.from_numpy(slots), torch.from_numpy((value - value.min() + 1) ** 3))
    batch = ring.sample(200_000)
    weight, reward = batch.weight.numpy().astype(np.float64), batch.reward.numpy()
    uniform = value.mean()
    assert (weight * reward).sum() / weight.sum() == pytest.approx(uniform, rel=0.01)
    assert abs(reward.mean() - uniform) > 0.02 * uniform  # without weights it is not
    assert weight.max() == 1


def test_weights_and_beta_by_hand() -> None:
    np.testing.assert_allclose(weights(np.array([1.0, 4.0, 16.0]), 0.5), [1, 0.5, 0.25])
    np.testing.assert_allclose(weights(np.array([1.0, 4.0]), 0.0), [1, 1])
    assert [PRIORITY.beta(step) for step in (0, 50, 100, 900)] == pytest.approx([0.4, 0.7, 1.0, 1.0])
    down = Priority(0.6, 1.0, 0.0, 10)
    assert [down.beta(step) for step in (0, 5, 20)] == pytest.approx([1.0, 0.5, 0.0])


def test_what_is_new_gets_the_highest_priority_so_far() -> None:
    ring = filled(20)
    assert ring.preferred is not None
    assert ring.preferred.tree.leaves.max() == 1
    ring.update_priority(torch.tensor([3]), torch.tensor([32.0]))
    before = set(np.flatnonzero(ring.preferred.tree.leaves))
    obs, no = np.zeros((2, 3), np.float32), np.zeros(2, bool)
    ring.add(Transition(obs, np.zeros(2, np.int64), np.ones(2, np.float32), obs, no, no, no))
    new = set(np.flatnonzero(ring.preferred.tree.leaves)) - before
    assert len(new) == 2
    for slot in new:
        assert ring.preferred.tree.leaves[slot] == pytest.approx((32 + EPSILON) ** 0.6)


def test_state_holds_the_priorities() -> None:
    ring, copy = filled(50), filled(10)
    batch = ring.sample(64)
    ring.update_priority(batch.index, torch.rand(64, generator=torch.Generator().manual_seed(0)) * 9)
    copy.load_state_dict({name: array.copy() for name, array in ring.state_dict().items()})
    ring.rng, copy.rng = np.random.default_rng(3), np.random.default_rng(3)
    a, b = ring.sample(100), copy.sample(100)
    assert torch.equal(a.index, b.index) and torch.equal(a.weight, b.weight)
