"""Evaluating and filming: each episode counts once, and what is shown is what was played."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import envs
from agents import evaluate, play, train
from agents.evaluate import Evaluator, film, positive, shots
from envs import EnvConfig
from replay import Decision
from runs.config import Parser, UserError

LINE = "chordate/Line-v0"


class Line(gymnasium.Env):
    """Reward 1 a step for `length` steps, actions from 3 to 4, and a picture that tells the step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 7}  # noqa: RUF012  (gymnasium's own spelling)

    def __init__(self, length: int = 20, broken: bool = False, render_mode: str | None = None) -> None:
        self.observation_space, self.action_space = spaces.Box(0, 1, (1,)), spaces.Discrete(2, start=3)
        self.length, self.broken, self.render_mode, self.time = length, broken, render_mode, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert action in self.action_space
        self.time += 1
        return np.full(1, self.time / 1e6, np.float32), 1.0, self.time == self.length, False, {}

    def render(self) -> np.ndarray:  # type: ignore[override]
        if self.broken:
            raise RuntimeError("no OpenGL here\nand much more")
        return np.full((8, 10, 3), self.time, np.uint8)


def line(**keywords: Any) -> str:
    """Register the line with `keywords`, return its id."""
    gymnasium.registry.pop(LINE, None)
    gymnasium.register(LINE, Line, kwargs=keywords)
    return LINE


class Fourth:
    """An agent that prefers the second action."""

    def initial(self, n: int) -> tuple:
        return ()

    def greedy(self, obs: Any, first: np.ndarray, state: tuple) -> Decision:
        return Decision(np.full(len(first), 4), state)

    def values(self, obs: Any, first: Any = None, state: Any = ()) -> np.ndarray:
        return np.tile(np.array([[1.0, 2.0]], np.float32), (len(obs), 1))

    def probabilities(self, obs: Any, first: Any = None, state: Any = ()) -> np.ndarray:
        return np.tile(np.array([[0.0, 1.0]], np.float32), (len(obs), 1))


AGENT: Any = Fourth()


@pytest.mark.parametrize(("length", "expected"), [(20, [10.0] * 4), (10, [10.0] * 4), (9, [9.0] * 4)])
def test_an_episode_that_is_cut_counts_once(length: int, expected: list, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "MOST_STEPS", 10)
    monkeypatch.setattr(evaluate, "MOST_ENVS", 2)
    evaluator, stepped = Evaluator(line(length=length), EnvConfig(), 4, 0), []
    episodes = evaluator.episodes(AGENT, lambda: bool(stepped.append(0)))
    assert [episode.return_ for episode in episodes] == expected
    assert sorted(episode.env for episode in episodes) == [0, 0, 1, 1]
    assert len(stepped) == (
        30 if length == 20 else 2 * length
    )  # the second one began after the first one's end
    evaluator.close()


def test_an_endless_episode_ends_the_evaluation_of_its_env(monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "MOST_STEPS", 10)
    monkeypatch.setattr(evaluate, "MOST_ENVS", 2)
    evaluator = Evaluator(line(length=10**9), EnvConfig(), 6, 0)
    assert [episode.return_ for episode in evaluator.episodes(AGENT)] == [10.0, 10.0]
    evaluator.close()


def test_a_stop_discards_what_was_played() -> None:
    evaluator, asked = Evaluator(line(length=5), EnvConfig(), 3, 0), []

    def stop() -> bool:
        asked.append(0)
        return len(asked) > 3

    assert evaluator.episodes(AGENT, stop) == []
    assert len(evaluator.episodes(AGENT)) == 3  # nothing is left over
    evaluator.close()
    asked.clear()
    assert len(film(AGENT, line(), EnvConfig(), 0, 10, stop).frames) == 0 and len(asked) < 10


def test_a_film_is_its_shots() -> None:
    env_id = line(length=6)
    taken, shown = list(shots(AGENT, env_id, EnvConfig(), 0, 50)), film(AGENT, env_id, EnvConfig(), 0, 50)
    assert [shot.frame[0, 0, 0] for shot in taken] == list(range(6)) == shown.frames[:, 0, 0, 0].tolist()
    assert shown.frames.shape == (6, 8, 10, 3) and shown.return_ == 6.0
    assert shown.actions.tolist() == [4] * 6 and (shown.probabilities == [0, 1]).all()
    assert len(film(AGENT, env_id, EnvConfig(), 0, 4).frames) == 4


def test_a_renderer_that_breaks_is_one_line() -> None:
    with pytest.raises(UserError, match=r"cannot be drawn: no OpenGL here$"):
        film(AGENT, line(broken=True), EnvConfig(), 0, 4)


def test_pictures_come_one_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    env_id = line(length=3)
    env = envs.make(env_id)
    assert envs.fps(env) == 7
    explainer = play.Explainer(env, env_id)  # its actions begin at 3
    env.close()
    pictures = play.pictures(AGENT, env_id, EnvConfig(), range(2), 50, explainer)
    next(pictures)
    assert capsys.readouterr().out == ""
    assert len(list(pictures)) == 2 * (3 + play.PAUSE) - 1
    assert capsys.readouterr().out.splitlines() == [f"episode {n}: return 3 in 3 steps" for n in (1, 2)]


def test_explained_actions_are_those_of_the_environment_as_configured() -> None:
    config = EnvConfig(full_actions=True, frame_skip=2)
    env = envs.make("ALE/Pong-v5", config=config)
    assert len(play.Explainer(env, "ALE/Pong-v5").names) == 18 and envs.fps(env) == 30
    env.close()


def test_no_display_is_one_line(monkeypatch) -> None:
    class PygameError(RuntimeError):
        pass

    def refuse(size: tuple[int, int]) -> None:
        raise PygameError("No available video device")

    fake: Any = types.ModuleType("pygame")
    fake.error, fake.quit = PygameError, lambda: None
    fake.time = types.SimpleNamespace(Clock=lambda: None)
    fake.display = types.SimpleNamespace(set_mode=refuse)
    monkeypatch.setitem(sys.modules, "pygame", fake)
    with pytest.raises(UserError, match=r"No available video device.*--video"):
        play._show(iter([np.zeros((4, 4, 3), np.uint8)]), 30)


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("1e2", 100), ("1_000", 1000)])
def test_counts_are_read(text: str, value: int) -> None:
    parser = Parser(prog="p")
    parser.add_argument("--episodes", type=positive("--episodes"))
    assert parser.read(["--episodes", text]) == {"episodes": value}


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many", "nan", "inf"])
def test_bad_counts_are_one_clear_line(text: str) -> None:
    parser = Parser(prog="p")
    parser.add_argument("--episodes", type=positive("--episodes"))
    with pytest.raises(UserError, match=f"^--episodes must be a whole number >= 1, got '{text}'$"):
        parser.read(["--episodes", text])


def test_json_stands_alone_though_the_agent_has_things_to_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run says when it is made, here how far memory learns back, is not said again."""
    said: list[str] = []
    how: Any = dict(backbone="lstm", width=8, rollout=16, batch=16, steps=32, final_episodes=1, video=False)
    train("ppo", env="CartPole-v1", preset="none", run=str(tmp_path / "r"), say=said.append, **how)
    assert any("memory learns through 16 steps" in line for line in said)
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "r"), "--episodes", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
