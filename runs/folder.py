"""The run folder: one place for everything that a training run leaves behind (described in README.md)."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runs.config import UserError, nearest, read_json
from runs.disk import PARTIAL, json_text, write_whole
from runs.log import Events, Table, cell, read_table
from runs.origin import origin

CONFIG = "config.json"
SCORES = ("step", "frames", "seconds", "return", "length")
EVALUATIONS = ("step", "mean", "std", "min", "max", "episodes", "seconds")
LOGS = "logs"  # group of a checkpoint: how many rows each log had
KEEP = 2  # checkpoints: the newest, and the one before in case the newest is damaged


class Run:
    """A run: `Run.create` starts one, `Run.open` reads one.

    `path` is its folder, `config` the resolved configuration, `origin` versions, commit, command and machine.
    A run that was opened can be read and summed up anew; logging to it is an error.
    """

    def __init__(self, path: Path, record: Mapping[str, Any], log: _Log | None) -> None:
        """For `create` and `open`."""
        self.path = path
        self.config: dict[str, Any] = dict(record["config"])
        self.origin = {name: value for name, value in record.items() if name != "config"}
        self._opened_log = log
        self._base: Path | None = None  # the newest checkpoint, whose unchanged files the next one shares

    @classmethod
    def create(
        cls, config: Mapping[str, Any], *, root: str | Path = "runs", path: str | Path | None = None
    ) -> Run:
        """Start a run in `root/<env>/<agent>/seed<seed>-<time>`, or in `path`, which must be new or empty.

        `config` must hold "env" and "agent", and should hold "seed". A folder with content is never touched.
        Raises: UserError if `path` is in use or the folder cannot be written.
        """
        record = {"config": dict(config), **origin()}
        try:
            folder = _claim(Path(path).expanduser()) if path is not None else _fresh(Path(root), config)
            with contextlib.ExitStack() as opened:
                lock = opened.enter_context(contextlib.closing(_Lock(folder)))
                if (folder / CONFIG).exists():  # of two commands given the same new --run, one is told here
                    raise UserError(_taken(path))
                write_whole(folder / CONFIG, json_text(record).encode())
                run = cls(folder, record, _Log(folder, lock))
                opened.pop_all()
            return run
        except OSError as error:
            raise UserError(f"cannot write a run to {path or root}: {error.strerror or error}") from error

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open the run in the folder `path` for reading.

        Raises: UserError if there is none; it names the runs below or the nearest name beside.
        """
        folder = Path(path).expanduser()
        if not (folder / CONFIG).is_file():
            raise UserError(_no_run(folder))
        record = read_json(folder / CONFIG)
        if not isinstance(record.get("config"), dict):
            raise UserError(f"{folder / CONFIG} does not describe a run: it has no 'config'")
        # JSON has no tuples; configurations have no lists
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in record["config"].items()}
        return cls(folder, {**record, "config": values}, None)

    @classmethod
    def resume(
        cls, path: str | Path, say: Callable[[str], None] = print
    ) -> tuple[Run, int, dict[str, Any] | None]:
        """Open a run to go on with it: the run, the step it stands at, and the state saved there.

        The logs are cut to that step. Without any checkpoint the run begins anew: step 0, state None.
        Checkpoints that are damaged are named through `say` and renamed.
        Raises: UserError if there is no run, another process writes it, or none of its checkpoints is usable.
        """
        from runs import checkpoint

        run = cls.open(path)
        lock = _Lock(run.path)
        parent, step, state = run.path / "checkpoints", 0, None
        try:
            for folder in (run.path, parent):
                checkpoint.tidy(folder)
            rows: dict[str, int] = {}
            if checkpoint.steps(parent):
                step, state = checkpoint.load_latest(parent, say)
                rows = state.pop(LOGS, {})
                if run.finished == step:
                    rows = {}  # the last evaluation came after the checkpoint, and stays
                run._base = parent / str(step)
                for bad in checkpoint.set_aside(parent, step):
                    say(f"kept the unusable checkpoint as {bad}")
            run._opened_log = _Log(run.path, lock, None if state is None else step, rows)
            if run._opened_log.events.lost:
                say(
                    f"{run._opened_log.events.path} is damaged: {run._opened_log.events.lost} of its records are "
                    "lost to TensorBoard; the tables have them"
                )
            now = origin()
            back = {"step": step, **{name: now[name] for name in ("started", "commit", "versions")}}
            run.origin["resumed"] = [*run.origin.get("resumed", []), back]
            run.configure({})
        except BaseException as error:
            lock.close()
            if isinstance(error, OSError):
                raise UserError(f"cannot write to {run.path}: {error.strerror or error}") from error
            raise
        return run, step, state

    def differences(self) -> list[str]:
        """What is not as it was when the run began, and can change bits: versions, source and machine."""
        now = origin()
        versions = [
            (name, before, now["versions"].get(name))
            for name, before in self.origin.get("versions", {}).items()
        ]
        machine = self.origin.get("machine", {})
        facts = [*versions, ("source", self.origin.get("commit"), now["commit"])]
        facts += [(name, machine.get(name), now["machine"][name]) for name in ("cpu", "system")]
        return [f"{name} was {before}, is {after}" for name, before, after in facts if before != after]

    @property
    def finished(self) -> int | None:
        """The step at which the run came to its end, by its summary; None if it has not."""
        try:
            facts = read_json(self.path / "summary.json")
        except UserError:
            return None
        return facts.get("steps") if facts.get("finished") is True else None

    @property
    def _log(self) -> _Log:
        if self._opened_log is None:
            raise ValueError(f"the run {self.path} is not open for writing")
        return self._opened_log

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Change settings of the run, in config.json too."""
        self.config.update(changes)
        write_whole(self.path / CONFIG, json_text({"config": self.config, **self.origin}).encode())

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one row of metrics (numbers or 0-d tensors, which are read only here) to CSV and TensorBoard.

        Raises: ValueError if `step` goes back or a name is not `group/name` text.
        """
        log, values = self._log, {name: float(value) for name, value in metrics.items()}
        log.metrics.append(step, {name: cell(value) for name, value in values.items()})
        log.events.scalars(step, values)

    def episodes(
        self, step: int, frames: int, seconds: float, returns: Sequence[float], lengths: Sequence[int]
    ) -> None:
        """Write the training episodes that finished at a step: a row for each, in one write; an event of their means.

        Shapes: returns, lengths (E,), at least one.
        Units: `seconds` since the start, `returns` in unclipped reward, `lengths` in steps.
        """
        log, begin = self._log, f"{frames},{round(seconds, 3)}"
        pairs = zip(returns, lengths, strict=True)
        log.scores.extend(step, [f"{begin},{float(return_)},{length}" for return_, length in pairs])
        mean = {"episode/return": sum(returns) / len(returns), "episode/length": sum(lengths) / len(lengths)}
        log.events.scalars(step, mean)

    def evaluation(self, step: int, returns: Any, seconds: float) -> bool:
        """Write one greedy evaluation; True if its mean is the best of the run so far.

        Shapes: returns (episodes,).  Units: unclipped reward; `seconds` since the start.
        """
        values = np.asarray(returns, dtype=np.float64)
        if values.ndim != 1 or not values.size:
            raise ValueError(f"an evaluation needs returns of shape (episodes,), got {values.shape}")
        log = self._log
        facts = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
        cells = {name: str(float(value)) for name, value in facts.items()}
        log.evaluations.append(
            step, {**cells, "episodes": str(values.size), "seconds": str(round(seconds, 3))}
        )
        log.events.scalars(step, {f"eval/{name}": float(value) for name, value in facts.items()})
        best = log.best is None or bool(facts["mean"] > log.best)
        if best and np.isfinite(facts["mean"]):
            log.best = float(facts["mean"])
            return True
        return False

    def histogram(self, step: int, name: str, values: Any) -> None:
        """Write the distribution of an array to TensorBoard; entries that are not finite are left out."""
        self._log.events.histogram(step, name, np.asarray(values))

    def video(self, step: int, name: str, frames: np.ndarray, fps: float) -> None:
        """Write a film to TensorBoard as an animated GIF.

        Shapes: frames (T, H, W, 3) uint8.
        """
        from runs.video import gif_bytes

        log = self._log
        height, width = frames[0].shape[:2]
        log.events.image(step, name, gif_bytes(frames, fps), height, width)

    def save(self, step: int, state: dict[str, Any], unchanged: Collection[str] = ()) -> Path:
        """Save a checkpoint, complete or not at all; keep the newest two. Return its folder.

        `state`: groups; one of tensors, one of arrays, one that JSON can hold (see README.md). Arrays named in
        `unchanged` ("group/name") are as they were in the last checkpoint, whose files are then shared.
        Raises: OSError if the disk refuses; the checkpoint before stays intact.
        """
        from runs import checkpoint

        if LOGS in state:
            raise ValueError(f"a checkpoint of a run has a group {LOGS!r} of its own")
        self.flush()
        parent = self.path / "checkpoints"
        folder = parent / str(int(step))
        checkpoint.save(folder, int(step), {**state, LOGS: self._log.rows}, self._base, unchanged)
        self._base = folder
        checkpoint.prune(parent, KEEP)
        return folder

    def save_best(self, state: dict[str, Any], step: int | None = None) -> Path:
        """Save `state` as that of `step` (default: of the last evaluation), in place of the best before.

        Returns its folder.
        """
        from runs import checkpoint

        step = self._log.evaluations.last_step if step is None else step
        checkpoint.save(self.path / "best", step, state)
        return self.path / "best"

    def load(
        self, which: str | int = "latest", *, say: Callable[[str], None] | None = None
    ) -> dict[str, Any]:
        """Read a saved state: "best", "latest" or the step of a checkpoint. Sizes and hashes are verified.

        A damaged latest checkpoint is named through `say` (default: standard error); the one before is taken.
        Raises: UserError if there is nothing usable.
        """
        state = self._load(which, say or _warn)
        state.pop(LOGS, None)
        return state

    def _load(self, which: str | int, say: Callable[[str], None]) -> dict[str, Any]:
        from runs import checkpoint

        parent = self.path / "checkpoints"
        if which == "latest":
            return checkpoint.load_latest(parent, say)[1]
        steps = checkpoint.steps(parent)
        if which != "best" and which not in steps:
            allowed = ", ".join(["best", "latest", *map(str, steps)])
            raise UserError(f"no checkpoint {which!r} in {self.path}. Allowed: {allowed}.")
        try:
            if which == "best":
                return checkpoint.load(self.path / "best")
            return checkpoint.load(parent / str(which), int(which))
        except checkpoint.CorruptCheckpoint as error:
            if which == "best" and not (self.path / "best").exists():
                raise UserError(f"no best checkpoint in {self.path}: no evaluation has finished") from None
            raise UserError(str(error)) from error

    def summary(self, facts: Mapping[str, Any]) -> None:
        """Write summary.json in one step; numbers that are not finite become null."""
        write_whole(self.path / "summary.json", json_text(dict(facts)).encode())

    def table(self, name: str) -> dict[str, np.ndarray]:
        """Read "scores", "metrics" or "evaluations" as columns, also while the run goes on.

        Shapes: column -> (rows,) float64, empty cells NaN.
        """
        return read_table(self.path / f"{name}.csv")

    @property
    def refused(self) -> OSError | None:
        """What the disk answers to rows of the logs, which therefore wait in memory; None if none does."""
        return next((part.refused for part in self._log.parts if part.refused is not None), None)

    def flush(self) -> None:
        """Force all logs onto the disk.

        Raises: OSError if rows still have to wait in memory.
        """
        for part in self._log.parts:
            part.flush()

    def close(self) -> None:
        """Flush and close the logs; later calls do nothing.

        Raises: OSError if rows that waited in memory are lost because the disk took none to the end.
        """
        if self._opened_log is not None:
            self._opened_log.close()

    def __enter__(self) -> Run:
        """Return the run itself."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close the logs."""
        # what went wrong first is what the user should read
        with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():
            self.close()


