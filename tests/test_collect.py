"""Collecting: no transition crosses a reset, on any path, and nothing bad passes unseen."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space

from envs import Collector, EnvConfig, make
from replay.tree import leaves, mapped
from replay.types import Transition
from runs import checkpoint
from runs.config import UserError


def collect(
    env: VectorEnv, steps: int, *, seed: int = 0, overlap: bool = True
) -> tuple[list[Transition], list]:
    """Play seeded random actions; return the transitions and the finished episodes."""
    rng = np.random.default_rng(seed)
    collector, transitions, episodes = Collector(env, seed, overlap=overlap), [], []
    for _ in range(steps):
        collector.send(rng.integers(env.single_action_space.n, size=env.num_envs))  # type: ignore[attr-defined]
        transitions.append(collector.recv())
        episodes += collector.episodes
    collector.close()
    return transitions, episodes


def check_borders(transitions: list[Transition], episodes: list, life_loss: bool = False) -> None:
    """Check that obs follow on from next_obs, except across the resets that `first` marks."""
    assert transitions[0].first.all()
    for now, then in itertools.pairwise(transitions):
        ended = now.terminated | now.truncated
        goes_on = ~then.first
        assert np.array_equal(now.next_obs[goes_on], then.obs[goes_on])
        assert (then.first <= ended).all()  # a reset only after an end
        assert life_loss or (then.first == ended).all()
        assert not (now.terminated & now.truncated).any()
    returns, lengths = np.zeros((2, len(transitions[0].reward)))
    expected = []
    for now, then in zip(transitions, [*transitions[1:], None], strict=True):
        returns, lengths = returns + now.reward, lengths + 1
        if then is not None:
            expected += [(i, returns[i], lengths[i]) for i in np.flatnonzero(then.first)]
            returns, lengths = returns * ~then.first, lengths * ~then.first
    assert [tuple(episode) for episode in episodes][: len(expected)] == expected
    assert expected


@pytest.mark.parametrize("env_id", ["chordate/Counting-v0", "chordate/CountingTruncated-v0"])
@pytest.mark.parametrize("vectorization", ["vector", "sync", "async"])
def test_counting_pairs_never_cross_a_reset(env_id: str, vectorization: str) -> None:
    transitions, episodes = collect(make(env_id, 3, vectorization=vectorization), 60)
    check_borders(transitions, episodes)
    for step in transitions:
        tag, episode, count = step.obs.T
        next_tag, next_episode, next_count = step.next_obs.T
        assert (next_tag == tag).all() and (next_episode == episode).all() and (next_count == count + 1).all()
        assert ((count == 0) == step.first).all() and (step.reward == next_count).all()
        ended = step.truncated if "Truncated" in env_id else step.terminated
        assert (ended == (next_count >= 5 + (tag + episode) % 3)).all()
        assert not (step.terminated if "Truncated" in env_id else step.truncated).any()


@pytest.mark.parametrize("vectorization", ["vector", "sync", "async"])
def test_counting_images_carry_whole_stacks(vectorization: str) -> None:
    transitions, episodes = collect(make("chordate/CountingImage-v0", 2, vectorization=vectorization), 40)
    check_borders(transitions, episodes)
    for step in transitions:
        assert np.array_equal(step.next_obs[:, :-1], step.obs[:, 1:])  # also where the episode ends
        assert (step.obs[step.first][:, :-1] == 0).all()


@pytest.mark.parametrize("vectorization", ["sync", "async", "vector"])
def test_overlap_changes_no_bit(vectorization: str) -> None:
    runs = [
        collect(make("CartPole-v1", 3, vectorization=vectorization), 60, overlap=overlap)
        for overlap in (True, False)
    ]
    check_equal(*runs)
    check_borders(*runs[0])


def check_equal(left: tuple, right: tuple) -> None:
    """Bit-equal transitions and episodes."""
    for one, two in zip(left[0], right[0], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert left[1] == right[1]


def test_overlap_changes_no_bit_on_atari() -> None:
    config = EnvConfig(size=24, max_frames=60)
    runs = [collect(make("ALE/Pong-v5", 3, config=config), 50, overlap=overlap) for overlap in (True, False)]
    check_equal(*runs)


def test_atari_game_over() -> None:
    transitions, episodes = collect(make("ALE/Breakout-v5", 4, config=EnvConfig(size=16)), 500)
    check_borders(transitions, episodes)
    assert any(step.terminated.any() for step in transitions)
    assert not any(step.truncated.any() for step in transitions)


@pytest.mark.parametrize("obs", ["image", "ram"])
def test_atari_life_loss_terminates_but_the_game_plays_on(obs: str) -> None:
    size: dict[str, Any] = {"size": 16} if obs == "image" else {}
    losing = collect(make("ALE/Breakout-v5", 3, config=EnvConfig(life_loss=True, obs=obs, **size)), 500)
    plain = collect(make("ALE/Breakout-v5", 3, config=EnvConfig(obs=obs, **size)), 500)
    check_borders(*losing, life_loss=True)
    assert losing[1] == plain[1]  # the same whole games, returns and lengths
    lost = sum(step.terminated.sum() for step in losing[0])
    over = sum(step.terminated.sum() for step in plain[0])
    assert over >= 3 and lost >= 5 * over  # Breakout has five lives
    for one, two in zip(losing[0], plain[0], strict=True):
        assert np.array_equal(one.obs, two.obs) and np.array_equal(one.first, two.first)
        assert (two.terminated <= one.terminated).all()


@pytest.mark.parametrize("obs", ["image", "ram"])
def test_atari_truncation_keeps_the_true_last_screen(obs: str) -> None:
    size: dict[str, Any] = {"size": 32} if obs == "image" else {}
    cut, whole = (
        collect(make("ALE/Pong-v5", 3, config=EnvConfig(max_frames=frames, obs=obs, **size)), 30)
        for frames in (40, None)
    )
    transitions, episodes = cut
    check_borders(transitions, episodes)
    assert [episode.length for episode in episodes] == [10] * 9
    for t, step in enumerate(transitions):
        assert (step.truncated == ((t + 1) % 10 == 0)).all() and not step.terminated.any()
    # up to and with the truncated step, nothing differs from the game that goes on
    for one, two in zip(transitions[:10], whole[0][:10], strict=True):
        assert np.array_equal(one.next_obs, two.next_obs)


def test_atari_truncation_of_one_game_does_not_disturb_the_others() -> None:
    config = EnvConfig(size=16, max_frames=600)
    transitions, episodes = collect(make("ALE/Breakout-v5", 4, config=config), 400)
    check_borders(transitions, episodes)
    truncated = sum(step.truncated.sum() for step in transitions)
    assert truncated and any((step.truncated.any() and not step.truncated.all()) for step in transitions)
    assert all(episode.length <= 150 for episode in episodes)


@pytest.mark.parametrize("action", [-1, 6, 99])
def test_an_action_out_of_range_is_refused_before_the_emulator_hangs(action: int) -> None:
    collector = Collector(make("ALE/Pong-v5", 3, config=EnvConfig(size=16)), 0)
    with pytest.raises(
        ValueError, match=rf"action of env 1 must be a whole number in \[0, 5\], got {action}"
    ):
        collector.send(np.array([0, action, 0]))
    collector.send(np.array([0, 5, 0], np.int32))  # the collector is still in order
    collector.recv()
    collector.close()


def test_the_emulator_itself_refuses_an_action_out_of_range() -> None:
    env = make("ALE/Pong-v5", config=EnvConfig(size=16))
    env.reset()
    with pytest.raises(ValueError, match=r"action of env 0 must be a whole number in \[0, 5\], got 99"):
        env.step([99])
    with pytest.raises(ValueError, match=r"shape \(1,\), got \(2,\)"):
        env.step(np.zeros(2, int))
    env.step([5])
    env.close()


def test_other_bad_actions_are_refused() -> None:
    collector = Collector(make("CartPole-v1", 2), 0)
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        collector.send(np.zeros(3, int))
    with pytest.raises(ValueError, match="whole number"):
        collector.send(np.zeros(2))
    with pytest.raises(RuntimeError, match="without send"):
        collector.recv()
    collector.send(np.zeros(2, int))
    with pytest.raises(RuntimeError, match="without recv"):
        collector.send(np.zeros(2, int))


def test_transitions_own_their_action() -> None:
    collector, action = Collector(make("CartPole-v1", 2), 0), np.array([0, 1])
    collector.send(action)
    action[:] = 7
    assert collector.recv().action.tolist() == [0, 1]


class Odd(gymnasium.Env):
    """Dict observations, actions from 3 to 5, and a bad number at a chosen step."""

    def __init__(self, bad: str = "", value: float = float("nan")) -> None:
        self.observation_space = Dict(a=Box(-9, 9, (2,), np.float32), b=Discrete(100))
        self.action_space = Discrete(3, start=3)
        self.bad, self.value, self.time, self.episode = bad, value, 0, -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        self.time, self.episode = 0, self.episode + 1
        return self.obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert action in self.action_space
        self.time += 1
        reward = self.value if self.bad == "reward" and self.time == 3 else 1.0
        return self.obs(), reward, self.time == 4, False, {}

    def obs(self) -> dict[str, Any]:
        wrong = {"step": 2, "last": 4, "start": 0}.get(self.bad) == self.time and (
            self.bad != "start" or self.episode
        )
        return {
            "a": np.full(2, self.value if wrong else self.time, np.float32),
            "b": self.time + 10 * self.episode,
        }


def odd(**keywords: Any) -> SyncVectorEnv:
    """Two odd envs, the second one with `keywords`."""
    ones = [Odd, lambda: Odd(**keywords)]
    return SyncVectorEnv(ones, autoreset_mode=AutoresetMode.SAME_STEP)


def test_dict_observations_and_shifted_actions() -> None:
    collector = Collector(odd(), 0)
    for t in range(12):
        collector.send(np.array([3, 5]))
        step = collector.recv()
        assert (step.obs["b"] == t % 4 + 10 * (t // 4)).all() and (
            step.next_obs["b"] == step.obs["b"] + 1
        ).all()
        assert (step.next_obs["a"] == step.obs["a"] + 1).all() and step.next_obs["a"].shape == (2, 2)
        assert (step.first == (t % 4 == 0)).all() and (
            collector.obs["b"] == (t + 1) % 4 + 10 * ((t + 1) // 4)
        ).all()
    with pytest.raises(ValueError, match=r"env 0 must be a whole number in \[3, 5\], got 0"):
        collector.send(np.array([0, 3]))


@pytest.mark.parametrize(("bad", "step"), [("reward", 3), ("step", 2), ("last", 4), ("start", 4)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(bad: str, step: int, value: float) -> None:
    collector = Collector(odd(bad=bad, value=value), 0)
    what = "reward" if bad == "reward" else "observation 'a'"
    with pytest.raises(UserError, match=f"^{what} of env 1 is {value} at step {step}"):
        for _ in range(6):
            collector.send(np.array([3, 3]))
            collector.recv()


KINDS = ("Box", "MultiDiscrete", "MultiBinary", "Dict", "Tuple")


def answered(collector: Collector, draw: Any, steps: int) -> list:
    """What a collector gives for random actions of any space."""
    found: list = []
    for _ in range(steps):
        collector.send(draw.sample())
        found += [collector.recv(), list(collector.episodes)]
    return found


def flat(steps: list) -> list:
    return [np.asarray(leaf).tolist() for step in steps for part in step for _, leaf in leaves(part)]


@pytest.mark.parametrize(("kind", "vectorization"), [*((kind, "sync") for kind in KINDS), ("Tuple", "async")])
def test_actions_of_every_space_are_taken_and_replayed(kind: str, vectorization: str) -> None:
    """A journal goes back to the bit, with fresh seeds on the way (every 15 steps) and without."""
    for every in [15, 10_000] if vectorization == "sync" else [15]:
        env_id = f"chordate/Identity{kind}-v0"
        ones = [make(env_id, 2, 0, vectorization=vectorization) for _ in range(2)]
        collector, other = (Collector(env, 3, resumable=True, every=every) for env in ones)
        draw = batch_space(ones[0].single_action_space, 2)
        draw.seed(0)
        steps = answered(collector, draw, 33)
        assert all(step.reward.shape == (2,) for step in steps[::2])
        sent = mapped(np.array, draw.sample())
        state = {name: np.array(value) for name, value in collector.state_dict().items()}
        answered(other, draw, 4)  # whatever it did before
        assert other.load_state_dict(state)
        found = []
        for each in (collector, other):
            draw.seed(7)
            each.send(sent)
            found.append([each.recv(), *answered(each, draw, 24)])
            each.close()
        assert flat(found[0]) == flat(found[1])


def test_a_bad_part_of_an_action_is_named() -> None:
    collector = Collector(make("chordate/IdentityDict-v0", 2), 0)
    good = {"move": np.array([0, 2]), "push": np.zeros((2, 1), np.float32)}
    for bad, message in [
        ({**good, "move": np.array([0, 3])}, r"part \('move',\) of action must be 2 of Discrete\(3\)"),
        ({**good, "push": np.full((2, 1), np.nan, np.float32)}, r"part \('push',\)"),
        ({**good, "move": np.array([0])}, r"part \('move',\) of action must be 2 of"),
        ({"move": good["move"]}, "must have the parts"),
    ]:
        with pytest.raises(ValueError, match=message):
            collector.send(bad)
    collector.send(good)
    good["move"][:] = 1
    assert collector.recv().action["move"].tolist() == [0, 2]  # its own copy


class Curious(gymnasium.Env):
    """Actions by names that are no file names."""

    observation_space = Box(-9, 9, (1,), np.float32)
    action_space = Dict({"left arm/x": Discrete(2), "..": Box(-1, 1, (2,), np.float32)})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        return np.float32([action["left arm/x"]]), 0.0, False, False, {}


def test_odd_names_of_actions_can_be_saved(tmp_path: Path) -> None:
    def made() -> Collector:
        env = SyncVectorEnv([Curious] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
        return Collector(env, 0, resumable=True)

    collector, other = made(), made()
    for value in (0, 1):
        collector.send({"..": np.zeros((2, 2), np.float32), "left arm/x": np.array([value, 0])})
        collector.recv()
    checkpoint.save(tmp_path / "1", 1, {"envs": collector.state_dict()})
    assert other.load_state_dict(checkpoint.load(tmp_path / "1")["envs"])
    assert other.obs.tolist() == [[1], [0]]


def test_other_autoreset_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="SAME_STEP"):
        Collector(gymnasium.make_vec("CartPole-v1", 2), 0)


def test_closing_in_the_middle_of_a_step() -> None:
    for env in (make("Acrobot-v1", 2, vectorization="async"), make("ALE/Pong-v5", 2)):
        collector = Collector(env, 0)
        collector.send(np.zeros(2, int))
        collector.close()
        collector.close()  # a second time does nothing
        with pytest.raises(RuntimeError, match="recv called without send"):
            collector.recv()
