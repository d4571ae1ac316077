"""Configurations: every wrong value is one line that names the flag, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runs.config import Knob, Parser, UserError, check, fields, nearest, pick, read_json


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: Annotated[int, Knob("decisions to take", low=1)] = 1_000_000
    lr: Annotated[float, Knob("step size of the optimiser", above=0, high=1)] = 1e-4
    gamma: Annotated[float, Knob("discount per step", low=0, high=1)] = 0.99
    shift: Annotated[float, Knob("added to each reward, 100 % of it")] = 0.0
    hidden: Annotated[tuple[int, ...], Knob("widths of the dense layers", low=1)] = (256, 128)
    sticky: Annotated[float | None, Knob("probability of repeating an action; none: the id's own", low=0)] = (
        None
    )
    net: Annotated[str, Knob("trunk", choices=("nature", "impala", "light"))] = "nature"
    double_q: Annotated[bool, Knob("the online net picks the action")] = True
    life_loss: Annotated[bool, Knob("end at each lost life")] = False
    run: Annotated[str | None, Knob("folder of the run", metavar="DIR")] = None
    unseen: int = 3  # no knob


class Owner:
    """Knobs of a constructor, as agents and backbones have them."""

    def __init__(
        self, space: Any, *, width: Annotated[int, Knob("width", low=1)] = 8, other: int = 0
    ) -> None: ...


def parser(owner: Any = Settings, **defaults: Any) -> Parser:
    made = Parser(prog="prog", description="A command.")
    made.add_knobs("settings", owner, defaults)
    return made


def read(*words: str) -> dict[str, Any]:
    return parser().read(list(words))


def complaint(call: Any, *arguments: Any) -> str:
    """The message of the `UserError` that the call raises; it must be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# -- fields --------------------------------------------------------------------------------------------------


def test_fields_are_the_annotated_ones_in_order() -> None:
    found = fields(Settings)
    names = [field.name for field in dataclasses.fields(Settings)]
    assert [field.name for field in found] == names[:-1]
    assert [field.default for field in found] == [getattr(Settings(), name) for name in names[:-1]]
    assert found[0].type is int and found[4].type == tuple[int, ...] and found[5].type == float | None
    assert found[7].flag == "--double-q"
    assert found[0].knob == Knob("decisions to take", low=1)


def test_fields_of_a_constructor_and_of_a_function() -> None:
    def function(width: Annotated[int, Knob("width")] = 3) -> None: ...

    assert [(field.name, field.default) for field in fields(Owner)] == [("width", 8)]
    assert [(field.name, field.default) for field in fields(function)] == [("width", 3)]


def test_a_knob_is_the_same_from_flag_to_json(tmp_path: Path) -> None:
    given = read("--steps", "5", "--hidden", "3", "4", "--no-double-q", "--run", "x", "--sticky", "0.5")
    (tmp_path / "config.json").write_text(json.dumps(given))
    loaded = read_json(tmp_path / "config.json")
    assert loaded == given
    check(Settings, loaded)
    assert Settings(**loaded) == Settings(steps=5, hidden=(3, 4), double_q=False, run="x", sticky=0.5)


# -- good values ---------------------------------------------------------------------------------------------


def test_defaults_pass_the_check() -> None:
    defaults = {field.name: field.default for field in fields(Settings)}
    assert len(defaults) > 5
    check(Settings, defaults)  # raises if one is out of its own range


def test_only_what_was_given_comes_back() -> None:
    assert read() == {}
    assert read("--gamma", "0.99") == {"gamma": 0.99}  # also where it is the default


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1000000", 1_000_000),
        ("1_000_000", 1_000_000),
        ("1e6", 1_000_000),
        ("2.5e3", 2_500),
        ("3.0", 3),
        ("+7", 7),
        ("9007199254740993", 2**53 + 1),  # no detour over float
    ],
)
def test_whole_numbers(text: str, value: int) -> None:
    assert read("--steps", text) == {"steps": value}
    assert type(read("--steps", text)["steps"]) is int


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 10**30))
def test_whole_numbers_are_exact(number: int) -> None:
    assert read("--steps", str(number)) == read(f"--steps={number:_}") == {"steps": number}


@pytest.mark.parametrize("text", ["-1", "-0.5", "-.5", "-1e-3", "-2E6", "-1_000"])
@pytest.mark.parametrize("join", [True, False])
def test_negative_numbers_are_values(text: str, join: bool) -> None:
    words = [f"--shift={text}"] if join else ["--shift", text]
    assert read(*words) == {"shift": float(text)}


def test_a_whole_number_serves_as_a_number() -> None:
    check(Settings, {"gamma": 1, "lr": 1, "sticky": 0})
    assert read("--gamma", "1") == {"gamma": 1.0}


