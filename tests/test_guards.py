"""Guards: what is not finite is not learned, and an environment that dies or hangs is started anew."""

from __future__ import annotations

import math
import os
import signal
import time

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents import train
from agents.optimizers import Adam
from agents.watch import Watch
from envs import Collector
from envs.workers import WorkerFault
from replay import Ring
from runs.config import RunFailed
from tests.test_resume import SMALL
from tests.tools import batch_of, built

# -- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "gradient"), [(1.0, math.nan), (1.0, math.inf), (math.nan, 1.0), (math.inf, 1.0)]
)
def test_adam_skips_what_is_not_finite(loss: float, gradient: float) -> None:
    weights = [torch.ones(3), torch.ones(2, 2)]
    adam = Adam(weights, lr=0.1, eps=1e-8, max_norm=10.0)
    good = [torch.full((3,), 0.5), torch.full((2, 2), -0.5)]
    adam.begin()
    adam.step(good, torch.tensor(1.0))
    before = [tensor.clone() for tensor in (*weights, *adam.first, *adam.second)]
    for count in (1, 2):
        adam.begin()
        adam.step([torch.full((3,), 0.5), torch.tensor([[gradient, 1.0], [1.0, 1.0]])], torch.tensor(loss))
        for old, new in zip(before, (*weights, *adam.first, *adam.second), strict=True):
            assert torch.equal(old, new)
        assert (adam.skipped.item(), adam.in_row.item()) == (count, count)
    adam.begin()
    adam.step(good, torch.tensor(1.0))
    assert (adam.skipped.item(), adam.in_row.item()) == (2, 0)
    assert not torch.equal(weights[0], before[0])


@pytest.mark.parametrize("distributional", ["off", "c51", "quantile"])
def test_an_update_with_a_broken_sample_changes_nothing(distributional: str) -> None:
    agent, batch = built(distributional=distributional, target_every=1000), batch_of(8)
    agent.update(batch)
    before = {name: tensor.clone() for name, tensor in agent.online.state_dict().items()}
    broken = batch._replace(reward=torch.where(torch.arange(8) == 3, math.nan, batch.reward))
    update = agent.update(broken)
    assert update.metrics["train/skipped"].item() == 1 and agent.skipped_in_row == 1
    for name, tensor in agent.online.state_dict().items():
        assert torch.equal(tensor, before[name])
    agent.update(batch)
    assert agent.skipped_in_row == 1 and agent._optimizers[0].in_row.item() == 0


def test_a_run_that_diverges_ends_with_a_named_error(tmp_path, monkeypatch) -> None:
    from agents.dqn import DQN

    sound, calls = DQN.update, []

    def poisoned(self, batch, steps=1):
        calls.append(1)
        if len(calls) > 20:
            batch = batch._replace(reward=batch.reward * math.nan)
        return sound(self, batch, steps)

    monkeypatch.setattr(DQN, "update", poisoned)
    settings = {**SMALL, "hidden": (16,), "steps": 400, "preset": "none", "max_skipped": 10}
    with pytest.raises(RunFailed, match=r"not finite in \d+ updates in a row"):
        train("dqn", "CartPole-v1", run=tmp_path / "run", say=lambda _: None, **settings)
    from runs import Run

    saved = Run.open(tmp_path / "run").load("latest")
    assert all(torch.isfinite(tensor).all() for tensor in saved["weights"].values())
    with monkeypatch.context() as patch:
        patch.setattr(DQN, "update", sound)
        from agents import resume

        assert resume(tmp_path / "run", say=lambda _: None).summary["finished"]


# -- environments ----------------------------------------------------------------------------------------------------


