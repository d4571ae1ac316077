"""TRPO: the pieces of its step, and that no step goes further than it may."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from agents import load
from agents.actor import Inputs, Samples
from agents.distributions import of_space
from agents.trpo import Fisher, conjugate_gradient, flat, line_search, surrogate, unflat
from tests.tools import CPU, VECTOR

SPACES = {
    "Discrete": spaces.Discrete(3),
    "Box": spaces.Box(-1, 1, (2,), np.float32),
    "MultiBinary": spaces.MultiBinary(3),
    "Dict": spaces.Dict(a=spaces.Discrete(2), b=spaces.Box(-1, 1, (1,), np.float32)),
}


def agent_on(space: spaces.Space[Any], seed: int = 0, hidden: int = 4, **knobs: Any) -> Any:
    agent = load("trpo")(net={"hidden": (hidden,), "activation": "tanh"}, orthogonal=False, **knobs)
    agent.build(VECTOR, space, CPU, np.random.SeedSequence(seed), print)
    return agent


def samples_of(agent: Any, size: int, seed: int, scale: float = 1.0) -> Samples:
    """Actions that the policy drew, with random advantages."""
    rng = np.random.default_rng(seed)
    obs = rng.standard_normal((size, 3)).astype(np.float32)
    decision = agent.act(obs, np.zeros(size, bool), (), 0)
    advantage, target = (scale * rng.standard_normal((2, size))).astype(np.float32)
    parts = (obs, decision.sample, np.zeros(0, np.float32), agent.values(obs)[:, 0], advantage, target)
    shown, *rest = map(torch.from_numpy, parts)
    return Samples(Inputs(shown), *rest)


@pytest.mark.parametrize("size", [1, 2, 7, 20])
def test_conjugate_gradient_solves_random_systems(size: int) -> None:
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        root = torch.randn(size, size, generator=draw, dtype=torch.float64)
        matrix = root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)
        for scale in (1.0, 1e-7):  # a small g is no solved system
            g = scale * torch.randn(size, generator=draw, dtype=torch.float64)
            x, image = conjugate_gradient(lambda v, matrix=matrix: matrix @ v, g, 5 * size)
            assert (matrix @ x - g).norm() <= 1.1e-5 * g.norm()
            assert (matrix @ x - image).norm() <= 1e-9 * g.norm()


def test_conjugate_gradient_stops_in_time() -> None:
    calls: list[Tensor] = []

    def product(v: Tensor) -> Tensor:
        calls.append(v)
        return v * torch.tensor([1.0, 2.0, 2.0, 1.0])

    x, _ = conjugate_gradient(product, torch.tensor([1.0, 2.0, 4.0, 3.0]), 50)
    assert x.tolist() == pytest.approx([1.0, 1.0, 2.0, 3.0]) and len(calls) == 2  # as many as eigenvalues
    x, image = conjugate_gradient(product, torch.ones(4), 1)  # not solved yet
    assert len(calls) == 3
    assert image.tolist() == pytest.approx((x * torch.tensor([1.0, 2.0, 2.0, 1.0])).tolist())
    assert conjugate_gradient(product, torch.zeros(4), 5)[0].tolist() == [0.0] * 4 and len(calls) == 3


@pytest.mark.parametrize("kind", SPACES)
def test_fisher_product_equals_the_explicit_matrix(kind: str) -> None:
    """Both J^T M J of full Jacobians, M the Hessian of each state's KL, and the Hessian of the mean KL."""
    torch.manual_seed(0)
    distribution = of_space(SPACES[kind])
    width = distribution.parameters
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, width)).double()
    obs = torch.randn(5, 3, dtype=torch.float64)
    weights = list(net.parameters())
    p = net(obs)
    fisher = Fisher(distribution, p, weights, damping=0.3)
    size = sum(w.numel() for w in weights)
    found = torch.stack([fisher(v) for v in torch.eye(size, dtype=torch.float64)])

    rows = [flat(torch.autograd.grad(x, weights, retain_graph=True)) for x in p.flatten()]
    jacobian = torch.stack(rows).reshape(5, width, size)
    total = torch.zeros(size, size, dtype=torch.float64)
    for k in range(5):
        own = p[k : k + 1].detach()
        inner: Any = torch.autograd.functional.hessian(
            lambda q, own=own: distribution.kl(own, q[None]).sum(), own[0].clone()
        )
        total += jacobian[k].T @ inner @ jacobian[k] / 5
    expected = total + 0.3 * torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)

    def mean_kl(vector: Tensor) -> Tensor:
        names = [name for name, _ in net.named_parameters()]
        new = torch.func.functional_call(net, dict(zip(names, unflat(vector, weights), strict=True)), (obs,))
        return distribution.kl(p.detach(), new).mean()

    hessian: Any = torch.autograd.functional.hessian(mean_kl, flat(weights).detach())
    torch.testing.assert_close(
        found, hessian + 0.3 * torch.eye(size, dtype=torch.float64), atol=1e-9, rtol=1e-7
    )


