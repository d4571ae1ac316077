"""Presets: what differs from the defaults for an agent in an environment, and where the numbers come from.

The first preset of the agent whose pattern matches the environment's id applies, unless `--preset` says otherwise.
A flag of the command line, or a key of `--config`, wins over the preset.
"""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any, NamedTuple

from runs.config import pick


class Preset(NamedTuple):
    """Settings by flag name for every environment id that matches one of the patterns."""

    agent: str
    envs: tuple[str, ...]
    settings: dict[str, Any]
    why: str


PONG = dict(
    num_envs=8,
    size=42,
    net="light",
    norm=True,
    lr=5e-4,
    batch=128,
    train_every=8,
    updates=2,
    learning_starts=5_000,
    capacity=200_000,
    n_step=3,
    munchausen=0.9,
    target_every=1,
    tau=0.005,
    acting="target",
    adam_eps=1e-6,
    epsilon_end=0.01,
    epsilon_steps=50_000,
    clip_reward=True,
    eval_every=50_000,
)
ATARI = dict(
    steps=10_000_000,
    batch=32,
    train_every=4,
    capacity=1_000_000,
    target_every=2_000,
    adam_eps=1.5e-4,
    clip_reward=True,
    eval_every=250_000,
)
CONTROL = dict(
    steps=100_000,
    lr=6.3e-4,
    lr_end=6.3e-6,
    lr_steps=100_000,
    batch=128,
    train_every=4,
    updates=4,
    learning_starts=1_000,
    capacity=50_000,
    target_every=1,
    tau=0.005,
    acting="target",
    epsilon_steps=12_000,
    hidden=(256, 256),
    eval_every=10_000,
)
# thousands of copies at once, an update of as many samples after each of their steps
MANY = dict(num_envs=4_096, eval_every=1_000_000, checkpoint_every=2_000_000, log_every=50_000)
QTABLE = MANY | dict(
    steps=4_000_000,
    batch=4_096,
    train_every=4_096,
    learning_starts=40_000,
    capacity=1_000_000,
    epsilon_end=0.3,
    epsilon_steps=2_000_000,
)
SARSA = MANY | dict(num_envs=1_024, steps=8_000_000, lr=0.1, epsilon_end=0.01, epsilon_steps=4_000_000)
LAKE = dict(eval_episodes=1_000, final_episodes=10_000)  # an episode wins or not: a mean needs many
TAXI = dict(eval_episodes=300, final_episodes=3_000)
LAKES = ("FrozenLake-v*", "chordate/FrozenLakeDeterministic-v*")
LAKES_8 = ("FrozenLake8x8-v*", "chordate/FrozenLake8x8Deterministic-v*")
# of the discounts, the one whose best policy wins most often before the limit: 0.894; with 0.99 it is 0.863
GAMMA_8 = 0.995
TABLE_WHY = "reaches the best policy of value iteration: runs/reference/README.md"
PONG_WHY = "found on two cores: runs/reference/README.md"
PRESETS = {
    "pong": Preset(
        "dqn", ("ALE/Pong-v*",), PONG | dict(steps=2_400_000, lr_end=1e-5, lr_steps=2_400_000), PONG_WHY
    ),
    # without sticky actions a fifth of the steps will do
    "pong-noframeskip": Preset(
        "dqn", ("PongNoFrameskip-v*",), PONG | dict(steps=400_000, lr_end=2.5e-5, lr_steps=400_000), PONG_WHY
    ),
    "nature": Preset(
        "dqn",
        ("ALE/*", "*NoFrameskip-v*"),
        ATARI | dict(lr=1e-4, learning_starts=80_000, epsilon_end=0.01, epsilon_steps=250_000),
        "Mnih et al. 2015 with the Adam step size and epsilon of later work",
    ),
    "rainbow": Preset(
        "dqn",
        (),  # by name only
        ATARI
        | dict(
            lr=6.25e-5,
            learning_starts=20_000,
            n_step=3,
            dueling="mean",
            noisy="factorised",
            distributional="c51",
            alpha=0.5,
            epsilon_start=0.0,
            epsilon_end=0.0,
        ),
        "Hessel et al. 2018, table 1; one step is four frames, an update every four steps",
    ),
    "acrobot": Preset(
        "dqn",
        ("Acrobot-v*",),
        CONTROL | dict(epsilon_end=0.05),
        "the zoo's published settings, with a step size that falls and the average of the last updates acting",
    ),
    "lunarlander": Preset(
        "dqn",
        ("LunarLander-v*",),
        CONTROL | dict(steps=150_000, lr_steps=150_000, n_step=3, epsilon_end=0.05),
        "the zoo's published settings with three-step returns, a step size that falls and the average acting",
    ),
    "cartpole": Preset(
        "dqn",
        ("CartPole-v*",),
        dict(
            steps=50_000,
            lr=2.3e-3,
            lr_end=2.3e-5,
            lr_steps=50_000,
            batch=64,
            train_every=256,
            updates=128,
            learning_starts=1_000,
            capacity=100_000,
            target_every=128,
            epsilon_end=0.04,
            epsilon_steps=8_000,
            hidden=(256, 256),
            eval_every=5_000,
        ),
        "the zoo's published settings, with a step size that falls: at a constant one the policy comes and goes",
    ),
    "qtable-lake": Preset("qtable", LAKES, QTABLE | LAKE | dict(lr=0.1), TABLE_WHY),
    "qtable-lake8": Preset(
        "qtable",
        LAKES_8,
        QTABLE | LAKE | dict(steps=8_000_000, train_every=512, gamma=GAMMA_8, lr=1.0, omega=0.5),
        TABLE_WHY,
    ),
    "qtable-taxi": Preset("qtable", ("Taxi-v*",), QTABLE | TAXI | dict(lr=0.5), TABLE_WHY),
    "qtable-cliff": Preset("qtable", ("CliffWalking-v*",), QTABLE | dict(lr=0.5, gamma=1.0), TABLE_WHY),
    "sarsa-lake": Preset("sarsa", LAKES, SARSA | LAKE, TABLE_WHY),
    "sarsa-lake8": Preset(
        "sarsa",
        LAKES_8,
        SARSA
        | LAKE
        | dict(num_envs=2_048, steps=32_000_000, eval_every=4_000_000, epsilon_steps=16_000_000)
        | dict(lr=0.05, gamma=GAMMA_8),
        TABLE_WHY,
    ),
    "sarsa-taxi": Preset("sarsa", ("Taxi-v*",), SARSA | TAXI, TABLE_WHY),
    "sarsa-cliff": Preset(
        "sarsa",
        ("CliffWalking-v*",),
        SARSA | dict(steps=2_000_000, gamma=1.0, epsilon_start=0.1, epsilon_end=0.1),
        "explores as in the textbook's example 6.6",
    ),
}


def choose(agent: str, env_id: str, name: str | None) -> tuple[str, dict[str, Any]]:
    """The name and settings of a preset: the named one, none for "none", else the first that matches."""
    if name == "none":
        return "none", {}
    if name is not None:
        own = {key: preset for key, preset in PRESETS.items() if preset.agent == agent}
        return name, pick("preset", name, own | {"none": Preset(agent, (), {}, "")}).settings
    for key, preset in PRESETS.items():
        if preset.agent == agent and any(fnmatch(env_id, pattern) for pattern in preset.envs):
            return key, preset.settings
    return "none", {}
