"""What environments can be rebuilt from: the seed of their last seeded reset, and the actions taken since.

After a seeded reset an environment is a function of that seed and of the actions alone (gymnasium asks this of every
environment, and `nondeterministic` in its registration says where it does not hold). Replaying a whole run would take
long, so an environment that ends an episode with a long past behind it starts the next one from a fresh seed.

Deviation: at those restarts, one in `EVERY` steps of an environment, the episode's start comes from a seed derived
from the run's instead of the environment's own stream of random numbers.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Protocol, runtime_checkable

import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

from replay.tree import filled, leaves, mapped
from runs.config import UserError

EVERY = 20_000  # steps of one environment; a native Atari game takes 0.15 s to start from a seed


class SeedPerEnv(VectorEnv):
    """A vector env that resets like gymnasium's own: a list of seeds, and `reset_mask` for some envs only."""

    @abstractmethod
    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Reset the envs of `options["reset_mask"]`, each from its entry of the list `seed`."""


SEEDED = (SeedPerEnv, SyncVectorEnv, AsyncVectorEnv)


@runtime_checkable
class Stateful(Protocol):
    """A vector env that gives its state away and takes it back."""

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything that decides what its next steps do."""
        ...

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `get_state` gave."""


def spread(seed: int, count: int) -> list[int]:
    """Give `count` envs seeds of their own; with consecutive ones env 1 of run 0 would equal env 0 of run 1.

    Units: each in [0, 2^31 - 1), because ale-py reads -1 as "at random" and no more than int32.
    """
    if seed < 0:
        raise UserError(f"seed must be 0 or more, got {seed}")
    return [int(word) % (2**31 - 1) for word in np.random.SeedSequence(seed).generate_state(count, np.uint64)]


def reset(env: VectorEnv, seed: int) -> Any:
    """Reset every env from `seed` and return the observations."""
    if isinstance(env.unwrapped, SEEDED):
        return restart(env, np.ones(env.num_envs, bool), np.array(spread(seed, env.num_envs)))
    return env.reset(seed=spread(seed, 1)[0])[0]


def restart(env: VectorEnv, rows: np.ndarray, seeds: np.ndarray) -> Any:
    """Reset the envs of the mask `rows` (N,), each from its entry of `seeds` (N,); return all observations."""
    asked: Any = [int(seed) if row else None for seed, row in zip(seeds, rows, strict=True)]
    options = None if rows.all() else {"reset_mask": rows}
    return env.reset(seed=asked, options=options)[0]


class Journal:
    """Seeds and actions of N environments, and the way back from them."""

    def __init__(self, env: VectorEnv, seed: int, every: int = EVERY) -> None:
        """Of an env that was just `reset` from `seed`."""
        self._env, self._seed, self._every = env, seed, every
        n = env.num_envs
        self._rows = np.arange(n)
        self._seeds = np.array(spread(seed, n))  # (N,) of the last seeded reset
        self._restarts = np.zeros(n, np.int64)  # (N,) seeded resets after the first one
        self._length = np.zeros(n, np.int64)  # (N,) steps since
        self._most = 0  # at least the longest of them
        one = mapped(np.asarray, env.single_action_space.sample())
        self._past = mapped(
            lambda leaf: np.zeros((1024, n, *leaf.shape), leaf.dtype), one
        )  # (T, N, *A) since
        self._room = 1024  # T

    def note(self, action: Any) -> None:
        """Remember the actions (N, *A) about to be taken."""
        if self._most == self._room:
            self._past = mapped(lambda leaf: np.concatenate([leaf, np.zeros_like(leaf)]), self._past)
            self._room *= 2
        at = self._length, self._rows
        if isinstance(self._past, np.ndarray):
            self._past[at] = action
        else:
            for (_, past), (_, leaf) in zip(leaves(self._past), leaves(action), strict=True):
                past[at] = leaf
        self._length += 1
        self._most += 1

    def turn(self, ended: np.ndarray) -> Any:
        """Start those of the envs `ended` (N,) anew whose past is long; their observations, or None if none was."""
        if self._most < self._every:
            return None
        due = ended & (self._length >= self._every)
        if not np.count_nonzero(due):
            return None
        self._reseed(due)
        return restart(self._env, due, self._seeds)

    def undo(self) -> None:
        """Forget the actions noted last: their step was not finished."""
        self._length = np.maximum(self._length - 1, 0)

    def recover(self, lost: np.ndarray) -> Any:
        """After the env was rebuilt: start the envs `lost` (N,) anew, bring the others to where they were, and return
        the observations (N, *S) there.
        """
        self._reseed(lost)
        return self._rebuild()

    def _reseed(self, rows: np.ndarray) -> None:
        self._restarts[rows] += 1
        for row in np.flatnonzero(rows):
            words = np.random.SeedSequence([self._seed, int(row), int(self._restarts[row])])
            self._seeds[row] = int(words.generate_state(1)[0]) % (2**31 - 1)
        self._length[rows] = 0
        self._most = int(self._length.max())

    def state_dict(self) -> dict[str, np.ndarray]:
        """The journal, its actions cut to what is needed."""
        needed = max(int(self._length.max()), 1)
        leaf_of = zip(self._names(), leaves(self._past), strict=True)
        past = {name: leaf[:needed] for name, (_, leaf) in leaf_of}
        return {
            "seeds": self._seeds,
            "restarts": self._restarts,
            "journal_length": self._length,
            **past,
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> Any:
        """Take a journal back, bring the env where it led, and return the observations (N, *S) there."""
        for own, name in (
            (self._seeds, "seeds"),
            (self._restarts, "restarts"),
            (self._length, "journal_length"),
        ):
            own[...] = state[name]
        self._past = filled(self._past, (np.array(state[name]) for name in self._names()))
        self._room = len(next(leaf for _, leaf in leaves(self._past)))
        self._most = int(self._length.max())
        return self._rebuild()

    def _names(self) -> list[str]:
        """Of the arrays of actions; by number, as the keys of a Dict space may hold any character."""
        if isinstance(self._past, np.ndarray):
            return ["journal"]
        return [f"journal.{k}" for k, _ in enumerate(leaves(self._past))]

    def _rebuild(self) -> Any:
        """Steps all envs together, each from its own seeded reset on, so that all arrive at once."""
        longest = int(self._length.max())
        waits = longest - self._length  # (N,) steps until its past begins
        obs = restart(self._env, np.ones(len(waits), bool), self._seeds)  # a new process wants a reset first
        for t in range(longest + 1):
            if t and (waits == t).any():
                obs = restart(self._env, waits == t, self._seeds)
            if t < longest:
                # what an env does before its seeded reset does not count: any valid action will do
                at, idle, early = np.maximum(t - waits, 0), waits > t, waits.argmin()

                def then(past: np.ndarray, at: Any = at, idle: Any = idle, early: Any = early) -> np.ndarray:
                    action = past[at, self._rows]
                    action[idle] = past[0, early]
                    return action

                obs = self._env.step(mapped(then, self._past))[0]
        return obs
