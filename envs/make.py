"""Making vector environments of any registered id, all with one autoreset: within the step that ended."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper

from envs.atari import DEFAULT, Atari, EnvConfig, Game, is_atari, protocol, ram_game, refuse
from envs.diagnostic import register
from envs.hidden import HIDDEN, SHOWN, HiddenVector
from envs.hidden import register as register_hidden
from envs.journal import reset
from envs.mask import Masked, is_masked, masks
from envs.table import TableEnv, tabled
from envs.table import register as register_tables
from envs.workers import TIMEOUT, Workers
from runs.config import UserError, check, nearest
from runs.streams import pack, unpack

_CARTPOLE = "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv"
ENOUGH = 4  # environments, from which a vectorised version is faster than copies one after the other
_MODES = ("auto", "sync", "async", "vector")


def make(
    env_id: str,
    num_envs: int = 1,
    seed: int = 0,
    config: EnvConfig = DEFAULT,
    *,
    vectorization: str = "auto",
    timeout: float = TIMEOUT,
    say: Callable[[str], None] | None = None,
) -> VectorEnv:
    """Make `num_envs` copies of a registered environment, with SAME_STEP autoreset and `info["final_obs"]`.

    `auto` takes the native emulator for Atari images, the environment's own vectorised version where there is
    one and several are asked for, its transition table where that says all, else copies one after the other; `async`
    puts each copy into a process, whose silence for `timeout` seconds is a failure. `seed` decides the samples of the
    action space and the first reset that is given no seed. `say` is told what a short id is taken for.

    Raises: UserError for an unknown id, a missing package, a bad count, or a knob that does not apply.
    """
    check(EnvConfig, dataclasses.asdict(config))
    if num_envs < 1:
        raise UserError(f"num_envs must be 1 or more, got {num_envs}")
    if seed < 0:
        raise UserError(f"seed must be 0 or more, got {seed}")
    if vectorization not in _MODES:
        hint = nearest(vectorization, _MODES)
        raise UserError(f"vectorization must be one of {', '.join(_MODES)}, got {vectorization!r}.{hint}")
    spec = resolve(env_id, say)
    if is_atari(spec):
        env = _make_atari(protocol(spec, config), num_envs, seed, vectorization, timeout)
    else:
        names = tuple(field.name for field in dataclasses.fields(EnvConfig))
        refuse(config, names, f"{spec.id}: it is not an Atari game")
        env = _make_general(spec, full_id(env_id), num_envs, vectorization, timeout)
        reset(env, seed)
        line = f"{spec.id}: {_shape(env.single_observation_space)} -> {_shape(env.single_action_space)}"
        line += f", at most {spec.max_episode_steps} steps" if spec.max_episode_steps else ""
        line += (
            ", stepped from its transition table"
            if tabled(spec) and _own(spec, num_envs, vectorization)
            else ""
        )
        line += ", forbidden actions masked" if is_masked(env.single_observation_space) else ""
        env.metadata = {**env.metadata, "frame_skip": 1, "description": line}
    env.metadata = {**env.metadata, "nondeterministic": spec.nondeterministic}
    env.action_space.seed(seed)
    env.single_action_space.seed(seed)
    return env


def describe(env: VectorEnv) -> str:
    """The protocol in force, on one line."""
    return env.metadata.get("description", str(env))


def frame_skip(env: VectorEnv) -> int:
    """Emulator frames per step, 1 outside Atari."""
    return env.metadata.get("frame_skip", 1)


def frame_stack(env: VectorEnv) -> int:
    """Frames in the first axis of an observation, 1 where observations are no stacks."""
    return env.metadata.get("frame_stack", 1)


def fps(env: VectorEnv) -> float:
    """Steps per second at which a person would watch: the console's speed for Atari."""
    skip = env.metadata.get("console")
    return 60 / skip if skip else float(env.metadata.get("render_fps") or 30)


def full_id(env_id: str) -> str:
    """The id in the registry, with its version, behind the module that registers it: `package:MyEnv-v0`.

    Raises: UserError with the nearest match.
    """
    return "".join(env_id.rpartition(":")[:2]) + resolve(env_id).id


