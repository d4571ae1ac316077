"""Policy-gradient agents with memory: what they learn from is what they acted on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from agents import load
from agents.actor import PolicyAgent, Samples
from replay import Decision, Rollout, Transition
from runs import UserError
from tests.tools import CPU, VECTOR, acted, digest

T, N = 12, 3
AGENTS = ("reinforce", "a2c", "trpo", "ppo")
NETS = ("window", "window-1", "rnn", "gru", "lstm", "transformer", "transformer-learned")
SMALL: dict[str, dict[str, Any]] = {
    "window": dict(window=3),
    "window-1": dict(window=1),
    "rnn": dict(width=8),
    "gru": dict(width=8),
    "lstm": dict(width=8),
    "transformer": dict(width=8, heads=2, layers=2, context=5),
    "transformer-learned": dict(width=8, heads=2, layers=2, context=5, positions="learned"),
}
every_agent = pytest.mark.parametrize("name", AGENTS)
every_net = pytest.mark.parametrize("net", NETS)


def made(name: str, net: str, seed: int = 0, **knobs: Any) -> PolicyAgent:
    inner = {**SMALL[net], **knobs.pop("inner", {})}
    how: dict[str, Any] = {} if name == "dqn" else {"orthogonal": False}
    agent = load(name)(backbone=net.split("-")[0], net=inner, **how, **knobs)
    agent.build(VECTOR, spaces.Discrete(3), CPU, np.random.SeedSequence(seed), print)
    return agent


def lived(agent: PolicyAgent, seed: int = 0, steps: int = T) -> tuple[Rollout, list[Decision]]:
    """A rollout of an agent in a world where episodes end by chance, in both ways."""
    rng = np.random.default_rng(seed)
    obs, first = rng.standard_normal((N, 3), np.float32), np.ones(N, bool)
    decision = agent.act(obs, first, agent.initial(N), 0)
    memory, decisions = agent.memory(obs), []
    for _ in range(steps):
        decisions.append(decision)
        ended, over = rng.random(N) < 0.3, rng.random(N) < 0.5
        following = rng.standard_normal((N, 3), np.float32)
        reward = rng.standard_normal(N).astype(np.float32)
        step = Transition(obs, decision.action, reward, following, ended & over, ended & ~over, first)
        memory.add(step, decision)
        obs = np.where(ended[:, None], rng.standard_normal((N, 3), np.float32), following)
        first = ended
        if not memory.full:
            decision = agent.act(obs, first, decision.state, 0)
    return memory.take(obs, decision, first), decisions


def again(agent: PolicyAgent, samples: Samples) -> tuple[Tensor, Tensor]:
    """Log-probabilities and values (B,) of samples under the weights now."""
    joined = samples.joined
    with torch.no_grad():
        p, value = agent.model(joined.inputs)
        alone = agent.model.parameters_of(joined.inputs), agent.model.values_of(joined.inputs)
    torch.testing.assert_close(alone, (p, value))
    return agent.distribution.log_prob(p, joined.action), value


@every_net
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("sequence", [None, 4, 1])
def test_a_rollout_is_seen_again_as_it_was(net: str, separate: bool, sequence: int | None) -> None:
    """Same weights, same memory: the ratio of probabilities is 1 in every sequence, whatever it begins with."""
    agent = made("ppo", net, separate=separate, rollout=T, batch=T, sequence=sequence)
    agent.update(lived(agent, seed=4)[0])  # so that nothing is at its start
    rollout, _ = lived(agent)
    assert rollout.truncated.any() and rollout.terminated.any()
    samples = agent.samples(rollout)
    length = sequence or (4 if "transformer" in net else T)  # no longer than its context of 5
    assert samples.action.shape[:2] == (T * N // length, length)
    logp, value = again(agent, samples)
    joined = samples.joined
    np.testing.assert_allclose(logp, joined.logp, atol=2e-6)
    np.testing.assert_allclose(value, joined.value, atol=2e-6)
    forgotten = samples._replace(inputs=samples.inputs._replace(first=torch.ones_like(samples.inputs.first)))
    same = torch.allclose(again(agent, forgotten)[0], joined.logp, atol=1e-4)
    assert same == (net == "window-1")  # which sees the present alone


@every_agent
@every_net
def test_values_behind_the_rollout_know_what_came_before(name: str, net: str) -> None:
    """The value of what follows a truncated or the last step is that of the net which has seen the episode so far."""
    knobs = {} if name == "reinforce" else {"rollout": T}
    agent = made(name, net, **knobs, **({"batch": T} if name in ("ppo", "trpo") else {}))
    rollout, decisions = lived(agent, steps=T)
    no = np.zeros(N, bool)
    at, of = np.nonzero(rollout.truncated)
    assert len(at)
    if name != "reinforce":
        for row, (t, n) in enumerate(zip(at, of, strict=True)):
            whole = np.repeat(rollout.cut_obs[row : row + 1], N, 0)
            expected = agent._forward(whole, no, decisions[t].state)[1][n]
            kept = tuple(part[row : row + 1] for part in rollout.cut_state)
            found = agent._values(rollout.cut_obs[row : row + 1], None, kept)
            assert found[0] == pytest.approx(expected, abs=1e-6)
        expected = agent._forward(rollout.last_obs, no, decisions[-1].state)[1]
        found = agent._values(rollout.last_obs, None, rollout.last_state)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    else:  # one row of finished episodes: what is kept must be what a walk through each of them leaves
        begins = np.flatnonzero(rollout.first[:, 0])
        for row, t in enumerate(at):
            state, first = agent.initial(1), np.ones(1, bool)
            for step in range(begins[begins <= t][-1], t + 1):
                state, first = agent._forward(rollout.obs[step], first, state)[2], np.zeros(1, bool)
            expected = agent._forward(rollout.cut_obs[row : row + 1], first, state)[1]
            kept = tuple(part[row : row + 1] for part in rollout.cut_state)
            found = agent._values(rollout.cut_obs[row : row + 1], None, kept)
            np.testing.assert_allclose(found, expected, atol=1e-6)


@every_agent
def test_gradients_are_those_of_one_step_after_the_other(name: str) -> None:
    """Of the first update, against a loop that carries the memory and forgets it where an episode begins."""
    knobs: dict[str, Any] = {} if name == "reinforce" else {"rollout": T}
    if name in ("ppo", "trpo"):
        knobs |= {"batch": T * N, "epochs": 1}
    agent = made(name, "lstm", **knobs)
    rollout, _ = lived(agent)
    samples = agent.samples(rollout).joined
    p, value = agent.model(samples.inputs)
    whole = torch.autograd.grad(
        (p.square().sum(1) * samples.advantage + value.square()).sum(), list(agent.model.parameters())
    )
    obs, first, state = samples.inputs
    loss, state = torch.zeros(()), tuple(state)
    advantage = samples.advantage.reshape(first.shape)
    for t in range(first.shape[1]):
        p, value, state = agent.model.step(
            samples.inputs._replace(obs=obs[:, t], first=first[:, t], state=state)
        )
        loss = loss + (p.square().sum(1) * advantage[:, t] + value.square()).sum()
    for found, expected in zip(whole, torch.autograd.grad(loss, list(agent.model.parameters())), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_sequences_have_to_fit() -> None:
    with pytest.raises(UserError, match="--sequence 5 must divide --rollout 12"):
        made("ppo", "lstm", rollout=12, batch=12, sequence=5)
    with pytest.raises(UserError, match="--context 5 must be at least --sequence 6"):
        made("ppo", "transformer", rollout=12, batch=12, sequence=6)
    assert made("ppo", "transformer", rollout=12, batch=12).sequence == 4  # by itself as long as it can be
    with pytest.raises(UserError, match="nothing but 1 divides --rollout 25 and --batch 24"):
        made("ppo", "lstm", rollout=25, batch=24)
    with pytest.raises(UserError, match="--context 5 must be at least --sequence 8"):
        made("dqn", "transformer", sequence=8, burn_in=2)
    with pytest.raises(UserError, match="--sequence has no effect without memory"):
        agent = load("ppo")(backbone="mlp", sequence=4, rollout=12, batch=12)
        agent.build(VECTOR, spaces.Discrete(3), CPU, np.random.SeedSequence(0), print)


@every_agent
@pytest.mark.parametrize("start", ["zero", "normal", "learned"])
@pytest.mark.parametrize("rollout", [T, 1])  # of one step: mostly without an episode that begins
def test_every_start_learns(name: str, start: str, rollout: int) -> None:
    knobs = {} if name == "reinforce" else {"rollout": rollout}
    batch = {"batch": N * rollout} if name in ("ppo", "trpo") else {}
    agent = made(name, "lstm", inner={"start": start}, **knobs, **batch)
    before = digest(agent)
    for seed in range(3):
        agent.update(lived(agent, seed, rollout if knobs else T)[0])
    assert digest(agent) != before and not agent.skipped_in_row
    if start == "learned":
        assert any(
            name.endswith("learned") and p.abs().max() > 0 for name, p in agent.model.named_parameters()
        )


@every_agent
def test_same_seed_same_bits(name: str) -> None:
    knobs = dict(backbone="lstm", net={"width": 8}, num_envs=2)
    one, same, other = (digest(acted(name, "CartPole-v1", 300, seed=s, **knobs)[0]) for s in (1, 1, 2))
    assert one == same != other