class _Log:
    """What a run writes to while it goes on; `after` a step, and `rows` by log, to go on with what is there."""

    def __init__(
        self, folder: Path, lock: _Lock, after: int | None = None, rows: Mapping[str, int] | None = None
    ) -> None:
        rows = rows or {}

        def table(name: str, columns: Sequence[str]) -> Table:
            path = folder / f"{name}.csv"
            if after is not None:
                return Table.reopen(path, columns, after, rows.get(name))
            path.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
            return Table(path, columns)

        with contextlib.ExitStack() as opened:
            self.scores = opened.enter_context(contextlib.closing(table("scores", SCORES)))
            self.metrics = opened.enter_context(contextlib.closing(table("metrics", ("step",))))
            self.evaluations = opened.enter_context(contextlib.closing(table("evaluations", EVALUATIONS)))
            self.events = opened.enter_context(contextlib.closing(Events(folder, after, rows.get("events"))))
            opened.pop_all()  # a file that cannot be continued does not leave the others open
        self.lock, self.parts = lock, (self.scores, self.metrics, self.evaluations, self.events)
        means = read_table(folder / "evaluations.csv").get("mean", np.zeros(0))
        means = means[np.isfinite(means)]
        self.best: float | None = float(means.max()) if means.size else None

    @property
    def rows(self) -> dict[str, int]:
        """How long each log is."""
        tables = {"scores": self.scores, "metrics": self.metrics, "evaluations": self.evaluations}
        return {**{name: table.rows for name, table in tables.items()}, "events": self.events.records}

    def close(self) -> None:
        """Flush and close everything, and let other processes write."""
        with contextlib.ExitStack() as stack:  # one that fails does not leave the others open
            for part in (self.lock, *self.parts):
                stack.callback(part.close)


