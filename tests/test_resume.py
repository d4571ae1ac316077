"""Resume: a run that was killed and goes on ends with the same bits as one that was never disturbed."""

import json
import os
import shutil
import signal

import numpy as np
import pytest

import envs
from agents import load, resume, train
from agents.dqn import DQN
from agents.evaluate import Evaluator
from agents.sarsa import SARSA
from agents.watch import Watch
from envs import Collector
from runs import Run, UserError
from tests.tools import NESTED, SMALL, Elman, assert_same_run, register, rows

PIXELS = dict(size=16, net="light", features=16)


class Killed(BaseException):
    """Stands for SIGKILL: nothing is saved after it."""


def killed_at(monkeypatch, step):
    after = Watch.after

    def dying(self, before, now, episodes, update):
        after(self, before, now, episodes, update)
        if before < step <= now:
            raise Killed

    monkeypatch.setattr(Watch, "after", dying)


def interrupted(monkeypatch, tmp_path, env, kill, steps=200, agent="dqn", small=SMALL, make=None, **settings):
    """The same run twice, undisturbed and killed after `kill` steps; their folders. `make`: an agent object."""
    settings = {**small, **settings, "steps": steps, "preset": "none", "say": lambda _: None}
    whole, other = tmp_path / "whole", tmp_path / "other"
    train(make() if make else agent, env, run=whole, **settings)
    with monkeypatch.context() as patch:
        killed_at(patch, kill)
        with pytest.raises(Killed):
            train(make() if make else agent, env, run=other, **settings)
    result = resume(other, agent=make() if make else None, say=lambda _: None)
    assert result.summary["steps"] >= steps and result.summary["finished"]
    return whole, other


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        ("CartPole-v1", dict(hidden=(16,))),
        ("CartPole-v1", dict(hidden=(16,), num_envs=8, alpha=0.6, noisy="factorised", distributional="c51")),
        ("CartPole-v1", dict(hidden=(16,), vectorization="sync", num_envs=2)),
        ("CartPole-v1", dict(hidden=(16,), vectorization="async", num_envs=2)),
        ("chordate/CartPoleNoVel-v1", dict(hidden=(16,), num_envs=8)),
        ("chordate/Memory8-v0", dict(hidden=(16,), num_envs=8)),
        ("FrozenLake-v1", dict(hidden=(16,), num_envs=3)),
        ("Acrobot-v1", dict(hidden=(16,))),
        ("chordate/DelayedChain-v0", dict(hidden=(16,), num_envs=2)),
        ("ALE/Pong-v5", PIXELS),
        ("ALE/Pong-v5", dict(num_envs=8, alpha=0.5, capacity=3_000, **PIXELS)),
        ("PongNoFrameskip-v4", dict(num_envs=2, max_frames=60, **PIXELS)),
        ("ALE/Breakout-v5", dict(num_envs=2, life_loss=True, **PIXELS)),
        ("ALE/Pong-v5", dict(num_envs=2, obs="ram", hidden=(16,))),
    ],
)
@pytest.mark.parametrize("kill", [150])
def test_a_killed_run_goes_on_to_the_bit(tmp_path, monkeypatch, env, settings, kill):
    assert_same_run(*interrupted(monkeypatch, tmp_path, env, kill, **settings))


# what tabular agents have no use for
RUN = {key: value for key, value in SMALL.items() if key not in load("dqn").Config.__dataclass_fields__}
REPLAYED = RUN | {key: SMALL[key] for key in ("learning_starts", "batch", "train_every", "capacity")}
CUT = dict(backbone="table", bins=(4,), low=(-2.4, -3.0, -0.21, -3.0), high=(2.4, 3.0, 0.21, 3.0))


