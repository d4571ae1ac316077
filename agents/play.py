"""Watch a run's best weights play.

python -m agents.play RUN [--episodes N] [--video FILE.mp4] [--explain] [--render human]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import envs
from agents.evaluate import Film, film, positive
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
        "--explain", action="store_true", default=False, help="draw values beside the picture"
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
    env_id, seed = settings["env"], given.get("seed", 0)
    fps = 60 / (env_config.frame_skip or 4) if "ALE" in env_id or "NoFrameskip" in env_id else 30
    films = []
    for number in range(given.get("episodes", 1)):
        films.append(film(agent, env_id, env_config, seed + number, given.get("steps", MOST_STEPS)))
        print(f"episode {number + 1}: return {films[-1].return_:g} in {len(films[-1].frames)} steps")
    shown = pictures(films, env_id, given["explain"])
    if given.get("render") == "human":
        _show(shown, fps)
        return 0
    from runs.video import write_mp4

    count = write_mp4(path, shown, fps)
    print(f"{count} frames at {fps:g} a second written to {path}")
    return 0


def pictures(films: list[Film], env_id: str, explained: bool) -> Iterator[np.ndarray]:
    """What a person sees of each step, with the agent's values beside it where that is asked for."""
    from runs.video import enlarge, explain

    names: list[str] = []
    for shown in films:
        if explained and not names:
            env = envs.make(env_id)
            names = envs.action_names(env, env_id) if shown.values.shape[1] > 1 else ["V"]
            env.close()
        best = shown.values.max(axis=1)
        picture = shown.frames[0]
        for step, frame in enumerate(shown.frames):
            if explained:
                picture = explain(
                    frame, shown.values[step], int(shown.actions[step]), names, best[: step + 1]
                )
            else:
                picture = enlarge(frame, max(1, 420 // frame.shape[0]))
            yield picture
        for _ in range(PAUSE):
            yield picture


def _show(pictures: Iterator[np.ndarray], fps: float) -> None:
    """A window with the pictures at their speed; closing it ends the show."""
    try:
        import pygame  # type: ignore[import-not-found]  # an extra
    except ImportError:
        raise UserError('a window needs pygame: pip install "chordate[window]"') from None
    clock, screen = pygame.time.Clock(), None
    for picture in pictures:
        screen = screen or pygame.display.set_mode((picture.shape[1], picture.shape[0]))
        screen.blit(pygame.surfarray.make_surface(picture.swapaxes(0, 1)), (0, 0))
        pygame.display.flip()
        clock.tick(fps)
        if any(event.type == pygame.QUIT for event in pygame.event.get()):
            break
    pygame.quit()


if __name__ == "__main__":
    from agents.run import guarded

    sys.exit(guarded(main, sys.argv[1:]))
