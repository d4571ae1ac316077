"""Making environments: ids, knobs, protocols, seeds, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import MultiDiscrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from envs import Collector, EnvConfig, describe, frame_skip, full_id, make
from envs.atari import Atari, protocol
from envs.collect import spread
from envs.make import ENOUGH, LeftRight, SameStepCartPole, resolve
from runs.config import UserError


def play(env: VectorEnv, seed: int, steps: int, actions: int | None = None) -> list:
    """Play fixed actions; return what was seen, rewarded and ended."""
    rng = np.random.default_rng(0)
    collector = Collector(env, seed)
    seen = [collector.obs]
    for _ in range(steps):
        collector.send(rng.integers(actions or 3, size=env.num_envs))
        step = collector.recv()
        seen += [step.next_obs, step.reward, step.terminated, step.truncated, step.first]
    collector.close()
    return seen


def same(left: list, right: list) -> bool:
    """Whether two plays are equal in every bit."""
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def test_short_id_takes_the_newest_version_and_says_so() -> None:
    said: list[str] = []
    assert resolve("ALE/Pong", said.append).id == "ALE/Pong-v5"
    assert resolve("CartPole", said.append).id == "CartPole-v1"
    assert said == ["ALE/Pong is ALE/Pong-v5", "CartPole is CartPole-v1"]
    assert resolve("CartPole-v0", said.append).id == "CartPole-v0" and len(said) == 2


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("ALE/Pnog", ["unknown env 'ALE/Pnog'", "'ALE/Pong'"]),
        ("Pong-v5", ["'ALE/Pong-v5'"]),
        ("CartPoleNoVel-v1", ["'chordate/CartPoleNoVel-v1'"]),
        ("ALE/Pong-v6", ["'ALE/Pong-v6'", "'ALE/Pong-v5'"]),
        ("CartPloe-v1", ["'CartPole-v1'"]),
        ("pong", ["unknown env 'pong'", "Did you mean"]),
        ("nothing_like_it:Env-v0", ["cannot import 'nothing_like_it'"]),
        (".x:y", ["cannot import '.x'"]),
        ("..:y", ["cannot import '..'"]),
        ("Pong-v4", ["random frame skip", "ALE/Pong-v5", "PongNoFrameskip-v4", "--frame-skip"]),
    ],
)
def test_bad_ids_are_named_with_what_would_work(env_id: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        make(env_id)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_an_id_with_a_module_registers_it_and_keeps_it(tmp_path: Path, monkeypatch) -> None:
    entry = "envs.diagnostic:Identity"
    (tmp_path / "own_envs.py").write_text(f"import gymnasium\ngymnasium.register('Own-v3', '{entry}')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert full_id("own_envs:Own") == full_id("own_envs:Own-v3") == "own_envs:Own-v3"
    assert full_id("CartPole") == "CartPole-v1" and full_id("ALE/Pong") == "ALE/Pong-v5"
    env = make("own_envs:Own", 2, vectorization="async")  # its processes have to import it, too
    Collector(env, 0).close()
    gymnasium.registry.pop("Own-v3")


@pytest.mark.parametrize(("env_id", "module"), [("HalfCheetah-v5", "mujoco"), ("LunarLander-v3", "box2d")])
def test_missing_extra_is_one_line_with_the_command(env_id: str, module: str, monkeypatch) -> None:
    for name in [name for name in sys.modules if f".{module}" in name or name.lower().startswith(module)]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("mujoco", "Box2D"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf'pip install "chordate\[{module}\]"'):
        make(env_id)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_envs": 0}, "num_envs must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"vectorization": "asink"}, "got 'asink'. Did you mean 'async'"),
        ({"config": EnvConfig(sticky=0.1)}, "--sticky 0.1 does not apply to CartPole-v1"),
        ({"config": EnvConfig(obs="ram")}, "--obs ram does not apply"),
        ({"config": EnvConfig(noops=0)}, "--noops 0 does not apply"),
        ({"config": EnvConfig(size=4)}, "--size must be"),
        ({"config": EnvConfig(sticky=2.0)}, "--sticky must be"),
        ({"config": EnvConfig(obs="rma")}, "Did you mean 'ram'"),
    ],
)
def test_bad_values_are_refused(keywords: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        make("CartPole-v1", **keywords)
    assert message in str(error.value)


def test_knobs_that_would_be_ignored_on_atari_are_refused() -> None:
    with pytest.raises(UserError, match="--stack 2 does not apply"):
        make("ALE/Pong-v5", config=EnvConfig(obs="ram", stack=2))
    with pytest.raises(UserError, match="native vector env"):
        make("ALE/Pong-v5", vectorization="sync")
    with pytest.raises(UserError, match="no vectorised version"):
        make("ALE/Pong-v5", vectorization="vector", config=EnvConfig(obs="ram"))
    with pytest.raises(UserError, match="no vectorised version"):
        make("Acrobot-v1", vectorization="vector")


def test_the_registered_protocol_is_taken_and_knobs_lie_over_it() -> None:
    v5 = protocol(resolve("ALE/Pong-v5"), EnvConfig())
    v4 = protocol(resolve("PongNoFrameskip-v4"), EnvConfig())
    assert (v5.sticky, v5.frame_skip, v5.max_frames) == (0.25, 4, 108_000)
    assert (v4.sticky, v4.frame_skip, v4.max_frames) == (0.0, 4, 108_000)
    assert protocol(resolve("PongNoFrameskip-v0"), EnvConfig()).sticky == 0.25
    changed = protocol(resolve("ALE/Pong-v5"), EnvConfig(sticky=0, frame_skip=1, max_frames=50))
    assert (changed.sticky, changed.frame_skip, changed.max_frames) == (0.0, 1, 50)
    assert protocol(resolve("Pong-v4"), EnvConfig(frame_skip=3)).frame_skip == 3


def test_which_kind_of_vector_env_is_chosen() -> None:
    kinds = {"ALE/Pong-v5": Atari, "PongNoFrameskip-v4": Atari, "CartPole-v1": SameStepCartPole}
    for env_id, kind in {**kinds, "Acrobot-v1": SyncVectorEnv}.items():
        env = make(env_id, ENOUGH)
        assert type(env) is kind and env.num_envs == ENOUGH
        assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        env.close()
    assert type(make("CartPole-v1", ENOUGH - 1)) is SyncVectorEnv
    env = make("Acrobot-v1", 2, vectorization="async")
    assert isinstance(env, AsyncVectorEnv)
    env.close()


@pytest.mark.parametrize(
    "action",
    [
        np.array([0, 1, 1]),
        np.array([0, -1, 1]),
        np.array([2, 0, 0]),
        np.array([np.iinfo(np.int64).min, 0, 0]),
        np.array([0, 1, 1], np.int32),
        np.array([0, 2, 1], np.int32),
        np.array([0, 1, 1], np.uint64),
        np.array([True, False, True]),
        np.array([0.0, 1.0, 1.0]),
        np.array([0, 1]),
        np.array([[0, 1, 1]]),
        np.arange(6)[::3] % 2,
        np.array([0, 5, 1, 5, 0, 5])[::2],
        [0, 1, 1],
    ],
    ids=str,
)
def test_the_quick_check_of_actions_says_what_the_original_says(action: Any) -> None:
    assert LeftRight(3).contains(action) == MultiDiscrete([2, 2, 2]).contains(action)


def test_describe_tells_the_protocol() -> None:
    env = make("ALE/Pong-v5", config=EnvConfig(life_loss=True, colour=True, size=64, env_threads=1))
    for words in ("ALE/Pong-v5", "64x64 colour", "stack 4", "frame skip 4", "sticky 0.25", "6 actions"):
        assert words in describe(env)
    assert "life loss terminates" in describe(env) and frame_skip(env) == 4
    env.close()
    env = make("CartPole-v1")
    assert "Box (4,) -> Discrete(2), at most 500 steps" in describe(env) and frame_skip(env) == 1


def test_making_atari_leaves_other_vector_envs_alone() -> None:
    before = dict(VectorEnv.metadata)
    make("ALE/Pong-v5").close()
    assert VectorEnv.metadata == before


def test_sticky_actions_make_seeds_differ_and_their_absence_does_not() -> None:
    sticky, plain = [], []
    for seed in (1, 2):
        config = EnvConfig(noops=0, size=32)
        sticky.append(play(make("ALE/Pong-v5", config=config), seed, 60, actions=6))
        plain.append(play(make("PongNoFrameskip-v4", config=config), seed, 60, actions=6))
    assert not same(*sticky) and same(*plain)
    off = EnvConfig(noops=0, size=32, sticky=0.0)
    assert same(play(make("ALE/Pong-v5", config=off), 3, 60, actions=6), plain[0])


def test_noops_vary_the_start_up_to_the_bound() -> None:
    for most in (0, 2):
        env = make("ALE/Freeway-v5", 10, config=EnvConfig(noops=most, size=16))
        _, info = env.reset(seed=0)
        first = info["episode_frame_number"]
        assert first.min() == 0 if most == 0 else first.max() == most
        assert len(np.unique(first)) == most + 1
        env.close()


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "CartPole-v1", "Acrobot-v1", "chordate/Counting-v0"])
def test_same_seed_same_bits_other_seed_other_bits(env_id: str) -> None:
    config = EnvConfig(size=32) if "ALE" in env_id else EnvConfig()
    actions = 2 if env_id != "ALE/Pong-v5" else 6
    one, two, other = (play(make(env_id, 3, config=config), s, 25, actions) for s in (7, 7, 8))
    assert same(one, two) and not same(one, other)


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "CartPole-v1", "Acrobot-v1"])
def test_the_first_reset_without_a_seed_takes_that_of_make(env_id: str) -> None:
    one, two, other = (make(env_id, 2, seed=s).reset()[0] for s in (3, 3, 4))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_threads_do_not_change_the_bits() -> None:
    plays = [play(make("ALE/Pong-v5", 4, config=EnvConfig(env_threads=n, size=32)), 5, 60, 6) for n in (1, 2)]
    assert same(*plays)


def test_seeds_of_neighbouring_runs_share_no_stream() -> None:
    assert not set(spread(0, 100)) & set(spread(1, 100))
    assert spread(5, 3) == spread(5, 8)[:3]


def test_a_colour_twin_plays_the_same_game() -> None:
    """What is seen does not change what happens, so a run can be filmed by replaying its seed and actions."""
    small = play(make("ALE/Breakout-v5", 2, config=EnvConfig(size=16)), 4, 120, 4)
    film = play(make("ALE/Breakout-v5", 2, config=EnvConfig(size=160, colour=True, stack=1)), 4, 120, 4)
    assert sum(reward.sum() for reward in small[2::5]) > 0
    for k in (2, 3, 4, 5):  # reward, terminated, truncated, first
        assert same(small[k::5], film[k::5])


def test_shapes_follow_stack_size_and_colour() -> None:
    config = EnvConfig(stack=2, size=40, colour=True, full_actions=True)
    env = make("ALE/Pong-v5", 2, config=config)
    collector = Collector(env, 0)
    assert collector.obs.shape == (2, 2, 40, 40, 3) == env.observation_space.shape
    assert env.single_action_space.n == 18  # type: ignore[attr-defined]
    assert np.ptp(collector.obs[:, -1].astype(int), axis=-1).max() > 0  # not grey
    collector.close()


def test_unclipped_rewards_reach_the_transition() -> None:
    env = make("ALE/MsPacman-v5", 2, config=EnvConfig(size=16))
    rewards = play(env, 0, 100, 9)[2::5]
    assert max(reward.max() for reward in rewards) >= 10
    assert rewards[0].dtype == np.float32


def area_resize(frame: np.ndarray, size: int) -> np.ndarray:
    """Resize by the mean over each target pixel's area, as a naive loop over source rows and columns."""

    def weights(source: int) -> np.ndarray:
        matrix, scale = np.zeros((size, source)), source / size
        for i in range(size):
            for j in range(source):
                matrix[i, j] = max(0.0, min(j + 1, (i + 1) * scale) - max(j, i * scale)) / scale
        return matrix

    return weights(frame.shape[0]) @ frame @ weights(frame.shape[1]).T