@pytest.mark.parametrize(
    ("agent", "env", "settings"),
    [
        ("qtable", "FrozenLake-v1", dict(num_envs=1, **REPLAYED)),
        ("qtable", "FrozenLake-v1", dict(num_envs=8, omega=0.6, **REPLAYED)),
        ("qtable", "FrozenLake-v1", dict(num_envs=2, vectorization="sync", **REPLAYED)),
        ("qtable", "CartPole-v1", dict(num_envs=2, **CUT, **REPLAYED)),
        ("sarsa", "FrozenLake-v1", dict(num_envs=1, **RUN)),
        ("sarsa", "FrozenLake-v1", dict(num_envs=8, omega=0.6, **RUN)),
        ("sarsa", "CartPole-v1", dict(num_envs=2, **CUT, **RUN)),
        ("sarsa", "CartPole-v1", dict(num_envs=2, backbone="mlp", hidden=(16,), **RUN)),
        ("sarsa", "chordate/Truncation-v0", dict(num_envs=2, backbone="mlp", hidden=(16,), **RUN)),
        ("sarsa", "ALE/Pong-v5", dict(num_envs=2, **PIXELS, **RUN)),
    ],
)
@pytest.mark.parametrize("kill", [5, 150])
def test_tabular_agents_go_on_to_the_bit(tmp_path, monkeypatch, agent, env, settings, kill):
    assert_same_run(*interrupted(monkeypatch, tmp_path, env, kill, agent=agent, small={}, **settings))
    counters = Run.open(tmp_path / "other").load("latest")["counters"]
    assert counters["updates"] > 0


OFF = dict(sequence=6, burn_in=2, **{key: SMALL[key] for key in SMALL.keys() - RUN.keys()})
PRIOR = dict(alpha=0.6, noisy="factorised", double="twin")


@pytest.mark.parametrize(
    ("make", "env", "settings"),
    [
        (lambda: DQN(backbone=Elman(4), **OFF), "CartPole-v1", dict(num_envs=1)),
        (lambda: DQN(backbone=Elman(4), **OFF, **PRIOR), "CartPole-v1", dict(num_envs=3)),
        (lambda: DQN(backbone=Elman(3), **OFF), "chordate/Memory-v0", dict(num_envs=2)),
        (lambda: SARSA(backbone=Elman(4), rollout=5), "CartPole-v1", dict(num_envs=2)),
        (lambda: SARSA(backbone=Elman(3), rollout=1), "chordate/Memory-v0", dict(num_envs=1)),
        (lambda: SARSA(backbone=Elman(1)), "chordate/Truncation-v0", dict(num_envs=1)),
    ],
)
@pytest.mark.parametrize("kill", [65, 150])
def test_memory_goes_on_to_the_bit(tmp_path, monkeypatch, make, env, settings, kill):
    """What the agent remembers, in mid-episode, is part of a checkpoint."""
    runs = interrupted(monkeypatch, tmp_path, env, kill, make=make, small=RUN, **settings)
    assert_same_run(*runs)
    state = Run.open(runs[1]).load("latest")
    assert state["counters"]["updates"] > 0 and state["loop"]["state.0"].any()


NETS: dict[str, dict[str, object]] = {
    "lstm": dict(width=8, start="normal", encoder="mlp"),
    "gru": dict(width=8, start="learned"),
    "transformer": dict(width=8, heads=2, layers=1, context=6),
    "window": dict(window=3),
}


