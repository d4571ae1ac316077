"""Deep Q-learning with fixed targets.

    y = R + discount * Q'(s_k, a*)        a* = argmax_a Q(s_k, a) if double, else argmax_a Q'(s_k, a)
    L = mean_B w * h(y - Q(s, a))         h = Huber with delta 1, or half the square

R is the n-step return and discount = gamma^k (1 - terminated), both made by the replay; Q' is a copy of Q that
follows it every `target_every` updates (or by a fraction `tau` of the way).

Source: Mnih et al. 2015, Nature 518, algorithm 1; double: van Hasselt et al. 2016, arXiv 1509.06461, eq. 4; n-step:
Sutton and Barto 2018, eq. 7.1.

Deviations: (1) Adam instead of RMSProp; (2) double by default; (3) the gradient's norm is clipped, and with
`loss=huber` the error as well; (4) `train_every` and `updates` count agent steps over all environments, so the
number of samples learned per step does not depend on the number of environments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

import backbones
from agents.adam import Adam
from agents.base import State, linear
from agents.heads import QHead
from backbones.base import Backbone
from backbones.compute import Compute, copy_weights, guarded_compile
from replay import Batch, Decision, Update
from runs.config import Knob, UserError, check


@dataclass(frozen=True)
class Config:
    """The knobs of DQN; steps are agent decisions over all environments."""

    lr: Annotated[float, Knob("Adam step size", above=0)] = 1e-4
    lr_end: Annotated[float | None, Knob("Adam step size in the end; by itself lr", above=0)] = None
    lr_steps: Annotated[int, Knob("steps from lr to lr_end", low=1)] = 1_000_000
    gamma: Annotated[float, Knob("discount of one step", low=0, high=1)] = 0.99
    batch: Annotated[int, Knob("samples of one update", low=1)] = 32
    train_every: Annotated[int, Knob("steps between rounds of updates", low=1)] = 4
    updates: Annotated[int, Knob("updates of one round", low=1)] = 1
    learning_starts: Annotated[int, Knob("random steps before the first update", low=1)] = 10_000
    capacity: Annotated[int, Knob("steps the replay holds", low=1)] = 100_000
    n_step: Annotated[int, Knob("rewards summed before bootstrapping", low=1, high=100)] = 1
    double: Annotated[bool, Knob("the online net picks the next action")] = True
    target_every: Annotated[int, Knob("updates between copies to the target net", low=1)] = 1_000
    tau: Annotated[float, Knob("part of the way the target moves at a copy", above=0, high=1)] = 1.0
    loss: Annotated[str, Knob("of the TD error", choices=("huber", "squared"))] = "huber"
    max_grad_norm: Annotated[float, Knob("gradients are scaled down to this norm", above=0)] = 10.0
    adam_eps: Annotated[float, Knob("Adam epsilon", above=0)] = 1e-8
    epsilon_start: Annotated[float, Knob("share of random actions at first", low=0, high=1)] = 1.0
    epsilon_end: Annotated[float, Knob("share of random actions in the end", low=0, high=1)] = 0.05
    epsilon_steps: Annotated[int, Knob("steps from the first to the last epsilon", low=1)] = 50_000
    clip_reward: Annotated[bool, Knob("learn from the sign of each reward")] = False

    def __post_init__(self) -> None:
        """Raises: UserError for a value out of range."""
        check(Config, vars(self))


def q_target(reward: Tensor, discount: Tensor, next_q: Tensor, select_q: Tensor) -> Tensor:
    """y = R + discount * next_q[argmax select_q].

    Shapes: reward, discount (B,); next_q from the target net and select_q (B, A) -> (B,), without gradient.
    Source: van Hasselt et al. 2016, eq. 4 (select_q from the online net); Mnih et al. 2015 (select_q = next_q).
    """
    best = select_q.argmax(dim=1, keepdim=True)  # (B, 1)
    return (reward + discount * next_q.gather(1, best).squeeze(1)).detach()  # (B,)


def td_loss(q: Tensor, action: Tensor, target: Tensor, weight: Tensor, huber: bool) -> tuple[Tensor, Tensor]:
    """The weighted mean loss (), and the TD error y - Q(s, a) (B,) without gradient.

    Shapes: q (B, A); action (B,) in [0, A); target, weight (B,).
    """
    chosen = q.gather(1, action.unsqueeze(1)).squeeze(1)  # (B,)
    error = F.smooth_l1_loss(chosen, target, reduction="none") if huber else 0.5 * (target - chosen) ** 2
    return (weight * error).mean(), (target - chosen).detach()


def epsilon(config: Config, step: int) -> float:
    """1 before learning starts, then the line from epsilon_start to epsilon_end."""
    if step < config.learning_starts:
        return 1.0
    return linear(config.epsilon_start, config.epsilon_end, config.epsilon_steps, step)


class QNet(nn.Module):
    """A backbone with a Q head: obs (B, *S) -> q (B, A)."""

    def __init__(self, backbone: Backbone, actions: int) -> None:
        """Put a new head on the backbone."""
        super().__init__()
        self.backbone = backbone
        self.head = QHead(backbone.features, actions)

    def forward(self, obs: Any) -> Tensor:
        """Values of all actions."""
        return self.head(self.backbone(obs)[0])


class DQN:
    """The agent; `build` gives it networks, then it can act and learn."""

    name = "dqn"
    Config = Config

    def __init__(
        self,
        config: Config | None = None,
        *,
        backbone: str | Backbone = "",
        net: dict[str, Any] | None = None,
        **knobs: Any,
    ) -> None:
        """A DQN with `config`, or with the default changed by `knobs`, on a backbone and that backbone's knobs.

        Raises: UserError for an unknown knob or a value out of range.
        """
        check(Config, knobs)
        self.config = replace(config or Config(), **knobs)
        self.backbone, self.net = backbone, net or {}
        self.updates = 0

    def build(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        compute: Compute,
        seed: np.random.SeedSequence,
        say: Callable[[str], None] = print,
    ) -> None:
        """Make online and target nets and the optimiser; see `Agent.build`."""
        if not isinstance(action_space, spaces.Discrete):
            raise UserError(
                f"dqn drives Discrete actions, this environment has {action_space}; no agent for it is here yet"
            )
        self.compute = compute
        self.actions, self._start = int(action_space.n), int(action_space.start)
        weights, exploration = seed.spawn(2)
        self._rng = np.random.default_rng(exploration)
        with torch.random.fork_rng(devices=[]):  # torch's initialisers take no generator
            torch.manual_seed(int(weights.generate_state(1, np.uint64)[0] >> 1))
            backbone = backbones.build(
                self.backbone or backbones.default(observation_space), observation_space, **self.net
            )
            self.online = QNet(backbone, self.actions).to(compute.device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        config = self.config
        self.optimizer = Adam(
            (p for p in self.online.parameters() if p.requires_grad),  # a backbone may come frozen
            lr=config.lr,
            lr_end=config.lr_end,
            decay=max(config.lr_steps // config.train_every * config.updates, 1),
            eps=config.adam_eps,
            max_norm=config.max_grad_norm,
        )
        self._learn = guarded_compile(self.learn, say) if compute.compile else self.learn
        self._actor = self.online
        if (
            compute.precision == "bf16"
        ):  # nets that are only read hold what autocast would cast them to each time
            self._actor = copy.deepcopy(self.target)
            self._actor.backbone.to(torch.bfloat16)
            if config.tau == 1:  # a target that creeps needs the digits
                self.target.backbone.to(torch.bfloat16)

    @property
    def parameters(self) -> int:
        """Numbers in the online net."""
        return sum(parameter.numel() for parameter in self.online.parameters())

    def initial(self, n: int) -> State:
        """See `Agent.initial`."""
        return self.online.backbone.initial(n)

    def act(self, obs: Any, first: np.ndarray, state: State, step: int) -> Decision:
        """Epsilon-greedy; every environment draws for itself."""
        explore = self._rng.random(len(first)) < epsilon(self.config, step)
        random = self._rng.integers(self.actions, size=len(first))
        if explore.all():
            return Decision(random + self._start, state)
        decision = self.greedy(obs, first, state)
        return Decision(np.where(explore, random + self._start, decision.action), decision.state)

    def exploration(self, step: int) -> float:
        """See `Agent.exploration`."""
        return epsilon(self.config, step)

    def greedy(self, obs: Any, first: np.ndarray, state: State) -> Decision:
        """The actions of highest value."""
        return Decision(self.values(obs).argmax(axis=1) + self._start, state)

    def values(self, obs: Any) -> np.ndarray:
        """Q(s, .) (N, A) of numpy observations (N, *S)."""
        with self.compute.acting():
            return self._actor(_to(obs, self.compute.device)).cpu().numpy()

    def probabilities(self, obs: Any) -> np.ndarray:
        """See `Agent.probabilities`: 1 for the greedy action."""
        return np.eye(self.actions, dtype=np.float32)[self.values(obs).argmax(axis=1)]

    def loss(self, batch: Batch, next_q: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss (), metrics, and the TD error (B,); `next_q` (B, A) where the target net's values are known."""
        with self.compute.autocast():
            with torch.no_grad():
                if next_q is None:
                    next_q = self.target(batch.next_obs)
                assert next_q is not None
                select_q = self.online(batch.next_obs) if self.config.double else next_q
                target = q_target(batch.reward, batch.discount, next_q, select_q)
            q = self.online(batch.obs)
        loss, error = td_loss(
            q, batch.action - self._start, target, batch.weight, self.config.loss == "huber"
        )
        metrics = {"loss/td": loss.detach(), "q/mean": q.detach().mean(), "q/target": target.mean()}
        return loss, metrics, error

    def learn(self, batch: Batch, next_q: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Loss, gradient and one step of Adam, in one graph where it is compiled: metrics, and |TD error| (B,)."""
        loss, metrics, error = self.loss(batch, next_q)
        norm = self.optimizer.step(torch.autograd.grad(loss, self.optimizer.parameters))
        copy_weights(self.online, self._actor)
        return metrics | {"train/grad_norm": norm}, error.abs()

    def update(self, batch: Batch, steps: int = 1) -> Update:
        """`learn` from each of `steps` equal parts of the batch in turn; the target net follows when it is due.

        Between two copies the target net stands still: its values for all parts until the next one take one pass.
        """
        batch = Batch(*(_to(leaf, self.compute.device) for leaf in batch))
        size, done = len(batch.reward) // steps, 0
        self.compute.learning()
        parts = [Batch(*part) for part in zip(*(_split(leaf, size) for leaf in batch), strict=True)]
        metrics: dict[str, Tensor] = {}
        errors: list[Tensor] = []
        while done < steps:
            now = min(steps - done, self.config.target_every - self.updates % self.config.target_every)
            known = self._frozen(batch.next_obs, size, slice(done * size, (done + now) * size))
            for part, next_q in zip(parts[done : done + now], known, strict=True):
                self.optimizer.begin()
                metrics, error = self._learn(part, next_q)
                errors.append(error)
            self.updates, done = self.updates + now, done + now
            if self.updates % self.config.target_every == 0:
                copy_weights(self.online, self.target, self.config.tau)
        return Update(metrics, errors[0] if steps == 1 else torch.cat(errors))

    def _frozen(self, next_obs: Any, size: int, rows: slice) -> Sequence[Tensor | None]:
        """The target net's values (B, A) for each part in `rows`; a single part's belong in its own graph."""
        if rows.stop - rows.start == size:
            return [None]
        chosen = {k: v[rows] for k, v in next_obs.items()} if isinstance(next_obs, dict) else next_obs[rows]
        with torch.no_grad(), self.compute.autocast():
            return self.target(chosen).split(size)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """See `Agent.state_dict`."""
        return {
            "weights": dict(self.online.state_dict()),
            "target": dict(self.target.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "counters": {"updates": self.updates, "exploration": self._rng.bit_generator.state},
        }

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """See `Agent.load_weights`."""
        self.online.load_state_dict(weights)
        copy_weights(self.online, self._actor)

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """See `Agent.load_state_dict`."""
        self.load_weights(state["weights"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["counters"]["updates"]
        self._rng.bit_generator.state = state["counters"]["exploration"]


def _to(part: Any, device: str) -> Any:
    """Arrays and tensors (or dicts of them) on the device, without a copy on the CPU."""
    if isinstance(part, dict):
        return {name: _to(leaf, device) for name, leaf in part.items()}
    return torch.as_tensor(part).to(device, non_blocking=True)


def _split(leaf: Any, size: int) -> Sequence[Any]:
    """Parts of `size` rows, in order, without a copy."""
    if isinstance(leaf, dict):
        return [
            dict(zip(leaf, part, strict=True))
            for part in zip(*(v.split(size) for v in leaf.values()), strict=True)
        ]
    return leaf.split(size)
