"""Steps in the order they were taken, until there are enough to learn from; then they are forgotten.

`Rollouts` is full after so many steps of every environment, `Episodes` after so many finished episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from replay.tree import filled, leaves, mapped
from replay.types import Decision, Rollout, Transition

NOTHING = np.zeros(0, np.float32)


class Step(NamedTuple):
    """One step of N environments; see `Rollout`."""

    obs: Any
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    first: np.ndarray
    logp: np.ndarray
    value: np.ndarray
    next_obs: Any  # where an episode was truncated; else None
    state: tuple[Any, ...] | None  # before this step, where it is kept
    after: tuple[Any, ...] | None  # behind it, where next_obs is kept


ARRAYS = ("action", "reward", "terminated", "truncated", "first", "logp", "value")  # fields without a tree


class Rollouts:
    """T steps of N environments."""

    def __init__(self, length: int, like: Any, state: tuple[Any, ...] = (), every: int = 0) -> None:
        """Full after `length` steps of each environment, whose observations look like `like` (N, *S).

        `state`: what an agent with memory remembers before the first step; kept before every `every` steps.
        """
        self.length, self._like, self._every = length, like, every or length
        self._steps: list[Step] = []
        self._next: Any = None  # the successor of the last step
        self._state = state  # behind the last step

    def add(self, transition: Transition, decision: Decision) -> None:
        """Remember a step and the decision behind it."""
        truncated = transition.truncated & ~transition.terminated
        if self._steps and np.count_nonzero(transition.first):
            self._seal(transition.first)
        self._next = transition.next_obs
        cut = bool(np.count_nonzero(truncated))
        kept = self._state if self._every and len(self._steps) % self._every == 0 else None
        self._state = decision.state
        self._steps.append(
            Step(
                mapped(np.array, transition.obs),  # the env may write into its own again
                decision.action if decision.sample is None else decision.sample,
                transition.reward,
                transition.terminated,
                truncated,
                transition.first,
                NOTHING if decision.logp is None else decision.logp,
                NOTHING if decision.value is None else decision.value,
                transition.next_obs if cut else None,
                kept,
                decision.state if cut else None,
            )
        )

    @property
    def full(self) -> bool:
        """Whether it is time to learn."""
        return len(self._steps) >= self.length

    def take(self, last_obs: Any, last: Decision, first: np.ndarray | None = None) -> Rollout:
        """Give the steps away; the last one led to `last_obs` (N, *S), and `last` is what was decided last.

        Where `first` (N,) says that an episode begins there though none ended, the one before was lost.
        """
        if first is not None:
            self._seal(first)
        steps, self._steps = self._steps, []
        arrays = {name: _column(steps, name) for name in ARRAYS}
        at, of = np.nonzero(arrays["truncated"])
        obs = _stacked([step.obs for step in steps])
        return Rollout(
            **arrays,
            obs=obs,
            cut_obs=_rows([step.next_obs for step in steps], at, of, last_obs),
            last_obs=last_obs,
            last=last,
            state=_stacked([step.state for step in steps if step.state is not None] or [self._state]),
            cut_state=_rows([step.after for step in steps], at, of, self._state),
            last_state=self._state,
        )

    def state_dict(self) -> dict[str, np.ndarray]:
        """The steps so far, and what is remembered behind them."""
        state = {name: _column(self._steps, name) for name in ARRAYS} if self._steps else {}
        for name, trees in (
            ("obs", [step.obs for step in self._steps]),
            ("cut", [step.next_obs for step in self._steps]),
            ("next", [self._next] if self._steps else []),
            ("state", [step.state for step in self._steps]),
            ("after", [step.after for step in self._steps]),
            ("memory", [self._state]),
        ):
            columns = zip(*(map(_leaf, leaves(tree)) for tree in trees if tree is not None), strict=True)
            for k, column in enumerate(columns):
                state[f"{name}.{k}"] = _piled(column)
        return state

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state_dict` gave."""
        self._steps, cuts, kept = [], 0, 0
        for t, truncated in enumerate(state.get("truncated", ())):
            obs, cut, after, before = _tree(state, "obs", t, self._like), None, None, None
            if truncated.any():
                cut, after = _tree(state, "cut", cuts, self._like), _tree(state, "after", cuts, self._state)
                cuts += 1
            if self._every and t % self._every == 0:
                before, kept = _tree(state, "state", kept, self._state), kept + 1
            arrays = {name: state[name][t] for name in ARRAYS}
            self._steps.append(Step(**arrays, obs=obs, next_obs=cut, state=before, after=after))
        if self._steps:
            self._next = _tree(state, "next", 0, self._like)
        self._state = _tree(state, "memory", 0, self._state)

    def _seal(self, first: np.ndarray) -> None:
        """Where an episode begins (N,) though none ended, the one before was lost: it counts as truncated."""
        step = self._steps[-1]
        broken = first & ~(step.terminated | step.truncated)
        if np.count_nonzero(broken):
            own = step.next_obs if step.next_obs is not None else self._next
            self._steps[-1] = step._replace(
                truncated=step.truncated | broken, next_obs=own, after=self._state
            )

    def unchanged(self) -> tuple[str, ...]:
        """Nothing of it can be taken over from the checkpoint before."""
        return ()

    def saved(self) -> None:
        """A checkpoint was made; nothing to note."""