ACTORS = {
    "reinforce": dict(episodes=3, value_epochs=3),
    "a2c": dict(rollout=10),
    "trpo": dict(rollout=10, batch=5, epochs=2),
    "ppo": dict(rollout=10, batch=5, epochs=2),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("agent", ["dqn", "sarsa", *ACTORS])
def test_every_memory_goes_on_to_the_bit(tmp_path, monkeypatch, agent, net):
    """Killed within a rollout and within episodes; those of the counting environment are truncated."""
    own = {"dqn": OFF, "sarsa": dict(rollout=5), **ACTORS}[agent] | {"num_envs": 2}
    settings = {**RUN, **NETS[net], **own, "backbone": net}
    env_id = "CartPole-v1" if agent in ("dqn", "a2c", "ppo") else "chordate/CountingTruncated-v0"
    assert_same_run(*interrupted(monkeypatch, tmp_path, env_id, 150, agent=agent, small={}, **settings))
    assert "state.0" in Run.open(tmp_path / "other").load("latest")["loop"]


NORMAL = dict(normalize_obs=True, normalize_reward=True)


@pytest.mark.parametrize("agent", ACTORS)
@pytest.mark.parametrize(
    ("env", "settings"),
    [
        ("CartPole-v1", dict(num_envs=1)),
        ("CartPole-v1", dict(num_envs=4, **NORMAL)),
        ("chordate/IdentityBox-v0", dict(num_envs=2, squash=True, spread="state", **NORMAL)),
        ("chordate/IdentityDict-v0", dict(num_envs=2, **NORMAL)),
        ("chordate/IdentityTuple-v0", dict(num_envs=3)),
        (NESTED, dict(num_envs=2, normalize_reward=True)),
    ],
)
def test_policies_go_on_to_the_bit(tmp_path, monkeypatch, agent, env, settings):
    """Checkpoints every 64 steps lie within rollouts and episodes; a decision waits to be taken."""
    register()
    settings = {**ACTORS[agent], **settings, "hidden": (16,)}
    assert_same_run(*interrupted(monkeypatch, tmp_path, env, 150, agent=agent, small=RUN, **settings))
    assert Run.open(tmp_path / "other").load("latest")["counters"]["updates"] > 0


@pytest.mark.parametrize("agent", ["reinforce", "ppo"])
def test_policies_on_pendulum_go_on_to_the_bit(tmp_path, monkeypatch, agent):
    settings = {**ACTORS[agent], **NORMAL, "hidden": (16,), "num_envs": 4, "steps": 900, "log_every": 200}
    settings |= {"episodes": 2} if agent == "reinforce" else {}
    runs = interrupted(monkeypatch, tmp_path, "Pendulum-v1", 850, agent=agent, small=RUN, **settings)
    assert_same_run(*runs)
    assert len(rows(tmp_path / "whole" / "scores.csv")) == 4


@pytest.mark.parametrize(
    ("agent", "kill"), [("ppo", 1), ("ppo", 65), ("trpo", 199), ("reinforce", 63), ("a2c", 127)]
)
def test_policies_at_any_step(tmp_path, monkeypatch, agent, kill):
    settings = {**ACTORS[agent], "hidden": (16,), "num_envs": 1}
    runs = interrupted(monkeypatch, tmp_path, "CartPole-v1", kill, agent=agent, small=RUN, **settings)
    assert_same_run(*runs)


@pytest.mark.parametrize("agent", ["reinforce", "ppo"])
def test_policies_go_on_to_the_bit_after_an_env_died(tmp_path, monkeypatch, agent):
    """The memory cut the lost episode before the checkpoint that the run goes on from."""
    after = Watch.after

    def killing(self, before, now, episodes, update):
        after(self, before, now, episodes, update)
        if now == 104:
            process = self.collector.env.unwrapped.processes[1]
            os.kill(process.pid, signal.SIGKILL)
            process.join()

    monkeypatch.setattr(Watch, "after", killing)
    settings = {**ACTORS[agent], "hidden": (16,), "num_envs": 2, "vectorization": "async", "steps": 180}
    settings |= {"episodes": 8} if agent == "reinforce" else {"rollout": 40, "batch": 16}
    runs = interrupted(monkeypatch, tmp_path, "CartPole-v1", 150, agent=agent, small=RUN, **settings)
    assert_same_run(*runs)
    kept = Run.open(runs[0]).load(128)["replay"]
    lost = 51 - (0 if agent == "reinforce" else 40)
    assert kept["truncated"][lost].tolist() == [False, True] and kept["first"][lost + 1].tolist()[1]


def test_sarsa_whose_envs_cannot_be_rebuilt_chooses_anew(tmp_path, monkeypatch):
    import gymnasium

    gymnasium.register("chordate/Unsteady-v0", lambda: gymnasium.make("CartPole-v1"), nondeterministic=True)
    try:
        settings = {**RUN, **CUT, "steps": 200, "preset": "none", "say": lambda _: None}
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, 150)
            train("sarsa", "chordate/Unsteady-v0", run=tmp_path / "run", **settings)
        assert resume(tmp_path / "run", say=lambda _: None).summary["finished"]
    finally:
        gymnasium.registry.pop("chordate/Unsteady-v0")


