"""Small environments whose right answer is known: each one isolates one thing that a learner can get wrong.

Source: probe environments, Andy Jones 2021, "Debugging RL, without the agonizing pain".
"""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from replay.tree import leaves, mapped
from runs.streams import pack, unpack

Step = tuple[Any, float, bool, bool, dict[str, Any]]
PROBES = ("constant", "predict", "delay", "action", "match")
ENDS = ("termination", "truncation")


def _box(low: float, high: float, *shape: int) -> Box:
    return Box(low, high, shape, np.float32)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


class Probe(gymnasium.Env):
    """The five probes, each failing if one part is broken.

    constant: one action, obs 0, reward 1, one step: value 1 (loss, optimiser).
    predict:  obs -1 or 1 is the reward: value equals obs (backpropagation through the network).
    delay:    obs 0, then 1; reward 1 at the end: values gamma, 1 (discounting).
    action:   reward 1 for action 1, -1 for action 0 (advantages, policy).
    match:    obs -1 or 1; reward 1 if the action has its sign, else -1 (policy and value together).
    """

    def __init__(self, kind: str = "constant") -> None:
        """Choose one of `PROBES`."""
        self.kind = _one_of("kind", kind, PROBES)
        self.observation_space = _box(-1, 1, 1)
        self.action_space = Discrete(2 if kind in ("action", "match") else 1)
        self._sign, self._time = 0.0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Draw the sign where there is one."""
        super().reset(seed=seed)
        random = self.kind in ("predict", "match")
        self._sign, self._time = (float(self.np_random.choice([-1.0, 1.0])) if random else 0.0), 0
        return np.array([self._sign], np.float32), {}

    def step(self, action: Any) -> Step:
        """Reward according to `kind`; all but `delay` last one step."""
        self._time += 1
        if self.kind == "delay":
            over = self._time == 2
            return np.array([1.0], np.float32), float(over), over, False, {}
        choice = 1.0 if action == 1 else -1.0
        rewards = {"constant": 1.0, "predict": self._sign, "action": choice, "match": choice * self._sign}
        return np.array([self._sign], np.float32), rewards[self.kind], True, False, {}


def count_obs(tag: np.ndarray, episode: np.ndarray, step: np.ndarray, image: bool) -> np.ndarray:
    """What `Counting` shows: (tag, episode, step), as numbers or as the newest frames of a stack of four.

    Shapes: tag, episode, step (N,) -> (N, 3) float32, or (N, 4, 8, 8) uint8 with zeros before the start.
    A frame is 1 + step mod 255, but for its top row, 1 + episode mod 255, and its bottom row, the tag.
    """
    if not image:
        return np.stack([tag, episode, step], axis=1).astype(np.float32)  # (N, 3)
    age = np.arange(3, -1, -1)
    times = step[:, None] - age  # (N, 4), oldest first
    frames = np.empty((len(step), 4, 8, 8), np.uint8)
    frames[:] = (1 + times % 255)[:, :, None, None]
    frames[:, :, 0] = (1 + episode % 255)[:, None, None]
    frames[:, :, -1] = tag[:, None, None]
    frames[times < 0] = 0
    return frames


def _count_space(image: bool) -> Box:
    return Box(0, 255, (4, 8, 8), np.uint8) if image else _box(0, 1e6, 3)


class CountingVector(VectorEnv):
    """N counters: obs tells the env's tag, its episode and its step, so that any stored pair can be checked.

    A pair from two episodes, or from two envs, gives itself away. Episode k of an env lasts
    `length + (tag + k) % spread` steps, so that envs end at different times. The reward is the step reached.
    """

    def __init__(
        self, num_envs: int = 1, length: int = 5, spread: int = 3, end: str = ENDS[0], image: bool = False
    ) -> None:
        """Choose the lengths, how episodes end, and whether obs are images."""
        if length < 1 or spread < 1:
            raise ValueError(f"length and spread must be 1 or more, got {length} and {spread}")
        self.num_envs, self.length, self.spread = num_envs, length, spread
        self.end, self.image = _one_of("end", end, ENDS), image
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space, self.single_action_space = _count_space(image), Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._tag = np.ones(num_envs, np.int64)
        self._episode, self._step = np.zeros(num_envs, np.int64), np.zeros(num_envs, np.int64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Begin episode 0 in every env; a seed gives new tags."""
        super().reset(seed=seed)
        self._tag = self.np_random.permutation(255)[np.arange(self.num_envs) % 255] + 1
        self._episode, self._step = np.zeros(self.num_envs, np.int64), np.zeros(self.num_envs, np.int64)
        return self._obs(), {}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Count on; what ended begins its next episode at once."""
        self._step = self._step + 1
        ended = self._step >= self.length + (self._tag + self._episode) % self.spread
        obs, reward, info = self._obs(), self._step.astype(np.float64), {}
        if ended.any():
            info = {"final_obs": obs, "_final_obs": ended}
            self._episode, self._step = self._episode + ended, np.where(ended, 0, self._step)
            obs = self._obs()
        never = np.zeros(self.num_envs, bool)
        terminated, truncated = (ended, never) if self.end == "termination" else (never, ended)
        return obs, reward, terminated, truncated, info

    def _obs(self) -> np.ndarray:
        return count_obs(self._tag, self._episode, self._step, self.image)


class Counting(gymnasium.Env):
    """One counter, see `CountingVector`; without a seed a reset begins the next episode."""

    def __init__(self, length: int = 5, spread: int = 3, end: str = ENDS[0], image: bool = False) -> None:
        """Choose the lengths, how episodes end, and whether obs are images."""
        self.length, self.spread, self.end, self.image = length, spread, _one_of("end", end, ENDS), image
        self.observation_space, self.action_space = _count_space(image), Discrete(2)
        self._tag, self._episode, self._step = 0, -1, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Begin the next episode; with a seed, episode 0 under a new tag."""
        super().reset(seed=seed)
        if seed is not None or self._tag == 0:
            self._tag, self._episode = int(self.np_random.integers(1, 256)), -1
        self._episode, self._step = self._episode + 1, 0
        return self._obs(), {}

    def step(self, action: Any) -> Step:
        """Count on."""
        self._step += 1
        over = self._step >= self.length + (self._tag + self._episode) % self.spread
        terminated = over and self.end == "termination"
        return self._obs(), float(self._step), terminated, over and not terminated, {}

    def _obs(self) -> np.ndarray:
        tag, episode, step = np.array([[self._tag], [self._episode], [self._step]])
        return count_obs(tag, episode, step, self.image)[0]


