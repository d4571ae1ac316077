"""RMSProp against hand-worked steps and a loop over single numbers; what it skips, clips and saves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.base import linear
from agents.optimizers import DECAY, OPTIMIZERS, Adam, RMSProp


def random(shapes: tuple[tuple[int, ...], ...], seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) for shape in shapes]


SHAPES = ((3, 2), (4,), ())


def optimizer(seed: int = 0, **how: float) -> RMSProp:
    return RMSProp(random(SHAPES, seed), **{"lr": 0.01, "eps": 1e-5, "max_norm": 1e9, **how})


def test_a_step_by_hand() -> None:
    p = torch.tensor([1.0, -2.0])
    rms = RMSProp([p], lr=0.1, eps=0.5, max_norm=100.0)
    rms.begin()
    norm = rms.step([torch.tensor([3.0, -4.0])], torch.zeros(()))
    assert norm.item() == 5
    v = [0.99 + 0.01 * 9, 0.99 + 0.01 * 16]  # v starts at 1
    assert p.tolist() == pytest.approx(
        [1 - 0.1 * 3 / math.sqrt(v[0] + 0.5), -2 + 0.1 * 4 / math.sqrt(v[1] + 0.5)]
    )
    rms.begin(lr=0.2)  # instead of the line
    before = p.tolist()
    rms.step([torch.tensor([1.0, 0.0])], torch.zeros(()))
    second = 0.99 * v[0] + 0.01
    assert p.tolist() == pytest.approx([before[0] - 0.2 / math.sqrt(second + 0.5), before[1]])
    assert DECAY == 0.99 and OPTIMIZERS == {"adam": Adam, "rmsprop": RMSProp}


def test_steps_are_those_of_a_loop_over_numbers() -> None:
    rms = optimizer(lr=0.05, lr_end=0.01, decay=15, max_norm=2.0, eps=1e-3)
    start = torch.cat([p.flatten() for p in rms.parameters]).double().tolist()
    own, v = list(start), [1.0] * len(start)
    for step in range(25):
        gradients = random(SHAPES, 100 + step)
        rms.begin()
        norm = rms.step(gradients, torch.zeros(()))
        flat = torch.cat([g.flatten() for g in gradients]).double().tolist()
        length = math.sqrt(sum(g * g for g in flat))
        assert norm.item() == pytest.approx(length, rel=1e-5)
        scale, rate = min(1.0, 2.0 / (length + 1e-6)), linear(0.05, 0.01, 15, step)
        for i, g in enumerate(flat):
            v[i] = 0.99 * v[i] + 0.01 * (scale * g) ** 2
            own[i] -= rate * scale * g / math.sqrt(v[i] + 1e-3)
    assert torch.cat([p.flatten() for p in rms.parameters]).tolist() == pytest.approx(own, abs=2e-6)
    assert np.abs(np.subtract(own, start)).min() > 1e-4  # all of them went somewhere


def test_clipping_scales_the_whole_gradient() -> None:
    clipped, scaled, free = (optimizer(max_norm=norm) for norm in (0.5, 1e9, 1e8))
    gradients = random(SHAPES, 5)
    length = torch.cat([g.flatten() for g in gradients]).norm()
    for each, factor in ((clipped, 1.0), (scaled, 0.5 / (length + 1e-6)), (free, 1.0)):
        each.begin()
        assert each.step([g * factor for g in gradients], torch.zeros(())).item() == pytest.approx(
            (length * factor).item()
        )
    torch.testing.assert_close(clipped.parameters, scaled.parameters)
    assert not torch.allclose(clipped.parameters[0], free.parameters[0])
    small = optimizer(max_norm=2 * float(length))  # a gradient within the limit stays as it is
    small.begin()
    small.step(gradients, torch.zeros(()))
    assert all(map(torch.equal, small.parameters, free.parameters))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["adam", "rmsprop"])
def test_a_step_that_is_not_finite_is_none(kind: str, bad: float) -> None:
    how = dict(lr=0.01, eps=1e-5, max_norm=1.0)
    own, twin = (OPTIMIZERS[kind](random(SHAPES, 0), **how) for _ in range(2))
    fine, broken = random(SHAPES, 1), random(SHAPES, 1)
    broken[1][2] = bad
    zero = torch.zeros(())
    for each in (own, twin):
        each.begin()
        each.step(fine, zero)
    for gradients, loss in ((broken, zero), (fine, torch.tensor(bad)), (broken, torch.tensor(bad))):
        own.begin()
        norm = own.step(gradients, loss)
        assert math.isfinite(norm.item()) == (gradients is fine)
        assert all(map(torch.equal, own.parameters, twin.parameters))
        assert all(map(torch.equal, own.second, twin.second))
        assert all(map(torch.equal, own.first, twin.first))
    assert [float(n) for n in (own.skipped, own.in_row, own.longest)] == [3, 3, 3]
    own.begin()
    own.step(fine, zero)
    assert [float(n) for n in (own.skipped, own.in_row, own.longest)] == [3, 0, 3]
    assert not torch.equal(own.parameters[0], twin.parameters[0])
    own.begin()
    own.step(broken, zero)
    assert [float(n) for n in (own.skipped, own.in_row, own.longest)] == [4, 1, 3]


def test_no_parameter_is_moved_by_a_zero_gradient() -> None:
    rms = optimizer()
    before = [p.clone() for p in rms.parameters]
    rms.begin()
    assert rms.step([torch.zeros_like(p) for p in before], torch.zeros(())) == 0
    assert all(map(torch.equal, rms.parameters, before))


def test_a_saved_state_goes_on_bit_by_bit() -> None:
    how = dict(lr=0.05, lr_end=0.0, decay=30, max_norm=1.0)
    whole, part = optimizer(**how), optimizer(**how)

    def go(rms: RMSProp, steps: range) -> None:
        for step in steps:
            gradients = random(SHAPES, step)
            if step == 4:
                gradients[0][0] = math.nan
            rms.begin()
            rms.step(gradients, torch.zeros(()))

    go(whole, range(12))
    go(part, range(7))
    state = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    assert set(state) == {"count", "skipped", "in_row", "longest", *(f"second.{i}" for i in range(3))}
    resumed = optimizer(1, **how)
    for p, kept in zip(resumed.parameters, part.parameters, strict=True):
        p.copy_(kept)
    resumed.load_state_dict(state)
    go(resumed, range(7, 12))
    assert all(map(torch.equal, resumed.parameters, whole.parameters))
    own, other = resumed.state_dict(), whole.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    assert float(own["skipped"]) == 1 and int(own["count"]) == 12
    del state["second.1"]
    with pytest.raises(KeyError, match=r"second\.1"):
        optimizer().load_state_dict(state)
