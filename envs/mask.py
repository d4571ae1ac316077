"""Actions that are not allowed now: from `info["action_mask"]` into the observation.

There they are remembered, bootstrapped from and resumed like everything else that an agent sees; agents read the mask
under its name.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from runs.config import UserError

OBS, MASK = "obs", "action_mask"


class Masked(gymnasium.Wrapper):
    """Observations {"obs": what the environment shows, "action_mask": (A,) int8, 1 where an action is allowed}.

    Where the environment shows a Dict, the mask stands beside its parts.
    Raises: UserError where no action is allowed.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        """Wrap an environment with a Discrete action space that tells its mask."""
        super().__init__(env)
        assert isinstance(env.action_space, spaces.Discrete)
        mask = spaces.MultiBinary(int(env.action_space.n))
        shown = env.observation_space
        self._parts = isinstance(shown, spaces.Dict)
        inner = shown.spaces if isinstance(shown, spaces.Dict) else {OBS: shown}
        self.observation_space = spaces.Dict({**inner, MASK: mask})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Start an episode."""
        obs, info = self.env.reset(seed=seed, options=options)
        return self._seen(obs, info), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take an action."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._seen(obs, info, terminated), reward, terminated, truncated, info

    def _seen(self, obs: Any, info: dict[str, Any], over: bool = False) -> dict[str, Any]:
        mask = np.asarray(info[MASK]).astype(np.int8)
        if not mask.any():
            if not over:
                raise UserError(f"{self.env}: every action is masked, and the episode is not over")
            mask = np.ones_like(mask)  # nobody acts there
        return {**(obs if self._parts else {OBS: obs}), MASK: mask}


def masks(env: gymnasium.Env) -> bool:
    """Whether an environment tells which actions are allowed; resets it to see.

    One that is a table (Taxi) is left as it is: its states stay whole numbers.
    """
    if not isinstance(env.action_space, spaces.Discrete) or isinstance(
        env.observation_space, spaces.Discrete
    ):
        return False
    return MASK in env.reset()[1]


def is_masked(space: spaces.Space[Any]) -> bool:
    """Whether observations of this space hold a mask."""
    return isinstance(space, spaces.Dict) and MASK in space.spaces
