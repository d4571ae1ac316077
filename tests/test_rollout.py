"""Rollouts and episodes against lists of single steps, with random ends in several environments."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from replay import Decision, Episodes, Rollout, Rollouts, Transition
from replay.tree import leaves, mapped

N = 4


class One(NamedTuple):
    """One step of one environment; observations are told apart by their number."""

    obs: int
    next_obs: int
    action: float
    reward: float
    terminated: bool
    truncated: bool
    first: bool
    logp: float
    value: float


class World:
    """Environments whose episodes end at random; `steps` lists what each of them did."""

    def __init__(self, seed: int, *, ends: float = 0.2, tree: bool = False, breaks: float = 0.0) -> None:
        self.rng, self.ends, self.breaks, self.tree = np.random.default_rng(seed), ends, breaks, tree
        self.count = 0
        self.now, self.first = self.fresh(N), np.ones(N, bool)
        self.steps: list[list[One]] = [[] for _ in range(N)]

    def fresh(self, count: int) -> np.ndarray:
        self.count += count
        return np.arange(self.count - count, self.count)

    @property
    def obs(self) -> Any:
        return self.shown(self.now)

    def shown(self, numbers: np.ndarray) -> Any:
        image = np.repeat(numbers[:, None], 3, 1).astype(np.float32)
        if not self.tree:
            return image
        return {"map": numbers[:, None, None].astype(np.int64), "rest": (image, -numbers.astype(np.float64))}

    def decision(self) -> Decision:
        sample = self.rng.normal(size=(N, 2)).astype(np.float32)
        logp, value = self.rng.normal(size=(2, N)).astype(np.float32)
        return Decision(None, (), sample, logp, value)

    def step(self, decision: Decision) -> Transition:
        """Take a step, and note what each environment did."""
        reward = self.rng.normal(size=N).astype(np.float32)
        terminated, truncated = self.rng.random((2, N)) < self.ends / 2
        next_obs, obs, first = self.fresh(N), self.now, self.first
        assert decision.sample is not None and decision.logp is not None and decision.value is not None
        for n in range(N):
            if (
                first[n]
                and self.steps[n]
                and not (self.steps[n][-1].terminated or self.steps[n][-1].truncated)
            ):
                self.steps[n][-1] = self.steps[n][-1]._replace(truncated=True)  # the episode was lost
            self.steps[n].append(
                One(
                    obs[n],
                    next_obs[n],
                    decision.sample[n, 0],
                    reward[n],
                    terminated[n],
                    truncated[n] and not terminated[n],
                    first[n],
                    decision.logp[n],
                    decision.value[n],
                )
            )
        self.first = terminated | truncated | (self.rng.random(N) < self.breaks)
        self.now = np.where(self.first, self.fresh(N), next_obs)
        shown, found = self.shown(obs), self.shown(next_obs)
        return Transition(shown, decision.sample, reward, found, terminated, truncated, first)


def play(world: World, memory: Rollouts, steps: int) -> None:
    for _ in range(steps):
        decision = world.decision()
        memory.add(world.step(decision), decision)


def ids(tree: Any) -> np.ndarray:
    """The numbers of observations (..., S), which all leaves must agree on."""
    if not isinstance(tree, dict):
        assert (tree == tree[..., :1]).all()
        return tree[..., 0].astype(int)
    image, negative = tree["rest"]
    numbers = tree["map"][..., 0, 0]
    assert (image == numbers[..., None]).all() and (negative == -numbers).all()
    assert image.dtype == np.float32 and negative.dtype == np.float64 and numbers.dtype == np.int64
    return numbers


def check(rollout: Rollout, columns: list[list[One]]) -> None:
    """The rollout holds exactly these steps, one list for each of its columns."""
    for n, steps in enumerate(columns):
        assert ids(rollout.obs)[:, n].tolist() == [step.obs for step in steps]
        assert rollout.action[:, n, 0].tolist() == [step.action for step in steps]
        for name in ("reward", "terminated", "truncated", "first", "logp", "value"):
            assert getattr(rollout, name)[:, n].tolist() == [getattr(step, name) for step in steps]
    assert not (rollout.terminated & rollout.truncated).any()
    cut = [columns[n][t].next_obs for t, n in np.argwhere(rollout.truncated)]
    assert ids(rollout.cut_obs).tolist() == cut
    assert rollout.reward.dtype == np.float32 and rollout.terminated.dtype == bool


def same(one: Rollout, other: Rollout) -> None:
    """Bit by bit."""
    for a, b in zip(one, other, strict=True):
        if isinstance(a, Decision):
            a, b = tuple(a[2:]), tuple(b[2:])
        pairs = zip(leaves(a), leaves(b), strict=True)
        assert all(p == q and np.array_equal(x, y) and x.dtype == y.dtype for (p, x), (q, y) in pairs)


# -- a fixed number of steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("ends", [0.0, 0.2, 0.9])
def test_a_rollout_is_what_was_played(tree: bool, ends: float) -> None:
    world = World(0, ends=ends, tree=tree)
    memory = Rollouts(9, world.obs)
    for turn in range(4):
        for k in range(9):
            assert not memory.full
            play(world, memory, 1)
            assert memory.full == (k == 8)
        last = world.decision()
        rollout = memory.take(world.obs, last)
        check(rollout, [steps[9 * turn : 9 * turn + 9] for steps in world.steps])
        assert ids(rollout.last_obs).tolist() == world.now.tolist()
        assert rollout.last is last and rollout.state == ()
        assert len(ids(rollout.cut_obs)) == rollout.truncated.sum()


def test_every_value_of_a_successor_is_found() -> None:
    # what the agents do with it: V(s') from the next row, from `cut_obs` or from `last_obs`
    world = World(3, ends=0.4)
    memory = Rollouts(20, world.obs)
    play(world, memory, 20)
    rollout = memory.take(world.obs, world.decision())
    assert rollout.truncated.sum() > 5
    following = np.concatenate([ids(rollout.obs)[1:], ids(rollout.last_obs)[None]])
    following[rollout.truncated] = ids(rollout.cut_obs)
    for n, steps in enumerate(world.steps):
        for t, step in enumerate(steps):
            assert step.terminated or following[t, n] == step.next_obs


@pytest.mark.parametrize("tree", [False, True])
def test_a_lost_episode_counts_as_cut_in_its_last_state(tree: bool) -> None:
    world = World(1, ends=0.1, tree=tree, breaks=0.15)
    memory, lost = Rollouts(12, world.obs), 0
    for turn in range(4):
        play(world, memory, 12)
        rollout = memory.take(world.obs, world.decision())
        columns = [steps[12 * turn : 12 * turn + 12] for steps in world.steps]
        check(rollout, columns)
        ended = rollout.terminated | rollout.truncated
        assert (ended[:-1] | ~rollout.first[1:]).all()
        lost += int(rollout.first[1:].sum())
    assert lost > 10


def test_a_step_lost_in_one_environment_and_cut_in_another() -> None:
    obs = np.zeros((2, 1), np.float32)
    memory = Rollouts(2, obs)
    no, zero = np.zeros(2, bool), np.zeros(2, np.float32)
    decision = Decision(None, (), np.zeros((2, 1), np.float32), zero, zero)
    cut = np.array([True, False])
    memory.add(Transition(obs, zero, zero, obs + np.array([[1], [2]]), no, cut, ~no), decision)
    memory.add(Transition(obs, zero, zero, obs + 3, no, no, ~no), decision)  # the second began anew, too
    rollout = memory.take(obs, decision)
    assert rollout.truncated.tolist() == [[True, True], [False, False]]
    assert rollout.cut_obs.tolist() == [[1], [2]]


def test_terminated_and_truncated_at_once_is_terminated() -> None:
    obs, yes = np.zeros((1, 2), np.float32), np.ones(1, bool)
    memory, zero = Rollouts(1, obs), np.zeros(1, np.float32)
    decision = Decision(None, (), np.zeros((1, 1), np.float32), zero, zero)
    memory.add(Transition(obs, zero, zero, obs + 1, yes, yes, yes), decision)
    rollout = memory.take(obs, decision)
    assert rollout.terminated.all() and not rollout.truncated.any()
    assert rollout.cut_obs.shape == (0, 2) and rollout.cut_obs.dtype == np.float32


def test_observations_may_be_written_over() -> None:
    buffers = [np.zeros((1, 2), np.float32) for _ in range(2)]
    memory, zero, no = Rollouts(6, buffers[0]), np.zeros(1, np.float32), np.zeros(1, bool)
    decision = Decision(None, (), np.zeros((1, 1), np.float32), zero, zero)
    for t in range(6):
        obs, following = buffers[t % 2], buffers[(t + 1) % 2]
        following[...] = t + 1
        memory.add(Transition(obs, zero, zero, following, no, no, no), decision)
    assert memory.take(buffers[0], decision).obs[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_agents_that_draw_from_no_policy_keep_their_actions() -> None:
    obs, no = np.zeros((3, 1), np.float32), np.zeros(3, bool)
    memory = Rollouts(2, obs)
    for t in range(2):
        action = np.array([t, 1, 2])
        memory.add(Transition(obs, action, np.zeros(3, np.float32), obs, no, no, no), Decision(action, ()))
    rollout = memory.take(obs, Decision(np.array([5, 5, 5]), ()))
    assert rollout.action.tolist() == [[0, 1, 2], [1, 1, 2]] and rollout.action.dtype == np.int64
    assert rollout.logp.shape == rollout.value.shape == (2, 0)


# -- whole episodes --------------------------------------------------------------------------------------------------


def episodes_of(steps: list[One]) -> list[list[One]]:
    """The finished ones."""
    found: list[list[One]] = [[]]
    for step in steps:
        found[-1].append(step)
        if step.terminated or step.truncated:
            found.append([])
    return found[:-1]


def parted(rollout: Rollout) -> list[list[int]]:
    """The numbers of the observations of each episode in it."""
    ended = (rollout.terminated | rollout.truncated)[:, 0]
    assert ended[-1]
    numbers = np.split(ids(rollout.obs)[:, 0], np.flatnonzero(ended)[:-1] + 1)
    return [part.tolist() for part in numbers]


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("breaks", [0.0, 0.1])
@pytest.mark.parametrize("ends", [0.1, 0.6])
def test_episodes_are_given_whole_once_and_in_order(ends: float, breaks: float, tree: bool) -> None:
    world = World(5, ends=ends, tree=tree, breaks=breaks)
    memory = Episodes(6, world.obs)
    given: list[list[int]] = []
    for _ in range(8):
        finished = 0
        while not memory.full:
            assert finished < 6
            play(world, memory, 1)
            finished += sum(steps[-1].terminated or steps[-1].truncated for steps in world.steps)
        assert finished >= 6
        rollout = memory.take(world.obs, world.decision())
        assert rollout.first[0, 0] and not memory.full
        known = {id_: step for steps in world.steps for id_, step in ((s.obs, s) for s in steps)}
        check(rollout, [[known[number] for number in ids(rollout.obs)[:, 0]]])
        given += parted(rollout)
        every = [[step.obs for step in one] for steps in world.steps for one in episodes_of(steps)]
        assert sorted(given) == sorted(every)  # none lost, none twice, none that is unfinished
        assert ids(rollout.last_obs).shape == (1,)
    assert len(given) >= 48


def test_environments_stand_one_after_the_other() -> None:
    world = World(6, ends=0.5)
    memory = Episodes(12, world.obs)
    while not memory.full:
        play(world, memory, 1)
    rollout = memory.take(world.obs, world.decision())
    expected = [step.obs for steps in world.steps for one in episodes_of(steps) for step in one]
    assert ids(rollout.obs)[:, 0].tolist() == expected


def test_steps_that_all_environments_have_finished_are_forgotten() -> None:
    world = World(7, ends=0.9)
    memory = Episodes(3, world.obs)
    for _ in range(30):
        while not memory.full:
            play(world, memory, 1)
        memory.take(world.obs, world.decision())
    kept = memory.state_dict().get("reward", np.zeros(0))
    assert len(kept) <= max(len(steps) for steps in world.steps) / 3
    unfinished = [len(steps) - sum(map(len, episodes_of(steps))) for steps in world.steps]
    assert len(kept) == max(unfinished)


# -- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("breaks", [0.0, 0.2])
@pytest.mark.parametrize("kind", [Rollouts, Episodes])
def test_a_saved_memory_goes_on_bit_by_bit(kind: type[Rollouts], breaks: float, tree: bool) -> None:
    for at in range(1, 30, 4):
        worlds = [World(8, ends=0.2, tree=tree, breaks=breaks) for _ in range(2)]
        whole, saved = (kind(7, world.obs) for world in worlds)
        rollouts: list[list[Rollout]] = [[], []]
        for k in range(40):
            if k == at:
                state = {name: np.array(array) for name, array in saved.state_dict().items()}
                saved = kind(7, worlds[1].obs)
                saved.load_state_dict(state)
                again = saved.state_dict()
                assert again.keys() == state.keys()
                assert all(np.array_equal(again[name], state[name]) for name in state)
            for world, memory, taken in zip(worlds, (whole, saved), rollouts, strict=True):
                play(world, memory, 1)
                if memory.full:
                    taken.append(memory.take(world.obs, world.decision()))
        assert len(rollouts[0]) == len(rollouts[1]) > 2
        for one, other in zip(*rollouts, strict=True):
            same(one, other)


def test_an_environment_that_began_anew_after_a_resume_is_cut_where_it_stood() -> None:
    world = World(9, ends=0.0)
    memory = Rollouts(6, world.obs)
    play(world, memory, 4)
    resumed = Rollouts(6, world.obs)
    resumed.load_state_dict(memory.state_dict())
    stood = world.now
    world.now, world.first = world.fresh(N), np.ones(N, bool)
    play(world, resumed, 2)
    rollout = resumed.take(world.obs, world.decision())
    assert rollout.truncated.tolist() == [[t == 3] * N for t in range(6)]
    assert ids(rollout.cut_obs).tolist() == stood.tolist()


def test_an_empty_memory_is_saved_too() -> None:
    world = World(10)
    for kind in (Rollouts, Episodes):
        memory, other = kind(5, world.obs), kind(5, world.obs)
        other.load_state_dict({name: np.array(array) for name, array in memory.state_dict().items()})
        assert not other.full
        play(world, other, 1)


# -- trees -----------------------------------------------------------------------------------------------------------


def test_mapped_keeps_the_shape_of_a_tree() -> None:
    tree = {"a": np.ones(2), "b": (np.zeros(1), {"c": np.full(3, 2.0)})}
    doubled = mapped(lambda x, y: x + y, tree, tree)
    assert [path for path, _ in leaves(doubled)] == [("a",), ("b", 0), ("b", 1, "c")]
    assert [leaf.tolist() for _, leaf in leaves(doubled)] == [[2, 2], [0], [4, 4, 4]]
