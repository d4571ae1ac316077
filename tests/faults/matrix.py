"""Train N, SIGKILL, `--resume`, N more: the same bits as 2N without a break, through the command line."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runs import checkpoint
from tests.tools import assert_same_run

ROOT = Path(__file__).parent.parent.parent
COMMON = "--log-every 70 --eval-every 0 --final-episodes 1 --threads 1 --no-video --max-frames 600 --seed 1"
PIXELS = "--size 16 --net light --features 16"
DQN = "--preset none --learning-starts 100 --batch 8 --train-every 4 --target-every 50 --n-step 2"


class Case(NamedTuple):
    """One run: who plays where, for how long, with which flags."""

    agent: str
    env: str
    steps: int
    flags: str

    def __str__(self) -> str:
        shown = self.flags.removeprefix(DQN).replace(PIXELS, "")
        return " ".join([self.agent, self.env, *shown.split()])


# by agent: the flags of all its runs, those of each of its variants, and the environments it can play
AGENTS = {"dqn": (DQN, ("", "--alpha 0.6"), ("CartPole-v1", "FrozenLake-v1", "pong", "noframeskip", "ram"))}
ENVS = {
    "CartPole-v1": ("CartPole-v1", 2_400, "--capacity 2000"),
    "FrozenLake-v1": ("FrozenLake-v1", 2_400, "--capacity 2000"),
    "pong": ("ALE/Pong-v5", 1_600, f"{PIXELS} --capacity 4000"),
    "noframeskip": ("PongNoFrameskip-v4", 1_600, f"{PIXELS} --capacity 4000"),
    "ram": ("ALE/Pong-v5", 1_600, "--obs ram --capacity 4000"),
}
# of the policy-gradient agents: rollouts that no checkpoint falls on the border of
GRADIENT = {
    "reinforce": "--preset none --episodes 3 --hidden 16",
    "a2c": "--preset none --rollout 7 --hidden 16",
    "trpo": "--preset none --rollout 90 --batch 30 --hidden 16 --epochs 2",
    "ppo": "--preset none --rollout 90 --batch 30 --hidden 16 --epochs 2",
}
NORMAL = "--normalize-obs --normalize-reward"
SCREENS = f"--preset none {PIXELS} --no-separate --num-envs 2"
MORE = (
    *(
        Case(agent, env, 2_400, f"{flags} --num-envs {n} {more}")
        for agent, flags in GRADIENT.items()
        for n in (1, 8)
        for env, more in (("CartPole-v1", ""), ("Pendulum-v1", NORMAL))
    ),
    Case("ppo", "ALE/Pong-v5", 1_600, f"{SCREENS} --rollout 50 --batch 20 --epochs 2"),
    Case("a2c", "ALE/Pong-v5", 1_600, SCREENS),
    Case("dqn", "CartPole-v1", 2_400, f"{DQN} --num-envs 8 --noisy factorised --distributional c51"),
    *(
        Case("dqn", "CartPole-v1", 2_400, f"{DQN} {flags}")
        for flags in (
            "--double twin --noisy independent --lr-end 1e-5 --alpha 0.5",
            "--acting target --tau 0.01 --munchausen 0.9 --distributional quantile",
        )
    ),
    *(
        Case(agent, env, 2_400, f"--preset none --num-envs {n} {flags}")
        for n in (1, 8)
        for agent, env, flags in (
            ("qtable", "FrozenLake-v1", "--learning-starts 100 --batch 8 --capacity 2000"),
            ("qtable", "CartPole-v1", "--learning-starts 100 --capacity 2000 --low -3 --high 3"),
            ("sarsa", "FrozenLake-v1", ""),
            ("sarsa", "CartPole-v1", "--backbone mlp"),
        )
    ),
    Case("dqn", "ALE/Pong-v5", 800, f"{DQN} {PIXELS} --num-envs 2 --precision bf16 --compile on"),
)


def cases() -> list[Case]:
    """Every agent on every environment it plays, each variant with 1 and with 8 environments; and a few more."""
    product = [
        Case(agent, env, steps, " ".join([common, flags, f"--num-envs {n}", variant]))
        for agent, (common, variants, names) in AGENTS.items()
        for env, steps, flags in map(ENVS.__getitem__, names)
        for n in (1, 8)
        for variant in variants
    ]
    return [*product, *MORE]


def command(case: Case, folder: Path) -> list[str]:
    """The words that start a run."""
    more = ["--env", case.env, "--steps", str(case.steps), "--checkpoint-every", str(case.steps // 4)]
    if "NoFrameskip" not in case.env and not case.env.startswith("ALE/"):
        more += COMMON.replace("--max-frames 600", "").split()
    else:
        more += COMMON.split()
    return [sys.executable, "-m", "agents.run", case.agent, *more, *case.flags.split(), "--run", str(folder)]


def check(case: Case, folder: Path, seed: int) -> str:
    """Run it whole, and killed and resumed; the figures. Raises: AssertionError if they differ."""
    rng = np.random.default_rng(seed)
    whole, other = folder / "whole", folder / "other"
    finish(command(case, whole))
    killed = kill(command(case, other), other, case.steps // 2, float(rng.uniform(0, 0.1)))
    finish([*command(case, other)[:4], "--run", str(other), "--resume"])
    assert_same_run(whole, other)
    return f"killed after step {killed:,} of {case.steps:,}, bits equal"


def finish(words: list[str]) -> str:
    """Run a command to its end, which must be a good one; what it printed."""
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(words[2:])} exits with {done.returncode}:\n{done.stdout}"
    return done.stdout


def kill(words: list[str], folder: Path, step: int, delay: float) -> int:
    """Start a run, and kill it a while after its checkpoint at `step` is there; the newest one then."""
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 600
        while not [found for found in checkpoint.steps(folder / "checkpoints") if found >= step]:
            assert process.poll() is None, f"ended before it could be killed: {' '.join(words[2:])}"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
    assert process.returncode == -9, "ended before it could be killed"
    return checkpoint.steps(folder / "checkpoints")[-1]
