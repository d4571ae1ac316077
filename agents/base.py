"""What every agent offers, and the schedules they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from gymnasium import spaces
from torch import Tensor

import backbones
from agents.distributions import of_space
from backbones.base import Backbone
from backbones.compute import Compute
from replay import Decision, Update
from runs.config import UserError

State = tuple[Any, ...]


class Agent(Protocol):
    """A learner that acts. N environments, B samples; observations are numpy arrays, batches are tensors."""

    name: str
    loop: str  # the function of agents/loop.py that drives it
    backbones: tuple[str, ...]  # what it runs on, by name
    config: Any
    backbone: Any
    net: dict[str, Any]
    updates: int  # gradient steps so far

    @property
    def parameters(self) -> int:
        """Numbers that are learned."""
        ...

    @property
    def skipped_in_row(self) -> int:
        """The most updates ever skipped in a row, because loss or gradient was not finite."""
        ...

    def build(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        compute: Compute,
        seed: np.random.SeedSequence,
        say: Callable[[str], None],
    ) -> None:
        """Make the networks for these spaces; raises UserError if the agent cannot drive them."""
        ...

    def initial(self, n: int) -> State:
        """The memory of `n` environments before their first observation; () without memory."""
        ...

    def act(self, obs: Any, first: np.ndarray, state: State, step: int) -> Decision:
        """Explore: obs (N, *S), first (N,) -> actions (N, *A)."""
        ...

    def greedy(self, obs: Any, first: np.ndarray, state: State) -> Decision:
        """Do not explore."""
        ...

    def values(self, obs: Any, first: np.ndarray | None = None, state: State = ()) -> np.ndarray:
        """What the agent expects: action values (N, A) or state values (N, 1), of obs (N, *S).

        `state` is what it remembers from before, () nothing; where `first` (N,) is true an episode begins.
        """
        ...

    def probabilities(self, obs: Any, first: np.ndarray | None = None, state: State = ()) -> np.ndarray:
        """The probability of each action (N, A) when it does not explore."""
        ...

    def schedule(self, step: int) -> dict[str, float]:
        """What changes with the step (epsilon, step size, ...), by its name in the logs."""
        ...

    def update(self, batch: Any, steps: int = 1) -> Update:
        """Learn from each of `steps` equal parts of what its loop gives (off_policy: a Batch), in order."""
        ...

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Groups of tensors (`weights`, `optimizer`, ...) and of plain numbers (`counters`), ready to be saved."""
        ...

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take only the weights that acting needs."""
        ...

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Take back what `state_dict` gave."""
        ...


def numbered(agent: str, space: spaces.Space[Any]) -> spaces.Discrete:
    """The action space, if its actions are numbered. Raises: UserError that names the agents which can drive it."""
    if isinstance(space, spaces.Discrete):
        return space
    try:
        of_space(space)
        others = "reinforce, a2c, trpo and ppo do drive that"
    except UserError as error:
        others = str(error)
    raise UserError(f"{agent} drives Discrete actions, this environment has {space}; {others}")


def default_backbone(allowed: tuple[str, ...], space: spaces.Space[Any]) -> str:
    """What of `allowed` suits observations of a space: a table for whole numbers, else a network, if both will do."""
    whole = isinstance(space, (spaces.Discrete, spaces.MultiDiscrete))
    if "table" in allowed and (whole or len(allowed) == 1):
        return "table"
    return backbones.default(space)


def fits(backbone: Backbone, steps: int) -> None:
    """Raises: UserError if the backbone looks at fewer steps than `--sequence`."""
    if backbone.reach is not None and backbone.reach < steps:
        raise UserError(f"--context {backbone.reach} must be at least --sequence {steps}")


def linear(start: float, end: float, steps: int, step: int) -> float:
    """A straight line from `start` at step 0 to `end` at `steps`, constant after."""
    return end if step >= steps else start + (end - start) * step / steps


def falling_epsilon(config: Any, step: int) -> float:
    """1 before learning starts, then the line from epsilon_start to epsilon_end."""
    if step < config.learning_starts:
        return 1.0
    return linear(config.epsilon_start, config.epsilon_end, config.epsilon_steps, step)


def epsilon_greedy(
    rng: np.random.Generator,
    epsilon: float,
    count: int,
    actions: int,
    values: Callable[[], np.ndarray],
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """`count` actions in [0, actions): the best by `values` (count, A), or with probability epsilon any.

    Every environment draws for itself; where all of them explore the values are not asked for. Ties go to the action of
    the lowest number. `mask` (count, A): which may be drawn.
    """
    explore = rng.random(count) < epsilon
    if mask is None:
        random = rng.integers(actions, size=count)
    else:
        random = (rng.random((count, actions)) * mask).argmax(axis=1)
    return random if explore.all() else np.where(explore, random, values().argmax(axis=1))


def due(every: int, before: int, now: int) -> int:
    """How many multiples of `every` lie in (before, now]; the same in total for any number of environments."""
    return now // every - before // every
