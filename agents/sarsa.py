"""SARSA: learn the value of the policy that acts, from the action that it really takes next.

    y = r + discount * Q(s', a')        discount = gamma (1 - terminated)
    a table:      Q(s, a) <- Q(s, a) + lr / n(s, a)^omega * (y - Q(s, a))
    a network:    L = mean_N (y - Q(s, a))^2 / 2, one step of Adam

With `rollout` > 1 it learns from so many steps of every environment at once. A net with memory goes through them in one
pass, from what it remembered before the first; its gradient reaches back to there and no further, so that with steps
one by one it could learn nothing about what to remember.

a' is the action taken in s'. Where the episode was truncated at s', nobody acts there: a' is then an action that the
policy draws there. The same class runs on a table and on any backbone: what holds Q is a part.

Source: Rummery and Niranjan 1994; Sutton and Barto 2018, section 6.4, and on a network section 10.1 (semi-gradient, as
y has no gradient); course notes 6.3.1.

Deviations: (1) the notes' target lacks its gamma; (2) all environments are learned from at once, a pair (s, a) that
occurs several times from the mean of its targets (agents/tables.py); (3) Adam instead of plain gradient descent on a
network, and the gradient's norm is clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

import backbones
from agents.base import State, default_backbone, linear
from agents.dqn import QNet, td_loss
from agents.optimizers import Adam, learned
from agents.tables import Table
from agents.values import EpsilonGreedy, Holder
from backbones.compute import Compute, guarded_compile, to_device, to_numpy
from replay import Five, Rollout, Rollouts, Update
from replay.tree import mapped, rows
from runs.config import Knob, UserError, check

REMEMBERED = 32  # steps of a rollout for a net with memory, unless another number is asked for


@dataclass(frozen=True)
class Config:
    """The knobs of SARSA; steps are agent decisions over all environments. Those of table or backbone are their own."""

    lr: Annotated[float | None, Knob("step size; by itself 0.1 on a table, 1e-3 on a network", above=0)] = (
        None
    )
    gamma: Annotated[float, Knob("discount of one step", low=0, high=1)] = 0.99
    rollout: Annotated[
        int | None, Knob("steps of each environment per update; by itself 1, and 32 with memory", low=1)
    ] = None
    max_grad_norm: Annotated[float, Knob("gradients of a network are scaled down to this norm", above=0)] = (
        10.0
    )
    epsilon_start: Annotated[float, Knob("share of random actions at first", low=0, high=1)] = 1.0
    epsilon_end: Annotated[float, Knob("share of random actions in the end", low=0, high=1)] = 0.05
    epsilon_steps: Annotated[int, Knob("steps from the first to the last epsilon", low=1)] = 50_000

    def __post_init__(self) -> None:
        """Raises: UserError for a value out of range."""
        check(Config, vars(self))

    def rounds(self, steps: int, num_envs: int) -> int:
        """Updates in so many steps over all environments."""
        return steps // num_envs // (self.rollout or 1)


def sarsa_target(
    reward: np.ndarray, discount: np.ndarray, next_q: np.ndarray, next_action: np.ndarray
) -> np.ndarray:
    """y = r + discount * Q(s', a').

    Shapes: reward, discount, next_action (B,); next_q (B, A) -> (B,).
    Source: Sutton and Barto 2018, eq. 6.7.
    """
    return reward + discount * next_q[np.arange(len(next_action)), next_action]


class Net:
    """A network that holds Q, with its own optimiser; see `Holder`."""

    def __init__(
        self, net: QNet, lr: float, max_norm: float, compute: Compute, say: Callable[[str], None]
    ) -> None:
        """Put Adam beside the net."""
        self.net, self.compute = net.to(compute.device), compute
        self.optimizer = Adam(learned(net), lr=lr, eps=1e-8, max_norm=max_norm)
        self._quick = net.quick() if compute.device == "cpu" else None
        self.memory = net.backbone.memory
        # how the steps of several episodes are laid out changes with every rollout
        self._graph = guarded_compile(self._step, say) if compute.compile and not self.memory else self._step

    @property
    def parameters(self) -> int:
        """Numbers in the net."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    @property
    def skipped_in_row(self) -> int:
        """The most steps skipped in a row."""
        return int(self.optimizer.longest)

    def values(self, obs: Any) -> np.ndarray:
        """Q(s, .) (N, A) float32 of observations (N, *S)."""
        if self._quick is not None and len(obs) <= self._quick.rows:
            return self._quick(obs)
        with self.compute.acting():
            return to_numpy(self.net(to_device(obs, self.compute.device)))

    def unroll(self, obs: Any, first: np.ndarray | None, state: State) -> tuple[np.ndarray, State]:
        """Q(s, .) of observations (N, *S) or (T, N, *S) after what is remembered; and what is remembered then."""
        device = self.compute.device
        with self.compute.acting():
            begins = None if first is None else to_device(first, device)
            out, state = self.net.unroll(to_device(obs, device), to_device(state, device), begins)
            return to_numpy((out, state))

    def learn(self, obs: Any, action: np.ndarray, target: np.ndarray, *memory: Any) -> dict[str, Tensor]:
        """Loss, gradient and one step of Adam.

        A net with memory is given obs (T, N, *S), action and target (T * N,), and as `memory` what it remembered
        before the first step (N, ...), and where episodes begin (T, N).
        """
        self.compute.learning()
        self.optimizer.begin()
        device = self.compute.device
        goal = to_device(target.astype(np.float32, copy=False), device)
        given = (to_device(part, device) for part in (obs, action, goal, *memory))
        return self._graph(*given) | {"train/skipped": self.optimizer.skipped}

    def _step(self, obs: Any, action: Tensor, target: Tensor, *memory: Any) -> dict[str, Tensor]:
        with self.compute.autocast():
            q = self.net.unroll(obs, *memory)[0].flatten(0, 1) if memory else self.net(obs)
        loss, _ = td_loss(q, action, target, torch.ones_like(target), huber=False)
        gradients = torch.autograd.grad(loss, self.optimizer.parameters, materialize_grads=self.memory)
        norm = self.optimizer.step(gradients, loss.detach())
        return {"loss/td": loss.detach(), "train/grad_norm": norm}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Weights, and the optimiser's moments."""
        return {"weights": dict(self.net.state_dict()), "optimizer": self.optimizer.state_dict()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take back the weights."""
        self.net.load_state_dict(weights)

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take back all that `state_dict` gave."""
        self.load_weights(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])


