"""The commands, as a user types them: what works, and what one line says when it does not."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents import AGENTS, evaluate, play
from agents.run import guarded
from agents.run import main as run
from tests.faults.tools import CARTPOLE, at, copied, killed
from tests.tools import TEXTS, UNBOUNDED, register

ROOT = Path(__file__).parent.parent
SHORT = [
    "--steps",
    "300",
    "--learning-starts",
    "64",
    "--train-every",
    "8",
    "--updates",
    "1",
    "--eval-every",
    "0",
]
SHORT += ["--final-episodes", "2", "--no-video", "--log-every", "50"]


def cartpole(folder: Path, *more: str) -> int:
    return guarded(run, ["dqn", "--env", "CartPole-v1", *SHORT, "--run", str(folder), *more])


def test_a_run_from_start_to_film(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a run"
    pong = ["dqn", "--env", "ALE/Pong", *SHORT, "--size", "42", "--num-envs", "2", "--compile", "off"]
    assert guarded(run, [*pong, "--steps", "120", "--max-frames", "400", "--run", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "ALE/Pong is ALE/Pong-v5" in said and "sticky 0.25" in said and "preset pong" in said
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"] and summary["steps"] == 120 and summary["frames"] == 480
    keys = (
        "agent env backbone seed steps frames updates seconds steps_per_second evaluation peak_memory_bytes"
    )
    assert {*keys.split(), "parameters"} <= summary.keys()
    assert {"whole", "steady"} == summary["steps_per_second"].keys()
    config = json.loads((folder / "config.json").read_text())["config"]
    assert (config["size"], config["learning_starts"], config["clip_reward"]) == (42, 64, True)
    assert guarded(evaluate.main, [str(folder), "--episodes", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["episodes"] == 2 and facts["env"] == "ALE/Pong-v5"
    video = tmp_path / "film.mp4"
    assert guarded(play.main, [str(folder), "--video", str(video), "--steps", "12", "--explain"]) == 0
    assert video.stat().st_size > 1_000
    assert guarded(play.main, [str(folder), "--video", str(video)]) == 2  # it is there already


def test_evaluation_repeats_and_follows_its_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cartpole(tmp_path / "run", "--steps", "1500", "--train-every", "2") == 0
    results = []
    capsys.readouterr()
    for seed in ("1", "1", "2"):
        assert (
            guarded(evaluate.main, [str(tmp_path / "run"), "--episodes", "5", "--json", "--seed", seed]) == 0
        )
        facts = json.loads(capsys.readouterr().out)
        results.append((facts["mean"], facts["std"]))
    assert results[0] == results[1] != results[2]


def test_the_same_command_writes_the_same_rows(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert cartpole(tmp_path / name, "--seed", "3", "--num-envs", "2") == 0
    rows = {name: (tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("a", "b")}
    assert len(rows["a"]) > 3
    timed = [i for i, column in enumerate(rows["a"][0].split(",")) if column.startswith("speed/")]
    for one, other in zip(rows["a"], rows["b"], strict=True):
        cells = [[cell for i, cell in enumerate(row.split(",")) if i not in timed] for row in (one, other)]
        assert cells[0] == cells[1]


def test_precedence_default_preset_file_flag(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"gamma": 0.9, "batch": 16}))
    assert cartpole(tmp_path / "run", "--preset", "cartpole", "--config", str(file), "--batch", "8") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["lr"], config["gamma"], config["batch"], config["max_grad_norm"]) == (2.3e-3, 0.9, 8, 10.0)


def test_a_run_can_be_repeated_from_its_config(tmp_path: Path) -> None:
    assert cartpole(tmp_path / "a") == 0
    again = ["dqn", "--config", str(tmp_path / "a" / "config.json"), "--run", str(tmp_path / "b")]
    assert guarded(run, again) == 0
    first, second = ((tmp_path / name / "scores.csv").read_text() for name in ("a", "b"))
    strip = [[row.split(",")[k] for k in (0, 1, 3, 4)] for row in first.splitlines()]
    assert strip == [[row.split(",")[k] for k in (0, 1, 3, 4)] for row in second.splitlines()]


WRONG = [
    (["dqm", "--env", "CartPole-v1"], ["dqm", "dqn"]),
    (["dqn", "--env", "CartPole-v2"], ["CartPole-v2", "CartPole-v1"]),
    (["dqn", "--env", "ALE/Pnog"], ["ALE/Pnog", "ALE/Pong"]),
    (["dqn", "--env", "CartPole-v1", "--backbone", "mpl"], ["mpl", "mlp"]),
    (["dqn", "--env", "CartPole-v1", "--preset", "pnog"], ["pnog", "pong"]),
    (["dqn", "--env", "CartPole-v1", "--learnin-starts", "5"], ["--learnin-starts", "--learning-starts"]),
    (["dqn", "--env", "Pendulum-v1"], ["Discrete", "Box"]),
    (["dqn", "--env", "CartPole-v1", "--steps", "0"], ["--steps", ">= 1", "0"]),
    (["dqn", "--env", "CartPole-v1", "--num-envs", "-2"], ["--num-envs", ">= 1", "-2"]),
    (["dqn", "--env", "CartPole-v1", "--lr", "nan"], ["--lr", "nan"]),
    (["dqn", "--env", "CartPole-v1", "--loss", "hubert"], ["--loss", "huber"]),
    (["dqn", "--env", "CartPole-v1", "--sticky", "0.5"], ["sticky", "not an Atari game"]),
    (["dqn", "--env", "CartPole-v1", "--backbone", "cnn"], ["cnn", "image", "mlp"]),
    (["dqn", "--env", "CartPole-v1", "--config", "no/such.json"], ["no such file", "no/such.json"]),
    (["dqn", "--env", "CartPole-v1", "--capacity", "1"], ["--capacity", "at least"]),
    (["qtable", "--env", "Pendulum-v1"], ["Discrete actions", "Box"]),
    (["qtable", "--env", "CartPole-v1"], ["dimension 1, 3", "no bound", "--low with 4 numbers"]),
    (["qtable", "--env", "CartPole-v1", "--low", "-1", "-1"], ["--low", "one number, or 4", "got 2"]),
    (["qtable", "--env", "FrozenLake-v1", "--bins", "4"], ["--bins", "Box", "Discrete(16)"]),
    (["qtable", "--env", "FrozenLake-v1", "--bins", "0"], ["--bins", ">= 1"]),
    (["qtable", "--env", "FrozenLake-v1", "--backbone", "mlp"], ["--backbone of qtable", "table", "mlp"]),
    (["qtable", "--env", "FrozenLake-v1", "--lr", "1.5"], ["--lr", "<= 1", "1.5"]),
    (["qtable", "--env", "FrozenLake-v1", "--n-step", "3"], ["unknown flag", "--n-step"]),
    (["qtable", "--env", "FrozenLake-v1", "--capacity", "2"], ["--capacity", "at least"]),
    (["qtable", "--env", "ALE/Pong-v5"], ["10^", "fewer --bins"]),
    (["sarsa", "--env", "FrozenLake-v1", "--backbone", "tabel"], ["tabel", "table"]),
    (["sarsa", "--env", "FrozenLake-v1", "--learning-starts", "9"], ["unknown flag", "--learning-starts"]),
    (["sarsa", "--env", "FrozenLake-v1", "--max-grad-norm", "1"], ["--max-grad-norm", "table"]),
    (["sarsa", "--env", "CartPole-v1", "--bins", "4"], ["bins", "mlp"]),
    (["dqn", "--env", "FrozenLake-v1", "--backbone", "table"], ["--backbone of dqn", "mlp", "table"]),
    (["dqn", "--env", "Pendulum-v1"], ["dqn drives Discrete", "Box", "reinforce, a2c, trpo and ppo"]),
    (["sarsa", "--env", "chordate/IdentityDict-v0"], ["Dict", "reinforce, a2c, trpo and ppo"]),
    (["dqn", "--env", TEXTS], ["dqn drives Discrete", "no policy draws actions of Text"]),
    (["ppo", "--env", TEXTS], ["no policy draws actions of Text"]),
    (["reinforce", "--env", TEXTS], ["no policy draws actions of Text"]),
    (["ppo", "--env", UNBOUNDED, "--squash"], ["--squash needs bounds", "Box"]),
    (
        ["ppo", "--env", "CartPole-v1", "--preset", "none", "--batch", "100"],
        ["--batch 100 must divide", "--rollout 2048"],
    ),
    (
        ["ppo", "--env", "CartPole-v1", "--preset", "none", "--batch", "4096"],
        ["--batch 4096 must divide", "--rollout 2048"],
    ),
    (
        ["trpo", "--env", "CartPole-v1", "--preset", "none", "--batch", "4096"],
        ["--batch 4096 must divide", "1024"],
    ),
    (["ppo", "--env", "CartPole-v1", "--rollout", "0"], ["--rollout", ">= 1", "0"]),
    (["a2c", "--env", "CartPole-v1", "--rollout", "0"], ["--rollout", ">= 1", "0"]),
    (["trpo", "--env", "CartPole-v1", "--rollout", "-1"], ["--rollout", ">= 1", "-1"]),
    (["reinforce", "--env", "CartPole-v1", "--episodes", "0"], ["--episodes", ">= 1", "0"]),
    (["trpo", "--env", "CartPole-v1", "--no-separate"], ["--no-separate", "trpo"]),
    (["reinforce", "--env", "CartPole-v1", "--no-separate"], ["--no-separate", "reinforce"]),
    (["a2c", "--env", "FrozenLake-v1", "--normalize-obs"], ["--normalize-obs", "vectors", "Discrete(16)"]),
    (
        ["ppo", "--env", "CartPole-v1", "--preset", "none", "--clip-steps", "9"],
        ["--clip-steps", "--clip-end"],
    ),
    (["ppo", "--env", "CartPole-v1", "--lr-steps", "9", "--preset", "none"], ["--lr-steps", "--lr-end"]),
    (
        ["reinforce", "--env", "CartPole-v1", "--baseline-rate", "0.3"],
        ["--baseline-rate", "--baseline average"],
    ),
    (["a2c", "--env", "CartPole-v1", "--optimizer", "adma"], ["--optimizer", "adam"]),
    (["a2c", "--env", "CartPole-v1", "--backbone", "table"], ["--backbone of a2c", "mlp", "table"]),
    (["dqn"], ["--env"]),
    (["dqn", "--env", "CartPole-v1", "extra"], ["extra"]),
    (["--env", "CartPole-v1"], ["agent"]),
]


@pytest.mark.parametrize(("arguments", "named"), WRONG, ids=lambda value: " ".join(value)[:40])
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str],
    named: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    register()
    monkeypatch.chdir(tmp_path)
    assert guarded(run, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in named), error
    assert not list(tmp_path.iterdir()), "nothing may be written before everything fits"


def test_unknown_key_in_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"gama": 0.9}))
    assert guarded(run, ["dqn", "--env", "CartPole-v1", "--config", str(file)]) == 2
    assert "'gama'" in (error := capsys.readouterr().err) and "'gamma'" in error


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cartpole(tmp_path / "run") == 0
    before = (tmp_path / "run" / "scores.csv").read_bytes()
    assert cartpole(tmp_path / "run") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "run" / "scores.csv").read_bytes() == before


@pytest.mark.parametrize("command", [evaluate.main, play.main])
def test_no_run_there(command: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(command, [str(tmp_path / "nothing"), "--episodes", "1"]) == 2  # type: ignore[arg-type]
    assert "no run at" in capsys.readouterr().err


def test_random_weights_play_as_badly_as_they_should(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The evaluation is not a constant: an untrained agent gets an untrained agent's return."""
    assert cartpole(tmp_path / "run", "--learning-starts", "299", "--train-every", "1000") == 0
    capsys.readouterr()
    assert guarded(evaluate.main, [str(tmp_path / "run"), "--episodes", "20", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 5 < facts["mean"] < 200 and facts["min"] <= facts["mean"] <= facts["max"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_so(number: int, code: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [sys.executable, "-m", "agents.run", "dqn", "--env", "CartPole-v1", "--steps", "10_000_000"]
    process = subprocess.Popen(
        [*words, "--run", str(folder), "--no-video"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (folder / "scores.csv").exists() or len((folder / "scores.csv").read_text().splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    assert "saved" in out and "Traceback" not in out
    summary = json.loads((folder / "summary.json").read_text())
    assert (
        not summary["finished"]
        and (folder / "checkpoints" / str(summary["steps"]) / "manifest.json").exists()
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 200 steps that was killed after 150; its last checkpoint is at 128."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    killed(folder, 150, **{**CARTPOLE, "steps": 200, "lr": 1e-3})
    return folder


def nothing(_: Path) -> None:
    pass


def other_agent(folder: Path) -> None:
    replaced(folder / "config.json", '"agent": "dqn"', '"agent": "qtable"')


def newer_format(folder: Path) -> None:
    replaced(folder / "checkpoints" / "128" / "manifest.json", '"format": 1', '"format": 2')


def no_scores(folder: Path) -> None:
    (folder / "scores.csv").unlink()


def other_torch(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())
    record["versions"]["torch"] = "1.0"
    (folder / "config.json").write_text(json.dumps(record))


def no_whole_checkpoint(folder: Path) -> None:
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


UNFIT: list[tuple[Callable[[Path], None], list[str], list[str]]] = [
    (other_agent, [], ["is a run of 'qtable', not of 'dqn'"]),
    (newer_format, [], ["format 2", "needs a newer chordate"]),
    (no_scores, [], ["cannot continue", "scores.csv"]),
    (no_whole_checkpoint, [], ["no usable checkpoint in"]),
    (other_torch, ["--strict"], ["--strict", "torch was 1.0, is "]),
    (nothing, ["--lr", "0.01"], ["--lr cannot change when a run is resumed, it is 0.001"]),
    (nothing, ["--env", "Acrobot-v1"], ["--env cannot change", "CartPole-v1"]),
    (nothing, ["--num-envs", "2"], ["--num-envs cannot change"]),
    (nothing, ["--steps", "100"], ["is at step 128 already; give --steps more"]),
    (nothing, ["--steps", "0"], ["--steps", ">= 1"]),
]


@pytest.mark.parametrize(
    ("change", "flags", "named"),
    UNFIT,
    ids=[" ".join([change.__name__, *flags]) for change, flags, _ in UNFIT],
)
def test_what_cannot_be_resumed_is_one_line(
    change: Callable[[Path], None],
    flags: list[str],
    named: list[str],
    stopped: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copied(stopped, tmp_path / "run")
    change(folder)
    scores = folder / "scores.csv"
    before = scores.read_bytes() if scores.exists() else b""
    assert guarded(run, ["dqn", "--run", str(folder), "--resume", *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("checkpoint ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and all(word in lines[0] for word in named)
    assert not scores.exists() or before.startswith(scores.read_bytes())
    assert not (folder / "summary.json").exists()


def test_resume_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, named in (
        ([], "--resume needs --run DIR"),
        (["--run", str(tmp_path / "none")], "no run at"),
        (["--run", str(tmp_path)], "it has no config.json"),
    ):
        assert guarded(run, ["dqn", "--resume", *words]) == 2
        assert named in capsys.readouterr().err
    assert guarded(run, ["dqn", "--env", "CartPole-v1", "--strict"]) == 2
    assert "--strict belongs to --resume" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_as_it_was_may_be_said_again(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(stopped, tmp_path / "run")
    other_torch(folder)
    words = [
        "dqn",
        "--run",
        str(folder),
        "--resume",
        "--env",
        "CartPole-v1",
        "--lr",
        "0.001",
        "--steps",
        "300",
    ]
    assert guarded(run, words) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("bits may differ")]
    assert "torch was 1.0, is " in line and "resuming at step 128" in out
    assert json.loads((folder / "summary.json").read_text())["steps"] == 300


def test_after_ctrl_c_the_printed_command_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    words = ["agents.run", "dqn", "--env", "CartPole-v1", *SHORT, "--steps", "100_000", "--compile", "off"]
    words += ["--run", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (folder / "scores.csv").exists() or len((folder / "scores.csv").read_text().splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "everything is saved" in out and "Traceback" not in out, out
    (line,) = [line.strip() for line in out.splitlines() if line.endswith("--resume")]
    python, *command = shlex.split(line)
    assert python == "python"
    steps = json.loads((folder / "summary.json").read_text())["steps"]
    done = subprocess.run(
        [sys.executable, *command, "--steps", str(steps + 50)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and f"resuming at step {steps:,}" in done.stdout, done.stdout + done.stderr


def test_what_could_not_be_saved_is_not_called_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        monkeypatch.setattr("runs.checkpoint._put_in_place", full)
        os.kill(os.getpid(), signal.SIGTERM)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with at({150: stop}):
        assert cartpole(tmp_path / "run", "--checkpoint-every", "64") == 143
    out = capsys.readouterr().out
    assert "Stopped by signal 15 at step 150, saved to step 128. To go on:" in out


def test_help_fits_80_columns_and_loads_fast_enough_to_be_used() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "agents.run", "dqn", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for group in (
        "run:",
        "agent dqn:",
        "backbone mlp:",
        "backbone cnn:",
        "environment (Atari):",
        "computing:",
    ):
        assert group in lines
    assert "--epsilon-steps" in result.stdout and "--net" in result.stdout


def test_nan_reward_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gymnasium

    if "chordate/Broken-v0" not in gymnasium.registry:
        gymnasium.register(
            "chordate/Broken-v0",
            lambda **_: gymnasium.wrappers.TransformReward(
                gymnasium.make("CartPole-v1"), lambda reward: np.nan
            ),
        )
    assert guarded(run, ["dqn", "--env", "chordate/Broken-v0", *SHORT, "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "reward of env 0 is nan at step 1" in error


@pytest.mark.parametrize("agent", ["reinforce", "a2c", "trpo", "ppo"])
def test_nan_in_a_policy_ends_the_run_and_names_the_layer(
    agent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from agents.actor import PolicyAgent

    sound = PolicyAgent.update

    def poisoned(self: Any, batch: Any, steps: int = 1) -> Any:
        done = sound(self, batch, steps)
        self.model.backbone.layers[2].weight.detach()[0, 0] = float("nan")
        return done

    monkeypatch.setattr(PolicyAgent, "update", poisoned)
    words = [agent, "--env", "CartPole-v1", "--preset", "none", "--steps", "2100", "--no-video"]
    words += ["--hidden", "8", "8", "--run", str(tmp_path / "run")]
    assert guarded(run, words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "backbone.layers.2.weight holds NaN" in error


def test_every_agent_runs_from_the_command_line_and_plays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is: a preset or the defaults, the film of an episode, and the same score when it is loaded again."""
    for name in AGENTS:
        env = "FrozenLake-v1" if name == "qtable" else "CartPole-v1"
        small = [
            "--steps",
            "600",
            "--final-episodes",
            "2",
            "--num-envs",
            "2",
            "--preset",
            "none",
            "--no-video",
        ]
        small += ["--learning-starts", "100"] if name in ("dqn", "qtable") else []
        small += ["--rollout", "64"] if name in ("trpo", "ppo") else []
        folder = tmp_path / name
        assert guarded(run, [name, "--env", env, *small, "--run", str(folder)]) == 0, name
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["agent"] == name and summary["updates"] > 0 and summary["finished"]
        capsys.readouterr()
        assert guarded(evaluate.main, [str(folder), "--episodes", "2", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["agent"] == name


def test_python_api(tmp_path: Path) -> None:
    from agents import DQN, train

    result = train(DQN(lr=1e-3, learning_starts=64), env="CartPole-v1", steps=200, eval_every=0, final_episodes=2,
                   video=False, run=tmp_path / "run")  # fmt: skip
    assert result.summary["steps"] == 200 and result.agent.updates > 0
    assert result.agent.config.lr == 1e-3


def test_imports_point_one_way() -> None:
    """The arrows of the design: who may import whom."""
    import ast

    allowed = {
        "agents": {"agents", "backbones", "envs", "replay", "runs"},
        "backbones": {"backbones", "runs"},
        "envs": {"envs", "replay", "runs"},
        "replay": {"replay", "runs"},
        "runs": {"runs"},
    }
    for room, others in allowed.items():
        for path in (ROOT / room).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                for name in names:
                    top = name.split(".")[0]
                    assert top not in allowed or top in others, f"{path.name} imports {name}"
