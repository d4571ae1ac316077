"""The logs of a run: CSV tables and a TensorBoard event file.

Every row and event goes to the operating system in one write as soon as it is logged, so a killed process
loses none and a reader finds whole lines; `flush` also forces them onto the disk.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runs.config import UserError
from runs.disk import write_whole

_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_./-]*")


class Table:
    """A CSV file that grows by whole rows; columns can be added while it grows.

    A new column rewrites the file aside with the longer header, older rows padded by empty cells, and renames
    it over the old one: columns come in the first rows of a run, while the file is small.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Create the file with its header.

        Raises: FileExistsError if there is one already.
        """
        self.path = path
        self._columns = list(columns)
        self.last_step = 0
        self._file = open(path, "xb")
        self._file.write(_line(self._columns))
        self._file.flush()

    @classmethod
    def reopen(cls, path: Path, step: int) -> Table:
        """Continue the file after `step`: rows of later steps, and an unfinished last line, are cut off.

        Raises: UserError if the file is missing or no such table.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot continue {path}: {error.strerror or error}") from None
        header, *lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True) or [b""]
        table = cls.__new__(cls)
        table.path, table._columns, table.last_step = path, header.decode().rstrip("\n").split(","), 0
        end = len(header)
        try:
            for line in lines:
                at = int(line.split(b",", 1)[0])
                if at > step:
                    break
                table.last_step, end = at, end + len(line)
        except ValueError:
            raise UserError(f"cannot continue {path}: {line[:40]!r} is no row of it") from None
        if table._columns[0] != "step":
            raise UserError(f"cannot continue {path}: its first column is {table._columns[0]!r}, not 'step'")
        os.truncate(path, end)
        table._file = open(path, "ab")
        return table

    def check_step(self, step: int) -> None:
        """Raise ValueError if `step` lies before the row written last, or is negative."""
        if step < self.last_step:
            raise ValueError(f"{self.path.name}: steps must not go back, got {step} after {self.last_step}")

    def extend(self, step: int, rows: Iterable[str]) -> None:
        """Write rows of one step, each the text of all its cells after the step, in one write.

        Raises: ValueError if `step` goes back.
        """
        self.check_step(step)
        self.last_step = step
        self._file.write("".join(f"{step},{row}\n" for row in rows).encode())
        self._file.flush()

    def append(self, step: int, cells: Mapping[str, str]) -> None:
        """Write one row; a column without a cell stays empty.

        Raises: ValueError if `step` goes back or CSV or TensorBoard would garble the name of a new column.
        """
        self.check_step(step)
        fresh = [name for name in cells if name not in self._columns]
        if fresh:
            self._widen(fresh)
        self.last_step = step
        row = {"step": str(step), **cells}
        self._file.write(_line([row.get(name, "") for name in self._columns]))
        self._file.flush()

    def _widen(self, names: list[str]) -> None:
        for name in names:
            if not _NAME.fullmatch(name):
                raise ValueError(f"a metric is named with letters, digits and _./-, got {name!r}")
        self._file.flush()
        _, *rows = self.path.read_bytes().splitlines()
        empty = b"," * len(names) + b"\n"
        write_whole(self.path, _line([*self._columns, *names]) + b"".join(row + empty for row in rows))
        self._file.close()
        self._file = open(self.path, "ab")
        self._columns += names

    def flush(self) -> None:
        """Force the rows onto the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close; later calls do nothing."""
        if not self._file.closed:
            self.flush()
            self._file.close()


def _line(cells: Sequence[str]) -> bytes:
    return (",".join(cells) + "\n").encode()


def read_table(path: Path) -> dict[str, np.ndarray]:
    """Read a CSV of numbers, also one that is being written: an unfinished last line is left out.

    Shapes: column name -> (rows,) float64; an empty cell is NaN. A missing file has no columns.
    """
    if not path.is_file():
        return {}
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    if not lines:
        return {}
    header = lines[0].split(",")
    rows = [line.split(",") for line in lines[1:]]
    numbers = [[float(cell) if cell else np.nan for cell in row] for row in rows if len(row) == len(header)]
    columns = np.array(numbers, dtype=np.float64).reshape(len(numbers), len(header)).T
    return dict(zip(header, columns, strict=True))


def cell(value: float) -> str:
    """A number at float32 precision in its shortest spelling: what TensorBoard stores, digit for digit."""
    with np.errstate(over="ignore"):
        return str(np.float32(value))


class Events:
    """A TensorBoard event file, written without TensorBoard's background thread (envs may fork)."""

    def __init__(self, folder: Path, after: int | None = None) -> None:
        """Create the file, named by time and process; or continue the one that is there `after` a step.

        What was written for later steps, and an unfinished last record, are cut off.
        """
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        protos: Any = event_pb2  # generated at import, unknown to the type checker
        self._event, self._proto, self._record = protos.Event, summary_pb2, RecordWriter
        there = sorted(folder.glob("events.out.tfevents.*")) if after is not None else []
        if there:
            self.path = there[-1]
            os.truncate(self.path, self._end(self.path.read_bytes(), after or 0))
            self._file = open(self.path, "ab")
            return
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()  # of a run that was killed before its first checkpoint
        self.path = folder / f"events.out.tfevents.{int(time.time()):010d}.{os.getpid()}"
        self._file = open(self.path, "xb")
        self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))

    def _end(self, content: bytes, step: int) -> int:
        """Where the records of steps up to `step` end: each is length (8 bytes), its sum (4), event, its sum (4)."""
        at = 0
        while at + 12 <= len(content):
            end = at + 12 + int.from_bytes(content[at : at + 8], "little") + 4
            if end > len(content):
                break
            try:
                if self._event.FromString(content[at + 12 : end - 4]).step > step:
                    break
            except Exception:  # protobuf's own error types differ between its versions
                break
            at = end
        return at

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
        image = self._proto.Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=encoded
        )
        self._summary(step, [self._proto.Summary.Value(tag=tag, image=image)])

    def _summary(self, step: int, values: list) -> None:
        self._write(self._event(wall_time=time.time(), step=step, summary=self._proto.Summary(value=values)))

    def _write(self, event) -> None:
        record = io.BytesIO()  # the whole record in one write: an interrupt cannot split it
        self._record(record).write(event.SerializeToString())
        self._file.write(record.getvalue())
        self._file.flush()

    def flush(self) -> None:
        """Force the events onto the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close; later calls do nothing."""
        if not self._file.closed:
            self.flush()
            self._file.close()
