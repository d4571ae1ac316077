"""From settings to a finished run: the assembly around the loop.

A run is described by flat settings, one name each, the same as the command-line flags. `resolve` lays default <
preset < file < given over each other, `parts` deals them out to the rooms.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from gymnasium import spaces

import backbones
import envs
from agents import load, presets
from agents.base import Agent, default_backbone
from agents.evaluate import Evaluator
from agents.loop import off_policy, on_policy
from agents.tables import Table
from agents.watch import Stop, Watch
from backbones.compute import Compute, ComputeConfig, choose
from envs import Collector, EnvConfig
from envs.atari import is_atari, protocol
from replay import Ring, SequenceRing
from runs import Run
from runs.config import Knob, UserError, check, fields, nearest
from runs.panel import Panel

WIDE = 128  # dense layers of so many numbers gain from a second thread
OBJECT = "object:"  # in config.json, before the class of a backbone that was given as an object


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What belongs to the run rather than to one of its parts."""

    env: Annotated[str, Knob("environment id, e.g. ALE/Pong or CartPole-v1", metavar="ID")] = ""
    steps: Annotated[int, Knob("agent steps, over all environments", low=1)] = 100_000
    seed: Annotated[int, Knob("everything random follows from it", low=0)] = 0
    num_envs: Annotated[int, Knob("environments stepped together", low=1)] = 1
    backbone: Annotated[
        str, Knob(f"{', '.join(backbones.BACKBONES)} or table; chosen by the observation", metavar="NAME")
    ] = ""
    vectorization: Annotated[str, Knob("of environments", choices=("auto", "sync", "async", "vector"))] = (
        "auto"
    )
    env_timeout: Annotated[float, Knob("seconds until an async environment counts as hung", above=0)] = 60.0
    log_every: Annotated[int, Knob("steps between rows of metrics", low=1)] = 1_000
    eval_every: Annotated[int, Knob("steps between evaluations; 0: only at the end", low=0)] = 25_000
    eval_episodes: Annotated[int, Knob("greedy episodes of an evaluation", low=1)] = 10
    final_episodes: Annotated[int, Knob("greedy episodes of the last evaluation", low=1)] = 30
    max_skipped: Annotated[int, Knob("non-finite updates in a row that end the run", low=1)] = 100
    checkpoint_every: Annotated[int, Knob("steps between checkpoints; 0: only at the end", low=0)] = 100_000
    save_replay: Annotated[bool, Knob("checkpoints hold the replay; else a resumed run refills it")] = True
    video: Annotated[bool, Knob("film an episode at each evaluation for TensorBoard")] = True

    def __post_init__(self) -> None:
        """Raises: UserError for a value out of range."""
        check(RunConfig, vars(self))


class Parts(NamedTuple):
    """The settings of a run by owner."""

    run: RunConfig
    agent: Any
    net: dict[str, Any]  # the knobs of the backbone, and of the encoder below it
    env: EnvConfig
    compute: ComputeConfig


@dataclasses.dataclass(frozen=True)
class Result:
    """What `train` gives back."""

    path: Path
    agent: Agent
    summary: dict[str, Any]
    signal: int  # that ended the run early, or 0
    saved: int | None  # step of the newest checkpoint


def owners(agent: str, backbone: str, encoder: str | None = None) -> dict[str, Callable[..., Any]]:
    """Who owns which settings, by the title of their group of flags.

    `encoder`: the net below a backbone with memory; others have none.
    """
    kind = load(agent)
    net: dict[str, Callable[..., Any]] = {}
    if not backbone.startswith(OBJECT):
        if backbone not in kind.backbones:
            allowed = ", ".join(kind.backbones)
            raise UserError(
                f"--backbone of {agent} must be one of {allowed}, got {backbone!r}.{nearest(backbone, kind.backbones)}"
            )
        net = {f"backbone {backbone}": Table if backbone == "table" else backbones.load(backbone)}
        if backbone in backbones.MEMORY and encoder is not None:
            if type(encoder) is not str:
                raise UserError(
                    f"an encoder object belongs into a backbone object, of {backbone} in this case"
                )
            check(backbones.load(backbone), {"encoder": encoder})
            net[f"encoder {encoder}"] = backbones.load(encoder)
    return {
        "run": RunConfig,
        f"agent {agent}": kind.Config,
        **net,
        "environment (Atari)": EnvConfig,
        "computing": ComputeConfig,
    }


