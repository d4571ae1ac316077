"""Pictures of a run: `python -m runs.report RUN [--out DIR]` draws its learning curve."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from runs.config import Parser, UserError
from runs.folder import Run

BLUE, ORANGE, INK, FAINT = "#2a6fbb", "#d9722b", "#222831", "#8a929c"
# of lines beside each other
COLOURS = (BLUE, ORANGE, "#3b8f5a", "#8b5fb8", "#c23b55", "#1f9aa8", "#a8821a", "#5d6670")
PICTURE = "learning-curve.png"


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a learning curve is drawn from.

    Shapes: step, seconds, return_, smooth (E,) one entry per training episode; evaluations: column -> (K,).
    """

    step: np.ndarray
    seconds: np.ndarray
    return_: np.ndarray
    smooth: np.ndarray
    evaluations: dict[str, np.ndarray]


def curve(run: Run) -> Curve:
    """Read the curve of a run, also while it goes on.

    Raises: UserError if no episode and no evaluation has finished.
    """
    scores, evaluations = run.table("scores"), run.table("evaluations")
    return_ = scores.get("return", np.zeros(0))
    if not return_.size and not evaluations.get("mean", np.zeros(0)).size:
        raise UserError(f"nothing to draw in {run.path}: no episode and no evaluation has finished yet")
    none = np.zeros(0)
    return Curve(scores.get("step", none), scores.get("seconds", none), return_, smooth(return_), evaluations)


def smooth(values: np.ndarray, window: int = 20) -> np.ndarray:
    """The mean of each value and up to `window - 1` before it.

    Shapes: (E,) -> (E,).
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return (total[end] - total[start]) / (end - start)


def learning_curve(run: Run, out: str | Path | None = None) -> Path:
    """Draw training returns and greedy evaluations over steps and time; return the path of the PNG.

    It lies in the folder `out` (default: that of the run).
    Raises: UserError if there is nothing to draw or `out` cannot be written.
    """
    found = curve(run)
    figure, axes = new_figure()
    draw(axes, found)
    agent, env, seed = (run.config.get(name, "?") for name in ("agent", "env", "seed"))
    axes.set_title(f"{agent} on {env}, seed {seed}", loc="left", color=INK, pad=8)
    axes.legend(loc="best", frameon=False)
    time_axis(axes, found)
    return write(figure, Path(out) if out is not None else run.path, PICTURE)


def new_figure() -> tuple[Any, Any]:
    """An empty figure and its axes in the house style, labelled for returns over steps."""
    figure, (axes,) = panels(1)
    return figure, axes


def panels(count: int, below: int = 0) -> tuple[Any, list[Any]]:
    """An empty figure with `count` axes like that of `new_figure`, up to three side by side.

    There is room for `below` lines of text under each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(count, 3)
    rows = -(-count // columns)
    width, height = (8.0, 4.5) if columns == 1 else (5.0, 3.8)
    apart = None if columns == 1 else 0.15  # inches around axes
    size = width * columns, (height + 0.2 * below) * rows
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=apart, h_pad=apart))
    FigureCanvasAgg(figure)
    return figure, [_house(figure.add_subplot(rows, columns, number + 1)) for number in range(count)]


def _house(axes: Any) -> Any:
    """Give axes the house style, and labels for returns over steps."""
    from matplotlib.ticker import FuncFormatter

    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=INK)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda steps, _: short(steps)))
    axes.set_xlabel("steps (agent decisions)", color=INK)
    axes.set_ylabel("return of an episode", color=INK)
    return axes


def banded(
    axes: Any,
    step: np.ndarray,
    mean: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    label: str,
    colour: str,
    style: str = "o-",
) -> None:
    """Draw a line within its band.

    Shapes: step, mean, low, high (K,).
    """
    axes.fill_between(step, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(step, mean, style, color=colour, markersize=4, linewidth=1.6, label=label)


def draw(axes: Any, found: Curve, *, name: str = "", colours: tuple[str, str] = (BLUE, ORANGE)) -> None:
    """Draw one curve: episodes as dots, their running mean, evaluations with a band from min to max."""
    lead = f"{name}, " if name else ""
    if found.step.size:
        axes.plot(
            found.step, found.return_, ".", color=colours[0], alpha=0.18, markersize=4, markeredgewidth=0
        )
        axes.plot(
            found.step,
            found.smooth,
            color=colours[0],
            linewidth=1.6,
            label=f"{lead}training, mean of 20 episodes",
        )
    evaluations = found.evaluations
    if evaluations.get("mean", np.zeros(0)).size:
        columns = (evaluations[column] for column in ("step", "mean", "min", "max"))
        banded(axes, *columns, label=f"{lead}greedy evaluation, mean and range", colour=colours[1])
    axes.set_xlim(left=0)


def time_axis(axes: Any, found: Curve) -> None:
    """Add a second axis on top: the time at which the steps were reached, in seconds, minutes or hours."""
    from matplotlib.ticker import MaxNLocator

    step = np.concatenate([[0.0], found.step, found.evaluations.get("step", [])])
    seconds = np.concatenate([[0.0], found.seconds, found.evaluations.get("seconds", [])])
    order = np.lexsort((seconds, step))
    step, seconds = step[order], np.maximum.accumulate(seconds[order])
    if not seconds[-1] > 0:
        return
    unit, length = next(
        (entry for entry in (("hours", 3600.0), ("minutes", 60.0)) if seconds[-1] >= 3 * entry[1]),
        ("seconds", 1.0),
    )
    ticks = np.asarray(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]).tick_values(0, seconds[-1] / length))
    ticks = ticks[(ticks >= 0) & (ticks * length <= seconds[-1])]
    top = axes.twiny()
    top.set_xlim(axes.get_xlim())
    top.set_xticks(np.interp(ticks * length, seconds, step), [f"{tick:g}" for tick in ticks])
    top.spines[["top", "right", "left", "bottom"]].set_visible(False)
    top.tick_params(color=FAINT, labelcolor=FAINT)
    top.set_xlabel(unit, color=FAINT)


def short(steps: float) -> str:
    """A step count for an axis: 400k, 1.2M."""
    for length, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(steps) >= length:
            return f"{steps / length:g}{letter}"
    return f"{steps:g}"


def write(figure: Any, folder: Path, name: str) -> Path:
    """Write a figure as `folder/name` (PNG, 150 pixels per inch).

    Raises: UserError if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / name, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    return folder / name


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = Parser(prog="python -m runs.report", description="Draw the learning curve of a run as a PNG.")
    parser.add_argument("run", metavar="RUN", help="the run folder")
    parser.add_argument("--out", metavar="DIR", help="where to write the picture (default: the run folder)")
    try:
        given = parser.read(sys.argv[1:] if arguments is None else arguments)
        print(learning_curve(Run.open(given["run"]), given.get("out")))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
