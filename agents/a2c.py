"""A2C: one gradient step on each short rollout of several environments.

    L = -mean A log pi(a|s) + value_weight mean (V(s) - R)^2 / 2 - entropy H(pi)
    A = GAE(gamma, lam),   R = A + V(s); with lam = 1 the n-step return of the rollout

Source: Mnih et al. 2016, arXiv 1602.01783, section 4 and algorithm S3, all environments in step instead of threads;
course notes 6.3.2 (actor-critic).

Deviations: (1) an episode that was truncated bootstraps from its true last state; (2) the loss is a mean over steps
where the paper sums, the critic's has the factor 1/2, and the gradient's norm is clipped; (3) advantages may be brought
to mean 0, spread 1 (`--normalize-advantage`), and Adam may take the place of the paper's RMSProp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from agents.actor import ActorConfig, Inputs, PolicyAgent, Samples
from agents.optimizers import OPTIMIZERS, Optimizer, learned
from agents.ppo import normalized, value_loss
from runs.config import Knob


@dataclass(frozen=True)
class Config(ActorConfig):
    """The knobs of A2C."""

    lr: Annotated[float, Knob("step size", above=0)] = 7e-4
    rollout: Annotated[int, Knob("steps of each environment between updates", low=1)] = 5
    lam: Annotated[float, Knob("of the advantages: 0 one step, 1 the whole rollout", low=0, high=1)] = 1.0
    entropy: Annotated[float, Knob("weight of the entropy bonus", low=0)] = 0.0
    value_weight: Annotated[float, Knob("weight of the critic's loss", low=0)] = 0.5
    normalize_advantage: Annotated[bool, Knob("to mean 0, spread 1 in each update")] = False
    optimizer: Annotated[str, Knob("of all weights", choices=tuple(OPTIMIZERS))] = "rmsprop"
    optimizer_eps: Annotated[float, Knob("epsilon of the optimiser", above=0)] = 1e-5

    def rounds(self, steps: int, num_envs: int) -> int:
        """Updates in so many steps over all environments."""
        return steps // (self.rollout * num_envs)


def actor_loss(logp: Tensor, advantage: Tensor) -> Tensor:
    """-mean A log pi(a|s), (); no gradient through A. Shapes: (B,)."""
    return -(advantage.detach() * logp).mean()


class A2C(PolicyAgent):
    """The agent; `build` gives it networks, then it can act and learn."""

    name = "a2c"
    Config = Config

    def prepare(self, say: Callable[[str], None]) -> dict[str, Optimizer]:
        """See `PolicyAgent.prepare`."""
        config = self.config
        how = dict(lr=config.lr, eps=config.optimizer_eps, max_norm=config.max_grad_norm)
        self.optimizer = OPTIMIZERS[config.optimizer](learned(self.model), **how)
        self._graph = self.compiled(self._step)
        return {"optimizer": self.optimizer}

    def learn(self, samples: Samples) -> dict[str, Tensor]:
        """One gradient step."""
        self.compute.learning()
        self.optimizer.begin(self._lr(self.steps))
        samples = samples.joined
        metrics = self._graph(samples.inputs, samples.action, samples.advantage, samples.return_)
        self.updates += 1
        return metrics

    def _step(self, inputs: Inputs, action: Tensor, advantage: Tensor, return_: Tensor) -> dict[str, Tensor]:
        config = self.config
        with self.compute.autocast():
            p, value = self.model(inputs)
        if config.normalize_advantage:
            advantage = normalized(advantage)
        of_policy = actor_loss(self.distribution.log_prob(p, action), advantage)
        of_value = value_loss(value, value, return_, None)
        entropy = self.distribution.entropy(p if config.entropy else p.detach()).mean()
        loss = of_policy + config.value_weight * of_value - config.entropy * entropy
        norm = self.optimizer.step(self.gradients(loss, self.optimizer), loss.detach())
        return {
            "loss/policy": of_policy.detach(),
            "loss/value": of_value.detach(),
            "policy/entropy": entropy.detach(),
            "train/grad_norm": norm,
        }
