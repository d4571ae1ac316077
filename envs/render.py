"""Seeing what happens: one environment that can be played and looked at."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from envs.atari import DEFAULT, Atari, EnvConfig, is_atari, protocol, ram_game
from envs.collect import Collector
from envs.make import make, resolve
from envs.mask import Masked, masks
from runs.config import UserError

SCREEN = (210, 160)  # height and width of the console's picture


class View:
    """One environment with the picture a person would see.

    The native Atari environment shows only the agent's view. A second one, in colour at full size, gets the same
    seed and actions; the emulator being deterministic, both play the same game.
    Shapes: `obs` (1, *S), `first` (1,), as a `Collector` has them; `frame()` (H, W, 3) uint8.
    Raises: UserError if the environment cannot draw itself.
    """

    def __init__(self, env_id: str, config: EnvConfig = DEFAULT, seed: int = 0) -> None:
        """Start one episode."""
        spec = resolve(env_id)
        self._twin: Collector | None = None
        game = protocol(spec, config) if is_atari(spec) else None
        env: VectorEnv
        if game is not None and not game.ram:
            env = make(env_id, 1, seed, config)
            self._twin = Collector(Atari(game, 1, seed, screen=SCREEN), seed)
        elif game is not None:
            env = _alone(lambda: ram_game(game, _drawn))
        else:
            env = _alone(lambda: _drawn(spec.id))
        self.env = env
        self._collector = Collector(env, seed)

    @property
    def obs(self) -> Any:
        """What the agent sees."""
        return self._collector.obs

    @property
    def first(self) -> np.ndarray:
        """Whether `obs` starts an episode."""
        return self._collector.first

    def frame(self) -> np.ndarray:
        """What a person sees."""
        if self._twin is not None:
            return self._twin.obs[0, -1]  # (H, W, 3)
        try:
            picture = self.env.render()
        except gymnasium.error.DependencyNotInstalled as error:
            hint = 'pip install "chordate[window]"' if "pygame" in str(error) else str(error)
            raise UserError(f"drawing this environment needs more packages: {hint}") from None
        except Exception as error:  # a renderer breaks in its own ways, such as OpenGL without a display
            raise UserError(f"this environment cannot be drawn: {_reason(error)}") from error
        if picture is None or not isinstance(picture[0], np.ndarray) or picture[0].ndim != 3:
            raise UserError(f"{self.env} draws no picture")
        return picture[0]

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """Take action (1, *A); returns the unclipped reward, and whether the episode ended."""
        collectors = [self._collector, *([self._twin] if self._twin else [])]
        for collector in collectors:
            collector.send(action)
        steps = [collector.recv() for collector in collectors]
        return float(steps[0].reward[0]), bool(self._collector.first[0])

    def close(self) -> None:
        """Close the environments."""
        self._collector.close()
        if self._twin is not None:
            self._twin.close()


def action_names(env: VectorEnv, env_id: str) -> list[str]:
    """A name for each discrete action: the joystick's where the game has one, else its number."""
    count = int(getattr(env.single_action_space, "n", 0))
    spec = resolve(env_id)
    if not is_atari(spec):
        return [str(number) for number in range(count)]
    one = gymnasium.make(spec.id, full_action_space=count == 18)
    names = list(one.unwrapped.get_action_meanings())  # type: ignore[attr-defined]  (AtariEnv)
    one.close()
    return names


def _drawn(env_id: str, **keywords: Any) -> gymnasium.Env:
    try:
        env = gymnasium.make(env_id, render_mode="rgb_array", **keywords)
        return Masked(env) if masks(env) else env
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"{env_id} cannot be drawn: {error}") from None
    except Exception as error:  # a renderer breaks in its own ways
        raise UserError(f"{env_id} draws no picture: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _alone(one: Any) -> VectorEnv:
    env = SyncVectorEnv([one], autoreset_mode=AutoresetMode.SAME_STEP)
    if "rgb_array" not in env.metadata.get("render_modes", ()):
        env.close()
        raise UserError(f"{env.spec.id if env.spec else 'this environment'} draws no picture")
    return env