def test_tuples() -> None:
    assert read("--hidden", "64") == {"hidden": (64,)}
    assert read("--hidden", "64", "1e2", "--steps", "3") == {"hidden": (64, 100), "steps": 3}
    assert read("--hidden") == {"hidden": ()}


def test_switches() -> None:
    assert read("--life-loss", "--no-double-q") == {"life_loss": True, "double_q": False}
    assert read("--no-life-loss", "--life-loss") == {"life_loss": True}


def test_settings_that_may_be_none() -> None:
    check(Settings, {"sticky": None, "run": None})
    assert read("--sticky", "0.25", "--run", "here") == {"sticky": 0.25, "run": "here"}
    for name in ("steps", "lr", "hidden", "net", "double_q"):
        assert "got None" in complaint(check, Settings, {name: None})


def test_bounds_belong_to_the_range() -> None:
    check(Settings, {"gamma": 0.0})
    check(Settings, {"gamma": 1.0, "lr": 1.0, "steps": 1})
    for name, beyond in (("gamma", 1.0001), ("gamma", -0.0001), ("lr", 1.0001), ("steps", 0)):
        assert f"got {beyond}" in complaint(check, Settings, {name: beyond})


# -- wrong values --------------------------------------------------------------------------------------------

STEPS, LR, GAMMA = "a whole number >= 1", "a number > 0 and <= 1", "a number in [0, 1]"
NET, HIDDEN, STICKY = "one of nature, impala, light", "a whole number >= 1", "a number >= 0"

WRONG = [
    ("steps", "ten", STEPS),
    ("steps", "", STEPS),
    ("steps", "0", STEPS),
    ("steps", "-5", STEPS),
    ("steps", "1.5", STEPS),
    ("steps", "1e-3", STEPS),
    ("steps", "nan", STEPS),
    ("steps", "inf", STEPS),
    ("steps", "1e400", STEPS),
    ("steps", "0x10", STEPS),
    ("lr", "0", LR),
    ("lr", "-1e-3", LR),
    ("lr", "1.01", LR),
    ("lr", "nan", LR),
    ("lr", "fast", LR),
    ("gamma", "-0.1", GAMMA),
    ("gamma", "1.1", GAMMA),
    ("gamma", "inf", GAMMA),
    ("shift", "nan", "a number"),
    ("shift", "1,5", "a number"),
    ("hidden", "0", HIDDEN),
    ("hidden", "64x", HIDDEN),
    ("hidden", "2.5", HIDDEN),
    ("sticky", "-1", STICKY),
    ("sticky", "often", STICKY),
    ("net", "resnet", NET),
    ("net", "Nature", NET),
    ("net", "", NET),
]


def _shown(text: str, message: str) -> bool:
    """Whether the value is in the message, as typed or as the number that was read."""
    if f"got {text!r}" in message:
        return True
    try:
        return f"got {float(text)!r}" in message or f"got {int(text)!r}" in message
    except ValueError:
        return False


@pytest.mark.parametrize(("name", "text", "allowed"), WRONG)
def test_a_wrong_flag_value(name: str, text: str, allowed: str) -> None:
    message = complaint(read, f"--{name}={text}")
    assert message.startswith(f"--{name} must be {allowed}, got ")
    assert _shown(text, message)
    if text:
        assert complaint(read, f"--{name}", text) == message


def test_the_wrong_entry_of_a_list_is_named() -> None:
    assert complaint(read, "--hidden", "64", "-2") == "--hidden must be a whole number >= 1, got -2"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("steps", 1.5, STEPS),
        ("steps", 1e6, STEPS),
        ("steps", True, STEPS),
        ("steps", "1", STEPS),
        ("steps", 0, STEPS),
        ("lr", "0.1", LR),
        ("lr", False, LR),
        ("lr", 0, LR),
        ("lr", float("nan"), LR),
        ("gamma", 1.5, GAMMA),
        ("gamma", float("-inf"), GAMMA),
        ("shift", float("nan"), "a number"),
        ("shift", [1.0], "a number"),
        ("hidden", 64, HIDDEN),
        ("hidden", (64, 0), HIDDEN),
        ("hidden", (64, 1.5), HIDDEN),
        ("hidden", [64], HIDDEN),
        ("hidden", ("64",), HIDDEN),
        ("sticky", "0.25", STICKY),
        ("net", 3, NET),
        ("net", "light ", NET),
        ("double_q", 1, "true or false"),
        ("double_q", "yes", "true or false"),
        ("run", 5, "text"),
    ],
)
def test_a_wrong_value_from_python_or_json(name: str, value: Any, allowed: str) -> None:
    message = complaint(check, Settings, {"life_loss": True, name: value})
    assert message.startswith(f"--{name.replace('_', '-')} must be {allowed}, got {value!r}")


