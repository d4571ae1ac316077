"""Raw observations -> float tensors: the only place that scales bytes, one-hot encodes and folds leading axes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor

from backbones.base import as_space, working_dtype
from runs.config import UserError


class Encoded(NamedTuple):
    """Observations ready for layers: an image, a vector, or both (from a Dict space)."""

    image: Tensor | None  # (B, C, H, W)
    vector: Tensor | None  # (B, D)
    lead: tuple[int, ...]  # (B,) or (T, B): the axes that were folded into B

    def unfold(self, features: Tensor) -> Tensor:
        """Give features (B, F) their leading axes back."""
        return features if len(self.lead) == 1 else features.unflatten(0, self.lead)


class Encoder:
    """Encodes the observations of one space.

    Images are Box leaves of 2, 3 or 4 axes: (H, W), (C, H, W) or (H, W, C) - the shorter outer axis is the channel -
    and stacks of colour frames (K, H, W, C), whose frames become channels. bytes are scaled to [0, 1]. Discrete
    leaves become one-hot vectors, everything else is flattened. A Dict's images must share H and W; they are put
    side by side as channels, its other leaves as one vector.
    Raises: UserError for spaces without a fixed shape (Text, Graph, Sequence), and images of several sizes.
    """

    def __init__(self, observation: spaces.Space[Any] | tuple[int, ...]) -> None:
        """Work out `image` (C, H, W) or None and `vector`, the length D or 0."""
        space = as_space(observation)
        self.space = space
        self._leaves = _leaves(space)
        images = [_image_shape(leaf) for _, leaf in self._leaves if _is_image(leaf)]
        if len({shape[1:] for shape in images}) > 1:
            raise UserError(f"the images of a Dict observation must share one size, got {images}")
        self.image = (sum(shape[0] for shape in images), *images[0][1:]) if images else None
        self.vector = sum(_length(leaf) for _, leaf in self._leaves if not _is_image(leaf))

    @property
    def size(self) -> int:
        """Numbers in one observation, images flattened."""
        return self.vector + (math.prod(self.image) if self.image else 0)

    def __call__(self, obs: Any) -> Encoded:
        """Encode obs (B, *S) or (T, B, *S); raises ValueError for any other number of leading axes."""
        images, vectors, lead = [], [], ()
        for path, leaf in self._leaves:
            x = obs
            for key in path:
                x = x[key]
            lead = _lead(x, leaf)
            x = x.reshape(-1, *(leaf.shape or ())) if len(lead) == 2 else x
            (images if _is_image(leaf) else vectors).append(_encode(x, leaf))
        image = torch.cat(images, 1) if len(images) > 1 else (images[0] if images else None)
        vector = torch.cat(vectors, 1) if len(vectors) > 1 else (vectors[0] if vectors else None)
        return Encoded(image, vector, lead)


def _leaves(
    space: spaces.Space[Any], path: tuple[Any, ...] = ()
) -> list[tuple[tuple[Any, ...], spaces.Space[Any]]]:
    if isinstance(space, spaces.Dict):
        return [found for key, child in space.spaces.items() for found in _leaves(child, (*path, key))]
    if isinstance(space, spaces.Tuple):
        return [found for i, child in enumerate(space.spaces) for found in _leaves(child, (*path, i))]
    if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        raise UserError(f"no backbone reads observations of {space}")
    return [(path, space)]


def _is_image(space: spaces.Space[Any]) -> bool:
    return isinstance(space, spaces.Box) and len(space.shape) in (2, 3, 4)


def _image_shape(space: spaces.Space[Any]) -> tuple[int, int, int]:
    shape: tuple[int, ...] = tuple(space.shape or ())
    if len(shape) == 2:
        return (1, shape[0], shape[1])
    if len(shape) == 4:  # (K, H, W, C)
        return (shape[0] * shape[3], shape[1], shape[2])
    return (shape[2], shape[0], shape[1]) if _channels_last(shape) else (shape[0], shape[1], shape[2])


def _channels_last(shape: tuple[int, ...]) -> bool:
    return shape[-1] < shape[0]


def _length(space: spaces.Space[Any]) -> int:
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    return math.prod(space.shape or ())


def _lead(x: Tensor, space: spaces.Space[Any]) -> tuple[int, ...]:
    extra = x.ndim - len(space.shape or ())
    if extra not in (1, 2):
        raise ValueError(f"expected (B, *{space.shape}) or (T, B, *{space.shape}), got {tuple(x.shape)}")
    return tuple(x.shape[:extra])


def _encode(x: Tensor, space: spaces.Space[Any]) -> Tensor:
    if isinstance(space, spaces.Discrete):
        return F.one_hot(x.long() - int(space.start), int(space.n)).float()  # (B, n)
    if isinstance(space, spaces.MultiDiscrete):
        columns = (x.flatten(1) - torch.as_tensor(space.start, device=x.device).flatten()).long()
        return torch.cat(
            [F.one_hot(c, int(n)) for c, n in zip(columns.T, space.nvec.flat, strict=True)], 1
        ).float()
    dtype = working_dtype(x)
    x = x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)
    if not _is_image(space):
        return x.reshape(len(x), -1)  # (B, D)
    if x.ndim == 3:
        return x.unsqueeze(1)  # (B, 1, H, W)
    if x.ndim == 5:
        return x.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, K*C, H, W)
    return x.permute(0, 3, 1, 2) if _channels_last(space.shape or ()) else x
