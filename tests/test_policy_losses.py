"""Losses and gradients of the policy-gradient agents against references by hand, from rollout to gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from agents import load
from agents.actor import Samples
from agents.ppo import approximate_kl, policy_loss, value_loss
from agents.reinforce import whole_return
from replay import Decision, Rollout
from tests.tools import CPU, VECTOR

THREE, PUSH = spaces.Discrete(3), spaces.Box(-2, 2, (2,), np.float32)
GAMMA, LAM = 0.9, 0.8
T, N = 6, 4


def built(name: str, space: spaces.Space[Any], **knobs: Any) -> Any:
    agent = load(name)(net={"hidden": (8,), "activation": "tanh"}, orthogonal=False, gamma=GAMMA, **knobs)
    agent.build(VECTOR, space, CPU, np.random.SeedSequence(1), print)
    return agent


def rollout_of(agent: Any, space: spaces.Space[Any], t: int = T, n: int = N, seed: int = 0) -> Rollout:
    """Random steps; log-probabilities and values are near those of the agent, not equal to them."""
    rng = np.random.default_rng(seed)
    obs, cut_all = (rng.standard_normal((t, n, 3)).astype(np.float32) for _ in range(2))
    terminated, truncated = rng.random((t, n)) < 0.2, rng.random((t, n)) < 0.2
    truncated &= ~terminated
    if isinstance(space, spaces.Discrete):
        action = rng.integers(3, size=(t, n, 1)).astype(np.float32)
    else:
        action = rng.standard_normal((t, n, 2)).astype(np.float32)
    p, value = reference(agent, torch.from_numpy(obs.reshape(-1, 3)))
    logp, _ = by_hand(space, p, torch.from_numpy(action.reshape(t * n, -1)).double())
    shift = rng.uniform(-0.6, 0.6, (2, t, n))
    last_obs = rng.standard_normal((n, 3)).astype(np.float32)
    last = reference(agent, torch.from_numpy(last_obs))[1].detach().float().numpy()
    return Rollout(
        obs=obs,
        action=action,
        reward=rng.standard_normal((t, n)).astype(np.float32),
        terminated=terminated,
        truncated=truncated,
        first=np.zeros((t, n), bool),
        logp=(logp.detach().numpy().reshape(t, n) + shift[0]).astype(np.float32),
        value=(value.detach().numpy().reshape(t, n) + shift[1]).astype(np.float32),
        cut_obs=cut_all[truncated],
        last_obs=last_obs,
        last=Decision(None, (), None, None, last),
        state=(),
    )


def weights_of(agent: Any) -> dict[str, Tensor]:
    """The weights in double precision, as leaves of a graph."""
    return {k: v.detach().double().requires_grad_() for k, v in agent.model.named_parameters()}


def reference(agent: Any, obs: Tensor, weights: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Parameters (B, P) and values (B,), layer by layer."""
    w, x = weights or weights_of(agent), obs.double()
    hidden = torch.tanh(x @ w["backbone.layers.0.weight"].T + w["backbone.layers.0.bias"])
    p = hidden @ w["policy.linear.weight"].T + w["policy.linear.bias"]
    if "policy.free" in w:
        p = torch.cat([p, w["policy.free"].expand(len(p), 2)], 1)
    of_critic = hidden
    if "critic.layers.0.weight" in w:
        of_critic = torch.tanh(x @ w["critic.layers.0.weight"].T + w["critic.layers.0.bias"])
    return p, (of_critic @ w["value.linear.weight"].T + w["value.linear.bias"])[:, 0]


