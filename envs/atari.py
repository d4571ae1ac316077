"""Atari through ale-py's native vector environment (images) or its scalar one (RAM).

Source: Machado et al. 2018, arXiv 1709.06009 (sticky actions, one game is one episode); Mnih et al. 2015 (84
x 84 grey, four frames stacked, frame skip 4 with a maximum over the last two, up to 30 no-ops at the start).

Deviations from ale-py's own defaults, each because the default would corrupt what is learned or reported:
1. rewards are never clipped here;
2. a life loss is reported, but the game plays on (ale-py's `episodic_life` restarts the whole game);
3. truncation is done here, because ale-py gives a truncated episode a stale screen as its last observation.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Annotated, Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode

from envs.collect import ActionCheck
from envs.journal import SeedPerEnv, spread
from runs.config import Knob, UserError

_UNLIMITED = 2**31 - 2  # ale-py adds one to its frame limit, so the largest int32 would overflow


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """Atari knobs; `None` takes what the id was registered with. Other environments accept none of them."""

    obs: Annotated[str, Knob("Atari observation", choices=("auto", "image", "ram"))] = "auto"
    sticky: Annotated[float | None, Knob("chance to repeat the last action each frame", low=0, high=1)] = None
    life_loss: Annotated[bool, Knob("a lost life terminates for the learner; the game plays on")] = False
    noops: Annotated[int, Knob("most no-op frames at the start of a game", low=0)] = 30
    full_actions: Annotated[bool, Knob("all 18 joystick actions instead of the game's own")] = False
    frame_skip: Annotated[int | None, Knob("frames per step", low=1)] = None
    stack: Annotated[int, Knob("frames in an observation", low=1)] = 4
    size: Annotated[int, Knob("height and width of a frame in pixels", low=8)] = 84
    colour: Annotated[bool, Knob("RGB frames instead of grey")] = False
    max_frames: Annotated[int | None, Knob("truncate a game after so many frames", low=1)] = None
    env_threads: Annotated[int, Knob("emulator threads, 0 for all cores", low=0)] = 0


DEFAULT = EnvConfig()


@dataclasses.dataclass(frozen=True)
class Game:
    """The protocol in force: the registered one with the user's knobs laid over it."""

    id: str
    rom: str
    ram: bool
    sticky: float
    full_actions: bool
    frame_skip: int
    max_frames: int  # 0 for no limit
    config: EnvConfig

    def describe(self, actions: int) -> str:
        """One line for the log."""
        config = self.config
        colour = "colour" if config.colour else "grey"
        seen = "128 RAM bytes" if self.ram else f"{config.size}x{config.size} {colour}, stack {config.stack}"
        limit = f"at most {self.max_frames} frames" if self.max_frames else "no frame limit"
        life = "life loss terminates" if config.life_loss else "life loss ignored"
        return (
            f"{self.id}: {seen}, frame skip {self.frame_skip}, sticky {self.sticky:g}, {actions} actions, "
            f"0-{config.noops} no-ops, FIRE at start, {life}, {limit}, rewards unclipped"
        )


def is_atari(spec: EnvSpec) -> bool:
    """Whether a registered environment is an ale-py game."""
    return spec.entry_point == "ale_py.env:AtariEnv"


def protocol(spec: EnvSpec, config: EnvConfig) -> Game:
    """Combine the registry's protocol of a game with the user's knobs.

    Raises: UserError if the registered frame skip is random, or a knob does not apply.
    """
    registered = dict(spec.kwargs)
    rom, skip = registered.pop("game"), registered.pop("frameskip", 4)
    sticky = registered.pop("repeat_action_probability", 0.25)
    full = registered.pop("full_action_space", False)
    limit = registered.pop("max_num_frames_per_episode", None) or 0
    kind = registered.pop("obs_type", "rgb")
    if registered:
        raise UserError(f"{spec.id} is registered with {sorted(registered)}, which is not supported here")
    skip = config.frame_skip or _fixed_skip(spec.id, rom, skip)
    if spec.max_episode_steps is not None:
        limit = min(limit or _UNLIMITED, spec.max_episode_steps * skip)
    ram = config.obs == "ram" or (config.obs == "auto" and kind == "ram")
    if ram:
        refuse(config, ("stack", "size", "colour", "env_threads"), f"{spec.id} with RAM observations")
    return Game(
        id=spec.id,
        rom=rom,
        ram=ram,
        sticky=sticky if config.sticky is None else float(config.sticky),
        full_actions=full or config.full_actions,
        frame_skip=skip,
        max_frames=config.max_frames or limit,
        config=config,
    )


