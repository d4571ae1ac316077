"""DQN and SARSA on nets with memory: loss and gradient against plain loops, states, knobs, and what they learn."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

import envs
from agents import train
from agents.dqn import DQN, ETA, sequence_error
from agents.evaluate import Evaluator, shots
from agents.loop import off_policy
from agents.sarsa import SARSA
from agents.training import replay_of
from envs import Collector, EnvConfig
from envs.atari import DEFAULT
from replay import Decision, Sequences, Transition
from runs import UserError
from tests.tools import CPU, PAYS, VECTOR, Elman, Quiet, built, digest, tabular, trained

MEMORY = "chordate/Memory-v0"
LENGTH, BURN_IN = 5, 3


def sequences(size: int, n_step: int = 2, seed: int = 0, actions: int = 2) -> Sequences:
    """Random sequences over VECTOR with resets, last observations and cut sums anywhere."""
    draw = torch.Generator().manual_seed(seed)
    span, shape = BURN_IN + LENGTH + n_step, (LENGTH, size)
    taken = torch.randint(1, n_step + 1, shape, generator=draw)
    return Sequences(
        obs=torch.randn(span, size, 3, generator=draw),
        first=torch.rand(span, size, generator=draw) < 0.2,
        state=(torch.randn(size, 8, generator=draw),),
        action=torch.randint(actions, shape, generator=draw),
        reward=torch.randn(shape, generator=draw) * 2,
        successor=BURN_IN + torch.arange(LENGTH)[:, None] + taken,
        discount=0.9 * torch.randint(2, shape, generator=draw).float(),
        acted=torch.rand(shape, generator=draw) < 0.8,
        weight=torch.rand(size, generator=draw) + 0.5,
        index=torch.arange(size),
    )


def recurrent(seed: int = 0, **knobs: Any) -> DQN:
    """A small DQN with memory, whose target net differs."""
    agent = built(seed, backbone=Elman(3, 8, seed), **{"sequence": LENGTH, "burn_in": BURN_IN, **knobs})
    with torch.no_grad():
        for parameter in agent.target.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    return agent


# -- the loss ------------------------------------------------------------------------------------------------


def walked(
    net: Any, obs: np.ndarray, first: np.ndarray, h: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Values (A,) and memories (F,) of one sequence, a step at a time in numpy."""
    w = {name: p.detach().double().numpy() for name, p in net.named_parameters()}
    values, memories = [], []
    for x, new in zip(obs, first, strict=True):
        before = np.zeros_like(h) if new else h
        inner = w["backbone.inner.weight"] @ before
        h = np.tanh(w["backbone.outer.weight"] @ x + w["backbone.outer.bias"] + inner)
        memories.append(h)
        values.append(w["head.q.weight"] @ h + w["head.q.bias"])
    return values, memories


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("double", ["online", "off"])
@pytest.mark.parametrize("loss", ["huber", "squared"])
def test_loss_and_gradient_equal_a_hand_written_loop(double: str, loss: str, n_step: int) -> None:
    """Forwards and backwards through time, one sequence and one step after the other, in numpy."""
    agent = recurrent(double=double, loss=loss, n_step=n_step)
    batch = sequences(6, n_step)
    value, metrics, error = agent.sequence_loss(batch)
    value.backward()
    obs, first, start = (x.numpy() for x in (batch.obs.double(), batch.first, batch.state[0].double()))
    online = {name: p.detach().double().numpy() for name, p in agent.online.named_parameters()}
    grad = {name: np.zeros_like(p) for name, p in online.items()}
    total, count, errors, targets = 0.0, int(batch.acted.sum()), [], []
    for b in range(6):
        mine, memories = walked(agent.online, obs[:, b], first[:, b], start[b])
        theirs, _ = walked(agent.target, obs[:, b], first[:, b], start[b])
        slope_of_q = [np.zeros(2) for _ in mine]
        found = []
        for t in range(LENGTH):
            if not batch.acted[t, b]:
                continue
            then = int(batch.successor[t, b])
            chooser = mine[then] if double == "online" else theirs[then]
            goal = float(batch.reward[t, b]) + float(batch.discount[t, b]) * theirs[then][np.argmax(chooser)]
            delta = mine[BURN_IN + t][int(batch.action[t, b])] - goal
            wide = loss == "huber" and abs(delta) > 1
            scale = float(batch.weight[b]) / count
            total += scale * (abs(delta) - 0.5 if wide else 0.5 * delta**2)
            slope_of_q[BURN_IN + t][int(batch.action[t, b])] = scale * (np.sign(delta) if wide else delta)
            found.append(abs(delta))
            targets.append(goal)
        errors.append(0.9 * max(found) + 0.1 * np.mean(found))
        carried = np.zeros(8)
        for t in reversed(range(BURN_IN, len(mine))):
            grad["head.q.weight"] += np.outer(slope_of_q[t], memories[t])
            grad["head.q.bias"] += slope_of_q[t]
            inner = (online["head.q.weight"].T @ slope_of_q[t] + carried) * (1 - memories[t] ** 2)
            grad["backbone.outer.weight"] += np.outer(inner, obs[t, b])
            grad["backbone.outer.bias"] += inner
            carried = np.zeros(8)
            if not first[t, b]:
                grad["backbone.inner.weight"] += np.outer(inner, memories[t - 1])
                carried = online["backbone.inner.weight"].T @ inner
    assert value.item() == pytest.approx(total, abs=1e-6)
    assert float(metrics["q/target"]) == pytest.approx(np.mean(targets), abs=1e-6)
    np.testing.assert_allclose(error.numpy(), errors, atol=2e-6)
    for name, parameter in agent.online.named_parameters():
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.numpy(), grad[name], atol=1e-6, err_msg=name)


