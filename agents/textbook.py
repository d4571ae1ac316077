"""The textbook's comparison of Q-learning and SARSA beside the cliff, drawn from real runs.

python -m agents.textbook [--runs N] [--out DIR]

Both act with epsilon 0.1 and learn with a step size of 0.5 from each step once, without discount. Q-learning finds the
shortest path, along the cliff, and falls whenever exploration makes it; SARSA finds the path that is best for a policy
that explores. Deviation: which of the two newest steps Q-learning learns from is drawn (see agents/qtable.py).
Source: Sutton and Barto 2018, example 6.6.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from agents.evaluate import positive
from runs import Run
from runs.config import Parser, UserError

ENV, EPISODES, STEPS = "CliffWalking-v1", 500, 25_000
RUNS, OUT = 30, f"runs/reference/{ENV}"
WINDOW = 10  # episodes of the running mean
LAST = 100  # episodes that the printed number is taken over
BOTH: dict[str, Any] = dict(lr=0.5, gamma=1.0, epsilon_start=0.1, epsilon_end=0.1)
AGENTS: dict[str, dict[str, Any]] = {
    "qtable": BOTH | dict(capacity=3, batch=1, train_every=1, learning_starts=1),
    "sarsa": BOTH,
}


def returns(agent: str, seed: int, folder: Path) -> tuple[np.ndarray, float]:
    """Train once: the return of each of the first `EPISODES` episodes, and that of the greedy policy in the end.

    Raises: UserError if there are fewer episodes.
    """
    quiet = dict(eval_every=0, checkpoint_every=0, final_episodes=1, video=False, log_every=STEPS)
    from agents.training import train

    with contextlib.redirect_stdout(io.StringIO()):
        result = train(
            agent,
            ENV,
            run=folder,
            preset="none",
            say=lambda line: None,
            seed=seed,
            steps=STEPS,
            **quiet,
            **AGENTS[agent],
        )
    if result.signal:
        raise KeyboardInterrupt
    found = Run.open(folder).table("scores")["return"]
    if len(found) < EPISODES:
        raise UserError(
            f"{agent}, seed {seed}: {len(found)} episodes in {STEPS:,} steps, {EPISODES} are needed"
        )
    return found[:EPISODES], result.summary["evaluation"]["mean"]


def main(arguments: list[str]) -> int:
    """Train all runs, write textbook.csv and textbook.png."""
    parser = Parser(prog="python -m agents.textbook", description="Q-learning and SARSA beside the cliff.")
    parser.add_argument(
        "--runs", type=positive("--runs"), metavar="N", help=f"of each agent (default {RUNS})"
    )
    parser.add_argument("--out", metavar="DIR", help=f"where to write (default {OUT})")
    given = parser.read(arguments)
    count, out = given.get("runs", RUNS), Path(given.get("out", OUT))
    curves: dict[str, np.ndarray] = {}  # agent -> (runs, episodes)
    with tempfile.TemporaryDirectory() as folder:
        for agent in AGENTS:
            taken = [returns(agent, seed, Path(folder, f"{agent}-{seed}")) for seed in range(count)]
            curves[agent] = np.stack([curve for curve, _ in taken])
            greedy = sorted({best for _, best in taken})
            late = curves[agent][:, -LAST:].mean(axis=1)
            print(
                f"{agent}: {late.mean():.1f} +- {late.std():.1f} online over the last {LAST} of {EPISODES} episodes, "
                f"{count} runs; greedy from {greedy[0]:g} to {greedy[-1]:g}"
            )
    written = [_table(curves, out), _picture(curves, out)]
    print("wrote " + ", ".join(map(str, written)))
    return 0


def _table(curves: dict[str, np.ndarray], out: Path) -> Path:
    columns = {"episode": np.arange(1, EPISODES + 1)}
    for agent, each in curves.items():
        columns |= {f"{agent} mean": each.mean(axis=0).round(3), f"{agent} std": each.std(axis=0).round(3)}
    rows = [
        ",".join(columns),
        *(",".join(f"{cell:g}" for cell in row) for row in zip(*columns.values(), strict=True)),
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "textbook.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error
    return out / "textbook.csv"


def _picture(curves: dict[str, np.ndarray], out: Path) -> Path:
    from runs.report import BLUE, INK, ORANGE, banded, new_figure, smooth, write

    figure, axes = new_figure()
    for (agent, each), colour in zip(curves.items(), (ORANGE, BLUE), strict=True):
        mean = np.stack([smooth(run, WINDOW) for run in each])  # (runs, episodes)
        episode, middle = np.arange(1, EPISODES + 1), mean.mean(axis=0)
        error = 1.96 * mean.std(axis=0) / np.sqrt(len(mean))
        banded(axes, episode, middle, middle - error, middle + error, label=agent, colour=colour, style="-")
    axes.set_xlim(0, EPISODES)
    axes.set_ylim(-100, 0)
    axes.set_xlabel("episodes", color=INK)
    axes.set_ylabel("rewards during an episode", color=INK)
    runs = len(next(iter(curves.values())))
    title = f"{ENV}, epsilon 0.1: mean of {runs} runs and its 95 % interval, over {WINDOW} episodes"
    axes.set_title(title, loc="left", color=INK, pad=8)
    axes.legend(loc="lower right", frameon=False)
    return write(figure, out, "textbook.png")


if __name__ == "__main__":
    from agents.run import guarded

    sys.exit(guarded(main, sys.argv[1:]))
