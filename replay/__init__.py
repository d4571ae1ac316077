"""What is remembered: rings of transitions, rollouts, and the types that cross the rooms."""

from typing import TYPE_CHECKING, Any

from replay.rollout import Episodes, Rollouts
from replay.types import Batch, Decision, Five, Rollout, Transition, Update

if TYPE_CHECKING:
    from replay.ring import Ring

__all__ = ["Batch", "Decision", "Episodes", "Five", "Ring", "Rollout", "Rollouts", "Transition", "Update"]


def __getattr__(name: str) -> Any:
    """Import the ring, and with it torch, only when it is asked for."""
    if name == "Ring":
        from replay.ring import Ring

        return Ring
    raise AttributeError(f"module 'replay' has no attribute {name!r}")
