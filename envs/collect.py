"""Collecting transitions: each has the true successor of its observation, whatever was reset in between.

Source: autoreset modes, https://farama.org/Vector-Autoreset-Mode (SAME_STEP is the only one used here).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from gymnasium.spaces import Dict, Discrete, Tuple
from gymnasium.vector import AutoresetMode, VectorEnv

from envs.journal import EVERY, SEEDED, Journal, Stateful, reset, spread
from envs.workers import WorkerFault
from replay.tree import filled, leaves, mapped
from replay.types import Transition
from runs.config import RunFailed, UserError

MOST_FAULTS, FAULT_STEPS = 10, 1_000  # so many failures in so many steps end the run


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


class Collector:
    """Steps a vector env and yields `Transition`s.

    `obs` is what to act on now, `first` where it starts an episode. `send` starts emulation where the env can
    work by itself, `recv` ends it; what is learned in between cannot change the outcome, so `overlap` alters
    speed only. `episodes` holds what the last `recv` finished.
    """

    def __init__(
        self, env: VectorEnv, seed: int, *, overlap: bool = True, resumable: bool = False, every: int = EVERY
    ) -> None:
        """Reset `env` from `seed`; if `resumable`, remember what its state can be rebuilt from.

        Raises: ValueError if the env does not reset in the same step; UserError for a non-finite observation.
        """
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(f"autoreset_mode must be SAME_STEP (use envs.make), got {mode}")
        self.env, self.overlap, self.steps, self._seed, self._every = env, overlap, 0, seed, every
        self.obs: Any = reset(env, seed)
        self.first = np.ones(env.num_envs, bool)
        self.episodes: list[Episode] = []
        self._returns = np.zeros(env.num_envs, np.float64)
        self._lengths = np.zeros(env.num_envs, np.int64)
        self._waiting: Overlapped | None = env if overlap and isinstance(env, Overlapped) else None
        self.faults: list[tuple[int, str]] = []  # step and reason of each failure of an environment's process
        self._action: Any = None
        self._result: Any = None
        self._stateful: Stateful | None = env if isinstance(env, Stateful) else None
        seeded = isinstance(env.unwrapped, SEEDED) and not env.metadata.get("nondeterministic", False)
        kept = resumable and seeded and self._stateful is None
        self._journal = Journal(env, seed, every) if kept else None
        # decided once: a step of a small environment takes no longer than a few such questions
        self._checked = ActionCheck(env)
        self._floats = [path for path, leaf in leaves(self.obs) if leaf.dtype.kind == "f"]
        self._check_obs(self.obs)

    def send(self, action: Any) -> None:
        """Take `action` (N, *A) in every env.

        Raises: ValueError for a wrong shape or an action out of range; RuntimeError before the last `recv`.
        """
        if self._action is not None:
            raise RuntimeError("send called twice without recv")
        self._action = self._checked(action)
        if self._journal is not None:
            self._journal.note(self._action)
        try:
            if self._waiting is not None:
                self._waiting.step_async(self._action)
            elif not self.overlap:
                self._result = self.env.step(self._action)
        except WorkerFault as fault:
            self._result = self._recover(fault, self._action)

    def recv(self) -> Transition:
        """Wait for the step that `send` began.

        Raises: UserError naming env and step if a reward or observation is not finite.
        """
        if self._action is None:
            raise RuntimeError("recv called without send")
        obs, reward, terminated, truncated, info = self._wait()
        # copies: the env may reuse its arrays
        terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)
        reward = np.asarray(reward)
        ended = terminated | truncated
        self.steps += 1
        if not _finite(reward):
            raise _not_finite(reward, "reward", self.steps)
        next_obs, any_ended = obs, np.count_nonzero(ended) > 0
        if any_ended:
            next_obs = _successor(obs, info, ended)
            self._check_obs(next_obs)
        self._check_obs(obs)
        if "life_loss" in info:
            terminated |= info["life_loss"]
        transition = Transition(
            self.obs, self._action, reward.astype(np.float32), next_obs, terminated, truncated, self.first
        )
        self._returns += reward
        self._lengths += 1
        self.episodes = self._finish(ended) if any_ended else []
        if any_ended and self._journal is not None:
            try:
                anew = self._journal.turn(ended)
            except WorkerFault as fault:
                anew, lost = self._rebuilt(fault)
                ended = ended | lost
            if anew is not None:
                self._check_obs(anew)
                obs = anew
        self.obs, self.first, self._action = obs, ended, None
        return transition

    @property
    def exact(self) -> bool:
        """Whether `load_state_dict` can bring the environments back to where they were."""
        return self._stateful is not None or self._journal is not None

    def state_dict(self) -> dict[str, np.ndarray]:
        """Where the episodes stand, and what the environments can be rebuilt from; not between send and recv."""
        if self._action is not None:
            raise RuntimeError("state_dict called between send and recv")
        own = {
            "steps": np.array(self.steps),
            "first": self.first,
            "returns": self._returns,
            "lengths": self._lengths,
        }
        own |= {f"obs.{k}": leaf for k, (_, leaf) in enumerate(leaves(self.obs))}
        kept = self._stateful.get_state() if self._stateful is not None else {}
        kept = self._journal.state_dict() if self._journal is not None else kept
        return own | {f"env.{name}": value for name, value in kept.items()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> bool:
        """Bring the environments back; False if they could not be: then all episodes start anew."""
        kept = {name[4:]: value for name, value in state.items() if name.startswith("env.")}
        found: Any = None
        if self._stateful is not None and kept:
            self._stateful.set_state(kept)
            found = self._stood(state)
        elif self._journal is not None and kept:
            try:
                found = self._journal.load_state_dict(kept)
            except WorkerFault as fault:
                self._rebuilt(fault)
        self.steps = int(state["steps"])
        stood = [leaf for _, leaf in leaves(self._stood(state))]
        if found is not None and all(map(np.array_equal, stood, [leaf for _, leaf in leaves(found)])):
            self.obs, self.first = found, np.array(state["first"])
            self._returns[...], self._lengths[...] = state["returns"], state["lengths"]
            return True
        seed = spread(self._seed, 2)[1] + self.steps  # other episodes than at the start of the run
        self.obs, self.first = reset(self.env, seed), np.ones(self.env.num_envs, bool)
        self._returns[...], self._lengths[...] = 0, 0
        if self._journal is not None:
            self._journal = Journal(self.env, seed, self._every)
        return False

    def _stood(self, state: dict[str, np.ndarray]) -> Any:
        """The observations (N, *S) that a `state_dict` holds."""
        return filled(self.obs, (np.array(state[f"obs.{k}"]) for k, _ in enumerate(leaves(self.obs))))

    def unfinished(self, rows: np.ndarray) -> list[Episode]:
        """The episodes of these envs as they stand."""
        columns = (rows.tolist(), self._returns[rows].tolist(), self._lengths[rows].tolist())
        return list(map(Episode, *columns))

    def close(self) -> None:
        """Finish a step under way, then close the env."""
        if self._action is not None and self._waiting is not None:
            self._waiting.step_wait()
        self._action = None
        self.env.close()

    def _wait(self) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        if self._result is not None:
            result, self._result = self._result, None
            return result
        action = self._action
        assert action is not None
        try:
            return self._waiting.step_wait() if self._waiting is not None else self.env.step(action)
        except WorkerFault as fault:
            return self._recover(fault, action)

    def _recover(self, fault: WorkerFault, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Rebuild the environments, those that failed from a new seed, and take the step again.

        What the failed ones did in their last step is lost; they take its action in their new first state.
        Raises: RunFailed if they fail again and again.
        """
        if self._journal is not None:
            self._journal.undo()
        while True:
            self.obs, lost = self._rebuilt(fault)
            self.first = self.first | lost
            try:
                if self._journal is not None:
                    self._journal.note(action)
                return self.env.step(action)
            except WorkerFault as again:
                fault = again
                if self._journal is not None:
                    self._journal.undo()

    def _rebuilt(self, fault: WorkerFault) -> tuple[Any, np.ndarray]:
        """Start the processes anew, and bring back what did not fail; the observations, and who was lost (N,)."""
        workers: Any = self.env.unwrapped
        lost = fault.rows
        while True:
            self.faults.append((self.steps, str(fault)))
            early = len(self.faults) < MOST_FAULTS or self.faults[-MOST_FAULTS][0] < self.steps - FAULT_STEPS
            if not early:
                raise RunFailed(
                    f"{MOST_FAULTS} failures in {FAULT_STEPS} steps, the last one: {fault}"
                ) from fault
            try:
                workers.rebuild()
                if self._journal is None:
                    lost = np.ones(self.env.num_envs, bool)
                    obs = reset(self.env, spread(self._seed, 3)[2] + len(self.faults))
                else:
                    obs = self._journal.recover(lost)
                break
            except WorkerFault as again:
                fault, lost = again, lost | again.rows
        self._check_obs(obs)
        self._returns[lost], self._lengths[lost] = 0, 0
        return obs, lost

    def _finish(self, ended: np.ndarray) -> list[Episode]:
        rows = np.flatnonzero(ended)
        episodes = self.unfinished(rows)
        self._returns[rows] = 0
        self._lengths[rows] = 0
        return episodes

    def _check_obs(self, obs: Any) -> None:
        for path in self._floats:
            leaf = obs
            for key in path:
                leaf = leaf[key]
            if not _finite(leaf):
                name = "".join(f" {key!r}" for key in path if isinstance(key, str))
                raise _not_finite(leaf, f"observation{name}", self.steps)


