"""The quick versions of `make faults`: what can happen to a run, done to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import damage, disk, matrix, signals
from tests.faults.__main__ import passed

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damage.source(tmp_path_factory.mktemp("source") / "run")


def test_sigkills_at_random(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.faults", "kills", "--amount", "0.04"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "4 kills" in done.stdout and "bits equal" in done.stdout, done.stdout


def test_a_damaged_checkpoint_never_gives_wrong_data(source: Path, tmp_path: Path) -> None:
    assert damage.check(source, tmp_path, 60, seed=1).startswith("60 damaged")
    damage.check_shared(source, tmp_path)


def test_a_fuzz_that_finds_something_fails(source: Path, tmp_path: Path, monkeypatch) -> None:
    """Without hashes some of the same damage is loaded."""
    monkeypatch.setattr("runs.checkpoint.hashlib.file_digest", lambda *_: Anything())
    with pytest.raises(AssertionError, match=r"case \d+ of seed 1"):
        damage.check(source, tmp_path, 60, seed=1)


class Anything:
    """A hash that fits."""

    def hexdigest(self) -> Anything:
        return self

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


def test_damaged_logs_and_configurations_are_named(tmp_path: Path) -> None:
    assert damage.check_run_files(tmp_path, 14, seed=0).startswith("14 damaged")


def test_no_bomb_explodes(source: Path, tmp_path: Path) -> None:
    assert "none executed" in damage.check_bombs(source, tmp_path, ("npy",))


def test_a_disk_that_refuses_costs_nothing_in_the_end(tmp_path: Path) -> None:
    assert "final bits equal" in disk.check_limit(tmp_path, 100)


def test_signals_in_a_save_cost_at_most_that_save(tmp_path: Path) -> None:
    assert signals.check_all(tmp_path, range(5, 6)).startswith("4 saves")


def test_a_failed_case_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    def bad(_: Path) -> str:
        raise AssertionError("this one")

    assert not passed("part: case", bad) and passed("part: other", lambda folder: str(folder.is_dir()))
    out = capsys.readouterr().out
    assert "part: case: FAILED" in out and "this one" in out and "part: other: True" in out


def test_the_matrix_covers_what_is_promised() -> None:
    named = {str(case) for case in matrix.cases()}
    assert len(named) == len(matrix.cases()) >= 22
    for env in ("CartPole-v1", "FrozenLake-v1", "ALE/Pong-v5", "PongNoFrameskip-v4", "--obs ram"):
        for more in ("--num-envs 1", "--num-envs 8", "--alpha"):
            assert any(env in name and more in name for name in named), (env, more)