def by_hand(space: spaces.Space[Any], p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy, (B,)."""
    if isinstance(space, spaces.Discrete):
        pi = p.exp() / p.exp().sum(1, keepdim=True)
        return pi[torch.arange(len(p)), x[:, 0].long()].log(), -(pi * pi.log()).sum(1)
    mean, std = p[:, :2], p[:, 2:].exp()
    density = (-((x - mean) ** 2) / (2 * std**2)).exp() / (std * math.sqrt(2 * math.pi))
    # an action is twice what lies in [-1, 1]
    entropy = 0.5 * (2 * math.pi * math.e * std**2).log() + math.log(2)
    return (density / 2).log().sum(1), entropy.sum(1)


def gae_by_hand(agent: Any, r: Rollout, lam: float = LAM) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns (T, N): for each step the sum over all later ones of its episode."""
    t, n = r.reward.shape
    cut = (
        iter(reference(agent, torch.from_numpy(r.cut_obs))[1].detach().numpy())
        if len(r.cut_obs)
        else iter(())
    )
    follows = np.zeros((t, n))
    for i in range(t):
        for j in range(n):
            later = r.last.value[j] if i == t - 1 else r.value[i + 1, j]  # type: ignore[index]
            follows[i, j] = 0 if r.terminated[i, j] else next(cut) if r.truncated[i, j] else later
    advantage = np.zeros((t, n))
    for i in range(t):
        for j in range(n):
            for k in range(i, t):
                delta = r.reward[k, j] + GAMMA * follows[k, j] - r.value[k, j]
                advantage[i, j] += (GAMMA * lam) ** (k - i) * delta
                if r.terminated[k, j] or r.truncated[k, j]:
                    break
    return advantage.reshape(-1), (advantage + r.value).reshape(-1)


def gradients(agent: Any, which: str = "optimizer") -> list[list[Tensor]]:
    """What the agent will give to its optimiser, step by step."""
    found: list[list[Tensor]] = []
    optimizer = getattr(agent, which)
    step = optimizer.step

    def noting(parts: Any, loss: Tensor) -> Tensor:
        found.append([loss, *(part.clone() for part in parts)])
        return step(parts, loss)

    optimizer.step = noting
    return found


def assert_equal(agent: Any, optimizer: Any, found: list[Tensor], loss: Tensor, w: dict[str, Tensor]) -> None:
    """Loss and gradients to 1e-6, each weight against its own."""
    assert found[0].item() == pytest.approx(loss.item(), abs=1e-6)
    names = {id(p): name for name, p in agent.model.named_parameters()}
    own = [names[id(p)] for p in optimizer.parameters]
    expected = torch.autograd.grad(loss, [w[name] for name in own])
    for name, gradient, reference in zip(own, found[1:], expected, strict=True):
        np.testing.assert_allclose(gradient.numpy(), reference.numpy(), atol=1e-6, rtol=0, err_msg=name)


both = pytest.mark.parametrize("space", [THREE, PUSH], ids=("discrete", "box"))

# -- PPO and A2C -----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("clip_value", [None, 0.1])
@pytest.mark.parametrize("normalize", ["minibatch", "rollout", "off"])
def test_ppo(space: Any, separate: bool, clip_value: float | None, normalize: str) -> None:
    knobs = dict(rollout=T, batch=T * N, epochs=1, lam=LAM, clip=0.2, entropy=0.03, value_weight=0.7)
    agent = built(
        "ppo", space, separate=separate, clip_value=clip_value, normalize_advantage=normalize, **knobs
    )
    r = rollout_of(agent, space)
    w, found = weights_of(agent), gradients(agent)
    metrics = agent.update(r).metrics

    a, goal = (torch.from_numpy(part) for part in gae_by_hand(agent_before(agent, w), r))
    p, value = reference(agent, torch.from_numpy(r.obs.reshape(-1, 3)), w)
    logp, entropy = by_hand(space, p, torch.from_numpy(r.action.reshape(T * N, -1)).double())
    if normalize != "off":
        a = (a - a.mean()) / ((((a - a.mean()) ** 2).sum() / (len(a) - 1)) ** 0.5 + 1e-8)
    old_logp, old_value = (torch.from_numpy(part.reshape(-1)).double() for part in (r.logp, r.value))
    ratio = (logp - old_logp).exp()
    terms, high, low = [], 0, 0
    for i in range(len(a)):
        near = min(max(ratio[i].item(), 0.8), 1.2)
        terms.append(
            torch.minimum(ratio[i] * a[i], near * a[i] if near != ratio[i].item() else ratio[i] * a[i])
        )
        high += bool(a[i] > 0 and ratio[i] > 1.2)
        low += bool(a[i] < 0 and ratio[i] < 0.8)
    assert high and low, "both sides of the clip are met"
    errors = (value - goal) ** 2
    if clip_value is not None:
        kept = old_value + torch.clip(value - old_value, -0.1, 0.1)
        assert ((kept - goal) ** 2 > errors).any() and ((kept - goal) ** 2 < errors).any()
        errors = torch.maximum(errors, (kept - goal) ** 2)
    loss = -torch.stack(terms).mean() + 0.7 * errors.mean() / 2 - 0.03 * entropy.mean()
    assert_equal(agent, agent.optimizer, found[0], loss, w)
    outside = ((ratio - 1).abs() > 0.2).double().mean().item()
    assert float(metrics["policy/clipped"]) == pytest.approx(outside)
    assert float(metrics["policy/kl"]) == pytest.approx((ratio - 1 - ratio.log()).mean().item(), abs=1e-5)


def agent_before(agent: Any, w: dict[str, Tensor]) -> Any:
    """The agent as its weights were, for `reference`."""

    class Before:
        class model:
            @staticmethod
            def named_parameters() -> Any:
                return w.items()

    return Before


@both
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_a2c(space: Any, separate: bool, normalize: bool) -> None:
    knobs = dict(rollout=T, lam=LAM, entropy=0.03, value_weight=0.7, separate=separate)
    agent = built("a2c", space, normalize_advantage=normalize, **knobs)
    r = rollout_of(agent, space)
    w, found = weights_of(agent), gradients(agent)
    agent.update(r)
    a, goal = (torch.from_numpy(part) for part in gae_by_hand(agent_before(agent, w), r))
    p, value = reference(agent, torch.from_numpy(r.obs.reshape(-1, 3)), w)
    logp, entropy = by_hand(space, p, torch.from_numpy(r.action.reshape(T * N, -1)).double())
    if normalize:
        a = (a - a.mean()) / (a.std() + 1e-8)
    loss = -(a * logp).mean() + 0.7 * ((value - goal) ** 2).mean() / 2 - 0.03 * entropy.mean()
    assert_equal(agent, agent.optimizer, found[0], loss, w)


def test_a2c_with_lam_1_takes_n_step_returns() -> None:
    agent = built("a2c", THREE, rollout=T)
    r = rollout_of(agent, THREE)
    found = agent.samples(r).return_.numpy().reshape(T, N)
    expected = gae_by_hand(agent, r, lam=1.0)[1].reshape(T, N)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_ppo_losses_by_hand() -> None:
    new, advantage = torch.log(torch.tensor([2.0, 2.0, 0.5, 0.5])), torch.tensor([1.0, -1.0, 1.0, -1.0])
    # min(2, 1.2), min(-2, -1.2), min(.5, .8), min(-.5, -.8)
    loss = policy_loss(new, torch.zeros(4), advantage, torch.tensor(0.2))
    assert loss.item() == pytest.approx(-(1.2 - 2 + 0.5 - 0.8) / 4)
    value, old, goal = torch.tensor([2.0, 1.0]), torch.tensor([0.0, 0.9]), torch.tensor([3.0, 0.0])
    assert value_loss(value, old, goal, None).item() == pytest.approx((1 + 1) / 4)
    assert value_loss(value, old, goal, 0.5).item() == pytest.approx((2.5**2 + 1) / 4)
    assert approximate_kl(new[:1], torch.zeros(1)).item() == pytest.approx(2 - 1 - math.log(2))


def test_ppo_visits_every_sample_once_in_each_epoch_in_a_new_order() -> None:
    agent = built("ppo", THREE, rollout=T, batch=8, epochs=3)
    seen: list[list[float]] = []
    step = agent._graph
    agent._graph = lambda *part: seen.append(part[3].tolist()) or step(*part)
    r = rollout_of(agent, THREE)._replace(value=np.arange(T * N, dtype=np.float32).reshape(T, N))
    agent.update(r)
    epochs = [[x for part in seen[k : k + 3] for x in part] for k in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(T * N)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and agent.updates == 9


def test_ppo_ends_an_update_when_the_policy_moved_too_far() -> None:
    knobs = dict(rollout=T, batch=T * N, epochs=20, lr=0.02)
    free, early = built("ppo", THREE, **knobs), built("ppo", THREE, **knobs, target_kl=0.02)
    r = rollout_of(free, THREE)
    p, _ = reference(free, torch.from_numpy(r.obs.reshape(-1, 3)))
    logp, _ = by_hand(THREE, p, torch.from_numpy(r.action.reshape(T * N, -1)).double())
    r = r._replace(logp=logp.detach().float().numpy().reshape(T, N))
    kls: list[float] = []
    for agent in (free, early):
        step = agent._graph
        agent._graph = lambda *part, step=step: (
            kls.append(float((found := step(*part))["policy/kl"])) or found
        )
        agent.update(r)
    assert free.updates == 20 and 1 < early.updates < 20
    assert kls[: early.updates] == kls[20:]  # the same until it ends
    assert kls[-1] > 0.03 >= max(kls[20:-1])


def test_schedules_of_step_size_and_clip() -> None:
    knobs = dict(lr=1e-2, lr_end=2e-3, lr_steps=96, clip=0.4, clip_end=0.1, clip_steps=48)
    agent = built("ppo", THREE, rollout=T, batch=T * N, epochs=2, **knobs)
    rates, clips = [], []
    begin, step = agent.optimizer.begin, agent._graph
    agent.optimizer.begin = lambda lr: rates.append(lr) or begin(lr)
    agent._graph = lambda *part: clips.append(float(agent._clip)) or step(*part)
    for seed in range(5):  # 24 steps each
        agent.update(rollout_of(agent, THREE, seed=seed))
    assert rates[::2] == rates[1::2] == pytest.approx([8e-3, 6e-3, 4e-3, 2e-3, 2e-3])
    assert clips[::2] == pytest.approx([0.25, 0.1, 0.1, 0.1, 0.1])
    assert agent.schedule(24) == pytest.approx({"train/lr": 8e-3, "train/clip": 0.25})


# -- REINFORCE -------------------------------------------------------------------------------------------------------


def test_credit_by_hand() -> None:
    column = lambda *x: np.array(x, np.float32)[:, None]  # noqa: E731
    reward, ended = column(1, 2, 4, 8, 16), column(0, 0, 1, 0, 1).astype(bool)
    cut = np.zeros((5, 1), np.float32)
    assert whole_return(reward, cut, ended, ended, 0.5)[:, 0].tolist() == [
        3,
        3,
        3,
        16,
        16,
    ]  # 1 + 1 + 1, 8 + 8
    agent = built("reinforce", THREE, baseline="none", credit="to_go")
    agent.config = agent.config.__class__(baseline="none", gamma=0.5)
    r = rollout_of(agent, THREE, t=5, n=1)._replace(
        reward=reward, terminated=ended, truncated=np.zeros_like(ended), value=cut
    )
    advantage, return_ = agent.estimate(r, reward, cut)
    assert advantage[:, 0].tolist() == return_[:, 0].tolist() == [3, 4, 4, 16, 16]


def episodes_of(agent: Any, space: Any, ends: str) -> Rollout:
    """Three episodes in a row, 12 steps, the second one truncated where `ends` says so."""
    r = rollout_of(agent, space, t=12, n=1)
    terminated, truncated = np.zeros((12, 1), bool), np.zeros((12, 1), bool)
    terminated[[3, 11]] = True
    (truncated if ends == "truncation" else terminated)[8] = True
    cut = np.ones((int(truncated.sum()), 3), np.float32)
    return r._replace(terminated=terminated, truncated=truncated, cut_obs=cut)


@both
@pytest.mark.parametrize("baseline", ["none", "average", "learned"])
@pytest.mark.parametrize("credit", ["to_go", "whole"])
@pytest.mark.parametrize("ends", ["termination", "truncation"])
def test_reinforce(space: Any, baseline: str, credit: str, ends: str) -> None:
    rate = dict(baseline_rate=0.25) if baseline == "average" else {}
    knobs = dict(baseline=baseline, credit=credit, normalize_advantage=False, entropy=0.03, **rate)
    agent = built("reinforce", space, **knobs)
    average = None
    for number in range(3 if baseline == "average" else 1):
        r = episodes_of(agent, space, ends)
        r = r._replace(reward=(r.reward + number) / 10)  # so that fp32 has 1e-6
        w, found, fitted = weights_of(agent), gradients(agent), gradients(agent, "_critic")
        agent.update(r)
        before = agent_before(agent, w)
        tail = 0.0
        if baseline == "learned" and ends == "truncation":
            tail = reference(before, torch.ones(1, 3))[1].item()
        g = np.zeros(12)
        for first, last, after in ((0, 3, 0.0), (4, 8, tail), (9, 11, 0.0)):
            for t in range(first, last + 1):
                g[t] = sum(GAMMA ** (k - t) * r.reward[k, 0] for k in range(t, last + 1))
                g[t] += GAMMA ** (last + 1 - t) * after
            if credit == "whole":
                g[first : last + 1] = g[first]
        b: Any = 0.0
        if baseline == "learned":
            b = r.value[:, 0].astype(float)
        if baseline == "average":
            b = g.mean() if average is None else average
            average = g.mean() if average is None else 0.75 * average + 0.25 * g.mean()
        p, value = reference(before, torch.from_numpy(r.obs.reshape(-1, 3)), w)
        logp, entropy = by_hand(space, p, torch.from_numpy(r.action.reshape(12, -1)).double())
        loss = -(torch.from_numpy(g - b) * logp).mean() - 0.03 * entropy.mean()
        assert_equal(agent, agent.optimizer, found[0], loss, w)
        if baseline == "learned":
            assert len(fitted) == 10
            of_value = ((value - torch.from_numpy(g)) ** 2).mean() / 2
            assert_equal(agent, agent._critic, fitted[0], of_value, w)
        else:
            assert not fitted


@pytest.mark.parametrize("baseline", ["none", "learned"])
def test_the_gradient_is_unbiased(baseline: str) -> None:
    """Of a bandit: the mean over 40,000 pulls is that of all arms weighted by pi, whatever the baseline."""
    agent = built("reinforce", spaces.Discrete(2), baseline=baseline, normalize_advantage=False)
    pay = np.array([1.0, 3.0])
    count = 40_000
    obs = np.full((count, 3), 0.5, np.float32)
    decision = agent.act(obs, np.ones(count, bool), (), 0)
    arms = decision.action
    reward = (pay[arms] + np.random.default_rng(0).standard_normal(count)).astype(np.float32)[:, None]
    over = np.ones((count, 1), bool)
    drawn = (
        decision.sample[:, None],
        reward,
        over,
        ~over,
        over,
        np.zeros((count, 0), np.float32),  # nobody compares
        agent.values(obs),
    )
    r = Rollout(obs[:, None], *drawn, obs[:0], obs[:1], decision._replace(value=np.zeros(1, np.float32)), ())
    w, found = weights_of(agent), gradients(agent)
    agent.update(r)
    p, _ = reference(agent, torch.full((1, 3), 0.5), w)
    pi = p.softmax(1)[0]
    expected = torch.autograd.grad(-(pi * torch.from_numpy(pay)).sum(), w["policy.linear.bias"])[0]
    names = [
        name for name, _ in agent.model.named_parameters() if name.split(".")[0] in ("backbone", "policy")
    ]
    mean = found[0][1 + names.index("policy.linear.bias")]
    # a single pull's gradient spreads by about 2
    np.testing.assert_allclose(mean.numpy(), expected.numpy(), atol=4 * 2 / math.sqrt(count))
    assert expected.abs().max() > 0.3


def test_samples_lie_step_by_step() -> None:
    agent = built("ppo", PUSH, rollout=T, batch=T * N)
    r = rollout_of(agent, PUSH)
    samples = agent.samples(r)
    assert isinstance(samples, Samples)
    for i, (t, n) in enumerate(np.ndindex(T, N)):
        assert np.array_equal(samples.inputs.obs[i], r.obs[t, n]) and np.array_equal(
            samples.action[i], r.action[t, n]
        )
        assert (samples.logp[i], samples.value[i]) == (r.logp[t, n], r.value[t, n])


def test_rewards_are_clipped_where_that_is_asked_for() -> None:
    plain, clipped = (built("a2c", THREE, rollout=T, clip_reward=on) for on in (False, True))
    r = rollout_of(plain, THREE)
    sign = r._replace(reward=np.sign(r.reward))
    assert torch.equal(clipped.samples(r).return_, plain.samples(sign).return_)
    assert not torch.equal(clipped.samples(r).return_, plain.samples(r).return_)