class ActionCheck:
    """Checks the actions (N, *A) of a vector env, and copies them: the caller may reuse its buffer.

    Raises: ValueError for a wrong shape, an action out of range, or a number that is not finite.
    """

    def __init__(self, env: VectorEnv) -> None:
        """Look up what is allowed."""
        space = env.single_action_space
        self.parts = None
        if isinstance(space, (Dict, Tuple)):
            self.parts = {path: _leaf_space(space, path) for path, _ in leaves(space.sample())}
            self.n = env.num_envs
            return
        self.shape = (env.num_envs, *(space.shape or ()))
        self.discrete = isinstance(space, Discrete)
        self.low, self.count = (int(space.start), int(space.n)) if isinstance(space, Discrete) else (0, 0)

    def __call__(self, action: Any) -> Any:
        """The actions, whole numbers as int64."""
        if self.parts is not None:
            return self._tree(action)
        action = np.array(action)
        if action.shape != self.shape:
            raise ValueError(f"action must have shape {self.shape}, got {action.shape}")
        if not self.discrete:
            if action.dtype.kind == "f" and not _finite(action):
                raise ValueError(f"action must be finite, got {action}")
            return action
        whole = action.dtype.kind in "iu"
        if whole:
            action = action.astype(np.int64, copy=False)
            # read without a sign, a number below the lowest action is a huge one
            bad = (action - self.low).view(np.uint64) >= self.count
            if not np.count_nonzero(bad):
                return action
        row = int(bad.argmax()) if whole else 0
        allowed = f"[{self.low}, {self.low + self.count - 1}]"
        raise ValueError(f"action of env {row} must be a whole number in {allowed}, got {action[row]}")

    def _tree(self, action: Any) -> Any:
        found = dict(leaves(action))
        if list(found) != list(self.parts or ()):
            raise ValueError(f"action must have the parts {list(self.parts or ())}, got {list(found)}")
        for path, space in (self.parts or {}).items():
            part = np.asarray(found[path])
            if len(part) != self.n or not all(space.contains(row) for row in part):
                raise ValueError(f"part {path} of action must be {self.n} of {space}, got {part}")
        return mapped(np.array, action)