def test_fisher_of_a_categorical_is_the_mean_square_of_its_scores() -> None:
    distribution = of_space(spaces.Discrete(3))
    p = torch.tensor([[0.2, -0.4, 1.0], [1.0, 0.0, 0.3]], dtype=torch.float64, requires_grad=True)
    fisher = Fisher(distribution, p * 1, [p], damping=0.0)
    found = torch.stack([fisher(v) for v in torch.eye(6, dtype=torch.float64)])
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for state in range(2):
        pi = p.detach()[state].exp() / p.detach()[state].exp().sum()
        for action in range(3):
            score = torch.zeros(6, dtype=torch.float64)
            score[3 * state : 3 * state + 3] = -pi
            score[3 * state + action] += 1
            expected += pi[action] * torch.outer(score, score) / 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", SPACES)
def test_a_thousand_steps_stay_within_their_limit(kind: str) -> None:
    """250 problems of each kind: improved and within delta, or the weights of before, to the bit."""
    moved = refused = 0
    rng = np.random.default_rng(list(SPACES).index(kind))
    for block in range(25):
        knobs = dict(delta=float(10 ** rng.uniform(-3, 0.5)), damping=float(10 ** rng.uniform(-4, 0)))
        knobs |= dict(cg_steps=int(rng.integers(1, 12)), normalize_advantage=bool(rng.integers(2)))
        agent = agent_on(
            SPACES[kind], seed=block, hidden=int(rng.integers(1, 6)), tries=int(rng.integers(1, 8)), **knobs
        )
        for number in range(10):
            size = int(rng.integers(2, 24))
            scale = float(10 ** rng.uniform(-4, 4))
            samples = samples_of(agent, size, seed=int(rng.integers(2**31)), scale=scale)
            before = [w.detach().clone() for w in agent._weights]
            old = agent.model.parameters_of(samples.inputs).detach()
            said = agent._improve(samples)
            new = agent.model.parameters_of(samples.inputs).detach()
            kl = agent.distribution.kl(old.double(), new.double()).mean().item()
            if said["policy/tries"] == 0:
                refused += 1
                assert all(torch.equal(a, b) for a, b in zip(before, agent._weights, strict=True))
                continue
            moved += 1
            a = samples.advantage.double()
            if agent.config.normalize_advantage:
                a = (a - a.mean()) / (a.std() + 1e-8)
            log = [agent.distribution.log_prob(p.double(), samples.action.double()) for p in (old, new)]
            gain = ((log[1] - log[0]).exp() * a).mean() - a.mean()
            assert gain > -1e-6 * a.abs().mean(), (block, number)  # the surrogate is summed in fp32
            assert kl <= agent.config.delta * (1 + 1e-4) + 1e-7, (block, number)  # and so is the KL
    assert moved > 150 and refused > 0