class Clock(gymnasium.Env):
    """Reward 1 at every step for `length` steps; obs is the share of time gone, or 0 if `blind`.

    Ended by truncation, every state is worth 1 / (1 - gamma); by termination, the sum over the steps left.
    """

    def __init__(self, length: int = 10, end: str = "truncation", blind: bool = False) -> None:
        """Choose the length, how episodes end, and whether the time is hidden."""
        self.length, self.end, self.blind, self._time = length, _one_of("end", end, ENDS), blind, 0
        self.observation_space, self.action_space = _box(0, 1, 1), Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Start at time 0."""
        super().reset(seed=seed)
        self._time = 0
        return self._obs(), {}

    def step(self, action: Any) -> Step:
        """Let time pass."""
        self._time += 1
        over = self._time >= self.length
        return self._obs(), 1.0, over and self.end == "termination", over and self.end == "truncation", {}

    def _obs(self) -> np.ndarray:
        return np.array([0.0 if self.blind else self._time / self.length], np.float32)


ANSWERS: dict[str, spaces.Space[Any]] = {
    "Discrete": Discrete(4),
    "Box": _box(-1, 1, 2),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3, 4]),
    "MultiBinary": spaces.MultiBinary(3),
    "Dict": spaces.Dict(move=Discrete(3), push=_box(-1, 1, 1)),
    "Tuple": spaces.Tuple(
        (Discrete(2), spaces.Dict(bits=spaces.MultiBinary(2), digits=spaces.MultiDiscrete([3, 2])))
    ),
}


class Identity(gymnasium.Env):
    """Say what you see, for ten steps: an action is shown, whole numbers as one of n.

    The reward is the share of it that is right, or minus the mean squared distance where it is a Box; the mean over
    the parts of a Dict or Tuple.
    """

    def __init__(self, kind: str = "Discrete") -> None:
        """Choose the space of the action, one of `ANSWERS`."""
        answers = ANSWERS[_one_of("kind", kind, tuple(ANSWERS))]
        # one to draw from beside the one that others sample
        self.action_space, self._drawn = copy.deepcopy(answers), copy.deepcopy(answers)
        self.observation_space = _box(-1, 1, spaces.flatdim(self.action_space))
        self._shown, self._time = self._drawn.sample(), 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Show something."""
        super().reset(seed=seed)
        if seed is not None:
            self._drawn.seed(int(self.np_random.integers(2**31)))
        self._time = 0
        return self._show(), {}

    def step(self, action: Any) -> Step:
        """Reward the answer, show something else."""
        self._time += 1
        scores = [score for _, score in leaves(mapped(_score, self._shown, action))]
        return self._show(), float(np.mean(scores)), self._time >= 10, False, {}

    def _show(self) -> np.ndarray:
        self._shown = self._drawn.sample()
        return np.asarray(spaces.flatten(self._drawn, self._shown), np.float32)


