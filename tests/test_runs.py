"""The run folder: creating, refusing, logging, reading."""

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto import event_pb2

from runs import Run, UserError
from runs.log import Table, read_table

CONFIG = {"env": "ALE/Pong-v5", "agent": "dqn", "seed": 3, "hidden": (64, 32)}


def events(run):
    (path,) = run.path.glob("events.out.tfevents.*")
    parse: Any = event_pb2  # generated at import
    return [parse.Event.FromString(raw) for raw in RawEventFileLoader(str(path)).Load()]


def scalars(run):
    """Scalars of the event file: tag -> step -> value."""
    found = {}
    for event in events(run):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_importing_the_package_loads_nothing_heavy():
    heavy = "torch tensorboard rich matplotlib av PIL gymnasium safetensors"
    rooms = "runs, runs.report, runs.video, runs.panel"
    code = f"import sys, {rooms}; print(set({heavy.split()}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_create_writes_where_it_comes_from_and_open_reads_it(tmp_path):
    root = tmp_path / "a folder with spaces"
    with Run.create(CONFIG, root=root) as run:
        assert run.path.parent == root / "ALE-Pong-v5" / "dqn"
        assert run.path.name.startswith("seed3-")
    record = json.loads((run.path / "config.json").read_text())
    assert set(record) == {"config", "versions", "commit", "command", "machine", "started"}
    assert record["versions"]["torch"] == torch.__version__
    assert record["command"].startswith("python ")
    opened = Run.open(run.path)
    assert opened.config == CONFIG
    with pytest.raises(ValueError, match="not open for writing"):
        opened.log(1, {"loss/td": 1.0})


def test_runs_created_at_once_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("runs.folder.time.strftime", lambda _: "20300101-000000")
    paths = []

    def create():
        with Run.create(CONFIG, root=tmp_path) as run:
            paths.append(run.path)

    threads = [threading.Thread(target=create) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 6


def test_env_names_cannot_leave_the_root(tmp_path):
    with Run.create({"env": "../../x:Env-v0", "agent": "..", "seed": 0}, root=tmp_path / "root") as run:
        assert run.path.parents[2] == tmp_path / "root"
        assert run.path.parents[1].name == "-..-x-Env-v0"


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    with Run.create(CONFIG, path=tmp_path / "mine") as run:
        run.episodes(10, 40, 0.5, [-21], [10])
    before = {entry: entry.read_bytes() for entry in run.path.iterdir()}
    with pytest.raises(UserError, match="already holds a run; choose another --run or delete it"):
        Run.create(CONFIG, path=tmp_path / "mine")
    assert {entry: entry.read_bytes() for entry in run.path.iterdir()} == before

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        Run.create(CONFIG, path=tmp_path / "other")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (
        {"path": tmp_path / "file"},
        {"path": tmp_path / "file" / "run"},
        {"root": tmp_path / "file"},
    ):
        with pytest.raises(UserError, match=r"cannot write a run to|already holds") as caught:
            Run.create(CONFIG, **place)
        assert "\n" not in str(caught.value)


def test_what_a_kill_at_the_start_left_is_no_obstacle(tmp_path):
    (tmp_path / ".partial-config.json-1-abc").write_text("{")
    Run.create(CONFIG, path=tmp_path).close()
    Run.resume(tmp_path)[0].close()
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"cannot write a run to .*Permission denied"):
        Run.create(CONFIG, root=tmp_path / "locked")


def test_open_says_what_is_there_instead(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Run.open(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"it has no config.json"):
        Run.open(tmp_path)
    Run.create(CONFIG, path=tmp_path / "deep" / "first").close()
    with pytest.raises(UserError, match=r"Did you mean '.*first'\?"):
        Run.open(tmp_path)
    with pytest.raises(UserError, match=r"Did you mean 'first'\?"):
        Run.open(tmp_path / "deep" / "frist")
    Run.create(CONFIG, path=tmp_path / "deep" / "second").close()
    with pytest.raises(UserError, match="2 below it"):
        Run.open(tmp_path)
    for content in (b"{", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5_000 + b"}"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UserError, match="cannot read"):
            Run.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="does not describe a run"):
        Run.open(tmp_path)