def test_images_equal_a_naive_preprocessing_of_the_scalar_emulator() -> None:
    """Skip 4, maximum of the last two screens, grey, area resize, stack of 4 padded with zeros."""
    env = make("ALE/MsPacman-v5", config=EnvConfig(sticky=0.0, noops=0))
    raw = gymnasium.make("ALE/MsPacman-v5", repeat_action_probability=0.0, frameskip=1, obs_type="grayscale")
    screen, _ = raw.reset(seed=0)
    stack = [np.zeros((84, 84))] * 3 + [area_resize(screen, 84)]
    collector = Collector(env, 0)
    rng = np.random.default_rng(0)
    for _ in range(40):
        assert np.abs(collector.obs[0].astype(float) - np.stack(stack)).max() <= 1.0
        action, total, screens = int(rng.integers(9)), 0.0, []
        for _ in range(4):
            screen, reward, _, _, _ = raw.step(action)
            screens.append(screen)
            total += float(reward)
        stack = [*stack[1:], area_resize(np.maximum(*screens[-2:]), 84)]
        collector.send(np.array([action]))
        assert collector.recv().reward[0] == total
    collector.close()


def test_ram_equals_the_scalar_emulator() -> None:
    env = make("PongNoFrameskip-v4", 2, config=EnvConfig(obs="ram", noops=0))
    assert env.observation_space.shape == (2, 128) and frame_skip(env) == 4
    raw = gymnasium.make("PongNoFrameskip-v4", frameskip=1, obs_type="ram")
    raw.reset(seed=0)
    ram = raw.step(1)[0]  # FIRE at the start
    collector = Collector(env, 0)
    for action in np.random.default_rng(0).integers(6, size=40):
        assert np.array_equal(collector.obs, [ram, ram])
        for _ in range(4):
            ram = raw.step(action)[0]
        collector.send(np.array([action, action]))
        collector.recv()
    collector.close()


