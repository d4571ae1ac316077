"""PPO: several epochs of minibatches on each rollout, with a limit on how far the policy may move.

    r(theta) = pi(a|s) / pi_old(a|s)
    L_policy = -mean min(r A, clip(r, 1 - c, 1 + c) A)
    L_value  = mean (V(s) - R)^2 / 2              or the larger of it and that of V clipped around V_old
    L        = L_policy + value_weight L_value - entropy H(pi)
    A        = GAE(gamma, lam),   R = A + V_old

Source: Schulman et al. 2017, arXiv 1707.06347, eq. 7 and 9, algorithm 1; course notes 6.3.2 (the clipped objective).

Deviations: (1) advantages are brought to mean 0, spread 1 in each minibatch, or each rollout; (2) an episode that was
truncated bootstraps from its true last state; (3) L_value has the factor 1/2, so value_weight is twice the paper's c_1;
(4) V may be clipped (`--clip-value`), as OpenAI Baselines does; (5) an update may end early, with the step of the
first minibatch on which the policy had moved by more than 1.5 `--target-kl` (Spinning Up ends before that step);
(6) the gradient's norm is clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from agents.actor import ActorConfig, PolicyAgent, Samples, minibatches, rounds, samples_of, sequence
from agents.base import linear
from agents.optimizers import Adam, Optimizer, learned
from runs.config import Knob, needed


@dataclass(frozen=True)
class Config(ActorConfig):
    """The knobs of PPO."""

    rollout: Annotated[int, Knob("steps of each environment between updates", low=1)] = 2_048
    epochs: Annotated[int, Knob("passes over each rollout", low=1)] = 10
    batch: Annotated[int, Knob("samples of a minibatch", low=2)] = 64
    sequence: Annotated[int | None, Knob("steps that memory learns through; none: fits both", low=1)] = None
    lam: Annotated[float, Knob("of the advantages: 0 one step, 1 the whole return", low=0, high=1)] = 0.95
    clip: Annotated[float, Knob("how far the ratio may go from 1", above=0)] = 0.2
    clip_end: Annotated[float | None, Knob("clip in the end; by itself clip", above=0)] = None
    clip_steps: Annotated[int, Knob("steps from clip to clip_end", low=1)] = 1_000_000
    clip_value: Annotated[float | None, Knob("how far V may move in an update; none: any", above=0)] = None
    target_kl: Annotated[float | None, Knob("an update ends when KL exceeds 1.5 of it", above=0)] = None
    entropy: Annotated[float, Knob("weight of the entropy bonus", low=0)] = 0.0
    value_weight: Annotated[float, Knob("weight of the critic's loss", low=0)] = 0.5
    normalize_advantage: Annotated[str, Knob("in each", choices=("minibatch", "rollout", "off"))] = (
        "minibatch"
    )
    adam_eps: Annotated[float, Knob("Adam epsilon", above=0)] = 1e-5

    def __post_init__(self) -> None:
        """Raises: UserError for a value out of range, or a knob whose part is off."""
        super().__post_init__()
        needed(self, {"--clip-end": (self.clip_end is not None, ("clip_steps",))})

    def rounds(self, steps: int, num_envs: int) -> int:
        """Updates in so many steps over all environments."""
        return rounds(self, steps, num_envs)


def policy_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: Tensor) -> Tensor:
    """-mean min(r A, clip(r) A), (). Shapes: clip (), the others (B,). Source: eq. 7."""
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def value_loss(value: Tensor, old_value: Tensor, target: Tensor, clip: float | None) -> Tensor:
    """mean (V - R)^2 / 2, or the larger of that and the same of V within `clip` of what it was. Shapes: (B,) -> ()."""
    error = (value - target).square()
    if clip is not None:
        near = old_value + (value - old_value).clamp(-clip, clip)
        error = torch.maximum(error, (near - target).square())
    return 0.5 * error.mean()


def approximate_kl(logp: Tensor, old_logp: Tensor) -> Tensor:
    """KL(old || new), (), from samples of old: mean r - 1 - log r. Source: Schulman 2020, "Approximating KL"."""
    log_ratio = logp - old_logp
    return (log_ratio.exp() - 1 - log_ratio).mean()


def normalized(advantage: Tensor) -> Tensor:
    """Mean 0 and spread 1. Shapes: (B,) -> (B,)."""
    spread = advantage.std(correction=1 if len(advantage) > 1 else 0)  # of one sample: 0
    return (advantage - advantage.mean()) / (spread + 1e-8)


class PPO(PolicyAgent):
    """The agent; `build` gives it networks, then it can act and learn."""

    name = "ppo"
    Config = Config
    compares = True

    def prepare(self, say: Callable[[str], None]) -> dict[str, Optimizer]:
        """See `PolicyAgent.prepare`."""
        config = self.config
        how: Any = dict(lr=config.lr, eps=config.adam_eps, max_norm=config.max_grad_norm)
        self.optimizer = Adam(learned(self.model), **how)
        self._clip = torch.zeros((), device=self.compute.device)
        self._graph = self.compiled(self._step)
        return {"optimizer": self.optimizer}

    @property
    def sequence(self) -> int:
        """See `PolicyAgent.sequence`."""
        return sequence(self.config, self.model, self._say)

    def learn(self, samples: Samples) -> dict[str, Tensor]:
        """Epochs of minibatches."""
        config = self.config
        self.compute.learning()
        if config.normalize_advantage == "rollout":
            samples = samples._replace(advantage=normalized(samples.advantage))
        lr, metrics = self._lr(self.steps), {}
        self._clip.fill_(self._clip_at(self.steps))
        for _ in range(config.epochs):
            for part in minibatches(samples, config.batch, self._order):
                self.optimizer.begin(lr)
                metrics = self._graph(*part)
                self.updates += 1
                if config.target_kl is not None and float(metrics["policy/kl"]) > 1.5 * config.target_kl:
                    return metrics | self._end(samples)
        return metrics | self._end(samples)

    def _step(self, *part: Any) -> dict[str, Tensor]:
        """One gradient step on a minibatch."""
        config, samples = self.config, samples_of(part)
        with self.compute.autocast():
            p, value = self.model(samples.inputs)
        logp = self.distribution.log_prob(p, samples.action)
        entropy = self.distribution.entropy(p if config.entropy else p.detach()).mean()
        advantage = samples.advantage
        if config.normalize_advantage == "minibatch":
            advantage = normalized(advantage)
        of_policy = policy_loss(logp, samples.logp, advantage, self._clip)
        of_value = value_loss(value, samples.value, samples.return_, config.clip_value)
        loss = of_policy + config.value_weight * of_value - config.entropy * entropy
        norm = self.optimizer.step(self.gradients(loss, self.optimizer), loss.detach())
        kl = approximate_kl(logp.detach(), samples.logp)
        clipped = ((logp.detach() - samples.logp).exp() - 1).abs() > self._clip
        return {
            "loss/policy": of_policy.detach(),
            "loss/value": of_value.detach(),
            "policy/entropy": entropy.detach(),
            "policy/kl": kl,
            "policy/clipped": clipped.float().mean(),
            "train/grad_norm": norm,
        }

    def _end(self, samples: Samples) -> dict[str, Tensor]:
        left = (samples.return_ - samples.value).var() / (samples.return_.var() + 1e-8)
        return {"value/explained": 1 - left}

    def _clip_at(self, step: int) -> float:
        config = self.config
        if config.clip_end is None:
            return config.clip
        return linear(config.clip, config.clip_end, config.clip_steps, step)

    def schedule(self, step: int) -> dict[str, float]:
        """See `Agent.schedule`."""
        return {**super().schedule(step), "train/clip": self._clip_at(step)}
