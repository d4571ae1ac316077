"""SIGKILL at random instants of one run, again and again; each time it is resumed.

Loading torch takes seconds, so the processes that are killed are copies of one that has loaded everything and has
started no thread yet.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from agents import resume, train
from runs import Run, checkpoint
from runs.disk import PARTIAL
from tests.faults.tools import latest
from tests.tools import assert_same_run

SETTINGS: dict[str, Any] = dict(
    env="CartPole-v1",
    preset="none",
    num_envs=4,
    hidden=(32,),
    learning_starts=200,
    batch=16,
    train_every=8,
    target_every=50,
    n_step=3,
    alpha=0.6,
    capacity=12_000,  # two blocks of the replay that are shared between checkpoints, later five
    log_every=130,  # no divisor of where it is saved: metrics wait for their row in the checkpoint
    eval_every=2_000,
    eval_episodes=2,
    final_episodes=2,
    checkpoint_every=200,
    threads=1,
    compile="off",
    precision="fp32",
    video=False,
)
STEPS_PER_KILL = 300
SHARE = (
    0.2  # of the run that is about done when all kills are; little, for the machine may get faster meanwhile
)
STARTS = 0.3  # of the kills, while the run starts; the others come after


def check(folder: Path, kills: int, seed: int) -> str:
    """Kill and resume one run `kills` times; the figures. Raises: AssertionError if its end differs."""
    rng, steps = np.random.default_rng(seed), STEPS_PER_KILL * max(kills, 5)
    whole, other, log = folder / "whole", folder / "other", folder / "output.txt"
    settings = {**SETTINGS, "steps": steps}
    begun = time.perf_counter()
    process = forked(lambda: train("dqn", run=whole, **settings), log)
    begins(whole, 0, log)
    loading = time.perf_counter() - begun
    assert wait(process) == 0, log.read_text()
    learning = time.perf_counter() - begun - loading

    most = (
        2 * learning * SHARE / kills / (1 - STARTS)
    )  # seconds of a life, so that the run lasts for all kills
    saving = early = 0
    for number in range(kills):
        before = written(other)
        process = forked(lambda: life(other, settings), log)
        if rng.random() < STARTS:
            time.sleep(float(rng.uniform(0, loading)))
        else:
            begins(other, before, log)
            time.sleep(float(rng.uniform(0, most)))
        os.kill(process, signal.SIGKILL)
        assert wait(process) == -signal.SIGKILL, f"ended before kill {number + 1}:\n{log.read_text()[-3000:]}"
        parent = other / "checkpoints"
        saving += any(each.name.startswith(PARTIAL) for each in [*entries(other), *entries(parent)])
        early += not checkpoint.steps(parent)
        if checkpoint.steps(parent):
            latest(other)  # whatever is visible is whole
    reached = latest(other) if checkpoint.steps(other / "checkpoints") else 0
    starting = kills - len(Run.open(other).origin.get("resumed", []))
    assert wait(forked(lambda: life(other, settings), log)) == 0, log.read_text()[-3000:]
    assert_same_run(whole, other)
    return (
        f"{kills} kills in {steps:,} steps, {saving} inside a save, {starting} while starting, {early} before the "
        f"first checkpoint, the last one after step {reached:,}; final bits equal"
    )


def written(folder: Path) -> int:
    """When config.json was written, which is the last thing before a run begins to train; 0 for never."""
    return (folder / "config.json").stat().st_mtime_ns if (folder / "config.json").exists() else 0


def begins(folder: Path, before: int, log: Path) -> None:
    """Wait until the run was begun or resumed."""
    deadline = time.monotonic() + 300
    while written(folder) == before:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.001)


def life(folder: Path, settings: dict[str, Any]) -> None:
    """Begin the run, or go on with it."""
    if (folder / "config.json").exists():
        resume(folder)
    else:
        train("dqn", run=folder, **settings)


def entries(folder: Path) -> list[Path]:
    """What is in a folder, if it is there."""
    return list(folder.iterdir()) if folder.is_dir() else []


def forked(work: Callable[[], object], log: Path) -> int:
    """Do `work` in a copy of this process, which ends with 0 if it succeeds; its output goes to `log`."""
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int) -> int:
    """The exit code of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