def test_csv_and_tensorboard_hold_the_same_numbers(tmp_path):
    rng = np.random.default_rng(0)
    with Run.create(CONFIG, root=tmp_path) as run:
        for step in range(0, 500, 10):
            metrics = {
                "loss/td": torch.tensor(rng.normal()),
                "q/mean": rng.normal() * 1e-7,
                "explore/epsilon": 1 / 3,
            }
            if step >= 250:
                metrics["late/one"] = step * 1e9 + 1
            if step == 300:
                metrics |= {"loss/td": math.nan, "q/mean": math.inf, "explore/epsilon": -1e300}
            run.log(step, metrics)
    table, found = run.table("metrics"), scalars(run)
    assert set(table) - {"step"} == set(found)
    for name, logged in found.items():
        rows = {int(s): v for s, v in zip(table["step"], table[name], strict=True) if int(s) in logged}
        for step, value in logged.items():
            assert np.float32(rows[step]) == np.float32(value) or (
                math.isnan(value) and math.isnan(rows[step])
            )
    assert list(table["step"]) == list(range(0, 500, 10))
    assert np.isnan(table["late/one"][:25]).all()
    assert ",inf," in (run.path / "metrics.csv").read_text()


def test_rows_are_there_at_once_and_whole(tmp_path):
    run = Run.create(CONFIG, root=tmp_path)
    run.log(1, {"loss/td": 0.5})
    run.log(2, {"loss/td": 0.25, "time/update": 2.0})
    run.episodes(7, 28, 0.1234567, [-21.0], [7])
    assert (run.path / "metrics.csv").read_text() == "step,loss/td,time/update\n1,0.5,\n2,0.25,2.0\n"
    assert (run.path / "scores.csv").read_text().splitlines()[1] == "7,28,0.123,-21.0,7"
    assert scalars(run)["episode/return"] == {7: -21.0}
    with open(run.path / "scores.csv", "a") as file:
        file.write("9,3")  # what a reader may catch of a row on its way
    assert list(run.table("scores")["step"]) == [7]
    run.close()
    run.close()


def test_episodes_of_a_step_are_rows_each_and_one_event_of_their_means(tmp_path):
    with Run.create(CONFIG, root=tmp_path) as run:
        run.episodes(8, 32, 0.5, [1.0, 2.0, 6.0], [10, 20, 60])
        run.episodes(8, 32, 0.5, [5.0], [4])
        with pytest.raises(ValueError, match="must not go back, got 7 after 8"):
            run.episodes(7, 28, 0.5, [1.0], [1])
        rows = (run.path / "scores.csv").read_text().splitlines()[1:]
        assert rows == ["8,32,0.5,1.0,10", "8,32,0.5,2.0,20", "8,32,0.5,6.0,60", "8,32,0.5,5.0,4"]
        run.episodes(9, 36, 0.5, [1.0, 2.0, 6.0], [10, 20, 60])
    assert scalars(run)["episode/return"][9] == 3.0 and scalars(run)["episode/length"][9] == 30.0


def test_steps_do_not_go_back_and_names_are_safe(tmp_path):
    with Run.create(CONFIG, root=tmp_path) as run:
        run.log(10, {"loss/td": 1.0})
        run.log(10, {"loss/td": 2.0})
        with pytest.raises(ValueError, match="must not go back, got 9 after 10"):
            run.log(9, {"loss/td": 1.0})
        for name in ("a,b", "", 'quo"te', "line\nbreak"):
            with pytest.raises(ValueError, match="a metric is named with"):
                run.log(11, {name: 1.0})
        run.log(12, {"loss/td": 3.0})
    assert list(run.table("metrics")["loss/td"]) == [1, 2, 3]
    assert list(scalars(run)["loss/td"]) == [10, 12]


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_new_column_that_fails_costs_no_rows(tmp_path, monkeypatch):
    table = Table(tmp_path / "metrics.csv", ["step"])
    table.append(1, {"a": "1"})
    with monkeypatch.context() as patch:
        patch.setattr("runs.disk.os.fsync", full)
        table.append(2, {"a": "2", "b": "2"})
        assert (tmp_path / "metrics.csv").read_text() == "step,a\n1,1\n"
    table.append(3, {"a": "3", "b": "3"})
    table.close()
    assert (tmp_path / "metrics.csv").read_text() == "step,a,b\n1,1,\n2,2,2\n3,3,3\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.fixture