class _Lock:
    """One process at a time writes a run; the lock ends with the process at the latest."""

    def __init__(self, folder: Path) -> None:
        self._handle: int | None = None
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self._handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(f"{folder} is being written by another process") from None
        except OSError:
            pass  # some network file systems lock no folders

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def _claim(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise UserError(f"cannot write a run to {path}: it is a file; choose a folder for --run")
    path.mkdir(parents=True, exist_ok=True)
    if (path / CONFIG).exists():
        raise UserError(_taken(path))
    if any(not entry.name.startswith(PARTIAL) for entry in path.iterdir()):
        raise UserError(f"{path} is not empty and holds no run; choose a new or empty folder for --run")
    return path


def _taken(path: object) -> str:
    return f"{path} already holds a run; choose another --run or delete it"


def _fresh(root: Path, config: Mapping[str, Any]) -> Path:
    parent = root.expanduser() / _plain(config["env"]) / _plain(config["agent"])
    parent.mkdir(parents=True, exist_ok=True)
    name = f"seed{_plain(config.get('seed', 0))}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()  # fails if another process took the name in the same second
            return folder
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def _plain(name: Any) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", str(name)).lstrip(".") or "unnamed"


def _no_run(folder: Path) -> str:
    if folder.is_file():
        return f"no run at {folder}: it is a file, not a run folder"
    if not folder.is_dir():
        beside = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        return f"no run at {folder}: no such folder.{nearest(folder.name, beside)}"
    below = [found.parent for depth in ("*", "*/*", "*/*/*") for found in folder.glob(f"{depth}/{CONFIG}")]
    if not below:
        return f"no run at {folder}: it has no {CONFIG}"
    newest = sorted(below, key=lambda found: (found / CONFIG).stat().st_mtime, reverse=True)
    if len(newest) == 1:
        return f"no run at {folder} itself. Did you mean {str(newest[0])!r}?"
    shown = ", ".join(map(str, newest[:3])) + (", ..." if len(newest) > 3 else "")
    return f"no run at {folder} itself, but {len(newest)} below it; newest first: {shown}"
