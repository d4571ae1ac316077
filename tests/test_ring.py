"""The ring against a plain list of steps: what is drawn is what happened, whatever was overwritten since."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.ring import Ring
from replay.types import Batch, Transition

GAMMA = 0.9
GOES_ON, LIFE_LOST, TERMINATED, TRUNCATED = range(4)

FRAMES: dict[str, spaces.Space[Any]] = {
    "image": spaces.Box(0, 255, (2, 3), np.uint8),
    "vector": spaces.Box(-np.inf, np.inf, (3,), np.float32),
    "number": spaces.Discrete(10_000),
    "dict": spaces.Dict({"screen": spaces.Box(0, 255, (2, 3), np.uint8), "speed": spaces.Box(-1, 1e5, (2,))}),
}
ACTIONS: list[spaces.Space[Any]] = [spaces.Discrete(5), spaces.Box(-1, 1, (2,)), spaces.MultiDiscrete([3, 4])]


class Step(NamedTuple):
    """One step of one environment."""

    obs: Any
    action: Any
    reward: float
    next_obs: Any
    terminated: bool
    truncated: bool
    first: bool


class World:
    """Random histories in which no two frames of an environment look the same."""

    def __init__(
        self, kind: str, num_envs: int, stack: int, *, seed: int = 0, end: float = 0.2, action: int = 0
    ) -> None:
        self.frame, self.stack, self.num_envs, self.end = FRAMES[kind], stack, num_envs, end
        self.rng = np.random.default_rng(seed)
        self.action_space = ACTIONS[action]
        self.action_space.seed(seed)
        self.obs_space = _stacked(self.frame, stack)
        self.made = [0] * num_envs
        self.episode = [[self._new_frame(env)] for env in range(num_envs)]  # frames of the running ones
        self.history: list[list[Step]] = [[] for _ in range(num_envs)]

    def _new_frame(self, env: int) -> Any:
        self.made[env] += 1
        return _draw(self.frame, env, self.made[env])

    def _obs(self, env: int) -> Any:
        frames = self.episode[env]
        if self.stack == 1:
            return frames[-1]
        frames = [np.zeros_like(frames[0])] * self.stack + frames
        return np.stack(frames[-self.stack :])

    def play(self) -> Transition:
        """One step of every environment."""
        for env, steps in enumerate(self.history):
            first = len(self.episode[env]) == 1
            obs = self._obs(env)
            event = self.rng.integers(1, 4) if self.rng.random() < self.end else GOES_ON
            self.episode[env].append(self._new_frame(env))
            steps.append(
                Step(
                    obs,
                    self.action_space.sample(),
                    float(np.float32(self.rng.normal())),
                    self._obs(env),
                    event in (LIFE_LOST, TERMINATED),
                    event == TRUNCATED,
                    first,
                )
            )
            if event in (TERMINATED, TRUNCATED):
                self.episode[env] = [self._new_frame(env)]
        return Transition(*map(_batched, zip(*(steps[-1] for steps in self.history), strict=True)))

    def ring(self, capacity: int, n_step: int, seed: int = 0) -> Ring:
        """An empty ring for this world."""
        return Ring(
            capacity, self.num_envs, self.obs_space, self.action_space,
            stack=self.stack, n_step=n_step, gamma=GAMMA, rng=np.random.default_rng(seed),
        )  # fmt: skip

    def starts(self, ring: Ring) -> set[tuple[int, int]]:
        """(env, t) of each step whose stack and n-step successor fit into the ring."""
        found = set()
        for env, steps in enumerate(self.history):
            slot = np.arange(len(steps)) + np.cumsum([step.first for step in steps]) - 1  # resets cost a slot
            written = slot[-1] + 1 if len(steps) else 0
            low = written - ring.slots + self.stack - 1 if written > ring.slots else 0
            found |= {(env, t) for t, s in enumerate(slot) if low <= s < written - ring.n_step}
        return found

    def expected(self, env: int, t: int, n_step: int) -> tuple[Any, ...]:
        """What a sample that starts at step t must hold: obs, action, reward, next_obs, discount."""
        reward, steps = 0.0, self.history[env]
        for i in range(n_step):
            step = steps[t + i]
            reward += GAMMA**i * step.reward
            if step.terminated or step.truncated:
                break
        return steps[t].obs, steps[t].action, reward, step.next_obs, GAMMA ** (i + 1) * (not step.terminated)

    def name(self, obs: Any) -> tuple[int, int]:
        """(env, t) of the step that began with this observation."""
        newest = obs[-1] if self.stack > 1 else obs
        env, number = _read(newest)
        made = [_read(step.obs[-1] if self.stack > 1 else step.obs)[1] for step in self.history[env]]
        return env, made.index(number)


class Each:
    """Stands in for the generator: the first draw names every start once, later ones search on."""

    def __init__(self) -> None:
        self.calls = 0

    def integers(self, high: int, size: int) -> np.ndarray:
        self.calls += 1
        return np.arange(size) if self.calls == 1 else np.full(size, (self.calls - 2) % high)


def _draw(space: spaces.Space[Any], env: int, number: int) -> Any:
    if isinstance(space, spaces.Dict):
        return {name: _draw(child, env, number) for name, child in space.spaces.items()}
    if isinstance(space, spaces.Discrete):
        return np.int64(1_000 * env + number)
    frame = np.zeros(space.shape or (), space.dtype)
    frame.flat[:2] = env * 64 + 1 + number // 200, 1 + number % 200
    return frame


def _read(frame: Any) -> tuple[int, int]:
    frame = frame["screen"] if isinstance(frame, dict) else frame
    if frame.ndim == 0:
        return divmod(int(frame), 1_000)
    high, low = (int(x) for x in frame.flat[:2])
    return (high - 1) // 64, (high - 1) % 64 * 200 + low - 1


def _stacked(space: spaces.Space[Any], stack: int) -> spaces.Space[Any]:
    if stack == 1:
        return space
    assert isinstance(space, spaces.Box)
    low, high = (np.repeat(bound[None], stack, axis=0) for bound in (space.low, space.high))
    return spaces.Box(low, high, dtype=space.dtype)  # type: ignore[arg-type]


def _batched(values: tuple[Any, ...]) -> Any:
    if isinstance(values[0], dict):
        return {name: np.stack([value[name] for value in values]) for name in values[0]}
    array = np.stack(values)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _row(obs: Any, i: int) -> Any:
    return {name: x[i].numpy() for name, x in obs.items()} if isinstance(obs, dict) else obs[i].numpy()


def _leaves(obs: Any) -> dict[str, Any]:
    return obs if isinstance(obs, dict) else {"": obs}


def assert_same(got: Any, wanted: Any) -> None:
    assert _leaves(got).keys() == _leaves(wanted).keys()
    for name, array in _leaves(wanted).items():
        assert _leaves(got)[name].dtype == array.dtype
        np.testing.assert_array_equal(_leaves(got)[name], array)


def assert_batches_equal(one: Batch, two: Batch) -> None:
    for a, b in zip(one, two, strict=True):
        assert _leaves(a).keys() == _leaves(b).keys()
        assert all(torch.equal(_leaves(a)[name], _leaves(b)[name]) for name in _leaves(a))


def assert_true_to(world: World, ring: Ring) -> None:
    """Compare every sample that can be drawn with the history."""
    starts = world.starts(ring)
    if not starts:
        with pytest.raises(ValueError, match="nothing to sample"):
            ring.sample(1)
        return
    own, ring.rng = ring.rng, Each()  # type: ignore[assignment]
    batch = ring.sample(len(ring))
    ring.rng = own
    seen = set()
    for i in range(len(batch.reward)):
        env, t = world.name(_row(batch.obs, i))
        seen.add((env, t))
        obs, action, reward, next_obs, discount = world.expected(env, t, ring.n_step)
        assert_same(_row(batch.obs, i), obs)
        assert_same(_row(batch.next_obs, i), next_obs)
        np.testing.assert_array_equal(batch.action[i].numpy(), action)
        assert batch.reward[i].item() == pytest.approx(reward, rel=1e-5, abs=1e-5)
        assert batch.discount[i].item() == pytest.approx(discount, rel=1e-6)
        assert int(batch.index[i]) // ring.slots == env
    assert seen == starts
    assert batch.reward.dtype == batch.discount.dtype == batch.weight.dtype == torch.float32
    assert torch.equal(batch.weight, torch.ones(len(batch.reward)))


def filled(
    kind: str = "image",
    num_envs: int = 3,
    stack: int = 4,
    n_step: int = 3,
    capacity: int = 90,
    steps: int = 70,
) -> tuple[World, Ring]:
    """A world that was played for some steps, and a ring that saw them."""
    world = World(kind, num_envs, stack)
    ring = world.ring(capacity, n_step)
    for _ in range(steps):
        ring.add(world.play())
    return world, ring


# -- what is drawn is what happened --------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=st.one_of(
        st.tuples(st.sampled_from(["image", "vector"]), st.integers(1, 4)),
        st.tuples(st.sampled_from(["dict", "number"]), st.just(1)),
    ),
    num_envs=st.integers(1, 3),
    n_step=st.integers(1, 5),
    spare=st.integers(0, 30),
    ragged=st.integers(0, 2),
    steps=st.integers(0, 100),
    end=st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]),
    action=st.integers(0, len(ACTIONS) - 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_sample_is_what_happened(
    shape: tuple[str, int],
    num_envs: int,
    n_step: int,
    spare: int,
    ragged: int,
    steps: int,
    end: float,
    action: int,
    seed: int,
) -> None:
    kind, stack = shape
    world = World(kind, num_envs, stack, seed=seed, end=end, action=action)
    capacity = num_envs * (stack + n_step + 1 + spare) + min(ragged, num_envs - 1)  # the rest stays unused
    ring = world.ring(capacity, n_step)
    assert_true_to(world, ring)
    for step in range(steps):
        ring.add(world.play())
        if step in (steps // 3, steps - 1):
            assert_true_to(world, ring)


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize(("kind", "stack"), [("image", 4), ("image", 1), ("vector", 2), ("dict", 1)])
def test_after_each_single_step_of_many_rounds(kind: str, stack: int, n_step: int) -> None:
    world = World(kind, 2, stack, end=0.4)
    ring = world.ring(2 * (stack + n_step + 3), n_step)
    for _ in range(8 * ring.slots):
        ring.add(world.play())
        assert_true_to(world, ring)


def tiny(events: str, n_step: int, stack: int = 2) -> Batch:
    """All samples of one env with rewards 1, 2, 4, ... and frames 1, 2, 3, ..., by time; '.' goes on.

    'l' is a lost life, 't' a termination, 'c' a truncation (cut); the frame after an end is its number + 100.
    """
    ring = Ring(
        100, 1, spaces.Box(0, 255, (stack, 1), np.uint8), spaces.Discrete(2),
        stack=stack, n_step=n_step, gamma=0.5, rng=np.random.default_rng(0),
    )  # fmt: skip
    episode: list[int] = []
    for t, event in enumerate(events):
        first, frame = not episode, t + 1
        episode = episode or [frame]
        now = np.array(([0] * stack + episode)[-stack:], np.uint8).reshape(1, stack, 1)
        episode.append(frame + 1 if event in ".l" else frame + 100)
        then = np.array(([0] * stack + episode)[-stack:], np.uint8).reshape(1, stack, 1)
        flags = (np.array([event in "tl"]), np.array([event == "c"]), np.array([first]))
        ring.add(Transition(now, np.array([t % 2]), np.array([2.0**t], np.float32), then, *flags))
        episode = [] if event in "tc" else episode
    ring.rng = Each()  # type: ignore[assignment]
    batch = ring.sample(len(ring))
    _, once = np.unique(batch.index.numpy(), return_index=True)
    return Batch(*(x[once] for x in batch))


def test_one_step_by_hand() -> None:
    batch = tiny(".t.c..", 1)
    assert batch.index.tolist() == [0, 1, 3, 4, 6]  # 2 and 5 hold the last frames of the episodes
    assert batch.obs[:, :, 0].tolist() == [[0, 1], [1, 2], [0, 3], [3, 4], [0, 5]]
    assert batch.next_obs[:, :, 0].tolist() == [[1, 2], [2, 102], [3, 4], [4, 104], [5, 6]]
    assert batch.reward.tolist() == [1, 2, 4, 8, 16]
    assert batch.discount.tolist() == [0.5, 0, 0.5, 0.5, 0.5]
    assert batch.action.tolist() == [0, 1, 0, 1, 0]


def test_three_steps_by_hand() -> None:
    batch = tiny("..l.c...", 3)
    assert batch.index.tolist() == [0, 1, 2, 3, 4]  # 6 7 8 wait for their successors
    assert batch.obs[:, :, 0].tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]
    assert batch.next_obs[:, :, 0].tolist() == [[3, 4], [3, 4], [3, 4], [5, 105], [5, 105]]
    assert batch.reward.tolist() == [1 + 1 + 1, 2 + 2, 4, 8 + 8, 16]
    assert batch.discount.tolist() == [0, 0, 0, 0.25, 0.5]


def test_a_lost_life_keeps_the_stack_and_costs_no_slot() -> None:
    batch = tiny(".l..", 1)
    assert batch.obs[:, :, 0].tolist() == [[0, 1], [1, 2], [2, 3]]
    assert batch.discount.tolist() == [0.5, 0, 0.5]


# -- drawing -------------------------------------------------------------------------------------------------


def test_starts_are_drawn_uniformly() -> None:
    world, ring = filled("vector", num_envs=3, stack=1, n_step=2, capacity=90, steps=70)
    starts = world.starts(ring)
    draws = 400 * len(starts)
    _, counts = np.unique(ring.sample(draws).index.numpy(), return_counts=True)
    assert len(counts) == len(starts)
    chi_square = float(((counts - 400) ** 2 / 400).sum())
    freedom = len(starts) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("kind", ["image", "dict"])
def test_same_seed_same_batches(kind: str) -> None:
    stack = 4 if kind == "image" else 1
    (_, one), (_, two) = filled(kind, stack=stack), filled(kind, stack=stack)
    for batch in (1, 32, 7):
        assert_batches_equal(one.sample(batch), two.sample(batch))
    two.rng = np.random.default_rng(1)
    assert not torch.equal(one.sample(32).index, two.sample(32).index)


def test_global_random_state_is_left_alone() -> None:
    _, ring = filled()
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]
    ring.sample(64)
    assert np.array_equal(np.random.get_state()[1], before)  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), torch_before)


@pytest.mark.parametrize("n_step", [1, 3])
def test_nothing_to_sample(n_step: int) -> None:
    world = World("image", 2, 4, end=0)
    ring = world.ring(100, n_step)
    for _ in range(n_step):
        assert len(ring) == 0
        with pytest.raises(ValueError, match="nothing to sample"):
            ring.sample(1)
        ring.add(world.play())
    ring.add(world.play())
    assert len(ring) == 2
    assert ring.sample(5).obs.shape == (5, 4, 2, 3)


@pytest.mark.parametrize(("stack", "n_step", "num_envs"), [(1, 1, 1), (4, 1, 3), (4, 5, 4), (2, 3, 2)])
def test_capacity_below_one_sample_is_refused(stack: int, n_step: int, num_envs: int) -> None:
    enough = num_envs * (stack + n_step + 1)
    world = World("image", num_envs, stack)
    world.ring(enough, n_step)
    with pytest.raises(ValueError, match=f"at least {enough} for {num_envs} environments, got {enough - 1}"):
        world.ring(enough - 1, n_step)


def test_nested_dict_is_refused() -> None:
    nested = spaces.Dict({"a": spaces.Dict({"b": spaces.Discrete(2)})})
    with pytest.raises(ValueError, match="stores Box, Discrete, MultiDiscrete and MultiBinary"):
        Ring(10, 1, nested, spaces.Discrete(2), rng=np.random.default_rng(0))


# -- memory --------------------------------------------------------------------------------------------------


def _arrays(value: Any) -> list[np.ndarray]:
    if isinstance(value, dict):
        return [array for item in value.values() for array in _arrays(item)]
    return [value] if isinstance(value, np.ndarray) else []


def test_an_atari_transition_takes_at_most_7300_bytes() -> None:
    ring = Ring(
        1_000, 2, spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(18),
        stack=4, n_step=3, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert ring.nbytes == sum(array.nbytes for array in _arrays(vars(ring)))
    obs, no = np.zeros((2, 4, 84, 84), np.uint8), np.zeros(2, bool)
    for step in range(600):  # episodes of 100 steps; each costs a slot for its last frame
        first, end = no | (step % 100 == 0), no | (step % 100 == 99)
        ring.add(Transition(obs, np.zeros(2, np.int64), np.zeros(2, np.float32), obs, end, no, first))
    held = 2 * (500 - 5)  # a round of 500 slots has at most five last frames
    assert ring.nbytes / held <= 7_300
    assert ring.nbytes == sum(array.nbytes for array in _arrays(vars(ring)))


@pytest.mark.parametrize(
    ("kind", "stack", "n_step"), [("image", 4, 1), ("image", 4, 3), ("image", 1, 1), ("dict", 1, 2)]
)
def test_batches_and_transitions_share_no_memory_with_the_ring(kind: str, stack: int, n_step: int) -> None:
    world = World(kind, 2, stack)
    ring = world.ring(60, n_step)
    for _ in range(50):
        step = world.play()
        ring.add(step)
        for field in step:
            for leaf in _leaves(field).values():
                leaf[...] = 0
    assert_true_to(world, ring)
    ring.rng = np.random.default_rng(5)
    batch = ring.sample(64)
    kept = copy.deepcopy(batch)
    for field in batch:
        for leaf in _leaves(field).values():
            leaf.fill_(77)
    ring.rng = np.random.default_rng(5)
    assert_batches_equal(ring.sample(64), kept)


def test_obs_can_be_changed_without_next_obs_of_other_samples() -> None:
    _, ring = filled(n_step=1)
    batch = ring.sample(200)
    kept = batch.next_obs[1:].clone()
    batch.obs[0].fill_(9)  # samples are copies, even where they overlap in time
    assert torch.equal(batch.next_obs[1:], kept)


# -- saving --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "stack"), [("image", 4), ("vector", 1), ("dict", 1)])
@pytest.mark.parametrize("steps", [0, 5, 70])
def test_state_dict_round_trip(kind: str, stack: int, steps: int) -> None:
    world, ring = filled(kind, stack=stack, steps=steps)
    saved = {name: array.copy() for name, array in ring.state_dict().items()}
    other = World(kind, 3, stack, seed=9)
    copied = other.ring(90, 3, seed=8)
    for _ in range(33):  # loading replaces whatever was there
        copied.add(other.play())
    copied.load_state_dict(saved)
    copied.rng = copy.deepcopy(ring.rng)
    for _ in range(20):
        step = world.play()
        ring.add(step)
        copied.add(step)
        if len(ring):
            assert_batches_equal(ring.sample(40), copied.sample(40))
    assert len(ring) == len(copied)
    assert_true_to(world, copied)


@pytest.mark.parametrize("change", [{"capacity": 99}, {"num_envs": 2}, {"kind": "vector"}])
def test_a_state_of_another_ring_is_refused(change: dict[str, Any]) -> None:
    _, ring = filled()
    _, other = filled(**change)
    with pytest.raises(ValueError, match="saved with other spaces, capacity or number of environments"):
        other.load_state_dict(ring.state_dict())
