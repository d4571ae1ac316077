"""A replay ring that stores every frame once, sampled uniformly or by priority.

Each environment owns a lane of slots. A slot holds the newest frame of one observation, the action taken there, its
reward and two flags; stacks of frames, successors and n-step returns are rebuilt when a batch is drawn:

    lane   ... s5 s6 s7 F | s0 s1 s2 ...        F: the last frame of an episode; it is a successor, never a start
    obs(s1) = [0, 0, s0, s1]                    frames from before the reset are zero, as the environment shows them

The successor of s_t lies k slots on, where k <= n is the number of rewards that n-step learning really sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from replay.priority import Preferred, Priority, follow, importance
from replay.types import Batch, Transition
from runs.streams import pack, unpack

TERMINATED, TRUNCATED, FINAL = 1, 2, 4  # bits of a slot's flag
BLOCK = 2_048  # slots whose frames are saved together


class Outcomes(NamedTuple):
    """What was done at B positions, and what came of it."""

    action: np.ndarray  # (B, *A)
    reward: np.ndarray  # (B,) n-step sum
    discount: np.ndarray  # (B,)
    taken: np.ndarray  # (B,) k, the steps really summed; the successor lies so many slots on
    acted: np.ndarray  # (B,) bool, False where nothing was done: at the last observation of an episode


class Ring:
    """A ring over `capacity` slots for `num_envs` interleaved environments.

    Shapes: with `stack` > 1 the first axis of an observation is the stack, oldest frame first, and only the newest
        frame is stored. Dict observations are stored leaf by leaf (without stacks).
    Raises: ValueError for a capacity that cannot hold one n-step sample of each environment.
    Source: n-step returns, Sutton and Barto 2018, eq. 7.1, with the discount of the steps really summed.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        stack: int = 1,
        n_step: int = 1,
        gamma: float = 0.99,
        clip_reward: bool = False,
        priority: Priority | None = None,
        rng: np.random.Generator,
    ) -> None:
        """Reserve memory; pages are taken from the system only as the ring fills."""
        self.slots = capacity // num_envs  # L, slots of one lane
        if self.slots < stack + n_step + 1:
            raise ValueError(
                f"--capacity must be at least {num_envs * (stack + n_step + 1)} for {num_envs} environments, "
                f"got {capacity}"
            )
        self.num_envs, self.stack, self.n_step, self.gamma, self.rng = num_envs, stack, n_step, gamma, rng
        self.clip_reward = clip_reward
        total = num_envs * self.slots
        if stack > 1 and isinstance(observation_space, spaces.Dict):
            raise ValueError("the replay stacks plain observations, not Dict ones")
        leaves = (
            observation_space.spaces
            if isinstance(observation_space, spaces.Dict)
            else {"": observation_space}
        )
        self._frames = {name: _storage(total, space, 1 if stack > 1 else 0) for name, space in leaves.items()}
        self._action = _storage(total, action_space, 0)
        self._reward = np.zeros(total, np.float32)
        self._flag = np.zeros(total, np.uint8)
        self._age = np.zeros(total, np.uint8)  # earlier frames of the same episode, at most `stack`
        self._count = np.zeros(num_envs, np.int64)  # slots ever written, by lane
        self._last = {name: np.zeros_like(frames[:num_envs]) for name, frames in self._frames.items()}
        self._lane = np.arange(num_envs)
        self.preferred = Preferred(total, priority) if priority else None
        self._steps = np.zeros(1, np.int64)  # ever added, over all environments
        self._saved: np.ndarray | None = None  # (N,) slots ever written at the last save

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept, the borders included."""
        arrays = [
            *self._frames.values(),
            *self._last.values(),
            self._action,
            self._reward,
            self._flag,
            self._age,
        ]
        tree = self.preferred.tree.nbytes if self.preferred else 0
        return tree + sum(array.nbytes for array in [*arrays, self._count, self._lane, self._steps])

    @property
    def sample_nbytes(self) -> int:
        """Bytes of one sample's two observations."""
        return 2 * self.stack * sum(frames[0].nbytes for frames in self._frames.values())

    @property
    def added(self) -> int:
        """Steps ever added, over all environments."""
        return int(self._steps[0])

    def __len__(self) -> int:
        """Slots that are searched for samples, FINAL ones among them; 0 if there are no others."""
        low, high = self._window()
        size = int((high - low).sum())
        if size > 64:  # so many breaks in a row end a run
            return size
        slots = [
            lane * self.slots + np.arange(a, b) % self.slots
            for lane, (a, b) in enumerate(zip(low, high, strict=True))
        ]
        return size if (self._flag[np.concatenate(slots)] != FINAL).any() else 0

    def add(self, step: Transition, state: tuple[Any, ...] = ()) -> None:
        """Append one step of every environment; what an agent remembered before it is not kept here."""
        self._steps += self.num_envs
        obs, next_obs = self._newest(step.obs), self._newest(step.next_obs)
        fresh = step.first & (self._count > 0)
        if fresh.any():
            fresh = self._seal(fresh)
        if fresh.any():  # the episode before ended for good: its last frame gets a slot of its own
            lane = self._lane[fresh]
            slot = self._advance(lane, grown=True)
            for name, frames in self._frames.items():
                frames[slot] = self._last[name][lane]
            self._flag[slot] = FINAL
        slot = self._advance(self._lane, grown=~step.first if self.stack > 1 else True)
        for name, frames in self._frames.items():
            frames[slot] = obs[name]
        self._action[slot] = step.action
        self._reward[slot] = step.reward
        self._flag[slot] = step.terminated * TERMINATED + step.truncated * TRUNCATED
        ended = step.terminated | step.truncated
        if ended.any():
            for name, last in self._last.items():
                last[ended] = next_obs[name][ended]

    def sample(self, batch: int, parts: int = 1) -> Batch:
        """Draw `parts` batches in one, each of `batch` transitions with replacement, uniformly or by priority.

        Raises: ValueError if nothing can be sampled yet.
        """
        count = batch * parts
        lane, position = self._draw(count)
        base = lane * self.slots
        reward, discount, taken = self._returns(base, position)
        index = base + position % self.slots
        obs, next_obs = self._observations(base, position, taken)
        return Batch(
            obs=obs,
            action=torch.from_numpy(self._action[index]),
            reward=torch.from_numpy(reward),
            next_obs=next_obs,
            discount=torch.from_numpy(discount),
            weight=importance(self.preferred, index, parts, self.added),
            index=torch.from_numpy(index),
        )

    def update_priority(self, index: Tensor, error: Tensor | None) -> None:
        """Set the priorities of samples by their |errors| (B,) since they were drawn; nothing in a uniform replay."""
        follow(self.preferred, index, error)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Every array that decides what will be sampled, the generator too; views, frames in blocks.

        Blocks that nothing was ever written to are left out.
        """
        arrays = self._small()
        return arrays | {name: array for block in self.used() for name, array in self._block(block).items()}

    def unchanged(self) -> set[str]:
        """The names in `state_dict` whose arrays are as they were at the last `saved` or `load_state_dict`."""
        return {name for block in self.still() for name in self._block(block)}

    def used(self) -> list[int]:
        """The blocks of `BLOCK` slots that anything was ever written to."""
        return np.flatnonzero(self._touched(np.zeros_like(self._count))).tolist()

    def still(self) -> list[int]:
        """The blocks that nothing was written to since the last `saved` or `load_state_dict`."""
        return [] if self._saved is None else np.flatnonzero(~self._touched(self._saved)).tolist()

    def saved(self) -> None:
        """What `state_dict` gave has been stored."""
        self._saved = self._count.copy()

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Copy a `state_dict` back in place; raises ValueError where names or shapes differ."""
        small = self._small()
        known = small.keys() | {n for block in range(self._blocks) for n in self._block(block)}
        own = small | {
            n: a for block in range(self._blocks) for n, a in self._block(block).items() if n in state
        }
        wrong = state.keys() - known or small.keys() - state.keys()
        if wrong or any(own[n].shape != a.shape or own[n].dtype != a.dtype for n, a in state.items()):
            raise ValueError("this replay was saved with other spaces, capacity or number of environments")
        for name, array in state.items():
            own[name][...] = array
        unpack(self.rng, state["rng"])
        if self.preferred is not None:
            self.preferred.load_state_dict(state)
        self.saved()

    def _small(self) -> dict[str, np.ndarray]:
        """All that is saved whole."""
        arrays = {"action": self._action, "reward": self._reward, "flag": self._flag, "age": self._age}
        arrays |= {"count": self._count, "steps": self._steps, "rng": pack(self.rng)}
        if self.preferred is not None:
            arrays |= self.preferred.state_dict()
        return arrays | {f"last.{k}": last for k, last in enumerate(self._last.values())}

    @property
    def _blocks(self) -> int:
        return -(-len(self._flag) // BLOCK)

    def _block(self, block: int) -> dict[str, np.ndarray]:
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        return {f"frames.{k}.{block}": frames[rows] for k, frames in enumerate(self._frames.values())}

    def _touched(self, since: np.ndarray) -> np.ndarray:
        """Which blocks were written to since the lanes held `since` (N,) slots: (blocks,) bool."""
        touched = np.zeros(self._blocks, bool)
        for lane, (before, now) in enumerate(zip(since, self._count, strict=True)):
            slots = np.arange(max(before, now - self.slots), now) % self.slots + lane * self.slots
            touched[np.unique(slots // BLOCK)] = True
        return touched

    # -- writing -------------------------------------------------------------------------------------------------

    def _newest(self, obs: Any) -> dict[str, np.ndarray]:
        leaves = obs if isinstance(obs, dict) else {"": obs}
        return {name: leaf[:, -1] for name, leaf in leaves.items()} if self.stack > 1 else leaves

    def _seal(self, fresh: np.ndarray) -> np.ndarray:
        """Close episodes whose end was never seen (an environment broke); returns where (N,) it was.

        What the last action led to is unknown: its observation only serves as the last one of a truncated episode.
        """
        last = self._lane * self.slots + (self._count - 1) % self.slots
        broken = fresh & (self._flag[last] == 0)
        self._flag[last[broken]] = FINAL
        before = self._lane * self.slots + (self._count - 2) % self.slots
        open_ = before[broken & (self._count > 1)]
        self._flag[open_[self._flag[open_] == 0]] = TRUNCATED
        return fresh & ~broken

    def _advance(self, lane: np.ndarray, grown: np.ndarray | bool) -> np.ndarray:
        """Open the next slot of each lane; where `grown`, it continues the episode of the slot before."""
        base, count = lane * self.slots, self._count[lane]
        slot = base + count % self.slots
        if self.stack > 1:
            before = self._age[base + (count - 1) % self.slots]
            self._age[slot] = np.where(grown, np.minimum(before + 1, self.stack), 0)
        self._count[lane] += 1
        if self.preferred is not None:
            self._prefer(self.preferred, base, count + 1)
        return slot

    def _prefer(self, preferred: Preferred, base: np.ndarray, count: np.ndarray) -> None:
        """Slots that leave the window of starts lose their priority; those that enter it get the highest."""
        leaving, entering = count - self.slots + self.stack - 2, count - self.n_step - 1
        tree = preferred.tree
        turned = base[count == self.slots + 1]  # until its first turn a lane begins at its first slot
        tree.set((turned[:, None] + np.arange(self.stack)).ravel(), 0.0)
        tree.set((base + leaving % self.slots)[count > self.slots], 0.0)
        slot = (base + entering % self.slots)[entering >= 0]
        tree.set(slot, np.where(self._flag[slot] == FINAL, 0.0, preferred.highest[0]))

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def written(self) -> np.ndarray:
        """Slots ever written, by lane (N,); the p-th of them, from 0 on, is at position p, in slot p modulo L."""
        return self._count.copy()

    def observations(self, lane: np.ndarray, position: np.ndarray) -> Any:
        """What was seen at positions (B,) of lanes (B,): (B, *S)."""
        base = lane * self.slots
        if self.stack > 1:
            return torch.from_numpy(self._stacks(base, position))
        slot = base + position % self.slots
        found = {name: torch.from_numpy(frames[slot]) for name, frames in self._frames.items()}
        return found[""] if "" in found else found

    def outcomes(self, lane: np.ndarray, position: np.ndarray) -> Outcomes:
        """What was done at positions (B,) of lanes (B,), and what came of it."""
        base = lane * self.slots
        slot = base + position % self.slots
        returned = self._returns(base, position)
        return Outcomes(self._action[slot], *returned, self._flag[slot] != FINAL)

    def _window(self) -> tuple[np.ndarray, np.ndarray]:
        """By lane, the positions [low, high) whose stack and n-step successor are all in the ring."""
        oldest = np.maximum(self._count - self.slots, 0)
        low = np.where(oldest > 0, oldest + self.stack - 1, 0)
        return low, np.maximum(self._count - self.n_step, low)

    def _draw(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Lanes and positions (B,)."""
        if self.preferred is None:
            return self._draw_any(batch)
        slot = self.preferred.draw(self.rng, batch)
        lane, offset = slot // self.slots, slot % self.slots
        count = self._count[lane]
        return lane, count - 1 - (count - 1 - offset) % self.slots  # the newest position in this slot

    def _draw_any(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Uniform over all starts; a FINAL slot is drawn again."""
        low, high = self._window()
        width = high - low
        ends = np.cumsum(width)
        if ends[-1] <= 64 and len(self) == 0:
            raise ValueError("the replay has nothing to sample yet")
        even = (width == width[0]).all()  # as in a full ring: a division finds the lane, else a search
        chosen = self.rng.integers(ends[-1], size=batch)
        while True:
            lane = chosen // width[0] if even else np.searchsorted(ends, chosen, side="right")
            position = chosen - (ends - high)[lane]  # ends - high = (starts before this lane) - low
            final = self._flag[lane * self.slots + position % self.slots] == FINAL
            if not final.any():
                return lane, position
            chosen[final] = self.rng.integers(ends[-1], size=int(final.sum()))

    def _returns(self, base: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """R = sum_{i<k} gamma^i r_i,  discount = gamma^k (1 - terminated),  and k, all (B,)."""
        n, gamma = self.n_step, self.gamma
        if n == 1:
            slot = base + position % self.slots
            alive = (self._flag[slot] & TERMINATED) == 0
            return self._rewards(slot), alive * np.float32(gamma), np.ones_like(position)
        slot = base[:, None] + (position[:, None] + np.arange(n)) % self.slots  # (B, n)
        flag = self._flag[slot]
        alive = np.ones(slot.shape, bool)  # (B, n) no episode end before this step
        alive[:, 1:] = np.cumsum(flag[:, :-1] != 0, axis=1) == 0
        taken = alive.sum(axis=1)  # k (B,)
        reward = (self._rewards(slot) * alive) @ (gamma ** np.arange(n, dtype=np.float32))
        terminated = flag[np.arange(len(taken)), taken - 1] & TERMINATED
        discount = gamma ** np.arange(n + 1, dtype=np.float32)
        return reward.astype(np.float32), np.where(terminated, np.float32(0), discount[taken]), taken

    def _rewards(self, slot: np.ndarray) -> np.ndarray:
        return np.sign(self._reward[slot]) if self.clip_reward else self._reward[slot]

    def _observations(self, base: np.ndarray, position: np.ndarray, taken: np.ndarray) -> tuple[Any, Any]:
        """Observations at `position` and `taken` steps later."""
        if self.stack == 1:
            now, later = base + position % self.slots, base + (position + taken) % self.slots
            pairs = {name: (f[now], f[later]) for name, f in self._frames.items()}
        elif (
            self.n_step == 1
        ):  # the two stacks share all frames but one: read stack + 1 frames, return two views
            window = self._frames[""][self._stack_index(base, position + 1, self.stack + 1)]
            self._blank(window, base, position + 1)
            pairs = {"": (window[:, :-1], window[:, 1:])}
        else:
            pairs = {"": (self._stacks(base, position), self._stacks(base, position + taken))}
        tensors = {name: (torch.from_numpy(a), torch.from_numpy(b)) for name, (a, b) in pairs.items()}
        if "" in tensors:
            return tensors[""]
        return {name: pair[0] for name, pair in tensors.items()}, {
            name: pair[1] for name, pair in tensors.items()
        }

    def _stacks(self, base: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Stacks (B, stack, *frame) that end at the positions `last`."""
        stacks = self._frames[""][self._stack_index(base, last, self.stack)]
        self._blank(stacks, base, last)
        return stacks

    def _stack_index(self, base: np.ndarray, last: np.ndarray, depth: int) -> np.ndarray:
        return base[:, None] + (last[:, None] + np.arange(1 - depth, 1)) % self.slots  # (B, depth)

    def _blank(self, stacks: np.ndarray, base: np.ndarray, last: np.ndarray) -> None:
        """Zero the frames (B, depth, *frame) that lie before the episode of the newest one began."""
        depth = stacks.shape[1]
        age = self._age[base + last % self.slots]  # of the newest frame
        young = np.flatnonzero(age < depth - 1)
        for row in young:
            stacks[row, : depth - 1 - age[row]] = 0


def _storage(total: int, space: spaces.Space[Any], skip: int) -> np.ndarray:
    if space.shape is None or space.dtype is None:
        raise ValueError(
            f"the replay stores Box, Discrete, MultiDiscrete and MultiBinary leaves, got {space}"
        )
    return np.zeros((total, *space.shape[skip:]), space.dtype)
