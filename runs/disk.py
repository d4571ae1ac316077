"""Writing files so that a reader finds the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"  # what is still being written or being deleted; no reader looks at such names


def partial_name(path: Path) -> Path:
    """A fresh name beside `path` for what is to become `path`."""
    return path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut, where the system can do so."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes) -> None:
    """Replace the file at `path` by `content` in one step; on any failure the old file stays as it was."""
    aside = partial_name(path)
    try:
        with open(aside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # all is there, whether or not it would survive a power cut
        sync_folder(path.parent)


def json_text(value: Any) -> str:
    """Indented strict JSON: NaN and infinities become null, paths text, numpy and torch scalars numbers."""
    return json.dumps(_strict(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _strict(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if callable(getattr(value, "item", None)):  # numpy and torch scalars, without importing either
        return _strict(value.item())
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")
