"""What the fault tests share: quiet runs, hooks into the loop, damage to files, states compared."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from agents import resume, train
from agents.watch import Watch
from runs import checkpoint
from tests.tools import SMALL

CARTPOLE = {**SMALL, "hidden": (16,), "preset": "none", "alpha": 0.6}


class Killed(BaseException):
    """Stands for SIGKILL within this process: nothing is saved after it."""


def quiet(work: Callable[..., Any], *arguments: Any, **settings: Any) -> tuple[Any, list[str]]:
    """What `train` or `resume` gives, and the lines it said."""
    out: list[str] = []
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = work(*arguments, say=out.append, **settings)
    return result, out + printed.getvalue().splitlines()


@contextlib.contextmanager
def at(actions: dict[int, Callable[[], None]]) -> Iterator[None]:
    """Do something after steps of the loop: all that a step leaves behind is there already."""
    after = Watch.after

    def acting(self: Watch, before: int, step: int, *rest: Any) -> None:
        after(self, before, step, *rest)
        for due in [due for due in actions if before < due <= step]:
            actions[due]()

    with mock.patch.object(Watch, "after", acting):
        yield


def die() -> None:
    """For `at`."""
    raise Killed


def killed(folder: Path, step: int, **settings: Any) -> None:
    """A run that was killed after a step."""
    with contextlib.suppress(Killed), at({step: die}):
        quiet(train, "dqn", "CartPole-v1", run=folder, **settings)


def resumed(folder: Path) -> list[str]:
    """Go on with a run to its end; the lines it said."""
    result, said = quiet(resume, folder)
    assert result.summary["finished"]
    return said


def copied(source: Path, target: Path) -> Path:
    """A copy of a run or of its checkpoints; files with two names have two names there, too."""
    seen: dict[int, str] = {}

    def copy(one: str, other: str) -> None:
        number = os.stat(one).st_ino
        if number in seen:
            os.link(seen[number], other)
        else:
            shutil.copy2(one, other)
            seen[number] = other

    shutil.copytree(source, target, copy_function=copy)
    return target


def damage(rng: np.random.Generator, path: Path, shared: bool) -> str:
    """Change one byte, or cut off some; `shared`: under all names of the file. Says what was done."""
    content = bytearray(path.read_bytes())
    if rng.random() < 0.5 or not content:
        done = f"cut to {(size := int(rng.integers(max(len(content), 1))))} of {len(content)} bytes"
        content = content[:size]
    else:
        place = int(rng.integers(len(content)))
        old = content[place]
        # a changed bit, or another digit, which a text survives better
        new = old ^ 1 << int(rng.integers(8)) if rng.random() < 0.5 else ord("0") + int(rng.integers(10))
        content[place] = new if new != old else old ^ 0xFF
        done = f"byte {place}: {old} -> {content[place]}"
    put(path, bytes(content), shared)
    return f"{path.name} {done}"


def put(path: Path, content: bytes, shared: bool) -> None:
    """Give a file another content; not `shared`: under this name only."""
    if not shared:
        path.unlink()
    path.write_bytes(content)


def same_state(one: Any, other: Any) -> bool:
    """Whether two states are equal, bit by bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[name], other[name]) for name in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


def latest(folder: Path) -> int:
    """The step of the newest checkpoint of a run, which must be whole."""

    def fail(line: str) -> None:
        raise AssertionError(line)

    return checkpoint.load_latest(folder / "checkpoints", fail)[0]