def test_a_line_search_that_never_succeeds_restores_to_the_bit() -> None:
    weights = [torch.randn(3, 2), torch.randn(5)]
    before, asked = [w.clone() for w in weights], []
    step = torch.randn(11)

    for verdict in ((1.0, 9.0), (0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (1.0, float("nan"))):

        def judge(verdict: tuple[float, float] = verdict) -> tuple[float, float]:
            asked.append([w.clone() for w in weights])
            return verdict

        asked.clear()
        assert line_search(weights, step, judge, 0.0, 0.1, 0.5, 4) == (-1, 0.0, 0.0)
        assert len(asked) == 4
        assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    for k, tried in enumerate(asked):
        torch.testing.assert_close(flat(tried), flat(before) + 0.5**k * step)


def test_a_line_search_takes_the_longest_good_step() -> None:
    weights = [torch.zeros(1)]
    # improves everywhere, KL is the distance
    judge = lambda: (weights[0].item(), weights[0].item())  # noqa: E731
    assert line_search(weights, torch.ones(1), judge, 0.0, 0.3, 0.5, 5) == (2, 0.25, 0.25)
    assert weights[0].item() == 0.25


def test_a_full_step_has_the_kl_that_was_asked_for() -> None:
    """On a small trust region the quadratic holds: damping takes damping |step|^2 / 2 of it, the KL is the rest."""
    agent = agent_on(spaces.Discrete(3), delta=1e-6, damping=1e-3, cg_steps=30)
    samples = samples_of(agent, 64, seed=1)
    before, old = flat(agent._weights).detach().clone(), agent.model.parameters_of(samples.inputs).detach()
    assert agent._improve(samples)["policy/tries"] == 1
    step, new = flat(agent._weights).detach() - before, agent.model.parameters_of(samples.inputs).detach()
    rest = 1e-6 - 1e-3 * float(step @ step) / 2
    assert 3e-7 < rest < 9e-7
    assert agent.distribution.kl(old.double(), new.double()).mean().item() == pytest.approx(rest, rel=0.03)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_the_step_does_not_depend_on_the_scale_of_the_advantages(scale: float) -> None:
    moves = []
    for factor in (1.0, scale):
        agent = agent_on(spaces.Discrete(3), normalize_advantage=False)
        before, samples = flat(agent._weights).detach().clone(), samples_of(agent, 16, seed=2)
        agent._improve(samples._replace(advantage=factor * samples.advantage))
        moves.append(flat(agent._weights).detach() - before)
    assert moves[0].norm() > 1e-3
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-2, atol=1e-5)


def test_advantages_without_a_gradient_are_refused() -> None:
    agent = agent_on(spaces.Discrete(3), normalize_advantage=False)
    before = [w.detach().clone() for w in agent._weights]
    for fill, refused in ((0.0, 1), (float("nan"), 2)):
        samples = samples_of(agent, 8, seed=0)._replace(advantage=torch.full((8,), fill))
        said = agent._improve(samples)
        assert (said["policy/tries"], said["policy/refused"]) == (0, refused)
        assert all(torch.equal(a, b) for a, b in zip(before, agent._weights, strict=True))


def test_surrogate_by_hand() -> None:
    new, old = torch.log(torch.tensor([0.5, 0.2])), torch.log(torch.tensor([0.25, 0.4]))
    assert surrogate(new, old, torch.tensor([1.0, -3.0])).item() == pytest.approx((2 - 1.5) / 2)


def test_the_critic_is_fitted_to_the_returns() -> None:
    agent = agent_on(spaces.Discrete(3), batch=4, epochs=2, rollout=8, adam_eps=1e-8, lr=1e-3)
    samples = samples_of(agent, 8, seed=3)
    critic = [*agent.model.critic.parameters(), *agent.model.value.parameters()]
    before = [w.detach().clone() for w in critic]
    seen: list[Tensor] = []
    fit = agent._fit

    def noting(inputs: Any, return_: Tensor) -> Tensor:
        if not seen:
            value = agent.model.value(agent.model.critic(inputs[0])[0])
            own = torch.autograd.grad(0.5 * (value - return_).square().mean(), critic)
            fit_gradient.extend(own)
        seen.append(return_)
        loss = fit(inputs, return_)
        if len(seen) == 1:
            for w, old, g in zip(critic, before, fit_gradient, strict=True):
                scale = min(1.0, 0.5 / float(flat(fit_gradient).norm() + 1e-6))
                # Adam's first step
                torch.testing.assert_close(
                    w, old - 1e-3 * scale * g / ((scale * g).abs() + 1e-8), atol=1e-6, rtol=0
                )
        return loss

    fit_gradient: list[Tensor] = []
    agent._fit = noting
    agent._value(samples)
    assert [len(part) for part in seen] == [4] * 4 and agent.updates == 4
    for epoch in (seen[:2], seen[2:]):
        assert torch.equal(torch.cat(epoch).sort()[0], samples.return_.sort()[0])
