"""The loops, with every arrow of the data flow; nothing here knows which agent, replay or environment it drives.

envs --Transition--> replay --Batch--> agent.update --metrics--> watch --> runs/<run>/
  ^                      ^                 |
  |                      +--- priority ----+
  +-------- weights (agent.act) -----------+

An agent says in `loop` which function drives it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from agents.base import Agent, due
from agents.watch import Watch
from envs import Collector
from replay import Decision, Five, Ring, Update

PORTION = 16 << 20  # bytes of samples drawn at a time


def off_policy(
    agent: Agent, collector: Collector, replay: Ring, watch: Watch, steps: int, start: int = 0
) -> int:
    """Act, remember and learn from agent step `start` to `steps`, over all environments; return the step reached.

    Emulation starts before the updates of a step and ends after them, so that both run at once. The step under way is
    therefore in the replay one step later, with or without overlap: results do not depend on it.
    """
    config, num_envs = agent.config, collector.env.num_envs
    state, step = agent.initial(num_envs), start
    # who comes back without a replay fills it first
    learning_starts = config.learning_starts + (0 if replay.added else start)
    while step < steps and not watch.stopping:
        decision = agent.act(collector.obs, collector.first, state, step)
        state = decision.state
        collector.send(decision.action)
        before, step = step, step + num_envs
        update: Update | None = None
        updates = due(config.train_every, before, step) * config.updates
        if updates and before >= learning_starts and len(replay):  # n-step samples need n steps more
            for count in portions(updates, config.batch, replay):
                batch = replay.sample(config.batch, count)
                update = agent.update(batch, count)
                replay.update_priority(batch.index, update.priority)
        replay.add(collector.recv())
        watch.after(before, step, collector.episodes, update)
    return step


def on_policy(agent: Agent, collector: Collector, watch: Watch, steps: int, start: int = 0) -> int:
    """Act, and learn from each step with the action that follows it; return the step reached.

    The next action is chosen before the table or net learns from it, and is then really taken. In a state where an
    episode was cut nothing follows: the action there is only drawn.
    """
    num_envs, step = collector.env.num_envs, start
    state = agent.initial(num_envs)
    if "action" in watch.carried:  # a resumed run has chosen already
        decision = Decision(watch.carried["action"], state)
    else:
        decision = agent.act(collector.obs, collector.first, state, step)
    watch.carried = {"action": decision.action}
    while step < steps and not watch.stopping:
        collector.send(decision.action)
        done = collector.recv()
        before, step = step, step + num_envs
        decision = agent.act(collector.obs, collector.first, decision.state, step)
        following = decision.action
        if np.count_nonzero(done.truncated):
            drawn = agent.act(done.next_obs, np.zeros_like(done.first), decision.state, step).action
            following = np.where(done.truncated, drawn, following)
        update = agent.update(
            Five(done.obs, done.action, done.reward, done.next_obs, done.terminated, following)
        )
        watch.carried = {"action": decision.action}
        watch.after(before, step, collector.episodes, update)
    return step


def portions(updates: int, batch: int, replay: Ring) -> Iterator[int]:
    """How many updates to draw samples for at a time: many, as long as their samples fit into a cache."""
    most = max(PORTION // (batch * replay.sample_nbytes), 1)
    while updates > 0:
        yield min(updates, most)
        updates -= most
