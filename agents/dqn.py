"""Deep Q-learning with fixed targets.

    y = R + discount * Q'(s_k, a*)        a* = argmax_a Q(s_k, a) if double, else argmax_a Q'(s_k, a)
    L = mean_B w * h(y - Q(s, a))         h = Huber with delta 1, or half the square

R is the n-step return and discount = gamma^k (1 - terminated), both made by the replay; Q' is a copy of Q that
follows it every `target_every` updates (or by a fraction `tau` of the way).

Parts, each a flag of its own: double; `n_step`; dueling and noisy (agents/heads.py); prioritised replay
(replay/priority.py, `alpha` > 0), whose weights are w; distributional, in which Q is the mean of a learned distribution
Z and L = mean_B w * d(R + discount * Z'(s_k, a*), Z(s, a)), d the cross-entropy on fixed atoms (c51) or the quantile
Huber loss (quantile).

Source: Mnih et al. 2015, Nature 518, algorithm 1; double: van Hasselt et al. 2016, arXiv 1509.06461, eq. 4; n-step:
Sutton and Barto 2018, eq. 7.1; all together: Hessel et al. 2018, arXiv 1710.02298.

Deviations: (1) Adam instead of RMSProp; (2) double by default; (3) the gradient's norm is clipped, and with
`loss=huber` the error as well; (4) `train_every` and `updates` count agent steps over all environments, so the
number of samples learned per step does not depend on the number of environments; (5) noise is drawn once for each
update, for Q(s, a) and the choice of a* alike, and once for all updates that share a pass of the target net; (6) value
and advantage share the backbone's dense layer, and only the layers of the head are noisy.
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
from agents.heads import DUELING, NOISY, QHead
from backbones.base import Backbone
from backbones.compute import Compute, copy_weights, guarded_compile
from replay import Batch, Decision, Update
from replay.priority import Priority
from runs.config import Knob, UserError, check

KINDS = ("off", "c51", "quantile")


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
    dueling: Annotated[str, Knob("how value and advantage add up", choices=DUELING)] = "off"
    noisy: Annotated[str, Knob("noise on the head's weights explores", choices=NOISY)] = "off"
    noisy_sigma: Annotated[float, Knob("size of factorised noise at first", above=0)] = 0.5
    distributional: Annotated[str, Knob("what is learned of the return", choices=KINDS)] = "off"
    atoms: Annotated[int, Knob("of the distribution", low=2)] = 51
    v_min: Annotated[float, Knob("lowest return of c51")] = -10.0
    v_max: Annotated[float, Knob("highest return of c51")] = 10.0
    alpha: Annotated[float, Knob("exponent of priorities; 0: uniform replay", low=0, high=1)] = 0.0
    beta_start: Annotated[float, Knob("importance exponent at first", low=0, high=1)] = 0.4
    beta_end: Annotated[float, Knob("importance exponent in the end", low=0, high=1)] = 1.0
    beta_steps: Annotated[int, Knob("steps from the first to the last beta", low=1)] = 10_000_000

    def __post_init__(self) -> None:
        """Raises: UserError for a value out of range, or a knob whose part is off."""
        check(Config, vars(self))
        if self.v_min >= self.v_max:
            raise UserError(f"--v-min {self.v_min:g} must be less than --v-max {self.v_max:g}")
        parts = {
            "--distributional": (self.distributional != "off", ("atoms",)),
            "--distributional c51": (self.distributional == "c51", ("v_min", "v_max")),
            "--noisy factorised": (self.noisy == "factorised", ("noisy_sigma",)),
            "--distributional off": (self.distributional == "off", ("loss",)),
            "--alpha": (self.alpha > 0, ("beta_start", "beta_end", "beta_steps")),
        }
        for part, (on, names) in parts.items():
            for name in names:
                if not on and getattr(self, name) != getattr(Config, name):
                    raise UserError(f"--{name.replace('_', '-')} has no effect without {part}")

    @property
    def priority(self) -> Priority | None:
        """What the replay prefers; None: nothing."""
        return Priority(self.alpha, self.beta_start, self.beta_end, self.beta_steps) if self.alpha else None


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


def c51_target(reward: Tensor, discount: Tensor, probability: Tensor, support: Tensor) -> Tensor:
    """The distribution of R + discount * Z on the support: each atom's mass is shared by its two neighbours.

    Shapes: reward, discount (B,); probability (B, K) on support (K,), evenly spaced -> (B, K).
    Source: Bellemare et al. 2017, arXiv 1707.06887, eq. 7 and algorithm 1.
    """
    moved = (reward[:, None] + discount[:, None] * support).clamp(support[0], support[-1])  # (B, K)
    distance = (moved[:, None, :] - support[None, :, None]).abs() / (support[1] - support[0])  # (B, K, K)
    return ((1 - distance).clamp(min=0) * probability[:, None, :]).sum(2)  # (B, K)


def quantile_loss(theta: Tensor, target: Tensor) -> Tensor:
    """Each sample's quantile Huber loss (B,) with threshold 1, summed over theta and averaged over target.

    Shapes: theta (B, K), estimates of the quantiles at (2 k + 1) / 2 K; target (B, K'), samples of the return.
    Source: Dabney et al. 2018, arXiv 1710.10044, eq. 9-10 and algorithm 1.
    """
    count = theta.shape[1]
    tau = (torch.arange(count, device=theta.device, dtype=theta.dtype) + 0.5) / count  # (K,)
    error = target[:, None, :] - theta[:, :, None]  # (B, K, K')
    huber = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none")
    return ((tau[:, None] - (error.detach() < 0).float()).abs() * huber).mean(2).sum(1)


def expectation(out: Tensor, kind: str, support: Tensor) -> Tensor:
    """Q(s, .) (B, A) of the head's output: itself, or the mean of a distribution (B, A, K)."""
    if kind == "off":
        return out
    return (out.softmax(2) * support).sum(2) if kind == "c51" else out.mean(2)


def pick(out: Tensor, action: Tensor) -> Tensor:
    """The distributions (B, K) of one action (B,) each, from (B, A, K)."""
    return out[torch.arange(len(out), device=out.device), action]


def epsilon(config: Config, step: int) -> float:
    """1 before learning starts, then the line from epsilon_start to epsilon_end."""
    if step < config.learning_starts:
        return 1.0
    return linear(config.epsilon_start, config.epsilon_end, config.epsilon_steps, step)


class QNet(nn.Module):
    """A backbone with a Q head: obs (B, *S) -> (B, A), or (B, A, K) with K > 1 atoms."""

    def __init__(self, backbone: Backbone, actions: int, **head: Any) -> None:
        """Put a new head on the backbone."""
        super().__init__()
        self.backbone = backbone
        self.head = QHead(backbone.features, actions, **head)

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
        config = self.config
        weights, exploration, noise = seed.spawn(3)
        self._rng = np.random.default_rng(exploration)
        self._noise = np.random.default_rng(noise) if config.noisy != "off" else None
        with torch.random.fork_rng(devices=[]):  # torch's initialisers take no generator
            torch.manual_seed(int(weights.generate_state(1, np.uint64)[0] >> 1))
            backbone = backbones.build(
                self.backbone or backbones.default(observation_space), observation_space, **self.net
            )
            self.online = QNet(
                backbone,
                self.actions,
                atoms=1 if config.distributional == "off" else config.atoms,
                dueling=config.dueling,
                noisy=config.noisy,
                sigma=config.noisy_sigma,
            ).to(compute.device)
        self._support = torch.linspace(config.v_min, config.v_max, config.atoms, device=compute.device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = Adam(
            (p for p in self.online.parameters() if p.requires_grad),  # a backbone may come frozen
            lr=config.lr,
            lr_end=config.lr_end,
            decay=max(config.lr_steps // config.train_every * config.updates, 1),
            eps=config.adam_eps,
            max_norm=config.max_grad_norm,
        )
        # one graph that runs the target net, and one that is given its output
        self._learn, self._learn_given = (
            guarded_compile(self.learn, say) if compute.compile else self.learn for _ in range(2)
        )
        self._actor = self.online
        if compute.precision == "bf16":
            # nets that are only read hold what autocast would cast them to each time
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
        """Epsilon-greedy; every environment draws for itself. Noisy layers draw new noise for each step."""
        if self._noise is not None:
            self._actor.head.draw(self._noise)
        explore = self._rng.random(len(first)) < epsilon(self.config, step)
        random = self._rng.integers(self.actions, size=len(first))
        if explore.all():
            return Decision(random + self._start, state)
        action = self._values(obs).argmax(axis=1)
        return Decision(np.where(explore, random, action) + self._start, state)

    def exploration(self, step: int) -> float:
        """See `Agent.exploration`."""
        return epsilon(self.config, step)

    def greedy(self, obs: Any, first: np.ndarray, state: State) -> Decision:
        """The actions of highest value."""
        return Decision(self.values(obs).argmax(axis=1) + self._start, state)

    def values(self, obs: Any) -> np.ndarray:
        """Q(s, .) (N, A) of numpy observations (N, *S), without noise."""
        self._actor.head.draw(None)
        return self._values(obs)

    def _values(self, obs: Any) -> np.ndarray:
        with self.compute.acting():
            out = self._actor(_to(obs, self.compute.device))
            return expectation(out, self.config.distributional, self._support).cpu().numpy()

    def probabilities(self, obs: Any) -> np.ndarray:
        """See `Agent.probabilities`: 1 for the greedy action."""
        return np.eye(self.actions, dtype=np.float32)[self.values(obs).argmax(axis=1)]

    def loss(self, batch: Batch, later: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss (), metrics, and each sample's error (B,): TD error, cross-entropy or quantile loss.

        `later` is the target net's output for the successors, where it is known.
        """
        config, action = self.config, batch.action - self._start
        kind, support = config.distributional, self._support
        with self.compute.autocast():
            with torch.no_grad():
                if later is None:
                    later = self.target(batch.next_obs)
                assert later is not None
                next_q = expectation(later, kind, support)  # (B, A)
                select_q = next_q
                if config.double:
                    select_q = expectation(self.online(batch.next_obs), kind, support)
                target = q_target(batch.reward, batch.discount, next_q, select_q)  # (B,)
            out = self.online(batch.obs)
        if kind == "off":
            loss, error = td_loss(out, action, target, batch.weight, config.loss == "huber")
        else:
            after, now = pick(later, select_q.argmax(1)), pick(out, action)  # (B, K)
            if kind == "c51":
                goal = c51_target(batch.reward, batch.discount, after.softmax(1), support)
                each = -(goal * now.log_softmax(1)).sum(1)
            else:
                each = quantile_loss(now, batch.reward[:, None] + batch.discount[:, None] * after)
            loss, error = (batch.weight * each).mean(), each.detach()
        q = expectation(out.detach(), kind, support)
        return loss, {"loss/td": loss.detach(), "q/mean": q.mean(), "q/target": target.mean()}, error

    def learn(self, batch: Batch, later: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Loss, gradient and one step of Adam, in one graph where it is compiled: metrics, and |error| (B,)."""
        loss, metrics, error = self.loss(batch, later)
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
        parts = [batch]
        if steps > 1:
            parts = [Batch(*part) for part in zip(*(_split(leaf, size) for leaf in batch), strict=True)]
        metrics: dict[str, Tensor] = {}
        errors: list[Tensor] = []
        while done < steps:
            now = min(steps - done, self.config.target_every - self.updates % self.config.target_every)
            known = self._frozen(batch.next_obs, size, slice(done * size, (done + now) * size))
            for part, later in zip(parts[done : done + now], known, strict=True):
                self.optimizer.begin()
                if self._noise is not None:
                    self.online.head.draw(self._noise)
                metrics, error = self._learn(part) if later is None else self._learn_given(part, later)
                errors.append(error)
            self.updates, done = self.updates + now, done + now
            if self.updates % self.config.target_every == 0:
                copy_weights(self.online, self.target, self.config.tau)
        return Update(metrics, errors[0] if steps == 1 else torch.cat(errors))

    def _frozen(self, next_obs: Any, size: int, rows: slice) -> Sequence[Tensor | None]:
        """The target net's output for each part in `rows`; that for a single part belongs in its graph."""
        if self._noise is not None:
            self.target.head.draw(self._noise)
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
            "counters": {
                "updates": self.updates,
                **{k: v.bit_generator.state for k, v in self._streams().items()},
            },
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
        for name, stream in self._streams().items():
            stream.bit_generator.state = state["counters"][name]

    def _streams(self) -> dict[str, np.random.Generator]:
        noise = {} if self._noise is None else {"noise": self._noise}
        return {"exploration": self._rng, **noise}


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
