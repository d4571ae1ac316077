"""Streams of random numbers as arrays, for checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np


def pack(rng: np.random.Generator) -> np.ndarray:
    """The state of a PCG64 generator as (6,) uint64."""
    state: Any = rng.bit_generator.state
    words = [state["state"][name] >> shift & (2**64 - 1) for name in ("state", "inc") for shift in (64, 0)]
    return np.array([*words, state["has_uint32"], state["uinteger"]], np.uint64)


def unpack(rng: np.random.Generator, packed: np.ndarray) -> None:
    """Give a generator back the state that `pack` took."""
    high, low, inc_high, inc_low, has, left = (int(word) for word in packed)
    rng.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": high << 64 | low, "inc": inc_high << 64 | inc_low},
        "has_uint32": has,
        "uinteger": left,
    }
