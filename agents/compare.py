"""Runs beside each other: learning curves and a table, mean over seeds with confidence intervals.

python -m agents.compare RUN RUN ... [--out DIR] [--by NAME ...] [--json]

The interquartile mean is the mean of the middle half of the scores, and its interval that of the percentile bootstrap.
Source: Agarwal et al. 2021, arXiv 2108.13264, sections 4.1 and 4.3. Deviations:
1. A score is the mean of a seed's last evaluation, since runs keep no returns of single evaluation episodes.
2. The bootstrap is stratified by environment in that each environment is compared by itself; there is no score over
   several, which would need returns of one scale.
"""

from __future__ import annotations

import functools
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agents.groups import Group, Outcome, differing, grouped, read, shown
from runs.config import Parser, UserError, read_json
from runs.disk import json_text, write_whole
from runs.panel import number, rate
from runs.report import COLOURS, FAINT, INK, banded, curve, panels, short, write

OUT = "runs/compare"
RECORD, TEXT, PICTURE = FILES = ("compare.json", "compare.txt", "compare.png")
MAKER = "agents.compare"  # in compare.json, by which a rerun knows its own files
ENOUGH = 3  # seeds for an interval
SAMPLES, LEVEL, SEED = 2000, 0.95, 0  # of the bootstrap
POINTS = 200  # of a curve at most
NARROW, WIDE = 80, 100  # columns of the table
PERCENT = f"{100 * LEVEL:g} %"
COLUMNS = ("group", "seeds", "steps", "final", f"IQM [{PERCENT}]", "best", "steps/s", "minutes")
ABOUT = (
    "final: the last greedy evaluation, mean over seeds. IQM: mean of the middle half of the seeds' final means (of "
    f"fewer than four: of all); in brackets a {PERCENT} bootstrap interval over seeds, from {ENOUGH} seeds on "
    "(Agarwal et al. 2021, arXiv 2108.13264; on means of seeds, since runs do not keep each episode's return). "
    "best: the highest evaluation of each seed, mean over seeds. steps/s: while learning, evaluations and "
    "compilation aside."
)
BANDS = {
    "interval": f"{PERCENT} bootstrap interval of the mean over seeds ({ENOUGH} seeds or more)",
    "range": "lowest to highest seed (2 seeds)",
    "none": "",
}
Statistic = Callable[[np.ndarray], np.ndarray]  # (S, ...) -> (...)
MEAN: Statistic = functools.partial(np.mean, axis=0)


class Line(NamedTuple):
    """The learning curve of a group. K steps."""

    of: str  # "evaluations" or "training"
    seeds: int  # that it is the mean of
    step: np.ndarray  # (K,)
    mean: np.ndarray  # (K,)
    low: np.ndarray  # (K,)
    high: np.ndarray  # (K,)
    band: str  # a key of BANDS


class Row(NamedTuple):
    """What came out of a group. S seeds."""

    group: Group
    final: np.ndarray  # (S,)
    best: np.ndarray  # (S,)
    iqm: float
    interval: tuple[float, float] | None  # of the interquartile mean
    line: Line


def iqm(scores: np.ndarray) -> np.ndarray:
    """The interquartile mean: that of what is left without the lowest and the highest quarter, rounded down each.

    Shapes: scores (S, ...) -> (...).
    Source: Agarwal et al. 2021, section 4.3 (there by a trimmed mean of 25 %).
    """
    cut = len(scores) // 4
    middle = np.sort(scores, axis=0)[cut : len(scores) - cut]
    unknown = np.isnan(scores).any(axis=0)  # a NaN sorts as if it were the best, and would be cut off
    return np.where(unknown, np.nan, middle.mean(axis=0))


