"""Networks from observations to features, and models built on them; a library of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gymnasium import spaces

    from backbones.base import Backbone
    from backbones.cnn import CNN
    from backbones.mlp import MLP

__all__ = ["BACKBONES", "CNN", "MLP", "Backbone", "build"]

# name -> module and class; a table of names, so that listing the choices imports no torch
BACKBONES = {"mlp": ("backbones.mlp", "MLP"), "cnn": ("backbones.cnn", "CNN")}


def load(name: str) -> type[Backbone]:
    """The backbone class of that name; `UserError` with the nearest match if there is none."""
    from importlib import import_module

    from runs.config import pick

    module, attribute = pick("backbone", name, BACKBONES)
    return getattr(import_module(module), attribute)


def default(space: spaces.Space[Any]) -> str:
    """`cnn` where the observation holds an image, `mlp` elsewhere."""
    from backbones.obs import Encoder

    return "cnn" if Encoder(space).image else "mlp"


def build(backbone: str | Backbone, space: spaces.Space[Any], **knobs: Any) -> Backbone:
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
