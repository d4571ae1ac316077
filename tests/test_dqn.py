"""DQN: the maths against hand-worked numbers and an independent reference, the knobs, and what it learns."""

from __future__ import annotations

import copy
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.base import due, falling_epsilon, linear
from agents.dqn import DQN, Config, q_target, td_loss
from agents.loop import PORTION, portions
from agents.optimizers import Adam
from backbones.compute import Compute
from replay import Batch, Ring, Transition
from runs import UserError
from tests.tools import CPU, PAYS, VECTOR, Elman, batch_of, built, digest, trained

QUICK = dict(learning_starts=64, train_every=1, batch=32, lr=3e-3, target_every=20, capacity=4_000)


def test_q_target_by_hand() -> None:
    reward, discount = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0])
    target_q, online_q = torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([[9.0, 8.0], [0.0, 1.0]])
    assert q_target(reward, discount, target_q, online_q).tolist() == [2.5, 2.0]  # 1 + .5 * 3;  terminated
    assert q_target(reward, discount, target_q, target_q).tolist() == [3.0, 2.0]  # 1 + .5 * 4


def test_td_loss_by_hand() -> None:
    q, action = torch.tensor([[1.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 1])
    target, weight = torch.tensor([1.5, 1.0]), torch.tensor([1.0, 0.5])
    loss, error = td_loss(q, action, target, weight, huber=True)
    assert error.tolist() == [0.5, -3.0]
    assert loss.item() == pytest.approx((0.125 + 0.5 * 2.5) / 2)
    assert td_loss(q, action, target, weight, huber=False)[0].item() == pytest.approx((0.125 + 0.5 * 4.5) / 2)


@pytest.mark.parametrize("double", ["online", "off"])
@pytest.mark.parametrize("loss", ["huber", "squared"])
def test_loss_and_gradient_equal_a_hand_written_reference(double: str, loss: str) -> None:
    agent = built(double=double, loss=loss, net={"hidden": (8,)})
    with torch.no_grad():  # let target and online differ
        for parameter in agent.target.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    batch = batch_of(16)
    value, _, _ = agent.loss(batch)
    value.backward()
    (w1, b1, w2, b2), (v1, c1, v2, c2) = (
        [p.detach().double().numpy() for p in net.parameters()] for net in (agent.online, agent.target)
    )
    total, grad = 0.0, [np.zeros_like(p) for p in (w1, b1, w2, b2)]
    size = len(batch.reward)
    for i in range(size):
        x, y = batch.obs[i].double().numpy(), batch.next_obs[i].double().numpy()
        target_q = v2 @ np.maximum(v1 @ y + c1, 0) + c2
        chooser = w2 @ np.maximum(w1 @ y + b1, 0) + b2 if double == "online" else target_q
        goal = float(batch.reward[i]) + float(batch.discount[i]) * target_q[np.argmax(chooser)]
        h, a = np.maximum(w1 @ x + b1, 0), int(batch.action[i])
        delta = (w2 @ h + b2)[a] - goal
        slope = np.clip(delta, -1, 1) if loss == "huber" else delta
        cost = abs(delta) - 0.5 if loss == "huber" and abs(delta) > 1 else 0.5 * delta**2
        scale = float(batch.weight[i]) / size
        total += scale * cost
        dq = np.zeros(2)
        dq[a] = scale * slope
        dh = (w2.T @ dq) * (h > 0)
        for own, part in zip(grad, (np.outer(dh, x), dh, np.outer(dq, h), dq), strict=True):
            own += part
    assert value.item() == pytest.approx(total, abs=1e-6)
    for parameter, expected in zip(agent.online.parameters(), grad, strict=True):
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.numpy(), expected, atol=1e-6)


