"""The flags of a memory and of the encoder below it: shown, checked, dealt out, written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agents import PPO
from agents.run import guarded, main
from agents.training import owners, parts, resolve, train
from backbones import MEMORY
from backbones.mlp import MLP
from runs.config import UserError


def settled(env: str, **given: Any) -> dict[str, Any]:
    return resolve("ppo", {"env": env, **given}, {}, None, say=lambda line: None)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    with pytest.raises(SystemExit):
        main(["ppo", *words, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    return [line.strip().split(" ")[0] for line in lines if line.startswith("  --")] + lines


@pytest.mark.parametrize("backbone", MEMORY)
def test_help_shows_both(backbone: str, capsys: pytest.CaptureFixture[str]) -> None:
    every = shown(capsys, "--backbone", backbone)
    assert {f"backbone {backbone}:", "encoder mlp:", "encoder cnn:"} <= set(every)
    assert {"--encoder", "--hidden", "--net"} <= set(every)
    one = shown(capsys, "--backbone", backbone, "--encoder=cnn")
    assert "--net" in one and "--hidden" not in one and "encoder mlp:" not in one


def test_a_net_without_memory_has_no_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--encoder" not in shown(capsys, "--backbone", "mlp")
    assert not any(title.startswith("encoder") for title in owners("ppo", "mlp", "cnn"))
    assert guarded(main, ["ppo", "--env", "CartPole-v1", "--backbone", "mlp", "--encoder", "cnn"]) == 2
    assert "unknown flag --encoder" in capsys.readouterr().err


def test_the_encoder_is_settled_by_the_observation() -> None:
    settings = settled("CartPole-v1", backbone="gru", width=32)
    net = parts(settings).net
    assert net["encoder"] == "mlp" and net["width"] == 32 and net["hidden"] == settings["hidden"] == (64, 64)
    assert net.keys() == {"encoder", "width", "layers", "start", "hidden", "activation", "norm"}
    net = parts(settled("ALE/Pong", backbone="window")).net
    assert net["encoder"] == "cnn" and net.keys() == {"encoder", "window", "net", "features", "norm"}


def test_the_encoder_takes_its_flags() -> None:
    net = parts(settled("ALE/Pong", backbone="lstm", encoder="cnn", net="light", norm=True)).net
    assert (net["net"], net["norm"]) == ("light", True)
    net = parts(settled("ALE/Pong", backbone="lstm", encoder="mlp", hidden=(8,))).net
    assert net["hidden"] == (8,) and "net" not in net


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lstm", "--encoder", "cmn"], "--encoder must be one of mlp, cnn, got 'cmn'. Did you mean 'cnn'?"),
        (["lstm", "--encoder", "gru"], "--encoder must be one of mlp, cnn, got 'gru'."),
        (["lstm", "--encoder", "mlp", "--net", "light"], "unknown flag --net."),
        (["lstm", "--net", "light"], "unknown setting 'net' for ppo on lstm above mlp."),
        (["lstm", "--encoder", "cnn"], "backbone cnn needs an image observation"),
        (["lstm", "--start", "leaned"], "Did you mean 'learned'?"),
        (["lstm", "--widht", "8"], "unknown flag --widht. Did you mean '--width'?"),
        (["lstm", "--hidden", "0"], "--hidden must be a whole number >= 1"),
        (["transformer", "--heads", "3"], "--heads must divide --width 128, got 3"),
        (["transformer", "--context", "1"], "--context must be a whole number >= 2, got 1"),
        (["window", "--window", "0"], "--window must be a whole number >= 1, got 0"),
    ],
)
def test_mistakes(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = ["--steps", "64", "--run", str(tmp_path / "run")]
    assert guarded(main, ["ppo", "--env", "CartPole-v1", "--backbone", *words, *where]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_in_a_file_the_encoder_is_checked_as_well() -> None:
    with pytest.raises(UserError, match=r"--encoder must be one of mlp, cnn, got 'cmn'"):
        resolve("ppo", {"env": "CartPole-v1"}, {"backbone": "lstm", "encoder": "cmn"}, None)


def test_a_run_writes_them_side_by_side_and_can_be_repeated(tmp_path: Path) -> None:
    short: dict[str, Any] = dict(steps=128, rollout=16, batch=32, num_envs=2, eval_every=0, final_episodes=1)
    how: Any = dict(preset="none", say=lambda line: None)
    net: dict[str, Any] = dict(backbone="lstm", encoder="mlp", width=8, hidden=(6,), start="learned")
    one = train("ppo", "CartPole-v1", run=tmp_path / "a", **how, **short, **net)
    config = json.loads((tmp_path / "a" / "config.json").read_text())["config"]
    assert (config["encoder"], config["width"], config["hidden"]) == ("mlp", 8, [6])
    trunk: Any = one.agent.model.backbone  # type: ignore[attr-defined]
    assert type(trunk.encoder) is MLP and (trunk.encoder.features, trunk.features) == (6, 8)
    file = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    file.pop("preset")
    two = train("ppo", "CartPole-v1", run=tmp_path / "b", file=file, **how)
    assert one.summary["evaluation"] == two.summary["evaluation"]


def test_an_encoder_object_needs_a_backbone_object() -> None:
    learner = PPO(backbone="lstm", net={"encoder": MLP((4,))})
    with pytest.raises(UserError, match="an encoder object belongs into a backbone object, of lstm"):
        train(learner, "CartPole-v1", steps=64)


@pytest.mark.parametrize(
    ("kind", "bounds"), [("c51", (0.0, 40.0)), ("quantile", (-10.0, 10.0)), ("off", (-10.0, 10.0))]
)
def test_knobs_of_a_presets_distribution_go_with_it(kind: str, bounds: tuple[float, float]) -> None:
    """Else `--distributional off` would be refused in the name of a flag that nobody gave."""
    given = {"env": "chordate/CartPoleNoVel-v1", "distributional": kind}
    config = parts(resolve("dqn", given, {}, None, lambda line: None)).agent
    assert (config.v_min, config.v_max) == bounds
