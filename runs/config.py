"""Configurations: typed dataclasses that are also command-line flags, help pages and JSON files.

A knob is a field `name: Annotated[type, Knob("what it does", low=0)] = default`. From that one line come the flag,
its help, the range check and the key in config.json. Nothing here imports torch, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C", bound=Any)  # a class of knobs


class UserError(ValueError):
    """A mistake that the user can mend; the commands print it as one line and exit with code 2."""


class RunFailed(RuntimeError):
    """A run that cannot go on; the commands print it as one line and exit with code 1."""


@dataclasses.dataclass(frozen=True)
class Knob:
    """What a configuration field means and which values it takes.

    `low` and `high` are inclusive bounds, `above` an exclusive lower bound.
    """

    help: str
    low: float | None = None
    above: float | None = None
    high: float | None = None
    choices: tuple[str, ...] | None = None
    metavar: str | None = None


@dataclasses.dataclass(frozen=True)
class Field:
    """One knob of a callable: its name, type, default and `Knob`."""

    name: str
    type: Any
    default: Any
    knob: Knob

    @property
    def flag(self) -> str:
        """The command-line spelling, e.g. `--learning-starts`."""
        return "--" + self.name.replace("_", "-")


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest of `choices`, or "" if none is close."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.5)
    return f" Did you mean {by_lower[found[0]]!r}?" if found else ""


def pick(kind: str, name: str, choices: Mapping[str, Any]) -> Any:
    """Return `choices[name]`, or raise a `UserError` that lists what is allowed."""
    if name in choices:
        return choices[name]
    raise UserError(
        f"unknown {kind} {name!r}.{nearest(name, choices)} Allowed: {', '.join(sorted(choices))}."
    )


def fields(owner: Callable[..., Any]) -> list[Field]:
    """The knobs of a dataclass or of a constructor, in order: its parameters annotated with a `Knob`."""
    init = owner.__init__ if inspect.isclass(owner) else owner
    hints = typing.get_type_hints(owner if dataclasses.is_dataclass(owner) else init, include_extras=True)
    found = []
    for name, parameter in inspect.signature(typing.cast(Callable[..., Any], owner)).parameters.items():
        hint = hints.get(name)
        knob = next((item for item in getattr(hint, "__metadata__", ()) if type(item) is Knob), None)
        if knob is not None:
            found.append(Field(name, typing.get_args(hint)[0], parameter.default, knob))
    return found


def check(owner: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Raise `UserError` naming the first value that is of the wrong type or outside its knob's range."""
    known = {field.name: field for field in fields(owner)}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"unknown setting {name!r}.{nearest(name, known)}")
        _check_value(known[name], value)


def configured(kind: type[C], given: C | None, knobs: Mapping[str, Any]) -> C:
    """`given`, or else the defaults of `kind`, changed by `knobs`. Raises: UserError as `check` does."""
    check(kind, knobs)
    return dataclasses.replace(given or kind(), **knobs)


def needed(config: Any, parts: Mapping[str, tuple[bool, tuple[str, ...]]]) -> None:
    """Raise `UserError` for the first knob that was changed though its part is off: part -> (on, its knobs)."""
    for part, (on, names) in parts.items():
        for name in names:
            if not on and getattr(config, name) != getattr(type(config), name):
                raise UserError(f"--{name.replace('_', '-')} has no effect without {part}")


def _check_value(field: Field, value: Any) -> None:
    knob, allowed = field.knob, _allowed(field)
    if value is None and type(None) in typing.get_args(field.type):
        return
    if not _fits(field.type, value):
        raise UserError(f"{field.flag} must be {allowed}, got {value!r}")
    if knob.choices is not None and value not in knob.choices:
        raise UserError(f"{field.flag} must be {allowed}, got {value!r}.{nearest(str(value), knob.choices)}")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            if not math.isfinite(number) or (knob.low is not None and number < knob.low):
                raise UserError(f"{field.flag} must be {allowed}, got {value!r}")
            if (knob.above is not None and number <= knob.above) or (
                knob.high is not None and number > knob.high
            ):
                raise UserError(f"{field.flag} must be {allowed}, got {value!r}")


def _fits(kind: Any, value: Any) -> bool:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        if typing.get_origin(option) is tuple:
            item = typing.get_args(option)[0]
            if isinstance(value, tuple) and all(_fits(item, entry) for entry in value):
                return True
        elif option is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return True
        elif type(value) is option:
            return True
    return False


