"""Agents: one file per algorithm, the loop that drives them, and the commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.dqn import DQN
    from agents.qtable import QTable
    from agents.sarsa import SARSA
    from agents.training import resume, train

__all__ = ["AGENTS", "DQN", "SARSA", "QTable", "load", "resume", "train"]

# name -> module and class; a table of names, so that listing the choices imports no torch
AGENTS = {
    "dqn": ("agents.dqn", "DQN"),
    "qtable": ("agents.qtable", "QTable"),
    "sarsa": ("agents.sarsa", "SARSA"),
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
