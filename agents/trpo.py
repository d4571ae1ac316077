"""TRPO: the largest step that improves the surrogate and keeps the policy within a KL distance of the old one.

    L(theta) = mean pi(a|s) / pi_old(a|s) A + entropy H(pi)     the surrogate
    x        = F^-1 g     by conjugate gradient,       g = grad L,  F = mean J^T M J + damping I
    step     = sqrt(2 delta / x^T F x) x
    theta    = theta_old + shrink^k step               the first k with L > L_old and mean KL(old || new) <= delta

A = GAE(gamma, lam). J is the Jacobian of the distribution's parameters by the weights, M the Fisher matrix of those
parameters. If no k < tries will do: theta_old, bit by bit. The critic has a backbone of its own and is fitted to
R = A + V_old by Adam: mean (V(s) - R)^2 / 2.

Source: Schulman et al. 2015, arXiv 1502.05477, eq. 14, section 6 and appendix C; course notes 6.3.2 (TRPO), which have
KL(new || old).

Deviations: (1) an episode that was truncated bootstraps from its true last state; (2) A is GAE instead of a sum of
rewards, brought to mean 0, spread 1; (3) an entropy bonus can be part of the surrogate; (4) `--damping` is added to the
Fisher matrix, as in OpenAI Baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from agents.actor import ActorConfig, Inputs, PolicyAgent, Samples, minibatches, rounds, sequence
from agents.distributions import Distribution
from agents.optimizers import Adam, Optimizer, learned
from agents.ppo import normalized, value_loss
from runs.config import Knob, UserError


@dataclass(frozen=True)
class Config(ActorConfig):
    """The knobs of TRPO; `lr` is the critic's."""

    lr: Annotated[float, Knob("critic's step size", above=0)] = 1e-3
    rollout: Annotated[int, Knob("steps of each environment between updates", low=1)] = 1_024
    lam: Annotated[float, Knob("of the advantages: 0 one step, 1 the whole return", low=0, high=1)] = 0.95
    delta: Annotated[float, Knob("most KL between two policies", above=0)] = 0.01
    damping: Annotated[float, Knob("added to the Fisher matrix", low=0)] = 0.1
    cg_steps: Annotated[int, Knob("steps of the conjugate gradient", low=1)] = 15
    shrink: Annotated[float, Knob("of the step at each try of the line search", above=0, high=0.99)] = 0.8
    tries: Annotated[int, Knob("of the line search", low=1)] = 10
    epochs: Annotated[int, Knob("critic's passes over each rollout", low=1)] = 10
    batch: Annotated[int, Knob("samples of the critic's minibatches", low=2)] = 128
    sequence: Annotated[int | None, Knob("steps that memory learns through; none: fits both", low=1)] = None
    normalize_advantage: Annotated[bool, Knob("to mean 0, spread 1 in each update")] = True
    entropy: Annotated[float, Knob("weight of the entropy bonus", low=0)] = 0.0
    adam_eps: Annotated[float, Knob("Adam epsilon of the critic", above=0)] = 1e-5

    def __post_init__(self) -> None:
        """Raises: UserError for a value out of range."""
        super().__post_init__()
        if not self.separate:
            raise UserError("--no-separate is not for trpo: policy and critic take steps of their own")

    def rounds(self, steps: int, num_envs: int) -> int:
        """Updates of the critic in so many steps over all environments."""
        return rounds(self, steps, num_envs)


def surrogate(logp: Tensor, old_logp: Tensor, advantage: Tensor) -> Tensor:
    """mean r A, (). Shapes: all (B,). Source: arXiv 1502.05477, eq. 14."""
    return ((logp - old_logp).exp() * advantage).mean()


