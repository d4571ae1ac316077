"""Distributions over actions, as pure functions of their parameters.

A policy net gives numbers (B, P) for each observation; a distribution turns them into samples (B, K) and their
log-probabilities. What the environment is given (`action`) is made of the sample, never the other way round, so that
nothing has to be inverted.

Sizes: B batch, P parameters, K numbers of a sample, Q numbers of noise that a sample is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor

from runs.config import UserError

MOST_DEPTH = 4  # of Dict and Tuple spaces in each other
NEVER = -1e9  # logit of an action that is masked
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Distribution(Protocol):
    """What every distribution offers."""

    @property
    def parameters(self) -> int:
        """P."""
        ...

    @property
    def width(self) -> int:
        """K."""
        ...

    @property
    def spreads(self) -> np.ndarray:
        """Which parameters (P,) bool are the log of a spread: they may be learned apart from the observation."""
        ...

    def noise(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """What `count` samples are made of: (count, Q) float32."""
        ...

    def draw(
        self, p: np.ndarray, noise: np.ndarray, logp: bool = True
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Samples (B, K) from parameters (B, P) and noise (B, Q), and their `log_prob` (B,); without `logp` None.

        In numpy, as `mode`: for the few rows of a step torch's dispatch costs more than the arithmetic.
        """
        ...

    def mode(self, p: np.ndarray) -> np.ndarray:
        """The most probable sample (B, K)."""
        ...

    def log_prob(self, p: Tensor, x: Tensor) -> Tensor:
        """Log-probability or log-density (B,) of the action that the sample x (B, K) stands for."""
        ...

    def entropy(self, p: Tensor) -> Tensor:
        """In nats (B,), of the action."""
        ...

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) (B,) of two sets of parameters (B, P)."""
        ...

    def curvature(self, p: Tensor, v: Tensor) -> Tensor:
        """The Fisher information of the parameters p times v, (B, P): the Hessian of KL(p || q) in q at q = p."""
        ...

    def action(self, x: np.ndarray) -> Any:
        """Samples (B, K) as the environment takes them."""
        ...


@dataclass(frozen=True)
class Categorical:
    """One of n actions; parameters are logits (B, n), a sample is the number of the action (B, 1)."""

    n: int
    start: int = 0
    dtype: Any = np.int64  # of the action
    width: int = field(default=1, init=False)

    @property
    def parameters(self) -> int:
        """n."""
        return self.n

    @property
    def spreads(self) -> np.ndarray:
        """See `Distribution.spreads`."""
        return np.zeros(self.n, bool)

    def noise(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Uniform in [0, 1)."""
        return rng.random((count, 1), np.float32)

    def draw(
        self, p: np.ndarray, noise: np.ndarray, logp: bool = True
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The first action at which the cumulated probability exceeds that share of all of it."""
        p = p - p.max(1, keepdims=True)
        reached = np.exp(p).cumsum(1)
        total = reached[:, -1:]
        action = (reached <= noise * total).sum(1)  # (B,)
        drawn = action[:, None].astype(p.dtype)
        return drawn, p[np.arange(len(p)), action] - np.log(total[:, 0]) if logp else None

    def mode(self, p: np.ndarray) -> np.ndarray:
        """The largest logit."""
        return p.argmax(1)[:, None].astype(p.dtype)

    def log_prob(self, p: Tensor, x: Tensor) -> Tensor:
        """Of the action's logit."""
        return p.log_softmax(1).gather(1, x.long()).squeeze(1)

    def entropy(self, p: Tensor) -> Tensor:
        """-sum p log p."""
        log = p.log_softmax(1)
        return -(log.exp() * log).sum(1)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """sum p (log p - log q)."""
        log = p.log_softmax(1)
        return (log.exp() * (log - q.log_softmax(1))).sum(1)

    def curvature(self, p: Tensor, v: Tensor) -> Tensor:
        """(diag(pi) - pi pi^T) v."""
        pi = p.softmax(1)
        return pi * (v - (pi * v).sum(1, keepdim=True))

    def action(self, x: np.ndarray) -> np.ndarray:
        """Whole numbers (B,) from `start` on."""
        return (x[:, 0].astype(np.int64) + self.start).astype(self.dtype)


@dataclass(frozen=True)
class Bernoulli:
    """n independent yes or no; parameters are logits (B, n), a sample is 0 or 1 in each place (B, n)."""

    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """n."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """n."""
        return self.parameters

    @property
    def spreads(self) -> np.ndarray:
        """See `Distribution.spreads`."""
        return np.zeros(self.parameters, bool)

    def noise(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Uniform in [0, 1)."""
        return rng.random((count, self.width), np.float32)

    def draw(
        self, p: np.ndarray, noise: np.ndarray, logp: bool = True
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """1 where the noise is below the probability."""
        yes = noise < 0.5 + 0.5 * np.tanh(p / 2)
        return yes.astype(p.dtype), -np.logaddexp(0, np.where(yes, -p, p)).sum(1) if logp else None

    def mode(self, p: np.ndarray) -> np.ndarray:
        """1 where that is more probable."""
        return (p > 0).astype(p.dtype)

    def log_prob(self, p: Tensor, x: Tensor) -> Tensor:
        """sum x log s(p) + (1 - x) log s(-p)."""
        return -F.binary_cross_entropy_with_logits(p, x, reduction="none").sum(1)

    def entropy(self, p: Tensor) -> Tensor:
        """The cross-entropy with itself."""
        return F.binary_cross_entropy_with_logits(p, p.sigmoid(), reduction="none").sum(1)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """Of each place, summed."""
        cross = F.binary_cross_entropy_with_logits(q, p.sigmoid(), reduction="none").sum(1)
        return cross - self.entropy(p)

    def curvature(self, p: Tensor, v: Tensor) -> Tensor:
        """s(p) s(-p) v."""
        return p.sigmoid() * (-p).sigmoid() * v

    def action(self, x: np.ndarray) -> np.ndarray:
        """int8 (B, *shape)."""
        return x.astype(np.int8).reshape(-1, *self.shape)


@dataclass(frozen=True)
class Gaussian:
    """Independent normal numbers; parameters are K means and K logs of the spread, (B, 2 K).

    If every number has both bounds, [-1, 1] here is [low, high] there. What lies beyond is cut off, and keeps the
    log-probability of the number before; or `squash` brings it in by tanh, whose change of variables is in the
    log-probability. If a bound is missing, numbers are taken as they are and cut off where there is one.
    Source of the tanh form: Haarnoja et al. 2018, arXiv 1801.01290, appendix C.
    """

    low: np.ndarray
    high: np.ndarray
    squash: bool
    dtype: Any = np.float32

    @property
    def width(self) -> int:
        """K."""
        return math.prod(self.low.shape)

    @property
    def parameters(self) -> int:
        """2 K."""
        return 2 * self.width

    @cached_property
    def bounded(self) -> bool:
        """Whether every number has both bounds."""
        return bool(np.isfinite(self.low).all() and np.isfinite(self.high).all())

    @cached_property
    def _scale(self) -> float:
        """log |d action / d number in [-1, 1]|, summed over K; a number with equal bounds has no share."""
        if not self.bounded:
            return 0.0
        half = (self.high - self.low) / 2
        return float(np.log(np.where(half > 0, half, 1)).sum())

    @property
    def spreads(self) -> np.ndarray:
        """See `Distribution.spreads`."""
        return np.repeat([False, True], self.width)

    def noise(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Standard normal."""
        return rng.standard_normal((count, self.width), np.float32)

    def draw(
        self, p: np.ndarray, noise: np.ndarray, logp: bool = True
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """mean + spread * noise, before tanh."""
        mean, log_std = p[:, : self.width], p[:, self.width :]
        spread = np.exp(log_std)
        x = mean + spread * noise
        if not logp:
            return x, None
        standard = (x - mean) / spread  # not the noise: x is rounded, and all that is kept of it
        density = -(0.5 * standard * standard + log_std).sum(1) - (HALF_LOG_2PI * self.width + self._scale)
        if self.squash:
            density -= 2 * (math.log(2) - x - np.logaddexp(0, -2 * x)).sum(1)
        return x, density

    def mode(self, p: np.ndarray) -> np.ndarray:
        """The mean, before tanh: the median of the action, not its mode."""
        return p[:, : self.width]

    def log_prob(self, p: Tensor, x: Tensor) -> Tensor:
        """log N(x; mean, spread) - log |d action / d x|."""
        mean, log_std = p.chunk(2, 1)
        standard = (x - mean) * (-log_std).exp()
        density = -(0.5 * standard.square() + log_std + HALF_LOG_2PI).sum(1)
        return density - self._scale - (_log_slope(x).sum(1) if self.squash else 0.0)

    def entropy(self, p: Tensor) -> Tensor:
        """sum log spread + log(2 pi e) / 2; squashed, plus the mean of log |d action / d x| by quadrature."""
        mean, log_std = p.chunk(2, 1)
        plain = (log_std + 0.5 + HALF_LOG_2PI).sum(1) + self._scale
        if not self.squash:
            return plain
        nodes, weights = (torch.as_tensor(a, dtype=p.dtype, device=p.device) for a in _QUADRATURE)
        x = mean.unsqueeze(2) + log_std.exp().unsqueeze(2) * nodes  # (B, K, nodes)
        return plain + (_log_slope(x) * weights).sum((1, 2))

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """log s_q / s_p + (s_p^2 + (m_p - m_q)^2) / 2 s_q^2 - 1/2, summed; tanh changes nothing."""
        (mean_p, log_p), (mean_q, log_q) = p.chunk(2, 1), q.chunk(2, 1)
        ratio = (2 * (log_p - log_q)).exp() + ((mean_p - mean_q) * (-log_q).exp()).square()
        return (log_q - log_p + 0.5 * ratio - 0.5).sum(1)

    def curvature(self, p: Tensor, v: Tensor) -> Tensor:
        """v / s^2 for means, 2 v for logs of the spread."""
        _, log_std = p.chunk(2, 1)
        of_mean, of_log = v.chunk(2, 1)
        return torch.cat([of_mean * (-2 * log_std).exp(), 2 * of_log], 1)

    def action(self, x: np.ndarray) -> np.ndarray:
        """Numbers (B, *shape) within the bounds."""
        x = np.tanh(x) if self.squash else x
        x = x.reshape(-1, *self.low.shape)
        if self.bounded:
            half = (self.high - self.low) / 2
            x = self.low + half * (np.clip(x, -1, 1) + 1)
        return np.clip(x, self.low, self.high).astype(self.dtype)


@dataclass(frozen=True)
class Product:
    """Several independent distributions side by side; `pack` puts their actions together."""

    parts: tuple[Distribution, ...]
    pack: Callable[[list[Any]], Any]

    @property
    def parameters(self) -> int:
        """The sum of theirs."""
        return sum(part.parameters for part in self.parts)

    @property
    def width(self) -> int:
        """The sum of theirs."""
        return sum(part.width for part in self.parts)

    @property
    def spreads(self) -> np.ndarray:
        """Theirs, side by side."""
        return np.concatenate([part.spreads for part in self.parts])

    def noise(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Theirs, side by side."""
        return np.concatenate([part.noise(rng, count) for part in self.parts], 1)

    def draw(
        self, p: np.ndarray, noise: np.ndarray, logp: bool = True
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Theirs, side by side, and the sum; each takes as much noise as its sample is wide."""
        split = zip(self.parts, self._apart(p), _cut(noise, self._widths), strict=True)
        samples, logps = zip(*(part.draw(own, drawn, logp) for part, own, drawn in split), strict=True)
        return np.concatenate(samples, 1), np.sum(logps, 0) if logp else None

    def mode(self, p: np.ndarray) -> np.ndarray:
        """Theirs, side by side."""
        return np.concatenate(
            [part.mode(own) for part, own in zip(self.parts, self._apart(p), strict=True)], 1
        )

    def log_prob(self, p: Tensor, x: Tensor) -> Tensor:
        """The sum of theirs."""
        split = zip(self.parts, self._split(p), x.split(self._widths, 1), strict=True)
        return torch.stack([part.log_prob(own, of) for part, own, of in split]).sum(0)

    def entropy(self, p: Tensor) -> Tensor:
        """The sum of theirs."""
        split = zip(self.parts, self._split(p), strict=True)
        return torch.stack([part.entropy(own) for part, own in split]).sum(0)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """The sum of theirs."""
        split = zip(self.parts, self._split(p), self._split(q), strict=True)
        return torch.stack([part.kl(own, other) for part, own, other in split]).sum(0)

    def curvature(self, p: Tensor, v: Tensor) -> Tensor:
        """Theirs, side by side."""
        split = zip(self.parts, self._split(p), self._split(v), strict=True)
        return torch.cat([part.curvature(own, of) for part, own, of in split], 1)

    def action(self, x: np.ndarray) -> Any:
        """Theirs, put together."""
        return self.pack(
            [part.action(own) for part, own in zip(self.parts, _cut(x, self._widths), strict=True)]
        )

    @cached_property
    def _widths(self) -> list[int]:
        return [part.width for part in self.parts]

    def _split(self, p: Tensor) -> Sequence[Tensor]:
        return p.split([part.parameters for part in self.parts], 1)

    def _apart(self, p: np.ndarray) -> Sequence[np.ndarray]:
        return _cut(p, [part.parameters for part in self.parts])


def of_space(space: spaces.Space[Any], *, squash: bool = False, depth: int = 0) -> Distribution:
    """The distribution over the actions of a space.

    Raises: UserError for a space without one (Text, Graph, Sequence, Box of whole numbers), for tanh over a Box
    without bounds, and for Dict and Tuple spaces nested too deep.
    """
    if isinstance(space, spaces.Discrete):
        return Categorical(int(space.n), int(space.start), space.dtype)
    if isinstance(space, spaces.MultiDiscrete):
        starts = np.broadcast_to(space.start, space.shape).ravel()
        kind, shape = space.dtype, space.shape
        parts = [Categorical(int(n), int(s), kind) for n, s in zip(space.nvec.ravel(), starts, strict=True)]
        return Product(tuple(parts), lambda found: np.stack(found, 1).reshape(-1, *shape))
    if isinstance(space, spaces.MultiBinary):
        return Bernoulli(tuple(space.shape))
    if isinstance(space, spaces.Box) and space.dtype is not None and space.dtype.kind == "f":
        made = Gaussian(space.low, space.high, squash, space.dtype)
        if squash and not made.bounded:
            raise UserError(f"--squash needs bounds, and {space} has none; leave it off")
        return made
    if isinstance(space, (spaces.Dict, spaces.Tuple)) and len(space.spaces):
        if depth == MOST_DEPTH:
            raise UserError(f"actions are nested deeper than {MOST_DEPTH} Dict or Tuple spaces")
        inner = list(space.spaces.values()) if isinstance(space, spaces.Dict) else list(space.spaces)
        names = list(space.spaces) if isinstance(space, spaces.Dict) else None
        found = tuple(of_space(each, squash=squash, depth=depth + 1) for each in inner)
        pack = tuple if names is None else lambda made: dict(zip(names, made, strict=True))
        return Product(found, pack)
    kinds = "Discrete, MultiDiscrete, MultiBinary, Box of floats, and Dict and Tuple of these"
    raise UserError(f"no policy draws actions of {space}; there are policies for {kinds}")


def masked(p: Tensor, mask: Tensor) -> Tensor:
    """Logits (B, n) with those of forbidden actions (mask False) out of reach.

    Source: Huang and Ontañón 2022, arXiv 2006.14171.
    """
    return torch.where(mask.bool(), p, NEVER)


def _cut(x: np.ndarray, widths: Sequence[int]) -> Sequence[np.ndarray]:
    """The columns of x (B, D) in parts of these widths."""
    return np.split(x, np.cumsum(widths)[:-1], 1)


def _log_slope(x: Tensor) -> Tensor:
    """log(1 - tanh(x)^2) without its overflow: 2 (log 2 - x - softplus(-2 x))."""
    return 2 * (math.log(2) - x - F.softplus(-2 * x))


def _normal(count: int, edge: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights whose weighted sum of f is the mean of f under the standard normal.

    Evenly spaced: with a wide spread log |d tanh| has a bend that Gauss-Hermite nodes, far apart, miss by 0.2 nats.
    """
    nodes = np.linspace(-edge, edge, count)
    weights = np.exp(-(nodes**2) / 2)
    return nodes, weights / weights.sum()


_QUADRATURE = _normal(64, 5.0)  # to 1e-4 nats for spreads up to e^2
