"""Q-learning in a table, from a replay buffer.

    y = r + discount * max_a' Q(s', a')        discount = gamma (1 - terminated)
    Q(s, a) <- Q(s, a) + lr / n(s, a)^omega * (y - Q(s, a))

The replay holds the last `capacity` steps, and every update draws `batch` of them. Without reuse, as in the textbook's
online algorithm: `--num-envs 1 --capacity 3 --batch 1 --train-every 1 --learning-starts 1`, the smallest replay, from
which one of the two newest steps is drawn at each step.

Source: Watkins and Dayan 1992, Machine Learning 8; course notes 6.1.1.

Deviations: (1) the samples of a batch are learned at once, and where a pair (s, a) occurs in it several times, from the
mean of their targets (agents/tables.py); (2) thousands of environments may act with the same table, and `train_every`
and `updates` count agent steps over all of them; (3) a truncated episode bootstraps from its last state; (4) epsilon
falls on a line over agent steps, not at each episode; (5) the step under way enters the replay one step later, as the
loop has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from gymnasium import spaces

from agents.base import falling_epsilon
from agents.tables import Table
from agents.values import EpsilonGreedy
from backbones.compute import Compute
from replay import Batch, Update
from runs.config import Knob, UserError, check


@dataclass(frozen=True)
class Config:
    """The knobs of Q-learning; steps are agent decisions over all environments. Those of the table are its own."""

    lr: Annotated[float, Knob("part of the way to the target", above=0, high=1)] = 0.1
    gamma: Annotated[float, Knob("discount of one step", low=0, high=1)] = 0.99
    batch: Annotated[int, Knob("samples of one update", low=1)] = 32
    train_every: Annotated[int, Knob("steps between rounds of updates", low=1)] = 1
    updates: Annotated[int, Knob("updates of one round", low=1)] = 1
    learning_starts: Annotated[int, Knob("random steps before the first update", low=1)] = 1_000
    capacity: Annotated[int, Knob("steps the replay holds", low=1)] = 100_000
    epsilon_start: Annotated[float, Knob("share of random actions at first", low=0, high=1)] = 1.0
    epsilon_end: Annotated[float, Knob("share of random actions in the end", low=0, high=1)] = 0.05
    epsilon_steps: Annotated[int, Knob("steps from the first to the last epsilon", low=1)] = 50_000

    def __post_init__(self) -> None:
        """Raises: UserError for a value out of range."""
        check(Config, vars(self))

    @property
    def replay(self) -> dict[str, Any]:
        """What the replay is asked for, besides its capacity."""
        return {"gamma": self.gamma}

    def rounds(self, steps: int, num_envs: int) -> int:
        """Updates that a compiler could speed up: none."""
        return 0


def q_target(reward: np.ndarray, discount: np.ndarray, next_q: np.ndarray) -> np.ndarray:
    """y = r + discount * max_a' Q(s', a').

    Shapes: reward, discount (B,); next_q (B, A) -> (B,).
    Source: course notes 6.1.1, step 4a.
    """
    return reward + discount * next_q.max(axis=1)


class QTable(EpsilonGreedy):
    """The agent; `build` gives it a table, then it can act and learn."""

    name = "qtable"
    Config = Config
    loop = "off_policy"
    backbones = ("table",)

    def hold(
        self,
        observation_space: spaces.Space[Any],
        compute: Compute,
        seed: np.random.SeedSequence,
        say: Callable[[str], None],
    ) -> Table:
        """A table, and nothing else."""
        if self.backbone not in ("", *self.backbones):
            name = self.backbone if isinstance(self.backbone, str) else type(self.backbone).__name__
            raise UserError(f"qtable runs on a table; on {name} Q-learning is called dqn")
        return Table(observation_space, self.actions, self.config.lr, **self.net)

    def exploration(self, step: int) -> float:
        """See `falling_epsilon`."""
        return falling_epsilon(self.config, step)

    def update(self, batch: Batch, steps: int = 1) -> Update:
        """Learn from each of `steps` equal parts of the batch in turn."""
        obs, next_obs = np.asarray(batch.obs), np.asarray(batch.next_obs)
        action = np.asarray(batch.action) - self._start
        reward, discount = np.asarray(batch.reward, np.float64), np.asarray(batch.discount, np.float64)
        size, metrics = len(reward) // steps, {}
        for start in range(0, size * steps, size):
            part = slice(start, start + size)
            target = q_target(reward[part], discount[part], self.q.values(next_obs[part]))
            metrics = self.q.learn(obs[part], action[part], target)
            metrics |= {"q/target": torch.tensor(target.mean())}
        self.updates += steps
        return Update(metrics, None)
