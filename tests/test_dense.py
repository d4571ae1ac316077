"""Dense nets in numpy are the same functions as in torch, and follow their weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from agents.dqn import QNet
from backbones import CNN, MLP
from backbones.compute import Compute, copy_weights
from backbones.dense import MOST, SINGLE, in_numpy
from tests.tools import batch_of, built


def observations(rows: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, 3)).astype(np.float32) * 3


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("knobs", [{}, {"activation": "tanh"}, {"norm": True}, {"hidden": (5,)}])
def test_the_same_function(knobs: dict, rows: int) -> None:
    torch.manual_seed(0)
    net = QNet(MLP((3,), **{"hidden": (32, 16), **knobs}), 4)
    quick, obs = net.quick(), observations(rows)
    assert quick is not None
    with torch.no_grad():
        np.testing.assert_allclose(quick(obs), net(torch.from_numpy(obs)).numpy(), rtol=2e-5, atol=2e-6)
    assert quick(obs).dtype == np.float32


def test_it_follows_its_weights() -> None:
    net, other = (MLP((3,), hidden=(8,)) for _ in range(2))
    quick, obs = net.quick(), observations(2)
    assert quick is not None
    before = quick(obs)
    copy_weights(other, net, 0.5)
    half = quick(obs)
    net.load_state_dict(other.state_dict())
    with torch.no_grad():
        np.testing.assert_allclose(quick(obs), other(torch.from_numpy(obs))[0].numpy(), rtol=1e-5, atol=1e-6)
    assert not np.allclose(before, half) and not np.allclose(half, quick(obs))


@pytest.mark.parametrize(
    "net",
    [
        MLP((3,), activation="gelu"),
        MLP(spaces.Discrete(4)),
        MLP(spaces.Dict(a=spaces.Box(0, 1, (2,)))),
        MLP(spaces.Box(0, 255, (6,), np.uint8)),
        CNN((1, 16, 16)),
    ],
)
def test_what_is_not_known_is_left_to_torch(net: nn.Module) -> None:
    assert net.quick() is None


def test_heads_with_parts_are_left_to_torch() -> None:
    for parts in ({"dueling": "mean"}, {"noisy": "factorised"}, {"atoms": 3}):
        assert QNet(MLP((3,)), 2, **parts).quick() is None
    assert in_numpy([nn.Linear(2, 2, bias=False)]) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tau", [0.5, 1.0])
@pytest.mark.parametrize("acting", ["online", "target"])
def test_an_agent_acts_with_the_weights_it_has_learned(acting: str, tau: float, precision: str) -> None:
    compute = Compute("cpu", precision, 1, False)
    agent, batch = built(acting=acting, target_every=2, tau=tau, lr=1e-2, compute=compute), batch_of(8)
    for _ in range(5):
        agent.update(batch)
        obs = observations(16)
        with torch.no_grad():
            net = agent.online if acting == "online" else agent.target
            expected = net(torch.from_numpy(obs)).numpy()
        np.testing.assert_allclose(agent.values(obs), expected, rtol=2e-5, atol=2e-6)
        # more observations than that go through torch
        rough = 2e-5 if precision == "fp32" else 0.05
        np.testing.assert_allclose(
            agent.values(np.tile(obs, (MOST, 1)))[:16], expected, rtol=rough, atol=rough
        )


def test_large_nets_take_few_observations() -> None:
    rows = [MLP((3,), hidden=(width, width)).quick().rows for width in (16, 256, 512)]  # type: ignore[union-attr]
    assert rows == [MOST, SINGLE // 256**2, 1]
    assert MLP((3,), hidden=(1_024, 1_024)).quick() is None