def test_burn_in_moves_the_memory_and_gets_no_gradient() -> None:
    agent, batch = recurrent(), sequences(4)
    obs, state = batch.obs.clone().requires_grad_(), batch.state[0].clone().requires_grad_()
    first = torch.zeros_like(batch.first)
    batch = batch._replace(obs=obs, state=(state,), first=first)
    loss = agent.sequence_loss(batch)[0]
    by_obs, by_state = torch.autograd.grad(loss, (obs, state), allow_unused=True)
    assert by_state is None and not by_obs[:BURN_IN].any()
    assert by_obs[BURN_IN].any(-1).all()
    with torch.no_grad():
        obs[0] += 1.0
    assert agent.sequence_loss(batch)[0] != loss  # but what it saw there counts


def test_what_lies_at_steps_without_an_action_does_not_matter() -> None:
    agent, batch = recurrent(), sequences(4)
    changed = batch._replace(
        action=torch.where(batch.acted, batch.action, 1 - batch.action),
        reward=torch.where(batch.acted, batch.reward, 1e6),
        discount=torch.where(batch.acted, batch.discount, 7.0),
    )
    for one, two in zip(_results(agent, batch), _results(agent, changed), strict=True):
        assert torch.equal(one, two)


def _results(agent: DQN, batch: Sequences) -> list[torch.Tensor]:
    loss, metrics, error = agent.sequence_loss(batch)
    return [loss, error, *metrics.values()]


def test_error_of_a_sequence_by_hand() -> None:
    gap = torch.nan
    error = torch.tensor([[1.0, gap, 0.0], [3.0, 2.0, gap], [gap, gap, 0.0]])
    assert ETA == 0.9
    torch.testing.assert_close(sequence_error(error), torch.tensor([0.9 * 3 + 0.1 * 2, 2.0, 0.0]))


