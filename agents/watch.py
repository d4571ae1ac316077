"""Watching a run: logs, panel, evaluations, checkpoints and signals, each at its interval.

Nothing here changes what is learned: evaluation has its own environments and draws no number from training.
"""

from __future__ import annotations

import copy
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass, field, fields
from types import FrameType
from typing import Any

import numpy as np

from agents.base import Agent, due
from agents.evaluate import Evaluator, film
from backbones.compute import ComputeConfig
from envs import Collector, Episode
from replay import Decision, Ring, Rollouts, SequenceRing, Update
from replay.rollout import pack, unpack
from runs import Run, UserError
from runs.config import RunFailed
from runs.panel import Panel

FILM_STEPS = 400  # of the film in TensorBoard
MAY_CHANGE = ("steps", *(field.name for field in fields(ComputeConfig)))  # settings, when a run is resumed
WARM_UPDATES = 50  # updates before the steady rate is measured: compilation lies before


class Stop:
    """SIGINT and SIGTERM ask the loop to end after its step; a second one ends at once."""

    def __init__(self) -> None:
        """Nothing asked yet."""
        self.signal = 0

    def __enter__(self) -> Stop:
        """Take over both signals, where this is the main thread."""
        main = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
        numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt  # the second time: at once, but cleaning up
        self.signal = number


