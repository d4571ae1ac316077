"""Contracts that every backbone keeps, and the rules by which observations become tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

import backbones
from backbones import BACKBONES, CNN, MLP, Backbone, build
from backbones.cnn import WIDTH
from backbones.mlp import ACTIVATIONS
from backbones.obs import Encoder
from runs.config import UserError

IMAGE = spaces.Box(0, 255, (4, 20, 16), np.uint8)
MIXED = spaces.Dict({"image": IMAGE, "vector": spaces.Box(-1, 1, (3,)), "gear": spaces.Discrete(4)})
VECTOR = spaces.Box(-10, 10, (5,))

# what is built, on which space; every name of BACKBONES must be there. More of those that remember: test_memory_nets.py
CASES: dict[str, tuple[str, spaces.Space[Any], dict[str, Any]]] = {
    "mlp": ("mlp", VECTOR, {}),
    "mlp-norm": ("mlp", VECTOR, {"hidden": (7, 9), "norm": True, "activation": "tanh"}),
    "mlp-image": ("mlp", IMAGE, {"hidden": (32,)}),
    "mlp-dict": ("mlp", MIXED, {"hidden": (32,), "activation": "gelu"}),
    **{
        f"cnn-{net}{'-norm' * norm}{suffix}": ("cnn", space, {"net": net, "norm": norm, "features": 32})
        for net in WIDTH
        for norm in (False, True)
        for suffix, space in (("", IMAGE), ("-dict", MIXED))
    },
    **{
        f"{name}{suffix}": (name, space, {**knobs, **below})
        for name, knobs in (
            ("window", {"window": 3}),
            ("rnn", {"width": 16}),
            ("gru", {"width": 16, "layers": 2}),
            ("lstm", {"width": 16, "start": "learned"}),
            ("transformer", {"width": 16, "context": 3, "gate": True}),
        )
        for suffix, space, below in (
            ("", VECTOR, {"hidden": (32,)}),
            ("-image", IMAGE, {"net": "light", "features": 16}),
            ("-dict", MIXED, {"encoder": "mlp", "hidden": (16,)}),
        )
    },
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Networks draw their weights from torch's own generator: seed it, and give it back as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Backbone, spaces.Space[Any]]:
    name, space, knobs = CASES[request.param]
    return build(name, space, **knobs), space


def observe(space: spaces.Space[Any], *lead: int, seed: int = 0) -> Any:
    """Random observations with leading axes, as tensors (or a dict or tuple of them)."""
    space.seed(seed)
    count = int(np.prod(lead))
    return gathered([space.sample() for _ in range(count)], lead)


def gathered(samples: list[Any], lead: tuple[int, ...]) -> Any:
    if isinstance(samples[0], dict):
        return {name: gathered([sample[name] for sample in samples], lead) for name in samples[0]}
    if isinstance(samples[0], tuple):
        return tuple(gathered(list(part), lead) for part in zip(*samples, strict=True))
    stacked = np.stack([np.asarray(sample) for sample in samples])
    return torch.from_numpy(stacked).reshape((*lead, *stacked.shape[1:]))


def each(obs: Any, change: Any) -> Any:
    """Apply `change` to every leaf."""
    return {name: change(leaf) for name, leaf in obs.items()} if isinstance(obs, dict) else change(obs)


def features(net: Backbone, obs: Any) -> Tensor:
    return net(obs)[0]


def same_weights(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- contracts -----------------------------------------------------------------------------------------------


def test_the_cases_cover_the_table() -> None:
    assert {name for name, _, _ in CASES.values()} == set(BACKBONES)


def test_shapes(case: tuple[Backbone, spaces.Space[Any]]) -> None:
    net, space = case
    for lead in ((1,), (3,), (2, 3), (1, 1)):
        y, state = net(observe(space, *lead), net.initial(lead[-1]))
        assert y.shape == (*lead, net.features)
        assert y.dtype == torch.float32 and y.isfinite().all()
        assert (state != ()) == net.memory


def test_every_parameter_gets_a_gradient(case: tuple[Backbone, spaces.Space[Any]]) -> None:
    net, space = case
    y = features(net, observe(space, 4, 4))
    (y * torch.randn_like(y)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_sequence_is_its_single_steps(case: tuple[Backbone, spaces.Space[Any]]) -> None:
    net, space = case
    obs, first = observe(space, 5, 3), torch.zeros(5, 3, dtype=torch.bool)
    first[0], first[2, 1] = True, True
    whole, _ = net(obs, net.initial(3), first)
    state, parts = net.initial(3), []
    for t in range(5):
        y, state = net(each(obs, lambda leaf, t=t: leaf[t]), state, first[t])
        parts.append(y)
    torch.testing.assert_close(whole, torch.stack(parts), rtol=1e-4, atol=1e-5)


def test_samples_do_not_touch_each_other(case: tuple[Backbone, spaces.Space[Any]]) -> None:
    net, space = case
    obs = observe(space, 6)
    alone = torch.cat([features(net, each(obs, lambda leaf, i=i: leaf[i : i + 1])) for i in range(6)])
    torch.testing.assert_close(features(net, obs), alone, rtol=1e-4, atol=1e-5)


def test_observations_are_not_changed(case: tuple[Backbone, spaces.Space[Any]]) -> None:
    net, space = case
    obs = observe(space, 2, 3)
    kept = copy.deepcopy(obs)
    features(net, obs)
    for name in obs if isinstance(obs, dict) else [...]:
        assert torch.equal(obs[name], kept[name])


@pytest.mark.parametrize("name", list(CASES))
def test_the_seed_decides_the_weights(name: str) -> None:
    backbone, space, knobs = CASES[name]
    nets = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        nets.append(build(backbone, space, **knobs))
    obs = observe(space, 4)
    assert same_weights(nets[0], nets[1]) and not same_weights(nets[0], nets[2])
    assert torch.equal(features(nets[0], obs), features(nets[1], obs))
    assert not torch.equal(features(nets[0], obs), features(nets[2], obs))


@pytest.mark.parametrize("name", list(CASES))
def test_save_and_load_are_exact(name: str, tmp_path: Path) -> None:
    backbone, space, knobs = CASES[name]
    net, other = build(backbone, space, **knobs), build(backbone, space, **knobs)
    assert not same_weights(net, other)
    net.save(tmp_path / "net.safetensors")
    strides = [p.stride() for p in other.parameters()]
    assert other.load(tmp_path / "net.safetensors") is other
    assert same_weights(net, other)
    assert [p.stride() for p in other.parameters()] == strides  # channels-last stays
    obs = observe(space, 4)
    assert torch.equal(features(net, obs), features(other, obs))


def test_deepcopy_is_equal_and_apart(case: tuple[Backbone, spaces.Space[Any]]) -> None:
    net, space = case
    twin, obs = copy.deepcopy(net), observe(space, 4)
    before = features(twin, obs).detach()
    assert torch.equal(before, features(net, obs))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert torch.equal(before, features(twin, obs))


def test_freeze(case: tuple[Backbone, spaces.Space[Any]]) -> None:
    net, space = case
    assert net.freeze() is net
    assert not features(net, observe(space, 2)).requires_grad


def test_a_wrong_number_of_leading_axes(case: tuple[Backbone, spaces.Space[Any]]) -> None:
    net, space = case
    for lead in ((), (1, 1, 2)):
        with pytest.raises(ValueError, match=r"expected \(B, "):
            net(observe(space, *lead))


def test_autocast_computes_in_bf16(case: tuple[Backbone, spaces.Space[Any]]) -> None:
    net, space = case
    obs = observe(space, 4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = features(net, obs).float()
    exact = features(net, obs)
    assert (rough - exact).norm() <= 0.05 * exact.norm()


# -- observations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_bytes_are_scaled_to_one(name: str) -> None:
    net, obs = build(name, IMAGE), observe(IMAGE, 3)
    assert torch.equal(features(net, obs), features(net, obs.float() / 255))


@pytest.mark.parametrize("lead", [(3,), (2, 3)])
def test_console_memory_is_a_scaled_vector(lead: tuple[int, ...]) -> None:
    space = spaces.Box(0, 255, (128,), np.uint8)
    obs = observe(space, *lead)
    x = Encoder(space)(obs)
    assert x.image is None and x.vector is not None and x.lead == lead
    assert torch.equal(x.vector, obs.reshape(-1, 128).float() / 255)
    assert backbones.default(space) == "mlp"


def test_only_bytes_are_scaled() -> None:
    space = spaces.Box(0, 255, (6,), np.int32)
    obs = observe(space, 3)
    vector = Encoder(space)(obs).vector
    assert vector is not None and torch.equal(vector, obs.float())


@pytest.mark.parametrize("net", list(WIDTH))
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (1, 8, 8), (3, 5, 40), (40, 5), (10, 10), (2, 7, 7), (64, 64, 3), (4, 42, 42), (9, 84, 84)],
)
def test_images_of_any_size(net: str, norm: bool, shape: tuple[int, ...]) -> None:
    cnn = CNN(shape, net=net, norm=norm)
    assert cnn.features == WIDTH[net]
    y = features(cnn, torch.rand(2, *shape))
    assert y.shape == (2, WIDTH[net]) and y.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "image"),
    [
        ((3, 30, 40), (3, 30, 40)),
        ((30, 40, 3), (3, 30, 40)),
        ((40, 30, 1), (1, 40, 30)),
        ((30, 40), (1, 30, 40)),
        ((4, 30, 40, 3), (12, 30, 40)),
        ((8, 8, 8), (8, 8, 8)),
    ],
)
def test_where_the_channels_are(shape: tuple[int, ...], image: tuple[int, ...]) -> None:
    encoder = Encoder(shape)
    assert encoder.image == image and encoder.vector == 0 and encoder.size == np.prod(shape)
    for lead in ((2,), (3, 2)):
        x = encoder(torch.rand(*lead, *shape))
        assert x.image is not None and x.image.shape == (np.prod(lead), *image)
        assert x.vector is None and x.lead == lead


def test_channels_last_is_channels_first_permuted() -> None:
    net, obs = CNN((3, 20, 16), net="light"), torch.rand(2, 3, 20, 16)
    other = CNN((20, 16, 3), net="light")
    other.load_state_dict(net.state_dict())
    assert torch.equal(features(net, obs), features(other, obs.permute(0, 2, 3, 1)))


def test_frames_of_a_colour_stack_become_channels_in_order() -> None:
    obs = torch.rand(2, 4, 6, 5, 3)  # (B, K, H, W, C)
    image = Encoder((4, 6, 5, 3))(obs).image
    assert image is not None
    for k in range(4):
        for c in range(3):
            assert torch.equal(image[:, 3 * k + c], obs[:, k, :, :, c])


@pytest.mark.parametrize("lead", [(4,), (3, 4)])
@pytest.mark.parametrize("start", [0, -2, 10])
def test_discrete_is_one_hot(lead: tuple[int, ...], start: int) -> None:
    space = spaces.Discrete(5, start=start)
    obs = observe(space, *lead)
    vector = Encoder(space)(obs).vector
    assert vector is not None and vector.dtype == torch.float32
    assert torch.equal(vector, torch.eye(5)[obs.flatten() - start])
    assert features(MLP(space), obs).shape == (*lead, 256)


@pytest.mark.parametrize("lead", [(4,), (3, 4)])
def test_multi_discrete_is_one_hot_by_column(lead: tuple[int, ...]) -> None:
    space = spaces.MultiDiscrete([3, 2, 4], start=[0, 5, -1])
    obs = observe(space, *lead)
    vector = Encoder(space)(obs).vector
    flat = obs.reshape(-1, 3) - torch.tensor([0, 5, -1])
    parts = [torch.eye(n)[flat[:, i]] for i, n in enumerate((3, 2, 4))]
    assert vector is not None and torch.equal(vector, torch.cat(parts, 1))
    assert Encoder(space).size == 9


def test_tables_of_choices_and_bits_are_flattened() -> None:
    table, bits = spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])), spaces.MultiBinary((2, 3))
    vector = Encoder(table)(observe(table, 2, 3)).vector
    assert (
        vector is not None and vector.shape == (6, 14) and torch.equal(vector.sum(1), torch.full((6,), 4.0))
    )
    obs = observe(bits, 2, 3)
    vector = Encoder(bits)(obs).vector
    assert vector is not None and torch.equal(vector, obs.reshape(6, 6).float())


def test_dict_of_images_and_vectors() -> None:
    space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (20, 16, 3), np.uint8),
            "depth": spaces.Box(0, 1, (20, 16)),
            "joints": spaces.Box(-1, 1, (3,)),
            "inner": spaces.Dict({"gear": spaces.Discrete(4), "ram": spaces.Box(0, 255, (2,), np.uint8)}),
        }
    )
    encoder, obs = Encoder(space), observe(space, 2, 3)
    assert encoder.image == (4, 20, 16) and encoder.vector == 3 + 4 + 2
    x = encoder(obs)
    assert x.image is not None and x.vector is not None and x.lead == (2, 3)
    parts = {
        "camera": obs["camera"].flatten(0, 1).permute(0, 3, 1, 2) / 255,
        "depth": obs["depth"].flatten(0, 1)[:, None],
        "joints": obs["joints"].flatten(0, 1),
        "gear": torch.eye(4)[obs["inner"]["gear"].flatten()],
        "ram": obs["inner"]["ram"].flatten(0, 1) / 255,
    }
    flat_order = [key for key in space.spaces if key in ("camera", "depth")]
    assert torch.equal(x.image, torch.cat([parts[key] for key in flat_order], 1))
    vectors = [name for key in space.spaces for name in (["gear", "ram"] if key == "inner" else [key])]
    assert torch.equal(x.vector, torch.cat([parts[n] for n in vectors if n not in ("camera", "depth")], 1))


def test_each_part_of_a_dict_matters() -> None:
    net, obs = CNN(MIXED, net="light"), observe(MIXED, 1)
    y = features(net, obs)
    for name in obs:
        changed = {**obs, name: (obs[name] + 1) % 4 if name == "gear" else obs[name] * 0}
        assert not torch.equal(features(net, changed), y), name


def test_tuple_observations() -> None:
    space = spaces.Tuple((spaces.Discrete(3), VECTOR, IMAGE))
    assert features(MLP(space), observe(space, 4)).shape == (4, 256)
    assert features(CNN(space, net="light"), observe(space, 2, 3)).shape == (2, 3, 256)


def test_images_of_two_sizes_are_refused() -> None:
    space = spaces.Dict({"a": spaces.Box(0, 1, (3, 8, 8)), "b": spaces.Box(0, 1, (3, 9, 8))})
    with pytest.raises(ValueError, match="must share one size"):
        Encoder(space)


@pytest.mark.parametrize("space", [spaces.Text(5), spaces.Sequence(spaces.Discrete(2))])
def test_spaces_without_a_shape_are_refused(space: spaces.Space[Any]) -> None:
    with pytest.raises(ValueError, match="no backbone reads observations of"):
        MLP(space)


# -- the nets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "shape", "parameters"),
    [
        ("nature", (4, 84, 84), 1_684_128),  # Mnih et al. 2015, without the output layer
        ("impala", (4, 84, 84), 1_089_232),
        ("light", (4, 84, 84), 1_190_448),
        ("light", (4, 42, 42), 215_600),
    ],
)
def test_parameter_counts(net: str, shape: tuple[int, ...], parameters: int) -> None:
    assert sum(p.numel() for p in CNN(shape, net=net).parameters()) == parameters


def test_maps() -> None:
    net, obs = CNN((4, 84, 84)), torch.rand(2, 4, 84, 84)
    shapes = {name: tuple(x.shape) for name, x in net.maps(obs).items()}
    assert shapes == {"conv1": (2, 32, 20, 20), "conv2": (2, 64, 9, 9), "conv3": (2, 64, 7, 7)}
    assert list(net.maps(obs, ("conv3", "conv1"))) == ["conv3", "conv1"]
    top = net.maps(obs, ("conv3",))["conv3"]
    torch.testing.assert_close(net.dense(top.flatten(1)), features(net, obs), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no feature map 'conv4'; there are conv1, conv2, conv3"):
        net.maps(obs, ("conv4",))


def test_maps_of_the_residual_net_halve_in_size() -> None:
    shapes = [
        tuple(x.shape[1:]) for x in CNN((4, 84, 84), net="impala").maps(torch.rand(1, 4, 84, 84)).values()
    ]
    assert shapes[:3] == [(16, 42, 42), (32, 21, 21), (32, 11, 11)]


def test_an_mlp_has_no_maps() -> None:
    with pytest.raises(ValueError, match="MLP has no feature maps"):
        MLP((3,)).maps(torch.zeros(1, 3))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_mlp_by_hand(activation: str) -> None:
    net = MLP((3,), hidden=(4, 2), activation=activation)
    x, act = torch.rand(5, 3), ACTIVATIONS[activation]()
    (w1, b1), (w2, b2) = ((layer.weight, layer.bias) for layer in net.layers if isinstance(layer, nn.Linear))
    torch.testing.assert_close(features(net, x), act(act(x @ w1.T + b1) @ w2.T + b2))
    assert net.features == 2


def test_knobs_change_the_net() -> None:
    assert CNN((1, 8, 8), features=77).features == 77
    assert MLP((3,), hidden=(5,)).features == 5
    for plain, normed in ((CNN((1, 8, 8)), CNN((1, 8, 8), norm=True)), (MLP((3,)), MLP((3,), norm=True))):
        assert len(list(normed.parameters())) > len(list(plain.parameters()))


# -- choosing ------------------------------------------------------------------------------------------------


def test_names_and_instances() -> None:
    net = MLP((3,))
    assert build(net, VECTOR) is net
    assert type(build("mlp", VECTOR)) is MLP and type(build("cnn", IMAGE)) is CNN
    assert backbones.default(IMAGE) == backbones.default(MIXED) == "cnn"
    assert backbones.default(VECTOR) == backbones.default(spaces.Discrete(3)) == "mlp"
    for name in backbones.__all__:
        assert getattr(backbones, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Unknown'"):
        _ = backbones.Unknown


def complaint(call: Any, *arguments: Any, **keywords: Any) -> str:
    """The message of the `UserError` that the call raises; it must be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_are_named() -> None:
    assert complaint(build, "cmn", IMAGE) == (
        "unknown backbone 'cmn'. Did you mean 'cnn'? Allowed: cnn, gru, lstm, mlp, rnn, transformer, window."
    )
    assert complaint(build, "unheard", IMAGE).startswith("unknown backbone 'unheard'. ")
    assert complaint(CNN, VECTOR).endswith("use mlp") and "(5,)" in complaint(CNN, VECTOR)
    assert "Did you mean 'nature'?" in complaint(CNN, IMAGE, net="naturr")
    assert complaint(CNN, IMAGE, features=0) == "--features must be a whole number >= 1, got 0"
    assert "Did you mean 'relu'?" in complaint(MLP, VECTOR, activation="rely")
    assert complaint(MLP, VECTOR, hidden=(8, 0)) == "--hidden must be a whole number >= 1, got (8, 0)"
    assert "got ()" in complaint(MLP, VECTOR, hidden=())


# -- a library of its own ------------------------------------------------------------------------------------


def test_ten_lines_of_supervised_learning() -> None:
    """Is the bright half of an 8 x 8 image above or below?"""
    label = torch.arange(64) % 2
    image = torch.rand(64, 1, 8, 8) * 0.5
    for i in range(64):
        image[i, :, 4 * int(label[i]) : 4 * int(label[i]) + 4] += 0.5
    trunk = CNN((1, 8, 8))
    model = nn.Sequential(nn.Linear(trunk.features, 2))
    optimizer = torch.optim.Adam([*trunk.parameters(), *model.parameters()], lr=1e-3)
    for _ in range(30):
        features, _state = trunk(image)
        loss = nn.functional.cross_entropy(model(features), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert (model(trunk(image)[0]).argmax(1) == label).all()
