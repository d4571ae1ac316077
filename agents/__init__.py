"""Agents: one file per algorithm, the loop that drives them, and the commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.a2c import A2C
    from agents.dqn import DQN
    from agents.ppo import PPO
    from agents.qtable import QTable
    from agents.reinforce import REINFORCE
    from agents.sarsa import SARSA
    from agents.training import resume, train
    from agents.trpo import TRPO

__all__ = [
    "A2C",
    "AGENTS",
    "DQN",
    "PPO",
    "REINFORCE",
    "SARSA",
    "TRPO",
    "QTable",
    "load",
    "resume",
    "train",
]

# name -> module and class; a table of names, so that listing the choices imports no torch
AGENTS = {
    "qtable": ("agents.qtable", "QTable"),
    "sarsa": ("agents.sarsa", "SARSA"),
    "dqn": ("agents.dqn", "DQN"),
    "reinforce": ("agents.reinforce", "REINFORCE"),
    "a2c": ("agents.a2c", "A2C"),
    "trpo": ("agents.trpo", "TRPO"),
    "ppo": ("agents.ppo", "PPO"),
}


def load(name: str) -> Any:
    """The agent class of that name; `UserError` with the nearest match if there is none."""
    from importlib import import_module

    from runs.config import pick

    module, attribute = pick("agent", name, AGENTS)
    return getattr(import_module(module), attribute)


def __getattr__(name: str) -> Any:
    """Import torch only when an agent is asked for."""
    if name in ("resume", "train"):
        from agents import training

        return getattr(training, name)
    for key, (_, attribute) in AGENTS.items():
        if name == attribute:
            return load(key)
    raise AttributeError(f"module 'agents' has no attribute {name!r}")