@dataclass
class Watch:
    """What is written and shown while an agent trains."""

    agent: Agent
    collector: Collector
    replay: Ring | SequenceRing | Rollouts
    run: Run
    panel: Panel
    stop: Stop
    evaluator: Evaluator
    frame_skip: int
    config: Any  # RunConfig: how often what happens
    started: float  # perf_counter when the command began
    first_update: float | None = None  # seconds from start to the end of the first update
    evaluation: dict[str, Any] = field(default_factory=dict)
    episodes: int = 0
    _returns: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    _films: bool = field(init=False)
    _pending: dict[str, Any] | None = None  # metrics of the newest update that is not yet in the log
    _logged: tuple[int, float] = (0, 0.0)
    _faults: int = 0  # of environments, before the run was resumed
    _told: int = 0  # faults of environments that were reported
    decision: Decision | None = (
        None  # the newest one: for the next step (on_policy), and what is remembered since
    )
    saving: float = 0.0  # seconds spent on checkpoints
    saved: int | None = None  # step of the newest checkpoint
    _best: dict[str, Any] | None = None  # the best state, if the disk did not take it yet
    _owed: bool = False  # whether a signal cut off an evaluation, which a resumed run begins with
    _refused: bool = False  # whether rows of the logs wait for the disk
    _warm: int = WARM_UPDATES  # updates after which the steady rate is measured
    _aside: float = 0.0  # seconds spent evaluating and saving
    _steady: tuple[int, float] | None = None  # step and learning seconds where the steady rate begins

    def __post_init__(self) -> None:
        """Film only where that was asked for, and as long as it works."""
        self._films = self.config.video

    @property
    def stopping(self) -> bool:
        """Whether a signal asked for the end."""
        return bool(self.stop.signal)

    @property
    def seconds(self) -> float:
        """Since the start, evaluations and saving included."""
        return time.perf_counter() - self.started

    def after(self, before: int, step: int, episodes: list[Episode], update: Update | None) -> None:
        """Everything that happens after the environments went from step `before` to `step`."""
        if episodes:
            _, returns, lengths = zip(*episodes, strict=True)
            self.episodes += len(episodes)
            self._returns.extend(returns)
            self.panel.update(step, step * self.frame_skip, return_=sum(self._returns) / len(self._returns))
            self.run.episodes(step, step * self.frame_skip, self.seconds, returns, lengths)
        for at, reason in self.collector.faults[self._told :]:
            self.panel.say(
                f"after {at:,} steps of each environment {reason}; started anew, its episode is cut"
            )
        self._told = len(self.collector.faults)
        if update is not None:
            self._note_update(step)
            self._pending = update.metrics
        logs = due(self.config.log_every, before, step) or step >= self.config.steps
        if logs:
            self.log(step)
        if logs or episodes:
            self._tell()
        self.panel.update(step, step * self.frame_skip)
        if step >= self.config.steps:  # the end has its own evaluation and checkpoint
            return
        if self.config.eval_every and due(self.config.eval_every, before, step):
            self.evaluate(step)
        if self.config.checkpoint_every and due(self.config.checkpoint_every, before, step):
            self.save(step)

    def evaluate(self, step: int) -> None:
        """A greedy evaluation: table, TensorBoard, a film, and the best weights."""
        begun = time.perf_counter()
        self.panel.update(step, step * self.frame_skip, status="evaluating")
        episodes = self.evaluator.episodes(self.agent, lambda: self.stopping)
        self._owed = not episodes
        if self._owed:
            return
        returns = np.array([episode.return_ for episode in episodes])
        self.evaluation = {
            "mean": float(returns.mean()),
            "std": float(returns.std()),
            "episodes": len(returns),
        }
        if self.run.evaluation(step, returns, self.seconds):
            self._best = {"weights": self.agent.state_dict()["weights"], "counters": {"step": step}}
            self._keep()
        self.panel.say(
            f"step {step:,}: greedy return {returns.mean():.2f} +- {returns.std():.2f}, {len(returns)} episodes"
        )
        self.run.histogram(step, "q/values", self.evaluator.values)
        if self._films:
            self._film(step)
        self.panel.update(step, step * self.frame_skip, status="", evaluation=returns.mean())
        self._aside += time.perf_counter() - begun

    def _tell(self) -> None:
        """Say once that rows of the logs begin to wait for the disk, and once that it took them all."""
        refused = self.run.refused
        if refused is not None and not self._refused:
            self.panel.say(
                f"the logs cannot be written ({refused.strerror}): training goes on, rows wait in memory"
            )
        elif refused is None and self._refused:
            self.panel.say("the logs can be written again; no row was lost")
        self._refused = refused is not None

    def _keep(self) -> None:
        """Save the best state; if the disk refuses, a copy waits for the next checkpoint."""
        if self._best is None:
            return
        step = self._best["counters"]["step"]
        try:
            self.run.save_best(self._best, step)
            self._best = None
        except OSError as error:
            self.panel.say(f"the best weights (step {step:,}) could not be saved yet: {error}")
            self._best = copy.deepcopy(self._best)

    def _film(self, step: int) -> None:
        seed = self.evaluator.seed + 1
        try:
            shown = film(
                self.agent,
                self.evaluator.env_id,
                self.evaluator.config,
                seed,
                FILM_STEPS,
                lambda: self.stopping,
            )
        except UserError as error:
            self.panel.say(f"no film: {error}")
            self._films = False
            return
        if not len(shown.frames):  # a signal came
            return
        every = max(1, 4 // self.frame_skip)
        self.run.video(step, "eval/episode", shown.frames[::every], fps=15)

    def _guard(self, step: int) -> None:
        """Raises: RunFailed if too many updates in a row were skipped."""
        if self.agent.skipped_in_row >= self.config.max_skipped:
            raise RunFailed(
                f"at step {step:,} loss or gradient was not finite in {self.agent.skipped_in_row} updates in a row; "
                "the last checkpoint is from before. A smaller --lr may help"
            )

    def save(self, step: int) -> None:
        """A checkpoint; a disk that refuses is reported and costs only this one.

        Raises: RunFailed if learning broke down.
        """
        self._guard(step)
        begun = time.perf_counter()
        self._keep()
        unchanged = self.replay.unchanged()
        try:
            self.run.save(step, self._state(step), {f"replay/{name}" for name in unchanged})
            self.replay.saved()
            self.saved = step
        except OSError as error:
            self.panel.say(
                f"checkpoint at step {step:,} failed ({error}); training goes on, the last good one stays"
            )
        self.saving += time.perf_counter() - begun
        self._aside += time.perf_counter() - begun

    def _state(self, step: int) -> dict[str, dict[str, Any]]:
        """Everything that the rest of the run follows from."""
        state = self.agent.state_dict()
        pending = self._pending and {name: float(value) for name, value in self._pending.items()}
        counters = {
            "step": step,
            "episodes": self.episodes,
            "seconds": self.seconds,
            "saving": self.saving,
            "first_update": self.first_update,
            "returns": list(self._returns),
            "pending": pending,
            "owed": self._owed,
            "faults": self._faults + len(self.collector.faults),
            "evaluation": self.evaluation,
        }
        kept = {}
        # rollouts are small, and begin within episodes
        if self.config.save_replay or self.agent.loop == "on_policy":
            kept["replay"] = self.replay.state_dict()
        if self.decision is not None:
            kept["loop"] = pack(self.decision)
        return {
            **state,
            "counters": {**state["counters"], **counters},
            "settings": self._settings(),
            "envs": self.collector.state_dict(),
            **kept,
        }

    def _settings(self) -> dict[str, Any]:
        """What config.json must still say when the run is resumed."""
        kept = {name: value for name, value in self.run.config.items() if name not in MAY_CHANGE}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}

    def restore(self, state: dict[str, dict[str, Any]]) -> None:
        """Go on from where `save` stood: agent, environments, replay and counts.

        Raises: ValueError, TypeError or LookupError if the state does not fit the settings.
        """
        own, counters = self._settings(), state["counters"]
        for name, before in state.get("settings", own).items():
            if own.get(name) != before:
                raise ValueError(f"{name} was {before!r}, is {own.get(name)!r}")
        self.agent.load_state_dict(state)
        rebuilt = self.collector.load_state_dict(state["envs"])
        if "replay" in state:
            self.replay.load_state_dict(state["replay"])
        elif not self.config.save_replay:
            self.panel.say("the replay was not saved: learning goes on when it is filled again")
        if rebuilt:
            like = self.collector.env.single_action_space.sample()
            self.decision = unpack(state["loop"], like) if "loop" in state else None
        else:
            self.panel.say("the environments could not be rebuilt: their episodes restart")
        self.episodes, self.saving = counters["episodes"], counters["saving"]
        self.first_update, self._pending = counters["first_update"], counters["pending"]
        self._returns.extend(counters["returns"])
        self.saved = counters["step"]
        self.started -= counters["seconds"]
        self._logged = (counters["step"], self.seconds)
        self._warm = self.agent.updates + WARM_UPDATES  # the compiler runs again
        self._faults, self.evaluation = counters.get("faults", 0), dict(counters.get("evaluation", {}))
        if counters.get("owed"):
            self.evaluate(counters["step"])

    def rates(self, step: int) -> dict[str, float | None]:
        """Agent steps per second: `whole` over the run, `steady` while learning, evaluations and compilation aside."""
        steady = None
        if self._steady is not None and step > self._steady[0]:
            steady = (step - self._steady[0]) / (self.seconds - self._aside - self._steady[1])
        return {"whole": step / self.seconds, "steady": steady}

    def facts(self, step: int, seconds: float, rates: dict[str, float | None]) -> dict[str, Any]:
        """What this run did, for its summary; `seconds` and `rates` end before the last evaluation."""
        return {
            "steps": step,
            "frames": step * self.frame_skip,
            "updates": self.agent.updates,
            "seconds": seconds,
            "seconds_to_first_update": self.first_update,
            "steps_per_second": rates,
            "seconds_saving": self.saving,
            "env_faults": self._faults + len(self.collector.faults),
            "evaluation": self.evaluation or None,
            "parameters": self.agent.parameters,
            "finished": not self.stopping and self.saved == step,
        }

    def _note_update(self, step: int) -> None:
        if self.first_update is None:
            self.first_update = self.seconds
        if self._steady is None and self.agent.updates >= self._warm:
            self._steady = (step, self.seconds - self._aside)

    def log(self, step: int) -> None:
        """A row of metrics, if there was an update since the last one."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        now = self.seconds - self._aside
        rate = (step - self._logged[0]) / max(now - self._logged[1], 1e-9)
        self._logged = (step, now)
        self._guard(step)
        metrics = {name: float(value) for name, value in pending.items()}
        speed = {"speed/steps_per_second": rate, "speed/frames_per_second": rate * self.frame_skip}
        counts = {"train/updates": self.agent.updates}
        follows = self.agent.schedule(step)
        self.run.log(step, metrics | counts | follows | speed)
        loss = next(value for name, value in metrics.items() if name.startswith("loss/"))
        shown = {"loss": loss} | {name.split("/")[1]: value for name, value in follows.items()}
        self.panel.update(step, step * self.frame_skip, **shown)
