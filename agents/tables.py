"""Action values kept in a table: what numbers an observation, the table itself, and the exact values of known dynamics.

A table learns a batch at once. For every pair (s, a) in it, with m targets y_1 ... y_m:

    n(s, a) <- n(s, a) + 1
    Q(s, a) <- Q(s, a) + lr / n(s, a)^omega * (mean_i y_i - Q(s, a))

For a batch of one this is the update of the course notes, 6.1.1. All targets are made before the table changes, so m
updates one by one, towards fixed targets, would go the part 1 - (1 - lr)^m of the way towards a mean that favours the
last ones; here it is lr of the way to the plain mean, whose noise is sqrt(m) smaller. An n counts updates, not samples.
With 1/2 < omega <= 1 the steps sum to infinity and their squares do not, so that Q converges where rewards or
transitions are random; omega = 0 keeps the step at lr.

Source: Watkins and Dayan 1992, Machine Learning 8; steps lr / n^omega: Even-Dar and Mansour 2003, JMLR 5, section 3;
value iteration: Sutton and Barto 2018, section 4.4.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from envs import Dynamics
from runs.config import Knob, UserError, check

MOST = 100_000_000  # entries of a table, 0.8 GB
UNBOUNDED = 1e30  # from here on a bound is none
BINS = (10,)


class Cells:
    """A number in [0, count) for each observation of a space.

    Discrete: its distance from the lowest. MultiDiscrete: its entries are the digits of a number of mixed radix, the
    last one changing fastest. Box: every dimension is cut into `bins` equal parts between `low` and `high`, and the
    parts are the digits; what lies beyond a bound belongs to the outermost part.
    Shapes: (N, *S) -> (N,) int64.
    Raises: UserError for other spaces, missing bounds, or bounds for a space that has none.
    """

    def __init__(
        self,
        space: spaces.Space[Any],
        bins: tuple[int, ...] = BINS,
        low: tuple[float, ...] = (),
        high: tuple[float, ...] = (),
    ) -> None:
        """Work the digits out; `bins`, `low` and `high` hold one number for all dimensions, or one for each."""
        self.width: np.ndarray | None = None  # of the parts of a Box
        if isinstance(space, spaces.Box):
            length = math.prod(space.shape)
            sizes = list(_each("--bins", bins, length))
            self.low = _bound("--low", low, np.asarray(space.low, np.float64).ravel())
            top = _bound("--high", high, np.asarray(space.high, np.float64).ravel())
            if not (self.low < top).all():
                wrong = int(np.argmin(self.low < top))
                raise UserError(
                    f"--low {self.low[wrong]:g} must be less than --high {top[wrong]:g} (dimension {wrong})"
                )
            self.width = (top - self.low) / np.array(sizes)
        elif isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
            if (bins, low, high) != (BINS, (), ()):
                raise UserError(f"--bins, --low and --high cut a Box; the observation here is {space}")
            discrete = isinstance(space, spaces.Discrete)
            sizes = [int(n) for n in ([space.n] if discrete else space.nvec.ravel())]
            self.low = np.asarray(space.start, np.int64).ravel()
        else:
            raise UserError(f"a table needs Discrete, MultiDiscrete or Box observations, not {space}")
        self.count = math.prod(sizes)
        _refuse_large(self.count)
        self._sizes = np.array(sizes, np.int64)  # (D,)
        self._radix = np.append(np.cumprod(self._sizes[:0:-1])[::-1], 1).astype(np.int64)  # (D,)

    def __call__(self, obs: Any) -> np.ndarray:
        """The numbers of observations."""
        array = np.asarray(obs)
        if len(self._sizes) == 1 and self.width is None:
            return array.reshape(-1) - self.low[0] if self.low[0] else array.reshape(-1)
        digits = array.reshape(len(array), -1) - self.low  # (N, D)
        if self.width is not None:
            digits = np.floor(digits / self.width).clip(0, self._sizes - 1).astype(np.int64)
        return digits @ self._radix


class Table:
    """Q as an array with a row for each cell and a column for each action.

    Raises: UserError for a space that has no cells, or too many.
    """

    def __init__(
        self,
        observation: spaces.Space[Any],
        actions: int,
        lr: float,
        *,
        initial: Annotated[float, Knob("value of every action at first")] = 0.0,
        omega: Annotated[float, Knob("step lr / n^omega at the n-th update of a pair", low=0, high=1)] = 0.0,
        bins: Annotated[tuple[int, ...], Knob("parts of each dimension of a Box, or of all", low=1)] = BINS,
        low: Annotated[tuple[float, ...], Knob("lower bounds of a Box that has none", metavar="X")] = (),
        high: Annotated[tuple[float, ...], Knob("upper bounds of a Box that has none", metavar="X")] = (),
    ) -> None:
        """Reserve the table."""
        check(Table, dict(initial=initial, omega=omega, bins=bins, low=low, high=high))
        self.cells, self.lr, self.omega = Cells(observation, bins, low, high), lr, omega
        _refuse_large(self.cells.count * actions)
        self.q = np.full((self.cells.count, actions), initial)
        self.visits = np.zeros(self.q.shape if omega else (0, actions), np.int64)

    @property
    def parameters(self) -> int:
        """Entries."""
        return self.q.size

    @property
    def skipped_in_row(self) -> int:
        """None: rewards are finite, and so is every mean of them."""
        return 0

    def values(self, obs: Any) -> np.ndarray:
        """Q(s, .) (N, A) float64 of observations (N, *S)."""
        return self.q[self.cells(obs)]

    def learn(self, obs: Any, action: np.ndarray, target: np.ndarray) -> dict[str, Tensor]:
        """Move Q(s, a) towards targets (B,), all at once; the metrics of this update."""
        pair = self.cells(obs) * self.q.shape[1] + action  # (B,)
        q = self.q.reshape(-1)
        error = target - q[pair]
        seen, mean = means(pair, target, q.size)
        step: Any = self.lr
        if self.omega:
            visits = self.visits.reshape(-1)
            visits[seen] += 1
            step = self.lr / visits[seen] ** self.omega  # (P,)
        q[seen] += step * (mean - q[seen])
        return {"loss/td": torch.tensor(0.5 * float(error @ error) / len(error))}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The table, and how often each entry was updated."""
        return {"weights": {"q": torch.from_numpy(self.q)}, "visits": {"n": torch.from_numpy(self.visits)}}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take back the table. Raises: RuntimeError if it has another shape."""
        if weights["q"].shape != self.q.shape:
            raise RuntimeError(f"the table has shape {tuple(weights['q'].shape)}, not {self.q.shape}")
        self.q[...] = weights["q"].numpy()

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take back all that `state_dict` gave."""
        self.load_weights(state["weights"])
        self.visits[...] = state["visits"]["n"].numpy()