def limit():
    """Sets the largest size of a file that this process may write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_rows_wait_for_a_full_disk_and_are_never_there_by_half(tmp_path, limit):
    run = Run.create(CONFIG, root=tmp_path)
    for step in range(1, 4):
        run.episodes(step, step, 0.5, [1.0], [step])
    size = (run.path / "scores.csv").stat().st_size
    before = (run.path / "scores.csv").read_bytes()
    limit(size + 7)  # half a row would fit
    for step in range(4, 7):
        run.episodes(step, step, 0.5, [1.0], [step])
        run.log(step, {"loss/td": 0.5})
    try:
        assert (run.path / "scores.csv").read_bytes() == before
        assert run.refused is not None and run.refused.errno == errno.EFBIG
        with pytest.raises(OSError, match=r"3 of its records wait in memory.*scores\.csv"):
            run.flush()
    finally:
        limit(resource.RLIM_INFINITY)
    run.episodes(7, 7, 0.5, [1.0], [7])
    run.log(8, {"loss/td": 0.5})
    assert run.refused is None
    run.close()
    assert list(run.table("scores")["step"]) == [1, 2, 3, 4, 5, 6, 7]
    assert list(run.table("metrics")["step"]) == [4, 5, 6, 8]
    assert list(scalars(run)["episode/return"]) == [1, 2, 3, 4, 5, 6, 7]
    assert list(scalars(run)["loss/td"]) == [4, 5, 6, 8]


def test_rows_that_are_lost_in_the_end_are_said_to_be(tmp_path, limit):
    run = Run.create(CONFIG, root=tmp_path)
    limit(0)
    run.episodes(1, 1, 0.5, [1.0], [1])
    with pytest.raises(OSError, match="1 of its records wait in memory"):
        run.close()
    run.close()
    assert (run.path / "scores.csv").read_text().count("\n") == 1
    limit(resource.RLIM_INFINITY)
    Run.resume(run.path)[0].close()  # the lock was given back, too


def test_what_went_wrong_first_is_what_is_said(tmp_path, limit):
    with pytest.raises(KeyboardInterrupt), Run.create(CONFIG, root=tmp_path) as run:
        limit(0)
        run.episodes(1, 1, 0.5, [1.0], [1])
        raise KeyboardInterrupt


DAMAGE = [
    (lambda rows: [rows[0], b"1,\xff,0.5,1.0,1\n", *rows[2:]], "line 2 is damaged"),
    (lambda rows: [rows[0], b"\n", *rows[2:]], "line 2 is damaged"),
    (lambda rows: [rows[0], rows[1].replace(b",", b";", 1), *rows[2:]], "line 2 is damaged"),
    (lambda rows: [rows[0], b"nan" + rows[1], *rows[2:]], "line 2 is damaged"),
    (lambda rows: [rows[0], b"inf" + rows[1][1:], *rows[2:]], "line 2 is damaged"),
    (lambda rows: [rows[0], b"9" + rows[1][1:], *rows[2:]], "line 2 is of step 9"),
    (lambda rows: [rows[0], rows[2], rows[1], *rows[3:]], "line 3 is of step 1 after step 2"),
    (lambda rows: rows[:-1], "of its 3 rows at step 3, 2 are left"),
    (lambda rows: [b"s" + rows[0], *rows[1:]], "its columns are not step,frames,seconds,return,length"),
    (lambda rows: [], "its columns are not"),
    (lambda rows: [b"\xff\xfe\n"], "its columns are not"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGE)
def test_a_damaged_table_is_not_continued(tmp_path, damage, named):
    with Run.create(CONFIG, root=tmp_path) as run:
        for step in (1, 2, 3):
            run.episodes(step, step, 0.5, [1.0], [step])
        run.save(3, {"counters": {"step": 3}})
    path = run.path / "scores.csv"
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(UserError, match=named) as caught:
        Run.resume(run.path)
    assert "scores.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_what_came_after_the_checkpoint_is_cut_whatever_it_is(tmp_path):
    with Run.create(CONFIG, root=tmp_path) as run:
        run.episodes(1, 1, 0.5, [1.0], [1])
        run.save(2, {"counters": {"step": 2}})
        run.evaluation(2, [1.0], 1.0)  # the last one of a run: of the same step, but later
        run.episodes(2, 1, 0.5, [1.0], [1])
    with open(run.path / "scores.csv", "ab") as file:
        file.write(b"\0" * 100 + b"\n")
    with open(next(run.path.glob("events.out.*")), "ab") as file:
        file.write(b"\0" * 100)
    again, step, state = Run.resume(run.path)
    assert step == 2 and state == {"counters": {"step": 2}}
    again.close()
    assert list(run.table("scores")["step"]) == [1] and not len(run.table("evaluations")["step"])
    assert scalars(run) == {"episode/return": {1: 1.0}, "episode/length": {1: 1.0}}


@pytest.mark.parametrize("at", [0, 8, 30, -5])
def test_a_damaged_event_file_is_named_and_continued(tmp_path, at):
    with Run.create(CONFIG, root=tmp_path) as run:
        for step in (1, 2, 3):
            run.episodes(step, step, 0.5, [1.0], [step])
        run.save(3, {"counters": {"step": 3}})
    (path,) = run.path.glob("events.out.*")
    content = bytearray(path.read_bytes())
    content[at] ^= 0x80
    path.write_bytes(content)
    said = []
    again, _, _ = Run.resume(run.path, said.append)
    again.episodes(4, 4, 0.5, [1.0], [4])
    again.close()
    assert len(said) == 1 and "is damaged" in said[0] and path.name in said[0]
    found = events(run)  # TensorBoard reads all that is there
    assert found[0].file_version and found[-1].step == 4


def test_a_damaged_table_is_read_with_one_line(tmp_path):
    path = tmp_path / "t.csv"
    for content in (b"step,a\n1,x\n", b"step,a\n1\n", b"step,a\n1,\xff\n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"t\.csv: line 2 is damaged"):
            read_table(path)


def test_reading_tables(tmp_path):
    path = tmp_path / "t.csv"
    assert read_table(path) == {}
    path.write_text("")
    assert read_table(path) == {}
    path.write_text("step,a\n")
    assert {name: len(column) for name, column in read_table(path).items()} == {"step": 0, "a": 0}


def test_evaluations_and_which_is_best(tmp_path):
    with Run.create(CONFIG, root=tmp_path) as run:
        assert run.evaluation(100, np.array([1.0, 3.0]), 5.0)
        assert not run.evaluation(200, [2.0, 2.0], 6.0)
        assert not run.evaluation(300, [math.nan, 9.0], 7.0)
        assert run.evaluation(400, [2.5], 8.0)
        with pytest.raises(ValueError, match="needs returns of shape"):
            run.evaluation(500, [], 9.0)
    assert (run.path / "evaluations.csv").read_text().splitlines()[:2] == [
        "step,mean,std,min,max,episodes,seconds",
        "100,2.0,1.0,1.0,3.0,2,5.0",
    ]
    assert scalars(run)["eval/mean"][400] == 2.5


def test_histograms_and_films_reach_tensorboard(tmp_path):
    frames = np.zeros((3, 10, 12, 3), np.uint8)
    frames[1, :5], frames[2, :, :6] = 200, 90
    with Run.create(CONFIG, root=tmp_path) as run:
        run.histogram(5, "q/values", np.array([[1.0, 2.0], [math.nan, 4.0]]))
        run.histogram(6, "q/values", np.full(3, math.nan))
        run.histogram(7, "q/values", np.ones(3))
        run.video(8, "eval/episode", frames, fps=15)
    values = {event.step: event.summary.value[0] for event in events(run) if event.summary.value}
    assert sorted(values) == [5, 7, 8]
    histogram = values[5].histo
    assert (histogram.num, histogram.min, histogram.max, histogram.sum) == (3, 1, 4, 7)
    assert sum(histogram.bucket) == 3 and len(histogram.bucket) == len(histogram.bucket_limit)
    image = values[8].image
    assert (image.height, image.width) == (10, 12) and image.encoded_image_string.startswith(b"GIF89a")


def test_summary_is_strict_json_and_replaced_in_one_step(tmp_path, monkeypatch):
    with Run.create(CONFIG, root=tmp_path) as run:
        facts = {
            "steps": np.int64(5),
            "mean": np.float32(0.5),
            "loss": math.nan,
            "path": Path("x"),
            "t": torch.tensor(2),
        }
        run.summary(facts)
        written = json.loads((run.path / "summary.json").read_text(), parse_constant=pytest.fail)
        assert written == {"steps": 5, "mean": 0.5, "loss": None, "path": "x", "t": 2}

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("runs.disk.os.fsync", full)
            with pytest.raises(OSError, match="No space"):
                run.summary({"steps": 6})
        assert json.loads((run.path / "summary.json").read_text())["steps"] == 5
        assert not list(run.path.glob(".partial*"))
        with pytest.raises(TypeError, match="cannot write a object"):
            run.summary({"bad": object()})


def test_a_new_column_is_there_once_even_if_its_folder_cannot_be_synced(tmp_path, monkeypatch):
    table = Table(tmp_path / "metrics.csv", ["step"])
    monkeypatch.setattr("runs.disk.sync_folder", full)
    for step in (1, 2):
        table.append(step, {"a": str(step)})
    table.close()
    assert (tmp_path / "metrics.csv").read_text() == "step,a\n1,1\n2,2\n"
