"""Environments whose velocities are hidden: what an agent must know it sees only over several steps.

The numbers are left out of the observation, not set to zero. Everything else is the original's: its dynamics, rewards,
limits and first states, to the bit.
Source: the names are those of Stable-Baselines3's tuned zoo (`CartPoleNoVel-v1`), whose wrapper sets the same numbers
to zero.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import WrapperSpec
from gymnasium.spaces import Box
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

Shown = tuple[int, ...]  # the numbers of the original's observation that stay in view

# original -> what stays: positions, angles (also as sine and cosine), contacts
SHOWN: dict[str, Shown] = {
    "CartPole-v1": (0, 2),
    "Pendulum-v1": (0, 1),
    "MountainCar-v0": (0,),
    "MountainCarContinuous-v0": (0,),
    "Acrobot-v1": (0, 1, 2, 3),
    "LunarLander-v3": (0, 1, 4, 6, 7),
    "LunarLanderContinuous-v3": (0, 1, 4, 6, 7),
}
# id -> original
HIDDEN = {f"chordate/{name.replace('-', 'NoVel-')}": name for name in SHOWN}


def register() -> None:
    """Register every environment of `HIDDEN`; calling it again changes nothing."""
    for env_id, original in HIDDEN.items():
        if env_id not in gymnasium.registry:
            spec = gymnasium.spec(original)
            gymnasium.register(
                env_id,
                spec.entry_point,
                reward_threshold=spec.reward_threshold,
                max_episode_steps=spec.max_episode_steps,
                additional_wrappers=(
                    WrapperSpec("Hidden", "envs.hidden:Hidden", {"shown": SHOWN[original]}),
                ),
                kwargs=spec.kwargs,
            )


def _part(space: gymnasium.Space[Any], shown: Shown) -> Box:
    assert isinstance(space, Box)
    return Box(space.low[list(shown)], space.high[list(shown)], dtype=np.float32)


class Hidden(gymnasium.ObservationWrapper, RecordConstructorArgs):
    """An environment of which some numbers are seen.

    Shapes: obs (len(shown),).
    """

    def __init__(self, env: gymnasium.Env, shown: Shown) -> None:
        """Choose the numbers by their place."""
        RecordConstructorArgs.__init__(self, shown=shown)
        gymnasium.ObservationWrapper.__init__(self, env)
        self.observation_space, self._shown = _part(env.observation_space, shown), list(shown)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """What is in view."""
        return observation[self._shown]


class HiddenVector(VectorWrapper):
    """N copies of an environment, stepped at once, of which some numbers are seen; `env` must be `Stateful`.

    Shapes: obs, and info["final_obs"] where an episode ended, (N, len(shown)).
    """

    def __init__(self, env: VectorEnv, shown: Shown) -> None:
        """Choose the numbers by their place."""
        super().__init__(env)
        self.single_observation_space = _part(env.single_observation_space, shown)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self._shown = np.array(shown)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every copy."""
        obs, info = self.env.reset(seed=seed, options=options)
        return obs.take(self._shown, 1), info

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all copies."""
        obs, reward, terminated, truncated, info = self.env.step(actions)
        if "final_obs" in info:
            info = {**info, "final_obs": info["final_obs"].take(self._shown, 1)}
        return obs.take(self._shown, 1), reward, terminated, truncated, info

    def get_state(self) -> dict[str, np.ndarray]:
        """See `envs.journal.Stateful`."""
        env: Any = self.env
        return env.get_state()

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """See `envs.journal.Stateful`."""
        env: Any = self.env
        env.set_state(state)