def resolve(
    agent: str,
    given: Mapping[str, Any],
    file: Mapping[str, Any],
    preset: str | None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """All settings of a run: default < preset < file < given.

    Raises: UserError for an unknown agent, backbone, preset or setting, naming the nearest.
    """
    asked = {**file, **given}
    check(RunConfig, {name: asked[name] for name in ("env", "backbone") if name in asked})
    env_id = envs.full_id(asked.get("env") or "")
    if env_id != asked["env"]:
        say(f"{asked['env']} is {env_id}")
    name, chosen = presets.choose(agent, env_id, preset)
    atari = {field.name for field in fields(EnvConfig)}
    if not _has_screen(env_id, asked.get("obs", "auto")):  # sizes and stacks mean nothing there
        chosen = {key: value for key, value in chosen.items() if key not in atari | {"net"}}
    merged = {**chosen, **asked, "agent": agent, "env": env_id, "preset": name}
    if not merged.get("backbone"):
        merged["backbone"] = default_backbone(load(agent).backbones, _observed(env_id, merged))
    if merged["backbone"] in backbones.MEMORY and merged.get("encoder") is None:
        merged["encoder"] = backbones.default(_observed(env_id, merged))
    groups = _owners(merged).values()
    known = {field.name: field.default for owner in groups for field in fields(owner)}
    for key in asked.keys() - known.keys() - {"agent", "preset"}:
        net = f"{merged['backbone']} above {merged['encoder']}" if "encoder" in merged else merged["backbone"]
        raise UserError(f"unknown setting {key!r} for {agent} on {net}.{nearest(key, known)}")
    # knobs of the preset's backbone or distribution, where another one was asked for
    forgets = {"sequence", "burn_in"} if merged["backbone"] in backbones.FEEDFORWARD else set()
    if merged.get("distributional") != chosen.get("distributional"):
        forgets |= {"atoms", "v_min", "v_max"}
    for key in chosen.keys() - (known.keys() - forgets) - asked.keys():
        del merged[key]
    resolved = {"agent": agent, "preset": name, **known, **merged}
    for schedule in ("lr", "clip"):
        reached = resolved.get(f"{schedule}_steps")
        if resolved.get(f"{schedule}_end") is not None and reached != resolved["steps"]:
            say(
                f"--{schedule} reaches its end at step {reached:,} of {resolved['steps']:,} (--{schedule}-steps)"
            )
    return resolved


def parts(settings: Mapping[str, Any]) -> Parts:
    """The settings dealt out to those who own them.

    Raises: UserError for a value out of range; KeyError for a setting that is missing.
    """
    dealt = {
        title.split()[0]: {field.name: settings[field.name] for field in fields(owner)}
        for title, owner in _owners(settings).items()
    }
    for title, owner in _owners(settings).items():
        if title.startswith(("backbone", "encoder")):
            check(owner, dealt[title.split()[0]])
    check(EnvConfig, dealt["environment"])
    check(ComputeConfig, dealt["computing"])
    return Parts(
        RunConfig(**dealt["run"]),
        load(settings["agent"]).Config(**dealt["agent"]),
        {**dealt.get("backbone", {}), **dealt.get("encoder", {})},
        EnvConfig(**dealt["environment"]),
        ComputeConfig(**dealt["computing"]),
    )


def train(
    agent: Agent | str,
    env: str,
    *,
    run: str | Path | None = None,
    root: str | Path = "runs",
    preset: str | None = None,
    file: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
    **settings: Any,
) -> Result:
    """Train an agent and leave a run folder.

    `agent` is a name, whose preset for `env` then applies as on the command line, or an agent object, which is built
    and trained as it is, without a preset. `settings` are the flags by name:
    `train("dqn", "ALE/Pong", steps=100_000, lr=3e-4)`.
    Raises: UserError for anything that does not fit, before anything is written.
    """
    begun = time.perf_counter()
    if isinstance(agent, str):
        resolved = resolve(agent, {**settings, "env": env}, file or {}, preset, say)
        chosen = parts(resolved)
        learner: Agent = load(agent)(chosen.agent, backbone=resolved["backbone"], net=chosen.net)
    else:
        learner = agent
        own = {**dataclasses.asdict(agent.config), **agent.net, "backbone": agent.backbone}
        for key in settings.keys() & own.keys():
            raise UserError(f"{key} belongs to the agent object: give it to {type(agent).__name__}(...)")
        if not isinstance(agent.backbone, str):
            own["backbone"] = f"{OBJECT}{type(agent.backbone).__name__}"
        resolved = resolve(agent.name, {**own, **settings, "env": env}, file or {}, "none", say)
        chosen = parts(resolved)

    def start(decided: dict[str, Any]) -> Start:
        return Run.create(decided, root=root, path=run), 0, None

    return _train(learner, resolved, chosen, start, say, begun)


def resume(
    path: str | Path,
    *,
    agent: Agent | None = None,
    steps: int | None = None,
    strict: bool = False,
    say: Callable[[str], None] = print,
    **computing: Any,
) -> Result:
    """Go on with a run where its newest usable checkpoint stands, to the bit as if it had never stopped.

    `steps` makes it longer; `computing` changes knobs of `ComputeConfig`, such as `threads`. `agent` is needed if the
    run was started with an agent object on a backbone object. What can change bits (versions, machine, threads) is
    named, and refused if `strict`.
    Raises: UserError if the folder holds no run that can go on.
    """
    begun = time.perf_counter()
    opened = Run.open(path)
    settings = _complete(opened)
    of_object = str(settings["backbone"]).startswith(OBJECT)
    if agent is None and of_object:
        raise UserError(
            f"{path} was trained on a backbone object: give resume() the agent object it was given"
        )

    compare = partial(_compare, path, strict, say)
    compare(opened.differences())
    check(ComputeConfig, computing)
    settings |= computing
    asked, end = settings["steps"], opened.finished
    if steps is not None:
        settings["steps"] = steps
    if end is not None and end >= settings["steps"]:
        raise UserError(f"{path} is finished at step {end:,}; give --steps more than that to go on")
    chosen = parts(settings)

    def start(decided: dict[str, Any]) -> Start:
        saved = opened.config
        computing = [
            field.name for field in fields(ComputeConfig) if saved.get(field.name) != decided[field.name]
        ]
        compare([f"--{name} was {saved.get(name)}, is {decided[name]}" for name in computing])
        run, step, state = Run.resume(path, say)
        if settings["steps"] <= step < asked:
            run.close()
            raise UserError(f"{path} is at step {step:,} already; give --steps more than that to go on")
        run.configure(decided)
        say(f"resuming at step {step:,}" if state else "no checkpoint yet: beginning anew at step 0")
        return run, step, state

    if agent is None:
        made = load(settings["agent"])(chosen.agent, backbone=settings["backbone"], net=chosen.net)
        return _train(made, settings, chosen, start, say, begun)
    if agent.name != settings["agent"] or agent.config != chosen.agent:
        raise UserError(f"{path} was trained by {settings['agent']} with other settings than this object's")

    return _train(agent, settings, chosen, start, say, begun)


def _computing(agent: Agent, backbone: str, env: Any, chosen: Parts, say: Callable[[str], None]) -> Compute:
    """Device, precision, threads and compilation for this run. Raises: UserError for what cannot be compiled."""
    updates = chosen.agent.rounds(chosen.run.steps, chosen.run.num_envs)
    if _remembers(backbone, agent):  # such a pass is cut up as episodes happen to end: no graph fits the next
        if chosen.compute.compile == "on":
            raise UserError(f"--compile on: updates of a backbone with memory ({backbone}) are not compiled")
        updates = 0
    return choose(chosen.compute, image=_sees_image(env), wide=wide(chosen.net), updates=updates, say=say)


def _compare(path: str | Path, strict: bool, say: Callable[[str], None], differences: list[str]) -> None:
    """Name what can change bits; refuse it if `strict`."""
    if strict and differences:
        raise UserError(f"--strict: {path} cannot go on to the bit: {'; '.join(differences)}")
    for difference in differences:
        say(f"bits may differ from an undisturbed run: {difference}")


def _remembers(name: str, agent: Agent) -> bool:
    """Whether the backbone, a name or the agent's object, has a memory."""
    return agent.backbone.memory if name.startswith(OBJECT) else name in backbones.MEMORY


Start = tuple[Run, int, dict[str, Any] | None]  # an open run, the step it stands at, and what was saved there


def _train(
    agent: Agent,
    settings: dict[str, Any],
    chosen: Parts,
    start: Callable[[dict[str, Any]], Start],
    say: Callable[[str], None],
    begun: float,
) -> Result:
    config = chosen.run
    of_agent, of_envs, of_replay, of_evaluation = np.random.SeedSequence(config.seed).spawn(4)
    how: Any = dict(vectorization=config.vectorization, timeout=config.env_timeout)
    env = envs.make(config.env, config.num_envs, config.seed, chosen.env, **how)
    say(envs.describe(env))
    say(f"preset {settings['preset']}; backbone {settings['backbone']}")
    compute = _computing(agent, settings["backbone"], env, chosen, say)
    agent.build(env.single_observation_space, env.single_action_space, compute, of_agent, say)
    # the emulator of a single game takes more from the learning threads than the overlap gives back
    overlap = config.num_envs > 1 or compute.device != "cpu"
    collector = Collector(env, _number(of_envs), overlap=overlap, resumable=True)
    off = agent.loop == "off_policy"
    drawing = np.random.default_rng(of_replay)
    memory: Any = replay_of(agent, env, drawing) if off else agent.memory(collector.obs)  # type: ignore[attr-defined]  # on-policy agents have one
    if not collector.exact:
        say(f"{config.env} can neither be saved nor rebuilt: its episodes restart when the run is resumed")
    decided = {field.name: getattr(compute, field.name) for field in fields(ComputeConfig)}
    decided["compile"] = "on" if compute.compile else "off"
    run, step, state = start({**settings, **decided})  # a rerun of config.json decides the same
    say(f"{compute}; run folder {run.path}")
    seed = _number(of_evaluation)
    title = f"{agent.name} on {config.env}"
    with Stop() as stop, run, Panel(title, config.steps, folder=run.path) as panel:
        evaluator = Evaluator(config.env, chosen.env, config.eval_episodes, seed)
        watch = Watch(
            agent, collector, memory, run, panel, stop, evaluator, envs.frame_skip(env), config, begun
        )
        if state is not None:
            _restore(watch, state)
        drive = off_policy if off else on_policy
        step = drive(agent, collector, memory, watch, config.steps, step)
        seconds, rates = watch.seconds, watch.rates(step)
        watch.save(step)
        collector.close()
        watch.evaluator.close()
        if not stop.signal:
            watch.evaluator = Evaluator(config.env, chosen.env, config.final_episodes, seed)
            watch.evaluate(step)
            watch.evaluator.close()
        facts = {
            "agent": agent.name,
            "env": config.env,
            "backbone": settings["backbone"],
            "seed": config.seed,
            **watch.facts(step, seconds, rates),
            "peak_memory_bytes": _peak_memory(),
        }
        _finish(run, facts, watch.saved)
    return Result(run.path, agent, facts, stop.signal, watch.saved)


def _restore(watch: Watch, state: dict[str, Any]) -> None:
    """Raises: UserError if the state does not fit the settings."""
    try:
        watch.restore(state)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint in {watch.run.path} does not fit its config.json: {error}") from None


def _finish(run: Run, facts: dict[str, Any], saved: int | None) -> None:
    """Write what came out. Raises: UserError if the disk refuses what belongs to the end of a run."""
    try:
        run.summary(facts)
        run.flush()
    except OSError as error:
        since = "anew" if saved is None else f"from step {saved:,}"
        raise UserError(
            f"the end of the run could not be written ({error}); make room, then --resume makes it again {since}"
        ) from None


def _complete(run: Run) -> dict[str, Any]:
    """The settings of a saved run; a knob that came after it had its default's effect then.

    Raises: UserError if config.json does not describe a run of these commands.
    """
    settings = run.config
    try:
        groups = _owners({"backbone": "", **settings}).values()
        settings = {field.name: field.default for owner in groups for field in fields(owner)} | settings
        parts(settings)
    except KeyError as error:
        raise UserError(
            f"{run.path}/config.json lacks {error}; it describes no run of these commands"
        ) from None
    return settings


def restore(path: str | Path, which: str) -> tuple[Agent, dict[str, Any], EnvConfig]:
    """The agent of a saved run with its "best" or "latest" weights, the run's settings, and its environment knobs.

    Raises: UserError if the run was made by another version, or with a backbone that only its program knows.
    """
    run = Run.open(path)
    if str(run.config.get("backbone", "")).startswith(OBJECT):
        raise UserError(f"{path} was trained on a backbone object of its program; load its weights there")
    settings = _complete(run)
    chosen = parts(settings)
    state = run.load(which)
    agent = load(settings["agent"])(chosen.agent, backbone=settings["backbone"], net=chosen.net)
    env = envs.make(chosen.run.env, 1, 0, chosen.env)
    asked = ComputeConfig(precision=settings["precision"], compile="off")
    compute = choose(asked, image=_sees_image(env), wide=False, updates=0, say=_silent)
    agent.build(
        env.single_observation_space, env.single_action_space, compute, np.random.SeedSequence(0), _silent
    )
    env.close()
    try:
        agent.load_weights(state["weights"])
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"the weights in {path} do not fit its config.json: {str(error).splitlines()[-1].strip()}"
        ) from None
    return agent, settings, chosen.env


