"""Deep Q-learning with fixed targets.

    y = R + discount * Q'(s_k, a*)        a* = argmax_a Q(s_k, a), or argmax_a Q'(s_k, a) if double is off
    L = mean_B w * h(y - Q(s, a))         h = Huber with delta 1, or half the square

R is the n-step return and discount = gamma^k (1 - terminated), both made by the replay; Q' is a copy of Q that
follows it every `target_every` updates (or by a fraction `tau` of the way).

Parts, each a flag of its own: double, `online` as above, or `twin`: Q' learns too, at each update a coin says which
of the two learns and picks a*, and the other one evaluates it; `n_step`; dueling and noisy (agents/heads.py);
prioritised replay (replay/priority.py, `alpha` > 0), whose weights are w; distributional, in which Q is the mean of a
learned distribution Z and L = mean_B w * d(R + discount * Z'(s_k, a*), Z(s, a)), d the cross-entropy on fixed atoms
(c51) or the quantile Huber loss (quantile).

With `munchausen` > 0 the next state is valued by a softmax policy pi = softmax(Q' / t), t the `temperature`, instead of
by a*, and the reward grows by how sure pi was of the action taken, which widens the gaps between actions:

    y = R + munchausen * clip(t log pi(a|s), -1, 0) + discount * sum_a' pi(a'|s_k) (Q'(s_k, a') - t log pi(a'|s_k))

With `acting=target` the policy is that of Q': with a small `tau` an average of Q over its last updates, whose noise is
as large as the differences between good actions.

On a backbone with memory the replay gives sequences (replay/sequence.py) with what was remembered where they begin.
Both nets go through the same steps from there; the first `burn_in` of them only bring the memory up to date, and L is
the mean over those of the next `sequence` at which something was done. The priority of a sequence follows

    eta max_t |error_t| + (1 - eta) mean_t |error_t|        eta = 0.9

Source: Mnih et al. 2015, Nature 518, algorithm 1; double: van Hasselt et al. 2016, arXiv 1509.06461, eq. 4; twin: van
Hasselt 2010, algorithm 1, and course notes 6.2.1; n-step: Sutton and Barto 2018, eq. 7.1; munchausen: Vieillard et al.
2020, arXiv 2007.14430, eq. 2; acting=target: Schwarzer et al. 2023, arXiv 2305.19452; all together: Hessel et al.
2018, arXiv 1710.02298; memory: Hausknecht and Stone 2015, arXiv 1507.06527 (DRQN), and Kapturowski et al. 2019 (R2D2),
section 2.3 and 3.

Deviations: (1) Adam instead of RMSProp; (2) double by default; (3) the gradient's norm is clipped, and with
`loss=huber` the error as well; (4) `train_every` and `updates` count agent steps over all environments, so the
number of samples learned per step does not depend on the number of environments; (5) noise is drawn once for each
update, for Q(s, a) and the choice of a* alike, and once for all updates that share a pass of the target net; (6) value
and advantage share the backbone's dense layer, and only the layers of the head are noisy;
(7) of twins, Q alone acts; (8) with n steps munchausen adds the term of the first action only; (9) R2D2's rescaling of
values is left out, and its sequences end with their episode, where these go on with the next one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

import backbones
from agents.base import State, epsilon_greedy, falling_epsilon, fits, numbered
from agents.distributions import masked
from agents.heads import DUELING, NOISY, QHead
from agents.optimizers import Adam, learned
from backbones.base import Backbone
from backbones.compute import Compute, copy_weights, guarded_compile, to_device, to_numpy
from backbones.dense import Quick
from envs.mask import MASK, is_masked
from replay import Batch, Decision, Sequences, Update
from replay.priority import Priority
from replay.tree import leaves, mapped
from runs.config import Knob, UserError, check, configured, needed

KINDS = ("off", "c51", "quantile")
DOUBLE = ("off", "online", "twin")
ETA = 0.9  # part of the largest error in the priority of a sequence


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
    double: Annotated[str, Knob("who picks the next action", choices=DOUBLE)] = "online"
    munchausen: Annotated[float, Knob("part of log pi added to the reward; 0: off", low=0, high=1)] = 0.0
    temperature: Annotated[float, Knob("of the softmax policy of munchausen", above=0)] = 0.03
    acting: Annotated[str, Knob("net that acts", choices=("online", "target"))] = "online"
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
    sequence: Annotated[int, Knob("steps learned in a row, on a net with memory", low=2)] = 32
    burn_in: Annotated[int, Knob("steps before, which only refresh the memory", low=0)] = 8

    def __post_init__(self) -> None:
        """Raises: UserError for a value out of range, or a knob whose part is off."""
        check(Config, vars(self))
        if self.acting == "target" and self.double == "twin":
            raise UserError("--acting target needs a target net, and with --double twin there is none")
        if self.v_min >= self.v_max:
            raise UserError(f"--v-min {self.v_min:g} must be less than --v-max {self.v_max:g}")
        if self.burn_in >= self.sequence:
            raise UserError(f"--burn-in {self.burn_in} must be less than --sequence {self.sequence}")
        parts = {
            "--distributional": (self.distributional != "off", ("atoms",)),
            "--distributional c51": (self.distributional == "c51", ("v_min", "v_max")),
            "--noisy factorised": (self.noisy == "factorised", ("noisy_sigma",)),
            "--distributional off": (self.distributional == "off", ("loss",)),
            "--lr-end": (self.lr_end is not None, ("lr_steps",)),
            "--munchausen": (self.munchausen > 0, ("temperature",)),
            "--alpha": (self.alpha > 0, ("beta_start", "beta_end", "beta_steps")),
        }
        needed(self, parts)

    @property
    def replay(self) -> dict[str, Any]:
        """What the replay is asked for, besides its capacity."""
        chosen = {"n_step": self.n_step, "gamma": self.gamma, "clip_reward": self.clip_reward}
        return {**chosen, "priority": self.priority}

    @property
    def sequences(self) -> dict[str, Any]:
        """What a replay of sequences is asked for besides."""
        return {"length": self.sequence, "burn_in": self.burn_in}

    def rounds(self, steps: int, num_envs: int) -> int:
        """Updates in so many steps over all environments."""
        return max(steps - self.learning_starts, 0) // self.train_every * self.updates

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


def munchausen(
    reward: Tensor,
    discount: Tensor,
    later: Tensor,
    now: Tensor,
    action: Tensor,
    part: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The softmax policy (B, A) for the next state, and the reward (B,) with the two terms of log pi.

    Shapes: reward, discount (B,); later, now (B, A), the target net's values of the successor and of the state;
    action (B,) in [0, A).
    Source: Vieillard et al. 2020, arXiv 2007.14430, eq. 2, with the clip of section 4.
    """
    log_next = (later / temperature).log_softmax(1)  # (B, A)
    log_taken = (now / temperature).log_softmax(1).gather(1, action.unsqueeze(1)).squeeze(1)  # (B,)
    policy = log_next.exp()
    entropy = -(policy * log_next).sum(1)  # (B,)
    sure = (temperature * log_taken).clamp(-1.0, 0.0)
    return policy, reward + part * sure + discount * temperature * entropy


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