def bootstrap_interval(
    scores: np.ndarray,
    statistic: Statistic,
    rng: np.random.Generator,
    samples: int = SAMPLES,
    level: float = LEVEL,
) -> tuple[np.ndarray, np.ndarray]:
    """The percentile bootstrap: between which values `statistic` lies for seeds that are drawn with replacement.

    Shapes: scores (S, ...) -> low, high (...).
    Raises: ValueError if there is no score.
    Source: Efron 1979; Agarwal et al. 2021, section 4.1.
    """
    if not len(scores):
        raise ValueError("a bootstrap needs at least one score")
    drawn = scores[rng.integers(len(scores), size=(len(scores), samples))]  # (S, samples, ...)
    tail = (1 - level) / 2
    low, high = np.quantile(statistic(drawn), [tail, 1 - tail], axis=0)
    return low, high


def on_common_steps(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Curves (step, value) interpolated onto the steps of all, from where the last one begins to the first one's end.

    A curve that ends before another begins is left out.
    Shapes: step, value (K_i,) of each -> step (K,), values (curves that are left, K).
    """
    kept = sorted(curves, key=lambda each: each[0][-1])
    while max(step[0] for step, _ in kept) > kept[0][0][-1]:
        kept = kept[1:]
    begin, end = max(step[0] for step, _ in kept), kept[0][0][-1]
    steps = np.unique(np.concatenate([step for step, _ in kept]))
    steps = steps[(steps >= begin) & (steps <= end)]
    if len(steps) > POINTS:
        steps = np.unique(np.linspace(begin, end, POINTS).round())
    return steps, np.stack([np.interp(steps, step, value) for step, value in kept])


def line(outcomes: Sequence[Outcome], rng: np.random.Generator) -> Line:
    """The mean curve of these seeds: of evaluations if any has two; else of training returns, if there are any."""
    of, curves = "evaluations", [(each.step, each.mean) for each in outcomes if len(each.step) > 1]
    if not curves:
        of, curves = "training", [found for each in outcomes if len((found := _training(each))[0])]
    if not curves:
        of, curves = "evaluations", [(each.step, each.mean) for each in outcomes]
    step, values = on_common_steps(curves)
    if len(values) >= ENOUGH:
        band, (low, high) = "interval", bootstrap_interval(values, MEAN, rng)
    else:
        band, low, high = ("none", "range")[len(values) - 1], values.min(axis=0), values.max(axis=0)
    return Line(of, len(values), step, values.mean(axis=0), low, high, band)


def _training(outcome: Outcome) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed training returns, the last one of each step."""
    found = curve(outcome.run)
    last = np.append(np.diff(found.step) > 0, True)[: len(found.step)]
    return found.step[last], found.smooth[last]


def row(group: Group) -> Row:
    """What the table and the picture show of a group; the same for the same runs, whatever they are compared with."""
    rng = np.random.default_rng(SEED)
    final = np.array([each.final for each in group.outcomes])
    interval = None
    if len(final) >= ENOUGH:
        low, high = bootstrap_interval(final, iqm, rng)
        interval = float(low), float(high)
    best = np.array([each.mean.max() for each in group.outcomes])
    return Row(group, final, best, float(iqm(final)), interval, line(group.outcomes, rng))


def remarks(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table should know besides, a line for each group that has something."""
    said = [(each.group, _remarks(each)) for each in rows]
    return [f"{group.env}, {group.label}: {'; '.join(parts)}" for group, parts in said if parts]


def _remarks(each: Row) -> list[str]:
    group, said = each.group, []
    seeds = [outcome.seed for outcome in group.outcomes]
    going = sum(not outcome.finished for outcome in group.outcomes)
    mixed = differing([outcome.settings for outcome in group.outcomes])
    if group.brief:
        said.append(", ".join(f"{name}={shown(group.settings, name)}" for name in group.settings))
    if mixed:
        said.append(f"a mean over runs that also differ in {', '.join(mixed)}")
    elif twice := [str(seed) for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]:
        said.append(
            f"several runs of seed {', '.join(twice)}, which are not independent (--by commit may tell them apart)"
        )
    if going:
        said.append(f"{going} of {len(seeds)} not finished, where the newest evaluation counts as the last")
    if each.line.seeds < len(seeds):
        said.append(
            f"the curve is that of {each.line.seeds} of {len(seeds)}, the others have too few points, or none in common"
        )
    return said


def by_env(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each environment, in order."""
    found: dict[str, list[Row]] = {}
    for each in rows:
        found.setdefault(each.group.env, []).append(each)
    return found


def text(rows: Sequence[Row], notes: Sequence[str], width: int = WIDE) -> str:
    """A table for each environment, and what its columns mean."""
    tables = [f"{env}\n\n{_table(several, width)}" for env, several in by_env(rows).items()]
    whole = textwrap.TextWrapper(
        width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join([*tables, *map(whole.fill, (ABOUT, *notes))]) + "\n"


def _table(rows: Sequence[Row], width: int) -> str:
    """Columns of text; a label that would make them wider than `width` stands in a line of its own."""
    lines = [list(COLUMNS), *([each.group.label, *_cells(each)] for each in rows)]
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    room = max(width - sum(2 + size for size in sizes[1:]), len(COLUMNS[0]))
    sizes[0] = max(len(label) for label, *_ in lines if len(label) <= room)
    said = []
    for label, *cells in lines:
        if len(label) > sizes[0]:
            said.append(label)
            label = ""
        numbers = (cell.rjust(size) for cell, size in zip(cells, sizes[1:], strict=True))
        said.append("  ".join([label.ljust(sizes[0]), *numbers]))
    return "\n".join([said[0], "-" * len(said[0]), *said[1:], ""])


def _cells(each: Row) -> list[str]:
    steps = [count(outcome.steps) for outcome in sorted(each.group.outcomes, key=lambda one: one.steps)]
    interval = "" if each.interval is None else " [{}, {}]".format(*map(number, each.interval))
    minutes = _average(outcome.minutes for outcome in each.group.outcomes)
    return [
        str(len(each.final)),
        "-".join(dict.fromkeys((steps[0], steps[-1]))),
        number(each.final.mean()),
        number(each.iqm) + interval,
        number(each.best.mean()),
        count(_average(outcome.rate for outcome in each.group.outcomes)),
        "-" if np.isnan(minutes) else f"{minutes:.1f}",
    ]


def count(value: float) -> str:
    """Steps, or steps per second, in a narrow column: 309, 3,635, 1.26M, or - if unknown."""
    return short(float(f"{value:.3g}")) if value >= 10_000 else rate(value)


def _average(values: Any) -> float:
    """The mean of those that are known."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def record(rows: Sequence[Row], notes: Sequence[str]) -> dict[str, Any]:
    """Everything as JSON can hold it; the keys are stable."""
    return {
        "made_by": MAKER,
        "bootstrap": {"level": LEVEL, "samples": SAMPLES, "seed": SEED},
        "envs": {env: [_record(each) for each in several] for env, several in by_env(rows).items()},
        "notes": list(notes),
    }


def _record(each: Row) -> dict[str, Any]:
    group, outcomes = each.group, each.group.outcomes
    final = {
        "scores": each.final.tolist(),
        "mean": each.final.mean(),
        "iqm": each.iqm,
        "interval": each.interval,
    }
    return {
        "label": group.label,
        "agent": group.agent,
        "settings": group.settings,
        "seeds": [outcome.seed for outcome in outcomes],
        "runs": [str(outcome.run.path) for outcome in outcomes],
        "finished": sum(outcome.finished for outcome in outcomes),
        "steps": [outcome.steps for outcome in outcomes],
        "final": final,
        "best": {"scores": each.best.tolist(), "mean": each.best.mean()},
        "steps_per_second": _average(outcome.rate for outcome in outcomes),
        "minutes": _average(outcome.minutes for outcome in outcomes),
        "curve": {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in each.line._asdict().items()
        },
    }


def picture(rows: Sequence[Row], out: Path) -> Path:
    """Draw the curves, axes for each environment; return the path of the PNG in the folder `out`.

    Raises: UserError if `out` cannot be written.
    """
    envs = by_env(rows)
    figure, places = panels(len(envs), below=max(map(len, envs.values())))
    labels = list(dict.fromkeys(each.group.label for each in rows))  # the same colour in all environments
    for axes, (env, several) in zip(places, envs.items(), strict=True):
        for each in several:
            _draw(axes, each, labels.index(each.group.label))
        axes.set_xlim(left=0)
        axes.set_title(env, loc="left", color=INK, pad=8)
        _legend(figure, axes)
    words = _caption([each.line for each in rows]).replace(" %", "\N{NO-BREAK SPACE}%")
    caption = textwrap.fill(words, round(16 * figure.get_figwidth()))
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=8, color=FAINT)
    return write(figure, out, PICTURE)


def _draw(axes: Any, each: Row, index: int) -> None:
    drawn, total = each.line, len(each.final)
    seeds = f"{drawn.seeds} of {total} seeds" if drawn.seeds < total else f"{total} seed{'s' * (total > 1)}"
    label = f"{each.group.label}, {'training, ' * (drawn.of == 'training')}{seeds}"
    dash = "--" if index // len(COLOURS) % 2 else "-"
    style = f"o{dash}" if drawn.of == "evaluations" or len(drawn.step) == 1 else dash
    colour = COLOURS[index % len(COLOURS)]
    banded(axes, drawn.step, drawn.mean, drawn.low, drawn.high, label=label, colour=colour, style=style)


def _legend(figure: Any, axes: Any) -> None:
    """Below the axes, where it hides no curve."""
    from matplotlib.transforms import offset_copy

    below = offset_copy(axes.transAxes, fig=figure, y=-38, units="points")
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=below,
        borderaxespad=0,
        frameon=False,
        fontsize=9,
    )


def _caption(lines: Sequence[Line]) -> str:
    said = []
    if any(line.of == "evaluations" for line in lines):
        said.append("Greedy evaluations, mean over seeds.")
    if any(line.of == "training" for line in lines):
        said.append("Training: returns with exploration, running mean of 20 episodes, mean over seeds.")
    bands = [BANDS[band] for band in BANDS if BANDS[band] and any(line.band == band for line in lines)]
    if bands:
        said.append(f"Band: {'; '.join(bands)}.")
    if any(line.band == "none" for line in lines):
        said.append("A single seed has no band.")
    return " ".join(said)


def main(arguments: list[str]) -> int:
    """Compare, print the table or the JSON object, and write all three files."""
    given = _parser().read(arguments)
    outcomes, notes = read(given["runs"])
    names = [name.replace("-", "_") for name in given.get("by", ())]
    rows = [row(group) for group in grouped(outcomes, names)]
    notes += remarks(rows)
    out = Path(given.get("out", OUT)).expanduser()
    made = json_text(record(rows, notes))
    _claim(out)
    write_whole(out / RECORD, made.encode())  # first: it marks the folder as ours
    write_whole(out / TEXT, text(rows, notes).encode())
    picture(rows, out)
    if given["json"]:
        print(made, end="")
    else:
        print(text(rows, notes, min(max(shutil.get_terminal_size().columns, NARROW), WIDE)))
        print("wrote " + ", ".join(str(out / name) for name in FILES))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m agents.compare",
        description="Learning curves and a table of runs, grouped by their settings, with intervals over seeds.",
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="run folders, or folders that have runs somewhere below"
    )
    parser.add_argument("--out", metavar="DIR", help=f"where to write {', '.join(FILES)} (default {OUT})")
    parser.add_argument(
        "--by",
        metavar="NAME",
        action="append",
        help="setting that makes the groups, e.g. lr, or commit; may be repeated (default: all that differ)",
    )
    parser.add_argument("--json", action="store_true", default=False, help="print one JSON object")
    return parser


def _claim(out: Path) -> None:
    """Make the folder. Raises: UserError if it has a file of one of our names that this command did not write."""
    there = [out / name for name in FILES if (out / name).exists()]
    if there:
        try:
            maker = read_json(out / RECORD).get("made_by")
        except UserError:
            maker = None
        if maker != MAKER:
            raise UserError(f"{there[0]} was not made by this command; choose another --out or delete it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error


if __name__ == "__main__":
    from agents.run import guarded

    sys.exit(guarded(main, sys.argv[1:]))
