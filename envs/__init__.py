"""Environments: making them, collecting true transitions from them, and small ones that diagnose learners."""

from envs.atari import EnvConfig
from envs.collect import Collector, Episode
from envs.diagnostic import register
from envs.make import describe, fps, frame_skip, frame_stack, full_id, make, resolve
from envs.render import View, action_names
from envs.table import Dynamics, dynamics

__all__ = [
    "Collector",
    "Dynamics",
    "EnvConfig",
    "Episode",
    "View",
    "action_names",
    "describe",
    "dynamics",
    "fps",
    "frame_skip",
    "frame_stack",
    "full_id",
    "make",
    "register",
    "resolve",
]