def _score(shown: Any, answer: Any) -> float:
    if np.asarray(shown).dtype.kind == "f":
        return -float(np.mean((np.asarray(answer, np.float64) - shown) ** 2))
    return float(np.mean(answer == shown))


class DelayedChain(gymnasium.Env):
    """`length` states in a row: action 1 goes on, 0 back to the start; reward 1 only beyond the last one."""

    def __init__(self, length: int = 6, max_steps: int = 60) -> None:
        """Choose the number of states and after how many steps the episode is truncated."""
        self.length, self.max_steps, self._state, self._time = length, max_steps, 0, 0
        self.observation_space, self.action_space = _box(0, 1, length), Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Start at the first state."""
        super().reset(seed=seed)
        self._state, self._time = 0, 0
        return self._obs(), {}

    def step(self, action: Any) -> Step:
        """Move."""
        self._time += 1
        over = bool(action == 1) and self._state == self.length - 1
        self._state = min(self._state + 1, self.length - 1) if action == 1 else 0
        return self._obs(), float(over), over, not over and self._time >= self.max_steps, {}

    def _obs(self) -> np.ndarray:
        return np.eye(self.length, dtype=np.float32)[self._state]


def memory_obs(cue: np.ndarray, time: int, k: int) -> np.ndarray:
    """What `Memory` shows at a step.

    Shapes: cue (N,) -> (N, 3) float32: cue 0, cue 1, question.
    """
    obs = np.zeros((len(cue), 3), np.float32)
    if time == 0:
        obs[np.arange(len(cue)), cue] = 1
    obs[:, 2] = time == k
    return obs


def _at_least_one(k: int) -> int:
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    return k


class Memory(gymnasium.Env):
    """Act on the observation seen k steps ago: a cue at step 0, k - 1 blanks, a question at step k.

    Reward 1 for the cue's action at step k, which ends the episode, else -1; 0 before, whatever is done. The last k + 1
    observations tell the answer; the last k are the same for both cues, so that with them the best mean return is 0.

    One cue, asked once: with a new one at each step it would be the k bits held at once that fail, not the delay.
    Shapes: obs (3,), see `memory_obs`.
    """

    def __init__(self, k: int = 5) -> None:
        """Choose the steps between cue and question."""
        self.k, self._cue, self._time = _at_least_one(k), np.zeros(1, np.int64), 0
        self.observation_space, self.action_space = _box(0, 1, 3), Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Show the cue."""
        super().reset(seed=seed)
        self._cue, self._time = self.np_random.integers(2, size=1), 0
        return self._obs(), {}

    def step(self, action: Any) -> Step:
        """Wait, or answer the question."""
        over = self._time == self.k
        reward = (1.0 if action == self._cue[0] else -1.0) if over else 0.0
        self._time += 1
        return self._obs(), reward, over, False, {}

    def _obs(self) -> np.ndarray:
        return memory_obs(self._cue, self._time, self.k)[0]


