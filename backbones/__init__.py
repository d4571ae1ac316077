"""Networks from observations to features, and models built on them; a library of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gymnasium import spaces

    from backbones.base import Backbone
    from backbones.cnn import CNN
    from backbones.mlp import MLP
    from backbones.recurrent import GRU, LSTM, RNN
    from backbones.transformer import Transformer
    from backbones.window import Window

__all__ = [
    "BACKBONES",
    "CNN",
    "FEEDFORWARD",
    "GRU",
    "LSTM",
    "MEMORY",
    "MLP",
    "RNN",
    "Backbone",
    "Transformer",
    "Window",
    "build",
]

# name -> module and class; a table of names, so that listing the choices imports no torch
BACKBONES = {
    "mlp": ("backbones.mlp", "MLP"),
    "cnn": ("backbones.cnn", "CNN"),
    "window": ("backbones.window", "Window"),
    "rnn": ("backbones.recurrent", "RNN"),
    "gru": ("backbones.recurrent", "GRU"),
    "lstm": ("backbones.recurrent", "LSTM"),
    "transformer": ("backbones.transformer", "Transformer"),
}
FEEDFORWARD = ("mlp", "cnn")  # what can be the encoder below a memory
MEMORY = tuple(name for name in BACKBONES if name not in FEEDFORWARD)


def load(name: str) -> type[Backbone]:
    """The backbone class of that name; `UserError` with the nearest match if there is none."""
    from importlib import import_module

    from runs.config import pick

    module, attribute = pick("backbone", name, BACKBONES)
    return getattr(import_module(module), attribute)


def default(space: spaces.Space[Any] | tuple[int, ...]) -> str:
    """`cnn` where the observation holds an image, `mlp` elsewhere."""
    from backbones.obs import Encoder

    return "cnn" if Encoder(space).image else "mlp"


def build(backbone: str | Backbone, space: spaces.Space[Any] | tuple[int, ...], **knobs: Any) -> Backbone:
    """A backbone for observations of `space`: an instance as it is, a name with its knobs."""
    return load(backbone)(space, **knobs) if isinstance(backbone, str) else backbone  # type: ignore[call-arg]


def __getattr__(name: str) -> Any:
    """Import torch only when a network is asked for."""
    if name == "Backbone":
        from backbones.base import Backbone

        return Backbone
    for module, attribute in BACKBONES.values():
        if name == attribute:
            from importlib import import_module

            return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'backbones' has no attribute {name!r}")
