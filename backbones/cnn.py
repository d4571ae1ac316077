"""Convolutional trunks for images of any size and number of channels."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from backbones.base import Backbone, State
from backbones.obs import Encoder
from runs.config import Knob, UserError, check

# (channels, kernel, stride) of each layer
NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # Mnih et al. 2015, Methods, "Model architecture"
LIGHT = ((16, 6, 3), (32, 4, 2))  # a twelfth of NATURE's work at 42 x 42; for few cores
MINATAR = ((16, 3, 1),)  # Young and Tian 2019, arXiv 1903.03176; for pictures of 10 x 10
IMPALA = (16, 32, 32)  # Espeholt et al. 2018, figure 3, large model
PLAIN = {"nature": NATURE, "light": LIGHT, "minatar": MINATAR}
WIDTH = {"nature": 512, "light": 256, "minatar": 128, "impala": 256}


class CNN(Backbone):
    """Convolutions, then one dense layer; vectors of a Dict observation join before the dense layer.

    `nature` is the DQN net, `impala` the residual net (5.8 times nature's work, often worth it with a GPU), `light` a
    small net for few cores, `minatar` one for tiny pictures. Weights and activations are channels-last. Where an image
    is smaller than a kernel, the kernel shrinks to fit.
    Shapes: obs (B, *S) or (T, B, *S) with one image or more -> (B, F) or (T, B, F).
    Raises: UserError if the observation holds no image.
    Source: Mnih et al. 2015 (nature); Espeholt et al. 2018, arXiv 1802.01561 (impala).
    """

    def __init__(
        self,
        observation: spaces.Space[Any] | tuple[int, ...],
        *,
        net: Annotated[str, Knob("convolutional trunk", choices=tuple(WIDTH))] = "nature",
        features: Annotated[int | None, Knob("width of the dense layer; none: as published", low=1)] = None,
        norm: Annotated[bool, Knob("layer normalisation before each activation")] = False,
    ) -> None:
        """Build the trunk that `net` names."""
        super().__init__()
        check(CNN, {"net": net, "features": features, "norm": norm})
        self.encoder = Encoder(observation)
        if self.encoder.image is None:
            raise UserError(f"backbone cnn needs an image observation, got {self.encoder.space}; use mlp")
        self.features = WIDTH[net] if features is None else features
        shape = self.encoder.image
        if net == "impala":
            self.trunk, shape = _residual(shape, IMPALA, norm)
        else:
            self.trunk, shape = _plain(shape, PLAIN[net], norm)
        self.trunk = self.trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has it
        dense: list[nn.Module] = [nn.Linear(math.prod(shape) + self.encoder.vector, self.features)]
        self.dense = nn.Sequential(*dense, *([nn.LayerNorm(self.features)] if norm else []), nn.ReLU())

    def forward(self, obs: Any, state: State = (), first: Tensor | None = None) -> tuple[Tensor, State]:
        """See `Backbone.forward`."""
        x = self.encoder(obs)
        assert x.image is not None
        flat = self.trunk(x.image.contiguous(memory_format=torch.channels_last)).flatten(1)
        if x.vector is not None:
            flat = torch.cat([flat, x.vector.to(flat.dtype)], 1)
        return x.unfold(self.dense(flat)), state

    def maps(self, obs: Tensor, names: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """The output of each block of the trunk, `conv1`, `conv2`, ... (B, C, H, W)."""
        x = self.encoder(obs).image
        assert x is not None
        found = {}
        for name, block in self.trunk.named_children():
            x = block(x)
            found[name] = x
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"no feature map {missing[0]!r}; there are {', '.join(found)}")
        return {name: found[name] for name in names or found}


def _plain(
    shape: tuple[int, ...], layers: tuple[tuple[int, int, int], ...], norm: bool
) -> tuple[nn.Module, tuple[int, ...]]:
    """Convolution, normalisation, ReLU for each layer; returns the trunk and the shape (C, H, W) it gives."""
    trunk = nn.Sequential()
    channels, height, width = shape
    for number, (outputs, kernel, stride) in enumerate(layers, 1):
        k = (min(kernel, height), min(kernel, width))
        block = nn.Sequential(nn.Conv2d(channels, outputs, k, stride))
        if norm:
            block.append(nn.GroupNorm(1, outputs))  # layer normalisation over C, H, W
        trunk.add_module(f"conv{number}", block.append(nn.ReLU()))
        channels, height, width = outputs, (height - k[0]) // stride + 1, (width - k[1]) // stride + 1
    return trunk, (channels, height, width)


class _Residual(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int, norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [*([nn.GroupNorm(1, channels)] if norm else []), nn.ReLU()]
            layers += [nn.Conv2d(channels, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _residual(
    shape: tuple[int, ...], widths: tuple[int, ...], norm: bool
) -> tuple[nn.Module, tuple[int, ...]]:
    """Convolution, max-pooling by two and two residual blocks for each width; ReLU at the end."""
    trunk = nn.Sequential()
    channels, height, width = shape
    for number, outputs in enumerate(widths, 1):
        block = nn.Sequential(
            nn.Conv2d(channels, outputs, 3, padding=1),
            nn.MaxPool2d(3, stride=2, padding=1),
            _Residual(outputs, norm),
            _Residual(outputs, norm),
        )
        trunk.add_module(f"conv{number}", block)
        channels, height, width = outputs, (height + 1) // 2, (width + 1) // 2
    trunk.add_module("relu", nn.ReLU())
    return trunk, (channels, height, width)
