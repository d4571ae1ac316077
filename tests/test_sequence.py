"""Sequences against plain lists of slots: every one that can be drawn is what happened, and no other can be."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from replay import Ring, SequenceRing, Sequences, Transition
from replay.priority import EPSILON, Priority
from tests.test_ring import Step, World, assert_same

PRIORITY = Priority(alpha=0.6, beta_start=0.4, beta_end=1.0, beta_steps=100)


class Slot(NamedTuple):
    """What one slot of a lane must hold."""

    obs: Any
    first: bool
    state: np.ndarray  # what was remembered before it
    t: int | None  # the step done there; None at the last observation of an episode


class Model:
    """A world, the replay that watches it, and the slots that its lanes should have."""

    def __init__(self, kind: str, num_envs: int, stack: int, *, seed: int = 0, end: float = 0.2) -> None:
        self.world = World(kind, num_envs, stack, seed=seed, end=end)
        self.slots: list[list[Slot]] = [[] for _ in range(num_envs)]
        self.rng = np.random.default_rng(seed)

    def replay(self, capacity: int, **how: Any) -> SequenceRing:
        world = self.world
        memory = (torch.zeros(1, 2), torch.zeros(1, 3, 1, dtype=torch.int64))
        return SequenceRing(
            capacity, world.num_envs, world.obs_space, world.action_space, state=memory, stack=world.stack,
            gamma=0.9, rng=np.random.default_rng(0), **how,
        )  # fmt: skip

    def play(self, replay: SequenceRing) -> None:
        """One step of every environment, each with a memory that tells it apart."""
        step, n = self.world.play(), self.world.num_envs
        memory = self.rng.normal(size=(n, 2)).astype(np.float32)
        keys = self.rng.integers(2**40, size=(n, 3, 1))
        replay.add(step, (torch.from_numpy(memory), keys))
        for env, slots in enumerate(self.slots):
            history: list[Step] = self.world.history[env]
            now, known = history[-1], np.append(memory[env], keys[env])
            if now.first and slots:
                slots.append(Slot(history[-2].next_obs, False, known, None))
            slots.append(Slot(now.obs, now.first, known, len(history) - 1))

    def starts(self, replay: SequenceRing, capacity: int) -> set[tuple[int, int]]:
        """(env, number of the slot) where a sequence can begin."""
        stride, stack = max(replay.length // 2, 1), self.world.stack
        size = capacity // self.world.num_envs // stride * stride
        found = set()
        for env, slots in enumerate(self.slots):
            kept = range(max(len(slots) - size, 0), len(slots))
            oldest = kept.start + (stack - 1 if kept.start else 0)
            found |= {
                (env, p) for p in kept if p % stride == 0 and p >= oldest and p + replay.span <= len(slots)
            }
        return found

    def check(self, batch: Sequences, column: int, env: int, start: int, replay: SequenceRing) -> None:
        """One sequence of a batch is the one that begins at this slot."""
        slots = self.slots[env][start : start + replay.span]
        kept = np.append(batch.state[0][column].numpy(), batch.state[1][column].numpy())
        np.testing.assert_array_equal(kept, slots[0].state)
        assert batch.first[:, column].tolist() == [slot.first for slot in slots]
        for t, slot in enumerate(slots):
            assert_same(_at(batch.obs, t, column), slot.obs)
        n_step = replay.span - replay.burn_in - replay.length
        for t, slot in enumerate(slots[replay.burn_in : replay.burn_in + replay.length]):
            assert bool(batch.acted[t, column]) == (slot.t is not None)
            if slot.t is None:
                continue
            _, action, reward, next_obs, discount = self.world.expected(env, slot.t, n_step)
            np.testing.assert_array_equal(batch.action[t, column].numpy(), action)
            assert batch.reward[t, column].item() == pytest.approx(reward, rel=1e-5, abs=1e-5)
            assert batch.discount[t, column].item() == pytest.approx(discount, rel=1e-6)
            assert_same(_at(batch.obs, int(batch.successor[t, column]), column), next_obs)


def _at(obs: Any, t: int, column: int) -> Any:
    return (
        {name: leaf[t, column].numpy() for name, leaf in obs.items()}
        if isinstance(obs, dict)
        else obs[t, column].numpy()
    )


class Each:
    """Stands in for the generator: every start once."""

    def integers(self, high: int, size: int) -> np.ndarray:
        return np.arange(size) % high


def assert_true_to(model: Model, replay: SequenceRing, capacity: int) -> None:
    """Compare every sequence that can be drawn."""
    starts = sorted(model.starts(replay, capacity))
    assert len(replay) == len(starts)
    if not starts:
        with pytest.raises(ValueError, match="nothing to sample"):
            replay.sample(1)
        return
    own, replay.ring.rng = replay.ring.rng, Each()  # type: ignore[assignment]
    batch = replay.sample(len(starts))
    replay.ring.rng = own
    for column, (env, start) in enumerate(starts):  # drawn lane by lane, the oldest first
        model.check(batch, column, env, start, replay)
    assert len(set(batch.index.tolist())) == len(starts)
    assert torch.equal(batch.weight, torch.ones(len(starts)))
    assert batch.successor.dtype == torch.int64 and batch.first.dtype == batch.acted.dtype == torch.bool


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    shape=st.one_of(
        st.tuples(st.sampled_from(["image", "vector"]), st.sampled_from([1, 2, 4])),
        st.tuples(st.sampled_from(["dict", "number"]), st.just(1)),
    ),
    num_envs=st.integers(1, 3),
    length=st.integers(1, 7),
    burn_in=st.integers(0, 4),
    n_step=st.integers(1, 4),
    spare=st.integers(0, 30),
    steps=st.integers(0, 90),
    end=st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_sequence_is_what_happened(
    shape: tuple[str, int],
    num_envs: int,
    length: int,
    burn_in: int,
    n_step: int,
    spare: int,
    steps: int,
    end: float,
    seed: int,
) -> None:
    kind, stack = shape
    model, stride = Model(kind, num_envs, stack, seed=seed, end=end), max(length // 2, 1)
    capacity = num_envs * (length + burn_in + n_step + stack + 2 * stride + spare)
    replay = model.replay(capacity, length=length, burn_in=burn_in, n_step=n_step)
    assert_true_to(model, replay, capacity)
    for step in range(steps):
        model.play(replay)
        if step in (steps // 3, steps - 1):
            assert_true_to(model, replay, capacity)


@pytest.mark.parametrize(("kind", "stack"), [("image", 4), ("image", 1), ("dict", 1)])
def test_after_each_single_step_of_many_rounds(kind: str, stack: int) -> None:
    model = Model(kind, 2, stack, end=0.3)
    replay = model.replay(60, length=4, burn_in=2, n_step=2)
    for _ in range(120):
        model.play(replay)
        assert_true_to(model, replay, 60)


def test_one_sequence_by_hand() -> None:
    """Two steps burn in, four are learned (F is none of them), two follow."""
    replay = SequenceRing(
        40, 1, spaces.Box(0, 255, (1,), np.uint8), spaces.Discrete(2),
        state=(torch.zeros(1, 1),), length=4, burn_in=2, n_step=2, gamma=0.5, rng=np.random.default_rng(0),
    )  # fmt: skip
    for t, event in enumerate("..t...."):  # slots: 0 1 2 F=102 3 4 5 6
        obs, then = np.array([[t]], np.uint8), np.array([[t + 100 if event == "t" else t + 1]], np.uint8)
        flags = (np.array([event == "t"]), np.array([False]), np.array([t in (0, 3)]))
        step = Transition(obs, np.array([t % 2]), np.array([2.0**t], np.float32), then, *flags)
        replay.add(step, (torch.full((1, 1), float(t)),))
    batch = replay.sample(1)
    assert len(replay) == 1
    assert batch.obs[:, 0, 0].tolist() == [0, 1, 2, 102, 3, 4, 5, 6]
    assert batch.first[:, 0].tolist() == [True, False, False, False, True, False, False, False]
    assert batch.acted[:, 0].tolist() == [True, False, True, True]
    assert batch.reward[batch.acted].tolist() == [4, 8 + 8, 16 + 16]
    assert batch.discount[batch.acted].tolist() == [0, 0.25, 0.25]
    assert batch.successor[batch.acted].tolist() == [3, 6, 7]
    assert batch.state[0].tolist() == [[0.0]]


def test_a_broken_episode_leaves_a_step_at_which_nothing_was_done() -> None:
    replay = SequenceRing(
        40, 1, spaces.Box(0, 255, (1,), np.uint8), spaces.Discrete(2),
        state=(torch.zeros(1, 1),), length=4, rng=np.random.default_rng(0),
    )  # fmt: skip
    no = np.zeros(1, bool)
    for t in range(5):  # the episode breaks after step 2
        obs = np.array([[t]], np.uint8)
        step = Transition(
            obs, np.array([0]), np.ones(1, np.float32), obs + 1, no, no, np.array([t in (0, 3)])
        )
        replay.add(step, (torch.zeros(1, 1),))
    batch = replay.sample(1)
    assert batch.obs[:, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert batch.acted[:, 0].tolist() == [True, True, False, True]
    assert batch.first[:, 0].tolist() == [True, False, False, True, False]
    assert batch.discount[:2, 0].tolist() == pytest.approx([0.99, 0.99])


# -- drawing -------------------------------------------------------------------------------------------------


def played(steps: int, **how: Any) -> tuple[Model, SequenceRing]:
    model = Model("vector", 2, 1)
    replay = model.replay(120, length=6, burn_in=2, n_step=2, **how)
    for _ in range(steps):
        model.play(replay)
    return model, replay


@pytest.mark.parametrize("steps", [5, 12, 30, 55, 61, 62, 63, 64, 200])
def test_exactly_the_possible_starts_have_a_priority(steps: int) -> None:
    model, replay = played(steps, priority=PRIORITY)
    assert replay.preferred is not None
    starts = {
        env * 20 + p // 3 % 20 for env, p in model.starts(replay, 120)
    }  # 20 starts a lane, 3 slots apart
    assert set(np.flatnonzero(replay.preferred.tree.leaves)) == starts
    assert len(replay) == len(starts)


def test_sequences_come_by_priority_and_are_what_they_claim() -> None:
    model, replay = played(200, priority=PRIORITY)
    assert replay.preferred is not None
    batch = replay.sample(2_000)
    replay.update_priority(batch.index, torch.linspace(0, 3, 2_000))
    leaves = replay.preferred.tree.leaves
    assert leaves[int(batch.index[-1])] == pytest.approx((3 + EPSILON) ** 0.6)
    drawn = replay.sample(20_000)
    places = np.flatnonzero(leaves)
    counts = np.bincount(drawn.index.numpy(), minlength=len(leaves))[places]
    expected = leaves[places] / leaves.sum() * 20_000
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), len(places) - 1
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)
    by_place = {env * 20 + p // 3 % 20: (env, p) for env, p in model.starts(replay, 120)}
    for column in range(50):
        model.check(drawn, column, *by_place[int(drawn.index[column])], replay)
    lowest = leaves[drawn.index.numpy()].min()
    np.testing.assert_allclose(
        drawn.weight.numpy(), lowest / leaves[drawn.index.numpy()], rtol=1e-6
    )  # beta 1


def test_starts_are_drawn_uniformly() -> None:
    model, replay = played(150)
    count = len(model.starts(replay, 120))
    _, counts = np.unique(replay.sample(400 * count).index.numpy(), return_counts=True)
    assert len(counts) == count
    chi_square, freedom = float(((counts - 400) ** 2 / 400).sum()), count - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("priority", [None, PRIORITY])
@pytest.mark.parametrize("steps", [0, 7, 150])
def test_state_dict_round_trip(priority: Priority | None, steps: int) -> None:
    _, replay = played(steps, priority=priority)
    if len(replay):
        index = replay.sample(9).index
        replay.update_priority(index, torch.linspace(0, 5, 9))
    saved = {name: array.copy() for name, array in replay.state_dict().items()}
    _, other = played(33, priority=priority)
    other.load_state_dict(saved)
    for name, array in other.state_dict().items():
        np.testing.assert_array_equal(array, saved[name])
    if len(replay):
        for one, two in zip(replay.sample(20), other.sample(20), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(_flat(one), _flat(two), strict=True))


def _flat(part: Any) -> list[torch.Tensor]:
    return list(part) if isinstance(part, tuple) else [part]


def test_a_state_of_another_replay_is_refused() -> None:
    _, replay = played(20)
    model = Model("vector", 2, 1)
    for other in (model.replay(120, length=4, burn_in=2), model.replay(120, length=6, priority=PRIORITY)):
        with pytest.raises(ValueError, match="saved with"):
            other.load_state_dict(replay.state_dict())
    ring = Ring(120, 2, model.world.obs_space, model.world.action_space, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="saved with"):
        replay.load_state_dict(ring.state_dict())


@pytest.mark.parametrize(("length", "burn_in", "n_step", "stack"), [(8, 3, 2, 1), (1, 0, 1, 4), (5, 4, 3, 4)])
def test_a_sequence_longer_than_the_replay_is_refused(
    length: int, burn_in: int, n_step: int, stack: int
) -> None:
    model = Model("image", 2, stack)
    how = dict(length=length, burn_in=burn_in, n_step=n_step)
    with pytest.raises(
        ValueError, match=rf"--capacity .* sequences of {length + burn_in + n_step} steps, got 6"
    ) as caught:
        model.replay(6, **how)
    enough = int(str(caught.value).split()[5])
    replay = model.replay(enough, **how)
    for _ in range(150):  # once there is a sequence there always is one
        model.play(replay)
        assert len(replay) or min(map(len, model.slots)) <= replay.span + replay.stride
    with pytest.raises(ValueError, match="--capacity"):
        model.replay(enough - 1, **how)


def test_memory_is_kept_only_where_sequences_begin() -> None:
    _, replay = played(10)
    how = dict(rng=np.random.default_rng(0))
    ring = Ring(120, 2, spaces.Box(-np.inf, np.inf, (3,), np.float32), spaces.Discrete(5), **how)
    kept = 2 * 20 * (2 * 4 + 3 * 8) + 120 + 16  # memory, first, lanes
    assert replay.nbytes == ring.nbytes + kept
    assert replay.sample_nbytes == 10 * 3 * 4