def resolve(env_id: str, say: Callable[[str], None] | None = None) -> EnvSpec:
    """Find an id in gymnasium's registry; without a version it means the newest one, and `say` is told.

    `package:MyEnv-v0` first imports `package`, which must register the environment.
    Raises: UserError with the nearest match.
    """
    register()
    register_tables()
    register_hidden()
    import ale_py  # noqa: F401  (registers its games)

    module, _, name = env_id.rpartition(":")
    if name.startswith("MinAtar/"):
        _register_minatar(name)
    if module:
        try:
            importlib.import_module(module)
        except (ImportError, TypeError, ValueError) as error:  # `.x` is a TypeError
            raise UserError(f"cannot import {module!r} of env {env_id!r}: {error}") from None
    if name in gymnasium.registry:
        return gymnasium.registry[name]
    found = [(int(match[1]), key) for key in gymnasium.registry if (match := _version(name, key))]
    if not found:
        known = _known()
        lacking = [key for key in known if key.endswith(f"/{name}")]  # only its namespace
        raise UserError(f"unknown env {env_id!r}.{nearest(name, lacking or known)}")
    newest = max(found)[1]
    if say is not None:
        say(f"{env_id} is {newest}")
    return gymnasium.registry[newest]


def _register_minatar(name: str) -> None:
    """MinAtar's ids appear in the registry when its own function is called."""
    if "MinAtar/Breakout-v0" in gymnasium.registry:
        return
    try:
        from minatar.gym import register_envs  # type: ignore[import-not-found]  # an extra
    except ImportError:
        raise UserError(f'{name} needs a missing package: pip install "chordate[minatar]"') from None
    register_envs()


def _shape(space: gymnasium.Space) -> str:
    return f"{type(space).__name__} {space.shape}" if isinstance(space, gymnasium.spaces.Box) else str(space)


def _version(name: str, key: str) -> re.Match[str] | None:
    return re.fullmatch(re.escape(name) + r"-v(\d+)", key)


def _known() -> list[str]:
    # only ids that work; with and without version, so that `ALE/Pnog` and `ALE/Pnog-v5` find their way
    specs = gymnasium.registry.values()
    names = [spec.id for spec in specs if not isinstance(spec.kwargs.get("frameskip"), tuple)]
    return names + [re.sub(r"-v\d+$", "", name) for name in names]


def _make_atari(game: Game, num_envs: int, seed: int, vectorization: str, timeout: float) -> VectorEnv:
    env: VectorEnv
    if game.ram:
        if vectorization == "vector":
            raise UserError(f"{game.id} with RAM has no vectorised version: choose auto, sync or async")
        one = functools.partial(ram_game, game, _scalar)
        env = _copies(one, num_envs, vectorization, game.id, "", timeout)
        reset(env, seed)
    elif vectorization in ("sync", "async"):
        raise UserError(f"{game.id} images come from the native vector env: use auto or vector, or --obs ram")
    else:
        env = Atari(game, num_envs, seed)
    line = game.describe(int(env.single_action_space.n))  # type: ignore[attr-defined]  (Discrete)
    stack = 1 if game.ram else game.config.stack
    facts = {"frame_skip": game.frame_skip, "frame_stack": stack, "description": line}
    facts["console"] = game.frame_skip  # frames of a console that shows 60 a second
    env.metadata = {**env.metadata, **facts}
    return env


def _make_general(spec: EnvSpec, full: str, num_envs: int, vectorization: str, timeout: float) -> VectorEnv:
    if _own(spec, num_envs, vectorization):
        env = _own_vectorised(spec, num_envs)
        if env is not None:
            return env
        if vectorization == "vector":
            raise UserError(f"{spec.id} has no vectorised version fit for use: choose sync or async")
    one = functools.partial(_scalar, full)
    return _copies(one, num_envs, vectorization, spec.id, str(spec.entry_point), timeout)


def _own(spec: EnvSpec, num_envs: int, vectorization: str) -> bool:
    """Whether the environment's own way to step many at once is wanted."""
    worth = tabled(spec) or num_envs >= ENOUGH
    return vectorization == "vector" or (vectorization == "auto" and worth)


