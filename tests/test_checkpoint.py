"""Checkpoints: exact, complete or invisible, verified, and never able to cost the one before."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runs import Run, UserError, checkpoint

CONFIG = {"env": "ALE/Pong-v5", "agent": "dqn", "seed": 0}


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    tied = torch.randn(3, 4, generator=generator)
    return {
        "weights": {
            "a.weight": tied,
            "b.weight": tied,
            "slice": tied[:, 1:3],
            "last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
            "half": torch.randn(5, generator=generator).bfloat16(),
        },
        "optimizer": {"step": torch.tensor(float(seed)), "empty": torch.zeros(0, 3)},
        "replay": {
            "obs": rng.integers(0, 255, (50, 4, 4)).astype(np.uint8),
            "size": np.array(7),
            "none": np.zeros(0),
        },
        "counters": {
            "steps": seed,
            "rng": rng.bit_generator.state,
            "text": "é",
            "nothing": None,
            "list": [1, 2.5, True],
        },
        "extra": {},
    }


def assert_same(found, expected):
    assert set(found) == set(expected)
    for group, values in expected.items():
        if group in ("weights", "optimizer"):
            assert set(found[group]) == set(values)
            for name, tensor in values.items():
                assert found[group][name].dtype == tensor.dtype
                assert torch.equal(found[group][name], tensor)
        elif group == "replay":
            assert set(found[group]) == set(values)
            for name, array in values.items():
                assert found[group][name].dtype == array.dtype
                np.testing.assert_array_equal(found[group][name], array)
        else:
            assert found[group] == values


@pytest.fixture
def run(tmp_path):
    with Run.create(CONFIG, root=tmp_path / "with space") as made:
        yield made


def folders(run):
    return sorted(entry.name for entry in (run.path / "checkpoints").iterdir())


def test_what_is_saved_is_loaded_and_the_newest_two_are_kept(run):
    for step in (5, 10, 200):
        assert run.save(step, state(step)).name == str(step)
    assert folders(run) == ["10", "200"]
    opened = Run.open(run.path)
    assert_same(opened.load(), state(200))
    assert_same(opened.load("latest"), state(200))
    assert_same(opened.load(10), state(10))
    manifest = json.loads((run.path / "checkpoints/200/manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["step"] == 200
    assert {"weights.safetensors", "replay/obs.npy", "counters.json"} < set(manifest["files"])


def test_a_newer_format_is_refused_even_if_an_older_checkpoint_is_there(run):
    fake(run, format=2)
    with pytest.raises(UserError, match="format 2, which needs a newer chordate"):
        run.load()


def test_what_is_loaded_cannot_change_the_files_and_outlives_them(run):
    run.save(1, state())
    loaded = run.load()
    with pytest.raises(ValueError, match="read-only"):
        loaded["replay"]["obs"][:] = 0
    loaded["weights"]["half"].zero_()
    assert_same(run.load(), state())
    loaded = run.load()
    shutil.rmtree(run.path / "checkpoints")
    assert_same(loaded, state())


def test_unchanged_arrays_are_shared_with_the_checkpoint_before(run):
    run.save(1, state(1))
    later = state(2)
    later["replay"]["obs"] = state(1)["replay"]["obs"]
    run.save(2, later, {"replay/obs", "replay/none", "replay/new"})
    first, second = (run.path / "checkpoints" / step / "replay" for step in ("1", "2"))
    assert (first / "obs.npy").samefile(second / "obs.npy")
    assert not (first / "size.npy").samefile(second / "size.npy")
    assert_same(run.load(2), later)
    shutil.rmtree(run.path / "checkpoints" / "1")
    assert_same(run.load(), later)


def test_what_the_checkpoint_before_lacks_is_written(run):
    run.save(1, state(1))
    (run.path / "checkpoints" / "1" / "replay" / "obs.npy").unlink()
    run.save(2, state(2), {"replay/obs"})
    assert_same(run.load(), state(2))
    (run.path / "checkpoints" / "2" / "manifest.json").write_text("{")
    run.save(3, state(3), {"replay/obs"})
    assert_same(run.load(), state(3))


def test_a_shared_file_that_lost_its_end_is_written_anew(run):
    run.save(1, state(1))
    truncate(run.path / "checkpoints/1/replay/obs.npy")
    later = state(2)
    later["replay"]["obs"] = state(1)["replay"]["obs"]
    run.save(2, later, {"replay/obs"})
    assert_same(run.load(2), later)


def test_a_run_keeps_a_group_for_itself(run):
    with pytest.raises(ValueError, match="has a group 'logs' of its own"):
        run.save(1, {"logs": {"a": 1}})


def test_best_is_replaced_and_the_same_step_can_be_saved_again(run):
    with pytest.raises(UserError, match="no best checkpoint"):
        run.load("best")
    run.evaluation(7, [1.0], 1.0)
    for seed in (1, 2):
        run.save_best(state(seed))
        run.save(10, state(seed))
    assert_same(run.load("best"), state(2))
    assert_same(run.load(10), state(2))
    assert json.loads((run.path / "best/manifest.json").read_text())["step"] == 7
    assert folders(run) == ["10"]
    assert not (run.path / "best.old").exists()


def test_what_does_not_exist_is_a_user_error(run):
    with pytest.raises(UserError, match="no checkpoint in"):
        run.load()
    run.save(5, state())
    with pytest.raises(UserError, match=r"no checkpoint 6 .*Allowed: best, latest, 5\."):
        run.load(6)
    with pytest.raises(UserError, match=r"no checkpoint '\.\./5'"):
        run.load("../5")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["weights.safetensors", "replay/obs.npy", "counters.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(run, name, damage):
    run.save(5, state(5))
    run.save(10, state(10))
    damage(run.path / "checkpoints/10" / name)
    said = []
    assert_same(run.load(say=said.append), state(5))
    (line,) = said
    assert str(Path("checkpoints") / "10") in line and "taking the one before" in line
    with pytest.raises(UserError, match="is not usable"):
        run.load(10)


def test_nothing_usable_is_a_user_error_and_is_said_on_standard_error(run, capsys):
    run.save(5, state())
    truncate(run.path / "checkpoints/5/counters.json")
    with pytest.raises(UserError, match="no usable checkpoint"):
        run.load()
    assert "counters.json has" in capsys.readouterr().err
    run.save_best(state())
    flip(run.path / "best/weights.safetensors")
    with pytest.raises(UserError, match=r"best is not usable: weights.safetensors does not have the SHA-256"):
        run.load("best")


def fake(run, **change):
    """A checkpoint at step 10 whose manifest says something else."""
    run.save(5, state(5))
    run.save(10, state(10))
    path = run.path / "checkpoints/10/manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, **change}))
    return manifest


OUTSIDE = [
    "../../../secret.json",
    "/etc/passwd.json",
    "..\\x.json",
    "a/b.json",
    "a/../b.npy",
    "x.pkl",
    ".json",
    "a/.npy",
    "",
]


@pytest.mark.parametrize(
    "change",
    [
        {"format": None},
        {"step": 11},
        {"files": []},
        {"files": None},
        {"files": {"counters.json": {}}},
        {"files": {"counters.json": "text"}},
        *({"files": {name: {"bytes": 1, "sha256": "0"}}} for name in OUTSIDE),
    ],
)
def test_a_wrong_manifest_is_refused(run, change):
    fake(run, **change)
    said = []
    assert_same(run.load(say=said.append), state(5))
    assert len(said) == 1


def test_a_manifest_that_is_no_object_or_nested_without_end_is_refused(run):
    fake(run)
    for text in ("[]", "7", "[" * 100_000):
        (run.path / "checkpoints/10/manifest.json").write_text(text)
        assert_same(run.load(say=lambda _: None), state(5))


def test_a_name_that_became_another_is_not_lost(run):
    fake(run)
    path = run.path / "checkpoints/10/manifest.json"
    path.write_text(path.read_text().replace('"replay/none.npy"', '"replay/size.npy"'))
    with pytest.raises(UserError, match="has one name twice"):
        run.load(10)


def test_a_header_that_breaks_its_parser_is_refused(run):
    header = (b"{'descr': " + b"'" * 3).ljust(117) + b"\n"
    forge(run, "replay/obs.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    assert_same(run.load(say=lambda _: None), state(5))


def forge(run, name, content):
    """Put `content` in the place of a file, with a manifest that agrees."""
    manifest = fake(run)
    path = run.path / "checkpoints/10" / name
    path.write_bytes(content)
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (run.path / "checkpoints/10/manifest.json").write_text(json.dumps(manifest))


def test_no_pickle_and_no_promised_size_is_believed(run, tmp_path):
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b"\n"
    bomb = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    for content in ((tmp_path / "evil.npy").read_bytes(), bomb, b"PK\x03\x04 zip", b""):
        forge(run, "replay/obs.npy", content)
        assert_same(run.load(say=lambda _: None), state(5))
    forge(run, "weights.safetensors", (2**40).to_bytes(8, "little") + b"{}")
    assert_same(run.load(say=lambda _: None), state(5))


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_links_out_of_the_folder_are_refused(run):
    fake(run)
    file = run.path / "checkpoints/10/counters.json"
    file.rename(run.path / "elsewhere.json")
    file.symlink_to(run.path / "elsewhere.json")
    assert_same(run.load(say=lambda _: None), state(5))


def test_states_that_would_not_come_back_the_same_are_refused(run):
    run.save(1, state(1))
    bad = [
        {"../up": {"a": 1}},
        {"manifest": {"a": 1}},
        {"replay": {"../../up": np.zeros(1)}},
        {"replay": {"a": np.array([None])}},
        {"counters": {1: "a number as key"}},
        {"counters": {"steps": np.int64(5)}},
        {"mixed": {"a": torch.zeros(1), "b": 2}},
        {"deep": {"a": [{"b": {1, 2}}]}},
    ]
    for values in bad:
        with pytest.raises((ValueError, TypeError)):
            run.save(2, values)
        assert folders(run) == ["1"]
    assert_same(run.load(), state(1))


AFTERWARDS_TOO = ("os.fsync", "sync_folder", "Path.rename")  # called again once the new one is in place


class Stop(BaseException):
    """Like an interrupt: no `except Exception` catches it."""


CALLS = (
    "os.fsync",
    "sync_folder",
    "safetensors.save",
    "_write_array",
    "json.dumps",
    "_put_in_place",
    "Path.rename",
)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("target", ["best", "latest"])
def test_a_save_that_fails_anywhere_leaves_the_one_before(run, monkeypatch, call, target):
    error = Stop() if target == "best" else OSError(errno.ENOSPC, "No space left on device")

    def save(seed):
        return run.save_best(state(seed)) if target == "best" else run.save(5, state(seed))

    monkeypatch.setattr(run, "flush", lambda: None)
    real = _look_up(call)
    for fatal in range(
        100
    ):  # fail at the first call, then at the second, ... until a save needs no more calls
        save(0)
        numbers = iter(range(10_000))

        def fail(*arguments, fatal=fatal, numbers=numbers, **keywords):
            if next(numbers) == fatal:
                raise error
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(f"runs.checkpoint.{call}", fail)
            try:
                save(1)
                break
            except (OSError, Stop):
                pass
        loaded = run.load(target, say=pytest.fail)
        assert_same(loaded, state(loaded["counters"]["steps"]))
        assert not list(run.path.rglob(".partial-*"))
        if call not in AFTERWARDS_TOO:
            assert loaded["counters"]["steps"] == 0
    assert fatal > 0
    assert_same(run.load(target), state(1))


def _look_up(call) -> Any:
    found: Any = checkpoint
    for name in call.split("."):
        found = getattr(found, name)
    return found


def test_a_full_disk_says_which_checkpoint_it_cost(run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run.save(5, state(5))
    monkeypatch.setattr("runs.checkpoint._write_array", full)
    with pytest.raises(OSError, match="No space left") as caught:
        run.save(6, state(6))
    assert caught.value.__notes__ == ["the checkpoint at step 6 was not saved; the one before is intact"]
    assert folders(run) == ["5"]


def test_left_overs_of_a_killed_process_are_ignored_and_cleaned(run):
    run.save(5, state(5))
    checkpoints = run.path / "checkpoints"
    (checkpoints / ".partial-9-123-abc").mkdir()
    (checkpoints / ".partial-9-123-abc/manifest.json").write_text("{}")
    (checkpoints / "notes").mkdir()
    (checkpoints / "007").mkdir()
    assert_same(run.load(say=pytest.fail), state(5))
    run.save(6, state(6))
    assert folders(run) == ["007", "5", "6", "notes"]
    # killed between moving the old one away and moving the new one in
    (checkpoints / "6").rename(checkpoints / "6.old")
    assert_same(Run.open(run.path).load(say=pytest.fail), state(6))
    run.save_best(state(1))
    (run.path / "best").rename(run.path / "best.old")
    assert_same(Run.open(run.path).load("best"), state(1))
    run.save(7, state(7))
    assert folders(run) == ["007", "6", "7", "notes"]
    run.save_best(state(2))
    assert not (run.path / "best.old").exists()


KILLED = """
import sys, numpy as np, torch
from runs import checkpoint
from pathlib import Path
step = 0
while True:
    step += 1
    parent = Path(sys.argv[1])
    state = {"replay": {"a": np.full(50_000, step)}, "counters": {"steps": step}}
    checkpoint.save(parent / str(step), step, state)
    checkpoint.prune(parent, 2)
    print(step, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_process_killed_at_any_time_leaves_a_whole_checkpoint(tmp_path):
    for delay in (0.0, 0.011):
        worker = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True
        )
        with worker:
            assert worker.stdout is not None
            for _ in range(3):
                assert worker.stdout.readline()
            time.sleep(delay)
            worker.kill()
            said = [int(line) for line in worker.stdout.read().split()]
        _, loaded = checkpoint.load_latest(tmp_path / "c", pytest.fail)
        assert loaded["counters"]["steps"] >= max([3, *said])
        assert (loaded["replay"]["a"] == loaded["counters"]["steps"]).all()
