"""Adam and RMSProp as in-place tensor maths, so that one compiled graph can hold a whole update: loss, gradient, step.

    g <- g * min(1, max_norm / |g|)

    Adam:     m <- m + (1 - b1)(g - m),   v <- b2 v + (1 - b2) g^2
              p <- p - lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps * sqrt(1 - b2^t))
    RMSProp:  v <- a v + (1 - a) g^2,     p <- p - lr * g / sqrt(v + eps)        a = 0.99, v = 1 at first

A step whose loss or gradient is not finite is skipped and counted; t counts it too.

torch.optim computes the same Adam; its fused step cannot be part of a compiled graph, and costs as much as the rest of
a small net's update. Its RMSProp has eps outside of the root, which A2C does not work well with.
Source: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1 in the order of operations that section 2 ends with; Mnih et
al. 2016, arXiv 1602.01783, section 4 ("Optimization").
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from agents.base import linear

B1, B2 = 0.9, 0.999
DECAY = 0.99  # a


class Optimizer(ABC):
    """Some parameters and what is remembered of their gradients; `begin` and `step` change both."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        eps: float,
        max_norm: float,
        lr_end: float | None = None,
        decay: int = 1,
    ) -> None:
        """Start with zeros; by itself the step size goes on a line from `lr` to `lr_end` in `decay` updates."""
        self.parameters = list(parameters)
        self.lr, self.lr_end, self.decay = lr, lr if lr_end is None else lr_end, decay
        self.eps, self.max_norm = eps, max_norm
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.count = 0  # t
        device = self.parameters[0].device
        self.rate, self.floor = (torch.zeros((), device=device) for _ in range(2))
        # steps skipped: in all, since the last good one, and the most there ever were in a row
        self.skipped, self.in_row, self.longest = (torch.zeros((), device=device) for _ in range(3))

    def begin(self, lr: float | None = None) -> None:
        """Count one more step and set its factors; call it before each `step`. `lr`: instead of the line.

        In tensors and outside of the compiled graph, which would work the powers out anew for every few parameters.
        """
        lr = linear(self.lr, self.lr_end, self.decay, self.count) if lr is None else lr
        self.count += 1
        self._factors(lr)

    @abstractmethod
    def _factors(self, lr: float) -> None:
        """Set `rate` and `floor`."""

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Move the parameters; returns the norm () of all gradients before clipping.

        Where the loss () or the norm is not finite nothing moves, and `skipped` counts it.
        """
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        good = torch.isfinite(norm) & torch.isfinite(loss)
        scale = torch.clamp(self.max_norm / (norm + 1e-6), max=1.0)
        self._move([torch.where(good, g * scale, 0.0) for g in gradients], good)
        bad = 1.0 - good.float()
        self.skipped.add_(bad)
        self.in_row.add_(bad).mul_(bad)
        self.longest.copy_(torch.maximum(self.longest, self.in_row))
        return norm

    @abstractmethod
    def _move(self, gradients: Sequence[Tensor], good: Tensor) -> None:
        """Move parameters and moments by gradients that are clipped; not at all unless `good` ()."""

    def state_dict(self) -> dict[str, Tensor]:
        """The moments and the count of steps, by name."""
        moments = {"first": self.first, "second": self.second}
        named = {
            f"{kind}.{i}": tensor for kind, tensors in moments.items() for i, tensor in enumerate(tensors)
        }
        return {
            "count": torch.tensor(self.count),
            "skipped": self.skipped,
            "in_row": self.in_row,
            "longest": self.longest,
            **named,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave; raises KeyError where a tensor is missing."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
        self.count = int(state["count"])


class Adam(Optimizer):
    """Steps of Adam."""

    def _factors(self, lr: float) -> None:
        root = math.sqrt(1 - B2**self.count)
        self.rate.fill_(lr * root / (1 - B1**self.count))
        self.floor.fill_(self.eps * root)

    def _move(self, gradients: Sequence[Tensor], good: Tensor) -> None:
        b1, b2 = (torch.where(good, b, 1.0) for b in (B1, B2))
        rate = torch.where(good, self.rate, 0.0)
        for p, g, m, v in zip(self.parameters, gradients, self.first, self.second, strict=True):
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - B2)
            p.sub_(rate * m / (v.sqrt() + self.floor))


class RMSProp(Optimizer):
    """Steps of RMSProp, without momentum; v starts at 1 so that first steps are small."""

    def __init__(self, parameters: Iterable[Tensor], **how: float) -> None:
        """See `Optimizer`."""
        super().__init__(parameters, **how)  # type: ignore[arg-type]  # the same keywords
        self.first = []
        for v in self.second:
            v.fill_(1.0)

    def _factors(self, lr: float) -> None:
        self.rate.fill_(lr)
        self.floor.fill_(self.eps)

    def _move(self, gradients: Sequence[Tensor], good: Tensor) -> None:
        a = torch.where(good, DECAY, 1.0)
        rate = torch.where(good, self.rate, 0.0)
        for p, g, v in zip(self.parameters, gradients, self.second, strict=True):
            v.mul_(a).addcmul_(g, g, value=1 - DECAY)
            p.sub_(rate * g / (v + self.floor).sqrt())


def learned(*modules: nn.Module) -> list[nn.Parameter]:
    """The weights that an optimiser of these modules moves; a backbone may come frozen."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


OPTIMIZERS = {"adam": Adam, "rmsprop": RMSProp}
