"""Tables: cells, the update, exact values; Q-learning and SARSA on them and SARSA on a net; what one line refuses."""

from __future__ import annotations

import copy
import itertools
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

import envs
from agents.dqn import td_loss
from agents.presets import PRESETS
from agents.qtable import Config as QConfig
from agents.qtable import QTable, q_target
from agents.sarsa import SARSA, sarsa_target
from agents.sarsa import Config as SConfig
from agents.tables import Cells, Table, means, optimal_q
from agents.training import train
from envs import Dynamics
from replay import Batch, Five
from runs import UserError
from runs.config import fields as knobs_of
from tests.tools import CPU, PAYS, digest, tabular

TWO = spaces.Discrete(2)


# -- what numbers an observation -------------------------------------------------------------------------------------


def test_discrete_cells_count_from_the_lowest() -> None:
    cells = Cells(spaces.Discrete(5, start=-2))
    assert cells.count == 5 and cells(np.array([-2, 0, 2])).tolist() == [0, 2, 4]


def test_multi_discrete_cells_are_digits() -> None:
    cells = Cells(spaces.MultiDiscrete([2, 3, 4], start=[0, 1, -1]))
    assert cells.count == 24
    assert cells(np.array([[0, 1, -1], [0, 1, 0], [0, 2, -1], [1, 3, 2]])).tolist() == [0, 1, 4, 23]
    square = Cells(spaces.MultiDiscrete([[2, 3], [4, 5]]))
    everything = np.stack(np.meshgrid(*map(np.arange, (2, 3, 4, 5)), indexing="ij"), -1).reshape(-1, 2, 2)
    assert square(everything).tolist() == list(range(120))


def test_box_cells_at_their_borders() -> None:
    box = spaces.Box(np.array([0.0, -1.0], np.float32), np.array([1.0, 1.0], np.float32))
    cells = Cells(box, (4, 2))
    assert cells.count == 8
    seen = np.array(
        [[0.0, -1.0], [0.24, -0.01], [0.25, 0.0], [1.0, 1.0], [-9.0, 9.0], [0.75, -9.0]], np.float32
    )
    assert cells(seen).tolist() == [0, 0, 3, 7, 1, 6]
    assert Cells(box)(seen).max() == 99  # ten parts each
    assert Cells(box, (2,), (0.5, 0.0), (2.5, 4.0))(np.array([[1.5, 1.9]])).tolist() == [2]


def test_cells_refuse_in_one_line() -> None:
    endless = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    image = spaces.Box(0, 255, (210, 160, 3), np.uint8)
    for match, build in [
        (r"dimension 0, 1 of the observation has no bound.*--low with 2 numbers", lambda: Cells(endless)),
        (r"--high with 2 numbers", lambda: Cells(endless, low=(-1.0,))),
        (r"--bins needs one number, or 2.*got 3", lambda: Cells(endless, (1, 2, 3))),
        (r"--low 1 must be less than --high 1 \(dimension 1\)", lambda: Cells(endless, (2,), (0, 1), (1,))),
        (r"--bins, --low and --high cut a Box.*Discrete\(2\)", lambda: Cells(TWO, (3,))),
        (r"not Text", lambda: Cells(spaces.Text(3))),
        (r"10\^100800\.0 entries, at most 10\^8", lambda: Cells(image)),
        (r"10\^8\.3 entries", lambda: Table(spaces.Discrete(10**8), 2, 0.1)),
    ]:
        with pytest.raises(UserError, match=match):
            build()


# -- the update ------------------------------------------------------------------------------------------------------


def test_targets_by_hand() -> None:
    reward, discount = np.array([1.0, 2.0]), np.array([0.5, 0.0])
    next_q = np.array([[3.0, 4.0], [5.0, 6.0]])
    assert q_target(reward, discount, next_q).tolist() == [3.0, 2.0]  # 1 + .5 * 4;  terminated
    assert sarsa_target(reward, discount, next_q, np.array([0, 1])).tolist() == [2.5, 2.0]  # 1 + .5 * 3


