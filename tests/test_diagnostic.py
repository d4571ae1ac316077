"""The diagnostic environments are what they say they are."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from envs import Collector, make, register
from envs.diagnostic import (
    ENVS,
    Clock,
    Counting,
    CountingVector,
    DelayedChain,
    Identity,
    Memory,
    MemoryVector,
    Probe,
    count_obs,
)

register()


@pytest.mark.parametrize("name", ENVS)
def test_gymnasium_finds_nothing_wrong(name: str) -> None:
    check_env(gymnasium.make(f"chordate/{name}-v0").unwrapped)


@pytest.mark.parametrize("name", ENVS)
def test_each_can_be_made_and_collected(name: str) -> None:
    env = make(f"chordate/{name}", 2)
    collector = Collector(env, 0)
    for _ in range(80):
        collector.send(env.action_space.sample())
        step = collector.recv()
        for obs in (step.obs, step.next_obs):
            assert all(env.single_observation_space.contains(row) for row in obs)
    assert collector.steps == 80
    collector.close()


def test_registering_twice_changes_nothing() -> None:
    before = dict(gymnasium.registry)
    register()
    assert gymnasium.registry == before


def test_probes() -> None:
    for kind, action in (("predict", 0), ("match", 1), ("action", 0), ("constant", 0)):
        env = Probe(kind)
        sign = float(env.reset(seed=1)[0][0])
        expected = {"predict": sign, "match": sign, "action": -1.0, "constant": 1.0}[kind]
        assert env.step(action)[1:4] == (expected, True, False)
    env = Probe("delay")
    assert env.reset(seed=0)[0] == 0 and env.step(0)[1:4] == (0.0, False, False)
    obs, *rest = env.step(0)
    assert obs == 1 and rest[:3] == [1.0, True, False]


def test_a_clock_ends_as_told() -> None:
    for end, flags in (("termination", (True, False)), ("truncation", (False, True))):
        env = Clock(length=3, end=end)
        env.reset(seed=0)
        steps = [env.step(0) for _ in range(3)]
        assert [step[2:4] for step in steps] == [(False, False)] * 2 + [flags]
        assert np.allclose([step[0][0] for step in steps], [1 / 3, 2 / 3, 1]) and steps[0][1] == 1.0
    env = Clock(blind=True)
    assert env.reset(seed=0)[0] == 0 and env.step(0)[0] == 0


def test_identity_rewards_the_answer() -> None:
    env = Identity()
    obs, _ = env.reset(seed=0)
    for _ in range(9):
        obs, reward, *_ = env.step(int(obs.argmax()))
        assert reward == 1
    assert env.step(int(1 - obs.argmax()) % 4)[1:4] == (0.0, True, False)
    env = Identity("Box")
    obs, _ = env.reset(seed=0)
    obs, reward, *_ = env.step(obs)
    assert reward == 0 and env.step(obs + np.float32([0.3, 0.1]))[1] == pytest.approx(
        -0.05
    )  # (.09 + .01) / 2


def test_identity_shows_and_rewards_each_part() -> None:
    env = Identity("MultiDiscrete")
    obs, _ = env.reset(seed=3)
    right = np.array([part.argmax() for part in np.split(obs, [2, 5])])
    obs, reward, *_ = env.step(right)
    assert reward == 1
    wrong = (np.array([part.argmax() for part in np.split(obs, [2, 5])]) + np.array([1, 0, 0])) % [2, 3, 4]
    assert env.step(wrong)[1] == pytest.approx(2 / 3)
    env = Identity("MultiBinary")
    obs, _ = env.reset(seed=3)
    assert env.step(np.array([1 - obs[0], *obs[1:]], np.int8))[1] == pytest.approx(2 / 3)
    env = Identity("Dict")
    obs, _ = env.reset(seed=3)  # three for `move`, one for `push`
    obs, reward, *_ = env.step({"push": obs[3:] - np.float32(0.2), "move": int(obs[:3].argmax())})
    assert reward == pytest.approx((1 - 0.04) / 2)
    env = Identity("Tuple")
    obs, _ = env.reset(seed=3)  # two, then two bits, then three and two
    digits = np.array([obs[4:7].argmax(), obs[7:].argmax()])
    bits = obs[2:4].astype(np.int8)
    answer = (int(obs[:2].argmax()), {"bits": bits, "digits": (digits + np.array([0, 1])) % [3, 2]})
    assert env.step(answer)[1] == pytest.approx((1 + 1 + 0.5) / 3)


def test_sampling_actions_does_not_change_what_identity_shows() -> None:
    shown = []
    for draws in (0, 5):
        env = Identity("Dict")
        env.reset(seed=1)
        shown.append([])
        for _ in range(4):
            for _ in range(draws):
                env.action_space.sample()
            shown[-1].append(env.step({"move": 0, "push": np.zeros(1, np.float32)})[0])
    assert np.array_equal(shown[0], shown[1])


def test_the_chain_pays_only_at_its_end() -> None:
    env = DelayedChain(length=4, max_steps=6)
    env.reset(seed=0)
    steps = [env.step(a) for a in (1, 0, 1, 1, 1)]
    assert [step[0].argmax() for step in steps] == [1, 0, 1, 2, 3] and not any(step[1] for step in steps)
    assert env.step(1)[1:4] == (1.0, True, False)
    env.reset(seed=0)
    assert [env.step(0)[3] for _ in range(6)] == [False] * 5 + [True]


def test_memory_asks_for_the_cue_alone_at_the_end() -> None:
    for seed in range(4):
        env = Memory(k=3)
        cue = int(env.reset(seed=seed)[0].argmax())
        assert env.step(0)[0].tolist() == [0, 0, 0] == env.step(0)[0].tolist()
        obs, reward, over, *_ = env.step(0)
        assert obs.tolist() == [0, 0, 1] and (reward, over) == (0.0, False)
        assert env.step(cue)[1:4] == (1.0, True, False)


def windows(k: int, length: int) -> tuple[set[bytes], set[bytes]]:
    """What the last `length` observations can be when the question is asked, by the right answer."""
    found: tuple[set[bytes], set[bytes]] = (set(), set())
    collector = Collector(make(f"chordate/Memory{k}-v0", 8), 0)
    past: list[np.ndarray] = []
    for t in range(6 * (k + 1)):
        past.append(collector.obs)
        guess = np.arange(8) % 2
        collector.send(guess)
        step = collector.recv()
        assert step.terminated.all() == (t % (k + 1) == k) == step.terminated.any()
        if step.terminated.all():
            since = past[-(k + 1) :]  # nothing from the episode before
            for i, right in enumerate(np.where(step.reward == 1, guess, 1 - guess)):
                found[right].add(np.stack([obs[i] for obs in since[-length:]]).tobytes())
        else:
            assert not step.reward.any()
    collector.close()
    return found


@pytest.mark.parametrize("k", [1, 8, 32])
def test_memory_is_told_by_k_plus_one_observations_and_not_by_k(k: int) -> None:
    """With k the windows of both answers are one and the same: no policy of them returns more than 0 on average."""
    zero, one = windows(k, k + 1)
    assert len(zero) == len(one) == 1 and zero != one
    zero, one = windows(k, k)
    assert len(zero) == 1 and zero == one


def test_many_memories_are_the_scalar_one_many_times() -> None:
    env = MemoryVector(5, k=3)
    obs, _ = env.reset(seed=0)
    rng, seen, singles = np.random.default_rng(0), np.zeros(2, int), [Memory(k=3) for _ in range(5)]
    for t in range(40):
        if t % 4 == 0:
            seen += np.bincount(obs[:, :2].argmax(1), minlength=2)
            for single, row in zip(singles, obs, strict=True):
                while single.reset()[0].tolist() != row.tolist():
                    pass
        actions = rng.integers(2, size=5)
        obs, reward, terminated, truncated, info = env.step(actions)
        for i, single in enumerate(singles):
            last, paid, over, cut, _ = single.step(int(actions[i]))
            successor = info["final_obs"][i] if over else obs[i]
            assert (last.tolist(), paid, over, cut) == (
                successor.tolist(),
                *(reward[i], terminated[i], truncated[i]),
            )
    assert (seen > 10).all()  # both cues are drawn, for each copy its own


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="end must be one of termination, truncation, got 'both'"):
        Counting(end="both")
    with pytest.raises(ValueError, match="kind must be one of"):
        Probe("six")
    with pytest.raises(ValueError, match="kind must be one of Discrete, Box"):
        Identity("Text")
    for kind in (Memory, MemoryVector):
        with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
            kind(k=0)
    with pytest.raises(ValueError, match="length and spread"):
        CountingVector(length=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 255), st.integers(0, 600), st.integers(0, 600))
def test_count_images_are_stacks_of_frames(tag: int, episode: int, step: int) -> None:
    now, before = (
        count_obs(np.array([tag]), np.array([episode]), np.array([s]), True)[0] for s in (step + 1, step)
    )
    assert np.array_equal(now[:-1], before[1:])
    assert (
        now[-1, 3, 3] == 1 + (step + 1) % 255 and now[-1, 0, 0] == 1 + episode % 255 and now[-1, 7, 0] == tag
    )
    assert (now == 0).all(axis=(1, 2)).sum() == max(0, 3 - (step + 1))
