"""What the nets with memory share: the encoder below them, and how old each step's episode is."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from gymnasium import spaces
from torch import Tensor

from backbones import BACKBONES, FEEDFORWARD, build, default, load
from backbones.base import Backbone
from runs.config import Knob, UserError, check, pick

EncoderKnob = Annotated[
    str | Backbone | None,
    Knob("net below the memory; chosen by the observation", choices=FEEDFORWARD),
]


def encode(
    encoder: str | Backbone | None, observation: spaces.Space[Any] | tuple[int, ...], knobs: dict[str, Any]
) -> Backbone:
    """The encoder: an instance as it is, a name with its knobs, None by what the observation holds.

    Raises: UserError if it has a memory of its own, for an unknown name, and for a knob that it lacks.
    """
    name = default(observation) if encoder is None else encoder
    if isinstance(name, str):
        pick("encoder", name, {known: BACKBONES[known] for known in FEEDFORWARD})
        check(load(name), knobs)
    elif knobs:
        raise UserError(
            f"{', '.join(knobs)} belongs to the encoder object: give it to {type(name).__name__}(...)"
        )
    net = build(name, observation, **knobs)
    if net.memory:
        raise UserError(f"the encoder below a memory must be feed-forward, got {type(net).__name__}")
    return net


def ages(first: Tensor, before: Tensor | int) -> Tensor:
    """How many steps ago the episode of each step began.

    Shapes: first (T, B) bool; before (B,), the age at t = 0 of an episode that does not begin there -> (T, B).
    """
    t = torch.arange(len(first), device=first.device)[:, None]
    return t - torch.where(first, t, -before).cummax(0).values
