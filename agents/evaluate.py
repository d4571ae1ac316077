"""Greedy evaluation in environments of its own.

python -m agents.evaluate RUN [--episodes N] [--seed S] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import envs
from agents.base import Agent
from envs import Collector, EnvConfig, Episode
from replay.tree import mapped
from runs.config import Parser

MOST_ENVS = 16  # stepped at once
MOST_STEPS = 30_000  # of one episode; a longer one counts as it stands then
SEED = 20_000_003  # of the command; training evaluates on seeds derived from its own


class Evaluator:
    """Plays a fixed number of greedy episodes, always the same ones for the same weights."""

    def __init__(self, env_id: str, config: EnvConfig, episodes: int, seed: int) -> None:
        """Environments are made at the first use and kept."""
        self.env_id, self.config, self.count, self.seed = env_id, config, episodes, seed
        self.values = np.zeros((0, 1), np.float32)  # values (samples, A) met by the last evaluation
        self._env: Any = None

    def episodes(self, agent: Agent, stop: Callable[[], bool] | None = None) -> list[Episode]:
        """Play; every environment gives its share of episodes, so that short ones are not favoured.

        `stop` is asked at every step; once it is true, what was played is discarded and the list is empty.
        An environment whose episodes do not end gives fewer than its share, but at least one.
        """
        num_envs = min(self.count, MOST_ENVS)
        if self._env is None:
            self._env = envs.make(self.env_id, num_envs, self.seed, self.config)
        collector = Collector(self._env, self.seed)
        wanted = np.full(num_envs, self.count // num_envs)
        wanted[: self.count % num_envs] += 1
        age, state = np.zeros(num_envs, np.int64), agent.initial(num_envs)
        done: list[Episode] = []
        seen: list[np.ndarray] = []
        while wanted.any():
            if stop is not None and stop():
                return []
            decision = agent.greedy(collector.obs, collector.first, state)
            if collector.steps % 16 == 0:
                seen.append(agent.values(collector.obs, collector.first, state))
            state = decision.state
            collector.send(decision.action)
            collector.recv()
            # what a cut episode did after the cut is not counted: its env waits for the next one to start
            ended = [episode for episode in collector.episodes if episode.length <= MOST_STEPS]
            age = np.where(collector.first, 0, age + 1)
            for episode in [*ended, *collector.unfinished(np.flatnonzero(age == MOST_STEPS))]:
                if wanted[episode.env]:
                    wanted[episode.env] -= 1
                    done.append(episode)
            wanted[age >= 2 * MOST_STEPS] = 0  # endless
        self.values = np.concatenate(seen)
        return done

    def close(self) -> None:
        """Close the environments."""
        if self._env is not None:
            self._env.close()
            self._env = None


class Shot(NamedTuple):
    """One step of a greedy episode, seen from outside. A actions."""

    frame: np.ndarray  # (H, W, 3) uint8, before the action
    values: np.ndarray  # (A,) or (1,)
    probabilities: np.ndarray  # (A,) of the greedy policy
    action: Any  # as the environment takes it
    reward: float


def shots(
    agent: Agent,
    env_id: str,
    config: EnvConfig,
    seed: int,
    most: int,
    stop: Callable[[], bool] | None = None,
) -> Iterator[Shot]:
    """Play one greedy episode, at most `most` steps of it, or until `stop` is true; keeps nothing.

    Raises: UserError if the environment cannot draw itself.
    """
    view = envs.View(env_id, config, seed)
    try:
        state = agent.initial(1)
        for _ in range(most):
            if stop is not None and stop():
                return
            frame, values = view.frame(), agent.values(view.obs, view.first, state)[0]
            probabilities = agent.probabilities(view.obs, view.first, state)[0]
            decision = agent.greedy(view.obs, view.first, state)
            state = decision.state
            reward, ended = view.step(decision.action)
            action = mapped(lambda leaf: leaf[0], decision.action)
            yield Shot(frame, values, probabilities, action, reward)
            if ended:
                return
    finally:
        view.close()


class Film(NamedTuple):
    """One greedy episode, all of it in memory. T frames shown, A actions."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    values: np.ndarray  # (T, A) or (T, 1)
    probabilities: np.ndarray  # (T, A) of the greedy policy
    actions: np.ndarray  # (T,) or (T, *A)
    return_: float


def film(
    agent: Agent,
    env_id: str,
    config: EnvConfig,
    seed: int,
    most: int,
    stop: Callable[[], bool] | None = None,
) -> Film:
    """The `shots` of a short episode; a film without frames (T = 0) if `stop` ended it.

    Raises: UserError if the environment cannot draw itself.
    """
    taken = list(shots(agent, env_id, config, seed, most, stop))
    if not taken or (stop is not None and stop()):
        none = np.zeros((0, 1), np.float32)
        return Film(np.zeros((0, 1, 1, 3), np.uint8), none, none, np.zeros(0, np.int64), 0.0)
    frames, values, probabilities, actions, rewards = zip(*taken, strict=True)
    parts = (np.stack(part) for part in (frames, values, probabilities, actions))
    return Film(*parts, return_=math.fsum(rewards))


def main(arguments: list[str]) -> int:
    """Evaluate the best weights of a run, and print the result."""
    parser = Parser(
        prog="python -m agents.evaluate", description="Greedy evaluation of a run's best weights."
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--episodes", type=positive("--episodes"), metavar="N", help="episodes to play (default 30)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="S", help=f"of the evaluation environments (default {SEED})"
    )
    parser.add_argument("--weights", choices=("best", "latest"), help="which weights (default best)")
    parser.add_argument("--json", action="store_true", default=False, help="print one JSON object")
    given = parser.read(arguments)
    from agents.training import restore

    agent, config, env_config = restore(given["run"], given.get("weights", "best"))
    seed = given.get("seed", SEED)
    evaluator = Evaluator(config["env"], env_config, given.get("episodes", 30), seed)
    episodes = evaluator.episodes(agent)
    evaluator.close()
    returns = np.array([episode.return_ for episode in episodes])
    lengths = np.array([episode.length for episode in episodes])
    facts = {
        "run": str(Path(given["run"])),
        "env": config["env"],
        "agent": config["agent"],
        "episodes": len(returns),
        "seed": seed,
        "mean": float(returns.mean()),
        "std": float(returns.std()),
        "min": float(returns.min()),
        "max": float(returns.max()),
        "length": float(lengths.mean()),
    }
    if given["json"]:
        print(json.dumps(facts))
    else:
        spread = f"{facts['mean']:.2f} +- {facts['std']:.2f}, from {facts['min']:g} to {facts['max']:g}"
        print(f"{facts['env']}, {facts['agent']}: {spread} over {len(returns)} greedy episodes (seed {seed})")
    return 0


def positive(flag: str) -> Callable[[str], int]:
    """A reader of whole numbers from 1 on, for a flag that is no knob."""

    def read(text: str) -> int:
        try:
            value = float(text)  # 1e3 and 1_000 are welcome
        except ValueError:
            value = math.nan
        if not (value >= 1 and value % 1 == 0):
            # argparse replaces the message of any ValueError, a UserError too, by its own
            raise argparse.ArgumentTypeError(f"{flag} must be a whole number >= 1, got {text!r}")
        return int(value)

    return read


if __name__ == "__main__":
    from agents.run import guarded

    sys.exit(guarded(main, sys.argv[1:]))