def test_the_other_terms_are_those_of_single_steps() -> None:
    """With resets everywhere a sequence is a set of single steps: the loss of DQN without memory."""
    ways: list[dict[str, Any]] = [
        dict(munchausen=0.9, temperature=0.5),
        dict(distributional="c51", atoms=11),
        dict(distributional="quantile", atoms=7, dueling="mean"),
        dict(munchausen=0.9, distributional="c51", atoms=5, dueling="max"),
        dict(acting="target"),
    ]
    batch = sequences(6, n_step=1)
    always = torch.ones_like(batch.first)
    for knobs in ways:
        agent = recurrent(n_step=1, **knobs)
        batch = batch._replace(first=always, acted=torch.ones_like(batch.acted))
        flat = [x.flatten(0, 1) for x in (batch.action, batch.reward, batch.discount)]
        action, reward, discount = flat
        obs = batch.obs[BURN_IN : BURN_IN + LENGTH].flatten(0, 1)
        next_obs = batch.obs[batch.successor, torch.arange(6)].flatten(0, 1)
        from replay import Batch

        plain = Batch(obs, action, reward, next_obs, discount, batch.weight.repeat(LENGTH), torch.arange(30))
        one, metrics, _ = agent.sequence_loss(batch)
        two, expected, _ = agent.loss(plain)
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(metrics, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "knobs",
    [{}, dict(double="twin"), dict(target_every=1, tau=0.3), dict(alpha=0.5)],
)
def test_several_steps_at_once_are_the_same_steps(knobs: dict[str, Any]) -> None:
    whole, single = (recurrent(lr=1e-2, **{"target_every": 3, **knobs}) for _ in range(2))
    batch = sequences(5 * 4)
    axes = (1, 1, None, 1, 1, 1, 1, 1, 0, 0)
    errors = []
    for k in range(5):
        rows = slice(4 * k, 4 * k + 4)
        parts = [
            (part[0][rows],) if axis is None else part[rows] if axis == 0 else part[:, rows]
            for part, axis in zip(batch, axes, strict=True)
        ]
        errors.append(single.update(Sequences(*parts)).priority)
    update = whole.update(batch, 5)
    assert whole.updates == single.updates == 5 and update.priority is not None
    torch.testing.assert_close(update.priority, torch.cat(errors))
    assert digest(whole) == digest(single)


# -- acting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", [1, 3])
def test_a_stored_sequence_goes_on_where_acting_was(num_envs: int) -> None:
    """One pass from the stored state gives the values met in acting, mid-episode, at ends, after the ring turned."""
    env = envs.make("CartPole-v1", num_envs, 0)  # no observation comes twice
    knobs = dict(sequence=6, burn_in=2, capacity=90 * num_envs, learning_starts=10**6)
    agent = built(0, env.single_observation_space, 2, backbone=Elman(4), **knobs)
    met: dict[bytes, np.ndarray] = {}
    act = agent.act

    def noted(obs: Any, first: np.ndarray, state: Any, step: int) -> Decision:
        met.update(zip(map(bytes, obs), agent.values(obs, first, state), strict=True))
        return act(obs, first, state, step)

    agent.act = noted  # type: ignore[method-assign]
    replay: Any = replay_of(agent, env, np.random.default_rng(0))
    collector = Collector(env, 0)
    off_policy(agent, collector, replay, Quiet(), 150 * num_envs)  # type: ignore[arg-type]
    collector.close()
    batch = replay.sample(64)
    with torch.no_grad():
        values = agent.online.unroll(batch.obs, batch.state, batch.first)[0].numpy()
    assert not batch.first[0].all() and batch.first.any()
    found = 0
    for t, b in np.ndindex(values.shape[:2]):
        key = bytes(batch.obs[t, b].numpy())
        found += key in met
        np.testing.assert_allclose(values[t, b], met.get(key, values[t, b]), atol=1e-6)
    acted = batch.acted.float().mean()
    assert found / values[..., 0].size == pytest.approx(float(acted), abs=0.03)  # all but the last ones


def test_acting_carries_the_memory_and_episodes_reset_it() -> None:
    agent = recurrent(epsilon_start=1.0, epsilon_end=1.0)  # whatever is drawn, everything is taken in
    draw = np.random.default_rng(0)
    obs = draw.normal(size=(6, 2, 3)).astype(np.float32)
    first = np.array(
        [[True, True], [False, False], [False, True], [False, False], [True, False], [False, False]]
    )
    state: Any = agent.initial(2)
    for t in range(6):
        greedy = agent.greedy(obs[t], first[t], state)
        values = agent.values(obs[t], first[t], state)
        assert greedy.action.tolist() == values.argmax(1).tolist()
        assert agent.probabilities(obs[t], first[t], state).argmax(1).tolist() == greedy.action.tolist()
        state = agent.act(obs[t], first[t], state, 10**9).state
        assert np.array_equal(state[0], greedy.state[0])
        for n in range(2):
            begin = max(s for s in range(t + 1) if first[s, n])
            expected, _ = walked(
                agent.online, obs[begin : t + 1, n].astype(float), np.zeros(t + 1 - begin), np.zeros(8)
            )
            np.testing.assert_allclose(values[n], expected[-1], atol=1e-5)
    fresh = agent.values(obs[1])
    np.testing.assert_allclose(fresh, agent.values(obs[1], np.ones(2, bool), state), atol=1e-6)