@pytest.mark.parametrize("kill", [1, 63, 64, 127, 199])
def test_at_any_step(tmp_path, monkeypatch, kill):
    assert_same_run(*interrupted(monkeypatch, tmp_path, "CartPole-v1", kill, num_envs=1, hidden=(16,)))


def test_a_run_may_be_killed_again_and_again(tmp_path, monkeypatch):
    settings = {**SMALL, "hidden": (16,), "steps": 200, "preset": "none", "say": lambda _: None}
    train("dqn", "CartPole-v1", run=tmp_path / "whole", **settings)
    for kill in (30, 70, 90, 140, 140, 199):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, kill)
            if kill == 30:
                train("dqn", "CartPole-v1", run=tmp_path / "other", **settings)
            resume(tmp_path / "other", say=lambda _: None)
    resume(tmp_path / "other", say=lambda _: None)
    assert_same_run(tmp_path / "whole", tmp_path / "other")
    assert [back["step"] for back in Run.open(tmp_path / "other").origin["resumed"]] == [
        0,
        64,
        64,
        128,
        128,
        192,
    ]


def test_a_signal_leaves_no_trace(tmp_path, monkeypatch):
    settings = {**SMALL, "hidden": (16,), "steps": 200, "preset": "none", "say": lambda _: None}
    train("dqn", "CartPole-v1", run=tmp_path / "whole", **settings)
    after = Watch.after

    def asked(self, before, now, episodes, update):
        after(self, before, now, episodes, update)
        self.stop.signal = 15 if now == 101 else 0

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "after", asked)
        stopped = train("dqn", "CartPole-v1", run=tmp_path / "other", **settings)
    assert stopped.signal == 15 and stopped.summary["steps"] == 101 and not stopped.summary["finished"]
    resume(tmp_path / "other", say=lambda _: None)
    assert_same_run(tmp_path / "whole", tmp_path / "other")


def test_a_finished_run_can_be_made_longer(tmp_path):
    settings = {**SMALL, "hidden": (16,), "preset": "none", "say": lambda _: None}
    train("dqn", "CartPole-v1", run=tmp_path / "whole", steps=240, **settings)
    train("dqn", "CartPole-v1", run=tmp_path / "other", steps=120, **settings)
    with pytest.raises(UserError, match=r"finished at step 120; give --steps more"):
        resume(tmp_path / "other")
    with pytest.raises(UserError, match=r"finished at step 120"):
        resume(tmp_path / "other", steps=100)
    resume(tmp_path / "other", steps=240, say=lambda _: None)
    assert Run.open(tmp_path / "other").config["steps"] == 240
    one, other = (Run.open(tmp_path / name).load(240) for name in ("whole", "other"))
    for group in ("weights", "optimizer", "other"):
        assert all(bool((one[group][name] == other[group][name]).all()) for name in one[group])
    assert rows(tmp_path / "whole" / "scores.csv", "seconds") == rows(
        tmp_path / "other" / "scores.csv", "seconds"
    )


@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, monkeypatch, damage):
    settings = {**SMALL, "hidden": (16,), "steps": 200, "preset": "none", "say": lambda _: None}
    train("dqn", "CartPole-v1", run=tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 150)
        train("dqn", "CartPole-v1", run=tmp_path / "other", **settings)
    file = tmp_path / "other" / "checkpoints" / "128" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    if damage == "flip":
        file.write_bytes(content)
    said = []
    resume(tmp_path / "other", say=said.append)
    assert any("128 is not usable" in line and "weights.safetensors" in line for line in said)
    assert any("128.bad" in line for line in said) and any("resuming at step 64" in line for line in said)
    assert_same_run(tmp_path / "whole", tmp_path / "other")


