"""Which runs belong together: those that differ in nothing but their seed and in how they were computed and watched."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agents.run import COMPUTING
from runs import Run
from runs.config import UserError, fields, nearest, read_json
from runs.folder import CONFIG

WORKERS = {"vectorization", "env_timeout", "env_threads"}
WATCHING = {
    "log_every",
    "eval_every",
    "eval_episodes",
    "final_episodes",
    "checkpoint_every",
    "save_replay",
    "video",
}
# what runs of one group may differ in; a preset is but a name for settings that are all compared themselves
FREE = COMPUTING | WORKERS | WATCHING | {"seed", "commit", "preset", "name"}
MOST = 3  # settings in a label
ABSENT = "-"  # shown for a setting that a run does not have


class Outcome(NamedTuple):
    """What is compared of a run. K evaluations."""

    run: Run
    settings: dict[str, Any]  # its configuration, its commit, and its folder's name without the seed
    step: np.ndarray  # (K,) of its evaluations
    mean: np.ndarray  # (K,) their mean returns
    final: float  # mean return of the last evaluation
    steps: int
    rate: float  # steps per second while learning; NaN if the run has no summary
    minutes: float  # NaN likewise
    finished: bool

    @property
    def seed(self) -> Any:
        """The seed of the run."""
        return self.settings.get("seed", ABSENT)


class Group(NamedTuple):
    """Runs in one environment that differ in their seeds only, and what tells them from the other groups."""

    env: str
    agent: str
    label: str
    settings: dict[str, Any]  # all in which the groups of this agent differ
    brief: bool  # whether the label leaves some of them out
    outcomes: list[Outcome]


def read(paths: Iterable[str | Path]) -> tuple[list[Outcome], list[str]]:
    """Read the runs in these folders and below them, each once; and say what was left out.

    A run below a folder that was named is left out while it has no evaluation.
    Raises: UserError if a path holds no run, or a run that was named itself has no evaluation, or none has one.
    """
    found: dict[Path, tuple[Path, bool]] = {}  # real path -> as given, and whether it was named itself
    for path in paths:
        folders = find(path)
        if not folders:
            Run.open(path)  # which says what is there instead
        for folder in folders:
            found.setdefault(folder.resolve(), (folder, folders == [Path(path).expanduser()]))
    outcomes, left_out = [], []
    for folder, named in found.values():
        run = Run.open(folder)
        outcome = _outcome(run)
        if outcome is not None:
            outcomes.append(outcome)
        elif named:
            raise UserError(f"nothing to compare in {folder}: no evaluation has finished yet")
        else:
            left_out.append(f"{folder} is left out: no evaluation has finished yet")
    if not outcomes:
        raise UserError(f"nothing to compare: no evaluation has finished yet in {len(left_out)} runs")
    return _completed(outcomes), left_out


def find(path: str | Path) -> list[Path]:
    """The folder itself if it is a run, else the runs below it that have a table of evaluations."""
    folder = Path(path).expanduser()
    if (folder / CONFIG).is_file():
        return [folder]
    found = []
    for here, below, files in os.walk(folder):
        if CONFIG in files and "evaluations.csv" in files:
            found.append(Path(here))
            below.clear()  # checkpoints are no runs
        below[:] = sorted(name for name in below if not name.startswith("."))
    return found


def _outcome(run: Run) -> Outcome | None:
    """What came out so far; None before the first evaluation."""
    table = run.table("evaluations")
    known = np.isfinite(table.get("mean", np.zeros(0)))
    if not known.any():
        return None
    step, mean = table["step"][known], table["mean"][known]
    try:
        facts = read_json(run.path / "summary.json")
    except UserError:
        facts = {}
    if facts.get("steps", 0) < step[-1]:  # of an earlier end: the run was resumed
        facts = {}
    final = (facts.get("evaluation") or {"mean": mean[-1]})["mean"]
    commit = str(run.origin.get("commit") or "unknown")
    return Outcome(
        run=run,
        settings={
            "env": "?",
            "agent": "?",
            **run.config,
            "commit": commit[:7] + commit[40:],
            "name": re.sub(r"[-_]?(seed)?[-_]?\d*$", "", run.path.name) or run.path.name,
        },
        step=step,
        mean=mean,
        final=_number(final),
        steps=int(facts.get("steps", step[-1])),
        rate=_number((facts.get("steps_per_second") or {}).get("steady")),
        minutes=_number(facts.get("seconds")) / 60,
        finished=facts.get("finished") is True,
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _completed(outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes, each with all settings: a knob that came after a run had its default's effect then."""

    def kind(outcome: Outcome) -> tuple[str, str, str | None]:
        settings = outcome.settings
        return str(settings["agent"]), str(settings.get("backbone", "")), settings.get("encoder")

    known: dict[tuple[str, str, str | None], set[str]] = {}
    for outcome in outcomes:
        known.setdefault(kind(outcome), set()).update(outcome.settings)
    lacking = {kind(outcome) for outcome in outcomes if known[kind(outcome)] - outcome.settings.keys() - FREE}
    defaults = {each: _defaults(*each, known[each]) for each in lacking}
    return [
        outcome._replace(settings={**defaults.get(kind(outcome), {}), **outcome.settings})
        for outcome in outcomes
    ]


