"""From settings to a finished run: the assembly around the loop.

A run is described by flat settings, one name each, the same as the command-line flags. `resolve` lays default <
preset < file < given over each other, `parts` deals them out to the rooms.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np

import backbones
import envs
from agents import load, presets
from agents.base import Agent
from agents.evaluate import Evaluator
from agents.loop import off_policy
from agents.watch import Stop, Watch
from backbones.compute import ComputeConfig, choose
from envs import Collector, EnvConfig
from replay import Ring
from runs import Run
from runs.config import Knob, UserError, check, fields, nearest
from runs.panel import Panel


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What belongs to the run rather than to one of its parts."""

    env: Annotated[str, Knob("environment id, e.g. ALE/Pong or CartPole-v1", metavar="ID")] = ""
    steps: Annotated[int, Knob("agent steps, over all environments", low=1)] = 100_000
    seed: Annotated[int, Knob("everything random follows from it", low=0)] = 0
    num_envs: Annotated[int, Knob("environments stepped together", low=1)] = 1
    backbone: Annotated[str, Knob("mlp or cnn; chosen by the observation", metavar="NAME")] = ""
    vectorization: Annotated[str, Knob("of environments", choices=("auto", "sync", "async", "vector"))] = (
        "auto"
    )
    log_every: Annotated[int, Knob("steps between rows of metrics", low=1)] = 1_000
    eval_every: Annotated[int, Knob("steps between evaluations; 0: only at the end", low=0)] = 25_000
    eval_episodes: Annotated[int, Knob("greedy episodes of an evaluation", low=1)] = 10
    final_episodes: Annotated[int, Knob("greedy episodes of the last evaluation", low=1)] = 30
    checkpoint_every: Annotated[int, Knob("steps between checkpoints; 0: only at the end", low=0)] = 100_000
    video: Annotated[bool, Knob("film an episode at each evaluation for TensorBoard")] = True

    def __post_init__(self) -> None:
        """Raises: UserError for a value out of range."""
        check(RunConfig, vars(self))


@dataclasses.dataclass(frozen=True)
class Result:
    """What `train` gives back."""

    path: Path
    agent: Agent
    summary: dict[str, Any]
    signal: int  # that ended the run early, or 0


def owners(agent: str, backbone: str) -> dict[str, Callable[..., Any]]:
    """Who owns which settings, by the title of their group of flags."""
    return {
        "run": RunConfig,
        f"agent {agent}": load(agent).Config,
        f"backbone {backbone}": backbones.load(backbone),
        "environment (Atari)": EnvConfig,
        "computing": ComputeConfig,
    }