def _leaf_space(space: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        space = space[key]
    return space


def _successor(obs: Any, info: dict[str, Any], ended: np.ndarray) -> Any:
    """The observations that the step led to: `obs`, with the last one of each ended episode put in."""
    rows = np.flatnonzero(ended)
    final = info["final_obs"]
    if isinstance(final, dict):
        last: Any = [{name: part[i] for name, part in final.items()} for i in rows]
    elif isinstance(final, np.ndarray) and final.dtype != object:
        last = final[rows]
    else:
        last = [final[i] for i in rows]  # other rows are None (gymnasium) or uninitialised memory (ale-py)
    return _put(obs, rows, last)


def _put(obs: Any, rows: np.ndarray, last: Any) -> Any:
    if isinstance(obs, dict):
        return {name: _put(part, rows, [row[name] for row in last]) for name, part in obs.items()}
    if isinstance(obs, tuple):
        return tuple(_put(part, rows, [row[k] for row in last]) for k, part in enumerate(obs))
    changed = np.array(obs)
    changed[rows] = last
    return changed


def _finite(value: np.ndarray) -> bool:
    # the sum of squares takes one pass; only where it overflows must each number be asked
    return math.isfinite(np.vdot(value, value)) or bool(np.isfinite(value).all())


def _not_finite(value: np.ndarray, what: str, step: int) -> UserError:
    row = int(np.argwhere(~np.isfinite(value))[0][0])
    wrong = value[row][~np.isfinite(value[row])].flat[0]
    return UserError(f"{what} of env {row} is {wrong} at step {step}: it must be finite")