def test_a_near_choice_is_offered() -> None:
    assert complaint(read, "--net", "natur").endswith("got 'natur'. Did you mean 'nature'?")
    assert complaint(check, Settings, {"net": "IMPALA"}).endswith("Did you mean 'impala'?")
    assert "Did you mean" not in complaint(read, "--net", "zzz")


def test_a_missing_value() -> None:
    assert "--steps" in complaint(read, "--steps")
    assert "--steps" in complaint(read, "--steps", "--gamma", "1")


def test_a_switch_takes_no_value() -> None:
    assert "--double-q" in complaint(read, "--double-q=3")
    assert complaint(read, "--double-q", "3") == "unexpected argument '3'. See --help."


@pytest.mark.parametrize("text", ["a\nb", "🎮", "x" * 500, "%s", "{}"])
def test_odd_text_stays_on_one_line(text: str) -> None:
    assert repr(text) in complaint(read, "--steps", text)
    assert repr(text) in complaint(read, "--net", text)


# -- unknown names -------------------------------------------------------------------------------------------


def test_unknown_flags() -> None:
    assert complaint(read, "--setps", "5") == "unknown flag --setps. Did you mean '--steps'? See --help."
    assert complaint(read, "--gama=0.9") == "unknown flag --gama. Did you mean '--gamma'? See --help."
    assert complaint(read, "--double_q") == "unknown flag --double_q. Did you mean '--double-q'? See --help."
    assert complaint(read, "--zzzzzzzzzz") == "unknown flag --zzzzzzzzzz. See --help."
    assert complaint(read, "word") == "unexpected argument 'word'. See --help."


def test_flags_cannot_be_shortened() -> None:
    assert "unknown flag --stick." in complaint(read, "--stick", "0.5")


def test_unknown_settings() -> None:
    assert complaint(check, Settings, {"hiden": (1,)}) == "unknown setting 'hiden'. Did you mean 'hidden'?"
    assert complaint(check, Settings, {"unseen": 1}).startswith("unknown setting 'unseen'.")


def test_nearest() -> None:
    assert nearest("PONG", ["Breakout", "Pong"]) == " Did you mean 'Pong'?"
    assert nearest("qqq", ["Breakout", "Pong"]) == ""
    assert nearest("", []) == ""


def test_pick() -> None:
    assert pick("agent", "dqn", {"dqn": 1, "a2c": 2}) == 1
    message = complaint(pick, "agent", "dqm", {"dqn": 1, "a2c": 2})
    assert message == "unknown agent 'dqm'. Did you mean 'dqn'? Allowed: a2c, dqn."


# -- help ----------------------------------------------------------------------------------------------------


def test_help_shows_each_flag_with_meaning_and_default() -> None:
    text = parser(gamma=0.5).format_help()
    flat = " ".join(text.split())
    for field in fields(Settings):
        assert field.flag in text.replace("--[no-]", "--")
    assert "decisions to take (default 1_000_000)" in flat
    assert "discount per step (default 0.5)" in flat  # of a preset
    assert "widths of the dense layers (default 256 128)" in flat
    assert "--[no-]double-q the online net picks the action (default on)" in flat
    assert "end at each lost life (default off)" in flat
    assert "added to each reward, 100 % of it (default 0.0)" in flat
    assert "nature, impala, light (default nature)" in flat
    assert "--run DIR folder of the run" in flat and "None" not in text


def test_help_keeps_within_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert max(map(len, parser().format_help().splitlines())) <= 80
    assert max(map(len, parser().format_usage().splitlines())) <= 80


def test_a_knob_that_two_rooms_share_is_shown_once() -> None:
    made = parser(Owner)
    made.add_knobs("again", Owner)
    assert made.format_help().count("--width N") == 2  # usage and list
    assert made.read(["--width", "3"]) == {"width": 3}


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, runs.config; assert not {'torch', 'gymnasium'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# -- JSON ----------------------------------------------------------------------------------------------------


def test_lists_become_tuples(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"hidden": [64, 32], "net": "light", "sticky": null}')
    loaded = read_json(tmp_path / "a.json")
    assert loaded == {"hidden": (64, 32), "net": "light", "sticky": None}
    check(Settings, loaded)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert complaint(read_json, path) == f"no such file: {path}"
    assert complaint(read_json, str(tmp_path)).startswith(f"cannot read {tmp_path}: ")
    path.write_text('{"steps": 1,}')
    assert complaint(read_json, path).startswith(f"cannot read {path}: ")
    path.write_bytes(b"\xff\xfe\x00")
    assert complaint(read_json, path).startswith(f"cannot read {path}: ")
    path.write_text("")
    assert complaint(read_json, path).startswith(f"cannot read {path}: ")
    path.write_text("[1, 2]")
    assert complaint(read_json, path) == f"{path} must hold a JSON object, got list"


def test_a_number_that_is_none_is_refused_after_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"gamma": NaN}')
    assert complaint(check, Settings, read_json(tmp_path / "a.json")).endswith("got nan")