def test_table_learns_the_mean_of_each_pair() -> None:
    table = Table(spaces.Discrete(3), 2, 0.5, initial=1.0)
    metrics = table.learn(np.array([0, 2, 0]), np.array([1, 0, 1]), np.array([4.0, 2.0, 8.0]))
    assert table.q.tolist() == [[1, 1 + 0.5 * 5], [1, 1], [1 + 0.5 * 1, 1]]
    assert float(metrics["loss/td"]) == pytest.approx((9 + 1 + 49) / 6)
    assert table.values(np.array([0, 2])).tolist() == [[1, 3.5], [1.5, 1]]


def test_steps_fall_with_the_updates_of_a_pair() -> None:
    table = Table(spaces.Discrete(2), 1, 1.0, omega=1.0)  # lr / n: the plain mean of what was learned
    for target in (6.0, 0.0, 3.0, 7.0):
        table.learn(np.array([1]), np.array([0]), np.array([target]))
    assert table.q[:, 0].tolist() == [0, 4] and table.visits[:, 0].tolist() == [0, 4]
    half = Table(spaces.Discrete(1), 1, 0.8, omega=0.5)
    for target in (1.0, 1.0):
        half.learn(np.array([0]), np.array([0]), np.array([target]))
    assert half.q[0, 0] == pytest.approx(0.8 + 0.8 / 2**0.5 * 0.2)


def test_counting_and_sorting_find_the_same_means() -> None:
    rng = np.random.default_rng(0)
    pair, target = rng.integers(40, size=64), rng.normal(size=64)
    naive = {p: [t for q, t in zip(pair, target, strict=True) if q == p] for p in sorted(set(pair.tolist()))}
    for size in (40, 10_000):  # counted; sorted
        seen, mean = means(pair, target, size)
        assert seen.tolist() == list(naive)
        assert mean == pytest.approx([np.mean(each) for each in naive.values()])
    assert np.array_equal(means(pair, target, 40)[1], means(pair, target, 10_000)[1])


def batch(*rows: tuple[int, int, float, int, float]) -> Batch:
    obs, action, reward, next_obs, discount = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Batch(obs, action, reward, next_obs, discount, torch.ones(len(rows)), torch.arange(len(rows)))


def test_q_learning_update_by_hand() -> None:
    agent = QTable(lr=0.5)
    agent.build(spaces.Discrete(2, start=7), spaces.Discrete(2, start=3), CPU, np.random.SeedSequence(0))
    first = agent.update(batch((7, 3, 1.0, 8, 0.5), (8, 4, 2.0, 7, 0.0)))
    assert agent.q.q.tolist() == [[0.5, 0], [0, 1]] and float(first.metrics["q/target"]) == 1.5
    both = batch((7, 3, 1.0, 8, 0.5), (8, 3, 0.0, 7, 0.5))
    agent.update(both, 2)  # one after the other: the second target sees what the first changed
    assert agent.q.q.tolist() == [[1.0, 0], [0.25, 1]] and agent.updates == 3
    assert agent.greedy(np.array([7, 8]), np.ones(2, bool), ()).action.tolist() == [3, 4]


def test_sarsa_update_by_hand() -> None:
    agent = SARSA(lr=0.5, gamma=0.5)
    agent.build(spaces.Discrete(2), spaces.Discrete(2, start=3), CPU, np.random.SeedSequence(0))
    agent.q.q[...] = [[0, 2], [4, 6]]  # type: ignore[attr-defined]
    five = Five(*map(np.array, ([0, 0], [3, 4], [1.0, 1.0], [1, 1], [False, True], [3, 4])))
    agent.learn(five)
    assert agent.q.values(np.array([0])).tolist() == [[1.5, 1.5]]  # 0 + .5 (1 + .5 * 4);  2 + .5 (1 - 2)