def _allowed(field: Field) -> str:
    knob = field.knob
    if knob.choices is not None:
        return "one of " + ", ".join(knob.choices)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    base = words.get(_scalar(field.type), "a value")
    if knob.low is not None and knob.high is not None:
        return f"{base} in [{knob.low:g}, {knob.high:g}]"
    parts = []
    if knob.low is not None:
        parts.append(f">= {knob.low:g}")
    if knob.above is not None:
        parts.append(f"> {knob.above:g}")
    if knob.high is not None:
        parts.append(f"<= {knob.high:g}")
    return " ".join([base, *([" and ".join(parts)] if parts else [])])


def _scalar(kind: Any) -> Any:
    """The element type of `int | None`, `tuple[int, ...]` and the like."""
    if isinstance(kind, types.UnionType):
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are `UserError`s of one line with the nearest flag."""

    def __init__(self, **keywords: Any) -> None:
        """Fix what every command shares: no abbreviations, help that keeps its lines within 80 columns."""
        super().__init__(
            allow_abbrev=False, formatter_class=_Help, argument_default=argparse.SUPPRESS, **keywords
        )
        self._negative_number_matcher = re.compile(r"^-(\d|\.\d|inf)")  # argparse's takes -1e-3 for a flag

    def error(self, message: str) -> typing.NoReturn:
        """Raise instead of exiting, so that one place prints errors."""
        raise UserError(re.sub(r"^argument \S+: (?=--)", "", message))  # our own messages begin with the flag

    def add_knobs(
        self, title: str, owner: Callable[..., Any], defaults: Mapping[str, Any] | None = None
    ) -> None:
        """Add a group with one flag for each knob of `owner`; flags that are not given stay out of the result."""
        group = self.add_argument_group(title)
        for field in fields(owner):
            if (
                field.flag in self._option_string_actions
            ):  # two rooms may share a knob; the first one shows it
                continue
            default = (defaults or {}).get(field.name, field.default)
            shown = (
                "" if default is None or default == () or default == "" else f" (default {_show(default)})"
            )
            choices = f": {', '.join(field.knob.choices)}" if field.knob.choices else ""
            text = (field.knob.help + choices + shown).replace("%", "%%")
            if field.type is bool:
                group.add_argument(field.flag, action=argparse.BooleanOptionalAction, help=text)
            elif typing.get_origin(field.type) is tuple:
                metavar = field.knob.metavar or "N"
                group.add_argument(field.flag, nargs="*", type=_reader(field), metavar=metavar, help=text)
            else:
                metavar = field.knob.metavar or {int: "N", float: "X"}.get(_scalar(field.type), "NAME")
                group.add_argument(field.flag, type=_reader(field), metavar=metavar, help=text)

    def read(self, arguments: list[str]) -> dict[str, Any]:
        """Parse; return only what was given. Unknown flags are named with the nearest known one."""
        given, unknown = self.parse_known_args(arguments)
        for word in unknown:
            name = word.split("=")[0]
            if name.startswith("-"):
                raise UserError(
                    f"unknown flag {name}.{nearest(name, self._option_string_actions)} See --help."
                )
            raise UserError(f"unexpected argument {word!r}. See --help.")
        return {
            name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()
        }


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=80)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0][2:]}"
        return super()._format_action_invocation(action)


def _reader(field: Field) -> Callable[[str], Any]:
    kind = _scalar(field.type)

    def read(text: str) -> Any:
        try:
            # 1e6 and 1_000_000 are welcome where a whole number is wanted
            value = kind(text) if kind is not int else _whole(text)
            _check_value(dataclasses.replace(field, type=kind), value)
        except UserError as error:  # argparse replaces the message of any other ValueError by its own
            raise argparse.ArgumentTypeError(str(error)) from None
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(
                f"{field.flag} must be {_allowed(field)}, got {text!r}"
            ) from None
        return value

    return read


def _whole(text: str) -> int:
    value = float(text)
    if value != int(value):
        raise ValueError(text)
    return int(text.replace("_", "")) if text.replace("_", "").lstrip("+-").isdigit() else int(value)


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:,}".replace(",", "_") if isinstance(value, int) and value >= 10_000 else str(value)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; `UserError` if the file is missing, unreadable or not an object."""
    try:
        loaded = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, ValueError, RecursionError) as error:  # of bytes, of JSON, or of endless nesting
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(loaded).__name__}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in loaded.items()}
