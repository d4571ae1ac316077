"""Prioritised sampling: slots are drawn with probability p_i / sum p, p_i = (|error_i| + EPSILON)^alpha.

Source: Schaul et al. 2016, arXiv 1511.05952, section 3.3 (proportional variant) and eq. 2 (importance weights).
Deviations: (1) draws are independent instead of stratified, since a round of updates draws the samples of all its
batches at once and strata would sort them; (2) for the same reason priorities follow after the samples of a draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

WIDTH = 16  # children of a node: a wide tree is shallow, and numpy pays by the level
EPSILON = 1e-6  # no sample is lost for good


class SumTree:
    """Numbers >= 0 whose running sum can be searched, all operations on arrays of indices.

    Each level holds the sums of groups of `WIDTH` entries of the level below, computed anew from them: errors of
    rounding do not add up.
    """

    def __init__(self, size: int) -> None:
        """`size` zeros."""
        self._levels = [np.zeros(_padded(size))]
        while len(self._levels[-1]) > WIDTH:
            self._levels.append(np.zeros(_padded(len(self._levels[-1]) // WIDTH)))

    @property
    def leaves(self) -> np.ndarray:
        """The numbers, padded with zeros; to be changed by `set` and `refill` only."""
        return self._levels[0]

    @property
    def total(self) -> float:
        """The sum of all numbers."""
        return float(self._levels[-1].sum())

    @property
    def nbytes(self) -> int:
        """Bytes of all levels."""
        return sum(level.nbytes for level in self._levels)

    def set(self, index: np.ndarray, value: np.ndarray | float) -> None:
        """Replace the numbers at index (B,); of an index that occurs twice the last value stays."""
        self._levels[0][index] = value
        for below, level in pairwise(self._levels):
            index = index // WIDTH
            level[index] = below.reshape(-1, WIDTH)[index].sum(axis=1)

    def refill(self, leaves: np.ndarray) -> None:
        """Replace all numbers."""
        self._levels[0][...] = leaves
        for below, level in pairwise(self._levels):
            level[: len(below) // WIDTH] = below.reshape(-1, WIDTH).sum(axis=1)

    def find(self, mass: np.ndarray) -> np.ndarray:
        """The indices (B,) at which the running sum first exceeds mass (B,), each in [0, total)."""
        rows, node = np.arange(len(mass)), np.zeros(len(mass), np.int64)
        for level in reversed(self._levels):
            children = level.reshape(-1, WIDTH)[node]  # (B, WIDTH)
            ends = children.cumsum(axis=1)
            child = (ends <= mass[:, None]).sum(axis=1)
            over = child == WIDTH  # rounding: the sum above is a little more than the sum here
            if over.any():
                child[over] = WIDTH - 1 - (children[over, ::-1] > 0).argmax(axis=1)
            mass = mass - np.where(child > 0, ends[rows, child - 1], 0)
            node = node * WIDTH + child
        return node


@dataclass(frozen=True)
class Priority:
    """How samples are preferred, and how much of the bias is taken back: beta goes on a line, up or down."""

    alpha: float
    beta_start: float
    beta_end: float
    beta_steps: int  # agent steps from the first beta to the last

    def beta(self, step: int) -> float:
        """The exponent of the importance weights after so many steps."""
        part = min(step / self.beta_steps, 1.0)
        return self.beta_start + (self.beta_end - self.beta_start) * part

    def of(self, error: np.ndarray) -> np.ndarray:
        """Priorities (B,) of |errors| (B,)."""
        return (error.astype(np.float64) + EPSILON) ** self.alpha


class Preferred:
    """Entries that are drawn by priority: their tree, and how priorities follow errors."""

    def __init__(self, size: int, rule: Priority) -> None:
        """None of `size` entries can be drawn yet."""
        self.rule, self.tree = rule, SumTree(size)
        self.highest = np.ones(1)  # priority of what was never drawn: the highest so far

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Entries (B,). Raises: ValueError if none can be drawn."""
        total = self.tree.total
        if total == 0:
            raise ValueError("the replay has nothing to sample yet")
        return self.tree.find(rng.random(count) * total)

    def weights(self, index: np.ndarray, parts: int, step: int) -> np.ndarray:
        """Importance weights (B,) of entries drawn for `parts` batches, after so many steps."""
        drawn = self.tree.leaves[index].reshape(parts, -1)
        return weights(drawn, self.rule.beta(step)).ravel()

    def update(self, index: np.ndarray, error: np.ndarray) -> None:
        """Set the priorities of entries (B,) by the |errors| (B,) that were found there."""
        value = self.rule.of(error)
        finite = np.isfinite(value)
        if not finite.all():  # of an update that was skipped: these keep what they had
            value, index = value[finite], index[finite]
        self.highest[0] = max(self.highest[0], value.max(initial=0.0))
        self.tree.set(index, value)

    def state_dict(self) -> dict[str, np.ndarray]:
        """What is saved; the arrays themselves."""
        return {"priority": self.tree.leaves, "highest": self.highest}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state_dict` gave."""
        self.tree.refill(state["priority"])
        self.highest[...] = state["highest"]


def importance(preferred: Preferred | None, index: np.ndarray, parts: int, step: int) -> Tensor:
    """Importance weights (B,) of entries drawn for `parts` batches; 1 where none is preferred."""
    if preferred is None:
        return torch.ones(len(index))
    return torch.from_numpy(preferred.weights(index, parts, step))


def follow(preferred: Preferred | None, index: Tensor, error: Tensor | None) -> None:
    """Set priorities by the |errors| (B,) of samples since they were drawn; nothing where none is preferred."""
    if preferred is not None and error is not None:
        preferred.update(index.numpy(), error.cpu().numpy())


def weights(priority: np.ndarray, beta: float) -> np.ndarray:
    """w = (N P)^-beta / max w over each batch (..., B), where N and the sum in P cancel.

    Source: Schaul et al. 2016, algorithm 1, line 10.
    """
    return ((priority.min(-1, keepdims=True) / priority) ** beta).astype(np.float32)


def _padded(size: int) -> int:
    return -(-size // WIDTH) * WIDTH
