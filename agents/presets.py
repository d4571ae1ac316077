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
    lr_end=1e-5,
    batch=64,
    train_every=8,
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
    eval_every=100_000,
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
# policy gradients
SMALL = dict(hidden=(64, 64), activation="tanh")
NORMALIZE = dict(normalize_obs=True, normalize_reward=True)
ZOO = "the zoo's published settings"
# a memory in place of what is hidden
REMEMBERS = dict(backbone="lstm", width=64, hidden=(64,))
HIDDEN = "velocities are hidden, so it remembers; found here"
BASELINES = "the settings of OpenAI Baselines for MuJoCo, with a step size that falls"


def _falling(steps: int, lr: float, **more: Any) -> dict[str, Any]:
    """A run of so many steps whose step size falls to nearly nothing in them; ten evaluations."""
    return dict(steps=steps, lr=lr, lr_end=lr / 1_000, lr_steps=steps, eval_every=steps // 10) | more


MUJOCO = ("HalfCheetah-v*", "Hopper-v*", "Walker2d-v*", "Ant-v*", "Swimmer-v*", "Humanoid-v*")
GAMES = ("ALE/*", "*NoFrameskip-v*")
ATARI_GRADIENT = dict(clip_reward=True, separate=False, entropy=0.01, eval_every=500_000)
LAKE = dict(eval_episodes=1_000, final_episodes=10_000)  # an episode wins or not: a mean needs many
TAXI = dict(eval_episodes=300, final_episodes=3_000)
LAKES = ("FrozenLake-v*", "chordate/FrozenLakeDeterministic-v*")
LAKES_8 = ("FrozenLake8x8-v*", "chordate/FrozenLake8x8Deterministic-v*")
# of the discounts, the one whose best policy wins most often before the limit: 0.894; with 0.99 it is 0.863
GAMMA_8 = 0.995
TABLE_WHY = "reaches the best policy of value iteration: runs/reference/README.md"
PONG_WHY = "found on two cores: runs/reference/README.md"
PRESETS = {
    "pong": Preset("dqn", ("ALE/Pong-v*",), PONG | dict(steps=3_200_000, lr_steps=5_000_000), PONG_WHY),
    # without sticky actions fewer steps will do
    "pong-noframeskip": Preset(
        "dqn", ("PongNoFrameskip-v*",), PONG | dict(steps=1_000_000, lr_steps=1_000_000), PONG_WHY
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
    "dqn-cartpole-novel": Preset(
        "dqn",
        ("chordate/CartPoleNoVel-v*",),
        REMEMBERS
        | dict(
            num_envs=8,
            steps=150_000,
            lr=2e-3,
            lr_end=2e-5,
            lr_steps=150_000,
            gamma=0.97,
            n_step=3,
            batch=32,
            sequence=20,
            burn_in=10,
            train_every=64,
            updates=16,
            learning_starts=1_000,
            target_every=128,
            epsilon_end=0.02,
            epsilon_steps=10_000,
            distributional="c51",  # without it values, and with them the policy, come and go
            v_min=0.0,
            v_max=40.0,
            eval_every=10_000,
        ),
        HIDDEN,
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
    "minatar": Preset(
        "dqn",
        ("MinAtar/*",),
        dict(
            steps=1_000_000,
            num_envs=8,
            net="minatar",
            lr=2.5e-4,
            batch=64,
            train_every=8,
            updates=2,
            learning_starts=5_000,
            capacity=100_000,
            target_every=250,
            epsilon_end=0.05,
            epsilon_steps=100_000,
            eval_every=100_000,
        ),
        "Young and Tian 2019, with eight environments and Adam",
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
    "ppo-cartpole": Preset(
        "ppo",
        ("CartPole-v*",),
        SMALL
        | _falling(100_000, 1e-3, num_envs=8, rollout=32, batch=256, epochs=20, gamma=0.98, lam=0.8)
        | dict(clip_end=1e-3, clip_steps=100_000),
        ZOO,
    ),
    "ppo-cartpole-novel": Preset(
        "ppo",
        ("chordate/CartPoleNoVel-v*",),
        SMALL
        | NORMALIZE
        | _falling(150_000, 2e-3, num_envs=8, rollout=128, batch=256)
        | REMEMBERS
        | dict(sequence=64, eval_every=25_000),
        HIDDEN,
    ),
    "ppo-pendulum-novel": Preset(
        "ppo",
        ("chordate/PendulumNoVel-v*",),
        SMALL
        | NORMALIZE
        | _falling(300_000, 5e-4, num_envs=8, rollout=256, batch=128, gamma=0.95)
        | REMEMBERS
        | dict(sequence=16),  # short ones, so that a batch is of many
        HIDDEN,
    ),
    "ppo-acrobot": Preset(
        "ppo",
        ("Acrobot-v*", "MountainCar-v*"),
        SMALL | NORMALIZE | _falling(500_000, 3e-4, num_envs=16, rollout=256, epochs=4, lam=0.94),
        ZOO,
    ),
    "ppo-pendulum": Preset(
        "ppo",
        ("Pendulum-v*",),
        SMALL | NORMALIZE | _falling(300_000, 1e-3, num_envs=4, rollout=512, gamma=0.97),
        "the zoo's, which discounts by 0.9 and so does not see to the end of a swing",
    ),
    "ppo-lunarlander": Preset(
        "ppo",
        ("LunarLander*",),
        SMALL
        | _falling(2_000_000, 3e-4, num_envs=16, rollout=1_024, epochs=4, gamma=0.999, lam=0.98)
        | dict(entropy=0.01),
        ZOO,
    ),
    "ppo-mountaincar": Preset(
        "ppo",
        ("MountainCarContinuous-v*",),
        SMALL
        | NORMALIZE
        | _falling(100_000, 3e-4, num_envs=4, rollout=256, batch=128, gamma=0.9999, lam=0.9)
        | dict(log_std=0.5, entropy=0.004),
        "a wide policy at first: the flag must be found by chance once",
    ),
    "ppo-walker": Preset(
        "ppo",
        ("BipedalWalker*",),
        SMALL | NORMALIZE | _falling(5_000_000, 3e-4, num_envs=32, gamma=0.999),
        ZOO,
    ),
    "ppo-halfcheetah": Preset(
        "ppo",
        ("HalfCheetah-v*",),
        NORMALIZE
        | dict(steps=1_000_000, rollout=512, eval_every=100_000, log_std=-2.0, orthogonal=False)
        | dict(lr=2.0633e-5, gamma=0.98, lam=0.92, clip=0.1, epochs=20, entropy=4e-4, max_grad_norm=0.8)
        | dict(value_weight=1.16),
        ZOO,
    ),
    "ppo-mujoco": Preset(
        "ppo",
        MUJOCO,
        SMALL | NORMALIZE | _falling(1_000_000, 3e-4, num_envs=8, rollout=256),
        BASELINES,
    ),
    "ppo-pong": Preset(
        "ppo",
        ("PongNoFrameskip-v*", "ALE/Pong-v*"),
        ATARI_GRADIENT
        | dict(size=42, net="light", norm=True)
        | _falling(4_000_000, 5e-4, num_envs=16, rollout=128, epochs=3, batch=256),
        PONG_WHY,
    ),
    "ppo-atari": Preset(
        "ppo",
        GAMES,
        ATARI_GRADIENT
        | _falling(10_000_000, 2.5e-4, num_envs=8, rollout=128, epochs=4, batch=256, value_weight=1.0)
        | dict(clip=0.1, clip_end=1e-4, clip_steps=10_000_000),
        "Schulman et al. 2017, table 5, as the zoo has it",
    ),
    "a2c-cartpole": Preset("a2c", ("CartPole-v*",), SMALL | _falling(500_000, 7e-4, num_envs=8), ZOO),
    "a2c-cartpole-novel": Preset(
        "a2c",
        ("chordate/CartPoleNoVel-v*",),
        SMALL | NORMALIZE | _falling(500_000, 1e-3, num_envs=8, rollout=16) | REMEMBERS,
        HIDDEN,
    ),
    "a2c-acrobot": Preset(
        "a2c",
        ("Acrobot-v*", "MountainCar-v*"),
        SMALL | NORMALIZE | _falling(1_000_000, 7e-4, num_envs=16),
        ZOO,
    ),
    "a2c-pendulum": Preset(
        "a2c",
        ("Pendulum-v*",),
        SMALL
        | NORMALIZE
        | _falling(1_000_000, 7e-4, num_envs=8, rollout=8, gamma=0.9, lam=0.9)
        | dict(optimizer="adam"),
        ZOO,
    ),
    "a2c-mujoco": Preset(
        "a2c",
        (*MUJOCO, "LunarLander*", "MountainCarContinuous-v*"),
        SMALL
        | NORMALIZE
        | _falling(1_000_000, 1e-3, num_envs=8, rollout=8, lam=0.9)
        | dict(log_std=-1.0, optimizer="adam"),
        ZOO + ", without its state-dependent exploration",
    ),
    "a2c-atari": Preset(
        "a2c",
        GAMES,
        ATARI_GRADIENT | _falling(10_000_000, 7e-4, num_envs=16),
        "Mnih et al. 2016, as the zoo has it",
    ),
    "trpo": Preset(
        "trpo",
        ("CartPole-v*",),
        SMALL | dict(steps=100_000, num_envs=2, rollout=512, lam=0.98, epochs=20, eval_every=20_000),
        ZOO,
    ),
    "trpo-cartpole-novel": Preset(
        "trpo",
        ("chordate/CartPoleNoVel-v*",),
        SMALL
        | NORMALIZE
        | dict(steps=150_000, num_envs=4, rollout=512, sequence=64, cg_steps=25, epochs=20, eval_every=25_000)
        | REMEMBERS,
        HIDDEN,
    ),
    "trpo-acrobot": Preset(
        "trpo",
        ("Acrobot-v*", "MountainCar-v*"),
        SMALL | dict(steps=300_000, num_envs=4, rollout=512, lam=0.97, epochs=20, eval_every=30_000),
        ZOO + ", for longer",
    ),
    "trpo-pendulum": Preset(
        "trpo",
        ("Pendulum-v*",),
        SMALL
        | NORMALIZE
        | dict(steps=300_000, num_envs=2, rollout=1_024, gamma=0.97, epochs=15, eval_every=30_000),
        "as for ppo",
    ),
    "trpo-lunarlander": Preset(
        "trpo",
        ("LunarLander*",),
        SMALL
        | dict(steps=1_500_000, num_envs=16, rollout=128, lam=0.98, epochs=20, eval_every=150_000)
        | dict(gamma=0.999),
        "the zoo's, with ppo's environments and discount: half the steps would do",
    ),
    "trpo-hopper": Preset(
        "trpo",
        ("Hopper-v*",),
        SMALL
        | NORMALIZE
        | dict(steps=1_000_000, num_envs=4, rollout=512, cg_steps=25, epochs=20, eval_every=100_000)
        | dict(gamma=0.995, lam=0.97),
        "the zoo's, looking further ahead",
    ),
    "trpo-mujoco": Preset(
        "trpo",
        (*MUJOCO, "MountainCarContinuous-v*"),
        SMALL
        | NORMALIZE
        | dict(steps=1_000_000, num_envs=4, rollout=512, cg_steps=25, epochs=20, eval_every=100_000),
        ZOO,
    ),
    "reinforce-cartpole": Preset(
        "reinforce", ("CartPole-v*", "Acrobot-v*"), SMALL | _falling(500_000, 3e-3, num_envs=8), "found here"
    ),
    "reinforce-cartpole-novel": Preset(
        "reinforce",
        ("chordate/CartPoleNoVel-v*",),
        SMALL | _falling(500_000, 3e-3, num_envs=8) | REMEMBERS,
        HIDDEN,
    ),
    "reinforce-mujoco": Preset(
        "reinforce",
        (*MUJOCO, "Pendulum-v*"),
        SMALL | _falling(1_000_000, 3e-3, num_envs=2, episodes=2, normalize_obs=True),
        "found here",
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
