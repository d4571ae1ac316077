"""The pictures of README.md, made from a committed run: its learning curve and frames of a greedy episode.

    python -m agents.figures [RUN] [--out DIR]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from runs import Run
from runs.config import Parser

RUN = "runs/reference/ALE-Pong-v5/dqn"
SHOWN = 5  # frames side by side


def main(arguments: list[str]) -> int:
    """Write learning-curve.png, frames.png and explained.png."""
    parser = Parser(prog="python -m agents.figures", description="The README's pictures, from a run.")
    parser.add_argument("run", metavar="RUN", nargs="?", help=f"a run folder (default {RUN})")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: the run folder)")
    given = parser.read(arguments)
    run = Run.open(given.get("run", RUN))
    out = Path(given.get("out", run.path))
    from PIL import Image

    from agents.evaluate import SEED, film
    from agents.play import pictures
    from agents.training import restore
    from runs.report import learning_curve

    written = [learning_curve(run, out)]
    agent, settings, env_config = restore(run.path, "best")
    shown = film(agent, settings["env"], env_config, SEED, most=600)
    chosen = np.linspace(60, len(shown.frames) - 1, SHOWN).astype(int)
    gap = np.full((shown.frames.shape[1], 6, 3), 255, np.uint8)
    strip = np.concatenate([part for i in chosen for part in (shown.frames[i], gap)][:-1], axis=1)
    explained = list(pictures([shown], settings["env"], True))[int(chosen[1])]
    for name, picture in (("frames.png", strip), ("explained.png", explained)):
        Image.fromarray(picture).save(out / name)
        written.append(out / name)
    print("wrote " + ", ".join(map(str, written)))
    return 0


if __name__ == "__main__":
    from agents.run import guarded

    sys.exit(guarded(main, sys.argv[1:]))
