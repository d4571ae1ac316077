"""The logs of a run: CSV tables and a TensorBoard event file.

Every row and event goes to the operating system as soon as it is logged, so a killed process loses none, and it goes
there whole or not at all; `flush` also forces them onto the disk. What a full disk refuses waits in memory, in order,
and is written before anything that comes later.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runs.config import UserError
from runs.disk import write_whole

_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_./-]*")


class _Whole:
    """A file that grows by whole records."""

    def __init__(self, path: Path, mode: str) -> None:
        self._file = open(path, mode, buffering=0)
        self._end = self._file.seek(0, os.SEEK_END)

    def append(self, record: bytes) -> None:
        """Write all of `record`; on any failure the file is as it was."""
        rest = memoryview(record)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]  # a disk that becomes full takes a part first
        except BaseException:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            self._file.seek(self._end)
            raise
        self._end += len(record)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return self._file.closed


class _Queue:
    """Records on their way to `put`; those that the disk refuses wait until it takes them."""

    def __init__(self, path: Path, put: Callable[[Any], None]) -> None:
        self.refused: OSError | None = None  # why records wait
        self._path, self._put, self._waiting = path, put, deque[Any]()

    def add(self, record: Any) -> None:
        self._waiting.append(record)
        self._push()

    def drain(self) -> None:
        """Raises: OSError if records still have to wait."""
        self._push()
        if self.refused is not None:
            why = f"{self.refused.strerror} ({len(self._waiting)} of its records wait in memory)"
            raise OSError(self.refused.errno, why, str(self._path))

    def _push(self) -> None:
        try:
            while self._waiting:
                self._put(self._waiting[0])
                self._waiting.popleft()
            self.refused = None
        except OSError as error:
            self.refused = error


class Table:
    """A CSV file that grows by whole rows; columns can be added while it grows.

    A new column rewrites the file aside with the longer header, older rows padded by empty cells, and renames
    it over the old one: columns come in the first rows of a run, while the file is small.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Create the file with its header.

        Raises: FileExistsError if there is one already.
        """
        self._begin(path, columns, _Whole(path, "xb"))
        self._file.append(_line(self._columns))

    def _begin(self, path: Path, columns: Sequence[str], file: _Whole) -> None:
        self.path, self._columns, self._file = path, list(columns), file
        self.last_step = self.rows = 0
        self._queue = _Queue(path, self._put)

    @classmethod
    def reopen(cls, path: Path, columns: Sequence[str], step: int, rows: int | None = None) -> Table:
        """Continue the file after its first `rows` rows, or after those up to `step`; the rest is cut off.

        Raises: UserError if the file is missing, damaged before that point, or not of these first `columns`.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot continue {path}: {error.strerror or error}") from None
        header, *lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True) or [b""]
        names = header.decode(errors="replace").rstrip("\n").split(",")
        if names[: len(columns)] != list(columns):
            raise UserError(f"cannot continue {path}: its columns are not {','.join(columns)}")
        kept, last = 0, 0
        for number, line in enumerate(lines[:rows], 2):
            try:
                at = int(_numbers(line, len(names))[0])
            except (ValueError, OverflowError):
                raise UserError(f"cannot continue {path}: line {number} is damaged: {line[:40]!r}") from None
            if rows is None and at > step:
                break
            if not last <= at <= step:
                raise UserError(f"cannot continue {path}: line {number} is of step {at} after step {last}")
            kept, last = kept + 1, at
        if rows is not None and kept < rows:
            raise UserError(f"cannot continue {path}: of its {rows} rows at step {step}, {kept} are left")
        os.truncate(path, len(header) + sum(map(len, lines[:kept])))
        table = cls.__new__(cls)
        table._begin(path, names, _Whole(path, "r+b"))
        table.last_step, table.rows = last, kept
        return table

    @property
    def refused(self) -> OSError | None:
        """Why rows wait in memory; None if none does."""
        return self._queue.refused

    def check_step(self, step: int) -> None:
        """Raise ValueError if `step` lies before the row written last, or is negative."""
        if step < self.last_step:
            raise ValueError(f"{self.path.name}: steps must not go back, got {step} after {self.last_step}")

    def extend(self, step: int, rows: Iterable[str]) -> None:
        """Write rows of one step, each the text of all its cells after the step, in one write.

        Raises: ValueError if `step` goes back.
        """
        self.check_step(step)
        lines = [f"{step},{row}\n" for row in rows]
        self.last_step, self.rows = step, self.rows + len(lines)
        self._queue.add("".join(lines).encode())

    def append(self, step: int, cells: Mapping[str, str]) -> None:
        """Write one row; a column without a cell stays empty.

        Raises: ValueError if `step` goes back or CSV or TensorBoard would garble the name of a new column.
        """
        self.check_step(step)
        for name in cells:
            if name not in self._columns and not _NAME.fullmatch(name):
                raise ValueError(f"a metric is named with letters, digits and _./-, got {name!r}")
        self.last_step, self.rows = step, self.rows + 1
        self._queue.add({"step": str(step), **cells})

    def _put(self, row: dict[str, str] | bytes) -> None:
        if isinstance(row, bytes):
            self._file.append(row)
            return
        fresh = [name for name in row if name not in self._columns]
        if fresh:
            self._widen(fresh)
        self._file.append(_line([row.get(name, "") for name in self._columns]))

    def _widen(self, names: list[str]) -> None:
        _, *rows = self.path.read_bytes().splitlines()
        empty = b"," * len(names) + b"\n"
        write_whole(self.path, _line([*self._columns, *names]) + b"".join(row + empty for row in rows))
        self._columns += names
        self._file.close()
        self._file = _Whole(self.path, "r+b")

    def flush(self) -> None:
        """Force the rows onto the disk.

        Raises: OSError if the disk takes none.
        """
        self._queue.drain()
        self._file.sync()

    def close(self) -> None:
        """Flush and close; later calls do nothing.

        Raises: OSError if rows are lost because the disk took none to the end.
        """
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()


