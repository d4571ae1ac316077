"""Heads: features -> the parameters of a decision."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.distributions import Distribution
from backbones.dense import MOST, Quick, in_numpy

DUELING = ("off", "mean", "max", "naive")
NOISY = ("off", "factorised", "independent")


def duel(value: Tensor, advantage: Tensor, how: str) -> Tensor:
    """Q = V + A - mean A, V + A - max A, or (naive) V + A, in which V and A are not identifiable.

    Shapes: value (B, 1, ...), advantage (B, A, ...) -> (B, A, ...).
    Source: Wang et al. 2016, arXiv 1511.06581, eq. 9, 8 and 7.
    """
    if how == "naive":
        return value + advantage
    base = advantage.mean(1, keepdim=True) if how == "mean" else advantage.amax(1, keepdim=True)
    return value + advantage - base


class Noisy(nn.Module):
    """A linear layer with noise of learned size on each weight: y = (W + S * e_w) x + b + s * e_b.

    `factorised`: e_w = f(e_out) f(e_in)^T, e_b = f(e_out), f(x) = sign(x) sqrt|x|; `independent`: each its own.
    The noise is drawn by `draw`, lies in buffers, and is zero at first: the layer is then a linear one.
    Shapes: (B, I) -> (B, O).
    Source: Fortunato et al. 2018, arXiv 1706.10295, eq. 9-11 and section 3.2.
    """

    noise_weight: Tensor  # e_w (O, I)
    noise_bias: Tensor  # e_b (O,)

    def __init__(self, inputs: int, outputs: int, kind: str, sigma: float) -> None:
        """Start as the paper does; `sigma` is its sigma_0, for the factorised kind."""
        super().__init__()
        bound = 1 / math.sqrt(inputs) if kind == "factorised" else math.sqrt(3 / inputs)
        spread = sigma / math.sqrt(inputs) if kind == "factorised" else 0.017
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        self.weight_sigma = nn.Parameter(torch.full((outputs, inputs), spread))
        self.bias_sigma = nn.Parameter(torch.full((outputs,), spread))
        self.register_buffer("noise_weight", torch.zeros(outputs, inputs), persistent=False)
        self.register_buffer("noise_bias", torch.zeros(outputs), persistent=False)

    def draw(self, rng: np.random.Generator | None) -> None:
        """New noise; without a generator none."""
        outputs, inputs = self.noise_weight.shape
        if rng is None:
            self.noise_weight.zero_()
            self.noise_bias.zero_()
        elif self.kind == "independent":
            self.noise_weight.copy_(torch.from_numpy(rng.standard_normal((outputs, inputs), np.float32)))
            self.noise_bias.copy_(torch.from_numpy(rng.standard_normal(outputs, np.float32)))
        else:
            drawn = torch.from_numpy(rng.standard_normal(outputs + inputs, np.float32))
            f = drawn.sign() * drawn.abs().sqrt()
            self.noise_weight.copy_(torch.outer(f[:outputs], f[outputs:]))
            self.noise_bias.copy_(f[:outputs])

    def forward(self, x: Tensor) -> Tensor:
        """The layer under the noise as last drawn."""
        weight = self.weight + self.weight_sigma * self.noise_weight  # one product with the sum, not two
        return F.linear(x, weight, self.bias + self.bias_sigma * self.noise_bias)


class QHead(nn.Module):
    """Action values, or their distributions; linear layers on the backbone's features.

    Computed in fp32 also under autocast: bf16 has three digits, less than the differences between actions need.
    Shapes: features (B, F) -> (B, A), or (B, A, K) with K > 1 atoms.
    """

    def __init__(
        self,
        features: int,
        actions: int,
        *,
        atoms: int = 1,
        dueling: str = "off",
        noisy: str = "off",
        sigma: float = 0.5,
    ) -> None:
        """One linear layer, or two if it is dueling."""
        super().__init__()

        def layer(outputs: int) -> nn.Module:
            if noisy == "off":
                return nn.Linear(features, outputs)
            return Noisy(features, outputs, noisy, sigma)

        self.actions, self.atoms, self.dueling = actions, atoms, dueling
        self.q = layer(actions * atoms)  # advantages where there is a value
        self.value = None if dueling == "off" else layer(atoms)

    def forward(self, features: Tensor) -> Tensor:
        """Values of all actions."""
        return in_fp32(self._values, features)

    def quick(self) -> Quick | None:
        """The head in numpy, as `Backbone.quick`; None unless it is a single layer without noise."""
        return in_numpy([self.q]) if self.value is None and self.atoms == 1 else None

    def draw(self, rng: np.random.Generator | None) -> None:
        """New noise for noisy layers; without a generator none."""
        for layer in (self.q, self.value):
            if isinstance(layer, Noisy):
                layer.draw(rng)

    def _values(self, features: Tensor) -> Tensor:
        q = self.q(features)
        if self.atoms > 1:
            q = q.unflatten(1, (self.actions, self.atoms))  # (B, A, K)
        if self.value is None:
            return q
        value = self.value(features)  # (B, K)
        return duel(value.unsqueeze(1) if self.atoms > 1 else value, q, self.dueling)


SPREADS = ("free", "state")


class PolicyHead(nn.Module):
    """The parameters of a distribution over actions, from a linear layer on the backbone's features.

    The spread of a Gaussian is `free`, learned numbers that do not depend on the observation and have no bounds, or
    comes from the features too (`state`) and is kept between e^-5 and e^2. In fp32, as QHead.
    Shapes: features (B, F) -> (B, P).
    """

    def __init__(self, features: int, distribution: Distribution, spread: str, log_std: float) -> None:
        """Start with the spread e^log_std."""
        super().__init__()
        spreads = torch.from_numpy(distribution.spreads)
        count = int(spreads.sum())
        self.free = nn.Parameter(torch.full((count,), log_std)) if spread == "free" and count else None
        self.linear = nn.Linear(features, len(spreads) - (count if self.free is not None else 0))
        self.spreads: Tensor | None
        self.register_buffer("spreads", spreads if spread == "state" and count else None, persistent=False)
        # where each parameter lies behind those of the net: only mixed spaces are not in order already
        order = torch.argsort(spreads.long(), stable=True).argsort()
        mixed = self.free is not None and bool((order != torch.arange(len(order))).any())
        self.order: Tensor | None
        self.register_buffer("order", order if mixed else None, persistent=False)
        self.log_std = log_std

    def forward(self, features: Tensor) -> Tensor:
        """Parameters of all distributions."""
        return in_fp32(self._of, features)

    def quick(self) -> Quick | None:
        """The head in numpy, as `Backbone.quick`."""
        linear = in_numpy([self.linear])
        if linear is None or self.spreads is not None or self.order is not None or self.free is None:
            return linear if self.free is None and self.spreads is None else None
        free = self.free.detach().numpy()

        def append(x: np.ndarray) -> np.ndarray:
            return np.concatenate([x, np.broadcast_to(free, (len(x), len(free)))], 1)

        return linear.then(Quick((append,), MOST))

    def _of(self, features: Tensor) -> Tensor:
        p = self.linear(features)
        if self.free is not None:
            p = torch.cat([p, self.free.expand(len(p), -1)], 1)
            return p if self.order is None else p[:, self.order]
        if self.spreads is None:
            return p
        return torch.where(self.spreads, (p + self.log_std).clamp(-5.0, 2.0), p)


class ValueHead(nn.Module):
    """V(s) by a linear layer on the backbone's features, in fp32. Shapes: features (B, F) -> (B,)."""

    def __init__(self, features: int) -> None:
        """One number."""
        super().__init__()
        self.linear = nn.Linear(features, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Values."""
        return in_fp32(self.linear, features).squeeze(1)

    def quick(self) -> Quick | None:
        """The head in numpy, as `Backbone.quick`: (B, F) -> (B, 1)."""
        return in_numpy([self.linear])


def in_fp32(layer: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """`layer` of the features, in fp32 also under autocast."""
    if not torch.is_autocast_enabled(features.device.type):
        return layer(features.float())
    with torch.autocast(features.device.type, enabled=False):
        return layer(features.float())
