"""The live panel of a training run; plain lines where standard output is no terminal."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

WIDTH = 80  # columns at most
NARROW = 64  # columns; below, the numbers stand in one column
WINDOW = 30.0  # seconds over which the rates are averaged


class Panel:
    """Shows progress, rates, the latest values and the time left; use it as a context manager.

    On a terminal one panel is redrawn in place; elsewhere (a file, a pipe, a dumb terminal) a line is printed
    now and then.
    """

    def __init__(
        self,
        title: str,
        total_steps: int,
        *,
        folder: object = "",
        every: float = 0.25,
        plain_every: float = 10.0,
        console: Any = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Prepare the panel; nothing is drawn before it is entered.

        Units: `every` and `plain_every` are the seconds between two redraws and two plain lines.
        """
        from rich.console import Console

        self._console = console or Console(highlight=False)
        self._title, self._total, self._folder = title, max(1, total_steps), str(folder)
        self._plain = not self._console.is_terminal or self._console.is_dumb_terminal
        self._every = plain_every if self._plain else every
        self._clock = clock
        self._started = self._next = 0.0
        self._step = self._frames = 0
        self._values: dict[str, Any] = {}
        self._samples: deque[tuple[float, int, int]] = deque()
        self._live: Any = None

    def __enter__(self) -> Panel:
        """Start the clock and draw."""
        self._started = self._clock()
        self._next = self._started + self._every
        if not self._plain:
            from rich.live import Live

            # no refreshing thread: update() redraws, and envs may fork
            self._live = Live(self._draw(), console=self._console, auto_refresh=False)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show the last state and leave the terminal as it was."""
        if self._live is None:
            self._show()
            return
        try:
            self._show()
        finally:
            self._live.stop()

    def update(self, step: int, frames: int, **values: Any) -> None:
        """Take the newest state: steps, frames, and any values to show (numbers, 0-d tensors or text).

        Cheap: values are kept as they are and read only for a redraw. `return_` is shown as "return".
        """
        self._step, self._frames = step, frames
        if values:
            self._values.update(values)
        now = self._clock()
        if now >= self._next:
            self._show()
        elif not self._samples:  # a resumed run does not start at step 0
            self._samples.append((now, step, frames))

    def say(self, line: str) -> None:
        """Print a line above the panel."""
        try:
            self._console.print(self._safe(line), markup=False, highlight=False, soft_wrap=True)
        except OSError:
            pass  # a run goes on if its output is, say, a file on a full disk

    def _show(self) -> None:
        now = self._clock()
        self._next = now + self._every
        self._samples.append((now, self._step, self._frames))
        while len(self._samples) > 2 and now - self._samples[0][0] > WINDOW:
            self._samples.popleft()
        if self._live is None:
            self.say(self._line())
        else:
            self._live.update(self._draw(), refresh=True)

    def _rates(self) -> tuple[float, float]:
        """Steps and frames a second over the last `WINDOW` seconds; NaN before there is anything to go by."""
        if len(self._samples) < 2:
            return math.nan, math.nan
        (then, old_step, old_frames), (now, step, frames) = self._samples[0], self._samples[-1]
        seconds = now - then
        if seconds <= 0:
            return math.nan, math.nan
        return (step - old_step) / seconds, (frames - old_frames) / seconds

    def _left(self, speed: float) -> str:
        return duration(max(0, self._total - self._step) / speed) if speed > 0 else "-"

    def _left_column(self, rates: tuple[float, float]) -> list[tuple[str, str]]:
        rows = [("step", f"{self._step:,}"), ("of", f"{self._total:,}"), ("steps/s", rate(rates[0]))]
        if self._frames != self._step:  # the two differ where each action is held for several frames
            rows[2:2] = [("frames", f"{self._frames:,}")]
            rows.append(("frames/s", rate(rates[1])))
        return [*rows, ("elapsed", duration(self._clock() - self._started))]

    def _right_column(self) -> list[tuple[str, str]]:
        return [
            (name.rstrip("_").replace("_", " "), number(value))
            for name, value in self._values.items()
            if value != ""
        ]

    def _line(self) -> str:
        rates = self._rates()
        share = f"{self._step / self._total:.1%}"
        parts = [f"step {self._step:,}/{self._total:,} ({share})", f"{rate(rates[0])} steps/s"]
        if self._frames != self._step:
            parts.append(f"{rate(rates[1])} frames/s")
        parts += [f"{name} {value}" for name, value in self._right_column()]
        return "  ".join([*parts, f"ETA {self._left(rates[0])}"])

    def _draw(self) -> Any:
        from rich.box import ROUNDED
        from rich.console import Group
        from rich.panel import Panel as Frame
        from rich.text import Text

        rates = self._rates()
        rows: list[Any] = [self._progress(rates[0]), Text(), self._numbers(rates)]
        if self._folder:
            rows += [Text(), Text(self._safe(self._folder), style="dim", overflow="fold")]
        title = Text(self._safe(self._title), style="bold")
        width = min(WIDTH, self._console.width)
        return Frame(
            Group(*rows),
            title=title,
            title_align="left",
            box=ROUNDED,
            border_style="dim",
            padding=(0, 2),
            width=width,
        )

    def _progress(self, speed: float) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(ratio=1)
        row.add_column(justify="right", no_wrap=True)
        row.add_column(justify="right", no_wrap=True)
        bar = ProgressBar(
            total=self._total,
            completed=min(self._step, self._total),
            complete_style="cyan",
            finished_style="green",
        )
        row.add_row(bar, f"{self._step / self._total:.1%}", f"ETA {self._left(speed)}")
        return row

    def _numbers(self, rates: tuple[float, float]) -> Any:
        from rich.table import Table
        from rich.text import Text

        left, right = self._left_column(rates), self._right_column()
        wide = self._console.width >= NARROW
        table = Table.grid(padding=(0, 2), expand=True)
        for width in (16, 0) if wide else (0,):
            table.add_column(style="dim", no_wrap=True, max_width=16, overflow="ellipsis")
            table.add_column(
                no_wrap=True, width=width or None, ratio=None if width else 1, overflow="ellipsis"
            )
        for cells in itertools.zip_longest(left, right, fillvalue=("", "")) if wide else zip([*left, *right]):
            row = []
            for name, value in cells:
                style = "bold red" if value in ("nan", "inf", "-inf") else ""
                row += [Text(self._safe(name)), Text(self._safe(value), style=style)]
            table.add_row(*row)
        return table

    def _safe(self, text: str) -> str:
        """The text in what the terminal can encode."""
        encoding = self._console.encoding or "utf-8"
        return text.encode(encoding, "replace").decode(encoding)


def number(value: Any) -> str:
    """A number for people: thousands with commas, else four significant digits. Text stays as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    real = float(value)
    if not math.isfinite(real):
        return str(real)
    return f"{real:,.0f}" if abs(real) >= 1000 else f"{real:.4g}"


def rate(value: float) -> str:
    """A rate for people; "-" before there is anything to go by."""
    return "-" if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
