"""The benchmark compares the same work: the peer's settings follow ours, and the counts are checked."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents import A2C, PPO, TRPO, load
from agents.watch import WARM_UPDATES
from backbones import BACKBONES
from backbones.compute import Compute
from tests.bench import parts
from tests.bench.works import WORDS, WORKS

pending = pytest.mark.skipif("lstm" not in BACKBONES, reason="the memory backbones are not there yet")
ON_POLICY = [
    pytest.param(name, marks=pending if work.memory else ())
    for name, work in WORKS.items()
    if work.on_policy and work.peers != ("plain",)
]
COSTS = [name for name, work in WORKS.items() if work.peers == ("plain",) and work.memory]


@pytest.mark.parametrize(
    "name, updates",
    [
        ("dqn-pong-1", 1 / 4),
        ("dqn-pong-8", 1 / 4),
        ("dqn-cartpole", 128 / 256),
        ("ppo-pong", 4 / 256),
        ("a2c-pong", 1 / (16 * 5)),
        ("ppo-cartpole", 4 / 256),
        ("a2c-cartpole", 1 / (8 * 5)),
        ("trpo-cartpole", 10 / 128),
        ("ppo-halfcheetah", 10 / 64),
        pytest.param("ppo-lstm-cartpole", 20 / 256, marks=pending),
        pytest.param("ppo-lstm-pong", 4 / 256, marks=pending),
    ],
)
def test_updates_per_step(name, updates):
    assert WORKS[name].updates_per_step == pytest.approx(updates, rel=1e-4)


@pytest.mark.parametrize(
    "name, steps, shared",
    [
        ("ppo-pong", (8, 128), True),
        ("a2c-pong", (16, 5), True),
        ("ppo-cartpole", (8, 256), False),
        ("a2c-cartpole", (8, 5), False),
        ("trpo-cartpole", (2, 512), False),
        ("ppo-halfcheetah", (8, 256), False),
    ],
)
def test_the_work_is_that_of_its_name(name, steps, shared):
    work = WORKS[name]
    found = work.peer()
    assert (work.num_envs, found["n_steps"]) == steps
    net = found["policy_kwargs"]
    if shared:
        assert net == {"share_features_extractor": True}
    else:
        assert net == {"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": torch.nn.Tanh}


@pending
@pytest.mark.parametrize(
    "name, policy, width, shared",
    [("ppo-lstm-cartpole", "MlpLstmPolicy", 64, False), ("ppo-lstm-pong", "CnnLstmPolicy", 256, True)],
)
def test_both_sides_have_cells_of_one_size(name, policy, width, shared):
    work = WORKS[name]
    found, net = work.peer(), work.peer()["policy_kwargs"]
    assert (work.rival, *work.rival_agent) == ("sb3_contrib", "RecurrentPPO", policy)
    assert (work.num_envs, found["n_steps"], found["batch_size"]) == (8, 128, 256)
    assert net["lstm_hidden_size"] == width == work.whole["width"]
    assert net["shared_lstm"] is shared is not work.whole["separate"]
    assert net["enable_critic_lstm"] is not shared
    assert not work.image or work.whole["stack"] == 1


@pytest.mark.parametrize("name", COSTS)
def test_the_cost_of_a_memory_is_measured_against_its_encoder_alone(name):
    work = WORKS[name]
    assert work.plain["backbone"] == work.settings["encoder"] and "encoder" not in work.plain
    differ = {key for key in work.settings if work.settings[key] != work.plain.get(key)}
    assert differ == {"backbone", "encoder", "width"} and work.plain.keys() < work.settings.keys()
    assert replace(work, settings=work.plain).updates_per_step > 0


@pytest.mark.parametrize("name", ON_POLICY)
def test_every_translated_knob_reaches_the_peer(name):
    work, before = WORKS[name], WORKS[name].peer()
    for ours, theirs in WORDS[work.agent].items():
        value = 2 * (work.whole[ours] or 1) if ours not in ("lam", "gamma", "shrink") else 0.5
        after = replace(work, settings=work.settings | {ours: value}).peer()
        assert after[theirs] == value
        assert {key for key in after if after[key] != before[key]} == {theirs}


@pytest.mark.parametrize("name", ON_POLICY)
def test_nothing_without_a_counterpart_is_on(name):
    s = WORKS[name].whole
    assert (
        not s.get("lr_end") and not s.get("clip_end") and not s["normalize_obs"] and not s["normalize_reward"]
    )
    assert s["orthogonal"] and not s["squash"] and s["spread"] == "free" and s["log_std"] == 0
    assert s["separate"] == (not WORKS[name].image)  # as the peers' defaults
    assert s.get("optimizer", "rmsprop") == "rmsprop" and s.get("adam_eps", 1e-5) == 1e-5


def test_other_work_is_refused():
    work = WORKS["ppo-cartpole"]
    work.compare("w", "ours", {"steps": 20_480, "updates": 320})
    work.compare("w", "peer", {"steps": 20_488, "updates": 320})  # stops one step into the next rollout
    for updates in (4 * 10, 320 - 32, 320 + 32):  # epochs counted instead of steps; a rollout less or more
        with pytest.raises(RuntimeError, match="other work"):
            work.compare("w", "peer", {"steps": 20_480, "updates": updates})


def test_a_run_is_timed_from_warm_to_an_end_of_an_update(monkeypatch):
    class Sixteen:  # updates at a time, as ppo's
        updates = 0

        def update(self, batch, steps=1):
            self.updates += 16

    now, signals = [0.0], []
    monkeypatch.setattr(parts.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(parts.signal, "raise_signal", lambda number: signals.append(now[0]))
    agent = parts.timed(Sixteen, 10.0)()
    for second in range(40):
        now[0] = second * 3.0
        agent.update(None)
    warm = (WARM_UPDATES // 16) * 3.0
    assert signals == [warm + 12.0]  # the first end of an update that is 10 s later


@pytest.mark.parametrize(
    "agent, knobs, expected",
    [
        (PPO, dict(rollout=8, batch=4, epochs=3), [("network", 4, 3)]),
        (A2C, dict(rollout=8), [("network", 16, 1)]),
        (TRPO, dict(rollout=8, batch=4, epochs=3, cg_steps=5), [("policy", 16, 7), ("critic", 4, 3)]),
    ],
)
def test_a_pass_reaches_all_that_an_update_changes(agent, knobs, expected):
    made = agent(backbone="mlp", net={"hidden": (8,)}, **knobs)
    box, compute = spaces.Box(-1, 1, (3,), np.float32), Compute("cpu", "fp32", 1, False)
    made.build(box, spaces.Discrete(2), compute, np.random.SeedSequence(0))
    found, reached = parts.passes(made.name, made.config, 2), set()
    assert found == expected
    for name, size, _ in found:
        one = parts.Pass(made, name, np.ones((size, 3), np.float32))
        gradients = one()
        assert [g.shape for g in gradients] == [weight.shape for weight in one.weights]
        assert all(bool(g.any()) for g in gradients)
        assert not reached & set(map(id, one.weights))
        reached |= set(map(id, one.weights))
    assert reached == set(map(id, made.model.parameters()))


def test_convolutions_that_lie_channels_last_start_orthogonal():
    made = A2C(backbone="cnn", net={"net": "nature", "features": 8}, separate=False)
    image, compute = spaces.Box(0, 255, (4, 84, 84), np.uint8), Compute("cpu", "fp32", 1, False)
    made.build(image, spaces.Discrete(6), compute, np.random.SeedSequence(0))
    for weight in (p.detach().flatten(1) for p in made.model.backbone.trunk.parameters() if p.ndim == 4):
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(len(weight)))


def test_every_work_names_an_agent_that_exists():
    for work in WORKS.values():
        assert load(work.agent).name == work.agent
