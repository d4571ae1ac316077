"""The pictures of README.md, made from a committed run: its learning curve and frames of a greedy episode.

python -m agents.figures [RUN] [--out DIR]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import envs
from runs import Run
from runs.config import Parser

RUN = "runs/reference/ALE-Pong-v5/dqn"
SHOWN = 5  # frames side by side
STEPS = 600  # of the episode
OPENING = 60  # steps that are not shown


def main(arguments: list[str]) -> int:
    """Write learning-curve.png, frames.png and explained.png."""
    parser = Parser(prog="python -m agents.figures", description="The README's pictures, from a run.")
    parser.add_argument("run", metavar="RUN", nargs="?", help=f"a run folder (default {RUN})")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: the run folder)")
    given = parser.read(arguments)
    run = Run.open(given.get("run", RUN))
    out = Path(given.get("out", run.path))
    from PIL import Image

    from agents.evaluate import SEED, shots
    from agents.play import Explainer
    from agents.training import restore
    from runs.report import learning_curve

    written = [learning_curve(run, out)]
    agent, settings, env_config = restore(run.path, "best")
    env_id = settings["env"]
    env = envs.make(env_id, config=env_config)
    explain = Explainer(env, env_id)
    env.close()
    # played twice, the same episode each time, rather than kept: how long it is, then what is shown of it
    count = sum(1 for _ in shots(agent, env_id, env_config, SEED, STEPS))
    chosen = np.linspace(min(OPENING, count - 1), count - 1, SHOWN).astype(int)
    frames: dict[int, np.ndarray] = {}
    explained = np.zeros(0)
    for step, shot in enumerate(shots(agent, env_id, env_config, SEED, STEPS)):
        if step <= chosen[1]:  # from the start, because the values of the past are drawn too
            explained = explain(shot)
        if step in chosen:
            frames[step] = shot.frame
    gap = np.full((len(frames[int(chosen[0])]), 6, 3), 255, np.uint8)
    strip = np.concatenate([part for step in chosen for part in (frames[int(step)], gap)][:-1], axis=1)
    for name, picture in (("frames.png", strip), ("explained.png", explained)):
        Image.fromarray(picture).save(out / name)
        written.append(out / name)
    print("wrote " + ", ".join(map(str, written)))
    return 0


if __name__ == "__main__":
    from agents.run import guarded

    sys.exit(guarded(main, sys.argv[1:]))