def _fixed_skip(env_id: str, rom: str, skip: int | tuple[int, int]) -> int:
    if isinstance(skip, tuple):
        name = rom.title().replace("_", "")
        raise UserError(
            f"{env_id} draws a random frame skip from {skip[0]} to {skip[1] - 1}, which is not supported: "
            f"use ALE/{name}-v5 or {name}NoFrameskip-v4, or give --frame-skip"
        )
    # NoFrameskip ids mean that preprocessing skips, and has skipped 4 ever since Mnih et al. 2015
    return 4 if skip == 1 else skip


def refuse(config: EnvConfig, names: tuple[str, ...], where: str) -> None:
    """Raise `UserError` for the first of `names` that is not at its default: it would be ignored."""
    for name in names:
        value = getattr(config, name)
        if value != getattr(DEFAULT, name):
            raise UserError(f"--{name.replace('_', '-')} {value} does not apply to {where}")


class Atari(SeedPerEnv):
    """N games in native threads, in order, with SAME_STEP autoreset; a step has two halves.

    Shapes: obs (N, stack, size, size) uint8, oldest frame first, zeros before the start; with `colour` a last
    axis of 3.
    """

    def __init__(
        self, game: Game, num_envs: int, seed: int, *, screen: tuple[int, int] | None = None
    ) -> None:
        """Start the emulator threads; the first `reset` uses `seed` if it is given none.

        `screen` (height, width) asks for single colour frames of that size, whatever the game's knobs say.
        """
        self._game, self._seed = game, seed
        self._native = _native(game, num_envs, screen)
        # nanobind complains at exit about an emulator that is still alive, so drop it with us at the latest
        self._drop = weakref.finalize(self, self._native.__dict__.pop, "ale", None)
        self.num_envs = num_envs
        self.single_observation_space = self._native.single_observation_space
        self.observation_space = self._native.observation_space
        self.single_action_space = self._native.single_action_space
        self.action_space = self._native.action_space
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self._checked = ActionCheck(self)
        self._lives = np.zeros(num_envs, np.int32)
        self._frames = np.zeros(num_envs, np.int64)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Start every game anew, or those of the mask `options["reset_mask"]` (N,).

        `seed` is one seed for each env, or a number from which every env gets its own.
        """
        rows = np.ones(self.num_envs, bool)
        if options:
            if options.keys() != {"reset_mask"}:
                raise ValueError(f"Atari takes no reset options but reset_mask, got {sorted(options)}")
            rows = options["reset_mask"]
        seed, self._seed = self._seed if seed is None else seed, None
        seeds = spread(seed, self.num_envs) if isinstance(seed, int) else seed
        streams = None if seeds is None else np.array(seeds)[rows].astype(np.int64)
        obs, info = self._native.reset(seed=streams, options={"reset_mask": rows})
        self._lives = np.where(rows, info["lives"], self._lives)
        self._frames[rows] = 0
        return obs, info

    def step_async(self, actions: np.ndarray) -> None:
        """Start the emulator threads; raises ValueError for a bad action, after which they would hang."""
        self._native.send(self._checked(actions))

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Wait for the threads; `info["life_loss"]` is there if that knob is on."""
        obs, reward, terminated, _, info = self._native.recv()
        self._frames += self._game.frame_skip
        truncated = np.zeros(self.num_envs, bool)
        if self._game.max_frames:
            truncated = (self._frames >= self._game.max_frames) & ~terminated
        ended = terminated | truncated
        if truncated.any():
            obs, info = self._restart(obs, info, truncated)
        if ended.any():
            info["_final_obs"] = ended
        if self._game.config.life_loss:
            info["life_loss"] = (info["lives"] < self._lives) & ~ended
        self._lives = info["lives"]
        self._frames[ended] = 0
        return obs, reward, terminated, truncated, info

    def _restart(self, obs: np.ndarray, info: dict, rows: np.ndarray) -> tuple[np.ndarray, dict]:
        final = info.get("final_obs", obs)  # native rows of games that are over, never read elsewhere
        final[rows] = obs[rows]
        obs, info = self._native.reset(options={"reset_mask": rows})
        return obs, {**info, "final_obs": final}

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Do both halves of a step."""
        self.step_async(actions)
        return self.step_wait()

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the threads and free the emulators, also in the middle of a step."""
        self._drop()