def _owners(settings: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    return owners(settings["agent"], settings["backbone"], settings.get("encoder"))


def _observed(env_id: str, settings: Mapping[str, Any]) -> spaces.Space[Any]:
    """The space of what this environment shows; asks a copy of it."""
    config = {field.name: settings[field.name] for field in fields(EnvConfig) if field.name in settings}
    env = envs.make(env_id, 1, 0, EnvConfig(**config))
    env.close()
    return env.single_observation_space


def _has_screen(env_id: str, obs: str) -> bool:
    """Whether the environment is an Atari game whose picture the agent sees."""
    check(EnvConfig, {"obs": obs})
    spec = envs.resolve(env_id)
    return is_atari(spec) and not protocol(spec, EnvConfig(obs=obs)).ram


def _sees_image(env: Any) -> bool:
    return backbones.default(env.single_observation_space) == "cnn"


def replay_of(agent: Any, env: Any, rng: np.random.Generator) -> Ring | SequenceRing:
    """The replay of an agent that was built: of sequences where it has memory.

    Raises: UserError if it cannot hold one sample, or what this environment shows, or exceeds free memory.
    """
    space, free, config = env.single_observation_space, _free_memory(), agent.config
    frame = math.prod(space.shape or ()) * getattr(space.dtype, "itemsize", 8) // envs.frame_stack(env)
    state = agent.initial(1)
    kept = sum(leaf.nbytes for leaf in state) // SequenceRing.apart(config.sequence) if state else 0
    needed = config.capacity * (frame + 16 + kept)
    if free is not None and needed > free:
        raise UserError(
            f"--capacity {config.capacity}: the replay would need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        )
    holds = (config.capacity, env.num_envs, space, env.single_action_space)
    how: Any = dict(stack=envs.frame_stack(env), rng=rng, **config.replay)
    try:
        return SequenceRing(*holds, state=state, **config.sequences, **how) if state else Ring(*holds, **how)
    except ValueError as error:
        raise UserError(str(error)) from None


def wide(net: Mapping[str, Any]) -> bool:
    """Whether a dense layer is so wide that a second thread pays; yes where a backbone has none to choose."""
    return max(net.get("hidden", (WIDE,)), default=0) >= WIDE


def _silent(line: str) -> None:
    """What was said when the run was made need not be said again."""


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