def means(pair: np.ndarray, target: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct entries of `pair` (B,) in [0, size), in order, and the mean target of each.

    Shapes: pair, target (B,) -> (P,), (P,).
    """
    if size <= 8 * len(pair):  # counting beats sorting; both add in the order of the batch
        count = np.bincount(pair, minlength=size)
        seen = np.flatnonzero(count)
        return seen, np.bincount(pair, target, size)[seen] / count[seen]
    seen, place, count = np.unique(pair, return_inverse=True, return_counts=True)
    return seen, np.bincount(place, target) / count


def optimal_q(table: Dynamics, gamma: float, tolerance: float = 1e-10, most: int = 1_000_000) -> np.ndarray:
    """Exact Q* (S, A) of known dynamics by value iteration, until no entry moves by more than `tolerance`.

        Q_{k+1}(s, a) = sum_j p_j (r_j + gamma (1 - terminated_j) max_a' Q_k(s'_j, a'))

    The error is at most gamma / (1 - gamma) times the last move; with gamma 1 the iteration ends where every best
    policy reaches an end from everywhere.
    Raises: ValueError if it has not ended after `most` sweeps.
    Source: Sutton and Barto 2018, section 4.4, eq. 4.10 for action values.
    """
    expected = (table.probability * table.reward).sum(2)  # (S, A)
    weight = gamma * table.probability * ~table.terminated  # (S, A, K)
    q = np.zeros_like(expected)
    for _ in range(most):
        after = expected + (weight * q.max(1)[table.next_state]).sum(2)
        if np.abs(after - q).max() <= tolerance:
            return after
        q = after
    raise ValueError(
        f"value iteration has not converged after {most:,} sweeps: with gamma {gamma:g} it may never"
    )


def _refuse_large(entries: int) -> None:
    if entries > MOST:
        raise UserError(
            f"the table would have 10^{math.log10(entries):.1f} entries, at most 10^{math.log10(MOST):g} are "
            "allowed: choose fewer --bins, or an agent on a network"
        )


def _each(flag: str, given: tuple[Any, ...], length: int) -> tuple[Any, ...]:
    """One number for each dimension, of one for all or one for each."""
    if len(given) not in (1, length):
        raise UserError(f"{flag} needs one number, or {length}: one for each dimension; got {len(given)}")
    return given * length if len(given) == 1 else given


def _bound(flag: str, given: tuple[float, ...], own: np.ndarray) -> np.ndarray:
    """The bounds (D,) that are given, or those of the space."""
    if given:
        return np.array(_each(flag, given, len(own)), np.float64)
    missing = np.flatnonzero(np.abs(own) >= UNBOUNDED)
    if len(missing):
        raise UserError(
            f"dimension {', '.join(map(str, missing))} of the observation has no bound: "
            f"a table needs {flag} with {len(own)} numbers"
        )
    return own