def _native(game: Game, num_envs: int, screen: tuple[int, int] | None) -> Any:
    from ale_py.vector_env import AtariVectorEnv

    class Native(AtariVectorEnv):
        # ale-py writes its autoreset mode into `metadata`, which would otherwise be that of every VectorEnv
        metadata: dict[str, Any] = {}  # noqa: RUF012  (gymnasium's own spelling)

    config = game.config
    height, width = screen or (config.size, config.size)
    return Native(
        game.rom,
        num_envs,
        num_threads=config.env_threads,
        max_num_frames_per_episode=_UNLIMITED,
        repeat_action_probability=game.sticky,
        full_action_space=game.full_actions,
        autoreset_mode=AutoresetMode.SAME_STEP,
        img_height=height,
        img_width=width,
        grayscale=not config.colour and screen is None,
        stack_num=config.stack if screen is None else 1,
        frameskip=game.frame_skip,
        noop_max=config.noops + 1,  # ale-py draws from 0 to noop_max - 1
        reward_clipping=False,
        use_fire_reset=True,
    )


class RamGame(gymnasium.Wrapper):
    """The same protocol around the scalar environment: starts, life loss and truncation as in `Atari`."""

    def __init__(self, env: gymnasium.Env, game: Game) -> None:
        """Wrap an ale-py environment with RAM observations."""
        super().__init__(env)
        self._game, self._lives, self._frames = game, 0, 0
        self._fire = "FIRE" in env.unwrapped.get_action_meanings()  # type: ignore[attr-defined]  (AtariEnv)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Start a game: FIRE once if the game has it, then no-ops, by the frame as the native env does."""
        from ale_py import Action

        self.env.reset(seed=seed, options=options)
        ale = self.env.unwrapped.ale  # type: ignore[attr-defined]  (AtariEnv)
        noops = int(self.env.unwrapped.np_random.integers(self._game.config.noops + 1)) - self._fire
        if self._fire:
            ale.act(Action.FIRE)
        for _ in range(noops):
            ale.act(Action.NOOP)
            if ale.game_over():
                ale.reset_game()
        self._lives, self._frames = ale.lives(), 0
        return ale.getRAM(), {"lives": self._lives}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Play one step of `frame_skip` frames."""
        obs, reward, terminated, _, info = self.env.step(action)
        self._frames += self._game.frame_skip
        truncated = not terminated and 0 < self._game.max_frames <= self._frames
        lost, self._lives = info["lives"] < self._lives, info["lives"]
        info = {"lives": self._lives}
        if self._game.config.life_loss:
            info["life_loss"] = lost and not (terminated or truncated)
        return obs, float(reward), terminated, truncated, info


def ram_game(game: Game, make_scalar: Callable[..., gymnasium.Env]) -> gymnasium.Env:
    """One game with RAM observations, made by `make_scalar(id, **keywords)`."""
    env = make_scalar(
        game.id,
        obs_type="ram",
        frameskip=game.frame_skip,
        repeat_action_probability=game.sticky,
        full_action_space=game.full_actions,
        max_num_frames_per_episode=None,
    )
    return RamGame(env, game)
