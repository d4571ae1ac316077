"""Distributions over actions: probabilities, samples, entropies, divergences and curvature against plain numerics."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, iterate
from torch import Tensor

from agents.distributions import (
    MOST_DEPTH,
    NEVER,
    Bernoulli,
    Categorical,
    Distribution,
    Gaussian,
    Product,
    masked,
    of_space,
)
from runs import UserError

LARGEST = 1 - 2.0**-24  # float32 below 1
PLAIN = Gaussian(np.array([-np.inf]), np.array([np.inf]), False)
BOUNDED = spaces.Box(np.array([-1.0, 2.0], np.float32), np.array([3.0, 2.5], np.float32))
HALF = np.array([2.0, 0.25])  # of BOUNDED
TREE = spaces.Dict(
    {
        "arm": spaces.Box(-2, 1, (2, 2), np.float64),
        "legs": spaces.Tuple((spaces.Discrete(3, start=-1), spaces.MultiBinary((2, 1)))),
        "tail": spaces.Dict({"joints": spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[0, 1], [-3, 0]])}),
    }
)
SPACES: dict[str, tuple[spaces.Space[Any], bool]] = {  # and whether tanh bounds the actions
    "discrete": (spaces.Discrete(5), False),
    "discrete from -2": (spaces.Discrete(3, start=-2), False),
    "discrete int32": (spaces.Discrete(3, dtype=np.int32), False),
    "multi-discrete": (spaces.MultiDiscrete([2, 3, 4]), False),
    "multi-discrete int32": (spaces.MultiDiscrete([3, 2], dtype=np.int32, start=[5, -1]), False),
    "multi-discrete square": (spaces.MultiDiscrete([[2, 3], [3, 2]], start=[[1, 0], [-1, 4]]), False),
    "multi-binary": (spaces.MultiBinary(4), False),
    "multi-binary square": (spaces.MultiBinary((2, 2)), False),
    "unbounded": (spaces.Box(-np.inf, np.inf, (3,), np.float32), False),
    "half bounded": (spaces.Box(0, np.inf, (2,), np.float32), False),
    "bounded": (BOUNDED, False),
    "bounded float64": (spaces.Box(-0.1, 0.7, (2, 2), np.float64), False),
    "bounded float16": (spaces.Box(-0.1, 0.7, (2,), np.float16), False),
    "tanh": (BOUNDED, True),
    "tanh float64": (spaces.Box(-0.1, 0.7, (3,), np.float64), True),
    "tree": (TREE, False),
    "tree tanh": (TREE, True),
    "tuple": (spaces.Tuple((BOUNDED, spaces.Discrete(2))), True),
}
FINITE = ["discrete", "discrete from -2", "multi-discrete", "multi-discrete square", "multi-binary"]
every = pytest.mark.parametrize("name", SPACES)


def made(name: str) -> Distribution:
    space, squash = SPACES[name]
    return of_space(space, squash=squash)


def numbers(*rows: list[float]) -> Tensor:
    """Float64."""
    return torch.tensor(rows, dtype=torch.float64)


def parameters(dist: Distribution, count: int, seed: int = 0, size: float = 0.7) -> Tensor:
    """Random parameters (count, P) in float64."""
    draw = np.random.default_rng(seed).normal(0, size, (count, dist.parameters))
    return torch.from_numpy(draw)


def sample(dist: Distribution, p: Tensor, noise: Tensor) -> Tensor:
    """What `draw` draws; whose log-probability must be that of `log_prob`, wherever it is used."""
    x, logp = dist.draw(p.detach().numpy(), noise.numpy())
    x = torch.from_numpy(x)
    exact = dist.log_prob(p.detach().double(), x.double()).numpy()
    within = 1e-9 if p.dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(logp, exact, rtol=within, atol=within * max(1, x.shape[1]))
    alone, nothing = dist.draw(p.detach().numpy(), noise.numpy(), logp=False)
    assert nothing is None and np.array_equal(alone, x)
    return x


def mode(dist: Distribution, p: Tensor) -> Tensor:
    return torch.from_numpy(dist.mode(p.detach().numpy()))


def drawn(dist: Distribution, p: Tensor, count: int, seed: int = 0) -> Tensor:
    """`count` samples from the parameters p (1, P)."""
    noise = torch.from_numpy(dist.noise(np.random.default_rng(seed), count)).to(p.dtype)
    return sample(dist, p.expand(count, -1), noise)


def outcomes(dist: Distribution) -> Tensor:
    """All samples of a distribution over finitely many."""
    if isinstance(dist, Categorical):
        return torch.arange(dist.n).double()[:, None]
    if isinstance(dist, Bernoulli):
        return torch.tensor(list(itertools.product((0.0, 1.0), repeat=dist.width))).double()
    assert isinstance(dist, Product)
    parts = itertools.product(*(outcomes(part) for part in dist.parts))
    return torch.stack([torch.cat(row) for row in parts])


# -- densities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FINITE)
def test_probabilities_of_all_outcomes_sum_to_one(name: str) -> None:
    dist = made(name)
    p, all_of = parameters(dist, 3), outcomes(dist)
    for row in p:
        log = dist.log_prob(row.expand(len(all_of), -1), all_of)
        assert log.exp().sum().item() == pytest.approx(1, abs=1e-12)
        entropy = -(log.exp() * log).sum().item()
        assert dist.entropy(row[None]).item() == pytest.approx(entropy, abs=1e-12)


def test_categorical_by_hand() -> None:
    dist, p = Categorical(3), numbers([0.0, math.log(2), 0.0])
    assert dist.log_prob(p.expand(3, -1), outcomes(dist)).exp().tolist() == pytest.approx([0.25, 0.5, 0.25])
    assert dist.entropy(p).item() == pytest.approx(1.5 * math.log(2))
    assert dist.kl(p, torch.zeros(1, 3).double()).item() == pytest.approx(math.log(3) - 1.5 * math.log(2))
    noise = numbers([0.0], [0.24], [0.26], [0.74], [0.76], [LARGEST])
    assert sample(dist, p.expand(6, -1), noise)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_bernoulli_by_hand() -> None:
    dist, p = Bernoulli((2,)), numbers([math.log(3), 0.0])  # probabilities 3/4, 1/2
    logp = dist.log_prob(p.expand(4, -1), torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]).double())
    assert logp.exp().tolist() == pytest.approx([1 / 8, 1 / 8, 3 / 8, 3 / 8])
    of_each = (math.log(4) - 0.75 * math.log(3), math.log(2))
    assert dist.entropy(p).item() == pytest.approx(sum(of_each))
    noise = numbers([0.0, 0.0], [0.74, 0.49], [0.76, 0.51])
    assert sample(dist, p.expand(3, -1), noise).tolist() == [[1, 1], [1, 1], [0, 0]]


def test_gaussian_by_hand() -> None:
    p = numbers([1.0, math.log(2)])  # N(1, 4)
    assert PLAIN.log_prob(p, torch.tensor([[5.0]]).double()).item() == pytest.approx(
        -2 - math.log(2 * math.sqrt(2 * math.pi))
    )
    assert sample(PLAIN, p, torch.tensor([[-0.5]]).double()).item() == pytest.approx(0.0)
    assert PLAIN.entropy(p).item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 4))
    other = torch.tensor([[0.0, 0.0]]).double()
    assert PLAIN.kl(p, other).item() == pytest.approx(
        -math.log(2) + 5 / 2 - 1 / 2
    )  # (4 + 1) / 2 - 1/2 - log 2


@pytest.mark.parametrize("log_std", [-2.0, 0.0, 0.8])
def test_squashed_density_is_one_in_all_over_the_actions(log_std: float) -> None:
    # midpoints of a fine grid over the action: no change of variables but the distribution's own
    low, high, count = -1.0, 3.0, 20_000
    edges = np.tanh(np.linspace(-12, 12, count + 1))  # closer where the density may be steep
    middle, width = (edges[1:] + edges[:-1]) / 2, torch.from_numpy(np.diff(edges) * (high - low) / 2)
    x = torch.from_numpy(np.arctanh(middle))[:, None]
    dist = of_space(spaces.Box(low, high, (1,), np.float32), squash=True)
    p = numbers([0.4, log_std]).expand(count, -1)
    log = dist.log_prob(p, x)
    assert (log.exp() * width).sum().item() == pytest.approx(1, abs=2e-6)
    entropy = -(log.exp() * log * width).sum()
    assert dist.entropy(p[:1]).item() == pytest.approx(entropy.item(), abs=2e-5)


@pytest.mark.parametrize("squash", [False, True])
def test_density_over_two_actions_is_one_in_all(squash: bool) -> None:
    dist, count = of_space(BOUNDED, squash=squash), 600
    p = torch.tensor([[0.3, -0.2, -1.0, -0.6]]).double()
    # without tanh the density is that of the action before it is cut off, which may lie beyond the bounds
    reach = 1.0 if squash else 6.0
    side = reach * (2 * (np.arange(count) + 0.5) / count - 1)  # actions, where bounds are -1 and 1
    grid = torch.from_numpy(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2))
    x = grid.atanh() if squash else grid
    area = (2 * reach / count) ** 2 * HALF.prod()  # in units of the action
    log = dist.log_prob(p.expand(len(x), -1), x)
    assert (log.exp().sum() * area).item() == pytest.approx(1, abs=1e-6)
    entropy = -(log.exp() * log).sum() * area
    assert dist.entropy(p).item() == pytest.approx(entropy.item(), abs=1e-5)


def test_squashed_density_is_that_of_torch() -> None:
    own = of_space(BOUNDED, squash=True)
    p, x = parameters(own, 50), torch.from_numpy(np.random.default_rng(1).normal(0, 2, (50, 2)))
    normal = torch.distributions.Normal(p[:, :2], p[:, 2:].exp())
    to_action = torch.distributions.AffineTransform(
        torch.tensor([1.0, 2.25]).double(), torch.from_numpy(HALF)
    )
    theirs = torch.distributions.TransformedDistribution(
        normal, [torch.distributions.TanhTransform(), to_action]
    )
    action = to_action(x.tanh())
    torch.testing.assert_close(own.log_prob(p, x), theirs.log_prob(action).sum(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(own.action(x.numpy()), action.numpy(), atol=1e-6)


@pytest.mark.parametrize("log_std", [-5.0, -1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("mean", [0.0, 0.6, -3.0])
def test_squashed_entropy_and_its_gradient_by_fine_integration(mean: float, log_std: float) -> None:
    dist = of_space(spaces.Box(-1, 1, (1,), np.float32), squash=True)
    noise = torch.linspace(-9, 9, 60_001, dtype=torch.float64)
    weight = torch.exp(-(noise**2) / 2) / math.sqrt(2 * math.pi) * (noise[1] - noise[0])
    p = numbers([mean, log_std]).requires_grad_()
    x = p[:, :1] + p[:, 1:].exp() * noise[:, None]
    exact = -(dist.log_prob(p.expand(len(noise), -1), x) * weight).sum()
    (slope,) = torch.autograd.grad(exact, p)
    own = dist.entropy(p).sum()
    (own_slope,) = torch.autograd.grad(own, p)
    assert own.item() == pytest.approx(exact.item(), abs=2e-4)
    torch.testing.assert_close(own_slope, slope, rtol=0, atol=2e-3)


def test_parts_are_independent() -> None:
    dist, p = made("tuple"), parameters(made("tuple"), 6)
    box, choice = of_space(BOUNDED, squash=True), Categorical(2)
    x = torch.cat(
        [torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.ones(6, 1)], 1
    ).double()
    torch.testing.assert_close(
        dist.log_prob(p, x), box.log_prob(p[:, :4], x[:, :2]) + choice.log_prob(p[:, 4:], x[:, 2:])
    )
    torch.testing.assert_close(dist.entropy(p), box.entropy(p[:, :4]) + choice.entropy(p[:, 4:]))
    assert dist.spreads.tolist() == [False, False, True, True, False, False]


# -- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FINITE)
def test_samples_follow_the_probabilities(name: str) -> None:
    dist, count = made(name), 20_000
    p, all_of = parameters(dist, 1), outcomes(dist)
    seen = drawn(dist, p, count)
    found = (seen[:, None] == all_of).all(2).sum(0)
    assert found.sum() == count  # nothing but the outcomes
    expected = count * dist.log_prob(p.expand(len(all_of), -1), all_of).exp()
    chi = ((found - expected) ** 2 / expected).sum().item()
    freedom = len(all_of) - 1
    assert chi < freedom + 4 * math.sqrt(2 * freedom)


def test_gaussian_samples_have_their_moments() -> None:
    dist = of_space(spaces.Box(-np.inf, np.inf, (2,), np.float32))
    seen = drawn(dist, torch.tensor([[1.0, -2.0, 0.5, -1.0]]).double(), 40_000).numpy()
    std = np.exp([0.5, -1.0])
    assert np.abs(seen.mean(0) - [1, -2]).max() < (4 * std / 200).max()
    np.testing.assert_allclose(seen.std(0), std, rtol=0.02)
    assert abs(np.corrcoef(seen.T)[0, 1]) < 0.02
    assert ((seen - [1, -2]) ** 4 / std**4).mean() == pytest.approx(3, abs=0.15)


@every
def test_a_sample_is_a_function_of_the_noise(name: str) -> None:
    dist = made(name)
    p = parameters(dist, 40).float()
    noise = [dist.noise(np.random.default_rng(seed), 40) for seed in (0, 0, 1)]
    assert all(each.shape == (40, dist.width) and each.dtype == np.float32 for each in noise)
    one, same, other = (sample(dist, p, torch.from_numpy(each)) for each in noise)
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == (40, dist.width) and one.dtype == torch.float32
    half = sample(dist, p[20:], torch.from_numpy(noise[0][20:]))  # rows do not touch each other
    assert torch.equal(one[20:], half)


@every
def test_entropy_is_the_mean_surprise_of_samples(name: str) -> None:
    dist, count = made(name), 20_000
    p = parameters(dist, 1)
    surprise = -dist.log_prob(p.expand(count, -1), drawn(dist, p, count))
    error = 4 * surprise.std().item() / math.sqrt(count)
    assert dist.entropy(p).item() == pytest.approx(surprise.mean().item(), abs=error + 1e-9)


@every
def test_the_mode_is_the_most_probable_sample(name: str) -> None:
    dist = made(name)
    if SPACES[name][1]:  # the mode before tanh
        dist = of_space(SPACES[name][0])
    p = parameters(dist, 4)
    best = dist.log_prob(p, mode(dist, p))
    for row, most in zip(p, best, strict=True):
        seen = drawn(dist, row[None], 500)
        assert (dist.log_prob(row.expand(500, -1), seen) <= most + 1e-12).all()
    assert torch.equal(mode(made(name), p), mode(dist, p))


@pytest.mark.parametrize("n", [4, 9, 100])
def test_rounding_never_draws_what_has_no_probability(n: int) -> None:
    dist = Categorical(n)
    draw = torch.Generator().manual_seed(0)
    p = torch.randn(4_000, dist.n, generator=draw)
    p[
        :, -1
    ] = -200.0  # e^-200 is 0 in float32, and the other probabilities sum to a little less than 1, or more
    assert (p.softmax(1).cumsum(1)[:, -1] < LARGEST).any()
    seen = sample(dist, p, torch.full((4_000, 1), LARGEST))
    assert seen.max() == dist.n - 2


# -- divergence ------------------------------------------------------------------------------------------------------


@every
def test_kl_is_the_mean_difference_of_log_probabilities(name: str) -> None:
    dist, count = made(name), 20_000
    p, q = parameters(dist, 1, 0, 0.4), parameters(dist, 1, 1, 0.4)
    seen = drawn(dist, p, count)
    gap = dist.log_prob(p.expand(count, -1), seen) - dist.log_prob(q.expand(count, -1), seen)
    error = 4 * gap.std().item() / math.sqrt(count)
    assert dist.kl(p, q).item() == pytest.approx(gap.mean().item(), abs=error)
    assert dist.kl(p, p).item() == pytest.approx(0, abs=1e-12)
    assert (dist.kl(parameters(dist, 30, 2), parameters(dist, 30, 3)) > 0).all()


def test_kl_is_that_of_torch() -> None:
    theirs = torch.distributions
    kl = theirs.kl_divergence
    p, q = (parameters(Categorical(6), 20, seed) for seed in (0, 1))
    pairs: list[tuple[Tensor, Tensor]] = [
        (Categorical(6).kl(p, q), kl(theirs.Categorical(logits=p), theirs.Categorical(logits=q))),
        (Bernoulli((6,)).kl(p, q), kl(theirs.Bernoulli(logits=p), theirs.Bernoulli(logits=q)).sum(1)),
    ]
    normals = [theirs.Normal(of[:, :3], of[:, 3:].exp()) for of in (p, q)]
    for squash in (False, True):
        own = of_space(spaces.Box(-1, 2, (3,), np.float32), squash=squash)
        pairs.append((own.kl(p, q), kl(*normals).sum(1)))
    for own_kl, their_kl in pairs:
        torch.testing.assert_close(own_kl, their_kl, rtol=1e-10, atol=1e-10)


@every
def test_curvature_is_the_hessian_of_kl(name: str) -> None:
    dist = made(name)
    for p in parameters(dist, 2, 5):
        hessian = torch.autograd.functional.hessian(lambda q, p=p: dist.kl(p[None], q[None]).sum(), p)
        v = torch.eye(dist.parameters).double()
        own = dist.curvature(p.expand(len(v), -1), v)
        torch.testing.assert_close(own, hessian, rtol=1e-9, atol=1e-9)


@every
def test_curvature_is_the_mean_square_of_the_score(name: str) -> None:
    dist, count = made(name), 4_000
    p = parameters(dist, 1, 5, 0.3).expand(count, -1).clone().requires_grad_()
    seen = drawn(dist, p[:1].detach(), count)
    (score,) = torch.autograd.grad(dist.log_prob(p, seen).sum(), p)
    rng = np.random.default_rng(0)
    v = torch.from_numpy(rng.normal(size=dist.parameters))
    along = (score @ v).square()  # v^T score score^T v
    expected = (v * dist.curvature(p[:1].detach(), v[None])[0]).sum().item()
    assert expected == pytest.approx(along.mean().item(), abs=4 * along.std().item() / math.sqrt(count))
    assert score.mean(0).abs().max() < 0.2


# -- what the environment is given -----------------------------------------------------------------------------------


@every
def test_actions_lie_in_the_space(name: str) -> None:
    space, dist, count = SPACES[name][0], made(name), 64
    p = parameters(dist, count, size=2.0).float()
    noise = torch.from_numpy(dist.noise(np.random.default_rng(0), count))
    far = 50 if isinstance(space, spaces.Box) else 1
    for x in (sample(dist, p, noise), mode(dist, p), far * sample(dist, p, noise)):
        action = dist.action(x.numpy())
        single = list(iterate(batch_space(space, count), action))  # as SyncVectorEnv hands it out
        assert len(single) == count
        assert all(space.contains(row) for row in single)
        assert batch_space(space, count).contains(action)


def test_actions_by_hand() -> None:
    x = np.array([[-1.0, 0.0], [1.0, 0.5], [9.0, -9.0]], np.float32)
    cut, tanh = of_space(BOUNDED), of_space(BOUNDED, squash=True)
    assert cut.action(x).tolist() == [[-1, 2.25], [3, 2.375], [3, 2]]
    squashed = np.array([1.0, 2.25]) + HALF * np.tanh(x)
    np.testing.assert_allclose(tanh.action(x), squashed, atol=1e-6)
    shaped = of_space(spaces.Box(0, 1, (2, 1), np.float64)).action(x)
    assert shaped.shape == (3, 2, 1) and shaped.dtype == np.float64
    half = of_space(spaces.Box(0, np.inf, (2,), np.float32))  # one bound only: units as they are
    assert half.action(x).tolist() == [[0, 0], [1, 0.5], [9, 0]]
    assert of_space(spaces.Discrete(3, start=-2)).action(np.array([[0.0], [2.0]])).tolist() == [-2, 0]
    assert of_space(spaces.Discrete(3)).action(np.array([[1.0]])).shape == (1,)
    binary = of_space(spaces.MultiBinary((2, 2))).action(np.array([[0.0, 1, 1, 0]]))
    assert binary.tolist() == [[[0, 1], [1, 0]]] and binary.dtype == np.int8
    several = of_space(spaces.MultiDiscrete([[2, 3], [3, 2]], start=[[1, 0], [-1, 4]]))
    assert several.action(np.array([[1.0, 2, 0, 1]])).tolist() == [[[2, 2], [-1, 5]]]


def test_parts_of_a_tree_go_where_they_belong() -> None:
    dist = made("tree")
    x = np.array([[-1.0, 0.0, 1.0, 0.5, 2.0, 1.0, 0.0, 1.0, 2.0, 3.0, 0.0]], np.float32)
    assert dist.width == 11 and dist.parameters == 8 + 3 + 2 + 11
    action = dist.action(x)
    assert list(action) == ["arm", "legs", "tail"] and isinstance(action["legs"], tuple)
    assert action["arm"].tolist() == [[[-2, -0.5], [1, 0.25]]]
    assert action["legs"][0].tolist() == [1] and action["legs"][1].tolist() == [[[1], [0]]]
    assert action["tail"]["joints"].tolist() == [[[1, 3], [0, 0]]]


def test_a_number_with_equal_bounds_is_a_constant() -> None:
    box = spaces.Box(np.array([-1.0, 2.0], np.float32), np.array([1.0, 2.0], np.float32))
    for squash in (False, True):
        dist = of_space(box, squash=squash)
        p = torch.zeros(3, 4)
        x = drawn(dist, p[:1], 3)
        assert torch.isfinite(dist.log_prob(p, x)).all() and torch.isfinite(dist.entropy(p)).all()
        assert (dist.action(x.numpy())[:, 1] == 2).all()


# -- extremes --------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("size", [0.0, 20.0, 1e4])
def test_extreme_parameters_give_finite_numbers(name: str, size: float) -> None:
    dist, count = made(name), 32
    rng = np.random.default_rng(0)
    start = [torch.from_numpy(rng.choice([-size, size], (count, dist.parameters))).float() for _ in range(2)]
    spreads = torch.from_numpy(dist.spreads)
    p, q = (torch.where(spreads, each.clamp(-20, 20), each).requires_grad_() for each in start)
    x = sample(dist, p, torch.from_numpy(dist.noise(rng, count))).detach()
    for value in (dist.log_prob(p, x), dist.entropy(p), dist.kl(p, q), dist.kl(p, p)):
        assert value.shape == (count,) and torch.isfinite(value).all()
        gradients = torch.autograd.grad(value.sum(), (p, q), allow_unused=True)
        assert all(torch.isfinite(g).all() for g in gradients if g is not None)
    assert torch.isfinite(dist.curvature(p, torch.ones_like(p))).all()
    assert not dist.kl(p, p).abs().gt(1e-5).any()


def test_tiny_spreads_still_have_a_divergence() -> None:
    p = torch.tensor([[0.3, -50.0]])  # e^-100 is 0 in float32, and e^100 infinite
    assert PLAIN.kl(p, p).item() == 0
    wider = torch.tensor([[0.3, -49.0]])
    assert PLAIN.kl(p, wider).item() == pytest.approx(1 + 0.5 * math.exp(-2) - 0.5, rel=1e-5)


# -- masks -----------------------------------------------------------------------------------------------------------


def test_masked_actions_never_occur() -> None:
    dist, draw = Categorical(6), torch.Generator().manual_seed(0)
    p = torch.randn(2_000, 6, generator=draw) * 5
    mask = torch.rand(2_000, 6, generator=draw) < 0.5
    mask[:, 2] |= ~mask.any(1)
    allowed = masked(p, mask)
    rng = np.random.default_rng(0)
    for noise in (
        *(dist.noise(rng, 2_000) for _ in range(20)),
        np.zeros((2_000, 1), np.float32),
        np.full((2_000, 1), LARGEST, np.float32),
    ):
        seen = sample(dist, allowed, torch.from_numpy(noise)).long()
        assert mask.gather(1, seen).all()
    assert mask.gather(1, mode(dist, allowed).long()).all()
    assert (allowed.softmax(1)[~mask] == 0).all()


def test_masked_policy_is_the_policy_over_the_rest() -> None:
    dist, rest = Categorical(4), Categorical(2)
    p = torch.tensor([[1.0, 50.0, -0.5, 3.0]]).double().requires_grad_()
    mask = torch.tensor([[True, False, True, False]])
    few, q = p[:, [0, 2]], torch.tensor([[0.2, 7.0, 0.4, -9.0]]).double()
    allowed = masked(p, mask)
    for own, plain in [
        (dist.entropy(allowed), rest.entropy(few)),
        (dist.log_prob(allowed, torch.tensor([[2.0]])), rest.log_prob(few, torch.tensor([[1.0]]))),
        (dist.kl(allowed, masked(q, mask)), rest.kl(few, q[:, [0, 2]])),
    ]:
        torch.testing.assert_close(own, plain)
        (gradient,) = torch.autograd.grad(own, p, retain_graph=True)
        (expected,) = torch.autograd.grad(plain, p, retain_graph=True)
        torch.testing.assert_close(gradient, expected)
        assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).all()
    assert (dist.curvature(allowed, torch.ones(1, 4).double())[~mask] == 0).all()


def test_a_mask_that_allows_everything_changes_nothing() -> None:
    p = parameters(Categorical(5), 7)
    assert torch.equal(masked(p, torch.ones(7, 5, dtype=torch.bool)), p)
    one = masked(p, torch.tensor([False, True, False, False, False]).expand(7, -1))
    assert (one[:, [0, 2, 3, 4]] == NEVER).all() and Categorical(5).entropy(one).abs().max() == 0
    assert (mode(Categorical(5), one) == 1).all()


# -- refusals --------------------------------------------------------------------------------------------------------


def test_spaces_without_a_policy_are_named() -> None:
    endless = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    half = spaces.Box(0, np.inf, (2,), np.float32)
    whole = spaces.Box(0, 5, (2,), np.int64)
    for space, squash, match in [
        (spaces.Text(3), False, r"no policy draws actions of Text"),
        (spaces.Graph(spaces.Box(0, 1, (1,)), None), False, r"no policy draws actions of Graph"),
        (spaces.Sequence(spaces.Discrete(2)), False, r"no policy draws actions of Sequence"),
        (whole, False, r"no policy draws actions of Box\(0, 5, \(2,\), int64\)"),
        (spaces.Dict({}), False, r"no policy draws actions of Dict"),
        (spaces.Tuple(()), False, r"no policy draws actions of Tuple"),
        (spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Text(3)}), False, r"actions of Text"),
        (endless, True, r"--squash needs bounds, and Box\(-inf, inf.*leave it off"),
        (half, True, r"--squash needs bounds"),
        (spaces.Tuple((spaces.Discrete(2), endless)), True, r"--squash needs bounds"),
    ]:
        with pytest.raises(UserError, match=match) as caught:
            of_space(space, squash=squash)
        assert "\n" not in str(caught.value)


def test_trees_may_be_so_deep_and_no_deeper() -> None:
    space: spaces.Space[Any] = spaces.Discrete(2)
    for k in range(MOST_DEPTH):
        space = spaces.Tuple((space,)) if k % 2 else spaces.Dict({"in": space})
    assert of_space(space).parameters == 2
    with pytest.raises(UserError, match=f"nested deeper than {MOST_DEPTH}"):
        of_space(spaces.Tuple((space,)))
