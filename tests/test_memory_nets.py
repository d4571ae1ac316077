"""Contracts of the nets that remember: resets, states, gradients through time; and their equations."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from backbones import (
    CNN,
    FEEDFORWARD,
    GRU,
    LSTM,
    MEMORY,
    MLP,
    RNN,
    Backbone,
    Transformer,
    Window,
    build,
    starts,
)
from backbones.memory import ages
from backbones.recurrent import GOLDEN, lstm_cell, normal, pieces, splitmix
from backbones.transformer import Gate, near, sinusoids
from runs.config import UserError
from tests.test_backbones import complaint, each, observe

IMAGE = spaces.Box(0, 255, (2, 9, 8), np.uint8)
VECTOR = spaces.Box(-10, 10, (5,))
DICT = spaces.Dict({"image": IMAGE, "vector": spaces.Box(-1, 1, (3,)), "gear": spaces.Discrete(4)})
SPACES: dict[str, tuple[spaces.Space[Any], dict[str, Any]]] = {
    "vector": (VECTOR, {"hidden": (7,), "activation": "tanh"}),
    "image": (IMAGE, {"net": "minatar", "features": 6}),
    "dict": (DICT, {"encoder": "mlp", "hidden": (6,), "activation": "tanh"}),
}
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("window", {"window": 3}),
    "window-1": ("window", {"window": 1}),
    **{
        f"{name}-{start}-{layers}": (name, {"width": 8, "start": start, "layers": layers})
        for name, layers in (("rnn", 1), ("gru", 2), ("lstm", 1), ("lstm", 2))
        for start in ("zero", "normal", "learned")
    },
    **{
        f"transformer-{positions}{'-gate' * gate}": (
            "transformer",
            {"width": 8, "heads": 2, "context": 4, "positions": positions, "gate": gate},
        )
        for positions, gate in (("relative", True), ("sinusoidal", False), ("learned", False))
    },
    "transformer-short": ("transformer", {"width": 6, "heads": 1, "context": 2, "layers": 1}),
}
T, B = 9, 3
RESETS = {
    "none": None,
    "never": [],
    "start": [(0, 0), (0, 1), (0, 2)],
    "middle": [(4, 1)],
    "some": [(0, 1), (3, 0), (4, 0), (4, 2), (8, 2)],
    "everywhere": list(itertools.product(range(T), range(B))),
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def make(name: str, where: str = "vector", **knobs: Any) -> tuple[Backbone, spaces.Space[Any]]:
    backbone, own = NETS[name]
    space, below = SPACES[where]
    net = build(backbone, space, **{**below, **own, **knobs})
    if "learned" in name and backbone != "transformer":
        nn.init.normal_(net.learned)  # 0 at first, which would hide a mistake
    return net, space


def resets(name: str) -> Tensor | None:
    where = RESETS[name]
    if where is None:
        return None
    first = torch.zeros(T, B, dtype=torch.bool)
    for t, b in where:
        first[t, b] = True
    return first


def stepwise(net: Backbone, obs: Any, state: Any, first: Tensor | None) -> tuple[Tensor, Any]:
    parts = []
    for t in range(T):
        y, state = net(each(obs, lambda leaf, t=t: leaf[t]), state, None if first is None else first[t])
        parts.append(y)
    return torch.stack(parts), state


def remembered(net: Backbone, space: spaces.Space[Any]) -> Any:
    """A state that is not an initial one, as a leaf of the graph."""
    _, state = net(observe(space, 5, B, seed=1), (), None)
    return tuple(part.detach().clone().requires_grad_(part.is_floating_point()) for part in state)


def loss_of(y: Tensor, state: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    parts = [y, *(part for part in state if part.is_floating_point())]
    return sum(
        ((part * torch.randn(part.shape, generator=generator)).sum() for part in parts), torch.tensor(0.0)
    )


# -- contracts -----------------------------------------------------------------------------------------------


def test_every_net_with_memory_is_here() -> None:
    assert {name for name, _ in NETS.values()} == set(MEMORY)
    assert all(make(name)[0].memory for name in NETS)
    assert not any(build(name, IMAGE).memory for name in FEEDFORWARD)


@pytest.mark.parametrize("when", list(RESETS))
@pytest.mark.parametrize("where", list(SPACES))
@pytest.mark.parametrize("name", list(NETS))
def test_a_pass_is_its_single_steps(name: str, where: str, when: str) -> None:
    net, space = make(name, where)
    obs, first, state = observe(space, T, B), resets(when), remembered(net, space)
    whole, after = net(obs, state, first)
    single, end = stepwise(net, obs, state, first)
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, end, rtol=1e-4, atol=1e-5)

    wanted = [*net.parameters(), *(part for part in state if part.requires_grad)]
    gradients = [
        torch.autograd.grad(loss_of(y, s), wanted, allow_unused=True, materialize_grads=True)
        for y, s in ((whole, after), (single, end))
    ]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", list(NETS))
def test_states(name: str) -> None:
    net, space = make(name)
    state = net.initial(B)
    assert state and all(len(part) == B and part.dtype in (torch.float32, torch.int64) for part in state)
    for obs, first in (
        (observe(space, B), torch.zeros(B, dtype=torch.bool)),
        (observe(space, T, B), resets("some")),
    ):
        y, after = net(obs, (), first)
        assert y.shape == (*first.shape, net.features)
        assert [part.shape for part in after] == [part.shape for part in state]
        assert [part.dtype for part in after] == [part.dtype for part in state]
        same, again = net(obs, state, first)
        assert torch.equal(y, same) and all(map(torch.equal, after, again))  # () is initial(B)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("window", [(B, 2, 7)]),
        ("rnn-zero-1", [(B, 1, 1, 8)]),
        ("gru-learned-2", [(B, 1, 2, 8)]),
        ("lstm-zero-2", [(B, 2, 2, 8)]),
        ("lstm-normal-1", [(B, 2, 1, 8), (B,)]),
        ("transformer-relative-gate", [(B, 2, 2, 3, 8), (B,)]),
    ],
)
def test_shapes_of_states(name: str, shapes: list[tuple[int, ...]]) -> None:
    assert [tuple(part.shape) for part in make(name)[0].initial(B)] == shapes


@pytest.mark.parametrize("name", list(NETS))
def test_nothing_is_kept_on_the_module(name: str) -> None:
    net, space = make(name)
    before = copy.deepcopy(net.state_dict())
    names = {id(module): set(vars(module)) for module in net.modules()}
    obs, first = observe(space, T, B), resets("some")
    y, state = net(obs, (), first)
    kept = [part.clone() for part in state]
    net(observe(space, T, B, seed=5), state, first)  # neither a call between nor its state leaves a trace
    assert torch.equal(net(obs, (), first)[0], y) and all(map(torch.equal, state, kept))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert {id(module): set(vars(module)) for module in net.modules()} == names


@pytest.mark.parametrize("name", list(NETS))
def test_passes_in_a_row_are_one_pass(name: str) -> None:
    net, space = make(name)
    obs, first = observe(space, T, B), resets("some")
    whole, end = net(obs, (), first)
    state, parts = (), []
    for some in (slice(0, 2), slice(2, 7), slice(7, 9)):
        y, state = net(obs[some], state, first[some])
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(NETS))
def test_what_reaches_a_step(name: str) -> None:
    """The steps of its own episode up to now, and nothing else."""
    net, space = make(name)
    obs, first = observe(space, T, B).requires_grad_(), resets("some")
    y, _ = net(obs, (), first)
    depth = {"window": 2, "window-1": 0, "transformer-short": 1}  # steps back; else two layers of three each
    far = depth.get(name, 2 * 3 if "transformer" in name else T)
    for t, b in itertools.product(range(T), range(B)):
        (gradient,) = torch.autograd.grad(y[t, b].square().sum(), obs, retain_graph=True)
        begin = max([s for s in range(t + 1) if first[s, b]], default=0)
        seen = gradient.abs().sum(2) > 0
        assert torch.equal(seen[:, b].nonzero()[:, 0], torch.arange(max(begin, t - far), t + 1))
        assert not seen[:, [other for other in range(B) if other != b]].any()


@pytest.mark.parametrize("name", [name for name in NETS if "normal" not in name])
def test_an_episode_begins_as_if_nothing_had_been(name: str) -> None:
    net, space = make(name)
    obs, first = observe(space, T, B), resets("middle")
    first[4] = True
    with torch.no_grad():
        y, _ = net(obs, remembered(net, space), first)
        torch.testing.assert_close(y[4:], net(obs[4:])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(NETS))
def test_every_parameter_gets_a_gradient(name: str) -> None:
    net, space = make(name)
    loss_of(*net(observe(space, T, B), (), resets("some"))).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


@pytest.mark.parametrize("name", list(NETS))
def test_the_seed_decides(name: str) -> None:
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        net, space = make(name)
        results.append(net(observe(space, T, B), (), resets("some")))
    (one, state), (two, same), (other, _) = results
    assert torch.equal(one, two) and all(map(torch.equal, state, same)) and not torch.equal(one, other)


@pytest.mark.parametrize("name", list(NETS))
def test_save_load_and_deepcopy(name: str, tmp_path: Path) -> None:
    (net, space), (other, _) = make(name), make(name)
    obs, first = observe(space, T, B), resets("some")
    y, state = net(obs, (), first)
    assert not torch.equal(other(obs, (), first)[0], y)
    net.save(tmp_path / "net.safetensors")
    for twin in (other.load(tmp_path / "net.safetensors"), copy.deepcopy(net)):
        same, after = twin(obs, (), first)
        assert torch.equal(y, same) and all(map(torch.equal, state, after))
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
        assert not torch.equal(twin(obs, (), first)[0], y)
    assert torch.equal(net(obs, (), first)[0], y)


@pytest.mark.parametrize("name", list(NETS))
def test_autocast(name: str) -> None:
    """The encoder in bf16; what is carried in fp32, so that a pass is its steps here too."""
    net, space = make(name)
    obs, first, state = observe(space, T, B), resets("some"), remembered(net, space)
    exact, _ = net(obs, state, first)
    with torch.autocast("cpu", torch.bfloat16):
        rough, after = net(obs, state, first)
        steps, _ = stepwise(net, obs, state, first)
    assert (rough - exact).norm() <= 0.05 * exact.norm() and not torch.equal(rough, exact)
    assert all(part.dtype in (torch.float32, torch.int64) for part in after)
    torch.testing.assert_close(rough, steps, rtol=1e-4, atol=1e-5)
    rough.sum().backward()


@pytest.mark.parametrize("name", list(NETS))
def test_acting_needs_no_gradients(name: str) -> None:
    net, space = make(name)
    with torch.inference_mode():
        y, state = net(observe(space, B), (), torch.ones(B, dtype=torch.bool))
        assert torch.equal(
            net(observe(space, B), state)[0], net(observe(space, B), state, torch.zeros(B).bool())[0]
        )
    assert y.isfinite().all()


# -- the encoder below ---------------------------------------------------------------------------------------


def test_the_encoder_is_chosen_by_the_observation() -> None:
    for name in MEMORY:
        assert type(build(name, VECTOR).encoder) is MLP and type(build(name, (3,)).encoder) is MLP
        assert type(build(name, IMAGE).encoder) is CNN and type(build(name, DICT).encoder) is CNN
        assert type(build(name, IMAGE, encoder="mlp", hidden=(4,)).encoder) is MLP


def test_an_encoder_by_name_takes_its_knobs_and_an_object_is_taken_as_it_is() -> None:
    net = LSTM(IMAGE, width=8, net="light", features=20, norm=True)
    assert net.features == 8 and net.encoder.features == 20 and net.layers.input_size == 20
    encoder = CNN(IMAGE, net="minatar")
    for kind in (LSTM, Window, Transformer):
        assert kind(IMAGE, encoder=encoder).encoder is encoder
    assert Window(VECTOR, window=5, hidden=(4,)).features == 20


def test_feature_maps_are_those_of_the_encoder() -> None:
    obs = observe(IMAGE, 2)
    for name in MEMORY:
        net = build(name, IMAGE, net="light")
        maps = net.maps(obs, ("conv1",))
        assert list(maps) == ["conv1"] and torch.equal(maps["conv1"], net.encoder.maps(obs)["conv1"])


@pytest.mark.parametrize("name", MEMORY)
def test_mistakes_about_the_encoder(name: str) -> None:
    wrong = complaint(build, name, IMAGE, encoder="cmn")
    assert wrong == "unknown encoder 'cmn'. Did you mean 'cnn'? Allowed: cnn, mlp."
    assert complaint(build, name, IMAGE, encoder="gru").startswith("unknown encoder 'gru'")
    assert "got GRU" in complaint(build, name, IMAGE, encoder=GRU(IMAGE))
    assert complaint(build, name, IMAGE, nett="light").startswith(
        "unknown setting 'nett'. Did you mean 'net'?"
    )
    assert "give it to MLP(...)" in complaint(build, name, VECTOR, encoder=MLP(VECTOR), norm=True)
    assert "needs an image" in complaint(build, name, VECTOR, encoder="cnn")


def test_mistakes() -> None:
    assert complaint(Transformer, VECTOR, width=10, heads=4) == "--heads must divide --width 10, got 4"
    assert "Did you mean 'relative'?" in complaint(Transformer, VECTOR, positions="relativ")
    assert complaint(Transformer, VECTOR, context=1) == "--context must be a whole number >= 2, got 1"
    assert complaint(Window, VECTOR, window=0) == "--window must be a whole number >= 1, got 0"
    for kind in (RNN, GRU, LSTM):
        assert "Did you mean 'normal'?" in complaint(kind, VECTOR, start="norma")
        assert complaint(kind, VECTOR, layers=0) == "--layers must be a whole number >= 1, got 0"
        assert complaint(kind, VECTOR, width=0) == "--width must be a whole number >= 1, got 0"
    with pytest.raises(UserError, match=r"unknown backbone 'lstn'\. Did you mean 'lstm'"):
        build("lstn", VECTOR)


# -- window --------------------------------------------------------------------------------------------------


def test_a_window_by_hand() -> None:
    net = Window((1,), encoder=Mirror(), window=3)
    obs = torch.arange(1.0, 7).reshape(6, 1, 1)
    first = torch.tensor([True, False, False, False, True, False])[:, None]
    y, (past,) = net(obs, (), first)
    assert y[:, 0].tolist() == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 0, 5], [0, 5, 6]]
    assert past.tolist() == [[[5], [6]]]
    y, (past,) = net(torch.tensor([[[7.0]]]), (past,))
    assert y.tolist() == [[[5, 6, 7]]]


class Mirror(Backbone):
    """Features that are the observation."""

    features = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, obs: Any, state: Any = (), first: Tensor | None = None) -> tuple[Tensor, Any]:
        return obs * self.weight, state


# -- recurrent -----------------------------------------------------------------------------------------------


def test_the_lstm_cell_by_hand() -> None:
    """With sigma(ln 3) = 3/4, sigma(-ln 3) = 1/4, sigma(0) = 1/2 and tanh(ln 3) = 8/10."""
    ln3 = math.log(3)
    w_x = torch.tensor([[ln3], [0.0], [0.0], [0.0]])  # i f c o: the input gate by x = 1
    w_h = torch.tensor([[0.0], [0.0], [2 * ln3], [0.0]])  # what is new by h = 1/2
    b_x, b_h = torch.tensor([0.0, 0.0, 0.0, -2 * ln3]), torch.tensor([0.0, 0.0, 0.0, ln3])
    h, c = lstm_cell(torch.ones(1, 1), torch.tensor([[0.5]]), torch.tensor([[0.4]]), w_x, w_h, b_x, b_h)
    assert c.item() == pytest.approx(0.5 * 0.4 + 0.75 * 0.8)
    assert h.item() == pytest.approx(0.25 * math.tanh(0.8))


@pytest.mark.parametrize("when", ["none", "some", "everywhere"])
def test_the_lstm_is_its_equations(when: str) -> None:
    net, space = make("lstm-learned-1")
    obs, first, state = observe(space, T, B), resets(when), remembered(net, space)
    whole, (memory,) = net(obs, state, first)
    weights = (net.layers.weight_ih_l0, net.layers.weight_hh_l0, net.layers.bias_ih_l0, net.layers.bias_hh_l0)
    x, (h, c), outputs = net.encoder(obs)[0], state[0][:, :, 0].unbind(1), []
    for t in range(T):
        if first is not None:
            h, c = (torch.where(first[t, :, None], net.learned[i, 0], part) for i, part in enumerate((h, c)))
        h, c = lstm_cell(x[t], h, c, *weights)
        outputs.append(h)
    torch.testing.assert_close(whole, torch.stack(outputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(memory[:, :, 0], torch.stack([h, c], 1), rtol=1e-4, atol=1e-5)
    draw = torch.randn(whole.shape)
    for one, two in zip(
        torch.autograd.grad((whole * draw).sum(), weights),
        torch.autograd.grad((torch.stack(outputs) * draw).sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_rnn_and_gru_are_their_equations() -> None:
    x, h = torch.randn(2, 3), torch.randn(2, 4)
    for kind, gates in ((RNN, 1), (GRU, 3)):
        net = kind((3,), encoder=MLP((3,), hidden=(3,)), width=4)
        weights = [torch.randn_like(weight) for weight in net.layers.all_weights[0]]
        of_x, of_h = x @ weights[0].T + weights[2], h @ weights[1].T + weights[3]
        if gates == 1:
            expected = (of_x + of_h).tanh()
        else:
            (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.chunk(3, 1), of_h.chunk(3, 1)
            z, new = (x_z + h_z).sigmoid(), (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
            expected = (1 - z) * new + z * h
        torch.testing.assert_close(net.cell(x, h[:, None], weights)[:, 0], expected)


@pytest.mark.parametrize(("kind", "gates"), [(RNN, 1), (GRU, 3), (LSTM, 4)])
def test_the_first_weights(kind: Any, gates: int) -> None:
    net = kind((3,), width=5, layers=2, hidden=(4,))
    for weights in net.layers.all_weights:
        for gate in weights[1].chunk(gates):
            torch.testing.assert_close(gate @ gate.T, torch.eye(5), rtol=0, atol=1e-5)
        ones = [5 <= i < 10 for i in range(20)] if kind is LSTM else [False] * gates * 5
        assert (weights[2] + weights[3]).tolist() == [float(one) for one in ones]


def test_pieces_by_hand() -> None:
    first = torch.tensor([[0, 1], [0, 0], [1, 0], [1, 0]], dtype=torch.bool)  # (T, B) = (4, 2)
    found = pieces(first)
    assert found.at.tolist() == [0, 4, 6, 1] and found.length.tolist() == [2, 1, 1, 4]
    assert found.row.tolist() == [0, 0, 0, 1] and found.number.tolist() == [0, 1, 2, 0]
    assert found.last.tolist() == [2, 3]


@pytest.mark.parametrize("steps", [1, 2, 7, 16, 37])
def test_pieces_of_any_length(steps: int) -> None:
    net = GRU((3,), width=4, hidden=(5,))
    obs = torch.randn(steps, 4, 3)
    first = torch.rand(steps, 4) < 0.2
    first[-1, 0] = True
    state, parts = net.initial(4), []
    for t in range(steps):
        y, state = net(obs[t], state, first[t])
        parts.append(y)
    whole, end = net(obs, (), first)
    torch.testing.assert_close(whole, torch.stack(parts), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end, state, rtol=1e-4, atol=1e-5)


def test_how_memories_start() -> None:
    (zero,) = make("lstm-zero-2")[0].initial(B)
    assert not zero.any()
    net, space = make("lstm-learned-2")
    (learned,) = net.initial(B)
    assert torch.equal(learned, net.learned.expand(B, -1, -1, -1))
    (gradient,) = torch.autograd.grad(learned.sum(), net.learned)
    assert torch.equal(gradient, torch.full_like(gradient, B))
    assert not LSTM((3,), start="learned").learned.any()  # it starts from 0 and learns from there
    net, space = make("lstm-normal-2")
    memory, keys = net.initial(100)
    assert len(keys.unique()) == 100 and len(memory[:, 0, 0, 0].unique()) == 100
    _, (_, same) = net(observe(space, 100), (memory, keys), torch.arange(100) > 0)
    assert torch.equal(same, keys + GOLDEN * (torch.arange(100) > 0))


def test_normal_starts_are_normal() -> None:
    draws = normal(splitmix(torch.arange(2000)), 51).double()
    assert draws.shape == (2000, 51) and draws.isfinite().all()
    n = draws.numel()
    moments = [(draws**power).mean().item() for power in (1, 2, 3, 4)]
    for moment, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(moment - expected) < 4 * math.sqrt(variance / n)
    correlation = torch.corrcoef(draws.T) - torch.eye(51, dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(2000)
    between = (draws[:-1] * draws[1:]).mean().item()
    assert abs(between) < 4 / math.sqrt(n)
    assert torch.equal(normal(torch.tensor([7]), 6), normal(torch.tensor([3, 7]), 6)[1:])


def test_a_normal_start_is_new_in_each_episode() -> None:
    net, space = make("lstm-normal-1")
    obs = observe(space, B).expand(T, B, -1)
    y, _ = net(obs, (), torch.ones(T, B, dtype=torch.bool))
    assert len(y[:, :, 0].unique()) == T * B


def test_splitmix64() -> None:
    """The published numbers of the seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    counters = torch.tensor(1234567) + torch.arange(1, 5) * GOLDEN
    assert [number % 2**64 for number in splitmix(counters).tolist()] == published


