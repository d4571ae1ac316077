"""REINFORCE: the gradient of the return itself, from whole episodes.

    L = -sum_t (G_t - b) log pi(a_t|s_t) / steps - entropy H(pi)
    G_t = sum_{k >= t} gamma^(k-t) r_k      return to go, or (`--credit whole`) G_0 for every step of the episode
    b   = 0                                 `--baseline none`
        = a moving average of G             `--baseline average`
        = V(s_t), learned: mean (V - G)^2 / 2   `--baseline learned`

Source: Williams 1992, eq. 11; Sutton and Barto 2018, sections 13.3 and 13.4; course notes 6.3.2.

Deviations: (1) steps are not weighted with gamma^t, as everywhere in practice; (2) a truncated episode bootstraps from
V of its true last state where V is learned (with `--credit whole` from a V that has learned G_0, too), and counts as it
stands where it is not; (3) with several environments an update may come in the middle of an episode, whose first steps
then come from the policy before; (4) G_t - b is brought to mean 0, spread 1 in each update, which is a baseline of its
own, the mean, even with `--baseline none`: `--no-normalize-advantage` is the textbook's; (5) an entropy bonus; (6) Adam
instead of plain ascent, and the gradient's norm is clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from agents import returns
from agents.a2c import actor_loss
from agents.actor import ActorConfig, PolicyAgent, Samples
from agents.optimizers import Adam, Optimizer, learned
from agents.ppo import normalized, value_loss
from replay import Episodes, Rollout, Rollouts
from replay.tree import rows
from runs.config import Knob, UserError, needed

BASELINES = ("none", "average", "learned")


@dataclass(frozen=True)
class Config(ActorConfig):
    """The knobs of REINFORCE."""

    lr: Annotated[float, Knob("step size", above=0)] = 1e-3
    episodes: Annotated[int, Knob("finished episodes between updates", low=1)] = 8
    credit: Annotated[str, Knob("of a step: what follows it, or all", choices=("to_go", "whole"))] = "to_go"
    baseline: Annotated[str, Knob("taken off the return", choices=BASELINES)] = "learned"
    baseline_rate: Annotated[float, Knob("of the moving average", above=0, high=1)] = 0.05
    value_epochs: Annotated[int, Knob("critic's steps on each update's episodes", low=1)] = 10
    value_lr: Annotated[float, Knob("critic's step size", above=0)] = 1e-3
    normalize_advantage: Annotated[bool, Knob("to mean 0, spread 1 in each update")] = True
    entropy: Annotated[float, Knob("weight of the entropy bonus", low=0)] = 0.0

    def __post_init__(self) -> None:
        """Raises: UserError for a value out of range, or a knob whose part is off."""
        super().__post_init__()
        if not self.separate:
            raise UserError("--no-separate is not for reinforce: policy and critic take steps of their own")
        parts = {
            "--baseline average": (self.baseline == "average", ("baseline_rate",)),
            "--baseline learned": (self.baseline == "learned", ("value_epochs", "value_lr")),
        }
        needed(self, parts)

    def rounds(self, steps: int, num_envs: int) -> int:
        """Updates are few and of changing size: not worth compiling."""
        return 0


def whole_return(
    reward: np.ndarray, next_value: np.ndarray, terminated: np.ndarray, ended: np.ndarray, gamma: float
) -> np.ndarray:
    """The return of the episode from its start, at each of its steps; (T, 1), whole episodes one after the other."""
    to_go = returns.discounted(reward, next_value, terminated, ended, gamma)[:, 0]
    start = np.concatenate([[True], ended[:-1, 0]])
    return to_go[start][np.cumsum(start) - 1][:, None]


class REINFORCE(PolicyAgent):
    """The agent; `build` gives it networks, then it can act and learn."""

    name = "reinforce"
    Config = Config

    def prepare(self, say: Callable[[str], None]) -> dict[str, Optimizer]:
        """See `PolicyAgent.prepare`."""
        config, model = self.config, self.model
        how: Any = dict(eps=1e-8, max_norm=config.max_grad_norm)
        self.optimizer = Adam(learned(model.backbone, model.policy), lr=config.lr, **how)
        self._critic = Adam(learned(model.evaluates, model.value), lr=config.value_lr, **how)
        self._average = 0.0  # of returns
        self._seen = False  # whether there was one
        return {"optimizer": self.optimizer, "critic": self._critic}

    def memory(self, like: Any) -> Rollouts:
        """See `PolicyAgent.memory`."""
        num_envs = rows(like)
        return Episodes(self.config.episodes, like, self.initial(num_envs))

    @property
    def sequence(self) -> int:
        """All episodes, one after the other."""
        return 0

    def estimate(self, rollout: Rollout, reward: np.ndarray, next_value: np.ndarray) -> tuple[Any, Any]:
        """G - b, and G."""
        config = self.config
        ended = rollout.terminated | rollout.truncated
        follows = next_value if config.baseline == "learned" else np.zeros_like(next_value)
        credit = whole_return if config.credit == "whole" else returns.discounted
        return_ = credit(reward, follows, rollout.terminated, ended, config.gamma)
        if config.baseline == "learned":
            return return_ - rollout.value, return_
        if config.baseline == "none":
            return return_.copy(), return_
        part = config.baseline_rate if self._seen else 1.0
        advantage = return_ - (self._average if self._seen else float(return_.mean()))
        self._average += part * (float(return_.mean()) - self._average)
        self._seen = True
        return advantage.astype(np.float32), return_

    def learn(self, samples: Samples) -> dict[str, Tensor]:
        """One step of the policy, several of the critic."""
        config, model, samples = self.config, self.model, samples.joined
        self.compute.learning()
        advantage = normalized(samples.advantage) if config.normalize_advantage else samples.advantage
        with self.compute.autocast():
            p = model.parameters_of(samples.inputs)
        entropy = self.distribution.entropy(p if config.entropy else p.detach()).mean()
        of_policy = actor_loss(self.distribution.log_prob(p, samples.action), advantage)
        loss = of_policy - config.entropy * entropy
        self.optimizer.begin(self._lr(self.steps))
        norm = self.optimizer.step(self.gradients(loss, self.optimizer), loss.detach())
        self.updates += 1
        metrics = {
            "loss/policy": of_policy.detach(),
            "policy/entropy": entropy.detach(),
            "train/grad_norm": norm,
            "train/return": samples.return_.mean(),
        }
        if config.baseline == "learned":
            metrics["loss/value"] = self._fit(samples)
        return metrics

    def _fit(self, samples: Samples) -> Tensor:
        """Move the critic towards the returns; its loss () before the last step."""
        loss = torch.zeros(())
        for _ in range(self.config.value_epochs):
            with self.compute.autocast():
                value = self.model.values_of(samples.inputs)
            loss = value_loss(value, value, samples.return_, None)
            self._critic.begin()
            self._critic.step(self.gradients(loss, self._critic), loss.detach())
        return loss.detach()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """See `Agent.state_dict`."""
        state = super().state_dict()
        state["counters"] |= {"average": self._average, "seen": self._seen}
        return state

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """See `Agent.load_state_dict`."""
        super().load_state_dict(state)
        self._average, self._seen = state["counters"]["average"], state["counters"]["seen"]
