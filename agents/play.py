"""Watch a run's best weights play.

python -m agents.play RUN [--episodes N] [--video FILE.mp4] [--explain] [--render human]
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import envs
from agents.base import Agent
from agents.evaluate import Shot, positive, shots
from envs import EnvConfig
from runs import Run
from runs.config import Parser, UserError

MOST_STEPS = 30_000
PAUSE = 15  # frames that the last picture of an episode stays


def main(arguments: list[str]) -> int:
    """Play, and write an mp4 or show a window."""
    parser = Parser(
        prog="python -m agents.play", description="Watch a run's best weights play, without exploring."
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--episodes", type=positive("--episodes"), metavar="N", help="episodes to play (default 1)"
    )
    parser.add_argument("--steps", type=positive("--steps"), metavar="N", help="most steps of an episode")
    parser.add_argument("--seed", type=int, metavar="S", help="of the first episode (default 0)")
    parser.add_argument("--video", metavar="FILE", help="mp4 to write (default RUN/episode.mp4)")
    parser.add_argument(
        "--explain",
        action="store_true",
        default=False,
        help="draw values and probabilities beside the picture",
    )
    parser.add_argument("--render", choices=("human",), help="show a window instead of writing a file")
    parser.add_argument("--weights", choices=("best", "latest"), help="which weights (default best)")
    given = parser.read(arguments)
    Run.open(given["run"])  # first of all, is there one?
    path = Path(given.get("video", Path(given["run"]) / "episode.mp4"))
    if path.exists() and "video" in given:
        raise UserError(f"{path} exists; choose another --video or delete it")
    if path.suffix != ".mp4":
        raise UserError(f"--video must end in .mp4, got {str(path)!r}")
    if not path.parent.is_dir():
        raise UserError(f"--video {path}: no folder {path.parent}")
    from agents.training import restore

    agent, settings, env_config = restore(given["run"], given.get("weights", "best"))
    env_id = settings["env"]
    env = envs.make(env_id, config=env_config)
    fps, explainer = envs.fps(env), Explainer(env, env_id) if given["explain"] else None
    env.close()
    seeds = range(given.get("seed", 0), given.get("seed", 0) + given.get("episodes", 1))
    shown = pictures(agent, env_id, env_config, seeds, given.get("steps", MOST_STEPS), explainer)
    if given.get("render") == "human":
        _show(shown, fps)
        return 0
    from runs.video import write_mp4

    count = write_mp4(path, shown, fps)
    print(f"{count} frames at {fps:g} a second written to {path}")
    return 0


class Explainer:
    """Draws what the agent thinks beside each picture of an episode."""

    def __init__(self, env: Any, env_id: str) -> None:
        """Look up what the actions of a vector env are called."""
        self.names = envs.action_names(env, env_id)
        self.start = int(getattr(env.single_action_space, "start", 0))
        self.restart()

    def restart(self) -> None:
        """Forget the values of the episode before."""
        self._best: deque[float] = deque(maxlen=200)  # as many as are drawn

    def __call__(self, shot: Shot) -> np.ndarray:
        """Frame (H, W, 3) -> picture (H', W', 3)."""
        from runs.video import explain

        self._best.append(float(shot.values.max()))
        shown, label = shot.values, "Q"
        if len(shot.values) != len(self.names):  # one value of the state, whatever the action
            if len(shot.probabilities) != len(self.names):
                return explain(shot.frame, shot.values, 0, ["V"], self._best, label="V")
            shown, label = shot.probabilities, "pi"
        possible = np.isfinite(shown)  # forbidden actions have no value
        shown = np.where(possible, shown, shown[possible].min())
        action, chances = int(shot.action) - self.start, shot.probabilities
        return explain(shot.frame, shown, action, self.names, self._best, probabilities=chances, label=label)


def pictures(
    agent: Agent,
    env_id: str,
    config: EnvConfig,
    seeds: Sequence[int],
    most: int,
    explainer: Explainer | None,
) -> Iterator[np.ndarray]:
    """What a person sees of an episode for each seed, one picture at a time; tells how each one went."""
    from runs.video import enlarge

    for number, seed in enumerate(seeds, start=1):
        total, length, picture = 0.0, 0, None
        if explainer is not None:
            explainer.restart()
        for shot in shots(agent, env_id, config, seed, most):
            total, length = total + shot.reward, length + 1
            picture = explainer(shot) if explainer else enlarge(shot.frame, max(1, 420 // len(shot.frame)))
            yield picture
        print(f"episode {number}: return {total:g} in {length} steps")
        if picture is not None:
            yield from [picture] * PAUSE


def _show(pictures: Iterator[np.ndarray], fps: float) -> None:
    """A window with the pictures at their speed; closing it ends the show."""
    try:
        import pygame  # type: ignore[import-not-found]  # an extra
    except ImportError:
        raise UserError('a window needs pygame: pip install "chordate[window]"') from None
    clock, screen = pygame.time.Clock(), None
    try:
        for picture in pictures:
            screen = screen or pygame.display.set_mode((picture.shape[1], picture.shape[0]))
            screen.blit(pygame.surfarray.make_surface(picture.swapaxes(0, 1)), (0, 0))
            pygame.display.flip()
            clock.tick(fps)
            if any(event.type == pygame.QUIT for event in pygame.event.get()):
                break
    except pygame.error as error:
        raise UserError(f"no window can be shown here ({error}); write a film with --video") from None
    finally:
        pygame.quit()


if __name__ == "__main__":
    from agents.run import guarded

    sys.exit(guarded(main, sys.argv[1:]))
