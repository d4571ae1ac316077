"""Dense nets in numpy, for a handful of observations: there torch's dispatch costs four times the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor, nn

FEW = 16  # observations up to which numpy is faster

Function = Callable[[np.ndarray], np.ndarray]


def in_numpy(layers: Iterable[nn.Module]) -> Function | None:
    """What these layers do to arrays (B, D), on views of their weights; None if one of them is not known here.

    The views see every change of the weights that is made in place, as optimisers and `load_state_dict` do it.
    """
    steps: list[Function] = []
    for layer in layers:
        step = _one(layer)
        if step is None:
            return None
        steps.append(step)

    def run(x: np.ndarray) -> np.ndarray:
        for step in steps:
            x = step(x)
        return x

    return run


def _one(layer: nn.Module) -> Function | None:
    if type(layer) is nn.Linear and layer.bias is not None:
        weight, bias = _view(layer.weight).T, _view(layer.bias)
        return lambda x: x @ weight + bias
    if type(layer) is nn.LayerNorm and layer.elementwise_affine and layer.bias is not None:
        scale, shift, eps = _view(layer.weight), _view(layer.bias), layer.eps
        return lambda x: (
            (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + shift
        )
    known: dict[type[nn.Module], Function] = {
        nn.ReLU: lambda x: np.maximum(x, 0),
        nn.Tanh: np.tanh,
    }
    return known.get(type(layer))


def _view(parameter: Tensor) -> np.ndarray:
    return parameter.detach().numpy()
