"""What is remembered: rings of transitions, and the types that cross the rooms."""

from replay.types import Batch, Decision, Transition, Update

__all__ = ["Batch", "Decision", "Ring", "Transition", "Update"]


def __getattr__(name: str) -> object:
    """Import the ring, and with it torch, only when it is asked for."""
    if name == "Ring":
        from replay.ring import Ring

        return Ring
    raise AttributeError(f"module 'replay' has no attribute {name!r}")