def test_refuses_what_cannot_go_on(tmp_path, monkeypatch):
    settings = {**SMALL, "hidden": (16,), "steps": 100, "preset": "none", "say": lambda _: None}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 80)
        train("dqn", "CartPole-v1", run=tmp_path / "run", **settings)
    with pytest.raises(UserError, match="no run at"):
        resume(tmp_path / "none")
    config = json.loads((tmp_path / "run" / "config.json").read_text())

    changed = json.loads(json.dumps(config))
    changed["versions"]["torch"] = "1.0"
    (tmp_path / "run" / "config.json").write_text(json.dumps(changed))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"--strict: .* torch was 1\.0, is "):
        resume(tmp_path / "run", strict=True)

    with Run.resume(tmp_path / "run")[0], pytest.raises(UserError, match="being written by another process"):
        resume(tmp_path / "run", say=lambda _: None)

    shutil.copytree(tmp_path / "run", tmp_path / "bad")
    (tmp_path / "bad" / "scores.csv").unlink()
    with pytest.raises(UserError, match=r"cannot continue .*scores\.csv"):
        resume(tmp_path / "bad", say=lambda _: None)

    newest = tmp_path / "run" / "checkpoints" / "64" / "manifest.json"
    newest.write_text(newest.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(UserError, match="format 99, which needs a newer chordate"):
        resume(tmp_path / "run", say=lambda _: None)
    newest.write_text("{")
    with pytest.raises(UserError, match="no usable checkpoint"):
        resume(tmp_path / "run", say=lambda _: None)
    assert before.keys() <= {path for path in (tmp_path / "run").rglob("*")}


def test_changed_versions_are_named(tmp_path, monkeypatch):
    settings = {**SMALL, "hidden": (16,), "steps": 100, "preset": "none", "say": lambda _: None}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 80)
        train("dqn", "CartPole-v1", run=tmp_path / "run", **settings)
    file = tmp_path / "run" / "config.json"
    changed = json.loads(file.read_text())
    changed["machine"]["cpu"] = "Difference Engine"
    file.write_text(json.dumps(changed))
    said = []
    assert resume(tmp_path / "run", say=said.append).summary["finished"]
    assert any(line.startswith("bits may differ") and "cpu was Difference Engine" in line for line in said)


def test_without_its_replay_a_run_refills_it(tmp_path, monkeypatch):
    settings = {**SMALL, "hidden": (16,), "steps": 300, "preset": "none", "say": lambda _: None}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 150)
        train("dqn", "CartPole-v1", run=tmp_path / "run", save_replay=False, **settings)
    assert not (tmp_path / "run" / "checkpoints" / "128" / "replay").exists()
    seen = []
    after = Watch.after

    def watching(self, before, now, episodes, update):
        seen.append((before, update is not None))
        after(self, before, now, episodes, update)

    monkeypatch.setattr(Watch, "after", watching)
    resume(tmp_path / "run", say=lambda _: None)
    learned = [step for step, updated in seen if updated]
    assert seen[0][0] == 128 and 128 + 40 <= learned[0] < 128 + 40 + 4