def midpoints(count: int, like: Tensor) -> Tensor:
    """The levels (2 k + 1) / 2 K (K,) of the quantiles that are learned; Dabney et al. 2018, lemma 2."""
    return (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count


def quantile_loss(theta: Tensor, tau: Tensor, target: Tensor, threshold: float = 1.0) -> Tensor:
    """Each sample's quantile Huber loss (B,), summed over theta and averaged over target.

    Shapes: theta (B, K), estimates of the quantiles at the levels tau (K,) or (B, K); target (B, K'), samples of the
    return.
    Source: Dabney et al. 2018, arXiv 1710.10044, eq. 9-10 and algorithm 1.
    """
    error = target[:, None, :] - theta[:, :, None]  # (B, K, K')
    huber = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=threshold)
    return ((tau[..., None] - (error.detach() < 0).float()).abs() * huber).mean(2).sum(1)


def expectation(out: Tensor, kind: str, support: Tensor) -> Tensor:
    """Q(s, .) (B, A) of the head's output: itself, or the mean of a distribution (B, A, K)."""
    if kind == "off":
        return out
    return (out.softmax(2) * support).sum(2) if kind == "c51" else out.mean(2)


def pick(out: Tensor, action: Tensor) -> Tensor:
    """The distributions (B, K) of one action (B,) each, from (B, A, K)."""
    return out[torch.arange(len(out), device=out.device), action]