class SARSA(EpsilonGreedy):
    """The agent; `build` gives it a table or a network, then it can act and learn."""

    name = "sarsa"
    Config = Config
    loop = "on_policy"
    commits = True  # the action that was learned from is taken
    backbones = ("table", *backbones.BACKBONES)
    _net: Net | None = None  # none: a table

    def hold(
        self,
        observation_space: spaces.Space[Any],
        compute: Compute,
        seed: np.random.SeedSequence,
        say: Callable[[str], None],
    ) -> Holder:
        """A table where the observation is a number or several, or where it is asked for; else a network."""
        config, backbone = self.config, self.backbone or default_backbone(self.backbones, observation_space)
        if backbone == "table":
            if config.max_grad_norm != Config.max_grad_norm:
                raise UserError("--max-grad-norm has no effect on a table: it has no gradient")
            lr = 0.1 if config.lr is None else config.lr
            if lr > 1:
                raise UserError(
                    f"--lr is the part of the way to the target on a table, at most 1, got {lr:g}"
                )
            return Table(observation_space, self.actions, lr, **self.net)
        with torch.random.fork_rng(devices=[]):  # torch's initialisers take no generator
            torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
            net = QNet(backbones.build(backbone, observation_space, **self.net), self.actions)
        lr = 1e-3 if config.lr is None else config.lr
        self._net = Net(net, lr, config.max_grad_norm, compute, say)
        return self._net

    @property
    def _remembers(self) -> Net | None:
        """The net, if it has memory."""
        return self._net if self._net is not None and self._net.memory else None

    def initial(self, n: int) -> State:
        """See `Agent.initial`."""
        if self._remembers is None:
            return ()
        return to_numpy(self._remembers.net.backbone.initial(n))

    def recall(self, obs: Any, first: np.ndarray | None, state: State) -> tuple[np.ndarray, State]:
        """See `EpsilonGreedy.recall`."""
        net = self._remembers
        return super().recall(obs, first, state) if net is None else net.unroll(obs, first, state)

    def exploration(self, step: int) -> float:
        """The line from epsilon_start to epsilon_end."""
        config = self.config
        return linear(config.epsilon_start, config.epsilon_end, config.epsilon_steps, step)

    def memory(self, like: Any) -> Rollouts:
        """So many steps, and the action after them."""
        length = self.config.rollout or (1 if self._remembers is None else REMEMBERED)
        return Rollouts(length, like, self.initial(rows(like)))

    def update(self, batch: Rollout, steps: int = 1) -> Update:
        """Learn from every step of every environment.

        In a state where an episode was cut nothing follows: the action there is only drawn.
        """
        net = self._remembers
        following = np.concatenate([batch.action[1:], batch.last.action[None]])  # (T, N)
        if net is not None:
            return self._learn_in_order(net, batch, following)
        next_obs = mapped(_shifted, batch.obs, batch.last_obs)  # (T, N, *S)
        cut = batch.truncated
        if np.count_nonzero(cut):
            next_obs = mapped(partial(_put, cut), next_obs, batch.cut_obs)
            flat = mapped(_flat, next_obs)
            drawn = self.act(flat, np.zeros(cut.size, bool), (), self._at).action
            following = np.where(cut, drawn.reshape(cut.shape), following)
        parts = (batch.obs, batch.action, batch.reward, next_obs, batch.terminated, following)
        return self.learn(Five(*(mapped(_flat, part) for part in parts)))

    def _learn_in_order(self, net: Net, batch: Rollout, following: np.ndarray) -> Update:
        """`update` by one pass through time, from what was remembered before the first step."""
        state, cut = mapped(lambda leaf: leaf[0], batch.state), batch.truncated
        # the last observation begins an episode only where the step before needs no value of it
        first = np.concatenate([batch.first, np.zeros_like(batch.first[:1])])
        seen = mapped(lambda now, last: np.concatenate([now, last[None]]), batch.obs, batch.last_obs)
        next_q = net.unroll(seen, first, state)[0][1:]  # (T, N, A)
        if np.count_nonzero(cut):
            drawn = self.act(batch.cut_obs, np.zeros(np.count_nonzero(cut), bool), batch.cut_state, self._at)
            next_q[cut] = net.unroll(batch.cut_obs, None, batch.cut_state)[0]
            following[cut] = drawn.action
        discount = self.config.gamma * ~batch.terminated
        parts = (batch.reward, discount, next_q, following - self._start)
        target = sarsa_target(*(_flat(part) for part in parts))
        metrics = net.learn(batch.obs, _flat(batch.action - self._start), target, state, batch.first)
        return self._told(metrics, target)

    def learn(self, batch: Five) -> Update:
        """Learn from samples of (s, a, r, s', a')."""
        discount = self.config.gamma * ~batch.terminated
        next_q = self.q.values(batch.next_obs)  # (N, A)
        target = sarsa_target(batch.reward, discount, next_q, batch.next_action - self._start)
        return self._told(self.q.learn(batch.obs, batch.action - self._start, target), target)

    def _told(self, metrics: dict[str, Tensor], target: np.ndarray) -> Update:
        self.updates += 1
        return Update(metrics | {"q/target": torch.tensor(target.mean())}, None)


def _flat(leaf: np.ndarray) -> np.ndarray:
    return leaf.reshape(-1, *leaf.shape[2:])


def _shifted(now: np.ndarray, last: np.ndarray) -> np.ndarray:
    return np.concatenate([now[1:], last[None]])


def _put(rows: np.ndarray, into: np.ndarray, values: np.ndarray) -> np.ndarray:
    changed = np.array(into)
    changed[rows] = values
    return changed