class Remembers:
    """Stands in for an agent: it remembers how many steps ago its episode began."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool, int]] = []

    def initial(self, n: int) -> Any:
        return (torch.full((n,), 99),)

    def _age(self, first: np.ndarray, state: Any) -> torch.Tensor:
        return torch.where(torch.from_numpy(first), 0, state[0] + 1)

    def greedy(self, obs: Any, first: np.ndarray, state: Any) -> Decision:
        age = self._age(first, state)
        self.seen += zip(range(len(first)), first.tolist(), age.tolist(), strict=True)
        return Decision(np.zeros(len(first), np.int64), (age,))

    def values(self, obs: Any, first: np.ndarray, state: Any) -> np.ndarray:
        return self._age(first, state).numpy()[:, None].astype(np.float32)

    def probabilities(self, obs: Any, first: np.ndarray, state: Any) -> np.ndarray:
        return self.values(obs, first, state)


def test_evaluation_and_film_carry_the_memory() -> None:
    agent: Any = Remembers()
    evaluator = Evaluator("chordate/CountingTruncated-v0", DEFAULT, 6, 0)
    episodes = evaluator.episodes(agent)
    evaluator.close()
    ages: dict[int, int] = {}
    for env, first, age in agent.seen:
        assert age == (0 if first else ages[env] + 1)
        ages[env] = age
    assert len(episodes) == 6 and evaluator.values.max() <= 7
    film = list(shots(agent, "ALE/Pong-v5", EnvConfig(), 0, 50))  # draws itself without further packages
    assert (
        [shot.values[0] for shot in film]
        == [shot.probabilities[0] for shot in film]
        == list(range(len(film)))
    )


# -- what it learns ------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = dict(
    num_envs=4, learning_starts=200, train_every=8, batch=16, lr=3e-3, target_every=25, capacity=4_000, gamma=0.9,
    epsilon_steps=2_000, epsilon_end=0.0,
)  # fmt: skip


def late(watch: Quiet, count: int = 100) -> float:
    return float(np.mean([score for _, score, _ in watch.episodes[-count:]]))


@pytest.mark.parametrize("parts", [{}, dict(alpha=0.6, n_step=3)])
def test_dqn_with_memory_remembers_a_cue(parts: dict[str, Any]) -> None:
    knobs = {**QUICK, **parts, "sequence": 14, "burn_in": 4}
    _, watch = trained(MEMORY, 4_000, backbone=Elman(3), **knobs)
    assert late(watch) > 0.95


def test_dqn_without_memory_does_not() -> None:
    _, watch = trained(MEMORY, 4_000, backbone="mlp", net={"hidden": (32,)}, **QUICK)
    assert abs(late(watch, 200)) < 0.3


@pytest.mark.parametrize(("backbone", "solved"), [("elman", True), ("mlp", False)])
def test_sarsa_remembers_a_cue(backbone: str, solved: bool) -> None:
    kind: Any = dict(backbone=Elman(3)) if solved else dict(backbone="mlp", net={"hidden": (32,)})
    agent = SARSA(lr=3e-3, rollout=16, gamma=0.9, epsilon_steps=8_000, epsilon_end=0.0, **kind)
    watch = tabular(agent, MEMORY, 20_000, num_envs=16)
    assert late(watch) > 0.95 if solved else abs(late(watch, 400)) < 0.3


@pytest.mark.parametrize(
    "parts",
    [
        dict(double="twin", dueling="mean"),
        dict(noisy="factorised", distributional="c51", atoms=11, alpha=0.5, n_step=3),
        dict(distributional="quantile", atoms=5, acting="target", tau=0.1, target_every=1),
        dict(munchausen=0.9, loss="squared", updates=3, clip_reward=True),
    ],
)
def test_all_parts_run_with_memory(parts: dict[str, Any]) -> None:
    knobs = dict(learning_starts=60, train_every=4, batch=4, capacity=400, sequence=6, burn_in=2)
    agent, watch = trained("CartPole-v1", 240, num_envs=2, backbone=Elman(4), **knobs, **parts)
    assert agent.updates > 0 and agent.skipped_in_row == 0
    assert all(np.isfinite(list(update.values())).all() for update in watch.updates)


def test_forbidden_actions_stay_forbidden() -> None:
    """What may be done is part of the observation, and of what is bootstrapped from."""
    from envs.mask import MASK

    space = spaces.Dict({"obs": VECTOR, MASK: spaces.MultiBinary(2)})
    agent = built(0, space, 2, backbone=Elman(3, 8), sequence=LENGTH, burn_in=BURN_IN)
    batch = sequences(4)
    allowed = torch.ones(len(batch.obs), 4, 2, dtype=torch.int8)
    open_, shut = ({"obs": batch.obs, MASK: mask} for mask in (allowed, allowed.clone()))
    shut[MASK][..., 1] = 0
    with torch.no_grad():
        agent.target.head.q.bias[1] += 50.0  # type: ignore[union-attr,index]
        agent.online.head.q.bias[1] += 50.0  # type: ignore[union-attr,index]
    target = [float(agent.sequence_loss(batch._replace(obs=obs))[1]["q/target"]) for obs in (open_, shut)]  # type: ignore[arg-type]
    assert target[0] > 10 and abs(target[1]) < 10
    obs = {"obs": np.zeros((2, 3), np.float32), MASK: np.array([[1, 0], [1, 1]], np.int8)}
    assert agent.greedy(obs, np.ones(2, bool), agent.initial(2)).action.tolist() == [0, 1]


# -- SARSA through time ----------------------------------------------------------------------------------------


def test_sarsa_learns_what_a_hand_written_loop_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets and gradient of one rollout with both kinds of end, one environment and one step after the other."""
    agent = SARSA(backbone=Elman(3, 8), rollout=6, gamma=0.9, lr=1e-3)
    agent.build(VECTOR, spaces.Discrete(2), CPU, np.random.SeedSequence(0))
    draw = np.random.default_rng(1)
    terminated, truncated, first = (np.zeros((7, 2), bool) for _ in range(3))
    terminated[1, 0] = truncated[2, 1] = truncated[5, 1] = True
    first[[0, 2], 0] = first[[0, 3, 6], 1] = True
    obs, cut = (draw.normal(size=(7, 2, 3)).astype(np.float32) for _ in range(2))
    start = (torch.from_numpy(draw.normal(size=(2, 8)).astype(np.float32)),)
    memory = agent.memory(obs[0])
    memory._state = start
    first[0, 0], state = False, start  # one episode is under way
    reward = draw.normal(size=(6, 2)).astype(np.float32)
    decision = agent.act(obs[0], first[0], state, 0)
    actions = [decision.action]
    for t in range(6):
        ended = (terminated[t] | truncated[t])[:, None]
        flags = terminated[t], truncated[t], first[t]
        step = Transition(obs[t], decision.action, reward[t], np.where(ended, cut[t], obs[t + 1]), *flags)
        memory.add(step, decision)
        decision = agent.act(obs[t + 1], first[t + 1], decision.state, t + 1)
        actions.append(decision.action)
    asked: list[Any] = []
    act = agent.act
    monkeypatch.setattr(agent, "act", lambda *given: asked.append(act(*given)) or asked[-1])
    learn = agent._net.learn  # type: ignore[union-attr]
    given: list[Any] = []
    monkeypatch.setattr(agent._net, "learn", lambda *parts: given.append(parts) or learn(*parts))
    before = copy.deepcopy(agent._net.net)  # type: ignore[union-attr]
    rollout = memory.take(obs[6], decision, first[6])
    agent.update(rollout)
    drawn = iter(asked[0].action)
    expected = np.zeros((6, 2))
    loss = torch.zeros(())
    for t, n in [(t, n) for t in range(6) for n in range(2)]:  # the order in which cut rows come
        seen = np.concatenate(
            [
                obs[: t + 1, n],
                cut[t : t + 1, n] if terminated[t, n] or truncated[t, n] else obs[t + 1 : t + 2, n],
            ]
        )
        begins = np.append(first[: t + 1, n], False)
        values, _ = walked(before, seen.astype(float), begins, start[0][n].double().numpy())
        following = next(drawn) if truncated[t, n] else actions[t + 1][n]
        expected[t, n] = reward[t, n] + 0.9 * (not terminated[t, n]) * values[-1][following]
    np.testing.assert_allclose(given[0][2].reshape(6, 2), expected, atol=1e-6)
    for n in range(2):
        h: Any = (start[0][n : n + 1],)
        for t in range(6):
            q, h = before.unroll(
                torch.from_numpy(obs[t, n : n + 1]), h, torch.from_numpy(first[t, n : n + 1])
            )
            loss = loss + 0.5 * (expected[t, n] - q[0, int(actions[t][n])]) ** 2 / 12
    gradients = torch.autograd.grad(loss, list(before.parameters()))
    norm = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
    for old, new, g in zip(before.parameters(), agent._net.net.parameters(), gradients, strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(
            new, old - 1e-3 * g * min(1, 10 / norm) / (g.abs() + 1e-8), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("num_envs", [1, 3])
def test_a_longer_rollout_of_sarsa_without_memory_holds_the_same_samples(num_envs: int) -> None:
    """Nothing is learned (the step is tiny): so all rollouts are made of the same steps."""
    found = []
    for rollout in (1, 5):
        agent = SARSA(backbone="mlp", net={"hidden": (4,)}, rollout=rollout, lr=1e-12)
        steps: list[Any] = []
        learn = agent.learn
        agent.learn = lambda five, steps=steps, learn=learn: steps.append(five) or learn(five)  # type: ignore[method-assign]
        tabular(agent, "CartPole-v1", 60 * num_envs, num_envs=num_envs)
        assert agent.updates == 60 // rollout
        found.append([np.concatenate(parts) for parts in zip(*steps, strict=True)])
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


# -- knobs, seeds, mistakes ------------------------------------------------------------------------------------

BASE: dict[str, Any] = dict(
    learning_starts=64, train_every=4, batch=4, lr=1e-2, capacity=2_000, sequence=8, burn_in=2
)


@pytest.mark.parametrize(
    "change", [dict(sequence=10), dict(burn_in=0), dict(n_step=3), dict(alpha=0.5), dict(batch=5)]
)
def test_knobs_are_live(change: dict[str, Any]) -> None:
    def run(**knobs: Any) -> str:
        return digest(trained(PAYS, 200, backbone=Elman(4), **{**BASE, **knobs})[0])

    assert run() != run(**change)


def test_same_seed_same_bits_another_seed_others() -> None:
    one, two, other = (
        trained("CartPole-v1", 240, num_envs=2, seed=s, backbone=Elman(4, seed=s), **BASE) for s in (1, 1, 2)
    )
    assert digest(one[0]) == digest(two[0]) != digest(other[0])
    assert one[1].updates == two[1].updates and one[1].episodes == two[1].episodes


@pytest.mark.parametrize("overlap", [True, False])
def test_evaluation_in_between_and_overlap_change_nothing(overlap: bool) -> None:
    plain, _ = trained("CartPole-v1", 240, num_envs=2, backbone=Elman(4), **BASE)
    evaluator, agents = Evaluator("CartPole-v1", EnvConfig(), episodes=3, seed=9), []
    original = DQN.build

    def build(self: DQN, *arguments: Any) -> None:
        original(self, *arguments)
        agents.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DQN, "build", build)
        look = lambda step: evaluator.episodes(agents[0]) if step % 40 == 0 else None  # noqa: E731
        watched, _ = trained(
            "CartPole-v1", 240, num_envs=2, backbone=Elman(4), between=look, overlap=overlap, **BASE
        )
    assert digest(plain) == digest(watched)


def test_mistakes_are_named_in_one_line(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="--burn-in 8 must be less than --sequence 8"):
        DQN(sequence=8, burn_in=8)
    with pytest.raises(UserError, match="--sequence must be"):
        DQN(sequence=1, burn_in=0)
    for knobs, flag in ((dict(sequence=16), "--sequence"), (dict(burn_in=4), "--burn-in")):
        with pytest.raises(UserError, match=f"{flag} has no effect on mlp: it has no memory"):
            built(**knobs)
    quiet: Any = dict(say=lambda _: None, run=tmp_path / "run", capacity=40)
    with pytest.raises(UserError, match=r"--capacity must be at least 64 .* sequences of 41 steps, got 40"):
        train(DQN(backbone=Elman(4), capacity=40), "CartPole-v1", say=lambda _: None, run=tmp_path / "run")
    with pytest.raises(UserError, match="--backbone of qtable must be one of table"):
        train("qtable", "CartPole-v1", backbone="mlp", **quiet)
    with pytest.raises(UserError, match="qtable runs on a table"):
        train_object("qtable", tmp_path)
    assert not (tmp_path / "run").exists()


def train_object(name: str, path: Any) -> None:
    from agents import load

    agent = load(name)(backbone=Elman(1))
    agent.build(VECTOR, spaces.Discrete(2), CPU, np.random.SeedSequence(0), print)