def sequence_error(error: Tensor) -> Tensor:
    """The error of each sequence (B,), of |errors| (L, B) of its steps; NaN where nothing was done.

    Source: Kapturowski et al. 2019, section 2.3.
    """
    return ETA * error.nan_to_num(0.0).amax(0) + (1 - ETA) * error.nanmean(0)


SEQUENCE_AXES = (1, 1, 0, 1, 1, 1, 1, 1, 0, 0)  # where B lies in each field of `Sequences`


class Views(NamedTuple):
    """What the nets say of B samples."""

    out: Tensor  # (B, A) or (B, A, K) of the net that learns, in the state
    later: Tensor  # of the net that evaluates, in the successor
    next_q: Tensor  # (B, A) its values
    select_q: Tensor  # (B, A) the values by which the next action is picked
    now_q: Tensor | None  # (B, A) of the net that evaluates, in the state; for munchausen only


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

    def unroll(self, obs: Any, state: State = (), first: Tensor | None = None) -> tuple[Tensor, State]:
        """Values of all actions (B, A, ...) or (T, B, A, ...) from what is remembered; and what is remembered then."""
        features, state = self.backbone(obs, state, first)
        return self.head(features.flatten(0, -2)).unflatten(0, features.shape[:-1]), state

    def quick(self) -> Quick | None:
        """`forward` in numpy for a handful of observations, where backbone and head have that form."""
        features, values = self.backbone.quick(), self.head.quick()
        return None if features is None or values is None else features.then(values)