class Episodes(Rollouts):
    """Whole episodes, one after the other as if a single environment had played them all: (B, 1) steps.

    An episode that is not finished stays, and goes on under a policy that has learned meanwhile. One that never ends
    keeps all its steps here.
    """

    def __init__(self, count: int, like: Any, state: tuple[Any, ...] = ()) -> None:
        """Full after `count` finished episodes, over all environments; see `Rollouts`."""
        super().__init__(0, like, state)
        self.count, self._finished = count, 0
        self._begin: np.ndarray | None = None  # (N,) the first step of the unfinished episode of each env

    def add(self, transition: Transition, decision: Decision) -> None:
        """See `Rollouts.add`."""
        super().add(transition, decision)
        self._finished += int(np.count_nonzero(transition.terminated | transition.truncated))

    @property
    def full(self) -> bool:
        """Whether there are enough episodes."""
        return self._finished >= self.count

    def take(self, last_obs: Any, last: Decision, first: np.ndarray | None = None) -> Rollout:
        """Give the finished episodes away, and keep the others."""
        steps = self._steps
        ended = _column(steps, "terminated") | _column(steps, "truncated")  # (T, N)
        begin = np.zeros(ended.shape[1], np.int64) if self._begin is None else self._begin
        after = np.where(ended.any(0), len(ended) - ended[::-1].argmax(0), begin)  # (N,) behind its last end
        at = np.concatenate([np.arange(b, a) for b, a in zip(begin, after, strict=True)])  # (B,) step
        of = np.repeat(np.arange(len(begin)), after - begin)  # (B,) env
        whole = super().take(last_obs, last)
        arrays = {
            name: array[at, of][:, None] if (array := getattr(whole, name)).size else array for name in ARRAYS
        }
        cut = arrays["truncated"][:, 0]
        drop = int(after.min())
        self._steps, self._begin, self._finished = steps[drop:], after - drop, 0
        return whole._replace(
            **arrays,
            obs=mapped(lambda leaf: leaf[at, of][:, None], whole.obs),
            cut_obs=_rows([step.next_obs for step in steps], at[cut], of[cut], last_obs),
            last_obs=mapped(lambda leaf: leaf[:1], last_obs),
            # every episode starts anew: these are not read, but have to be there
            state=mapped(lambda leaf: leaf[:, :1], whole.state),
            cut_state=_rows([step.after for step in steps], at[cut], of[cut], whole.last_state),
            last_state=mapped(lambda leaf: leaf[:1], whole.last_state),
        )

    def state_dict(self) -> dict[str, np.ndarray]:
        """See `Rollouts.state_dict`."""
        begin = {} if self._begin is None else {"begin": self._begin}
        return {**super().state_dict(), **begin, "finished": np.array(self._finished)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """See `Rollouts.load_state_dict`."""
        super().load_state_dict(state)
        self._begin, self._finished = state.get("begin"), int(state["finished"])


def pack(decision: Decision) -> dict[str, np.ndarray]:
    """A decision as arrays by name, for a checkpoint."""
    drawn = {"sample": decision.sample, "logp": decision.logp, "value": decision.value}
    trees = {"action": decision.action, "state": decision.state}
    packed = {f"{name}.{k}": leaf for name, tree in trees.items() for k, (_, leaf) in enumerate(leaves(tree))}
    return packed | {name: array for name, array in drawn.items() if array is not None}


def unpack(arrays: dict[str, np.ndarray], like: Any) -> Decision:
    """The decision that `pack` packed; `like` is an action, for the shape of its tree."""
    parts = (arrays[f"action.{k}"] for k, _ in enumerate(leaves(like)))
    state = tuple(
        np.array(arrays[f"state.{k}"]) for k in range(sum(name.startswith("state.") for name in arrays))
    )
    return Decision(filled(like, parts), state, *map(arrays.get, ("sample", "logp", "value")))


def _column(steps: list[Step], name: str) -> np.ndarray:
    return _piled([getattr(step, name) for step in steps])


def _piled(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """`np.stack` of arrays of one shape, at a third of its cost for small ones."""
    if np.ndim(arrays[0]) == 0:
        return np.array(arrays)
    return np.concatenate(arrays).reshape(len(arrays), *arrays[0].shape)


def _leaf(found: tuple[Any, Any]) -> Any:
    return found[1]


def _stacked(trees: list[Any]) -> Any:
    """One tree, the leaves of all stacked on a new first axis."""
    return mapped(lambda *column: _piled(column), *trees)


def _rows(trees: list[Any], at: np.ndarray, of: np.ndarray, like: Any) -> Any:
    """Of the trees `at` the rows of the envs `of`, (C, ...): what lies behind truncated steps."""
    rows = [mapped(lambda leaf, n=n: leaf[n], trees[t]) for t, n in zip(at, of, strict=True)]
    return _stacked(rows) if rows else mapped(lambda leaf: leaf[:0], like)


def _tree(state: dict[str, np.ndarray], name: str, row: int, like: Any) -> Any:
    return filled(like, (state[f"{name}.{k}"][row] for k, _ in enumerate(leaves(like))))
