"""Environments whose dynamics are a table, thousands of copies stepped at once by looking it up.

    s', r, terminated ~ P(. | s, a)        truncated = age >= limit        s_0 ~ initial

Gymnasium's toy-text environments publish that table; one step of N copies is then a handful of array operations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from runs.streams import pack, unpack

_TOY = "gymnasium.envs.toy_text"
# the entry points whose `P` is all there is to their dynamics
TABLED = (f"{_TOY}.frozen_lake:FrozenLakeEnv", f"{_TOY}.cliffwalking:CliffWalkingEnv", f"{_TOY}.taxi:TaxiEnv")
# gymnasium registers its lakes slippery only: name -> map, limit as there
LAKES = {"FrozenLakeDeterministic": ("4x4", 100), "FrozenLake8x8Deterministic": ("8x8", 200)}


class Dynamics(NamedTuple):
    """What an environment does, as arrays. S states, A actions, K outcomes at most; missing ones have probability 0."""

    probability: np.ndarray  # (S, A, K) float64
    next_state: np.ndarray  # (S, A, K) int64
    reward: np.ndarray  # (S, A, K) float64
    terminated: np.ndarray  # (S, A, K) bool
    initial: np.ndarray  # (S,) float64, probability of each first state


def register() -> None:
    """Register the lakes without slipping as `chordate/<Name>-v0`; calling it again changes nothing."""
    for name, (size, limit) in LAKES.items():
        env_id = f"chordate/{name}-v0"
        if env_id not in gymnasium.registry:
            keywords = {"map_name": size, "is_slippery": False}
            gymnasium.register(env_id, TABLED[0], max_episode_steps=limit, kwargs=keywords)


def tabled(spec: EnvSpec) -> bool:
    """Whether a table says all about this environment."""
    # a fickle passenger changes his mind outside of the table
    return (
        spec.entry_point in TABLED
        and not spec.additional_wrappers
        and not spec.kwargs.get("fickle_passenger")
    )


def dynamics(spec: EnvSpec) -> Dynamics:
    """Read the table of an environment.

    Raises: ValueError if it is not `tabled`.
    """
    if not tabled(spec):
        raise ValueError(f"{spec.id} has no transition table that is all of its dynamics")
    env: Any = gymnasium.make(spec.id, disable_env_checker=True).unwrapped
    states, actions = int(env.observation_space.n), int(env.action_space.n)
    most = max(len(outcomes) for row in env.P.values() for outcomes in row.values())
    shape = (states, actions, most)
    found = Dynamics(
        np.zeros(shape),
        np.zeros(shape, np.int64),
        np.zeros(shape),
        np.zeros(shape, bool),
        np.array(env.initial_state_distrib, np.float64),
    )
    for state, row in env.P.items():
        for action, outcomes in row.items():
            for k, outcome in enumerate(outcomes):  # (probability, next state, reward, terminated)
                for array, value in zip(found[:4], outcome, strict=True):
                    array[state, action, k] = value
    env.close()
    return found


class TableEnv(VectorEnv):
    """N copies of a tabled environment; an episode that ended starts anew within the step.

    As in gymnasium, an episode that reaches its limit is truncated, also if it terminates in that step.
    """

    def __init__(self, spec: EnvSpec, num_envs: int) -> None:
        """Look the table up. Raises: ValueError if there is none."""
        table = dynamics(spec)
        self.num_envs, self.limit = num_envs, spec.max_episode_steps
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = gymnasium.spaces.Discrete(table.probability.shape[0])
        self.single_action_space = gymnasium.spaces.Discrete(table.probability.shape[1])
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        states, self._actions, self._outcomes = table.probability.shape
        # the borders between outcomes: the k-th one is drawn where k borders are <= u
        borders = np.cumsum(table.probability, axis=2)[:, :, :-1]
        self._borders = borders.reshape(states * self._actions, self._outcomes - 1).T.copy()  # (K - 1, S * A)
        self._next, self._reward, self._end = (array.ravel() for array in table[1:4])
        self._starts = np.flatnonzero(table.initial)
        self._start_borders = np.cumsum(table.initial[self._starts])[:-1]
        self._state, self._age = np.zeros(num_envs, np.int64), np.zeros(num_envs, np.int64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Begin an episode in every copy."""
        super().reset(seed=seed)
        self._state, self._age = self._drawn_starts(self.num_envs), np.zeros(self.num_envs, np.int64)
        return self._state, {}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Look up what happens to each copy; info["final_obs"] holds where ended episodes ended."""
        outcome = self._drawn_outcomes(self._state * self._actions + actions)  # (N,)
        state, terminated = self._next[outcome], self._end[outcome]
        self._age = self._age + 1
        truncated = self._age >= (self.limit or np.inf)
        info: dict[str, Any] = {}
        ended = terminated | truncated
        rows = np.flatnonzero(ended)
        if len(rows):
            info = {"final_obs": state.copy(), "_final_obs": ended}
            state[rows] = self._drawn_starts(len(rows))
            self._age[rows] = 0
        self._state = state
        return state, self._reward[outcome], terminated, truncated, info

    def get_state(self) -> dict[str, np.ndarray]:
        """See `envs.journal.Stateful`."""
        return {"state": self._state, "age": self._age, "rng": pack(self.np_random)}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """See `envs.journal.Stateful`."""
        self._state, self._age = np.array(state["state"]), np.array(state["age"])
        unpack(self.np_random, state["rng"])

    def _drawn_outcomes(self, pair: np.ndarray) -> np.ndarray:
        """An outcome for each pair (N,) of state and action, by its place in the flat table."""
        if self._outcomes == 1:
            return pair
        uniform = self.np_random.random(len(pair))
        place = pair * self._outcomes
        for border in self._borders:
            place = place + (border[pair] <= uniform)
        return place

    def _drawn_starts(self, count: int) -> np.ndarray:
        """First states (count,)."""
        if len(self._starts) == 1:
            return np.repeat(self._starts, count)
        return self._starts[np.searchsorted(self._start_borders, self.np_random.random(count), side="right")]