def _line(cells: Sequence[str]) -> bytes:
    return (",".join(cells) + "\n").encode()


def _numbers(line: bytes, width: int) -> list[float]:
    """The cells of a row; ValueError if it is none, for whatever reason."""
    cells = line.decode("ascii").rstrip("\n").split(",")
    if len(cells) != width:
        raise ValueError(f"{len(cells)} cells instead of {width}")
    return [float(cell) if cell else np.nan for cell in cells]


def read_table(path: Path) -> dict[str, np.ndarray]:
    """Read a CSV of numbers, also one that is being written: an unfinished last line is left out.

    Shapes: column name -> (rows,) float64; an empty cell is NaN. A missing file has no columns.
    Raises: UserError naming the first line that is damaged.
    """
    if not path.is_file():
        return {}
    *lines, _ = path.read_bytes().split(b"\n")
    if not lines:
        return {}
    header = lines[0].decode(errors="replace").split(",")
    numbers = []
    for number, line in enumerate(lines[1:], 2):
        try:
            numbers.append(_numbers(line, len(header)))
        except ValueError:
            raise UserError(f"{path}: line {number} is damaged: {line[:40]!r}") from None
    columns = np.array(numbers, dtype=np.float64).reshape(len(numbers), len(header)).T
    return dict(zip(header, columns, strict=True))


def cell(value: float) -> str:
    """A number at float32 precision in its shortest spelling: what TensorBoard stores, digit for digit."""
    with np.errstate(over="ignore"):
        return str(np.float32(value))


class Events:
    """A TensorBoard event file, written without TensorBoard's background thread (envs may fork)."""

    def __init__(self, folder: Path, after: int | None = None, records: int | None = None) -> None:
        """Create the file, named by time and process; or continue the one that is there `after` a step.

        Only the first `records` records are kept then, and those up to the step; `lost` counts the ones among
        them that damage made unreadable.
        """
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        protos: Any = event_pb2  # generated at import, unknown to the type checker
        self._event, self._proto, self._record = protos.Event, summary_pb2, RecordWriter
        there = sorted(folder.glob("events.out.tfevents.*")) if after is not None else []
        self.records = self.lost = 0
        if there:
            self.path = there[-1]
            os.truncate(self.path, self._end(self.path.read_bytes(), after or 0, records))
        else:
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()  # of a run that was killed before its first checkpoint
            self.path = folder / f"events.out.tfevents.{int(time.time()):010d}.{os.getpid()}"
        self._file = _Whole(self.path, "r+b" if there else "xb")
        self._queue = _Queue(self.path, self._file.append)
        if not self.records:
            self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))

    def _end(self, content: bytes, step: int, records: int | None) -> int:
        """Where the records to keep end: each is length (8 bytes), its sum (4), event, its sum (4)."""
        at = 0
        while at + 12 <= len(content) and self.records != records:
            end = at + 12 + int.from_bytes(content[at : at + 8], "little") + 4
            event = content[at + 12 : end - 4]
            if self._framed(event) != content[at:end]:  # TensorBoard reads no further than to a wrong sum
                break
            if self._event.FromString(event).step > step:
                break
            at, self.records = end, self.records + 1
        self.lost = (records or self.records) - self.records
        return at

    @property
    def refused(self) -> OSError | None:
        """Why events wait in memory; None if none does."""
        return self._queue.refused

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one event with all `values`, at float32 precision."""
        with np.errstate(over="ignore"):
            singles = {tag: float(np.float32(value)) for tag, value in values.items()}
        self._summary(step, [self._proto.Summary.Value(tag=t, simple_value=v) for t, v in singles.items()])

    def histogram(self, step: int, tag: str, values: np.ndarray, bins: int = 64) -> None:
        """Write the distribution of the finite entries of `values`; nothing if there is none."""
        flat = np.asarray(values, dtype=np.float64).ravel()
        flat = flat[np.isfinite(flat)]
        if not flat.size:
            return
        counts, edges = np.histogram(flat, bins=bins)
        proto = self._proto.HistogramProto(
            min=flat.min(),
            max=flat.max(),
            num=flat.size,
            sum=flat.sum(),
            sum_squares=flat @ flat,
            # TensorBoard knows right edges only: an empty bucket in front holds the first left edge
            bucket_limit=edges.tolist(),
            bucket=[0.0, *counts.tolist()],
        )
        self._summary(step, [self._proto.Summary.Value(tag=tag, histo=proto)])

    def image(self, step: int, tag: str, encoded: bytes, height: int, width: int) -> None:
        """Write an encoded image; an animated GIF plays in TensorBoard's image tab."""
        if self.refused is not None:
            return  # too large to wait
        image = self._proto.Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=encoded
        )
        self._summary(step, [self._proto.Summary.Value(tag=tag, image=image)])

    def _summary(self, step: int, values: list) -> None:
        self._write(self._event(wall_time=time.time(), step=step, summary=self._proto.Summary(value=values)))

    def _write(self, event) -> None:
        self.records += 1
        self._queue.add(self._framed(event.SerializeToString()))

    def _framed(self, event: bytes) -> bytes:
        record = io.BytesIO()
        self._record(record).write(event)
        return record.getvalue()

    def flush(self) -> None:
        """Force the events onto the disk.

        Raises: OSError if the disk takes none.
        """
        self._queue.drain()
        self._file.sync()

    def close(self) -> None:
        """Flush and close; later calls do nothing.

        Raises: OSError if events are lost because the disk took none to the end.
        """
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()
