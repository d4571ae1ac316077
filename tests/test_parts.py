"""The parts of DQN by hand-worked numbers: dueling, noisy layers, C51, quantiles."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.dqn import c51_target, expectation, midpoints, munchausen, pick, quantile_loss
from agents.heads import Noisy, QHead, duel
from agents.loop import off_policy
from backbones.compute import Compute
from envs import Collector, make
from replay import Batch, Ring
from replay.priority import Priority
from runs import UserError
from tests.tools import Quiet, batch_of, built


def test_dueling_by_hand() -> None:
    value, advantage = torch.tensor([[2.0]]), torch.tensor([[1.0, 3.0, -1.0]])
    assert duel(value, advantage, "mean").tolist() == [[2.0, 4.0, 0.0]]
    assert duel(value, advantage, "max").tolist() == [[0.0, 2.0, -2.0]]
    assert duel(value, advantage, "naive").tolist() == [[3.0, 5.0, 1.0]]


def test_only_naive_dueling_is_not_identifiable() -> None:
    value, advantage = torch.randn(4, 1, 5), torch.randn(4, 3, 5)  # with atoms
    for how in ("mean", "max", "naive"):
        moved = duel(value + 7, advantage - 7, how)
        assert torch.allclose(moved, duel(value, advantage, how), atol=1e-5) == (how == "naive")


@pytest.mark.parametrize("kind", ("factorised", "independent"))
def test_noisy_layer_has_the_mean_and_variance_of_its_noise(kind: str) -> None:
    torch.manual_seed(0)
    layer, rng = Noisy(6, 3, kind, 0.5), np.random.default_rng(0)
    x = torch.randn(1, 6)
    quiet = layer(x)
    torch.testing.assert_close(quiet, torch.nn.functional.linear(x, layer.weight, layer.bias))
    samples = []
    with torch.no_grad():
        layer.weight_sigma.copy_(torch.rand(3, 6))
        layer.bias_sigma.copy_(torch.rand(3))
        for _ in range(20_000):
            layer.draw(rng)
            samples.append(layer(x))
    found = torch.cat(samples)
    # E f(e)^2 = E|e| = sqrt(2 / pi): a factorised weight's noise has variance 2 / pi, a bias's sqrt(2 / pi); the
    # noises of a factorised row share e_out, so that their covariance, E f(a) E f(b), is zero as well
    one, both = (np.sqrt(2 / np.pi), 2 / np.pi) if kind == "factorised" else (1.0, 1.0)
    variance = both * (layer.weight_sigma**2 * x**2).sum(1) + one * layer.bias_sigma**2
    np.testing.assert_allclose(found.mean(0), quiet[0].detach(), atol=0.05)
    np.testing.assert_allclose(found.var(0), variance.detach(), rtol=0.06)
    layer.draw(None)
    torch.testing.assert_close(layer(x), quiet)


def test_c51_projection_by_hand() -> None:
    support = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    probability = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    # -1, 0, 1, 2 go to 0, .5, 1, 1.5 under 0.5 + 0.5 z
    found = c51_target(torch.tensor([0.5]), torch.tensor([0.5]), probability, support)
    np.testing.assert_allclose(found[0], [0, 0.1 + 0.1, 0.1 + 0.3 + 0.2, 0.2], atol=1e-6)
    # an end leaves the reward alone; what lies outside goes to the border
    end = c51_target(torch.tensor([0.25]), torch.tensor([0.0]), probability, support)
    np.testing.assert_allclose(end[0], [0, 0.75, 0.25, 0], atol=1e-6)
    far = c51_target(torch.tensor([9.0]), torch.tensor([1.0]), probability, support)
    np.testing.assert_allclose(far[0], [0, 0, 0, 1], atol=1e-6)


def test_c51_projection_keeps_mass_and_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    support = torch.linspace(-10, 10, 51)
    probability = torch.rand(64, 51, generator=draw).softmax(1)
    reward, discount = torch.randn(64, generator=draw), torch.full((64,), 0.6)
    found = c51_target(reward, discount, probability, support)
    torch.testing.assert_close(found.sum(1), torch.ones(64))
    mean = reward + discount * (probability * support).sum(1)  # nothing reaches the borders here
    torch.testing.assert_close((found * support).sum(1), mean, atol=1e-4, rtol=1e-4)


def test_quantile_loss_by_hand() -> None:
    theta, target = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 3.0]])
    # tau = .25, .75; errors of theta_1: .5, 3 (Huber .125, 2.5); of theta_2: -.5, 2 (Huber .125, 1.5)
    expected = 0.25 * (0.125 + 2.5) / 2 + (0.25 * 0.125 + 0.75 * 1.5) / 2
    assert quantile_loss(theta, midpoints(theta.shape[1], theta), target).item() == pytest.approx(expected)


def test_quantile_loss_finds_the_quantiles() -> None:
    draw = torch.Generator().manual_seed(0)
    samples = 100 * torch.rand(1, 4_000, generator=draw)  # wide against the Huber threshold
    theta = torch.full((1, 4), 50.0, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.3)
    for _ in range(1_000):
        optimizer.zero_grad()
        quantile_loss(theta, midpoints(4, theta), samples).sum().backward()
        optimizer.step()
    np.testing.assert_allclose(theta[0].detach(), [12.5, 37.5, 62.5, 87.5], atol=1.5)


def test_expectation_and_pick() -> None:
    support = torch.tensor([0.0, 1.0])
    out = torch.tensor([[[0.0, 0.0], [-50.0, 50.0]]])  # (1, 2, 2)
    np.testing.assert_allclose(expectation(out, "c51", support), [[0.5, 1.0]], atol=1e-6)
    np.testing.assert_allclose(expectation(out, "quantile", support), [[0.0, 0.0]], atol=1e-6)
    assert pick(out, torch.tensor([1])).tolist() == [[-50.0, 50.0]]
    assert expectation(support, "off", support) is support


@pytest.mark.parametrize(
    ("dueling", "noisy", "distributional", "double"),
    [
        *itertools.product(
            ("off", "mean", "max", "naive"),
            ("off", "factorised", "independent"),
            ("off", "c51", "quantile"),
            ("off", "online", "twin"),
        )
    ],
)
def test_all_parts_combine(dueling: str, noisy: str, distributional: str, double: str) -> None:
    knobs = dict(dueling=dueling, noisy=noisy, distributional=distributional, double=double)
    agent = built(**knobs, learning_starts=1, epsilon_start=0.0, epsilon_end=0.0, lr=1e-2, target_every=50)
    batch = batch_of(32)
    first = agent.loss(batch)[0].item()
    for _ in range(40):
        update = agent.update(batch)
    assert update.priority is not None and update.priority.shape == (32,)
    assert agent.loss(batch)[0].item() < first
    obs, flags = np.zeros((2, 3), np.float32), np.ones(2, bool)
    assert np.array_equal(agent.values(obs), agent.values(obs)) and agent.values(obs).shape == (2, 2)
    assert agent.act(obs, flags, (), 10**6).action.shape == (2,)


def test_noise_explores_and_greedy_actions_have_none() -> None:
    agent = built(noisy="factorised", noisy_sigma=5.0, learning_starts=1, epsilon_start=0.0, epsilon_end=0.0)
    obs, flags = np.zeros((1, 3), np.float32), np.ones(1, bool)
    assert len({int(agent.act(obs, flags, (), 9).action[0]) for _ in range(50)}) == 2
    assert len({int(agent.greedy(obs, flags, ()).action[0]) for _ in range(50)}) == 1


@pytest.mark.parametrize("distributional", ("off", "c51", "quantile"))
def test_priorities_are_fed_back(distributional: str) -> None:
    env = make("CartPole-v1", 2, 0)
    agent = built(
        space=env.single_observation_space,
        distributional=distributional,
        learning_starts=20,
        train_every=4,
        updates=2,
        alpha=0.6,
        batch=8,
    )
    ring = Ring(
        200,
        2,
        env.single_observation_space,
        env.single_action_space,
        priority=Priority(0.6, 0.4, 1.0, 1000),
        rng=np.random.default_rng(0),
    )
    collector = Collector(env, 0)
    off_policy(agent, collector, ring, Quiet(), 60)  # type: ignore[arg-type]  # all that the loop asks of a watch
    collector.close()
    assert ring.preferred is not None
    leaves = ring.preferred.tree.leaves
    assert len(np.unique(leaves[leaves > 0])) > 10


@pytest.mark.parametrize(
    ("knobs", "message"),
    (
        ({"atoms": 11}, "--atoms has no effect without --distributional"),
        ({"v_min": -1.0}, "--v-min has no effect without --distributional c51"),
        ({"distributional": "quantile", "v_max": 3.0}, "--v-max has no effect without --distributional c51"),
        ({"beta_end": 0.5}, "--beta-end has no effect without --alpha"),
        (
            {"noisy": "independent", "noisy_sigma": 1.0},
            "--noisy-sigma has no effect without --noisy factorised",
        ),
        ({"distributional": "c51", "v_min": 4.0, "v_max": 4.0}, "--v-min 4 must be less than --v-max 4"),
        ({"dueling": "meen"}, "dueling"),
    ),
)
def test_contradictions_are_refused(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(**knobs)


def test_a_plain_head_is_one_linear_layer() -> None:
    assert [name for name, _ in QHead(4, 2).named_parameters()] == ["q.weight", "q.bias"]


def test_of_twins_each_is_evaluated_by_the_other() -> None:
    """Roles swapped: the twin's loss is that of an ordinary agent whose nets are the other way round."""
    agent, swapped = built(double="twin"), built(double="online")
    swapped.online.load_state_dict(agent.target.state_dict())
    swapped.target.load_state_dict(agent.online.state_dict())
    batch = batch_of(16)
    assert not torch.equal(agent.online.head.q.weight, agent.target.head.q.weight)  # two nets, not a copy
    assert agent.loss(batch, pupil=1)[0].item() == swapped.loss(batch)[0].item()
    assert agent.loss(batch, pupil=0)[0].item() != agent.loss(batch, pupil=1)[0].item()

    # by hand: one sample, values set through the biases of the head
    for net, bias in ((agent.online, [1.0, 3.0]), (agent.target, [10.0, 20.0])):
        for parameter in net.parameters():
            torch.nn.init.zeros_(parameter)
        net.head.q.bias.data = torch.tensor(bias)
    one = batch_of(1)._replace(
        action=torch.tensor([0]),
        reward=torch.tensor([2.0]),
        discount=torch.tensor([0.5]),
        weight=torch.ones(1),
    )
    # online learns: a* = 1, y = 2 + 0.5 * 20 = 12, Q = 1; the twin learns: a* = 1, y = 2 + 0.5 * 3 = 3.5, Q = 10
    assert agent.loss(one, pupil=0)[2].item() == pytest.approx(11.0)
    assert agent.loss(one, pupil=1)[2].item() == pytest.approx(-6.5)


