"""The command that trains.

python -m agents.run AGENT --env ID [--backbone NAME] [--steps N] [--seed S] [--num-envs N] [--device auto|cpu|cuda]
                     [--run DIR] [--preset NAME] [--config FILE.json] [agent, backbone and environment flags]
python -m agents.run AGENT --run DIR --resume [--steps N] [--strict]
"""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Callable
from typing import Any

from agents import AGENTS, load
from runs.config import Parser, RunFailed, UserError, pick, read_json

COMPUTING = {
    "device",
    "precision",
    "threads",
    "compile",
}  # may change when a run is resumed, and is then named
USAGE = """usage: python -m agents.run AGENT --env ID [flags]

Train an agent. AGENT is one of: {agents}.

  python -m agents.run dqn --env ALE/Pong          its preset chosen by itself
  python -m agents.run dqn --env CartPole-v1 --seed 1 --steps 50_000
  python -m agents.run qtable --env FrozenLake-v1  thousands of copies at once
  python -m agents.run dqn --help                  every flag, with its default

Then: python -m agents.evaluate RUN, python -m agents.play RUN --video FILE.mp4,
tensorboard --logdir runs"""


def guarded(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command: a user's mistake becomes one line on standard error and exit code 2."""
    try:
        return main(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def main(arguments: list[str]) -> int:
    """Parse, train, and say what to do next."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(agents=", ".join(AGENTS)))
        return 0 if arguments else 2
    name, *rest = arguments
    if name.startswith("-"):
        raise UserError(f"the first word must be an agent ({', '.join(AGENTS)}), got {name}")
    pick("agent", name, AGENTS)
    given = _parser(name, _value_of("--backbone", rest), _value_of("--encoder", rest)).read(rest)
    again, strict = given.pop("resume"), given.pop("strict")
    if again:
        return _report(_resume(name, given, strict))
    if strict:
        raise UserError("--strict belongs to --resume")
    if "env" not in given and "config" not in given:
        raise UserError("--env is needed, for example --env ALE/Pong or --env CartPole-v1")
    file = _settings(given.pop("config")) if "config" in given else {}
    if file.get("agent", name) != name:
        raise UserError(f"the configuration file is for agent {file['agent']!r}, not {name!r}")
    path, preset = given.pop("run", None), given.pop("preset", file.pop("preset", None))
    from agents.training import train

    env = given.pop("env", None) or file.get("env")
    result = train(name, env or "", run=path, preset=preset, file=file, **given)
    return _report(result)


def _resume(name: str, given: dict[str, Any], strict: bool) -> Any:
    """Go on with a run; settings that are given anew must be those it has, but for its length."""
    from agents.training import resume
    from envs import full_id
    from runs import Run

    if "run" not in given:
        raise UserError("--resume needs --run DIR, the folder of the run to go on with")
    path, steps = given.pop("run"), given.pop("steps", None)
    saved = Run.open(path).config
    if saved.get("agent") != name:
        raise UserError(f"{path} is a run of {saved.get('agent')!r}, not of {name!r}")
    if "env" in given:
        given["env"] = full_id(given["env"])
    computing = {key: given.pop(key) for key in COMPUTING & given.keys()}
    for key, value in given.items():
        if saved.get(key) != value:
            flag = key.replace("_", "-")
            raise UserError(
                f"--{flag} cannot change when a run is resumed, it is {saved.get(key)}; --steps can, and how to compute"
            )
    return resume(path, steps=steps, strict=strict, **computing)


def _parser(agent: str, backbone: str | None, encoder: str | None) -> Parser:
    """All flags; those of every backbone and encoder are shown until one is chosen."""
    from agents.training import owners
    from backbones import FEEDFORWARD

    text = "Values come from: default < preset < --config < flag. Steps are agent decisions."
    parser = Parser(prog=f"python -m agents.run {agent}", description=text, usage="%(prog)s --env ID [flags]")
    where = parser.add_argument_group("files")
    where.add_argument("--run", metavar="DIR", help="run folder (default runs/<env>/<agent>/<name>)")
    where.add_argument(
        "--preset", metavar="NAME", help="settings by name; none for none (default by agent and env)"
    )
    where.add_argument("--resume", action="store_true", default=False, help="go on with the run in --run")
    where.add_argument("--strict", action="store_true", default=False, help="refuse to if bits may differ")
    where.add_argument("--config", metavar="FILE", help="JSON file of settings, e.g. a run's config.json")
    nets, below = [backbone] if backbone else load(agent).backbones, [encoder] if encoder else FEEDFORWARD
    for net, encoder in itertools.product(nets, below):
        for title, owner in owners(agent, net, encoder).items():
            if title not in [group.title for group in parser._action_groups]:
                parser.add_knobs(title, owner)
    return parser


def _value_of(flag: str, words: list[str]) -> str | None:
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word == flag:
            return following
        if word.startswith(flag + "="):
            return word.partition("=")[2]
    return None


def _settings(path: str) -> dict[str, Any]:
    """Settings of a JSON file: flat, or under "config" as a run folder keeps them."""
    loaded = read_json(path)
    nested = loaded.get("config", loaded)
    if not isinstance(nested, dict):
        raise UserError(f"{path}: 'config' must hold settings by name, got {nested!r}")
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in nested.items()}
    if nested is loaded:
        settings.pop("preset", None)
    else:  # a run's own config.json holds every setting; the preset's are among them
        settings["preset"] = "none"
    return settings


def _report(result: Any) -> int:
    """Where the run is, what it reached, and the next commands to type."""
    run, facts = shlex.quote(str(result.path)), result.summary
    if result.signal:
        kept = "everything is saved"
        if result.saved != facts["steps"]:
            kept = f"saved to step {result.saved:,}" if result.saved else "but no checkpoint could be saved"
        print(f"\nStopped by signal {result.signal} at step {facts['steps']:,}, {kept}. To go on:")
        print(f"  python -m agents.run {facts['agent']} --run {run} --resume\n")
    else:
        score, rate = facts["evaluation"], facts["steps_per_second"]["whole"]
        print(
            f"\n{facts['env']}: {score['mean']:.2f} +- {score['std']:.2f} over {score['episodes']} greedy episodes"
        )
        print(
            f"{facts['steps']:,} steps ({facts['frames']:,} frames) in {facts['seconds'] / 60:.1f} min, "
            f"{rate:.0f} steps/s"
        )
    print(f"Run folder: {result.path}\n")
    which = "" if facts["evaluation"] else " --weights latest"  # there is no best without an evaluation
    print(f"  python -m agents.play {run}{which} --video episode.mp4")
    print(f"  python -m agents.evaluate {run}{which}")
    print(f"  python -m runs.report {run}")
    print("  tensorboard --logdir runs")
    return 128 + result.signal if result.signal else 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