class DQN:
    """The agent; `build` gives it networks, then it can act and learn."""

    name = "dqn"
    Config = Config
    loop = "off_policy"
    backbones = tuple(backbones.BACKBONES)

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
        self.config = configured(Config, config, knobs)
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
        actions = numbered(self.name, action_space)
        self.compute = compute
        self.actions, self._start = int(actions.n), int(actions.start)
        self._masked = is_masked(observation_space)
        config = self.config
        weights, exploration, noise, coin = seed.spawn(4)
        self._rng = np.random.default_rng(exploration)
        self._noise = np.random.default_rng(noise) if config.noisy != "off" else None
        self._coin = np.random.default_rng(coin) if config.double == "twin" else None
        with torch.random.fork_rng(devices=[]):  # torch's initialisers take no generator
            torch.manual_seed(int(weights.generate_state(1, np.uint64)[0] >> 1))
            self.online = self._net(self.backbone, observation_space)
            twin = copy.deepcopy(self.backbone)  # a backbone given as an object is there once
            self.target = (
                copy.deepcopy(self.online) if self._coin is None else self._net(twin, observation_space)
            )
        self.memory = self.online.backbone.memory
        if not self.memory:
            self._refuse("sequence", "burn_in")
        else:
            fits(self.online.backbone, config.sequence)
        if config.epsilon_start == config.epsilon_end == 0 and config.noisy == "off":
            say("after --learning-starts nothing explores: epsilon is 0 and there is no noise")
        self._support = torch.linspace(config.v_min, config.v_max, config.atoms, device=compute.device)
        self._pupils = [self.online] if self._coin is None else [self.online, self.target]
        self._optimizers = [self._optimizer(net) for net in self._pupils]
        if self._coin is None:
            self.target.requires_grad_(False)

        def graph(pupil: int) -> Callable[..., Any]:
            def learn(batch: Any, later: Tensor | None = None) -> Any:
                return self.learn(batch, later, pupil)

            # the segments of sequences change their shape with every batch
            return guarded_compile(learn, say) if compute.compile and not self.memory else learn

        # one graph for each net that learns, and one that is given the target net's output
        self._learn, self._learn_given = [graph(pupil) for pupil in range(len(self._pupils))], graph(0)
        # what is only read holds, in bf16, what autocast would cast the weights to each time
        self._actor = self._acting = self.target if config.acting == "target" else self.online
        self._quick = self._acting.quick() if compute.device == "cpu" else None
        self._goal: QNet = self.target  # evaluates the next action
        acts_target = config.acting == "target"
        if compute.precision == "bf16" and not self.memory:  # what is remembered keeps its digits
            # a target that creeps needs the digits; one that acts in numpy, which has no bf16, keeps them too
            if config.tau == 1 and self._coin is None and not (acts_target and self._quick):
                self.target.backbone.to(torch.bfloat16)
            if self._quick is None:
                self._actor = self._reader(self._acting)
            if self._coin is None:
                same = acts_target and self._quick is None
                self._goal = self._actor if same else self._reader(self.target)

    def _refuse(self, *names: str) -> None:
        """Raises: UserError if one of these knobs, which have no effect here, was turned."""
        for name in names:
            if getattr(self.config, name) != getattr(Config, name):
                flag, net = name.replace("_", "-"), type(self.online.backbone).__name__
                raise UserError(f"--{flag} has no effect on {net.lower()}: it has no memory")

    def _net(self, backbone: str | Backbone, observation_space: spaces.Space[Any]) -> QNet:
        config = self.config
        return QNet(
            backbones.build(backbone or backbones.default(observation_space), observation_space, **self.net),
            self.actions,
            atoms=1 if config.distributional == "off" else config.atoms,
            dueling=config.dueling,
            noisy=config.noisy,
            sigma=config.noisy_sigma,
        ).to(self.compute.device)

    def _optimizer(self, net: QNet) -> Adam:
        config = self.config
        return Adam(
            learned(net),
            lr=config.lr,
            lr_end=config.lr_end,
            decay=max(config.lr_steps * config.updates // config.train_every // len(self._pupils), 1),
            eps=config.adam_eps,
            max_norm=config.max_grad_norm,
        )

    @staticmethod
    def _reader(net: QNet) -> QNet:
        """The net itself if its backbone is in bf16, else a copy of it that is."""
        if next(net.backbone.parameters()).dtype == torch.bfloat16:
            return net
        copied = copy.deepcopy(net).requires_grad_(False)
        copied.backbone.to(torch.bfloat16)
        return copied

    @property
    def parameters(self) -> int:
        """Numbers in the online net."""
        return sum(parameter.numel() for parameter in self.online.parameters())

    @property
    def skipped_in_row(self) -> int:
        """See `Agent.skipped_in_row`."""
        return int(max(optimizer.longest for optimizer in self._optimizers))

    def initial(self, n: int) -> State:
        """See `Agent.initial`."""
        return to_numpy(self._actor.backbone.initial(n))

    def act(self, obs: Any, first: np.ndarray, state: State, step: int) -> Decision:
        """Epsilon-greedy; noisy layers draw new noise for each step."""
        if self._noise is not None:
            self._actor.head.draw(self._noise)
        chance = falling_epsilon(self.config, step)
        mask, q = obs[MASK] if self._masked else None, None
        if self.memory:  # it takes in everything, also what is acted on at random
            q, state = self._recall(obs, first, state)

        def values() -> np.ndarray:
            return self._values(obs) if q is None else q

        action = epsilon_greedy(self._rng, chance, len(first), self.actions, values, mask)
        return Decision(action + self._start, state)

    def schedule(self, step: int) -> dict[str, float]:
        """See `Agent.schedule`."""
        return {"train/epsilon": falling_epsilon(self.config, step)}

    def greedy(self, obs: Any, first: np.ndarray, state: State) -> Decision:
        """The actions of highest value."""
        self._actor.head.draw(None)
        values, state = self._recall(obs, first, state) if self.memory else (self._values(obs), state)
        return Decision(self._allowed(values, obs).argmax(axis=1) + self._start, state)

    def values(self, obs: Any, first: np.ndarray | None = None, state: State = ()) -> np.ndarray:
        """Q(s, .) (N, A) of numpy observations (N, *S), without noise; -inf for what is forbidden."""
        self._actor.head.draw(None)
        return self._allowed(self._recall(obs, first, state)[0] if self.memory else self._values(obs), obs)

    def _allowed(self, values: np.ndarray, obs: Any) -> np.ndarray:
        return np.where(obs[MASK], values, -np.inf) if self._masked else values

    def _values(self, obs: Any) -> np.ndarray:
        if self._quick is not None and len(obs) <= self._quick.rows:
            return self._quick(obs)
        with self.compute.acting():
            seen = to_device(obs, self.compute.device)
            return to_numpy(self._q(self._actor(seen), seen))

    def _recall(self, obs: Any, first: np.ndarray | None, state: State) -> tuple[np.ndarray, State]:
        """Q(s, .) (N, A) of observations (N, *S) after what is remembered; and what is remembered then."""
        device = self.compute.device
        with self.compute.acting():
            seen, begins = to_device(obs, device), None if first is None else to_device(first, device)
            out, state = self._actor.unroll(seen, to_device(state, device), begins)
            return to_numpy((self._q(out, seen), state))

    def _q(self, out: Tensor, obs: Any) -> Tensor:
        """Q(s, .) (B, A) of the head's output for obs, with forbidden actions out of reach."""
        q = expectation(out, self.config.distributional, self._support)
        return masked(q, obs[MASK]) if self._masked else q

    def probabilities(self, obs: Any, first: np.ndarray | None = None, state: State = ()) -> np.ndarray:
        """See `Agent.probabilities`: 1 for the greedy action."""
        return np.eye(self.actions, dtype=np.float32)[self.values(obs, first, state).argmax(axis=1)]

    def loss(
        self, batch: Batch, later: Tensor | None = None, pupil: int = 0
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss (), metrics, and each sample's error (B,): TD error, cross-entropy or quantile loss.

        `later` is the other net's output for the successors, where it is known; `pupil` 1 is the twin.
        """
        config = self.config
        net, other = self._nets(pupil)
        with self.compute.autocast():
            with torch.no_grad():
                if later is None:
                    later = other(batch.next_obs)
                assert later is not None
                next_q = self._q(later, batch.next_obs)  # (B, A)
                select_q, now_q = next_q, None
                if config.munchausen:
                    now_q = self._q(other(batch.obs), batch.obs)
                elif config.double != "off":
                    select_q = self._q(net(batch.next_obs), batch.next_obs)
            out = net(batch.obs)
        views = Views(out, later, next_q, select_q, now_q)
        return self._judge(views, batch.action, batch.reward, batch.discount, batch.weight)

    def sequence_loss(
        self, batch: Sequences, later: Tensor | None = None, pupil: int = 0
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss () over the steps at which something was done, metrics, and each sequence's error (B,)."""
        begin, count = self.config.burn_in, len(batch.weight)
        net, other = self._nets(pupil)
        obs, first = (mapped(lambda leaf: leaf[begin:], part) for part in (batch.obs, batch.first))
        with self.compute.autocast():
            with torch.no_grad():
                theirs = other.unroll(batch.obs, batch.state, batch.first)[0][begin:].flatten(0, 1)
                state = batch.state
                if begin:
                    before = mapped(lambda leaf: leaf[:begin], batch.obs)
                    state = net.backbone(before, state, batch.first[:begin])[1]
            own = net.unroll(obs, state, first)[0].flatten(0, 1)  # ((L + n) B, A, ...)
        seen = mapped(lambda leaf: leaf.flatten(0, 1), obs)
        values, selected = self._q(theirs, seen), self._q(own.detach(), seen)
        now = batch.acted.flatten().nonzero().squeeze(1)  # (M,) where something was done
        then = (batch.successor.flatten()[now] - begin) * count + now % count  # (M,) its successors
        views = Views(
            own[now],
            theirs[then],
            values[then],
            values[then] if self.config.double == "off" else selected[then],
            values[now] if self.config.munchausen else None,
        )
        action, reward, discount = (
            x.flatten(0, 1)[now] for x in (batch.action, batch.reward, batch.discount)
        )
        loss, metrics, error = self._judge(views, action, reward, discount, batch.weight[now % count])
        errors = torch.full_like(batch.reward, torch.nan).flatten()
        errors[now] = error.abs()
        return loss, metrics, sequence_error(errors.view_as(batch.reward))

    def _nets(self, pupil: int) -> tuple[QNet, QNet]:
        """The net that learns, and the one that evaluates."""
        return (self.online, self._goal) if pupil == 0 else (self.target, self.online)

    def _judge(
        self, views: Views, action: Tensor, reward: Tensor, discount: Tensor, weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss, metrics and each sample's error (B,), of what the nets say about it."""
        config, action = self.config, action - self._start
        kind, support, policy = config.distributional, self._support, None
        with torch.no_grad():
            if views.now_q is None:
                target = q_target(reward, discount, views.next_q, views.select_q)  # (B,)
            else:
                terms = (action, config.munchausen, config.temperature)
                policy, reward = munchausen(reward, discount, views.next_q, views.now_q, *terms)
                target = reward + discount * (policy * views.next_q).sum(1)
        if kind == "off":
            loss, error = td_loss(views.out, action, target, weight, config.loss == "huber")
        else:
            spread = views.later.softmax(2) if kind == "c51" else views.later  # (B, A, K)
            after = (
                pick(spread, views.select_q.argmax(1))
                if policy is None
                else (policy[:, :, None] * spread).sum(1)
            )
            now = pick(views.out, action)  # (B, K)
            if kind == "c51":
                goal = c51_target(reward, discount, after, support)
                each = -(goal * now.log_softmax(1)).sum(1)
            else:
                goal = reward[:, None] + discount[:, None] * after
                each = quantile_loss(now, midpoints(config.atoms, now), goal)
            loss, error = (weight * each).mean(), each.detach()
        q = expectation(views.out.detach(), kind, support)
        return loss, {"loss/td": loss.detach(), "q/mean": q.mean(), "q/target": target.mean()}, error

    def learn(
        self, batch: Any, later: Tensor | None = None, pupil: int = 0
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Loss, gradient and one step of Adam, in one graph where it is compiled: metrics, and |error| (B,)."""
        optimizer = self._optimizers[pupil]
        judged = self.sequence_loss if self.memory else self.loss
        loss, metrics, error = judged(batch, later, pupil)
        # what memory begins with has no part in sequences in which no episode begins
        gradients = torch.autograd.grad(loss, optimizer.parameters, materialize_grads=self.memory)
        norm = optimizer.step(gradients, loss.detach())
        if pupil == 0 and self._acting is self.online:
            copy_weights(self.online, self._actor)
        return metrics | {"train/grad_norm": norm}, error.abs()

    def update(self, batch: Any, steps: int = 1) -> Update:
        """`learn` from each of `steps` equal parts of the batch in turn; the target net follows when it is due.

        Between two copies the target net stands still: its values for all parts until the next one take one pass.
        """
        batch = batch._make(to_device(leaf, self.compute.device) for leaf in batch)
        size, done = len(batch.index) // steps, 0
        self.compute.learning()
        parts = [batch]
        if steps > 1:
            axes = SEQUENCE_AXES if self.memory else (0,) * len(batch)
            split = (_split(leaf, size, axis) for leaf, axis in zip(batch, axes, strict=True))
            parts = [batch._make(part) for part in zip(*split, strict=True)]
        metrics: dict[str, Tensor] = {}
        errors: list[Tensor] = []
        while done < steps:
            now = self._still(steps - done)
            known = self._frozen(batch, size, slice(done * size, (done + now) * size))
            for part, later in zip(parts[done : done + now], known, strict=True):
                pupil = 0 if self._coin is None else int(self._coin.integers(2))
                self._optimizers[pupil].begin()
                if self._noise is not None:
                    for net in self._pupils:
                        net.head.draw(self._noise)
                metrics, error = self._learn[pupil](part) if later is None else self._learn_given(part, later)
                errors.append(error)
            self.updates, done = self.updates + now, done + now
            if self._coin is None and self.updates % self.config.target_every == 0:
                copy_weights(self.online, self.target, self.config.tau)
                copy_weights(self.target, self._goal)
        metrics = {**metrics, "train/skipped": torch.stack([o.skipped for o in self._optimizers]).sum()}
        return Update(metrics, errors[0] if steps == 1 else torch.cat(errors))

    def _still(self, most: int) -> int:
        """How many updates, at most, until the net that evaluates changes."""
        if self._coin is not None:
            return 1
        return min(most, self.config.target_every - self.updates % self.config.target_every)

    def _frozen(self, batch: Any, size: int, rows: slice) -> Sequence[Tensor | None]:
        """The target net's output for each part in `rows`; that for a single part belongs in its graph."""
        if self._noise is not None and self._coin is None:
            self._goal.head.draw(self._noise)
        parts = (rows.stop - rows.start) // size
        if parts == 1 or self.config.munchausen or self.memory:
            return [None] * parts
        chosen = mapped(lambda leaf: leaf[rows], batch.next_obs)
        with torch.no_grad(), self.compute.autocast():
            return self._goal(chosen).split(size)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """See `Agent.state_dict`; `weights` are those of the net that acts, `other` those of the other one."""
        other = self.online if self._acting is self.target else self.target
        return {
            "weights": dict(self._acting.state_dict()),
            "other": dict(other.state_dict()),
            "optimizer": self._optimizers[0].state_dict(),
            **({} if self._coin is None else {"optimizer_twin": self._optimizers[1].state_dict()}),
            "counters": {
                "updates": self.updates,
                **{k: v.bit_generator.state for k, v in self._streams().items()},
            },
        }

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """See `Agent.load_weights`."""
        self._acting.load_state_dict(weights)
        copy_weights(self._acting, self._actor)

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """See `Agent.load_state_dict`."""
        self.load_weights(state["weights"])
        other = self.online if self._acting is self.target else self.target
        other.load_state_dict(state["other"])
        copy_weights(self.target, self._goal)
        self._optimizers[0].load_state_dict(state["optimizer"])
        if self._coin is not None:
            self._optimizers[1].load_state_dict(state["optimizer_twin"])
        self.updates = state["counters"]["updates"]
        for name, stream in self._streams().items():
            stream.bit_generator.state = state["counters"][name]

    def _streams(self) -> dict[str, np.random.Generator]:
        """Everything random, by its name in a checkpoint."""
        streams = {"exploration": self._rng, "noise": self._noise, "coin": self._coin}
        return {name: stream for name, stream in streams.items() if stream is not None}


def _split(tree: Any, size: int, axis: int) -> Sequence[Any]:
    """Parts of `size` on an axis of every leaf, in order, without a copy."""
    count = next(leaves(tree))[1].shape[axis] // size
    return [mapped(lambda leaf, k=k: leaf.narrow(axis, k * size, size), tree) for k in range(count)]
