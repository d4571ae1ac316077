"""Agents act on what they saw k steps ago if their net remembers that far, and cannot otherwise.

In `chordate/Memory<k>-v0` the last k observations are the same for both cues, so without the one before the best mean
return is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agents import load
from agents.evaluate import Evaluator
from backbones import Window
from backbones.base import Backbone
from envs import EnvConfig
from envs.diagnostic import Memory, memory_obs
from tests.tools import acted, tabular

# steps of training; gradients fade on their way through an LSTM: they need more samples where the cue is far
STEPS = {
    "reinforce": {1: 8_000, 8: 60_000, 32: 800_000},
    "a2c": {1: 8_000, 8: 60_000, 32: 200_000},
    "trpo": {1: 8_000, 8: 60_000, 32: 400_000},
    "ppo": {1: 8_000, 8: 60_000, 32: 300_000},
    "dqn": {1: 2_000, 8: 4_000, 32: 20_000},
    "sarsa": {1: 10_000, 8: 60_000, 32: 300_000},
}
EXACT = "chordate/Memory{}-v0"


def net_knobs(net: str, k: int) -> dict[str, Any]:
    """A small net that can reach the cue."""
    small: dict[str, Any] = {"width": 32, "encoder": "mlp", "hidden": (16,)}
    return small | ({"heads": 2, "layers": 1, "context": 2 * (k + 1)} if net == "transformer" else {})


def agent_after(name: str, net: str | Backbone, k: int, knobs: dict[str, Any], steps: int) -> Any:
    """An agent that was trained for so many steps."""
    length = 2 * (k + 1)  # of a sequence: two whole episodes
    ways: dict[str, dict[str, Any]] = {
        "reinforce": dict(episodes=16, lr=5e-3, gamma=0.5, baseline="average", entropy=0.02),
        "a2c": dict(lr=3e-3, rollout=length, optimizer="adam", entropy=0.02),
        "trpo": dict(rollout=length, batch=16 * length, delta=0.05, lr=1e-2, epochs=4),
        "ppo": dict(rollout=max(length, 32), batch=2 * length * {1: 16, 8: 4, 32: 1}[k])
        | dict(epochs=4, lr=2e-3 if k == 32 else 1e-3, entropy=0.02)
        | (dict(batch=16 * length, epochs=8) if (net, k) == ("transformer", 32) else {}),
        "dqn": dict(learning_starts=200, train_every=8, batch=16, lr=3e-3, target_every=25, capacity=4_000)
        | dict(gamma=0.9, epsilon_steps=2_000, epsilon_end=0.0)
        | ({"sequence": length, "burn_in": 2} if knobs.get("width") else {}),
        "sarsa": dict(lr=2e-3, rollout=length, gamma=0.9, epsilon_steps=steps * 5 // 6, epsilon_end=0.0),
    }
    if name in ("dqn", "sarsa"):
        agent = load(name)(backbone=net, net=knobs, **ways[name])
        tabular(agent, EXACT.format(k), steps, num_envs=4 if name == "dqn" else 8)
        return agent
    return acted(name, EXACT.format(k), steps, num_envs=16, backbone=net, net=knobs, **ways[name])[0]


def mean_return(agent: Any, k: int) -> float:
    """Of greedy episodes, as a run is evaluated."""
    evaluator = Evaluator(EXACT.format(k), EnvConfig(), 16, seed=9)
    found = [episode.return_ for episode in evaluator.episodes(agent)]
    evaluator.close()
    return float(np.mean(found))


@pytest.mark.parametrize("k", [1, 8, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("net", ["lstm", "transformer"])
@pytest.mark.parametrize("name", STEPS)
def test_acts_on_what_it_saw(name: str, net: str, k: int) -> None:
    assert mean_return(agent_after(name, net, k, net_knobs(net, k), STEPS[name][k]), k) == 1.0


@pytest.mark.parametrize("k", [1, 8])
def test_a_window_as_long_as_needed_is_enough(k: int) -> None:
    knobs = {"window": k + 1, "encoder": "mlp", "hidden": (16,)}
    assert mean_return(agent_after("a2c", "window", k, knobs, 20_000), k) == 1.0


@pytest.mark.parametrize("k", [1, 8, 32])
def test_a_window_sees_the_cue_exactly_if_it_is_as_long_as_needed(k: int) -> None:
    """Whatever its weights are."""
    episodes = np.stack([memory_obs(np.array([0, 1]), time, k) for time in range(k + 1)])  # (T, 2, 3)
    first = torch.zeros(k + 1, 2, dtype=torch.bool)
    first[0] = True
    for window, same in ((k, True), (k + 1, False)):
        torch.manual_seed(0)
        net = Window((3,), encoder="mlp", hidden=(16,), window=window)
        answer = net(torch.from_numpy(episodes), net.initial(2), first)[0][-1]
        assert torch.equal(answer[0], answer[1]) == same


@pytest.mark.parametrize("name", STEPS)
def test_without_memory_the_mean_return_is_zero(name: str) -> None:
    """At the question both cues look the same: what is right for one is wrong for the other, trained or not."""
    k, env = 8, Memory(8)
    agent = agent_after(name, "mlp", k, {"hidden": (16,)}, 4_000)
    seen: dict[float, float] = {}
    for seed in range(20):
        obs, _ = env.reset(seed=seed)
        cue, total, over, first = obs.tobytes(), 0.0, False, np.ones(1, bool)
        while not over:
            decision = agent.greedy(obs[None], first, agent.initial(1))
            obs, reward, over, _, _ = env.step(decision.action[0])
            total, first = total + reward, np.zeros(1, bool)
        seen[cue] = total
    assert sorted(seen.values()) == [-1.0, 1.0]
