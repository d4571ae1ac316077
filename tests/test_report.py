"""The learning curve and its command."""

import numpy as np
import pytest
from PIL import Image

from runs import Run, UserError
from runs.report import curve, learning_curve, main, short, smooth


def make(path, episodes=60, evaluations=3, seconds_per_step=0.01):
    rng = np.random.default_rng(0)
    with Run.create({"env": "ALE/Pong-v5", "agent": "dqn", "seed": 1}, path=path) as run:
        for episode in range(episodes):
            step = (episode // 2 + 1) * 1000  # two envs finish in the same step
            run.episodes(step, 4 * step, step * seconds_per_step, [float(rng.normal())], [1000])
        for index in range(evaluations):
            run.evaluation((index + 1) * 9000, rng.normal(size=5), index * 90.0)
    return run


@pytest.mark.parametrize(
    ("episodes", "evaluations", "pace"), [(60, 3, 0.01), (1, 0, 0.01), (0, 2, 0), (400, 1, 1.0), (3, 1, 0)]
)
def test_the_picture_is_drawn_whatever_there_is(tmp_path, episodes, evaluations, pace):
    run = make(tmp_path / "a run", episodes, evaluations, pace)
    path = learning_curve(Run.open(run.path))
    assert path == run.path / "learning-curve.png"
    with Image.open(path) as image:
        assert image.size == (1200, 675)
        assert len(set(image.convert("RGB").resize((120, 67)).get_flattened_data())) > 20


def test_the_command(tmp_path, capsys):
    run = make(tmp_path / "a run")
    assert main([str(run.path), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "learning-curve.png")
    assert (tmp_path / "out" / "learning-curve.png").is_file()


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys):
    make(tmp_path / "empty", 0, 0)
    good = make(tmp_path / "good")
    (tmp_path / "file").write_text("")
    mistakes = {
        "nothing to draw": [str(tmp_path / "empty")],
        "no run at": [str(tmp_path / "none")],
        "Did you mean '--out'": [str(good.path), "--oot", "x"],
        "required": [],
        "cannot write to": [str(good.path), "--out", str(tmp_path / "file" / "x")],
    }
    for message, arguments in mistakes.items():
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert message in err and err.startswith("error: ") and err.count("\n") == 1


def test_smoothing_and_labels(tmp_path):
    np.testing.assert_allclose(smooth(np.array([1.0, 3.0, 5.0, 7.0]), 2), [1, 2, 4, 6])
    assert smooth(np.zeros(0)).shape == (0,)
    assert [short(value) for value in (0, 500, 400_000, 1_200_000, 2e9)] == ["0", "500", "400k", "1.2M", "2G"]
    with pytest.raises(UserError, match="nothing to draw"):
        curve(Run.open(make(tmp_path / "empty", 0, 0).path))
