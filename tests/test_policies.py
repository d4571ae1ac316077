"""The policy-gradient agents end to end: what they learn in seconds, that every knob is live, same seed same bits."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents import load
from agents.actor import Inputs, PolicyAgent
from agents.evaluate import Evaluator
from backbones.compute import Compute
from envs import EnvConfig
from replay import Transition
from runs import UserError
from runs.config import RunFailed
from tests.tools import CPU, PAYS, VECTOR, acted, digest

AGENTS = ("reinforce", "a2c", "trpo", "ppo")
QUICK: dict[str, dict[str, Any]] = {
    "reinforce": dict(episodes=16, lr=2e-2, value_lr=1e-2, value_epochs=5),
    "a2c": dict(lr=1e-2, rollout=4, optimizer="adam"),
    "trpo": dict(rollout=16, batch=64, delta=0.05, lr=1e-2, epochs=4),
    "ppo": dict(rollout=16, batch=64, epochs=4, lr=1e-2),
}
PROBES = {"reinforce": dict(episodes=48), "a2c": dict(lr=2e-2, rollout=2)}  # their episodes last a step
every_agent = pytest.mark.parametrize("name", AGENTS)


def greedy_return(agent: PolicyAgent, env_id: str) -> float:
    evaluator = Evaluator(env_id, EnvConfig(), 16, seed=9)
    found = float(np.mean([episode.return_ for episode in evaluator.episodes(agent)]))
    evaluator.close()
    return found


def value(agent: PolicyAgent, seen: float) -> float:
    return float(agent.values(np.array([[seen]], np.float32))[0, 0])


# -- learning --------------------------------------------------------------------------------------------------------


@every_agent
def test_probe_values(name: str) -> None:
    knobs = {**QUICK[name], **PROBES.get(name, {}), "gamma": 0.9}
    agent, _ = acted(name, "chordate/ProbeConstant-v0", 3_000, num_envs=16, **knobs)
    assert value(agent, 0.0) == pytest.approx(1.0, abs=0.1)
    agent, _ = acted(name, "chordate/ProbePredict-v0", 3_000, num_envs=16, **knobs)
    assert (value(agent, -1.0), value(agent, 1.0)) == pytest.approx((-1.0, 1.0), abs=0.1)
    agent, _ = acted(name, "chordate/ProbeDelay-v0", 5_000, num_envs=16, **knobs)
    assert (value(agent, 0.0), value(agent, 1.0)) == pytest.approx((0.9, 1.0), abs=0.1)


@every_agent
@pytest.mark.parametrize("kind", ["ProbeAction", "ProbeMatch"])
def test_probe_policies(name: str, kind: str) -> None:
    env_id = f"chordate/{kind}-v0"
    knobs = {**QUICK[name], **PROBES.get(name, {}), "gamma": 0.9}
    agent, watch = acted(name, env_id, 4_000, num_envs=16, **knobs)
    assert greedy_return(agent, env_id) == 1.0
    assert np.mean([r for _, r, _ in watch.episodes[-100:]]) > 0.8  # and it is no longer drawing at random


@every_agent
@pytest.mark.parametrize(
    ("kind", "least"),
    [
        ("", 9.5),
        ("Box", -1.0),  # the middle of the box, whatever is shown: -3.3
        ("MultiDiscrete", 9.0),
        pytest.param("MultiBinary", 9.0, marks=pytest.mark.slow),
        ("Dict", 4.5),  # of 5
        pytest.param("Tuple", 9.0, marks=pytest.mark.slow),
    ],
)
def test_identity_in_every_action_space(name: str, kind: str, least: float) -> None:
    env_id = f"chordate/Identity{kind}-v0"
    agent, _ = acted(name, env_id, 10_000, num_envs=16, gamma=0.0, **QUICK[name])
    assert greedy_return(agent, env_id) > least


@every_agent
def test_squashed_actions_learn_too(name: str) -> None:
    env_id = "chordate/IdentityBox-v0"
    knobs = {**QUICK[name], "gamma": 0.0, "squash": True, "spread": "state"}
    agent, _ = acted(name, env_id, 10_000, num_envs=16, **knobs)
    assert greedy_return(agent, env_id) > -1.0


@every_agent
@pytest.mark.parametrize("kind", ["EndlessReward", "Truncation", "Termination"])
def test_truncation_bootstraps_and_termination_does_not(name: str, kind: str) -> None:
    """Reward 1 for ever is worth 1 / (1 - 0.8) = 5; before its last step a clock that terminates is worth 1."""
    # biases that start at 0 make a small net on one number linear
    knobs = {**QUICK[name], "gamma": 0.8, "net": {"hidden": (64,)}, "orthogonal": False}
    if name == "reinforce":  # V grows by a share of itself with each update
        knobs |= {"episodes": 16, "value_epochs": 15}
    agent, _ = acted(name, f"chordate/{kind}-v0", 20_000 if name == "a2c" else 8_000, num_envs=16, **knobs)
    if kind == "EndlessReward":
        assert value(agent, 0.0) == pytest.approx(5.0, rel=0.05)
    elif kind == "Truncation":
        assert [value(agent, x) for x in (0.0, 0.5, 0.9)] == pytest.approx([5.0] * 3, rel=0.1)
    else:
        left = [sum(0.8**k for k in range(n)) for n in (10, 5, 1)]
        assert [value(agent, x) for x in (0.0, 0.5, 0.9)] == pytest.approx(left, rel=0.2)


@pytest.mark.parametrize("name", ["a2c", "trpo", "ppo"])
def test_values_of_a_whole_rollout_are_those_of_each_step(name: str) -> None:
    agent = load(name)(net={"hidden": (8,)}, **{**BASE[name], "rollout": 4})
    agent.build(VECTOR, spaces.Discrete(2), CPU, np.random.SeedSequence(0), print)
    rng = np.random.default_rng(0)
    obs, no = rng.standard_normal((5, 3, 3), np.float32), np.zeros(3, bool)
    decision, memory = agent.act(obs[0], no, (), 0), agent.memory(obs[0])
    for t in range(4):
        assert decision.value is None
        memory.add(
            Transition(obs[t], decision.action, np.zeros(3, np.float32), obs[t + 1], no, no, no), decision
        )
        decision = agent.act(obs[t + 1], no, (), 0)
    found = agent.samples(memory.take(obs[4], decision)).value
    with torch.no_grad():  # not in numpy, as few observations are
        expected = agent.model.values_of(Inputs(torch.from_numpy(obs[:4]).flatten(0, 1))).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_few_observations_in_numpy_say_what_torch_says(separate: bool, normalize: bool) -> None:
    agent = load("ppo")(net={"hidden": (8,)}, separate=separate, normalize_obs=normalize)
    agent.build(VECTOR, spaces.Discrete(2), CPU, np.random.SeedSequence(0), print)
    obs = np.random.default_rng(0).standard_normal((5, 3), np.float32) * 4
    if normalize:
        agent.model.normalizer.learn(obs[None])
    quick, shown = agent.model.quick(), Inputs(torch.from_numpy(obs))
    with torch.no_grad():
        expected = [part.numpy() for part in agent.model(shown)]
    for found in (quick.forward(obs), (quick.parameters_of(obs), quick.values_of(obs))):
        for each, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(each, other, atol=2e-6)


def test_a_policy_in_bf16_acts_on_observations_as_they_are_normalised_now() -> None:
    agent, compute = (
        load("ppo")(net={"activation": "gelu"}, normalize_obs=True),
        Compute("cpu", "bf16", 1, False),
    )
    agent.build(VECTOR, spaces.Discrete(2), compute, np.random.SeedSequence(0), print)
    obs = np.random.default_rng(0).standard_normal((5, 3), np.float32) * 4 + 9
    agent.model.normalizer.learn(obs[None])
    with torch.no_grad():
        expected = agent.model.values_of(Inputs(torch.from_numpy(obs))).numpy()
    np.testing.assert_allclose(agent.values(obs)[:, 0], expected, atol=0.03)


# -- knobs and seeds -------------------------------------------------------------------------------------------------

# one other value for each knob; a new knob without an entry fails the test below
OTHER: dict[str, Any] = dict(
    lr=3e-3, lr_end=1e-4, lr_steps=100, gamma=0.5, max_grad_norm=0.01, separate=False, orthogonal=False,
    spread="state", log_std=-1.0, squash=True, normalize_obs=True, normalize_reward=True, clip_reward=True,
    rollout=32, epochs=2, batch=32, lam=0.5, clip=0.05, clip_end=0.3, clip_steps=100, clip_value=0.01, target_kl=1e-5,
    entropy=0.1, value_weight=2.0, adam_eps=0.1, optimizer="rmsprop", optimizer_eps=0.1, delta=0.05, damping=1.0,
    cg_steps=2, shrink=0.2, tries=1, episodes=2, credit="whole", baseline="none", baseline_rate=0.9, value_epochs=2,
    value_lr=1e-4, sequence=4,
)  # fmt: skip
BASE: dict[str, dict[str, Any]] = {
    "reinforce": dict(episodes=4),
    "a2c": dict(rollout=16, optimizer="adam"),
    "trpo": dict(rollout=16, batch=16),
    "ppo": dict(rollout=16, batch=16),
}
# the part that a knob belongs to
PARTS = {
    "clip_end": {"clip_end": 0.05, "clip_steps": 200},
    "clip_steps": {"clip_end": 0.05, "clip_steps": 200},
    "shrink": {"delta": 5.0},  # so far that the line search must try again
    "tries": {"delta": 5.0},
    "sequence": {"backbone": "lstm", "net": {"width": 8}},
    "baseline_rate": {"baseline": "average", "normalize_advantage": False, "episodes": 1},
}
KNOBS = [(name, field.name) for name in AGENTS for field in fields(load(name).Config)]


@pytest.mark.parametrize(("name", "knob"), KNOBS)
def test_every_knob_is_live(name: str, knob: str) -> None:
    common: dict[str, Any] = dict(lr=1e-2, lr_end=1e-3, lr_steps=200, net={"hidden": (8,)})
    base = {**common, **BASE[name], **PARTS.get(knob, {})}
    config = load(name)(**base).config
    default = getattr(config, knob)
    other = OTHER[knob] if knob != "normalize_advantage" else ("off" if name == "ppo" else not default)
    assert other != default
    if knob == "separate" and name in ("reinforce", "trpo"):
        with pytest.raises(UserError, match=f"--no-separate is not for {name}"):
            load(name)(separate=False)
        return
    env_id = "chordate/IdentityBox-v0" if knob in ("spread", "log_std", "squash") else PAYS

    def run(**knobs: Any) -> str:
        return digest(acted(name, env_id, 260, num_envs=2, **{**base, **knobs})[0])

    assert run() != run(**{knob: other})


@every_agent
def test_same_seed_same_bits_another_seed_others(name: str) -> None:
    found = []
    for seed in (1, 1, 2):
        agent, watch = acted(name, "CartPole-v1", 400, seed=seed, num_envs=2, **BASE[name])
        found.append((digest(agent), watch.updates, watch.episodes))
    assert found[0] == found[1] and len(found[0][1]) > 2
    assert all(one != other for one, other in zip(found[0], found[2], strict=True))


@every_agent
def test_evaluation_in_between_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = {**BASE[name], "normalize_obs": True, "normalize_reward": True}
    plain, log = acted(name, "CartPole-v1", 400, num_envs=2, **knobs)
    evaluator, agents = Evaluator("CartPole-v1", EnvConfig(), episodes=3, seed=9), []
    prepare = load(name).prepare
    monkeypatch.setattr(load(name), "prepare", lambda self, say: agents.append(self) or prepare(self, say))

    def between(step: int) -> None:
        if step % 50 == 0:
            evaluator.episodes(agents[0])

    watched, other = acted(name, "CartPole-v1", 400, num_envs=2, between=between, **knobs)
    evaluator.close()
    assert agents and digest(plain) == digest(watched) and log.episodes == other.episodes


@every_agent
@pytest.mark.parametrize("env_id", ["CartPole-v1", "chordate/IdentityDict-v0"])
def test_state_dict_round_trip_is_exact(name: str, env_id: str) -> None:
    knobs = {**BASE[name], "normalize_obs": True, "normalize_reward": True}
    agent, _ = acted(name, env_id, 200, num_envs=2, **knobs)
    other, _ = acted(name, env_id, 60, num_envs=2, seed=4, **knobs)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    one, two = agent.state_dict(), other.state_dict()
    assert one["counters"] == two["counters"] and one.keys() == two.keys()
    for group in one.keys() - {"counters"}:
        assert one[group].keys() == two[group].keys()
        assert all(torch.equal(one[group][key], two[group][key]) for key in one[group])
    obs, first = np.ones((2, *agent.model.backbone.encoder.space.shape), np.float32), np.zeros(2, bool)  # type: ignore[union-attr]
    for left, right in zip(agent.act(obs, first, (), 0), other.act(obs, first, (), 0), strict=True):
        assert str(left) == str(right)


# -- what breaks -----------------------------------------------------------------------------------------------------


@every_agent
@pytest.mark.parametrize("layer", ["backbone.layers.0.bias", "policy.linear.weight"])
@pytest.mark.parametrize("count", [1, 64])
def test_nan_in_the_policy_names_the_layer(name: str, layer: str, count: int) -> None:
    agent = load(name)(net={"hidden": (8,)})
    agent.build(VECTOR, spaces.Discrete(3), CPU, np.random.SeedSequence(0))
    with torch.no_grad():
        dict(agent.model.named_parameters())[layer].view(-1)[1] = torch.nan
    with pytest.raises(RunFailed, match=f"not finite: {layer} holds NaN"):
        agent.act(np.zeros((count, 3), np.float32), np.ones(count, bool), (), 0)


@every_agent
def test_a_broken_reward_changes_no_weight(name: str) -> None:
    agent, _ = acted(name, "CartPole-v1", 100, num_envs=2, **BASE[name])
    before, memory = digest(agent), agent.memory(np.zeros((2, 4), np.float32))
    obs, no = np.zeros((2, 4), np.float32), np.zeros(2, bool)
    while not memory.full:
        decision = agent.act(obs, no, (), 0)
        reward = np.full(2, np.nan, np.float32)

        memory.add(Transition(obs, decision.action, reward, obs, ~no, no, no), decision)
    agent.update(memory.take(obs, agent.act(obs, no, (), 0)))
    assert digest(agent) == before and agent.skipped_in_row > 0


@every_agent
def test_one_sample_cannot_be_normalised_and_moves_no_policy(name: str) -> None:
    """Its spread is not defined: the advantage is its distance from the mean, 0, and no NaN."""
    if name in ("trpo", "ppo"):
        pytest.skip("at least two samples in a minibatch")
    one = dict(episodes=1) if name == "reinforce" else dict(rollout=1, normalize_advantage=True)
    agent, watch = acted(name, "chordate/ProbeAction-v0", 20, **one)
    assert watch.updates and agent.skipped_in_row == 0
    assert all(update["loss/policy"] == 0 for update in watch.updates)
