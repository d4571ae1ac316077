"""The seam between networks and everything that uses them: obs -> features."""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import torch
from gymnasium import spaces
from torch import Tensor, nn

from backbones.dense import Quick

State = tuple[Tensor, ...]


class Backbone(nn.Module, ABC):
    """Turns observations into features; agents put heads on top.

    Shapes: S is the shape of one observation, F = `features`. Memory is data: it comes in as `state`, goes out as
        `state`, and is never kept on the module; feed-forward nets have the empty state ().
    """

    features: int  # F
    memory = False  # whether a state is carried from step to step

    @property
    def reach(self) -> int | None:
        """The most steps that it looks at, the present one among them; None: no such limit."""
        return None

    def initial(self, n: int) -> State:
        """The state of `n` environments before their first observation.

        Every tensor has the environments on axis 0, is float32 or int64, and lies on the device of the weights.
        """
        return ()

    @abstractmethod
    def forward(self, obs: Any, state: State = (), first: Tensor | None = None) -> tuple[Tensor, State]:
        """Features of observations, and the state after the last of them.

        One pass over (T, B) equals T single steps, in values and in gradients.
        Shapes: obs (B, *S) -> (B, F), or (T, B, *S) -> (T, B, F). `state` is that before t = 0; () means
            `initial(B)`. Where `first` (B,) or (T, B) is true, the row's state is an initial one before use.
        """

    def quick(self) -> Quick | None:
        """`forward` without memory in numpy, obs (B, *S) -> (B, F), for a handful of observations on the CPU.

        It reads the tensors that hold the weights now: they must be changed in place. None: no such form.
        """
        return None

    def maps(self, obs: Tensor, names: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Feature maps (B, C, H, W) by layer name; all of them if no name is given.

        Raises: ValueError if this net has no such maps.
        """
        raise ValueError(f"{type(self).__name__} has no feature maps")

    def freeze(self) -> Self:
        """Stop all gradients into this net; returns it."""
        return self.requires_grad_(False)

    def save(self, path: str | Path) -> None:
        """Write the weights to a safetensors file, with the class name beside them."""
        from safetensors.torch import save_file

        weights = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, path, metadata={"backbone": json.dumps(type(self).__name__)})

    def load(self, path: str | Path) -> Self:
        """Read weights that `save` wrote into a net of the same shape; returns it."""
        from safetensors.torch import load_file

        self.load_state_dict(load_file(path))
        return self


def as_space(observation: spaces.Space[Any] | tuple[int, ...]) -> spaces.Space[Any]:
    """A space as it is; a shape as the space of float arrays of that shape."""
    if isinstance(observation, tuple):
        return spaces.Box(-float("inf"), float("inf"), observation)
    return observation


def working_dtype(x: Tensor) -> torch.dtype:
    """The type to compute in: autocast's where it is on, otherwise float32."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Compute in float32 even under autocast: what is carried from step to step must not depend on rounding."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