class Faulty(gymnasium.Env):
    """Counts its steps; the one whose counter file is there dies, raises or hangs at step 5 of its first episode."""

    observation_space = spaces.Box(0, 1_000, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, how: str, marker: str) -> None:
        self.how, self.marker, self.count, self.tag = how, marker, 0, 0.0

    def _obs(self):
        return np.array([self.count, self.tag], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.tag = 0, float(self.np_random.integers(1_000))
        return self._obs(), {}

    def step(self, action):
        self.count += 1
        if self.count == 5:
            try:
                os.remove(self.marker)  # one of the copies gets it
            except FileNotFoundError:
                pass
            else:
                if self.how == "raise":
                    raise ValueError("the sky fell")
                if self.how == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
        return self._obs(), 1.0, False, self.count == 12, {}


def faulty(how, marker, num_envs=3):
    """A vector of them in processes, one of which will fail once."""
    from envs.workers import Workers

    marker.write_text("")
    return Workers([lambda: Faulty(how, str(marker))] * num_envs, timeout=2.0)


@pytest.mark.filterwarnings("ignore:.*ERROR")
@pytest.mark.parametrize("how", ["raise", "die", "hang"])
def test_a_failed_environment_starts_anew_and_the_others_go_on(tmp_path, how) -> None:
    env = faulty(how, tmp_path / "marker")
    collector = Collector(env, 0, resumable=True)
    tags, episodes, steps = [collector.obs[:, 1].copy()], [], []
    for _ in range(11):
        collector.send(np.zeros(3, np.int64))
        steps.append(collector.recv())
        tags.append(collector.obs[:, 1].copy())
        episodes += collector.episodes
    ((at, reason),) = collector.faults
    assert (
        at == 4
        and {"raise": "the sky fell", "die": "process died", "hang": "no answer in 2 s"}[how] in reason
    )
    fifth = steps[4]
    lost = int(np.flatnonzero(fifth.first)[0])
    assert fifth.first.sum() == 1
    for step in steps:  # every stored pair is a true one
        assert (step.next_obs[:, 0] == step.obs[:, 0] + 1).all()
        assert (step.next_obs[:, 1] == step.obs[:, 1]).all()
    others = [i for i in range(3) if i != lost]
    assert all((tag[others] == tags[0][others]).all() for tag in tags)
    assert tags[5][lost] != tags[0][lost]  # a new seed
    assert (steps[-1].next_obs[others, 0] == 11).all() and steps[-1].next_obs[lost, 0] == 7
    collector.send(np.zeros(3, np.int64))
    collector.recv()
    assert sorted(e.env for e in collector.episodes) == others and episodes == []

    state = {name: np.array(value) for name, value in collector.state_dict().items()}
    other = Collector(faulty("raise", tmp_path / "marker"), 0, resumable=True)
    (tmp_path / "marker").unlink()
    assert other.load_state_dict(state)
    collector.close()
    other.close()


@pytest.mark.filterwarnings("ignore:.*ERROR")
def test_an_environment_that_fails_for_ever_ends_the_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("envs.collect.MOST_FAULTS", 3)
    from envs.workers import Workers

    class Hopeless(Faulty):
        def step(self, action):
            raise ValueError("never")

    collector = Collector(Workers([lambda: Hopeless("raise", "")], timeout=2.0), 0, resumable=True)
    collector.send(np.zeros(1, np.int64))
    with pytest.raises(
        RunFailed, match=r"3 failures in 1,?000 steps, the last one: env 0 failed: ValueError: never"
    ):
        collector.recv()
    collector.env.close()


def test_a_fault_names_its_environment() -> None:
    fault = WorkerFault(np.array([False, True]), "its process died")
    assert str(fault) == "env 1 failed: its process died"


def test_the_replay_drops_the_step_whose_outcome_was_never_seen() -> None:
    space = spaces.Box(0, 1_000, (2,), np.float32)
    ring = Ring(60, 1, space, spaces.Discrete(2), rng=np.random.default_rng(0))

    def step(count, first=False, ended=False):
        obs = np.array([[count, 0]], np.float32)
        flag, no = np.array([ended]), np.zeros(1, bool)
        return [
            obs,
            np.zeros(1, np.int64),
            np.ones(1, np.float32),
            obs + np.float32([[1, 0]]),
            no,
            flag,
            np.array([first]),
        ]

    from replay import Transition

    for count in range(4):
        ring.add(Transition(*step(count, first=count == 0)))
    for count in range(10, 16):  # it broke: 3 is the last observation seen
        ring.add(Transition(*step(count, first=count == 10)))
    batch = ring.sample(400)
    seen = {
        (int(a[0]), int(b[0]), float(d))
        for a, b, d in zip(batch.obs, batch.next_obs, batch.discount, strict=True)
    }
    gamma = float(np.float32(0.99))
    assert seen == {(c, c + 1, gamma) for c in (0, 1, 2, 10, 11, 12, 13, 14)}
    # with three-step returns, too, nothing crosses the break
    ring = Ring(60, 1, space, spaces.Discrete(2), n_step=3, rng=np.random.default_rng(0))
    for count in [*range(4), *range(10, 18)]:
        ring.add(Transition(*step(count, first=count in (0, 10))))
    batch = ring.sample(400)
    seen = {
        (int(a[0]), int(b[0]), float(r))
        for a, b, r in zip(batch.obs, batch.next_obs, batch.reward, strict=True)
    }
    assert {(a, b) for a, b, _ in seen if a < 10} == {(0, 3), (1, 3), (2, 3)}
    assert all(b - a == 3 for a, b, _ in seen if a >= 10)


def test_a_run_survives_the_death_of_an_environment(tmp_path, monkeypatch) -> None:
    settings = {
        **SMALL,
        "hidden": (16,),
        "steps": 300,
        "preset": "none",
        "num_envs": 2,
        "vectorization": "async",
    }
    after, killed = Watch.after, []

    def killing(self, before, now, episodes, update):
        after(self, before, now, episodes, update)
        if now == 100:
            process = self.collector.env.unwrapped.processes[1]
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(Watch, "after", killing)
    result = train("dqn", "CartPole-v1", run=tmp_path / "run", say=lambda _: None, **settings)
    assert killed and result.summary["finished"] and result.summary["env_faults"] == 1


@pytest.mark.filterwarnings("ignore:.*ERROR")
@pytest.mark.parametrize("at", ["rebuild", "seeded reset", "resume"])
def test_a_fault_outside_of_a_step_is_mended_too(tmp_path, monkeypatch, at) -> None:
    """A second fault while the first is mended, one in a seeded reset between episodes, and one while going back."""
    from envs import journal

    marker = tmp_path / "marker"
    collector = Collector(
        faulty("raise", marker), 0, resumable=True, every=10 if at == "seeded reset" else 1_000
    )
    if at != "rebuild":
        marker.unlink()
    sound, calls = journal.restart, []

    def failing(env, rows, seeds):
        calls.append(1)
        if len(calls) == 1:
            raise WorkerFault(np.array([False, True, False]), "its process died")
        return sound(env, rows, seeds)

    if at == "resume":
        for _ in range(3):
            collector.send(np.zeros(3, np.int64))
            collector.recv()
        state = {name: np.array(value) for name, value in collector.state_dict().items()}
        monkeypatch.setattr(journal, "restart", failing)
        assert not collector.load_state_dict(state) and collector.first.all()
    monkeypatch.setattr(journal, "restart", failing)
    steps = []
    for _ in range(16):
        collector.send(np.zeros(3, np.int64))
        steps.append(collector.recv())
    assert calls and len(collector.faults) == {"rebuild": 2, "seeded reset": 1, "resume": 1}[at]
    for before, step in zip([None, *steps], steps, strict=False):
        assert (step.next_obs[:, 0] == step.obs[:, 0] + 1).all()  # true pairs
        if before is not None:  # and nobody goes back
            goes_on = ~step.first
            assert (step.obs[goes_on] == before.next_obs[goes_on]).all()
    collector.close()


def test_a_replay_of_broken_steps_only_is_empty() -> None:
    from replay import Transition

    space = spaces.Box(0, 1, (2,), np.float32)
    ring = Ring(60, 1, space, spaces.Discrete(2), rng=np.random.default_rng(0))
    obs, no, yes = np.zeros((1, 2), np.float32), np.zeros(1, bool), np.ones(1, bool)
    for _ in range(3):  # each breaks in its first step
        ring.add(Transition(obs, np.zeros(1, np.int64), np.ones(1, np.float32), obs, no, no, yes))
    assert len(ring) == 0
    with pytest.raises(ValueError, match="nothing to sample"):
        ring.sample(4)


def test_a_long_series_between_two_rows_of_the_log_ends_the_run(tmp_path, monkeypatch) -> None:
    from agents.dqn import DQN

    sound, calls = DQN.update, []

    def poisoned(self, batch, steps=1):
        calls.append(1)
        return sound(
            self, batch._replace(reward=batch.reward * math.nan) if 5 < len(calls) < 20 else batch, steps
        )

    monkeypatch.setattr(DQN, "update", poisoned)
    settings = {**SMALL, "hidden": (16,), "steps": 400, "preset": "none", "max_skipped": 10, "log_every": 200}
    settings["checkpoint_every"] = 0
    with pytest.raises(RunFailed, match="14 updates in a row"):
        train("dqn", "CartPole-v1", run=tmp_path / "run", say=lambda _: None, **settings)