# -- transformer ---------------------------------------------------------------------------------------------

TRANSFORMERS = [name for name in NETS if "transformer" in name]


def test_ages() -> None:
    first = torch.tensor([[0, 1], [0, 0], [1, 0], [0, 0]], dtype=torch.bool)
    assert ages(first, torch.tensor([5, 3])).T.tolist() == [[5, 6, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("when", list(RESETS))
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_attention(name: str, when: str) -> None:
    net, space = make(name)
    if net.positions == "relative":
        nn.init.normal_(net.table)
    obs, first = observe(space, T, B), resets(when)
    weights = net.attention(obs, (), first)
    heads = net.layers[0].heads
    assert weights.shape == (T, B, len(net.layers), heads, net.context)
    torch.testing.assert_close(weights.sum(4), torch.ones(weights.shape[:4]))  # all that it gives: none ahead
    for t, b, back in itertools.product(range(T), range(B), range(net.context)):
        begin = max([s for s in range(t + 1) if first is not None and first[s, b]], default=0)
        assert (weights[t, b, :, :, back] > 0).all() == (t - back >= begin)
        assert weights[t, b, :, :, back].any() == (t - back >= begin)
    state = ()
    for t in range(T):
        now = None if first is None else first[t]
        torch.testing.assert_close(net.attention(obs[t], state, now), weights[t], rtol=1e-4, atol=1e-5)
        _, state = net(obs[t], state, now)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_transformer_is_its_equations(name: str) -> None:
    """One query, one head and one step at a time, without mask or cache."""
    net, space = make(name)
    if net.positions == "relative":
        nn.init.normal_(net.table)
    obs = observe(space, T, 1)
    x = net.embed(net.encoder(obs)[0])[:, 0]  # (T, D)
    if net.positions == "sinusoidal":
        x = x + sinusoids(torch.arange(T), x.shape[1])
    if net.positions == "learned":
        x = torch.stack([x[t] + net.table[t % net.context] for t in range(T)])
    for layer in net.layers:
        normed = layer.norms[0](x)
        q, (k, v) = layer.query(normed), layer.key_value(normed).chunk(2, 1)
        size, rows = x.shape[1] // layer.heads, []
        for t in range(T):
            row = []
            for head in range(layer.heads):
                part = slice(head * size, (head + 1) * size)
                seen = range(max(0, t - net.context + 1), t + 1)
                scores = [q[t, part] @ k[s, part] / math.sqrt(size) for s in seen]
                if net.positions == "relative":
                    scores = [score + net.table[head, t - s] for score, s in zip(scores, seen, strict=True)]
                share = torch.stack(scores).softmax(0)
                row.append(sum(share[i] * v[s, part] for i, s in enumerate(seen)))
            rows.append(torch.cat(row))
        x = layer.joins[0](x, layer.out(torch.stack(rows)))
        x = layer.joins[1](x, layer.dense(layer.norms[1](x)))
    torch.testing.assert_close(net(obs)[0][:, 0], net.norm(x), rtol=1e-4, atol=1e-5)


def test_a_pass_may_be_longer_than_the_context_and_shorter() -> None:
    net = Transformer((3,), width=4, heads=2, context=5, hidden=(4,))
    obs = torch.randn(17, 2, 3)
    whole, end = net(obs)
    for cut in (1, 3, 5, 12):
        y, state = net(obs[:cut])
        rest, state = net(obs[cut:], state)
        torch.testing.assert_close(torch.cat([y, rest]), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state, end, rtol=1e-4, atol=1e-5)
        assert state[1].tolist() == [17, 17]


def test_the_gate_by_hand() -> None:
    gate = Gate(1)
    for weight in gate.parameters():
        nn.init.ones_(weight)
    nn.init.constant_(gate.bias, 2.0)
    x, y = 0.5, 0.25
    r, z = 1 / (1 + math.exp(-(y + x))), 1 / (1 + math.exp(-(y + x - 2)))
    expected = (1 - z) * x + z * math.tanh(y + r * x)
    assert gate(torch.tensor([x]), torch.tensor([y])).item() == pytest.approx(expected)
    assert (
        gate(torch.tensor([x]), torch.tensor([-3.0])).item() == gate(torch.tensor([x]), torch.zeros(1)).item()
    )
    assert torch.equal(Gate(3).bias, torch.full((3,), 2.0))


def test_sinusoids_by_hand() -> None:
    found = sinusoids(torch.tensor([0, 3]), 4)
    expected = [[0, 0, 1, 1], [math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert sinusoids(torch.tensor([1_000_000]), 5).shape == (1, 5)


def test_a_new_net_looks_near() -> None:
    """ALiBi's slopes for two heads, and that a net begins with them: the newest step weighs most."""
    torch.testing.assert_close(near(2, 3), torch.tensor([[0, -1 / 16, -2 / 16], [0, -1 / 256, -2 / 256]]))
    net = Transformer((3,), width=8, heads=2, context=4, layers=1, hidden=(4,))
    nn.init.zeros_(net.layers[0].query.weight)  # type: ignore[union-attr]  # a _Layer
    nn.init.zeros_(net.layers[0].query.bias)  # type: ignore[union-attr]
    weights = net.attention(torch.randn(4, 1, 3))[-1, 0, 0]  # (H, K)
    torch.testing.assert_close(weights, near(2, 4).softmax(1))


def test_starts_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The experiment in small: the same seed gives the same bits; a net that starts anywhere needs no reset."""
    monkeypatch.setattr(starts, "UPDATES", 300)
    monkeypatch.setattr(starts, "SEEDS", range(1))
    assert starts.main(["--out", str(tmp_path)]) == 0
    header, *rows = (tmp_path / "starts.csv").read_text().splitlines()
    first = dict(zip(header.split(","), map(float, rows[0].split(",")), strict=True))
    assert len(rows) == starts.STEPS and (tmp_path / "starts.png").stat().st_size > 10_000
    assert first["normal no reset"] < 0.7 * min(first["zero no reset"], first["learned no reset"])
    assert first["normal reset"] > first["zero reset"]
    again = starts.errors(starts.trained("zero", 0), reset=True)
    assert f"{again[0]:.6f}" == f"{first['zero reset']:.6f}"
    capsys.readouterr()
    (tmp_path / "file").touch()
    assert starts.main(["--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot write to")


def test_positions_matter() -> None:
    """Without them attention would not know the order of what it sees."""
    for positions in ("relative", "sinusoidal", "learned"):
        net = Transformer((3,), width=8, context=8, layers=1, positions=positions, hidden=(4,))
        nn.init.normal_(net.table) if positions != "sinusoidal" else None
        obs = torch.randn(5, 1, 3)
        swapped = obs[[1, 0, 2, 3, 4]]
        assert not torch.allclose(net(obs)[0][4], net(swapped)[0][4], rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("window", {"window": 4}),
        *((name, knobs) for name in ("rnn", "gru", "lstm") for knobs in ({"width": 12}, {"layers": 2})),
        *((name, {"start": "normal"}) for name in ("rnn", "gru", "lstm")),
        *(
            ("transformer", knobs)
            for knobs in (
                {"width": 12},
                {"layers": 3},
                {"heads": 4},
                {"context": 3},
                {"positions": "sinusoidal"},
                {"positions": "learned"},
                {"gate": True},
            )
        ),
    ],
)
def test_every_knob_is_live(name: str, knobs: dict[str, Any]) -> None:
    plain: dict[str, Any] = {
        "window": {"window": 3},
        "transformer": {"width": 8, "heads": 2, "layers": 2, "context": 5},
    }.get(name, {"width": 8})
    results = []
    for changed in ({}, knobs):
        torch.manual_seed(1)
        results.append(
            build(name, VECTOR, encoder="mlp", hidden=(6,), **{**plain, **changed})(observe(VECTOR, T, B))[0]
        )
    assert results[0].shape != results[1].shape or not torch.equal(*results)