def test_a_fair_coin_says_which_twin_learns() -> None:
    agent, batch = built(double="twin", lr=1e-3), batch_of(8)
    learned = [0, 0]
    for _ in range(200):
        before = [net.head.q.weight.clone() for net in (agent.online, agent.target)]
        agent.update(batch)
        moved = [
            not torch.equal(a, net.head.q.weight)
            for a, net in zip(before, (agent.online, agent.target), strict=True)
        ]
        assert sum(moved) == 1
        learned[moved.index(True)] += 1
    assert 75 < learned[0] < 125  # 3.5 standard deviations
    assert [optimizer.count for optimizer in agent._optimizers] == learned


def test_with_acting_target_the_creeping_net_acts() -> None:
    agent, batch = built(acting="target", target_every=1, tau=0.25, lr=1e-2), batch_of(8)
    obs = np.ones((1, 3), np.float32)
    for _ in range(5):
        before = [p.clone() for p in agent.target.parameters()]
        agent.update(batch)
        for old, new, online in zip(
            before, agent.target.parameters(), agent.online.parameters(), strict=True
        ):
            torch.testing.assert_close(new, old + 0.25 * (online - old))
    with torch.no_grad():
        np.testing.assert_allclose(
            agent.values(obs), agent.target(torch.from_numpy(obs)), rtol=1e-5, atol=1e-6
        )
        assert np.abs(agent.values(obs) - agent.online(torch.from_numpy(obs)).numpy()).max() > 1e-3
    other = built(1, acting="target", target_every=1, tau=0.25, lr=1e-2)
    other.load_weights(agent.state_dict()["weights"])
    assert np.array_equal(agent.values(obs), other.values(obs))
    with pytest.raises(UserError, match="--acting target needs a target net"):
        built(acting="target", double="twin")