def _defaults(agent: str, backbone: str, encoder: str | None, names: set[str]) -> dict[str, Any]:
    from agents.training import owners  # imports torch; runs of one version do without

    try:
        found = [field for owner in owners(agent, backbone, encoder).values() for field in fields(owner)]
    except UserError:  # an agent or a backbone that is gone by now
        return {}
    return {field.name: field.default for field in found if field.name in names}


def grouped(outcomes: Sequence[Outcome], by: Sequence[str] = ()) -> list[Group]:
    """The groups in the order of their first runs, those of one environment and agent together.

    Environment and agent always tell groups apart; besides them all settings but `FREE`, or those named in `by`.
    Raises: UserError for a name in `by` that no run has.
    """
    known = {name for outcome in outcomes for name in outcome.settings}
    for name in by:
        if name not in known:
            raise UserError(f"--by {name}: no run has such a setting.{nearest(name, known)}")
    alike: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        names = by or sorted(outcome.settings.keys() - FREE)
        key = (f"{name}={shown(outcome.settings, name)}" for name in ("env", "agent", *names))
        alike.setdefault(tuple(key), []).append(outcome)
    kinds: dict[tuple[str, str], list[list[Outcome]]] = {}
    for members in alike.values():
        settings = members[0].settings
        kinds.setdefault((str(settings["env"]), str(settings["agent"])), []).append(members)
    return [group for kind, sets in kinds.items() for group in _named(*kind, sets, by)]


def _named(env: str, agent: str, sets: list[list[Outcome]], by: Sequence[str]) -> list[Group]:
    each = [members[0].settings for members in sets]
    differ = [name for name in by if name not in ("env", "agent")] if by else telling(each)
    names = differ if by else label_names(each, differ)
    left = len(set(differ) - set(names))
    groups = []
    for settings, members in zip(each, sets, strict=True):
        words = [agent, *(f"{name}={shown(settings, name)}" for name in names)]
        if names == ["name"]:
            words = [shown(settings, "name")]
        if left and names != ["preset"]:
            words.append(f"+{left}")
        facts = {name: settings.get(name) for name in differ}
        groups.append(Group(env, agent, " ".join(words), facts, left > 0, members))
    return groups


def differing(each: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings, `FREE` aside, that are not the same in all of these configurations."""
    names = dict.fromkeys(name for settings in each for name in settings)
    return [name for name in names if name not in FREE and _kinds(each, [name]) > 1]


def telling(each: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that tell configurations apart; what only some have follows from another, such as the backbone."""
    # "steps" and its kin mostly follow from how long a run was, and say least
    names = sorted(differing(each), key=lambda name: name.endswith("steps"))
    common = [name for name in names if all(name in settings for settings in each)]
    return common if _kinds(each, common) == len(each) else names


def label_names(each: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Which of the differing settings `names` a label shows.

    All if they are few; else the preset, if that tells all apart; else one after the other whichever splits most.
    """
    if len(names) <= MOST:
        return list(names)
    if _kinds(each, ["preset"]) == len(each):
        return ["preset"]
    chosen: list[str] = []
    while _kinds(each, chosen) < _kinds(each, names):
        chosen.append(max(names, key=lambda name: _kinds(each, [*chosen, name])))
    return chosen


def _kinds(each: Sequence[Mapping[str, Any]], names: Sequence[str]) -> int:
    """How many of the configurations differ by these settings."""
    return len({tuple(shown(settings, name) for name in names) for settings in each})


def shown(settings: Mapping[str, Any], name: str) -> str:
    """A setting in a label: `0.001`, `on`, `256x256`; configurations are the same if they look the same."""
    value = settings.get(name, ABSENT)
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (int, float)):
        return f"{value:.12g}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
