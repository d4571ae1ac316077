"""Dense nets in numpy, for few observations: there torch's dispatch costs up to four times the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

Step = Callable[[np.ndarray], np.ndarray]
# multiplications up to which OpenBLAS stays on one thread; its second one would spin beside torch's
SINGLE = 2**18
MOST = 64  # observations: with tanh torch needs three times as long, with ReLU 1.6, with LayerNorm as long


@dataclass(frozen=True)
class Quick:
    """A net as a chain of numpy steps on views of its weights, for at most `rows` observations at a time.

    Shapes: (B, *S) -> (B, F).
    The views see every change of the weights that is made in place, as optimisers and `load_state_dict` do it.
    """

    steps: tuple[Step, ...]
    rows: int

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Apply the steps in order."""
        for step in self.steps:
            x = step(x)
        return x

    def then(self, other: Quick) -> Quick:
        """The other net on the features of this one."""
        return Quick(self.steps + other.steps, min(self.rows, other.rows))


def in_numpy(layers: Iterable[nn.Module]) -> Quick | None:
    """What these layers do to arrays (B, D); None if one of them is not known here."""
    steps, rows = [], MOST
    for layer in layers:
        step = _one(layer)
        if step is None:
            return None
        steps.append(step)
        if isinstance(layer, nn.Linear):
            rows = min(rows, SINGLE // layer.weight.numel())
    return Quick(tuple(steps), rows) if rows else None


def _one(layer: nn.Module) -> Step | None:
    if type(layer) is nn.Linear and layer.bias is not None:
        weight, bias = _view(layer.weight).T, _view(layer.bias)
        return lambda x: x @ weight + bias
    if type(layer) is nn.LayerNorm and layer.elementwise_affine and layer.bias is not None:
        scale, shift, eps = _view(layer.weight), _view(layer.bias), layer.eps

        def norm(x: np.ndarray) -> np.ndarray:
            centred = x - x.mean(-1, keepdims=True)
            return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * scale + shift

        return norm
    known: dict[type[nn.Module], Step] = {nn.ReLU: lambda x: np.maximum(x, 0), nn.Tanh: np.tanh}
    return known.get(type(layer))


def _view(parameter: Tensor) -> np.ndarray:
    return parameter.detach().numpy()
