"""What is remembered: rings of transitions, rollouts, and the types that cross the rooms."""

from typing import TYPE_CHECKING, Any

from replay.rollout import Episodes, Rollouts
from replay.types import Batch, Decision, Five, Rollout, Sequences, Transition, Update

if TYPE_CHECKING:
    from replay.ring import Ring
    from replay.sequence import SequenceRing

__all__ = [
    "Batch",
    "Decision",
    "Episodes",
    "Five",
    "Ring",
    "Rollout",
    "Rollouts",
    "SequenceRing",
    "Sequences",
    "Transition",
    "Update",
]


def __getattr__(name: str) -> Any:
    """Import the rings, and with them torch, only when one is asked for."""
    if name == "Ring":
        from replay.ring import Ring

        return Ring
    if name == "SequenceRing":
        from replay.sequence import SequenceRing

        return SequenceRing
    raise AttributeError(f"module 'replay' has no attribute {name!r}")
