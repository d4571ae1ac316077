"""The runs whose traces are pinned, and how a trace is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.qtable import QTable
from agents.sarsa import SARSA
from envs import EnvConfig
from tests.tools import acted, tabular, trained

FOLDER = Path(__file__).parent
LAKE = "chordate/FrozenLakeDeterministic-v0"
HIDDEN = "chordate/CartPoleNoVel-v1"
LIGHT = {"net": "light", "features": 32, "norm": True}

# name -> environment, steps and settings
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dqn-mlp-cartpole": (
        "CartPole-v1",
        400,
        dict(num_envs=2, learning_starts=100, train_every=4, updates=2, lr=1e-3, n_step=3, target_every=25),
    ),
    "dqn-cnn-pong": (
        "ALE/Pong-v5",
        160,
        dict(
            num_envs=2, env_config=EnvConfig(size=42), net=LIGHT, learning_starts=60, train_every=4, batch=16, lr=1e-3,
            n_step=2, target_every=10, capacity=1_000, clip_reward=True,
        ),
    ),
    "dqn-lstm-cartpole": (
        HIDDEN,
        400,
        dict(
            num_envs=2, backbone="lstm", net={"width": 16}, learning_starts=100, train_every=8, batch=8, lr=1e-3,
            n_step=2, target_every=10, sequence=12, burn_in=4, alpha=0.6,
        ),
    ),
}  # fmt: skip


# name -> agent, environment, steps
TABULAR: dict[str, tuple[Callable[[], Any], str, int]] = {
    "qtable-frozenlake": (lambda: QTable(learning_starts=100, train_every=4, lr=0.3, net={"omega": 0.6}), LAKE, 4_000),
    "sarsa-frozenlake": (lambda: SARSA(lr=0.3, epsilon_steps=2_000), LAKE, 4_000),
    "sarsa-mlp-cartpole": (
        lambda: SARSA(backbone="mlp", net={"hidden": (32,)}, epsilon_steps=200), "CartPole-v1", 400,
    ),
}  # fmt: skip
# name -> agent, environment, steps, settings
POLICIES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "reinforce-mlp-cartpole": ("reinforce", "CartPole-v1", 600, dict(episodes=2, credit="whole")),
    "a2c-mlp-cartpole": ("a2c", "CartPole-v1", 400, dict(lam=0.9, entropy=0.01)),
    "trpo-mlp-pendulum": (
        "trpo", "Pendulum-v1", 1_600, dict(rollout=40, batch=80, epochs=3, normalize_obs=True, normalize_reward=True),
    ),
    "ppo-mlp-identitydict": (
        "ppo", "chordate/IdentityDict-v0", 800, dict(rollout=20, batch=40, clip_value=0.2, lr_end=1e-4, lr_steps=800),
    ),
    "ppo-cnn-pong": (
        "ppo", "ALE/Pong-v5", 160,
        dict(rollout=10, batch=20, epochs=2, separate=False, net=LIGHT, env_config=EnvConfig(size=42)),
    ),
    "ppo-lstm-cartpole": (
        "ppo", HIDDEN, 400, dict(backbone="lstm", net={"width": 16}, rollout=20, batch=40, sequence=10, epochs=2),
    ),
    "a2c-transformer-cartpole": (
        "a2c", HIDDEN, 400, dict(backbone="transformer", net={"width": 16, "heads": 2, "context": 8}),
    ),
}  # fmt: skip
METRICS = {"loss": "loss/td", "q": "q/mean", "target": "q/target", "grad_norm": "train/grad_norm"}
METRICS |= {"policy": "loss/policy", "value": "loss/value", "entropy": "policy/entropy"}


def trace(name: str, seed: int = 1) -> dict[str, Any]:
    """Metrics at ten updates, finished episodes, and the norm of each weight after the run."""
    if name in RUNS:
        env_id, steps, settings = RUNS[name]
        agent, watch = trained(env_id, steps, seed=seed, **settings)
        metrics, weights = ("loss", "q", "grad_norm"), agent.online.state_dict()
    elif name in POLICIES:
        kind, env_id, steps, settings = POLICIES[name]
        agent, watch = acted(kind, env_id, steps, seed=seed, num_envs=4, **settings)
        metrics, weights = ("policy", "value", "entropy", "grad_norm"), agent.state_dict()["weights"]
    else:
        make, env_id, steps = TABULAR[name]
        agent = make()
        watch = tabular(agent, env_id, steps, seed=seed, num_envs=4)
        metrics, weights = ("loss", "target"), agent.state_dict()["weights"]
    chosen = np.linspace(0, len(watch.updates) - 1, 10).astype(int)
    return {
        **{key: [watch.updates[i][METRICS[key]] for i in chosen] for key in metrics},
        "episodes": [list(episode) for episode in watch.episodes],
        "weights": {key: float(torch.linalg.vector_norm(w)) for key, w in weights.items()},
        "updates": agent.updates,
    }
