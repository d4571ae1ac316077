"""The command: each case in turn, one line with its figures; the exit code is 1 if any failed."""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from agents.run import guarded
from runs.config import Parser, pick
from tests.faults import damage, disk, kills, matrix, signals

Case = tuple[str, Callable[[Path], str]]  # a name, and what to do in a folder of its own


def kill_cases(amount: float, seed: int) -> Iterator[Case]:
    """First, because they need a process without threads."""
    count = max(int(100 * amount), 1)
    yield f"{count} SIGKILLs at random", lambda folder: kills.check(folder, count, seed)


def matrix_cases(amount: float, seed: int) -> Iterator[Case]:
    """The whole table, or a part of it."""
    cases = matrix.cases()
    for number in range(0, len(cases), max(round(1 / amount), 1)):
        yield str(cases[number]), partial(matrix.check, cases[number], seed=seed + number)


def damage_cases(amount: float, seed: int) -> Iterator[Case]:
    """One damaged run, in many ways."""
    fuzz, logs = max(int(500 * amount), 20), max(int(200 * amount), 10)
    yield (
        "damaged checkpoints",
        lambda folder: damage.check(damage.source(folder / "run"), folder, fuzz, seed),
    )
    yield "shared files", lambda folder: damage.check_shared(damage.source(folder / "run"), folder)
    yield "damaged logs", lambda folder: damage.check_run_files(folder, logs, seed)
    yield "pickle bombs", lambda folder: damage.check_bombs(damage.source(folder / "run"), folder)


def disk_cases(amount: float, seed: int) -> Iterator[Case]:
    """A disk that refuses in all its ways."""
    for size in (0, 100, 2_000):
        yield f"files of at most {size} bytes", partial(disk.check_limit, size=size)
    yield "full disk", disk.check_full
    yield "read-only folders", disk.check_read_only


def signal_cases(amount: float, seed: int) -> Iterator[Case]:
    """Signals at every file that a save forces onto the disk."""
    places = range(0, signals.PLACES, max(round(1 / amount), 1))
    yield "signals in a save", partial(signals.check_all, places=places)


PARTS = {
    "kills": kill_cases,
    "matrix": matrix_cases,
    "damage": damage_cases,
    "disk": disk_cases,
    "signals": signal_cases,
}


def main(arguments: list[str]) -> int:
    """Run the parts that are asked for; all without a word."""
    parser = Parser(prog="python -m tests.faults", description="What can happen to a run, done to it.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (default 0)")
    parser.add_argument(
        "--amount", type=float, default=1.0, metavar="X", help="share of the cases (default 1)"
    )
    given = parser.read(arguments)
    failed = 0
    for name in given.get("parts") or PARTS:
        for title, case in pick("part", name, PARTS)(given["amount"], given["seed"]):
            failed += not passed(f"{name}: {title}", case)
    print(f"{failed} failed" if failed else "all passed")
    return 1 if failed else 0


def passed(title: str, case: Callable[[Path], str]) -> bool:
    """Do one case in a folder of its own and print its line."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        try:
            figures, good = case(Path(folder)), True
        except Exception:
            figures, good = f"FAILED\n{traceback.format_exc()}", False
    print(f"{title}: {figures} ({time.perf_counter() - begun:.0f} s)", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
