"""The runs whose traces are pinned, and how a trace is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs import EnvConfig
from tests.tools import trained

FOLDER = Path(__file__).parent
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
}  # fmt: skip


def trace(name: str, seed: int = 1) -> dict[str, Any]:
    """Losses and values at ten updates, finished episodes, and the norm of each weight after the run."""
    env_id, steps, settings = RUNS[name]
    agent, watch = trained(env_id, steps, seed=seed, **settings)
    chosen = np.linspace(0, len(watch.updates) - 1, 10).astype(int)
    return {
        "loss": [watch.updates[i]["loss/td"] for i in chosen],
        "q": [watch.updates[i]["q/mean"] for i in chosen],
        "grad_norm": [watch.updates[i]["train/grad_norm"] for i in chosen],
        "episodes": [list(episode) for episode in watch.episodes],
        "weights": {key: float(torch.linalg.vector_norm(w)) for key, w in agent.online.state_dict().items()},
        "updates": agent.updates,
    }