@pytest.mark.parametrize("tau", [1.0, 0.01])
@pytest.mark.parametrize("acting", ["online", "target"])
def test_in_bf16_what_is_read_follows_what_learns(tau: float, acting: str) -> None:
    compute = Compute("cpu", "bf16", 1, False)
    space = spaces.Box(0, 255, (1, 12, 12), np.uint8)
    knobs: dict[str, Any] = dict(
        space=space,
        backbone="cnn",
        net={"net": "light", "features": 8},
        acting=acting,
        tau=tau,
        target_every=2,
        lr=1e-2,
    )
    pixels = torch.randint(256, (2, 8, 1, 12, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    agent = built(compute=compute, **knobs)
    batch = batch_of(8)._replace(obs=pixels[0], next_obs=pixels[1])
    for _ in range(6):
        agent.update(batch)
    acts = agent.online if acting == "online" else agent.target
    for a, b in ((acts, agent._actor), (agent.target, agent._goal)):
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(x.to(y.dtype), y)
    assert next(agent._actor.backbone.parameters()).dtype == torch.bfloat16
    other = built(1, compute=compute, **knobs)
    other.load_state_dict(agent.state_dict())
    for _ in range(3):
        agent.update(batch)
        other.update(batch)
    for x, y in zip(agent._actor.parameters(), other._actor.parameters(), strict=True):
        assert torch.equal(x, y)


def test_munchausen_by_hand() -> None:
    """Two actions with Q' = (0, t log 3) have the policy (1/4, 3/4)."""
    t, reward, discount = 0.5, torch.tensor([2.0]), torch.tensor([0.9])
    later = torch.tensor([[0.0, t * np.log(3.0)]], dtype=torch.float32)
    now = torch.tensor([[t * np.log(4.0), 0.0]], dtype=torch.float32)  # pi = (4/5, 1/5)
    policy, moved = munchausen(reward, discount, later, now, torch.tensor([1]), 0.9, t)
    torch.testing.assert_close(policy, torch.tensor([[0.25, 0.75]]))
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert moved.item() == pytest.approx(2.0 + 0.9 * t * np.log(0.2) + 0.9 * t * entropy)
    # a hopeless action costs no more than `part`
    far = torch.tensor([[100.0, 0.0]])
    assert munchausen(reward, discount * 0, later, far, torch.tensor([1]), 0.9, t)[1].item() == pytest.approx(
        1.1
    )


@pytest.mark.parametrize("distributional", ["off", "c51", "quantile"])
def test_with_munchausen_the_loss_is_that_of_the_soft_target(distributional: str) -> None:
    agent = built(munchausen=0.9, temperature=0.2, distributional=distributional, n_step=2)
    for parameter in agent.target.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    batch, kind, support = batch_of(16), distributional, agent._support
    q = expectation(agent.target(batch.obs), kind, support)
    later = agent.target(batch.next_obs)
    next_q = expectation(later, kind, support)
    policy, log_policy = (next_q / 0.2).softmax(1), (next_q / 0.2).log_softmax(1)
    bonus = (0.2 * (q / 0.2).log_softmax(1)[torch.arange(16), batch.action]).clamp(-1, 0)
    reward = batch.reward + 0.9 * bonus - batch.discount * 0.2 * (policy * log_policy).sum(1)
    _, metrics, error = agent.loss(batch)
    expected = reward + batch.discount * (policy * next_q).sum(1)
    torch.testing.assert_close(metrics["q/target"], expected.mean())
    if kind == "off":
        chosen = agent.online(batch.obs)[torch.arange(16), batch.action]
        torch.testing.assert_close(error, (expected - chosen).detach())
    elif kind == "quantile":
        mixed = (policy[:, :, None] * later).sum(1)
        now = pick(agent.online(batch.obs), batch.action)
        goal = reward[:, None] + batch.discount[:, None] * mixed
        each = quantile_loss(now, midpoints(now.shape[1], now), goal)
        torch.testing.assert_close(error, each.detach())
    else:
        mixed = (policy[:, :, None] * later.softmax(2)).sum(1)
        goal = c51_target(reward, batch.discount, mixed, support)
        logits = pick(agent.online(batch.obs), batch.action).log_softmax(1)
        torch.testing.assert_close(error, -(goal * logits).sum(1).detach())
    whole, single = (built(munchausen=0.9, lr=1e-2) for _ in range(2))
    batch = batch_of(32)
    whole.update(batch, 4)
    for k in range(4):
        single.update(Batch(*(leaf[8 * k : 8 * k + 8] for leaf in batch)))
    for a, b in zip(whole.online.parameters(), single.online.parameters(), strict=True):
        assert torch.equal(a, b)
