"""What agents have in common that act by action values, whatever holds them: a table or a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from gymnasium import spaces
from torch import Tensor

from agents.base import State, epsilon_greedy, numbered
from backbones.base import Backbone
from backbones.compute import Compute
from envs.mask import MASK, is_masked
from replay import Decision
from runs.config import configured


class Holder(Protocol):
    """What holds Q. N observations, A actions, B samples."""

    @property
    def parameters(self) -> int:
        """Numbers that are learned."""
        ...

    @property
    def skipped_in_row(self) -> int:
        """The most steps ever skipped in a row, because something was not finite."""
        ...

    def values(self, obs: Any) -> np.ndarray:
        """Q(s, .) (N, A) of observations (N, *S)."""
        ...

    def learn(self, obs: Any, action: np.ndarray, target: np.ndarray) -> dict[str, Tensor]:
        """Move Q(s, a) of obs (B, *S), action (B,) in [0, A) towards target (B,); metrics, `loss/td` among them."""
        ...

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Groups of tensors, `weights` among them."""
        ...

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take only what acting needs."""
        ...

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take back what `state_dict` gave."""
        ...


class EpsilonGreedy(ABC):
    """An agent whose policy is the action of highest value, or with probability epsilon any action.

    Ties go to the action of the lowest number. A subclass has `name`, `Config`, `loop`, `backbones` and `update`.
    """

    name: str
    Config: type[Any]

    def __init__(
        self,
        config: Any = None,
        *,
        backbone: str | Backbone = "",
        net: dict[str, Any] | None = None,
        **knobs: Any,
    ) -> None:
        """With `config`, or the default changed by `knobs`, on a table or backbone and the knobs `net` of that.

        Raises: UserError for an unknown knob or a value out of range.
        """
        self.config = configured(self.Config, config, knobs)
        self.backbone, self.net = backbone, net or {}
        self.updates = 0

    @abstractmethod
    def hold(
        self,
        observation_space: spaces.Space[Any],
        compute: Compute,
        seed: np.random.SeedSequence,
        say: Callable[[str], None],
    ) -> Holder:
        """Make what holds Q."""

    @abstractmethod
    def exploration(self, step: int) -> float:
        """Epsilon at a step."""

    def build(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        compute: Compute,
        seed: np.random.SeedSequence,
        say: Callable[[str], None] = print,
    ) -> None:
        """See `Agent.build`."""
        actions = numbered(self.name, action_space)
        self.actions, self._start = int(actions.n), int(actions.start)
        self._masked = is_masked(observation_space)
        weights, exploration = seed.spawn(2)
        self._rng = np.random.default_rng(exploration)
        self.q = self.hold(observation_space, compute, weights, say)

    @property
    def parameters(self) -> int:
        """Numbers that are learned."""
        return self.q.parameters

    @property
    def skipped_in_row(self) -> int:
        """See `Agent.skipped_in_row`."""
        return self.q.skipped_in_row

    def schedule(self, step: int) -> dict[str, float]:
        """See `Agent.schedule`."""
        return {"train/epsilon": self.exploration(step)}

    def initial(self, n: int) -> State:
        """No memory."""
        return ()

    def recall(self, obs: Any, first: np.ndarray | None, state: State) -> tuple[np.ndarray, State]:
        """Q(s, .) (N, A) of observations (N, *S) after what is remembered; and what is remembered then."""
        return self.q.values(obs), state

    def act(self, obs: Any, first: np.ndarray, state: State, step: int) -> Decision:
        """Epsilon-greedy."""
        self._at, q = step, None
        if state:  # memory takes in everything, also what is acted on at random
            q, state = self.recall(obs, first, state)

        def values() -> np.ndarray:
            return self.values(obs) if q is None else self._allowed(q, obs)

        mask = obs[MASK] if self._masked else None
        action = epsilon_greedy(self._rng, self.exploration(step), len(first), self.actions, values, mask)
        return Decision(action + self._start, state)

    def greedy(self, obs: Any, first: np.ndarray, state: State) -> Decision:
        """The actions of highest value."""
        values, state = self.recall(obs, first, state)
        return Decision(self._allowed(values, obs).argmax(axis=1) + self._start, state)

    def values(self, obs: Any, first: np.ndarray | None = None, state: State = ()) -> np.ndarray:
        """Q(s, .) (N, A) of numpy observations (N, *S)."""
        return self._allowed(self.recall(obs, first, state)[0], obs)

    def _allowed(self, values: np.ndarray, obs: Any) -> np.ndarray:
        return np.where(obs[MASK], values, -np.inf) if self._masked else values

    def probabilities(self, obs: Any, first: np.ndarray | None = None, state: State = ()) -> np.ndarray:
        """See `Agent.probabilities`: 1 for the greedy action."""
        return np.eye(self.actions, dtype=np.float32)[self.values(obs, first, state).argmax(axis=1)]

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """See `Agent.state_dict`."""
        counters = {"updates": self.updates, "exploration": self._rng.bit_generator.state}
        return {**self.q.state_dict(), "counters": counters}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """See `Agent.load_weights`."""
        self.q.load_weights(weights)

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """See `Agent.load_state_dict`."""
        self.q.load_state_dict(state)
        self.updates = state["counters"]["updates"]
        self._rng.bit_generator.state = state["counters"]["exploration"]