def ends(path):
    """A run killed in its last evaluation, after everything was saved."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "summary", killed_now)
        train("dqn", "CartPole-v1", run=path, **CARTPOLE)


def killed_now(*_):
    raise Killed


CARTPOLE = {**SMALL, "hidden": (16,), "steps": 100, "preset": "none", "say": lambda _: None}


def test_a_run_killed_in_its_last_evaluation_goes_on(tmp_path):
    train("dqn", "CartPole-v1", run=tmp_path / "whole", **CARTPOLE)
    ends(tmp_path / "other")
    assert len(rows(tmp_path / "other" / "evaluations.csv")) == 1
    assert resume(tmp_path / "other", say=lambda _: None).summary["finished"]
    assert_same_run(tmp_path / "whole", tmp_path / "other")


@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_a_signal_in_an_evaluation_costs_none(tmp_path, monkeypatch, evaluation):
    settings = {**CARTPOLE, "eval_every": 40, "eval_episodes": 2}
    train("dqn", "CartPole-v1", run=tmp_path / "whole", **settings)
    episodes, calls = Evaluator.episodes, iter(range(1, 10))

    def asked(self, *arguments):
        if next(calls) == evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        return episodes(self, *arguments)

    monkeypatch.setattr(Evaluator, "episodes", asked)
    stopped = train("dqn", "CartPole-v1", run=tmp_path / "other", **settings)
    assert stopped.signal == signal.SIGTERM and stopped.summary["steps"] == min(40 * evaluation, 100)
    resume(tmp_path / "other", say=lambda _: None)
    assert len(rows(tmp_path / "other" / "evaluations.csv")) == 3
    assert_same_run(tmp_path / "whole", tmp_path / "other")


def test_a_finished_run_is_not_touched(tmp_path):
    train("dqn", "CartPole-v1", run=tmp_path / "run", **CARTPOLE)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="is finished at step 100; give --steps more"):
        resume(tmp_path / "run", say=lambda _: None)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    resume(tmp_path / "run", steps=150, say=lambda _: None)
    assert [row["step"] for row in rows(tmp_path / "run" / "evaluations.csv")] == ["100", "150"]


def test_a_run_that_is_further_than_asked_for_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 80)
        train("dqn", "CartPole-v1", run=tmp_path / "run", **CARTPOLE)
    with pytest.raises(UserError, match="is at step 64 already; give --steps more"):
        resume(tmp_path / "run", steps=50, say=lambda _: None)
    assert resume(tmp_path / "run", say=lambda _: None).summary["finished"]


def test_a_changed_config_is_named(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 80)
        train("dqn", "CartPole-v1", run=tmp_path / "run", **CARTPOLE)
    file = tmp_path / "run" / "config.json"
    record = json.loads(file.read_text())
    for name, value in {"gamma": 0.5, "seed": 7, "hidden": [17], "num_envs": 3}.items():
        file.write_text(json.dumps({**record, "config": {**record["config"], name: value}}))
        with pytest.raises(UserError, match=rf"does not fit its config.json: {name} was .*, is ") as caught:
            resume(tmp_path / "run", say=lambda _: None)
        assert "\n" not in str(caught.value)
    file.write_text(json.dumps(record))
    assert resume(tmp_path / "run", say=lambda _: None).summary["finished"]


def test_what_a_kill_left_in_the_run_folder_is_cleaned(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 80)
        train("dqn", "CartPole-v1", run=tmp_path / "run", **CARTPOLE)
    (tmp_path / "run" / ".partial-best-1-abc").mkdir()
    (tmp_path / "run" / ".partial-best-1-abc" / "weights.safetensors").write_text("")
    (tmp_path / "run" / ".partial-config.json-1-abc").write_text("{")
    Run.resume(tmp_path / "run")[0].close()
    assert not list((tmp_path / "run").rglob(".partial-*"))


def test_a_full_disk_at_the_end_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "summary.json")

    monkeypatch.setattr(Run, "summary", full)
    with pytest.raises(UserError, match=r"could not be written .*--resume makes it again from step 100"):
        train("dqn", "CartPole-v1", run=tmp_path / "run", **CARTPOLE)
    monkeypatch.undo()
    assert resume(tmp_path / "run", say=lambda _: None).summary["finished"]
    assert len(rows(tmp_path / "run" / "evaluations.csv")) == 1


# -- the parts -------------------------------------------------------------------------------------------------------


def played(collector, rng, steps):
    """What a collector gives for random actions."""
    found = []
    for _ in range(steps):
        collector.send(rng.integers(2, size=collector.env.num_envs))
        step = collector.recv()
        found.append((step, list(collector.episodes)))
    return found


def assert_same_steps(one, other):
    for (a, before), (b, after) in zip(one, other, strict=True):
        assert before == after
        for left, right in zip(a, b, strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    ("env_id", "num_envs", "config", "settings"),
    [
        ("ALE/Pong-v5", 3, envs.EnvConfig(size=16, max_frames=160), {}),
        ("PongNoFrameskip-v4", 1, envs.EnvConfig(size=16, max_frames=100), {}),
        ("ALE/Breakout-v5", 2, envs.EnvConfig(size=16, life_loss=True), {}),
        ("ALE/Pong-v5", 2, envs.EnvConfig(obs="ram", max_frames=160), {}),
        ("CartPole-v1", 3, envs.EnvConfig(), {"vectorization": "sync"}),
        ("CartPole-v1", 3, envs.EnvConfig(), {}),
        ("chordate/CartPoleNoVel-v1", 8, envs.EnvConfig(), {}),
        ("chordate/CartPoleNoVel-v1", 2, envs.EnvConfig(), {}),
        ("chordate/Memory8-v0", 4, envs.EnvConfig(), {}),
        ("Taxi-v4", 2, envs.EnvConfig(), {}),
    ],
)
@pytest.mark.parametrize("every", [15, 10_000])
def test_a_collector_goes_on_in_another_one(env_id, num_envs, config, settings, every):
    """With a short `every` the envs are given fresh seeds on the way, before and after."""
    make = lambda: Collector(  # noqa: E731
        envs.make(env_id, num_envs, 0, config, **settings), 5, resumable=True, every=every
    )
    collector, rng = make(), np.random.default_rng(0)
    played(collector, rng, 90)
    state = {name: np.array(value) for name, value in collector.state_dict().items()}
    fork = np.random.default_rng(1)
    expected = played(collector, fork, 60)
    collector.close()

    other = make()
    played(other, np.random.default_rng(7), 7)  # whatever it did before
    assert other.load_state_dict(state)
    assert_same_steps(played(other, np.random.default_rng(1), 60), expected)
    other.close()


def test_a_fresh_seed_comes_only_after_a_long_past():
    collector = Collector(envs.make("CartPole-v1", 2, 0, vectorization="sync"), 0, resumable=True, every=50)
    rng, lengths = np.random.default_rng(0), []
    for _ in range(300):
        played(collector, rng, 1)
        lengths.append(collector.state_dict()["env.journal_length"].copy())
    lengths = np.array(lengths)
    turned = lengths[1:] < lengths[:-1]
    assert turned.sum() >= 4 and (lengths[:-1][turned] >= 49).all()
    assert lengths.max() < 50 + 200  # an episode of random actions is short


def test_episodes_restart_where_an_env_cannot_be_rebuilt(tmp_path, monkeypatch):
    import gymnasium

    gymnasium.register("chordate/Unsteady-v0", lambda: gymnasium.make("CartPole-v1"), nondeterministic=True)
    try:
        settings = {**SMALL, "hidden": (16,), "steps": 200, "preset": "none", "num_envs": 2}
        said = []
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, 150)
            train("dqn", "chordate/Unsteady-v0", run=tmp_path / "run", say=said.append, **settings)
        assert any("its episodes restart when the run is resumed" in line for line in said)
        state = Run.open(tmp_path / "run").load(128)
        result = resume(tmp_path / "run", say=said.append)
        assert result.summary["finished"]
        flags = Run.open(tmp_path / "run").load(200)["replay"]["flag"]
        newest = [lane * 150 + (int(count) - 1) % 150 for lane, count in enumerate(state["replay"]["count"])]
        # where an episode was under way, the step whose outcome nobody saw is no start
        was = state["replay"]["flag"]
        assert all(flags[slot] == (was[slot] or 4) for slot in newest)
        assert any(was[slot] == 0 and flags[slot - 1] == 2 for slot in newest)
    finally:
        gymnasium.registry.pop("chordate/Unsteady-v0")
