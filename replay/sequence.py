"""Sequences for nets with memory: runs of consecutive slots of a ring, with what was remembered where they begin.

    lane       ... s5 s6 s7 F | s0 s1 s2 s3 ...      F: the last observation of an episode, where nothing is done
    sequence      [ burn-in | learned       | n ]    T = burn_in + length + n_step slots

A sequence begins at every `stride`-th slot of a lane, so that two in a row overlap by length - stride learned steps,
and what the agent remembered is kept at those slots only. Sequences run through the ends of episodes: the memory is
reset where `first` says so. As the last observation of an episode has a slot of its own, the successor of a step always
lies as many slots on as rewards were summed.

Source: Kapturowski et al. 2019, Recurrent Experience Replay in Distributed Reinforcement Learning (R2D2), section 3:
stored state, burn-in, overlap by half, priority by sequence.
Deviation: (1) R2D2's sequences end with their episode, these go on with the next one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from replay.priority import Preferred, Priority, follow, importance
from replay.ring import BLOCK, Ring
from replay.tree import mapped
from replay.types import Sequences, Transition

OWN = ("first", "state.", "priority", "highest")  # how names in a `state_dict` begin that are not the ring's


class SequenceRing:
    """A replay of sequences, drawn uniformly or by priority; see `Ring` for what it stores of each step.

    Raises: ValueError for a capacity that cannot hold one sequence of each environment at all times.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        state: tuple[Tensor, ...],
        length: int,
        burn_in: int = 0,
        stack: int = 1,
        n_step: int = 1,
        priority: Priority | None = None,
        **ring: Any,
    ) -> None:
        """Reserve memory for whole strides of slots; `state` (1, ...) is what one environment remembers."""
        self.length, self.burn_in, self.stride = length, burn_in, self.apart(length)
        self.span = burn_in + length + n_step  # T
        self._starts = capacity // num_envs // self.stride  # K, slots of one lane where a sequence may begin
        least = -(-(self.span + stack + self.stride - 1) // self.stride)
        if self._starts < least:
            raise ValueError(
                f"--capacity must be at least {num_envs * least * self.stride} for {num_envs} environments and "
                f"sequences of {self.span} steps, got {capacity}"
            )
        slots = num_envs * self._starts * self.stride
        how: Any = dict(stack=stack, n_step=n_step, **ring)
        self.ring = Ring(slots, num_envs, observation_space, action_space, **how)
        self._first = np.zeros(slots, bool)
        starts = num_envs * self._starts
        self._state = [np.zeros((starts, *leaf.shape[1:]), _array(leaf).dtype) for leaf in state]
        self._lane = np.arange(num_envs)
        self.preferred = Preferred(starts, priority) if priority else None

    @staticmethod
    def apart(length: int) -> int:
        """The stride: how far apart sequences begin of which `length` steps are learned."""
        return max(length // 2, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept."""
        tree = self.preferred.tree.nbytes if self.preferred else 0
        arrays = [self._first, self._lane, *self._state]
        return self.ring.nbytes + tree + sum(array.nbytes for array in arrays)

    @property
    def sample_nbytes(self) -> int:
        """Bytes of one sequence's observations."""
        return self.span * self.ring.sample_nbytes // 2

    @property
    def added(self) -> int:
        """Steps ever added, over all environments."""
        return self.ring.added

    def __len__(self) -> int:
        """Sequences that can be drawn."""
        low, high = self._window(self.ring.written)
        return int((high - low).sum())

    def add(self, step: Transition, state: tuple[Any, ...]) -> None:
        """Append one step of every environment; `state` (N, ...) is what the agent remembered before it."""
        before = self.ring.written
        self.ring.add(step)
        now = self.ring.written
        final = self._lane[now - before == 2]  # where the episode before got its last slot, too
        lane = np.concatenate([final, self._lane])
        position = np.concatenate([now[final] - 2, now - 1])
        self._first[lane * self.ring.slots + position % self.ring.slots] = np.concatenate(
            [np.zeros(len(final), bool), step.first]
        )
        due = position % self.stride == 0
        if due.any():
            place = self._place(lane[due], position[due] // self.stride)
            for kept, leaf in zip(self._state, state, strict=True):
                kept[place] = _array(leaf)[lane[due]]
        if self.preferred is not None:
            self._prefer(self.preferred, before, now)

    def sample(self, batch: int, parts: int = 1) -> Sequences:
        """Draw `parts` batches in one, each of `batch` sequences with replacement.

        Raises: ValueError if nothing can be sampled yet.
        """
        lane, number = self._draw(batch * parts)  # (B,)
        index = self._place(lane, number)
        position = number * self.stride + np.arange(self.span)[:, None]  # (T, B)
        lanes = np.broadcast_to(lane, position.shape)
        learned = slice(self.burn_in, self.burn_in + self.length)
        shape = (self.length, len(lane))
        outcomes = self.ring.outcomes(lanes[learned].ravel(), position[learned].ravel())
        action, reward, discount, taken, acted = (torch.from_numpy(x).unflatten(0, shape) for x in outcomes)
        obs = self.ring.observations(lanes.ravel(), position.ravel())
        first = self._first[lanes * self.ring.slots + position % self.ring.slots]
        return Sequences(
            obs=mapped(lambda leaf: leaf.unflatten(0, position.shape), obs),
            first=torch.from_numpy(first),
            state=tuple(torch.from_numpy(kept[index]) for kept in self._state),
            action=action,
            reward=reward,
            successor=torch.arange(self.length)[:, None] + (self.burn_in + taken),
            discount=discount,
            acted=acted,
            weight=importance(self.preferred, index, parts, self.added),
            index=torch.from_numpy(index),
        )

    def update_priority(self, index: Tensor, error: Tensor | None) -> None:
        """Set the priorities of sequences by their errors (B,) since they were drawn; nothing in a uniform replay."""
        follow(self.preferred, index, error)

    def state_dict(self) -> dict[str, np.ndarray]:
        """See `Ring.state_dict`; what was remembered comes in blocks, too."""
        blocks = {name: array for block in self.ring.used() for name, array in self._block(block).items()}
        return self.ring.state_dict() | self._small() | blocks

    def unchanged(self) -> set[str]:
        """See `Ring.unchanged`."""
        return self.ring.unchanged() | {name for block in self.ring.still() for name in self._block(block)}

    def saved(self) -> None:
        """See `Ring.saved`."""
        self.ring.saved()

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """See `Ring.load_state_dict`."""
        found = {name: array for name, array in state.items() if name.startswith(OWN)}
        blocks = range(-(-len(self._first) // BLOCK))
        own = {name: array for block in blocks for name, array in self._block(block).items() if name in found}
        own |= self._small()
        if own.keys() != found.keys() or any(own[name].shape != found[name].shape for name in own):
            raise ValueError(
                "this replay was saved with sequences of another length, or of another net's memory"
            )
        self.ring.load_state_dict({name: array for name, array in state.items() if name not in own})
        for name in own:
            own[name][...] = found[name]
        if self.preferred is not None:
            self.preferred.load_state_dict(found)

    def _small(self) -> dict[str, np.ndarray]:
        """What is saved whole, beside the ring."""
        return {"first": self._first, **(self.preferred.state_dict() if self.preferred else {})}

    def _block(self, block: int) -> dict[str, np.ndarray]:
        """What was remembered at the slots of a block of the ring."""
        rows = slice(-(-block * BLOCK // self.stride), -(-(block + 1) * BLOCK // self.stride))
        return {f"state.{k}.{block}": kept[rows] for k, kept in enumerate(self._state)}

    def _place(self, lane: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Where the `number`-th start of a lane lies among all starts in the ring."""
        return lane * self._starts + number % self._starts

    def _window(self, written: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By lane, the numbers [low, high) of the starts whose whole sequence is in the ring, its stacks too."""
        oldest = np.maximum(written - self.ring.slots, 0)
        low = np.where(oldest > 0, oldest + self.ring.stack - 1, 0)
        return -(-low // self.stride), np.maximum(written - self.span, -1) // self.stride + 1

    def _draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Lanes and numbers of starts (B,)."""
        if self.preferred is not None:
            place = self.preferred.draw(self.ring.rng, count)
            return place // self._starts, place % self._starts  # of the first round: the slots are the same
        low, high = self._window(self.ring.written)
        ends = np.cumsum(high - low)
        if ends[-1] == 0:
            raise ValueError("the replay has nothing to sample yet")
        chosen = self.ring.rng.integers(ends[-1], size=count)
        lane = np.searchsorted(ends, chosen, side="right")
        return lane, chosen - (ends - high)[lane]

    def _prefer(self, preferred: Preferred, before: np.ndarray, now: np.ndarray) -> None:
        """Sequences that leave the window lose their priority; those that enter it get the highest."""
        windows = zip(self._window(before), self._window(now), (0.0, preferred.highest[0]), strict=True)
        for old, new, value in windows:
            steps = new - old  # (N,)
            if steps.any():
                lane = np.repeat(self._lane, steps)
                within = np.arange(len(lane)) - np.repeat(np.cumsum(steps) - steps, steps)
                preferred.tree.set(self._place(lane, old[lane] + within), value)


def _array(leaf: Any) -> np.ndarray:
    """An array of what a net or a checkpoint gave."""
    return torch.as_tensor(leaf).detach().cpu().numpy()
