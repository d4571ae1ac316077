"""Collecting transitions: each has the true successor of its observation, whatever was reset in between.

Source: autoreset modes, https://farama.org/Vector-Autoreset-Mode (SAME_STEP is the only one used here).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from gymnasium.spaces import Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from replay.types import Transition
from runs.config import UserError


class Episode(NamedTuple):
    """A finished episode: of which env, its sum of unclipped rewards, its length in steps."""

    env: int
    return_: float
    length: int


@runtime_checkable
class Overlapped(Protocol):
    """A vector env that works while we do something else."""

    def step_async(self, actions: Any) -> None:
        """Start a step."""

    def step_wait(self) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Wait for the step and return it."""
        ...


def spread(seed: int, count: int) -> list[int]:
    """Give `count` envs seeds of their own; with consecutive ones env 1 of run 0 would equal env 0 of run 1.

    Units: each in [0, 2^31 - 1), because ale-py reads -1 as "at random" and no more than int32.
    """
    if seed < 0:
        raise UserError(f"seed must be 0 or more, got {seed}")
    return [int(word) % (2**31 - 1) for word in np.random.SeedSequence(seed).generate_state(count, np.uint64)]


def reset(env: VectorEnv, seed: int) -> Any:
    """Reset every env from `seed` and return the observations."""
    of_scalars = isinstance(env.unwrapped, (SyncVectorEnv, AsyncVectorEnv))
    streams: Any = spread(seed, env.num_envs if of_scalars else 1)
    return env.reset(seed=streams if of_scalars else streams[0])[0]


class Collector:
    """Steps a vector env and yields `Transition`s.

    `obs` is what to act on now, `first` where it starts an episode. `send` starts emulation where the env can
    work by itself, `recv` ends it; what is learned in between cannot change the outcome, so `overlap` alters
    speed only. `episodes` holds what the last `recv` finished.
    """

    def __init__(self, env: VectorEnv, seed: int, *, overlap: bool = True) -> None:
        """Reset `env` from `seed`.

        Raises: ValueError if the env does not reset in the same step; UserError for a non-finite observation.
        """
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(f"autoreset_mode must be SAME_STEP (use envs.make), got {mode}")
        self.env, self.overlap, self.steps = env, overlap, 0
        self.obs: Any = reset(env, seed)
        self.first = np.ones(env.num_envs, bool)
        self.episodes: list[Episode] = []
        self._returns = np.zeros(env.num_envs, np.float64)
        self._lengths = np.zeros(env.num_envs, np.int64)
        self._waiting: Overlapped | None = env if overlap and isinstance(env, Overlapped) else None
        self._action: np.ndarray | None = None
        self._result: Any = None
        _check_finite(self.obs, "observation", 0)

    def send(self, action: np.ndarray) -> None:
        """Take `action` (N, *A) in every env.

        Raises: ValueError for a wrong shape or an action out of range; RuntimeError before the last `recv`.
        """
        if self._action is not None:
            raise RuntimeError("send called twice without recv")
        self._action = _check_action(self.env, action)
        if self._waiting is not None:
            self._waiting.step_async(self._action)
        elif not self.overlap:
            self._result = self.env.step(self._action)

    def recv(self) -> Transition:
        """Wait for the step that `send` began.

        Raises: UserError naming env and step if a reward or observation is not finite.
        """
        if self._action is None:
            raise RuntimeError("recv called without send")
        obs, reward, ended, terminated, truncated, info = self._wait()
        self.steps += 1
        _check_finite(reward, "reward", self.steps)
        next_obs = _successor(obs, info, ended)
        _check_finite(next_obs, "observation", self.steps)
        if next_obs is not obs:
            _check_finite(obs, "observation", self.steps)
        terminated = terminated | info.get("life_loss", False)
        transition = Transition(
            self.obs, self._action, reward.astype(np.float32), next_obs, terminated, truncated, self.first
        )
        self._account(reward, ended)
        self.obs, self.first, self._action = obs, ended, None
        return transition

    def unfinished(self, rows: np.ndarray) -> list[Episode]:
        """The episodes of these envs as they stand."""
        return [Episode(int(i), float(self._returns[i]), int(self._lengths[i])) for i in rows]

    def close(self) -> None:
        """Finish a step under way, then close the env."""
        if self._action is not None and self._waiting is not None:
            self._waiting.step_wait()
        self._action = None
        self.env.close()

    def _wait(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        if self._waiting is not None:
            result = self._waiting.step_wait()
        elif self._result is not None:
            result, self._result = self._result, None
        else:
            result = self.env.step(self._action)
        obs, reward, terminated, truncated, info = result
        terminated, truncated = np.asarray(terminated, bool), np.asarray(truncated, bool)
        return obs, np.asarray(reward), terminated | truncated, terminated, truncated, info

    def _account(self, reward: np.ndarray, ended: np.ndarray) -> None:
        self._returns += reward
        self._lengths += 1
        rows = np.flatnonzero(ended)
        self.episodes = self.unfinished(rows)
        self._returns[rows] = 0
        self._lengths[rows] = 0


def _check_action(env: VectorEnv, action: np.ndarray) -> np.ndarray:
    space = env.single_action_space
    action = np.array(action)  # a copy: the caller may reuse its buffer before the transition is read
    shape = (env.num_envs, *(space.shape or ()))
    if action.shape != shape:
        raise ValueError(f"action must have shape {shape}, got {action.shape}")
    if not isinstance(space, Discrete):
        return action
    low, high = int(space.start), int(space.start + space.n) - 1
    whole = np.issubdtype(action.dtype, np.integer)
    bad = np.flatnonzero((action < low) | (action > high)) if whole else np.arange(1)
    if len(bad):
        value = action[bad[0]]
        raise ValueError(f"action of env {bad[0]} must be a whole number in [{low}, {high}], got {value}")
    return action.astype(np.int64, copy=False)


def _successor(obs: Any, info: dict[str, Any], ended: np.ndarray) -> Any:
    """The observations that the step led to: `obs`, with the last one of each ended episode put in."""
    rows = np.flatnonzero(ended)
    if not len(rows):
        return obs
    final = info["final_obs"]
    if isinstance(final, dict):
        last = [{name: part[i] for name, part in final.items()} for i in rows]
    else:
        last = [final[i] for i in rows]  # other rows are None (gymnasium) or uninitialised memory (ale-py)
    return _put(obs, rows, last)


def _put(obs: Any, rows: np.ndarray, last: Sequence[Any]) -> Any:
    if isinstance(obs, dict):
        return {name: _put(part, rows, [row[name] for row in last]) for name, part in obs.items()}
    if isinstance(obs, tuple):
        return tuple(_put(part, rows, [row[k] for row in last]) for k, part in enumerate(obs))
    changed = np.array(obs)
    changed[rows] = last
    return changed


def _check_finite(value: Any, what: str, step: int) -> None:
    if isinstance(value, dict):
        for name, part in value.items():
            _check_finite(part, f"{what} {name!r}", step)
    elif isinstance(value, tuple):
        for part in value:
            _check_finite(part, what, step)
    elif np.issubdtype(value.dtype, np.inexact) and not np.isfinite(value).all():
        row = int(np.argwhere(~np.isfinite(value))[0][0])
        wrong = value[row][~np.isfinite(value[row])].flat[0]
        raise UserError(f"{what} of env {row} is {wrong} at step {step}: it must be finite")
