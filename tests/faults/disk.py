"""A disk that takes nothing for a while: the run goes on, nothing is lost, and in the end nothing differs."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from agents import train
from tests.faults.tools import CARTPOLE, at, latest, quiet
from tests.tools import assert_same_run, rows

SETTINGS = {**CARTPOLE, "steps": 400, "capacity": 4_000, "eval_every": 100, "eval_episodes": 1}
CLOSED, OPENED = 70, 300  # steps; checkpoints are due at 64, 128, 192, 256, 320, 384 and the end


def check(folder: Path, refuse: Callable[[], None], admit: Callable[[], None], logs: bool = True) -> str:
    """Train with a disk that refuses from step 70 to 300; the figures. `logs`: whether it refuses rows, too."""
    kept: list[tuple[int, str]] = []
    other = folder / "other"

    def look() -> None:
        kept.append((latest(other), (other / "scores.csv").read_text()))
        admit()

    quiet(train, "dqn", "CartPole-v1", run=folder / "whole", **SETTINGS)
    try:
        with at({CLOSED: refuse, OPENED: look}):
            result, said = quiet(train, "dqn", "CartPole-v1", run=other, **SETTINGS)
    finally:
        admit()
    assert result.summary["finished"] and kept[0][0] == 64
    lost = [line for line in said if "failed" in line and "the last good one stays" in line]
    assert [f"step {step} failed" in line for step, line in zip((128, 192, 256), lost, strict=True)] == [
        True
    ] * 3
    told = [line for line in said if "the logs can" in line]
    assert len(told) == (2 if logs else 0), told
    assert kept[0][1].endswith("\n") and (
        kept[0][1].count("\n") < len(rows(other / "scores.csv")) or not logs
    )
    assert_same_run(folder / "whole", other)
    return (
        f"{len(lost)} checkpoints lost, the one before intact, rows of the logs all there, final bits equal"
    )


@contextlib.contextmanager
def size_limit() -> Iterator[Callable[[int], None]]:
    """Sets the largest size of a file that this process may write; beyond it the system answers with an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def check_limit(folder: Path, size: int) -> str:
    """With a limit on the size of files."""
    with size_limit() as limit:
        return check(folder, lambda: limit(size), lambda: limit(resource.RLIM_INFINITY))


def check_full(folder: Path) -> str:
    """On a small file system, filled to the last byte."""
    place = folder / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if subprocess.run(words, capture_output=True).returncode:
        return "skipped: this user may not mount"
    ballast = place / "ballast"

    def fill() -> None:
        with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)

    try:
        return check(place, fill, lambda: ballast.unlink(missing_ok=True))
    finally:
        subprocess.run(["umount", str(place)], check=True)


def check_read_only(folder: Path) -> str:
    """With folders in which nothing can be made; the logs, which are open, still take rows."""
    other = folder / "other"
    locked = [other, other / "checkpoints"]
    probe = folder / "probe"
    probe.mkdir()
    if os.geteuid() or subprocess.run(["chattr", "+i", str(probe)], capture_output=True).returncode:
        return "skipped: this user or file system has no immutable folders"
    subprocess.run(["chattr", "-i", str(probe)], check=True)

    def turn(sign: str) -> None:
        subprocess.run(["chattr", f"{sign}i", *map(str, locked)], check=True)

    return check(folder, lambda: turn("+"), lambda: turn("-"), logs=False)
