"""A multilayer perceptron."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from backbones.base import Backbone, State
from backbones.dense import MOST, Quick, in_numpy
from backbones.obs import Encoder
from runs.config import Knob, UserError, check

FLOATS = (np.float32, np.float64)
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU, "elu": nn.ELU}


class MLP(Backbone):
    """Dense layers over the flattened observation, of any space.

    Shapes: obs (B, *S) or (T, B, *S) -> (B, F) or (T, B, F), F the last width.
    """

    def __init__(
        self,
        observation: spaces.Space[Any] | tuple[int, ...],
        *,
        hidden: Annotated[tuple[int, ...], Knob("widths of the dense layers", low=1)] = (256, 256),
        activation: Annotated[str, Knob("after each layer", choices=tuple(ACTIVATIONS))] = "relu",
        norm: Annotated[bool, Knob("layer normalisation before each activation")] = False,
    ) -> None:
        """Raises: UserError for a width below 1, no width at all, or an unknown activation."""
        super().__init__()
        check(MLP, {"hidden": hidden, "activation": activation, "norm": norm})
        if not hidden:
            raise UserError("--hidden must be one whole number or more, got ()")
        self.encoder = Encoder(observation)
        widths = [self.encoder.size, *hidden]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [
                nn.Linear(inputs, outputs),
                *([nn.LayerNorm(outputs)] if norm else []),
                ACTIVATIONS[activation](),
            ]
        self.layers = nn.Sequential(*layers)
        self.features = widths[-1]

    def forward(self, obs: Any, state: State = (), first: Tensor | None = None) -> tuple[Tensor, State]:
        """See `Backbone.forward`."""
        x = self.encoder(obs)
        parts = [part.flatten(1) for part in (x.image, x.vector) if part is not None]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts, 1)  # (B, D)
        return x.unfold(self.layers(flat)), state

    def quick(self) -> Quick | None:
        """See `Backbone.quick`; for vectors of floats."""
        space = self.encoder.space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1 or space.dtype not in FLOATS:
            return None
        layers, cast = in_numpy(self.layers), Quick((lambda obs: obs.astype(np.float32, copy=False),), MOST)
        return None if layers is None else cast.then(layers)