def conjugate_gradient(product: Callable[[Tensor], Tensor], g: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """x with A x = g for a symmetric positive definite A, given v -> A v; and A x, without one more product.

    Shapes: (D,).

    Source: Hestenes and Stiefel 1952; ends early where the residual is nearly zero beside g.
    """
    x, residual = torch.zeros_like(g), g.clone()
    direction, size = residual.clone(), residual @ residual
    enough = 1e-10 * float(size)
    for _ in range(steps):
        if float(size) <= enough:
            break
        image = product(direction)
        length = size / (direction @ image)
        x = x + length * direction
        residual = residual - length * image
        smaller = residual @ residual
        direction, size = residual + smaller / size * direction, smaller
    return x, g - residual


class Fisher:
    """v -> (mean J^T M J + damping I) v, the curvature of the mean KL at the policy's weights.

    J v is taken as the gradient of u -> J^T u, which is linear, so that two passes back do for each product.
    Source: Pearlmutter 1994; arXiv 1502.05477, appendix C.1.
    """

    def __init__(
        self, distribution: Distribution, p: Tensor, weights: Sequence[Tensor], damping: float
    ) -> None:
        """Of parameters p (B, P) that depend on the weights."""
        self.distribution, self.p, self.weights, self.damping = distribution, p, weights, damping
        self._u = torch.zeros_like(p, requires_grad=True)
        back = torch.autograd.grad(p, weights, self._u, create_graph=True, materialize_grads=True)
        self._back = flat(back)  # (D,) J^T u

    def __call__(self, v: Tensor) -> Tensor:
        """The product, (D,) -> (D,)."""
        (forward,) = torch.autograd.grad(self._back, self._u, v, retain_graph=True)  # (B, P) J v
        bent = self.distribution.curvature(self.p.detach(), forward) / len(forward)
        back = torch.autograd.grad(self.p, self.weights, bent, retain_graph=True, materialize_grads=True)
        return flat(back) + self.damping * v


def line_search(
    weights: Sequence[Tensor],
    step: Tensor,
    judge: Callable[[], tuple[float, float]],
    before: float,
    delta: float,
    shrink: float,
    tries: int,
) -> tuple[int, float, float]:
    """Move the weights by the longest of the steps shrink^k `step` that is good; returns k (or -1), the
    surrogate and the KL there.

    `judge` gives the surrogate and KL where the weights are. Good: surrogate > before, and KL <= delta. If none is,
    the weights are what they were, to the bit.
    """
    old = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for k in range(tries):
            for weight, start, part in zip(weights, old, unflat(shrink**k * step, weights), strict=True):
                weight.copy_(start + part)
            gain, kl = judge()
            if gain > before and kl <= delta:
                return k, gain, kl
        for weight, start in zip(weights, old, strict=True):
            weight.copy_(start)
    return -1, before, 0.0


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All of them as one vector (D,)."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflat(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a vector (D,) in the shapes of `like`."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


class TRPO(PolicyAgent):
    """The agent; `build` gives it networks, then it can act and learn."""

    name = "trpo"
    Config = Config

    def prepare(self, say: Callable[[str], None]) -> dict[str, Optimizer]:
        """See `PolicyAgent.prepare`."""
        config, model = self.config, self.model
        self._weights = learned(model.backbone, model.policy)
        how: Any = dict(lr=config.lr, eps=config.adam_eps, max_norm=config.max_grad_norm)
        self.optimizer = Adam(learned(model.evaluates, model.value), **how)
        self._fit = self.compiled(self._fit_step)
        self._refused = 0
        return {"optimizer": self.optimizer}

    @property
    def sequence(self) -> int:
        """See `PolicyAgent.sequence`."""
        return sequence(self.config, self.model, self._say)

    def learn(self, samples: Samples) -> dict[str, Tensor]:
        """One natural step of the policy, several passes of the critic."""
        self.compute.learning()
        # the gradient's gradient: torch's fused attention and cuDNN's recurrent nets have none
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            metrics = self._improve(samples.joined)
        return metrics | {"loss/value": self._value(samples)}

    def _improve(self, samples: Samples) -> dict[str, Tensor]:
        config, weights = self.config, self._weights
        advantage = normalized(samples.advantage) if config.normalize_advantage else samples.advantage
        p = self.model.parameters_of(samples.inputs)  # in fp32: a KL of 0.01 needs its digits
        old = p.detach()
        old_logp = self.distribution.log_prob(old, samples.action)

        def gain(at: Tensor) -> Tensor:
            bonus = config.entropy * self.distribution.entropy(at).mean() if config.entropy else 0.0
            return surrogate(self.distribution.log_prob(at, samples.action), old_logp, advantage) + bonus

        def judge() -> tuple[float, float]:
            new = self.model.parameters_of(samples.inputs)
            return float(gain(new)), float(self.distribution.kl(old, new).mean())

        before = gain(p)
        g = flat(torch.autograd.grad(before, weights, retain_graph=True, materialize_grads=True))
        fisher = Fisher(self.distribution, p, weights, config.damping)
        x, image = conjugate_gradient(fisher, g, config.cg_steps)
        step = (2 * config.delta / (x @ image).clamp(min=torch.finfo(x.dtype).tiny)).sqrt() * x
        good = bool(torch.isfinite(step).all()) and bool(g.any())
        k, after, kl = -1, float(before.detach()), 0.0
        if good:
            k, after, kl = line_search(
                weights, step, judge, float(before.detach()), config.delta, config.shrink, config.tries
            )
        self._refused += k < 0
        return {
            "loss/policy": torch.tensor(-after),
            "policy/entropy": self.distribution.entropy(old).mean(),
            "policy/kl": torch.tensor(kl),
            "policy/tries": torch.tensor(float(k + 1)),
            "policy/refused": torch.tensor(float(self._refused)),
            "train/grad_norm": g.norm(),
        }

    def _value(self, samples: Samples) -> Tensor:
        """Fit the critic; its loss () in the last minibatch."""
        loss, lr = torch.zeros(()), self._lr(self.steps)
        for _ in range(self.config.epochs):
            for part in minibatches((samples.inputs, samples.return_), self.config.batch, self._order):
                self.optimizer.begin(lr)
                loss = self._fit(*part)
                self.updates += 1
        return loss

    def _fit_step(self, inputs: Any, return_: Tensor) -> Tensor:
        with self.compute.autocast():
            value = self.model.values_of(Inputs(*inputs))
        loss = value_loss(value, value, return_.flatten(), None)
        self.optimizer.step(self.gradients(loss, self.optimizer), loss.detach())
        return loss.detach()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """See `Agent.state_dict`."""
        state = super().state_dict()
        state["counters"] |= {"refused": self._refused}
        return state

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """See `Agent.load_state_dict`."""
        super().load_state_dict(state)
        self._refused = state["counters"]["refused"]