def test_update_is_one_step_of_adam_with_the_gradient_clipped() -> None:
    agent = built(lr=0.01, max_grad_norm=0.05, adam_eps=1e-8)
    before = copy.deepcopy(agent.online)
    update = agent.update(batch_of(16))
    assert float(update.metrics["train/grad_norm"]) > 0.05
    twin = built(lr=0.01)
    twin.online.load_state_dict(before.state_dict())
    twin.target.load_state_dict(before.state_dict())
    twin.loss(batch_of(16))[0].backward()
    norm = torch.cat([p.grad.flatten() for p in twin.online.parameters() if p.grad is not None]).norm()
    for old, new, raw in zip(
        before.parameters(), agent.online.parameters(), twin.online.parameters(), strict=True
    ):
        assert raw.grad is not None
        g = raw.grad * 0.05 / (norm + 1e-6)
        torch.testing.assert_close(new, old - 0.01 * g / (g.abs() + 1e-8))  # Adam's first step


def test_adam_is_torchs_adam_with_clipping_and_a_falling_step_size() -> None:
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw) for shape in ((5, 3), (3,))]
    own, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    adam = Adam(own, lr=1e-2, lr_end=2e-3, decay=10, eps=1e-3, max_norm=1.5)
    peer = torch.optim.Adam(theirs, lr=1e-2, eps=1e-3)
    for step in range(20):
        gradients = [torch.randn(p.shape, generator=draw) for p in start]
        adam.begin()
        norm = adam.step(gradients, torch.zeros(()))
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g.clone()
        assert torch.nn.utils.clip_grad_norm_(theirs, 1.5).item() == pytest.approx(norm.item())
        peer.param_groups[0]["lr"] = linear(1e-2, 2e-3, 10, step)
        peer.step()
        for a, b in zip(own, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target_every", (1, 3, 100))
@pytest.mark.parametrize("double", ("off", "online", "twin"))
def test_several_steps_at_once_are_the_same_steps(target_every: int, double: str) -> None:
    whole, single = (built(target_every=target_every, double=double, lr=1e-2) for _ in range(2))
    batch = batch_of(7 * 8)
    errors = [single.update(Batch(*(leaf[8 * k : 8 * k + 8] for leaf in batch))).priority for k in range(7)]
    update = whole.update(batch, 7)
    assert whole.updates == single.updates == 7 and update.priority is not None
    torch.testing.assert_close(update.priority, torch.cat([e for e in errors if e is not None]))
    for a, b in zip(whole.online.parameters(), single.online.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(whole.target.parameters(), single.target.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_samples_are_drawn_for_as_many_updates_as_fit() -> None:
    ring = Ring(
        100,
        1,
        spaces.Box(0, 255, (4, 84, 84), np.uint8),
        spaces.Discrete(2),
        stack=4,
        rng=np.random.default_rng(0),
    )
    assert ring.sample_nbytes == 2 * 4 * 84 * 84
    most = PORTION // (32 * ring.sample_nbytes)
    assert list(portions(2 * most + 1, 32, ring)) == [most, most, 1]
    assert list(portions(3, PORTION, ring)) == [1, 1, 1] and list(portions(0, 32, ring)) == []


def test_each_reward_is_clipped_before_they_are_summed() -> None:
    ring = Ring(
        20, 1, VECTOR, spaces.Discrete(2), n_step=3, gamma=0.5, clip_reward=True, rng=np.random.default_rng(0)
    )
    obs, no = np.zeros((1, 3), np.float32), np.zeros(1, bool)
    for reward in (0.25, -7.0, 5.0, 0.0, 0.0, 0.0):
        ring.add(Transition(obs, np.zeros(1, np.int64), np.full(1, reward, np.float32), obs, no, no, no))
    batch = ring.sample(64)
    expected = {0: 1 - 0.5 + 0.25, 1: -1 + 0.5, 2: 1.0}
    found = {int(i): float(r) for i, r in zip(batch.index, batch.reward, strict=True)}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("tau", "every"), [(1.0, 3), (0.25, 1)])
def test_target_net_follows_hard_or_soft(tau: float, every: int) -> None:
    agent = built(tau=tau, target_every=every, lr=0.01)
    for number in range(1, 7):
        before = [p.clone() for p in agent.target.parameters()]
        agent.update(batch_of(16, seed=number))
        for old, new, online in zip(
            before, agent.target.parameters(), agent.online.parameters(), strict=True
        ):
            expected = old if number % every else old + tau * (online - old)
            torch.testing.assert_close(new, expected, atol=1e-7, rtol=1e-6)


def test_target_copy_is_exact_when_hard() -> None:
    agent = built(target_every=2)
    for number in range(2):
        agent.update(batch_of(16, seed=number))
    assert all(
        torch.equal(a, b) for a, b in zip(agent.online.parameters(), agent.target.parameters(), strict=True)
    )


def test_schedules() -> None:
    config = Config(learning_starts=100, epsilon_start=0.9, epsilon_end=0.1, epsilon_steps=1_000)
    assert falling_epsilon(config, 99) == 1.0
    assert falling_epsilon(config, 500) == pytest.approx(0.5)
    assert falling_epsilon(config, 1_000) == falling_epsilon(config, 9_000) == 0.1
    assert linear(1.0, 0.0, 4, 1) == 0.75


@pytest.mark.parametrize("num_envs", [1, 3, 8])
def test_updates_per_step_do_not_depend_on_the_number_of_envs(num_envs: int) -> None:
    steps = range(0, 2_400, num_envs)
    assert sum(due(4, step, step + num_envs) for step in steps) == 600


@pytest.mark.parametrize("num_envs", [1, 4])
def test_the_loop_keeps_the_ratio(num_envs: int) -> None:
    agent, _ = trained(
        "chordate/Identity-v0", 400, num_envs=num_envs, learning_starts=100, train_every=4, updates=2
    )
    assert agent.updates == 150


# one other value for each knob; a new knob without an entry fails the test below
OTHER = dict(
    lr=1e-3, gamma=0.5, batch=16, train_every=2, updates=2, learning_starts=80, capacity=100, n_step=3, double="off",
    target_every=7, tau=0.5, loss="squared", max_grad_norm=0.01, adam_eps=0.1, epsilon_start=0.5, epsilon_end=0.5,
    epsilon_steps=100, clip_reward=True, acting="target", munchausen=0.9, temperature=0.5, lr_end=1e-5, lr_steps=400,
    dueling="mean", noisy="independent", noisy_sigma=2.0, distributional="quantile", atoms=11, v_min=-3.0, v_max=30.0,
    alpha=0.5, beta_start=0.9, beta_end=0.1, beta_steps=100,
    sequence=12, burn_in=2,
)  # fmt: skip
# the part that a knob belongs to
PARTS = {"temperature": {"munchausen": 0.9}, "noisy_sigma": {"noisy": "factorised"}} | {
    **{key: {"distributional": "c51"} for key in ("atoms", "v_min", "v_max")},
    **{key: {"alpha": 0.6} for key in ("beta_start", "beta_end", "beta_steps")},
    **{key: {"sequence": 8, "burn_in": 3, "batch": 4, "train_every": 4} for key in ("sequence", "burn_in")},
}


@pytest.mark.parametrize("name", [field.name for field in fields(Config)])
def test_every_knob_is_live(name: str) -> None:
    base = dict(
        learning_starts=64, train_every=1, batch=32, lr=1e-2, target_every=40, capacity=2_000, epsilon_steps=200,
        max_grad_norm=1.0, lr_end=1e-3,
    ) | PARTS.get(name, {})  # fmt: skip
    assert OTHER[name] != getattr(replace(Config(), **base), name)

    def run(**knobs: object) -> str:
        kind = {"backbone": Elman(4)} if "sequence" in base else {}
        return digest(trained(PAYS, 260, **{**base, **knobs}, **kind)[0])

    assert run() != run(**{name: OTHER[name]})


def test_same_seed_same_bits_another_seed_others() -> None:
    runs = [trained("CartPole-v1", 600, seed=seed, num_envs=2, **QUICK) for seed in (1, 1, 2)]
    (first, log), (again, log_again), (other, _) = runs
    assert digest(first) == digest(again) != digest(other)
    assert log.updates == log_again.updates and log.episodes == log_again.episodes


def test_overlap_changes_no_bit() -> None:
    from envs import EnvConfig

    def run(overlap: bool) -> str:
        knobs = dict(
            env_config=EnvConfig(size=24), learning_starts=40, train_every=4, batch=8, capacity=1_000
        )
        net = {"net": "light", "features": 16}
        return digest(trained("ALE/Pong-v5", 120, num_envs=2, overlap=overlap, net=net, **knobs)[0])

    assert run(True) == run(False)


@pytest.mark.parametrize("parts", ({}, {"noisy": "factorised", "alpha": 0.6}))
def test_evaluation_in_between_changes_nothing(parts: dict[str, object]) -> None:
    from agents.evaluate import Evaluator
    from envs import EnvConfig

    plain, _ = trained("CartPole-v1", 600, num_envs=2, **QUICK, **parts)
    evaluator = Evaluator("CartPole-v1", EnvConfig(), episodes=3, seed=9)
    agents: list[DQN] = []

    def evaluate(step: int) -> None:
        if step % 100 == 0:
            evaluator.episodes(agents[0])

    original = DQN.build

    def build(self: DQN, *arguments: object) -> None:
        original(self, *arguments)  # type: ignore[arg-type]
        agents.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DQN, "build", build)
        watched, _ = trained("CartPole-v1", 600, num_envs=2, between=evaluate, **QUICK, **parts)
    assert digest(plain) == digest(watched)


PROBES = [
    # id, observation, expected Q of the greedy action (gamma 0.9)
    ("ProbeConstant", None, 1.0),
    ("ProbePredict", -1.0, -1.0),
    ("ProbePredict", 1.0, 1.0),
]


@pytest.mark.parametrize(("name", "seen", "value"), PROBES)
def test_probe_values(name: str, seen: float | None, value: float) -> None:
    agent, _ = trained(f"chordate/{name}-v0", 600, gamma=0.9, **QUICK)
    obs = np.full((1, *agent.online.backbone.encoder.space.shape), 0.0 if seen is None else seen, np.float32)
    assert agent.values(obs).max() == pytest.approx(value, abs=0.1)


def test_probe_discounts_a_delayed_reward() -> None:
    agent, _ = trained("chordate/ProbeDelay-v0", 1_200, gamma=0.9, **QUICK)
    shape = (1, *agent.online.backbone.encoder.space.shape)
    first, second = (agent.values(np.full(shape, x, np.float32)).max() for x in (0.0, 1.0))
    assert (first, second) == (pytest.approx(0.9, abs=0.1), pytest.approx(1.0, abs=0.1))


@pytest.mark.parametrize("name", ["ProbeAction", "ProbeMatch", "Identity", "DelayedChain"])
@pytest.mark.parametrize("seed", [0, 1])
def test_policies_of_diagnostic_envs(name: str, seed: int) -> None:
    _, watch = trained(
        f"chordate/{name}-v0",
        2_500,
        seed=seed,
        num_envs=4,
        gamma=0.9,
        epsilon_steps=1_200,
        epsilon_end=0.0,
        **QUICK,
    )
    best = {"ProbeAction": 1.0, "ProbeMatch": 1.0, "Identity": 10.0, "DelayedChain": 1.0}[name]
    returns = np.array([r for _, r, _ in watch.episodes])
    late = returns[-10:].mean()
    assert late == pytest.approx(best, rel=0.05)
    assert late > returns[:10].mean()


def test_truncation_bootstraps_and_termination_does_not() -> None:
    knobs = {**QUICK, "gamma": 0.8, "lr": 1e-2, "net": {"hidden": (64,)}}
    endless, _ = trained("chordate/EndlessReward-v0", 1_500, **knobs)
    shape = endless.online.backbone.encoder.space.shape
    value = endless.values(np.zeros((1, *shape), np.float32)).max()
    assert value == pytest.approx(1 / (1 - 0.8), rel=0.1)
    for name, last in (("Truncation", 5.0), ("Termination", 1.0)):
        agent, _ = trained(f"chordate/{name}-v0", 4_000, **knobs)
        obs = last_obs(name)
        assert agent.values(obs).max() == pytest.approx(last, rel=0.2), name


def last_obs(name: str) -> np.ndarray:
    """The observation from which the next step ends the episode of a clock."""
    import envs
    from envs import Collector

    collector = Collector(envs.make(f"chordate/{name}-v0"), 0)
    while True:
        obs = np.array(collector.obs)
        collector.send(np.zeros(1, np.int64))
        step = collector.recv()
        if step.terminated[0] or step.truncated[0]:
            return obs


def test_actions_with_an_offset_are_driven() -> None:
    agent = DQN(epsilon_start=0.0, epsilon_end=0.0, learning_starts=1, net={"hidden": (8,)})
    agent.build(VECTOR, spaces.Discrete(3, start=5), CPU, np.random.SeedSequence(0))
    obs, first = np.zeros((4, 3), np.float32), np.ones(4, bool)
    assert set(agent.act(obs, first, (), 100).action) <= {5, 6, 7}
    batch = batch_of(8, actions=3)
    agent.update(batch._replace(action=batch.action + 5))


def test_exploration_frequencies() -> None:
    agent = built(actions=4, epsilon_start=0.4, epsilon_end=0.4, learning_starts=1)
    obs, first = np.zeros((4_000, 3), np.float32), np.ones(4_000, bool)
    greedy = agent.greedy(obs, first, ()).action[0]
    share = float((agent.act(obs, first, (), 100).action != greedy).mean())
    assert share == pytest.approx(0.4 * 3 / 4, abs=0.03)


@pytest.mark.parametrize("noisy", ("off", "factorised", "independent"))
def test_state_dict_round_trip_is_exact(noisy: str) -> None:
    agent, other = built(seed=1, noisy=noisy), built(seed=2, noisy=noisy)
    for number in range(3):
        agent.update(batch_of(16, seed=number))
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    for each in (agent, other):
        each.update(batch_of(16, seed=9))
        each.act(np.zeros((2, 3), np.float32), np.ones(2, bool), (), 100)
    assert digest(agent) == digest(other)
    assert agent.state_dict()["counters"] == other.state_dict()["counters"]


def test_compiled_and_bf16_updates_agree_with_plain_fp32() -> None:
    space = spaces.Box(0, 255, (4, 24, 24), np.uint8)
    draw = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (16, 4, 24, 24), dtype=torch.uint8, generator=draw) for _ in range(2)]
    batch = batch_of(16)._replace(obs=images[0], next_obs=images[1])
    modes = {
        "plain": CPU,
        "compiled": Compute("cpu", "fp32", 1, True),
        "bf16": Compute("cpu", "bf16", 1, False),
    }
    losses, said = {}, []
    for label, compute in modes.items():
        agent = DQN(net={"net": "light", "features": 32}, lr=1e-3)
        agent.build(space, spaces.Discrete(2), compute, np.random.SeedSequence(0), said.append)
        losses[label] = [float(agent.update(batch).metrics["loss/td"]) for _ in range(5)]
        q = agent.values(images[0].numpy())
        np.testing.assert_allclose(q, agent.online(images[0]).detach().numpy(), atol=0.05)
    if shutil.which("g++"):
        assert not said, "the update was to be compiled, not to fall back"
    np.testing.assert_allclose(losses["compiled"], losses["plain"], rtol=1e-3)
    np.testing.assert_allclose(losses["bf16"], losses["plain"], rtol=0.05)


def test_box_actions_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="Discrete"):
        DQN().build(VECTOR, spaces.Box(-1, 1, (2,)), CPU, np.random.SeedSequence(0))


def test_unknown_knob_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"gama.*gamma"):
        DQN(gama=0.9)
    with pytest.raises(UserError, match=r"--lr"):
        DQN(lr=-1.0)
