"""The loops, with every arrow of the data flow; nothing here knows which agent, replay or environment it drives.

envs --Transition--> replay --Batch--> agent.update --metrics--> watch --> runs/<run>/
  ^                      ^                 |
  |                      +--- priority ----+
  +-------- weights (agent.act) -----------+

On-policy agents forget what they have learned from: their memory is a rollout, and gives it away whole.

An agent says in `loop` which function drives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from agents.base import Agent, due
from agents.watch import Watch
from envs import Collector
from replay import Ring, Rollouts, SequenceRing, Update

PORTION = 16 << 20  # bytes of samples drawn at a time


def off_policy(
    agent: Agent, collector: Collector, replay: Ring | SequenceRing, watch: Watch, steps: int, start: int = 0
) -> int:
    """Act, remember and learn from agent step `start` to `steps`, over all environments; return the step reached.

    Emulation starts before the updates of a step and ends after them, so that both run at once. The step under way is
    therefore in the replay one step later, with or without overlap: results do not depend on it.
    """
    config, num_envs = agent.config, collector.env.num_envs
    step, decision = start, watch.decision
    # a resumed run remembers what it did
    state = agent.initial(num_envs) if decision is None else decision.state
    # who comes back without a replay fills it first
    learning_starts = config.learning_starts + (0 if replay.added else start)
    while step < steps and not watch.stopping:
        decision = agent.act(collector.obs, collector.first, state, step)
        collector.send(decision.action)
        before, step = step, step + num_envs
        update: Update | None = None
        updates = due(config.train_every, before, step) * config.updates
        if updates and before >= learning_starts and len(replay):  # n-step samples need n steps more
            for count in portions(updates, config.batch, replay):
                batch = replay.sample(config.batch, count)
                update = agent.update(batch, count)
                replay.update_priority(batch.index, update.priority)
        replay.add(collector.recv(), state)
        state = decision.state
        if state:
            watch.decision = decision
        watch.after(before, step, collector.episodes, update)
    return step


def on_policy(
    agent: Any, collector: Collector, memory: Rollouts, watch: Watch, steps: int, start: int = 0
) -> int:
    """Act, and learn from what the present policy did as soon as the memory has enough of it; return the step reached.

    An agent that `commits` decides on its next action before the update, which learns from it (SARSA); the others
    decide by what they have just learned.
    """
    num_envs, step = collector.env.num_envs, start
    decision = watch.decision  # a resumed run has chosen already
    if decision is None:
        decision = agent.act(collector.obs, collector.first, agent.initial(num_envs), step)
    watch.decision = decision
    while step < steps and not watch.stopping:
        collector.send(decision.action)
        memory.add(collector.recv(), decision)
        before, step = step, step + num_envs
        update = None
        if agent.commits:
            decision = agent.act(collector.obs, collector.first, decision.state, step)
        if memory.full:
            update = agent.update(memory.take(collector.obs, decision, collector.first))
        if not agent.commits:
            decision = agent.act(collector.obs, collector.first, decision.state, step)
        watch.decision = decision
        watch.after(before, step, collector.episodes, update)
    return step


def portions(updates: int, batch: int, replay: Ring | SequenceRing) -> Iterator[int]:
    """How many updates to draw samples for at a time: many, as long as their samples fit into a cache."""
    most = max(PORTION // (batch * replay.sample_nbytes), 1)
    while updates > 0:
        yield min(updates, most)
        updates -= most