@pytest.mark.parametrize("steps", [600])
def test_cartpole_equals_the_scalar_one_step_by_step(steps: int) -> None:
    env = make("CartPole-v1", 3, vectorization="vector")
    collector = Collector(env, 0)
    scalar = [gymnasium.make("CartPole-v1") for _ in range(3)]
    base = env.unwrapped
    rng, ended = np.random.default_rng(1), np.zeros(3, int)
    for i, one in enumerate(scalar):
        one.reset(seed=0)
        one.unwrapped.state = base.state[:, i].copy()  # type: ignore[attr-defined]
    for _ in range(steps):
        # env 0 balances, so that it is truncated at 500; the others fall
        x, x_dot, theta, theta_dot = collector.obs[0]
        action = rng.integers(2, size=3)
        action[0] = int(theta + 0.3 * theta_dot + 0.02 * x + 0.05 * x_dot > 0)
        collector.send(action)
        step = collector.recv()
        for i, one in enumerate(scalar):
            obs, reward, terminated, truncated, _ = one.step(int(action[i]))
            assert np.allclose(step.next_obs[i], obs, rtol=1e-6, atol=1e-7) and step.reward[i] == reward
            assert (step.terminated[i], step.truncated[i]) == (terminated, truncated)
            if terminated or truncated:
                one.reset()
                assert np.abs(collector.obs[i]).max() <= 0.05
            # copied at every step, so that rounding does not add up
            one.unwrapped.state = base.state[:, i].copy()  # type: ignore[attr-defined]
        ended += collector.first
        for episode in collector.episodes:
            assert episode.return_ == episode.length and (episode.env > 0 or episode.length == 500)
    assert ended[0] >= 1 and ended[1:].min() > 5


def test_a_program_that_forgets_to_close_ends_in_silence() -> None:
    code = (
        "import numpy as np, envs\n"
        "c = envs.Collector(envs.make('ALE/Pong-v5', 2), 0)\n"
        "c.send(np.zeros(2, int))\n"
        "import sys; print('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "False", "")


def test_ctrl_c_is_left_to_the_parent():
    """A terminal sends it to all processes, those of the environments too."""
    before = signal.getsignal(
        signal.SIGINT
    )  # a shell may have had it ignored in what it runs in the background
    env = make("CartPole-v1", 2, 0, vectorization="async")
    try:
        env.reset(seed=[0, 1])
        assert isinstance(env, AsyncVectorEnv)
        for process in env.processes:
            os.kill(process.pid, signal.SIGINT)
        time.sleep(0.2)
        for _ in range(3):
            obs, *_ = env.step(np.zeros(2, np.int64))
        assert obs.shape == (2, 4) and signal.getsignal(signal.SIGINT) is before
    finally:
        env.close()
