"""Comparing runs: the statistics by hand, which runs belong together, and what a user sees."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agents import compare
from agents.compare import MEAN, bootstrap_interval, iqm, main, on_common_steps, row
from agents.groups import grouped, read, shown
from agents.run import guarded
from runs import UserError

ROOT = Path(__file__).parent.parent


def made(
    folder: Path,
    means: tuple[float, ...] = (1.0, 2.0, 3.0),
    *,
    scores: tuple[float, ...] = (),
    steps: int | None = None,
    commit: str = "a" * 40,
    **settings: Any,
) -> Path:
    """A run folder with an evaluation every 1,000 steps; finished unless `steps`, where it ends, is 0."""
    folder.mkdir(parents=True)
    config = {"env": "CartPole-v1", "agent": "dqn", "backbone": "mlp", "seed": 0, "lr": 0.001, **settings}
    (folder / "config.json").write_text(json.dumps({"config": config, "commit": commit}))
    rows = [f"{1000 * n},{mean},0.5,{mean - 1},{mean + 1},10,{n}.0" for n, mean in enumerate(means, 1)]
    header = "step,mean,std,min,max,episodes,seconds"
    (folder / "evaluations.csv").write_text("\n".join([header, *rows]) + "\n")
    rows = [f"{100 * n},{100 * n},{n}.0,{return_},9" for n, return_ in enumerate(scores, 1)]
    (folder / "scores.csv").write_text("\n".join(["step,frames,seconds,return,length", *rows]) + "\n")
    if steps != 0 and means:
        summary = {
            "steps": steps or 1000 * len(means),
            "seconds": 90.0,
            "steps_per_second": {"whole": 20.0, "steady": 40.0},
            "evaluation": {"mean": means[-1], "std": 0.5, "episodes": 30},
            "finished": True,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def labels(*folders: Path, by: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    """Label -> seeds."""
    groups = grouped(read(folders)[0], by)
    return {group.label: [outcome.seed for outcome in group.outcomes] for group in groups}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([8, 1, 7, 2, 6, 3, 5, 4], 4.5),  # 3 4 5 6 remain
        ([0, 10, 20, 1000], 15),
        ([-1000, 1, 2, 3, 1000], 2),
        ([1, 2, 6], 3),  # a quarter of three is less than one
        ([7], 7),
    ],
)
def test_the_interquartile_mean(scores: list[float], expected: float) -> None:
    assert iqm(np.array(scores, float)) == expected
    twice = np.array([scores, scores], float).T
    np.testing.assert_array_equal(iqm(twice), [expected, expected])


def test_a_score_that_is_no_number_is_not_cut_off_as_the_best() -> None:
    assert np.isnan(iqm(np.array([1.0, 2.0, 3.0, np.nan])))


def test_the_bootstrap_against_all_draws() -> None:
    scores = np.array([0.0, 0.0, 3.0])  # means of draws: 0 (8/27), 1 (12/27), 2 (6/27), 3 (1/27)
    everything = [np.mean(draw) for draw in itertools.product(scores, repeat=3)]
    assert sorted(everything).count(3.0) == 1
    for level, expected in ((0.95, (0, 3)), (0.9, (0, 2)), (0.2, (1, 1))):
        assert bootstrap_interval(scores, MEAN, np.random.default_rng(0), level=level) == expected
    constant = bootstrap_interval(np.full(5, 2.5), iqm, np.random.default_rng(0))
    assert constant == (2.5, 2.5)


def test_the_bootstrap_of_many_scores_is_the_normal_interval() -> None:
    scores = np.random.default_rng(1).normal(10, 2, (400, 3))
    low, high = bootstrap_interval(scores, MEAN, np.random.default_rng(0))
    assert low.shape == high.shape == (3,)
    half = 1.96 * scores.std(axis=0) / 20
    np.testing.assert_allclose(low, scores.mean(axis=0) - half, atol=0.15 * half.max())
    np.testing.assert_allclose(high, scores.mean(axis=0) + half, atol=0.15 * half.max())


def test_the_bootstrap_follows_its_generator() -> None:
    scores, seeds = np.random.default_rng(1).normal(size=7), (0, 0, 1)
    found = [bootstrap_interval(scores, iqm, np.random.default_rng(seed), samples=50) for seed in seeds]
    assert found[0] == found[1] != found[2]
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval(np.zeros(0), MEAN, np.random.default_rng(0))


def test_curves_meet_on_common_steps() -> None:
    one = np.array([10.0, 20.0, 30.0]), np.array([0.0, 10.0, 20.0])
    two = np.array([15.0, 25.0]), np.array([1.0, 3.0])
    steps, values = on_common_steps([one, two])
    assert steps.tolist() == [15, 20, 25]
    assert sorted(values.tolist()) == [[1, 2, 3], [5, 10, 15]]
    early = np.array([1.0, 5.0]), np.array([0.0, 0.0])
    assert on_common_steps([one, two, early])[1].shape == (2, 3)
    long = np.arange(10_000.0), np.arange(10_000.0)
    steps, values = on_common_steps([long])
    assert len(steps) == compare.POINTS and steps[0] == 0 and steps[-1] == 9999
    np.testing.assert_array_equal(values[0], steps)


def test_seeds_belong_together_and_settings_do_not(tmp_path: Path) -> None:
    a = made(tmp_path / "a", dueling="off")
    b = made(tmp_path / "b", dueling="off", seed=1, threads=2, eval_every=7, preset="none", commit="b" * 40)
    c = made(tmp_path / "c", dueling="mean", seed=1)
    assert labels(a, b) == {"dqn": [0, 1]}
    assert labels(a, b, c) == {"dqn dueling=off": [0, 1], "dqn dueling=mean": [1]}
    assert labels(tmp_path, b) == labels(a, b, c)  # each once
    sarsa = made(tmp_path / "d", agent="sarsa", lr=0.5)
    assert labels(a, c, sarsa).keys() == {"dqn dueling=off", "dqn dueling=mean", "sarsa"}
    other = made(tmp_path / "e", env="Acrobot-v1", lr=0.5, dueling="max")
    assert labels(a, other) == {"dqn": [0]} and len(grouped(read([a, other])[0])) == 2


def test_labels_stay_short(tmp_path: Path) -> None:
    many = dict(n_step=3, gamma=0.9, batch=8, tau=0.5)
    a = made(tmp_path / "a", n_step=1, gamma=0.99, batch=32, tau=1.0)
    b = made(tmp_path / "b", **many)
    c = made(tmp_path / "c", **many | dict(n_step=1))
    assert list(labels(a, b)) == ["dqn n_step=1 +3", "dqn n_step=3 +3"]
    three = ["n_step=1 gamma=0.99", "n_step=3 gamma=0.9", "n_step=1 gamma=0.9"]
    assert list(labels(a, b, c)) == [f"dqn {words} +2" for words in three]
    notes = compare.remarks([row(group) for group in grouped(read([a, b])[0])])
    assert notes[1] == "CartPole-v1, dqn n_step=3 +3: n_step=3, gamma=0.9, batch=8, tau=0.5"
    d = made(tmp_path / "d", preset="mine", n_step=1, gamma=0.99, batch=32, tau=1.0)
    e = made(tmp_path / "e", preset="rainbow", **many)
    assert list(labels(d, e)) == ["dqn preset=mine", "dqn preset=rainbow"]
    cnn = made(tmp_path / "f", backbone="cnn", net="light", n_step=1, gamma=0.99, batch=32, tau=1.0)
    assert list(labels(a, cnn)) == ["dqn backbone=mlp", "dqn backbone=cnn"]


def test_by_names_the_groups(tmp_path: Path) -> None:
    a = made(tmp_path / "a", n_step=1, tau=1.0)
    b = made(tmp_path / "b", n_step=3, tau=0.5, commit="b" * 40 + "-dirty")
    c = made(tmp_path / "c", n_step=3, tau=1.0, seed=1)
    assert labels(a, b, c, by=("tau",)) == {"dqn tau=1": [0, 1], "dqn tau=0.5": [0]}
    assert list(labels(a, b, by=("commit",))) == ["dqn commit=aaaaaaa", "dqn commit=bbbbbbb-dirty"]
    assert list(labels(a, b, c, by=("agent",))) == ["dqn"]
    (note,) = compare.remarks([row(group) for group in grouped(read([a, c])[0], ("tau",))])
    assert note.endswith("a mean over runs that also differ in n_step")
    with pytest.raises(UserError, match=r"--by n_steps: .*Did you mean 'n_step'\?"):
        labels(a, b, by=("n_steps",))


def test_a_knob_that_came_later_had_its_default(tmp_path: Path) -> None:
    old = made(tmp_path / "a")
    new = made(tmp_path / "b", seed=1, munchausen=0.0)
    other = made(tmp_path / "c", munchausen=0.9)
    assert labels(old, new, other) == {"dqn munchausen=0": [0, 1], "dqn munchausen=0.9": [0]}
    gone = made(tmp_path / "d", seed=1, unheard_of=1)  # what is no knob today may have had an effect
    assert list(labels(old, gone)) == ["dqn unheard_of=-", "dqn unheard_of=1"]


def test_settings_in_labels() -> None:
    settings = {"a": 1.0, "b": True, "c": (256, 256), "d": None, "e": 1, "f": 2.5e-05, "g": "mean"}
    assert [shown(settings, name) for name in "abcdefgh"] == "1 on 256x256 None 1 2.5e-05 mean -".split()


def test_the_band_says_how_many_seeds_there_are(tmp_path: Path) -> None:
    found = []
    for seed in range(3):
        made(tmp_path / f"s{seed}", (float(seed), 10.0 * seed, 6.0), seed=seed)
        (group,) = grouped(read([tmp_path])[0])
        found.append(row(group))
    one, two, three = (each.line for each in found)
    assert [one.band, two.band, three.band] == ["none", "range", "interval"]
    assert (
        two.mean.tolist() == [0.5, 5, 6] and two.low.tolist() == [0, 0, 6] and two.high.tolist() == [1, 10, 6]
    )
    assert three.low[0] < 1 < three.high[0] and three.low[2] == three.high[2] == 6
    assert [each.interval for each in found] == [None, None, (6, 6)]


def test_training_returns_stand_in_for_missing_evaluations(tmp_path: Path) -> None:
    made(tmp_path / "a", (5.0,), scores=(1.0, 3.0, 5.0))
    made(tmp_path / "b", (5.0,), scores=(3.0, 5.0, 7.0), seed=1)
    (group,) = grouped(read([tmp_path])[0])
    line = row(group).line
    assert (line.of, line.seeds) == ("training", 2)
    assert line.step.tolist() == [100, 200, 300] and line.mean.tolist() == [2, 3, 4]
    made(tmp_path / "c", (1.0, 2.0), seed=2)
    (group,) = grouped(read([tmp_path])[0])
    assert (row(group).line.of, row(group).line.seeds) == ("evaluations", 1)
    assert "the curve is that of 1 of 3" in compare.remarks([row(group)])[-1]
    made(tmp_path / "alone" / "x", (4.0,))
    line = row(grouped(read([tmp_path / "alone"])[0])[0]).line
    assert (line.of, line.step.tolist(), line.mean.tolist()) == ("evaluations", [1000], [4])


def test_a_run_that_goes_on_is_read_as_it_stands(tmp_path: Path) -> None:
    made(tmp_path / "a", (1.0, 2.0), steps=0)
    resumed = made(tmp_path / "b", (1.0, 2.0, 9.0), steps=2000, seed=1)  # its summary is of an earlier end
    outcomes, _ = read([tmp_path])
    assert [(each.final, each.steps, each.finished) for each in outcomes] == [
        (2, 2000, False),
        (9, 3000, False),
    ]
    (group,) = grouped(outcomes)
    assert "2 of 2 not finished" in compare.remarks([row(group)])[0]
    assert "-" in compare.text([row(group)], []).splitlines()[4].split()  # steps/s
    assert read([resumed])[0][0].run.path == resumed


def test_a_run_that_diverged_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(4):
        folder = made(tmp_path / f"{seed}", (1.0, 2.0), seed=seed)
    summary = json.loads((folder / "summary.json").read_text())
    summary["evaluation"]["mean"] = None
    (folder / "summary.json").write_text(json.dumps(summary))
    assert guarded(main, [str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "nan [nan, nan]" in capsys.readouterr().out
    (group,) = json.loads((tmp_path / "out/compare.json").read_text())["envs"]["CartPole-v1"]
    assert group["final"]["scores"] == [2, 2, 2, None] and group["final"]["iqm"] is None


def test_many_groups_are_drawn(tmp_path: Path) -> None:
    for number in range(10):
        made(tmp_path / f"{number}", (5.0,), scores=(1.0, 2.0)[: 1 + number % 2], lr=0.1 * (1 + number))
    rows = [row(group) for group in grouped(read([tmp_path])[0])]
    assert len({each.group.label for each in rows}) == 10
    with Image.open(compare.picture(rows, tmp_path)) as image:
        assert image.size == (1200, 975)


def test_runs_of_one_seed_are_named(tmp_path: Path) -> None:
    made(tmp_path / "a", seed=4)
    made(tmp_path / "b", seed=4, commit="b" * 40)
    (group,) = grouped(read([tmp_path])[0])
    (note,) = compare.remarks([row(group)])
    assert "several runs of seed 4" in note and "--by commit" in note


def test_the_table_reads_well(tmp_path: Path) -> None:
    for seed, last in enumerate((10.0, 20.0, 60.0)):
        made(tmp_path / f"{seed}", (100.0, last), seed=seed, dueling="off", double="online", n_step=1)
    made(tmp_path / "x", (1.0, 2.5), dueling="mean", double="twin", n_step=30)
    rows = [row(group) for group in grouped(read([tmp_path])[0])]
    for width in (80, 100):
        lines = compare.text(rows, [], width).splitlines()
        assert max(map(len, lines)) <= width
        words = " ".join(lines).split()
        for cell in ("CartPole-v1", "3", "2,000", "30", "[10,", "60]", "100", "40", "1.5", "2.5"):
            assert cell in words
    assert lines[2].split()[:4] == ["group", "seeds", "steps", "final"]
    assert (
        lines[4].split() == "dqn dueling=off double=online n_step=1 3 2,000 30 30 [10, 60] 100 40 1.5".split()
    )


def test_all_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for env, seed in itertools.product(("CartPole-v1", "ALE/Pong-v5"), range(3)):
        made(tmp_path / "runs" / env / str(seed), (1.0, 5.0 + seed, 7.0 - seed), env=env, seed=seed)
    made(tmp_path / "runs" / "other", (1.0, 0.5), gamma=0.5)
    command = [str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert guarded(main, command) == 0
    said = capsys.readouterr()
    assert "ALE/Pong-v5" in said.out and str(tmp_path / "out/compare.png") in said.out and not said.err
    assert (tmp_path / "out/compare.txt").read_text().startswith("ALE/Pong-v5\n\ngroup ")
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert first.keys() == {"compare.json", "compare.txt", "compare.png"}
    assert guarded(main, [*command, "--json"]) == 0  # its own files are replaced, by the same
    out = capsys.readouterr().out
    assert out.encode() == first["compare.json"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first
    facts = json.loads(out)
    assert facts.keys() == {"made_by", "bootstrap", "envs", "notes"} and len(facts["envs"]) == 2
    (group,) = facts["envs"]["ALE/Pong-v5"]
    keys = "label agent settings seeds runs finished steps final best steps_per_second minutes curve"
    assert group.keys() == set(keys.split())
    assert group["seeds"] == [0, 1, 2] and group["final"]["scores"] == [7, 6, 5]
    assert group["final"]["mean"] == group["final"]["iqm"] == 6 and group["best"]["mean"] == 20 / 3
    assert group["curve"]["step"] == [1000, 2000, 3000] and group["curve"]["mean"] == [1, 6, 6]
    with Image.open(tmp_path / "out/compare.png") as image:
        assert image.size[0] == 1500
        assert len(set(image.convert("RGB").resize((150, 60)).get_flattened_data())) > 20


def test_the_committed_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "runs/reference/CartPole-v1"
    assert guarded(main, [str(folder), "--out", str(tmp_path), "--json"]) == 0
    groups = {group["label"]: group for group in json.loads(capsys.readouterr().out)["envs"]["CartPole-v1"]}
    assert groups.keys() == {"a2c", "dqn", "ppo", "reinforce", "trpo"}
    for group in groups.values():
        assert group["seeds"] == [0, 1, 2] and group["finished"] == 3
        assert group["final"]["mean"] == 500 and group["curve"]["band"] == "interval"
    assert len(groups["dqn"]["curve"]["step"]) == 10


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, empty = str(made(tmp_path / "run")), str(made(tmp_path / "fresh" / "empty", ()))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/compare.png").write_text("a holiday")
    mistakes = {
        "required: RUN": [],
        "no such folder": [str(tmp_path / "rum")],
        "it has no config.json": [run, str(tmp_path / "nothing")],
        "it is a file": [str(tmp_path / "mine/compare.png")],
        "no evaluation has finished yet": [run, empty],
        "nothing to compare: no evaluation": [str(tmp_path / "fresh")],
        "Did you mean 'lr'?": [run, "--by", "lrr"],
        "Did you mean '--out'": [run, "--oot", "x"],
        "compare.png was not made by this command": [run, "--out", str(tmp_path / "mine")],
        "cannot write to": [run, "--out", str(tmp_path / "run/config.json")],
    }
    for message, arguments in mistakes.items():
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        assert guarded(main, [*arguments, *out]) == 2, message
        err = capsys.readouterr().err
        assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert (tmp_path / "mine/compare.png").read_text() == "a holiday" and not (tmp_path / "out").exists()
    assert guarded(main, [str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "empty is left out" in " ".join(capsys.readouterr().out.split())


def test_help_is_quick() -> None:
    code = "import sys, agents.compare\ntry: agents.compare.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'matplotlib', 'gymnasium'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--by NAME" in done.stdout, done.stderr
