"""One measurement in a process of its own: `python -m tests.bench.parts SIDE WORK AMOUNT FILE` writes JSON.

Rates are of whole training steps (acting, emulation, replay, updates, logging), after `WARM_UPDATES` updates.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from gymnasium import spaces

import envs
from agents import AGENTS, load
from agents.actor import Inputs
from agents.training import parts, train, wide
from agents.watch import WARM_UPDATES
from backbones.compute import choose, guarded_compile, to_device
from replay import Transition, Update
from replay.ring import FINAL, Ring
from runs import Run
from tests.bench.works import WORKS, Work


def timed(kind: type[Any], seconds: float) -> type[Any]:
    """The agent, asking its run to stop, as Ctrl-C does, `seconds` after it is warm."""

    class Timed(kind):
        _deadline = math.inf

        def update(self, batch: Any, steps: int = 1) -> Update:
            before = self.updates
            done, now = super().update(batch, steps), time.perf_counter()
            if before < WARM_UPDATES <= self.updates:
                self._deadline = now + seconds
            elif now >= self._deadline:
                self._deadline = math.inf
                signal.raise_signal(signal.SIGTERM)
            return done

    return Timed


def ours(work: Work, seconds: float) -> dict[str, Any]:
    """A real run, folder and all, by the path that the command takes."""
    globals()["Timed"] = timed(load(work.agent), seconds)
    AGENTS[work.agent] = (__name__, "Timed")
    said: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory() as root:
        options: Any = {"root": root, "preset": "none", "say": lambda line: said.append((time.time(), line))}
        summary = train(work.agent, work.env, **options, **work.settings).summary
    # the run's own clock starts after the imports, just before it says its first line
    late = said[0][0] - psutil.Process().create_time()
    return {
        "steps_per_second": summary["steps_per_second"]["steady"],
        "steps": summary["steps"],
        "updates": summary["updates"],
        "seconds_to_first_update": late + summary["seconds_to_first_update"],
        "compute": next(line for _, line in said if "; run folder" in line).split("; run folder")[0],
    }


def plain(work: Work, seconds: float) -> dict[str, Any]:
    """Ours, without what the work is about."""
    return ours(replace(work, settings=work.plain), seconds)


def peer(work: Work, seconds: float, vectorization: str) -> dict[str, Any]:
    """The same by Stable-Baselines3, with its own Atari wrappers, and CSV and TensorBoard logs as ours."""
    from stable_baselines3.common import env_util, logger, vec_env  # type: ignore[import-not-found]  # of "bench"

    torch.set_num_threads(work.threads or torch.get_num_threads())
    kind, policy = work.rival_agent
    copies = {"n_envs": work.num_envs, "vec_env_cls": getattr(vec_env, vectorization), "seed": 0}
    if work.frame_skip == 1:
        env = env_util.make_vec_env(envs.resolve(work.env).id, **copies)
    else:  # its wrapper skips frames; sticky actions count by frame, as in ours
        protocol = {"frameskip": 1, "repeat_action_probability": 0.25}
        copies |= {"env_kwargs": protocol, "wrapper_kwargs": {"terminal_on_life_loss": False}}
        env = env_util.make_atari_env(f"ale_py:{work.env}", **copies)
        stack = work.whole["stack"]
        env = vec_env.VecFrameStack(env, stack) if stack > 1 else env
    marks: list[
        tuple[float, int, int]
    ] = []  # (time, steps, updates) at the first step after a round of updates
    updates = 0

    def count(*_: Any) -> None:
        nonlocal updates
        updates += 1

    def clock(local: dict[str, Any], _: Any) -> bool:
        if updates >= WARM_UPDATES and (not marks or updates > marks[-1][2]):
            marks.append((time.perf_counter(), local["self"].num_timesteps, updates))
        return not marks or marks[-1][0] - marks[0][0] < seconds

    with tempfile.TemporaryDirectory() as folder:
        model = getattr(importlib.import_module(work.rival), kind)(
            policy, env, seed=0, device="cpu", **work.peer()
        )
        model.policy.optimizer.register_step_post_hook(count)  # its own counts are of epochs or rollouts
        model.set_logger(logger.configure(folder, ["csv", "tensorboard"]))
        model.learn(work.settings["steps"], callback=clock)
        env.close()
    (begun, first, _), (ended, last, _) = marks[0], marks[-1]
    return {
        "steps_per_second": (last - first) / (ended - begun),
        "steps": model.num_timesteps,
        "updates": updates,
        "compute": f"cpu, torch threads {torch.get_num_threads()}, fp32, eager update",
    }


def skrl(work: Work, seconds: float, vectorization: str) -> dict[str, Any]:
    """skrl's tabular Q-learning with its own trainer, on scalar copies or on the same table environment as ours.

    It learns from the newest step of every environment, without replay: as many samples as ours, cheaper to get.
    """
    import gymnasium
    from skrl.agents.torch.q_learning import Q_LEARNING  # type: ignore[import-not-found]  # of the extra "bench"
    from skrl.envs.wrappers.torch import wrap_env  # type: ignore[import-not-found]  # likewise
    from skrl.models.torch import Model, TabularMixin  # type: ignore[import-not-found]  # likewise
    from skrl.trainers.torch import SequentialTrainer  # type: ignore[import-not-found]  # likewise

    class Finished(Exception):
        pass

    class Greedy(TabularMixin, Model):  # as in skrl's example for this environment
        def __init__(self, **spaces: Any) -> None:
            Model.__init__(self, device="cpu", **spaces)
            TabularMixin.__init__(self)
            table = torch.zeros(int(spaces["observation_space"].n), int(spaces["action_space"].n))
            self.q_table = torch.nn.Parameter(table, requires_grad=False)

        def compute(self, inputs: dict[str, Any], role: str) -> Any:
            actions = self.q_table[inputs["observations"].long()].argmax(dim=-1).view(-1, 1)
            explore = (torch.rand(len(actions)) < work.settings["epsilon_end"]).nonzero().view(-1)
            actions[explore] = torch.randint(self.q_table.shape[1], (len(explore), 1))
            return actions, {}

    marks: list[float] = []

    class Timed(Q_LEARNING):
        def update(self, *, timestep: int, timesteps: int) -> None:
            self._current_observations = (
                self._current_observations.long()
            )  # which its own code takes as indices
            self._current_next_observations = self._current_next_observations.long()
            super().update(timestep=timestep, timesteps=timesteps)
            marks.append(time.perf_counter())
            if len(marks) > WARM_UPDATES and marks[-1] - marks[WARM_UPDATES] > seconds:
                raise Finished

    torch.set_num_threads(work.threads or torch.get_num_threads())
    copies = work.num_envs
    env: Any = (
        gymnasium.make_vec(work.env, copies, vectorization_mode="sync") if vectorization == "sync" else None
    )
    env = wrap_env(env or envs.make(work.env, copies), verbose=False)
    spaces_ = {"observation_space": env.observation_space, "action_space": env.action_space}
    with tempfile.TemporaryDirectory() as folder:
        config = {"discount_factor": work.settings["gamma"], "learning_rate": work.settings["lr"]}
        config["experiment"] = {"directory": folder, "write_interval": 10, "checkpoint_interval": 0}
        agent = Timed(models={"policy": Greedy(**spaces_)}, device="cpu", cfg=config, **spaces_)
        trainer = SequentialTrainer(
            env=env, agents=agent, cfg={"timesteps": 10**9, "headless": True, "disable_progressbar": True}
        )
        with contextlib.suppress(Finished):  # how `Timed` ends its endless training
            trainer.train()
    counted = len(marks) - 1 - WARM_UPDATES
    return {
        "steps_per_second": counted * copies / (marks[-1] - marks[WARM_UPDATES]),
        "steps": len(marks) * copies,
        "updates": len(marks),
        "compute": f"cpu, torch threads {torch.get_num_threads()}, fp32, {vectorization} environments",
    }


class Filler:
    """A ring of Atari observations, and steps to fill it with."""

    def __init__(self, capacity: int, num_envs: int = 8) -> None:
        self.rng, self.num_envs = np.random.default_rng(0), num_envs
        self.pool = self.rng.integers(256, size=(1_000, 1, 84, 84), dtype=np.uint8)
        space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.ring = Ring(capacity, num_envs, space, spaces.Discrete(6), stack=4, rng=self.rng)
        self._obs, self._first = self._draw(), np.ones(num_envs, bool)

    def _draw(self) -> np.ndarray:  # (N, 4, 84, 84) without a copy: the ring reads the newest frame only
        chosen = self.pool[self.rng.integers(len(self.pool), size=self.num_envs)]
        return np.broadcast_to(chosen, (self.num_envs, 4, 84, 84))

    def add(self, steps: int) -> None:
        """Steps of every environment."""
        reward, never = np.ones(self.num_envs, np.float32), np.zeros(self.num_envs, bool)
        for _ in range(steps):
            action, later = self.rng.integers(6, size=self.num_envs), self._draw()
            ended = self.rng.random(self.num_envs) < 1 / 800
            self.ring.add(Transition(self._obs, action, reward, later, ended, never, self._first))
            self._obs, self._first = self._draw() if ended.any() else later, ended


def memory(capacity: int) -> dict[str, Any]:
    """Fill a ring of Atari observations past its end; see what it counts and what the process grew by."""
    free = psutil.virtual_memory().available
    if free < capacity * 8_000:
        return {"skipped": f"only {free / 1e9:.1f} GB are free"}
    before = psutil.Process().memory_info().rss
    filler = Filler(capacity)
    filler.add(filler.ring.slots + 10)
    grown = psutil.Process().memory_info().rss - before - filler.pool.nbytes
    stored = int((filler.ring.state_dict()["flag"] != FINAL).sum())
    return {"transitions": stored, "rss_growth": grown, "nbytes": filler.ring.nbytes}


def saving(capacity: int, every: int = 100_000) -> dict[str, Any]:
    """How long training stands still while a full Atari replay is saved, first whole and then after `every` steps."""
    free = psutil.virtual_memory().available, shutil.disk_usage(tempfile.gettempdir()).free
    if min(free[0], free[1] / 2) < capacity * 8_000:
        return {"skipped": f"{free[0] / 1e9:.1f} GB of memory and {free[1] / 1e9:.1f} GB of disk are free"}
    filler, found = Filler(capacity), {"transitions": capacity}
    filler.add(filler.ring.slots + 10)
    with tempfile.TemporaryDirectory() as root, Run.create({"env": "e", "agent": "a"}, root=root) as run:
        for step, name in enumerate(("whole", "later")):
            kept, before = filler.ring.unchanged(), shutil.disk_usage(root).free
            begun = time.perf_counter()
            run.save(step, {"replay": filler.ring.state_dict()}, {f"replay/{each}" for each in kept})
            filler.ring.saved()
            found[f"seconds_{name}"] = time.perf_counter() - begun
            found[f"bytes_{name}"] = before - shutil.disk_usage(root).free
            filler.add(every // filler.num_envs)
    return found


def ceiling(work: Work, seconds: float) -> dict[str, Any]:
    """Each part alone, computing as the run chooses to, and the rate if there were nothing else, in sequence.

    Off policy the parts are emulation, acting and the update; on policy emulation and the passes of the network.
    """
    run, config, net, env_config, compute_config = parts(work.whole)
    env = envs.make(work.env, run.num_envs, 0, env_config)
    agent = load(work.agent)(config, backbone=run.backbone, net=net)
    image = run.backbone != "mlp"
    updates = config.rounds(run.steps, run.num_envs)
    compute = choose(compute_config, image=image, wide=wide(net), updates=updates, say=print)
    seen, acted = env.single_observation_space, env.single_action_space
    agent.build(seen, acted, compute, np.random.SeedSequence(0))
    actions = itertools.cycle([env.action_space.sample() for _ in range(64)])
    if agent.loop == "off_policy":
        acting, learning = _off_policy(agent, env, work, seconds)
    else:
        acting, learning = _on_policy(agent, env, seconds)
    rates = {
        "emulation_steps": run.num_envs * _rate(lambda: env.step(next(actions)), seconds),
        "acting_steps": run.num_envs * acting,
        **{f"{name}_samples": rate for name, (rate, _) in learning.items()},
    }
    spent = 1 / rates["emulation_steps"] + 1 / rates["acting_steps"]
    spent += sum(samples / rate for rate, samples in learning.values())
    return {f"{name}_per_second": rate for name, rate in (rates | {"limit_steps": 1 / spent}).items()}


Learning = dict[str, tuple[float, float]]  # name -> (samples per second, samples per agent step)


def _off_policy(agent: Any, env: Any, work: Work, seconds: float) -> tuple[float, Learning]:
    """Rates of acting and of the update, all of it."""
    rng, collector, batch = np.random.default_rng(0), envs.Collector(env, 0), agent.config.batch
    seen, acted = env.single_observation_space, env.single_action_space
    ring = Ring(1_000, env.num_envs, seen, acted, stack=envs.frame_stack(env), rng=rng)
    for _ in range(50):
        collector.send(env.action_space.sample())
        ring.add(collector.recv())
    samples, steps = ring.sample(batch), work.settings["steps"]
    acting = _rate(lambda: agent.act(collector.obs, collector.first, (), steps), seconds)
    learning = batch * _rate(lambda: agent.update(samples), 2 * seconds)
    return acting, {"update": (learning, batch * work.updates_per_step)}


def _on_policy(agent: Any, env: Any, seconds: float) -> tuple[float, Learning]:
    """Rates of the network forward for acting, and forward and backward for learning."""
    obs, _ = env.reset(seed=0)
    acting, learning = _rate(lambda: agent.values(obs), seconds), {}
    for name, size, times in passes(agent.name, agent.config, len(obs)):
        one = Pass(agent, name, np.resize(obs, (size, *obs.shape[1:])))
        learning[name] = size * _rate(one, seconds), times
    return acting, learning


def passes(agent: str, config: Any, num_envs: int) -> list[tuple[str, int, int]]:
    """What an update runs forward and backward: (part of the net, samples at a time, times each sample)."""
    rollout = config.rollout * num_envs
    if agent == "trpo":
        # the gradient and the products with the Fisher matrix, one more for the length; each is no less than a pass
        return [("policy", rollout, config.cg_steps + 2), ("critic", config.batch, config.epochs)]
    return [("network", config.batch, config.epochs) if agent == "ppo" else ("network", rollout, 1)]


class Pass:
    """Part of the network forward and backward, compiled if updates are; without a loss and an optimiser."""

    def __init__(self, agent: Any, name: str, obs: np.ndarray) -> None:
        model, self.compute = agent.model, agent.compute
        self.outputs, modules = {
            "network": (model, [model]),
            "policy": (lambda x: [model.parameters_of(x)], [model.backbone, model.policy]),
            "critic": (lambda x: [model.values_of(x)], [model.critic, model.value]),
        }[name]
        self.weights = [weight for module in modules for weight in module.parameters()]
        self.obs = to_device(obs, self.compute.device)
        self.compute.learning()
        self.run = guarded_compile(self.gradients, print) if self.compute.compile else self.gradients

    def __call__(self) -> Any:
        return self.run(self.obs)

    def gradients(self, obs: Any) -> Any:
        with self.compute.autocast():
            outputs = self.outputs(Inputs(obs))
        return torch.autograd.grad(sum(output.square().mean() for output in outputs), self.weights)


def _rate(call: Callable[[], Any], seconds: float) -> float:
    for _ in range(20):  # warm, compiled
        call()
    count, begun = 0, time.perf_counter()
    while (now := time.perf_counter()) < begun + seconds:
        call()
        count += 1
    return count / (now - begun)


def main(side: str, name: str, amount: str, file: str) -> None:
    """Measure and write."""
    alone, sizes = {"ours": ours, "plain": plain, "ceiling": ceiling}, {"memory": memory, "saving": saving}
    if side in sizes:
        found = sizes[side](int(amount))
    else:
        work, seconds = WORKS[name], float(amount)
        other = skrl if work.agent == "qtable" else peer
        found = alone[side](work, seconds) if side in alone else other(work, seconds, side)
    Path(file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