class MemoryVector(VectorEnv):
    """N copies of `Memory`, all at the same step of their episodes."""

    def __init__(self, num_envs: int = 1, k: int = 5) -> None:
        """Choose the steps between cue and question."""
        self.num_envs, self.k = num_envs, _at_least_one(k)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space, self.single_action_space = _box(0, 1, 3), Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._cue, self._time = np.zeros(num_envs, np.int64), 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Show a cue in every copy."""
        super().reset(seed=seed)
        return self._begin(), {}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Wait, or answer the question; the next cue is shown at once."""
        over, info = self._time == self.k, {}
        reward = np.where(actions == self._cue, 1.0, -1.0) if over else np.zeros(self.num_envs)
        self._time += 1
        obs, ended = memory_obs(self._cue, self._time, self.k), np.full(self.num_envs, over)
        if over:
            info = {"final_obs": obs, "_final_obs": ended}
            obs = self._begin()
        return obs, reward, ended, np.zeros(self.num_envs, bool), info

    def get_state(self) -> dict[str, np.ndarray]:
        """See `envs.journal.Stateful`."""
        return {"cue": self._cue, "time": np.array(self._time), "rng": pack(self.np_random)}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """See `envs.journal.Stateful`."""
        self._cue, self._time = np.array(state["cue"]), int(state["time"])
        unpack(self.np_random, state["rng"])

    def _begin(self) -> np.ndarray:
        self._cue, self._time = self.np_random.integers(2, size=self.num_envs), 0
        return memory_obs(self._cue, self._time, self.k)


ENVS: dict[str, tuple[type[gymnasium.Env], dict[str, Any]]] = {
    **{f"Probe{kind.title()}": (Probe, {"kind": kind}) for kind in PROBES},
    "Counting": (Counting, {}),
    "CountingTruncated": (Counting, {"end": "truncation"}),
    "CountingImage": (Counting, {"image": True}),
    "CountingImageTruncated": (Counting, {"image": True, "end": "truncation"}),
    "EndlessReward": (Clock, {"blind": True}),
    "Truncation": (Clock, {"end": "truncation"}),
    "Termination": (Clock, {"end": "termination"}),
    "Identity": (Identity, {}),
    **{f"Identity{kind}": (Identity, {"kind": kind}) for kind in ANSWERS if kind != "Discrete"},
    "DelayedChain": (DelayedChain, {}),
    "Memory": (Memory, {}),
    **{f"Memory{k}": (Memory, {"k": k}) for k in (1, 8, 32)},
}
VECTORS: dict[type[gymnasium.Env], str] = {Counting: "CountingVector", Memory: "MemoryVector"}


def register() -> None:
    """Register every diagnostic environment as `chordate/<Name>-v0`; calling it again changes nothing."""
    for name, (kind, keywords) in ENVS.items():
        env_id = f"chordate/{name}-v0"
        if env_id not in gymnasium.registry:
            vector = f"envs.diagnostic:{VECTORS[kind]}" if kind in VECTORS else None
            entry_point = f"envs.diagnostic:{kind.__name__}"
            gymnasium.register(env_id, entry_point, vector_entry_point=vector, kwargs=keywords)
