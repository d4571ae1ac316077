"""The memoryless approach to sequences: a fixed number of the last observations, side by side."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from gymnasium import spaces
from torch import Tensor

from backbones.base import Backbone, State
from backbones.memory import EncoderKnob, ages, encode
from runs.config import Knob, check


class Window(Backbone):
    """The encodings of the last k observations of the episode, oldest first; 0 for those before its start.

        y_t = [e(o_{t-k+1}), ..., e(o_t)]

    State: the last k - 1 encodings (B, k - 1, E).
    Shapes: obs (B, *S) or (T, B, *S) -> (B, F) or (T, B, F), F = k E, E the width of the encoder.
    Source: the course notes, 5.1.
    """

    memory = True

    def __init__(
        self,
        observation: spaces.Space[Any] | tuple[int, ...],
        *,
        encoder: EncoderKnob = None,
        window: Annotated[int, Knob("observations that are seen together", low=1)] = 4,
        **knobs: Any,
    ) -> None:
        """With an encoder, and its `knobs` if it is given by name."""
        super().__init__()
        check(Window, {"window": window})
        self.encoder = encode(encoder, observation, knobs)
        self.window = window
        self.features = window * self.encoder.features

    def initial(self, n: int) -> State:
        """See `Backbone.initial`."""
        device = next(self.parameters()).device
        return (torch.zeros(n, self.window - 1, self.encoder.features, device=device),)

    def forward(self, obs: Any, state: State = (), first: Tensor | None = None) -> tuple[Tensor, State]:
        """See `Backbone.forward`."""
        x = self.encoder(obs)[0].float()
        if x.ndim == 2:
            y, state = self._slide(x[None], state, None if first is None else first[None])
            return y[0], state
        return self._slide(x, state, first)

    def maps(self, obs: Tensor, names: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Those of the encoder."""
        return self.encoder.maps(obs, names)

    def _slide(self, x: Tensor, state: State, first: Tensor | None) -> tuple[Tensor, State]:
        (past,) = state or self.initial(x.shape[1])
        k = self.window
        seen = torch.cat([past.transpose(0, 1), x]).unfold(0, k, 1)  # (T, B, E, k)
        if first is not None:
            back = torch.arange(k - 1, -1, -1, device=x.device)
            seen = seen.masked_fill((back > ages(first, k)[..., None])[:, :, None], 0)
        return seen.transpose(2, 3).flatten(2), (seen[-1, ..., 1:].transpose(1, 2),)