def test_sarsa_on_a_net_takes_the_step_of_its_loss() -> None:
    """Against torch's own Adam on the same loss."""
    space = spaces.Box(-1, 1, (3,), np.float32)
    agent = SARSA(backbone="mlp", net={"hidden": (8,)}, lr=0.01, gamma=0.9, max_grad_norm=0.5)
    agent.build(space, TWO, CPU, np.random.SeedSequence(0))
    net = copy.deepcopy(agent.q.net)  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    obs, next_obs = rng.normal(size=(2, 16, 3)).astype(np.float32)
    action, following = rng.integers(2, size=(2, 16))
    reward, terminated = rng.normal(size=16) * 3, rng.random(16) < 0.3
    with torch.no_grad():
        after = net(torch.from_numpy(next_obs)).numpy()
    target = torch.tensor(sarsa_target(reward, 0.9 * ~terminated, after, following), dtype=torch.float32)
    loss = td_loss(net(torch.from_numpy(obs)), torch.from_numpy(action), target, torch.ones(16), False)[0]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    optimizer.step()
    update = agent.learn(Five(obs, action, reward, next_obs, terminated, following))
    assert float(update.metrics["loss/td"]) == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(agent.q.net.parameters(), net.parameters(), strict=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


# -- exact values ----------------------------------------------------------------------------------------------------


def chain(reward: float = 1.0) -> Dynamics:
    """Two states: action 0 goes on (to state 1, then to the end with a reward), action 1 goes back to state 0."""
    probability = np.ones((2, 2, 1))
    next_state = np.array([[[1], [0]], [[1], [0]]])
    rewards = np.array([[[0.0], [0.0]], [[reward], [0.0]]])
    terminated = np.array([[[False], [False]], [[True], [False]]])
    return Dynamics(probability, next_state, rewards, terminated, np.array([1.0, 0.0]))


def test_optimal_q_by_hand() -> None:
    assert optimal_q(chain(), 0.5) == pytest.approx(np.array([[0.5, 0.25], [1.0, 0.25]]))
    assert optimal_q(chain(), 1.0) == pytest.approx(np.ones((2, 2)))
    endless = chain()._replace(terminated=np.zeros((2, 2, 1), bool))
    with pytest.raises(ValueError, match="has not converged after 50 sweeps: with gamma 1"):
        optimal_q(endless, 1.0, most=50)


@pytest.mark.parametrize(
    ("env_id", "gamma", "start", "best"),
    [
        ("chordate/FrozenLakeDeterministic-v0", 0.9, 0, 0.9**5),  # six steps to the goal
        ("CliffWalking-v1", 1.0, 36, -13.0),
        ("Taxi-v4", 1.0, None, 7.93),
    ],
)
def test_optimal_q_of_known_problems(env_id: str, gamma: float, start: int | None, best: float) -> None:
    table = envs.dynamics(envs.resolve(env_id))
    value = optimal_q(table, gamma).max(1)
    found = table.initial @ value if start is None else value[start]
    assert found == pytest.approx(best, abs=0.005)


# -- what is learned -------------------------------------------------------------------------------------------------


def reachable(table: Dynamics) -> np.ndarray:
    """States that an episode can be in before its end."""
    found = set(np.flatnonzero(table.initial).tolist())
    fresh = found
    while fresh:
        rows = sorted(fresh)
        on = (table.probability[rows] > 0) & ~table.terminated[rows]
        fresh = set(table.next_state[rows][on].tolist()) - found
        found = found | fresh
    return np.array(sorted(found))


QUICK = dict(learning_starts=2_000, capacity=50_000, batch=512, train_every=256, lr=0.5, epsilon_end=0.5)


@pytest.mark.parametrize(
    ("env_id", "gamma", "steps"),
    [("chordate/FrozenLakeDeterministic-v0", 0.99, 400_000), ("CliffWalking-v1", 1.0, 400_000)],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learned_q_is_exact_on_deterministic_problems(
    env_id: str, gamma: float, steps: int, seed: int
) -> None:
    agent = QTable(gamma=gamma, **QUICK)
    tabular(agent, env_id, steps, seed=seed, num_envs=256)
    table = envs.dynamics(envs.resolve(env_id))
    states = reachable(table)
    assert np.abs(agent.q.q - optimal_q(table, gamma))[states].max() <= 0.01  # type: ignore[attr-defined]


def test_sarsa_takes_the_safe_path() -> None:
    agent = SARSA(gamma=1.0, lr=0.1, epsilon_start=0.1, epsilon_end=0.1)
    tabular(agent, "CliffWalking-v1", 2_000_000, num_envs=1_024)
    table, state, path, total = envs.dynamics(envs.resolve("CliffWalking-v1")), 36, [], 0.0
    for _ in range(40):
        action = int(agent.values(np.array([state])).argmax())
        total += table.reward[state, action, 0]
        if table.terminated[state, action, 0]:
            break
        state = int(table.next_state[state, action, 0])
        path.append(divmod(state, 12))
    assert total in (-15, -17)  # one row away from the edge, or two
    assert not [(row, column) for row, column in path if row == 2 and 1 <= column <= 10]


def test_sarsa_learns_the_value_of_the_policy_that_acts() -> None:
    """At random: q(s, a) = sum_j p_j (r_j + gamma (1 - terminated_j) mean_a' q(s'_j, a'))."""
    agent = SARSA(gamma=0.9, lr=1.0, net={"omega": 0.7}, epsilon_start=1.0, epsilon_end=1.0)
    tabular(agent, "FrozenLake-v1", 1_500_000, num_envs=256)
    table = envs.dynamics(envs.resolve("FrozenLake-v1"))
    alive = ~table.terminated
    q = np.zeros((16, 4))
    for _ in range(500):
        q = (table.probability * (table.reward + 0.9 * alive * q.mean(1)[table.next_state])).sum(2)
    states = reachable(table)
    assert agent.values(states) == pytest.approx(q[states], abs=0.03)
    assert np.abs(optimal_q(table, 0.9) - q)[states].max() > 0.15  # which is far from Q*


@pytest.mark.parametrize(
    "agent",
    [
        # the last state is in one cell with the one before, or else nobody ever acts in it
        QTable(gamma=0.8, learning_starts=64, lr=0.2, net={"bins": (8,)}),
        SARSA(gamma=0.8, lr=0.2, backbone="table", net={"bins": (8,)}),
        SARSA(gamma=0.8, lr=0.01, backbone="mlp", net={"hidden": (32,)}),
    ],
    ids=("qtable", "sarsa", "sarsa-mlp"),
)
def test_truncation_bootstraps_and_termination_does_not(agent: QTable | SARSA) -> None:
    tabular(agent, "chordate/EndlessReward-v0", 2_000)
    assert agent.values(np.zeros((1, 1), np.float32)).max() == pytest.approx(5.0, rel=0.1)
    late = np.full((1, 1), 0.9, np.float32)
    for env_id, last in (("Truncation", 5.0), ("Termination", 1.0)):
        other = type(agent)(agent.config, backbone=agent.backbone, net=agent.net)
        tabular(other, f"chordate/{env_id}-v0", 6_000)
        assert other.values(late).max() == pytest.approx(last, rel=0.2), env_id


def test_what_follows_a_cut_is_drawn_where_it_was_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the truncated clock the successor is time 1, never the time 0 of the next episode."""
    agent, seen, learned = SARSA(epsilon_start=0.5, epsilon_end=0.5), [], []
    act, learn = SARSA.act, SARSA.learn

    def noted(self: SARSA, obs: Any, *rest: Any) -> Any:
        decision = act(self, obs, *rest)
        seen.append((np.array(obs), decision.action))
        return decision

    def taught(self: SARSA, five: Five) -> Any:
        learned.append((five, list(seen)))
        return learn(self, five)

    monkeypatch.setattr(SARSA, "act", noted)
    monkeypatch.setattr(SARSA, "learn", taught)
    tabular(agent, "chordate/Truncation-v0", 60, num_envs=2)
    cut = 0
    for (five, drawn), (later, _) in itertools.pairwise(learned):
        ended = five.next_obs[:, 0] >= 1
        assert np.array_equal(five.next_action[~ended], later.action[~ended])  # what it took, it learned from
        if ended.any():
            cut += 1
            obs, action = drawn[-1]  # the draw where the episode was cut, after that for the next one
            assert (obs == five.next_obs).all() and np.array_equal(five.next_action, action)
            assert np.array_equal(later.action, drawn[-2][1])
    assert cut == 2


def test_exploration_frequencies_and_schedules() -> None:
    agent = QTable(epsilon_start=0.4, epsilon_end=0.4, learning_starts=10)
    agent.build(TWO, spaces.Discrete(4), CPU, np.random.SeedSequence(0))
    agent.q.q[:, 2] = 1  # type: ignore[attr-defined]
    obs, first = np.zeros(4_000, np.int64), np.ones(4_000, bool)
    assert float((agent.act(obs, first, (), 10).action != 2).mean()) == pytest.approx(0.3, abs=0.03)
    assert agent.exploration(9) == 1.0
    other = SARSA(epsilon_start=0.9, epsilon_end=0.1, epsilon_steps=100)
    assert [other.exploration(step) for step in (0, 50, 100, 999)] == pytest.approx([0.9, 0.5, 0.1, 0.1])
    assert agent.probabilities(obs[:1]).tolist() == [[0, 0, 1, 0]]


# -- knobs, seeds ----------------------------------------------------------------------------------------------------

BOX = dict(net=dict(bins=(6,), low=(-2.4, -3.0, -0.21, -3.0), high=(2.4, 3.0, 0.21, 3.0)))
# one other value for each knob; a new knob without an entry fails the tests below
OTHER = dict(
    lr=0.3, gamma=0.5, batch=16, train_every=4, updates=2, learning_starts=80, capacity=100,
    epsilon_start=0.5, epsilon_end=0.5, epsilon_steps=100, max_grad_norm=0.01,
    rollout=3,
)  # fmt: skip
OTHER_NET = dict(initial=2.0, omega=0.5, bins=(5,), low=(-1.0,), high=(1.0,))


@pytest.mark.parametrize("name", [field.name for field in fields(QConfig)])
def test_every_knob_of_q_learning_is_live(name: str) -> None:
    base = dict(learning_starts=64, epsilon_steps=200, batch=32, capacity=2_000)
    assert OTHER[name] != getattr(QConfig(**base), name)  # type: ignore[arg-type]

    def run(**knobs: Any) -> str:
        agent = QTable(**{**base, **knobs}, **BOX)
        tabular(agent, PAYS, 260)
        return digest(agent)

    assert run() != run(**{name: OTHER[name]})


@pytest.mark.parametrize("name", [field.name for field in fields(SConfig)])
def test_every_knob_of_sarsa_is_live(name: str) -> None:
    kind: dict[str, Any] = dict(backbone="table", **BOX)
    if name == "max_grad_norm":
        kind = dict(backbone="mlp", net={"hidden": (8,)})

    def run(**knobs: Any) -> str:
        agent = SARSA(**{"epsilon_steps": 200, **knobs}, **kind)
        tabular(agent, PAYS, 260)
        return digest(agent)

    assert run() != run(**{name: OTHER[name]})


@pytest.mark.parametrize("name", [field.name for field in knobs_of(Table)])
def test_every_knob_of_the_table_is_live(name: str) -> None:
    def run(**net: Any) -> str:
        agent = SARSA(backbone="table", net={**BOX["net"], **net})
        tabular(agent, PAYS, 260)
        return digest(agent)

    assert run() != run(**{name: OTHER_NET[name]})


@pytest.mark.parametrize("make", [lambda: QTable(learning_starts=64), SARSA], ids=("qtable", "sarsa"))
def test_same_seed_same_bits_another_seed_others(make: Any) -> None:
    found = []
    for seed in (1, 1, 2):
        agent = make()
        watch = tabular(agent, "FrozenLake-v1", 3_000, seed=seed, num_envs=4)
        found.append((digest(agent), watch.updates, watch.episodes))
    assert found[0] == found[1]
    assert all(one != other for one, other in zip(found[0], found[2], strict=True))


@pytest.mark.parametrize(
    "agent",
    [QTable(net={"omega": 0.6}), SARSA(), SARSA(backbone="mlp")],
    ids=("qtable", "sarsa", "sarsa-mlp"),
)
def test_state_dict_round_trip_is_exact(agent: QTable | SARSA) -> None:
    other = type(agent)(agent.config, backbone=agent.backbone, net=agent.net)
    tabular(agent, "FrozenLake-v1", 2_000, num_envs=2)
    other.build(spaces.Discrete(16), spaces.Discrete(4), CPU, np.random.SeedSequence(5))
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    one, two = agent.state_dict(), other.state_dict()
    assert one["counters"] == two["counters"] and one.keys() == two.keys()
    for group in one.keys() - {"counters"}:
        assert all(torch.equal(one[group][name], two[group][name]) for name in one[group])
    obs, first = np.arange(16), np.zeros(16, bool)
    assert np.array_equal(agent.act(obs, first, (), 0).action, other.act(obs, first, (), 0).action)


# -- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", [QTable(), SARSA()], ids=("qtable", "sarsa"))
def test_box_actions_are_refused_in_one_line(agent: QTable | SARSA) -> None:
    with pytest.raises(UserError, match=rf"{agent.name} drives Discrete actions"):
        agent.build(TWO, spaces.Box(-1, 1, (2,)), CPU, np.random.SeedSequence(0))


def test_what_has_no_effect_is_refused() -> None:
    with pytest.raises(UserError, match="max-grad-norm has no effect on a table"):
        SARSA(max_grad_norm=1.0).build(TWO, TWO, CPU, np.random.SeedSequence(0))
    with pytest.raises(UserError, match="at most 1, got 2"):
        SARSA(lr=2.0).build(TWO, TWO, CPU, np.random.SeedSequence(0))
    with pytest.raises(UserError, match=r"gama.*gamma"):
        QTable(gama=0.9)


def test_weights_of_another_table_are_refused() -> None:
    table = Table(spaces.Discrete(3), 2, 0.1)
    with pytest.raises(RuntimeError, match=r"\(1, 2\), not \(3, 2\)"):
        table.load_weights({"q": torch.zeros(1, 2, dtype=torch.float64)})


# -- the real command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name, preset in PRESETS.items() if preset.agent in ("qtable", "sarsa")]
)
def test_presets_run(tmp_path: Any, name: str) -> None:
    preset = PRESETS[name]
    env_id = envs.full_id(preset.envs[0].removesuffix("-v*"))
    short = dict(steps=60_000, learning_starts=20_000) if preset.agent == "qtable" else dict(steps=20_000)
    quiet = dict(eval_every=0, final_episodes=1, video=False, say=lambda _: None)
    result = train(preset.agent, env_id, run=tmp_path / "run", **short, **quiet)
    assert result.summary["finished"] and result.agent.updates >= 5  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("agent", "env_id", "least"),
    [
        (agent, env_id, least)
        for agent in ("qtable", "sarsa")
        for env_id, least in (("FrozenLake-v1", 0.71), ("FrozenLake8x8-v1", 0.86), ("Taxi-v4", 7.8))
    ]
    + [("qtable", "CliffWalking-v1", -13), ("sarsa", "CliffWalking-v1", -17)],
)
def test_presets_reach_their_level(tmp_path: Any, agent: str, env_id: str, least: float, seed: int) -> None:
    result = train(agent, env_id, run=tmp_path / "run", seed=seed, video=False, say=lambda _: None)
    assert result.summary["evaluation"]["mean"] >= least
