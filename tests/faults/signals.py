"""Signals during a save: one lets it finish, two end at once; neither costs more than that save."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from agents import train
from runs.disk import PARTIAL
from tests.faults.tools import CARTPOLE, latest, quiet, resumed
from tests.tools import assert_same_run

SETTINGS = {**CARTPOLE, "steps": 200}
SAVE = 128  # the checkpoint that is disturbed
PLACES = 30  # calls of fsync in a save, and a few more


@contextlib.contextmanager
def signals(number: int, count: int, place: int) -> Iterator[list[int]]:
    """Send this process `count` signals before the fsync of that place in the save; what was sent."""
    sync, sent, calls = os.fsync, list[int](), iter(range(1 << 30))
    from runs import checkpoint

    save = checkpoint.save
    active = [False]

    def saving(folder: Path, step: int, *rest: object) -> None:
        active[0] = step == SAVE and not sent
        try:
            save(folder, step, *rest)  # type: ignore[arg-type]
        finally:
            active[0] = False

    def syncing(handle: int) -> None:
        if active[0] and next(calls) == place:
            for _ in range(count):
                sent.append(number)
                os.kill(os.getpid(), number)
        sync(handle)

    with mock.patch.object(checkpoint, "save", saving), mock.patch.object(os, "fsync", syncing):
        yield sent


def check(whole: Path, folder: Path, number: int, count: int, place: int) -> bool:
    """Disturb a save, go on, compare with the undisturbed run; False if a save has no such place."""
    result = None
    with signals(number, count, place) as sent:
        try:
            result, _ = quiet(train, "dqn", "CartPole-v1", run=folder, **SETTINGS)
        except KeyboardInterrupt:
            assert count == 2
    if not sent:
        return False
    if count == 1:
        assert result is not None and result.signal == number and result.saved == SAVE == latest(folder)
    else:
        assert result is None and latest(folder) in (64, SAVE)
    assert not [path for path in folder.rglob("*") if path.name.startswith(PARTIAL)]
    resumed(folder)
    assert_same_run(whole, folder)
    return True


def check_all(folder: Path, places: range) -> str:
    """Both signals, once and twice, at these places; the figures."""
    whole = folder / "whole"
    quiet(train, "dqn", "CartPole-v1", run=whole, **SETTINGS)
    done = 0
    for place in places:
        for number in (signal.SIGINT, signal.SIGTERM):
            for count in (1, 2):
                done += check(whole, folder / f"{place}-{number}-{count}", number, count, place)
    assert done >= 4
    return f"{done} saves disturbed by signals, final bits equal"