def resolve(
    agent: str,
    given: Mapping[str, Any],
    file: Mapping[str, Any],
    preset: str | None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """All settings of a run: default < preset < file < given.

    Raises: UserError for an unknown agent, backbone, preset or setting, naming the nearest.
    """
    load(agent)
    asked = {**file, **given}
    spec = envs.resolve(asked.get("env") or "", say)
    name, chosen = presets.choose(agent, spec.id, preset)
    merged = {**chosen, **asked, "agent": agent, "env": spec.id, "preset": name}
    if not merged.get("backbone"):
        merged["backbone"] = _default_backbone(merged)
    known = {
        field.name: field.default
        for owner in owners(agent, merged["backbone"]).values()
        for field in fields(owner)
    }
    for key in asked:
        if key not in known and key not in ("agent", "preset"):
            raise UserError(
                f"unknown setting {key!r} for {agent} on {merged['backbone']}.{nearest(key, known)}"
            )
    for key in (
        chosen.keys() - known.keys()
    ):  # knobs of the preset's backbone, where another one was asked for
        del merged[key]
    return {"agent": agent, "preset": name, **known, **merged}


def parts(settings: Mapping[str, Any]) -> tuple[RunConfig, Any, dict[str, Any], EnvConfig, ComputeConfig]:
    """The settings dealt out: run, agent, backbone knobs, environment, computing."""
    dealt = [
        {field.name: settings[field.name] for field in fields(owner)}
        for owner in owners(settings["agent"], settings["backbone"]).values()
    ]
    run, agent, net, env, compute = dealt
    check(EnvConfig, env)
    check(ComputeConfig, compute)
    return (
        RunConfig(**run),
        load(settings["agent"]).Config(**agent),
        net,
        EnvConfig(**env),
        ComputeConfig(**compute),
    )


def train(
    agent: Agent | str,
    env: str,
    *,
    run: str | Path | None = None,
    root: str | Path = "runs",
    preset: str | None = None,
    file: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> Result:
    """Train an agent and leave a run folder.

    `agent` is a name, whose preset for `env` then applies as on the command line, or an agent object, which is taken
    as it is. `settings` are the flags by name: `train("dqn", "ALE/Pong", steps=100_000, lr=3e-4)`.
    Raises: UserError for anything that does not fit, before anything is written.
    """
    if not isinstance(agent, str):
        settings = {**dataclasses.asdict(agent.config), "backbone": agent.backbone, **agent.net, **settings}
        agent, preset = agent.name, "none"
    resolved = resolve(agent, {**settings, "env": env}, file or {}, preset, say or print)
    return _train(resolved, run, root, say or print)


def _train(
    settings: dict[str, Any], path: str | Path | None, root: str | Path, say: Callable[[str], None]
) -> Result:
    config, agent_config, net, env_config, compute_config = parts(settings)
    begun = time.perf_counter()
    streams = dict(
        zip(
            ("agent", "envs", "replay", "evaluation"),
            np.random.SeedSequence(config.seed).spawn(4),
            strict=True,
        )
    )
    env = envs.make(
        config.env, config.num_envs, config.seed, env_config, vectorization=config.vectorization, say=say
    )
    say(envs.describe(env))
    say(f"preset {settings['preset']}; backbone {settings['backbone']}")
    agent = load(settings["agent"])(agent_config, backbone=settings["backbone"], net=net)
    updates = (
        max(config.steps - agent_config.learning_starts, 0) // agent_config.train_every * agent_config.updates
    )
    compute = choose(compute_config, image=settings["backbone"] != "mlp", updates=updates, say=say)
    agent.build(env.single_observation_space, env.single_action_space, compute, streams["agent"], say)
    replay = _ring(agent_config, config, env, np.random.default_rng(streams["replay"]), env_config)
    chosen = {**dataclasses.asdict(compute), "compile": "on" if compute.compile else "off"}
    settings = {**settings, **chosen}  # a rerun of config.json repeats the choice
    evaluator = Evaluator(config.env, env_config, config.eval_episodes, _number(streams["evaluation"]))
    run = Run.create(settings, root=root, path=path)
    say(f"{compute}; run folder {run.path}")
    title = f"{settings['agent']} on {config.env}"
    with Stop() as stop, run, Panel(title, config.steps, folder=run.path) as panel:
        watch = Watch(
            agent,
            run,
            panel,
            stop,
            evaluator,
            envs.frame_skip(env),
            config.log_every,
            config.eval_every,
            config.checkpoint_every,
            config.steps,
            config.video,
            begun,
        )
        collector = Collector(env, _number(streams["envs"]))
        step = off_policy(agent, collector, replay, watch, config.steps)
        seconds, rates = watch.seconds, watch.rates(step)
        watch.save(step)
        if not stop.signal:
            watch.evaluator = Evaluator(config.env, env_config, config.final_episodes, evaluator.seed)
            watch.evaluate(step)
            watch.evaluator.close()
        collector.close()
        evaluator.close()
        summary = {
            "agent": settings["agent"],
            "env": config.env,
            "backbone": settings["backbone"],
            "seed": config.seed,
            "steps": step,
            "frames": step * envs.frame_skip(env),
            "updates": agent.updates,
            "seconds": seconds,
            "seconds_to_first_update": watch.first_update,
            "steps_per_second": rates,
            "evaluation": watch.evaluation or None,
            "peak_memory_bytes": _peak_memory(),
            "parameters": agent.parameters,
            "finished": not stop.signal,
        }
        run.summary(summary)
    return Result(run.path, agent, summary, stop.signal)


def restore(path: str | Path, which: str) -> tuple[Agent, dict[str, Any], EnvConfig]:
    """The agent of a saved run with its "best" or "latest" weights, the run's settings, and its environment knobs."""
    run = Run.open(path)
    settings: dict[str, Any] = run.config
    try:
        config, agent_config, net, env_config, _ = parts(settings)
    except KeyError as error:
        raise UserError(f"{path}/config.json lacks {error}; was it written by another version?") from None
    state = run.load(which)
    agent = load(settings["agent"])(agent_config, backbone=settings["backbone"], net=net)
    env = envs.make(config.env, 1, 0, env_config)
    compute = choose(
        ComputeConfig(precision=settings["precision"], compile="off"),
        image=settings["backbone"] != "mlp",
        updates=0,
        say=lambda line: None,
    )
    agent.build(
        env.single_observation_space, env.single_action_space, compute, np.random.SeedSequence(0), print
    )
    agent.load_weights(state["weights"])
    env.close()
    return agent, settings, env_config


def _default_backbone(settings: Mapping[str, Any]) -> str:
    """The backbone for what this environment shows; asks a copy of it."""
    names = {field.name for field in fields(EnvConfig)}
    config = EnvConfig(**{name: value for name, value in settings.items() if name in names})
    env = envs.make(settings["env"], 1, 0, config)
    try:
        return backbones.default(env.single_observation_space)
    finally:
        env.close()


def _ring(agent: Any, config: RunConfig, env: Any, rng: np.random.Generator, env_config: EnvConfig) -> Ring:
    """The replay; UserError if it cannot hold one sample or exceeds the memory that is free."""
    try:
        ring = Ring(
            min(agent.capacity, config.steps + config.steps // 4 + 1_000),
            config.num_envs,
            env.single_observation_space,
            env.single_action_space,
            stack=envs.frame_stack(env),
            n_step=agent.n_step,
            gamma=agent.gamma,
            rng=rng,
        )
    except ValueError as error:
        raise UserError(f"--capacity: {error}") from None
    free = _free_memory()
    if free is not None and ring.nbytes > free:
        raise UserError(
            f"--capacity {agent.capacity}: the replay would need {ring.nbytes / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free"
        )
    return ring


def _free_memory() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = next(line for line in file if line.startswith("MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration):
        return None  # other systems do not say


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _number(stream: np.random.SeedSequence) -> int:
    return int(stream.generate_state(1)[0] >> 1)