def _own_vectorised(spec: EnvSpec, num_envs: int) -> VectorEnv | None:
    if tabled(spec):
        return TableEnv(spec, num_envs)
    if spec.id in HIDDEN:
        original = HIDDEN[spec.id]
        env = _own_vectorised(gymnasium.spec(original), num_envs)
        return None if env is None else HiddenVector(env, SHOWN[original])
    if spec.vector_entry_point is None:
        return None
    try:
        env = gymnasium.make_vec(spec.id, num_envs, vectorization_mode="vector_entry_point")
    except (ImportError, gymnasium.error.DependencyNotInstalled):
        return None  # its scalar version may need less
    if spec.vector_entry_point == _CARTPOLE:
        return SameStepCartPole(env)
    if env.metadata.get("autoreset_mode") is AutoresetMode.SAME_STEP:
        return env
    env.close()
    return None


def _copies(
    one: Callable[[], gymnasium.Env],
    num_envs: int,
    vectorization: str,
    env_id: str,
    entry_point: str,
    timeout: float,
) -> VectorEnv:
    ones = [one] * num_envs
    try:
        if vectorization == "async":
            return Workers(ones, timeout)
        return SyncVectorEnv(ones, autoreset_mode=AutoresetMode.SAME_STEP)
    except (ImportError, gymnasium.error.Error) as error:
        raise _mend(env_id, entry_point, error) from None


def _mend(env_id: str, entry_point: str, error: Exception) -> UserError:
    for extra in ("mujoco", "box2d"):
        missing = isinstance(error, (ImportError, gymnasium.error.DependencyNotInstalled))
        if missing and f".{extra}" in entry_point:
            return UserError(f'{env_id} needs a missing package: pip install "chordate[{extra}]"')
    return UserError(f"{env_id} cannot be made: {(str(error) or type(error).__name__).splitlines()[0]}")


def _scalar(env_id: str, **keywords: Any) -> gymnasium.Env:
    """One environment; also runs in the processes of `async`, where nothing is registered yet."""
    # the collector checks what matters, for every kind of env
    env = gymnasium.make(resolve(env_id).id, disable_env_checker=True, **keywords)
    return Masked(env) if masks(env) else env


class LeftRight(spaces.MultiDiscrete):
    """0 or 1 for each pole. The check of `MultiDiscrete` takes a third of a step, this one a sixth of that."""

    def __init__(self, num_envs: int) -> None:
        """For so many poles."""
        super().__init__(np.full(num_envs, 2))

    def contains(self, x: Any) -> bool:
        """See `Space.contains`."""
        if isinstance(x, np.ndarray) and x.dtype == np.int64 and x.shape == self.nvec.shape:
            # read without a sign, a negative number is a huge one
            return not np.count_nonzero(x.view(np.uint64) > 1)
        return super().contains(x)


class SameStepCartPole(VectorWrapper):
    """Gymnasium's vectorised CartPole, reset within the step that ended instead of in the one after.

    The original spends a step without an action, with reward 0, on every reset: a learner would store it.
    """

    def __init__(self, env: VectorEnv) -> None:
        """Wrap a CartPoleVectorEnv."""
        super().__init__(env)
        self.metadata = {**env.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        base: Any = env.unwrapped
        base.action_space = LeftRight(env.num_envs)

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all poles; those that ended start anew, and info["final_obs"] holds where they ended."""
        base: Any = self.env
        obs, reward, terminated, truncated, info = base.step(actions)
        ended = terminated | truncated
        if ended.any():
            info = {**info, "final_obs": obs, "_final_obs": ended}
            base.state[:, ended] = base.np_random.uniform(base.low, base.high, (4, int(ended.sum())))
            base.steps[ended] = 0
            base.prev_done[:] = False  # nothing is left for the original to reset
            obs = base.state.T.astype(np.float32)
        return obs, reward, terminated, truncated, info

    def get_state(self) -> dict[str, np.ndarray]:
        """See `envs.journal.Stateful`."""
        base: Any = self.env
        return {"state": base.state, "steps": base.steps, "rng": pack(base.np_random)}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """See `envs.journal.Stateful`."""
        base: Any = self.env
        base.state, base.steps = np.array(state["state"]), np.array(state["steps"])
        base.prev_done[:] = False
        unpack(base.np_random, state["rng"])
