"""What the policy-gradient agents share: a policy with a critic, acting, and a rollout made ready to learn from.

An agent on top of it adds the loss. Data flow of one update:

    rollout (T, N) -> rewards clipped, scaled -> next values -> advantages, returns -> Samples (B = T N) -> loss
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

import backbones
from agents import returns
from agents.base import State, fits, linear
from agents.distributions import masked, of_space
from agents.heads import SPREADS, PolicyHead, ValueHead
from agents.normalize import ObsNormalizer, RewardScaler
from agents.optimizers import Optimizer
from backbones.base import Backbone
from backbones.compute import Compute, copy_weights, guarded_compile, to_device, to_numpy
from backbones.dense import Quick
from envs.mask import MASK, is_masked
from replay import Decision, Rollout, Rollouts, Update
from replay.tree import joined, mapped, rows
from runs.config import Knob, RunFailed, UserError, check, configured, needed

NOTHING = np.zeros(0, np.float32)
PORTION = 1_024  # observations whose values are computed at a time


@dataclass(frozen=True)
class ActorConfig:
    """The knobs that all of these agents have; steps are agent decisions over all environments."""

    lr: Annotated[float, Knob("step size", above=0)] = 3e-4
    lr_end: Annotated[float | None, Knob("step size in the end; by itself lr", above=0)] = None
    lr_steps: Annotated[int, Knob("steps from lr to lr_end", low=1)] = 1_000_000
    gamma: Annotated[float, Knob("discount of one step", low=0, high=1)] = 0.99
    max_grad_norm: Annotated[float, Knob("gradients are scaled down to this norm", above=0)] = 0.5
    separate: Annotated[bool, Knob("critic on a backbone of its own")] = True
    orthogonal: Annotated[bool, Knob("orthogonal weights at first, small ones for the policy")] = True
    spread: Annotated[str, Knob("of Gaussians: learned numbers, or by the state", choices=SPREADS)] = "free"
    log_std: Annotated[float, Knob("log of the spread at first", low=-5, high=2)] = 0.0
    squash: Annotated[bool, Knob("bounded actions by tanh instead of cutting them off")] = False
    normalize_obs: Annotated[bool, Knob("bring observed vectors to mean 0, spread 1")] = False
    normalize_reward: Annotated[bool, Knob("divide rewards by the spread of returns")] = False
    clip_reward: Annotated[bool, Knob("learn from the sign of each reward")] = False

    def __post_init__(self) -> None:
        """Raises: UserError for a value out of range."""
        check(type(self), vars(self))
        needed(self, {"--lr-end": (self.lr_end is not None, ("lr_steps",))})


class Inputs(NamedTuple):
    """What the nets are shown. Without memory: B single steps. With memory: M sequences of L steps, B = M L."""

    obs: Any  # (B, *S), or (M, L, *S)
    first: Any = ()  # (M, L) bool, where an episode begins
    state: State = ()  # (M, ...) what was remembered before the first step


class Samples(NamedTuple):
    """A rollout to learn from, its T N steps in a row, or cut into sequences (M, L) for nets with memory."""

    inputs: Inputs
    action: Tensor  # (B, K) what the policy drew
    logp: Tensor  # (B,) then, or (0,) if nobody compares
    value: Tensor  # (B,) V(s) then
    advantage: Tensor  # (B,)
    return_: Tensor  # (B,) what the critic should have said

    @property
    def joined(self) -> Samples:
        """With the steps of all sequences in a row, as the losses want them; the inputs stay."""
        if not self.inputs.state:
            return self
        rest = (leaf.flatten(0, 1) if leaf.ndim > 1 else leaf for leaf in self[1:])
        return Samples(self.inputs, *rest)


def samples_of(part: tuple[Any, ...]) -> Samples:
    """A part that `minibatches` gave, ready for a loss."""
    return Samples(Inputs(*part[0]), *part[1:]).joined


class ActorCritic(nn.Module):
    """A backbone with a policy head, and a critic on the same or another backbone.

    Of sequences in M L features come out in the same order: all steps of the first, then those of the second.
    """

    def __init__(
        self,
        backbone: Backbone,
        critic: Backbone | None,
        policy: PolicyHead,
        normalizer: ObsNormalizer | None = None,
        masked: bool = False,
    ) -> None:
        """Put a new value head on `critic`, or on the policy's own backbone; `masked`: observations hold a mask."""
        super().__init__()
        self.masked, self.normalizer = masked, normalizer
        self.backbone, self.critic = backbone, critic
        self.policy, self.value = policy, ValueHead((critic or backbone).features)
        self.memory = backbone.memory or (critic is not None and critic.memory)
        self._own = len(backbone.initial(1))  # tensors of the policy's memory

    def start(self, new: bool) -> None:
        """Orthogonal weights; `new`: of the backbones too, which were made for this agent."""
        for trunk in [trunk for trunk in (self.backbone, self.critic) if trunk is not None and new]:
            orthogonal(trunk, 2**0.5)
        orthogonal(self.policy, 0.01)
        orthogonal(self.value, 1.0)

    def initial(self, n: int) -> State:
        """What is remembered at first: of the policy, then of a critic of its own."""
        return self.backbone.initial(n) + (() if self.critic is None else self.critic.initial(n))

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Parameters of the policy (B, P) and values (B,)."""
        p, value, _ = self.step(inputs)
        return p, value

    def step(self, inputs: Inputs) -> tuple[Tensor, Tensor, State]:
        """The same, and what is remembered then."""
        obs, first, state = self.seen(inputs.obs), inputs.first, inputs.state
        features, after = _through(self.backbone, Inputs(obs, first, state[: self._own]))
        of_critic, also = features, ()
        if self.critic is not None:
            of_critic, also = _through(self.critic, Inputs(obs, first, state[self._own :]))
        return self.limited(self.policy(features), obs), self.value(of_critic), after + also

    def parameters_of(self, inputs: Inputs) -> Tensor:
        """The policy alone."""
        obs = self.seen(inputs.obs)
        own = Inputs(obs, inputs.first, inputs.state[: self._own])
        return self.limited(self.policy(_through(self.backbone, own)[0]), obs)

    def values_of(self, inputs: Inputs) -> Tensor:
        """The critic alone."""
        shared = self.critic is None
        state = inputs.state if shared else inputs.state[self._own :]
        own = Inputs(self.seen(inputs.obs), inputs.first, state)
        return self.value(_through(self.evaluates, own)[0])

    def limited(self, p: Tensor, obs: Any) -> Tensor:
        """Logits without the actions that the observation forbids."""
        return masked(p, obs[MASK].reshape(p.shape)) if self.masked else p

    @property
    def evaluates(self) -> Backbone:
        """The backbone below the value head."""
        return self.backbone if self.critic is None else self.critic

    def seen(self, obs: Any) -> Any:
        """Observations as the backbones get them."""
        return obs if self.normalizer is None else self.normalizer(obs)

    def quick(self) -> QuickActorCritic | None:
        """`forward`, `parameters_of` and `values_of` in numpy; None where a part has no such form."""
        trunk, head, value = self.backbone.quick(), self.policy.quick(), self.value.quick()
        critic = None if self.critic is None else self.critic.quick()
        if trunk is None or head is None or value is None or (critic is None) != (self.critic is None):
            return None
        if self.normalizer is not None:
            seen = self.normalizer.quick()
            trunk, critic = seen.then(trunk), None if critic is None else seen.then(critic)
        return QuickActorCritic(trunk, critic, head, value)


@dataclass(frozen=True)
class QuickActorCritic:
    """An `ActorCritic` in numpy, for at most `rows` observations (B, *S) at a time."""

    backbone: Quick
    critic: Quick | None
    policy: Quick
    value: Quick

    def forward(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `ActorCritic.forward`."""
        features = self.backbone(obs)
        return self.policy(features), self.value(features if self.critic is None else self.critic(obs))[:, 0]

    def parameters_of(self, obs: np.ndarray) -> np.ndarray:
        """See `ActorCritic.parameters_of`."""
        return self.policy(self.backbone(obs))

    def values_of(self, obs: np.ndarray) -> np.ndarray:
        """See `ActorCritic.values_of`."""
        return self.value((self.critic or self.backbone)(obs))[:, 0]

    @cached_property
    def rows(self) -> int:
        """As many as every part takes."""
        parts = (self.backbone, self.critic or self.backbone, self.policy, self.value)
        return min(part.rows for part in parts)


def _through(backbone: Backbone, inputs: Inputs) -> tuple[Tensor, State]:
    """Features (B, F) and the memory afterwards."""
    obs, first, state = inputs
    if not backbone.memory:
        return backbone(obs)
    if first.ndim == 1:
        return backbone(obs, state, first)
    # backbones want time first: (M, L, *S) -> (L, M, *S), and back
    features, state = backbone(mapped(lambda leaf: leaf.transpose(0, 1), obs), state, first.T)
    return features.transpose(0, 1).flatten(0, 1), state


def sequence(config: Any, model: ActorCritic, say: Callable[[str], None]) -> int:
    """Steps of one sequence that a net with memory learns from: by itself as many as divide both rollout and batch.

    Raises: UserError if `--sequence` does not, is more than a transformer sees, or there is no memory; if no number
    but 1 divides both.
    """
    rollout, batch, steps, reach = config.rollout, config.batch, config.sequence, model.backbone.reach
    if steps is None:
        most = math.gcd(rollout, batch)
        steps = max(n for n in range(1, most + 1) if most % n == 0 and n <= (reach or most))
        if model.memory and steps == 1 < rollout:
            raise UserError(
                f"nothing but 1 divides --rollout {rollout} and --batch {batch}: memory would not learn through time"
            )
        if model.memory:
            say(f"memory learns through {steps} steps at a time (--sequence)")
        return steps
    if not model.memory:
        raise UserError("--sequence has no effect without memory: it belongs to backbones that have one")
    fits(model.backbone, steps)
    if rollout % steps or batch % steps:
        raise UserError(f"--sequence {steps} must divide --rollout {rollout} and --batch {batch}")
    return steps


def rounds(config: Any, steps: int, num_envs: int) -> int:
    """Minibatches in so many steps over all environments, several passes over each rollout.

    Raises: UserError if they do not divide a rollout.
    """
    if config.rollout * num_envs % config.batch:
        size = f"--rollout {config.rollout} x --num-envs {num_envs}"
        raise UserError(f"--batch {config.batch} must divide a rollout: {size}")
    return steps * config.epochs // config.batch


def minibatches(parts: tuple[Any, ...], size: int, rng: np.random.Generator) -> Iterator[tuple[Any, ...]]:
    """Samples in a new order, `size` at a time; put in order once, so that each is a view.

    Shapes: every leaf (B, ...), or of sequences (M, L, ...), which stay whole.
    """
    last = parts[-1]
    order = torch.from_numpy(rng.permutation(len(last))).to(last.device)
    mixed = mapped(lambda leaf: leaf.index_select(0, order), tuple(parts))
    size //= last[0].numel()
    for start in range(0, len(last), size):
        yield mapped(lambda leaf, start=start: leaf[start : start + size], mixed)


def orthogonal(module: nn.Module, gain: float) -> None:
    """Orthogonal weights of every dense and convolutional layer, biases 0.

    Source: Saxe et al. 2014, arXiv 1312.6120; the gains are those of OpenAI Baselines' PPO.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            plain = torch.empty(layer.weight.shape)  # it cannot fill a weight that lies channels-last
            layer.weight.data.copy_(nn.init.orthogonal_(plain, gain))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class PolicyAgent(ABC):
    """An agent with a policy; below it are final classes only."""

    name: str
    Config: type[Any]
    loop = "on_policy"
    commits = False  # the action after a rollout is drawn by the weights that learned from it
    compares = False  # whether the loss needs the log-probabilities of when it acted
    backbones = tuple(backbones.BACKBONES)

    def __init__(
        self,
        config: Any = None,
        *,
        backbone: str | Backbone = "",
        net: dict[str, Any] | None = None,
        **knobs: Any,
    ) -> None:
        """With `config`, or the default changed by `knobs`, on a backbone and that backbone's knobs.

        Raises: UserError for an unknown knob or a value out of range.
        """
        self.config = configured(self.Config, config, knobs)
        self.backbone, self.net = backbone, net or {}
        self.updates, self.steps = 0, 0  # gradient steps, and agent steps learned from

    def build(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        compute: Compute,
        seed: np.random.SeedSequence,
        say: Callable[[str], None] = print,
    ) -> None:
        """See `Agent.build`."""
        config, self.compute, self._say = self.config, compute, say
        self.distribution = of_space(action_space, squash=config.squash)
        self._actions = int(action_space.n) if isinstance(action_space, spaces.Discrete) else 0
        weights, exploration, order = seed.spawn(3)
        self._rng, self._order = np.random.default_rng(exploration), np.random.default_rng(order)
        with torch.random.fork_rng(devices=[]):  # torch's initialisers take no generator
            torch.manual_seed(int(weights.generate_state(1, np.uint64)[0] >> 1))
            self.model = self._model(observation_space).to(compute.device)
        self._quick = self.model.quick() if compute.device == "cpu" else None
        self._actor = self.model
        if compute.precision == "bf16" and self._quick is None and not self.model.memory:
            # holds, in bf16, what autocast would cast the weights to each time
            self._actor = copy.deepcopy(self.model).requires_grad_(False)
            for trunk in (self._actor.backbone, self._actor.critic):
                if trunk is not None:
                    trunk.to(torch.bfloat16)
            self._actor.normalizer = self.model.normalizer  # which learns by itself
        self._reward = RewardScaler(config.gamma) if config.normalize_reward else None
        self._length = self.sequence
        # a critic of its own is asked when a rollout is whole: one pass costs less than one a step. Not for episodes,
        # which outlive the weights that they began with
        self._late = self.model.critic is not None and not self.model.memory and self._length > 0
        self._optimizers = self.prepare(say)

    def _model(self, space: spaces.Space[Any]) -> ActorCritic:
        config, name = self.config, self.backbone or backbones.default(space)
        trunk, critic = backbones.build(name, space, **self.net), None
        if config.separate:
            # an object is there once: the critic starts as a copy of it
            own = backbones.build(name, space, **self.net)
            critic = own if isinstance(name, str) else copy.deepcopy(own)
        normalizer = ObsNormalizer(space) if config.normalize_obs else None
        policy = PolicyHead(trunk.features, self.distribution, config.spread, config.log_std)
        model = ActorCritic(trunk, critic, policy, normalizer, is_masked(space) and self._actions > 0)
        if config.orthogonal:
            model.start(new=isinstance(name, str))  # a backbone that was given as an object keeps its weights
        return model

    @abstractmethod
    def prepare(self, say: Callable[[str], None]) -> dict[str, Optimizer]:
        """Make optimisers and graphs for `self.model`; the optimisers by their name in a checkpoint."""

    @abstractmethod
    def learn(self, samples: Samples) -> dict[str, Tensor]:
        """Improve policy and critic; returns metrics."""

    @property
    def sequence(self) -> int:
        """Steps of one sequence that a net with memory learns from."""
        return self.config.rollout

    def memory(self, like: Any) -> Rollouts:
        """What collects the steps of one update; observations look like `like` (N, *S)."""
        num_envs = rows(like)
        return Rollouts(self.config.rollout, like, self.initial(num_envs), self._length)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as one graph, if that is wanted; not with memory, whose work depends on where episodes end."""
        if not self.compute.compile or self.model.memory:
            return function
        return guarded_compile(function, self._say)

    def gradients(self, loss: Tensor, optimizer: Optimizer) -> Sequence[Tensor]:
        """Of what the optimizer moves; what memory begins with has none where no episode begins."""
        return torch.autograd.grad(loss, optimizer.parameters, materialize_grads=self.model.memory)

    def estimate(self, rollout: Rollout, reward: np.ndarray, next_value: np.ndarray) -> tuple[Any, Any]:
        """Advantages and the critic's targets, both (T, N): GAE, and R = A + V."""
        ended = rollout.terminated | rollout.truncated
        gamma, lam = self.config.gamma, self.config.lam
        advantage = returns.gae(reward, rollout.value, next_value, rollout.terminated, ended, gamma, lam)
        return advantage, advantage + rollout.value

    @property
    def skipped_in_row(self) -> int:
        """See `Agent.skipped_in_row`."""
        return int(max(optimizer.longest for optimizer in self._optimizers.values()))

    @property
    def skipped(self) -> Tensor:
        """Steps skipped in all, ()."""
        return torch.stack([optimizer.skipped for optimizer in self._optimizers.values()]).sum()

    @property
    def parameters(self) -> int:
        """Numbers that are learned."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def initial(self, n: int) -> State:
        """What is remembered before the first observation, as arrays."""
        return to_numpy(self.model.initial(n))

    def act(self, obs: Any, first: np.ndarray, state: State, step: int) -> Decision:
        """Draw from the policy."""
        noise = self.distribution.noise(self._rng, len(first))
        p, value, state = self._forward(obs, first, state, judge=not self._late)
        drawn, logp = self.distribution.draw(p, noise, logp=self.compares)
        return Decision(self.distribution.action(drawn), state, drawn, logp, None if self._late else value)

    def greedy(self, obs: Any, first: np.ndarray, state: State) -> Decision:
        """The most probable action; of a Gaussian that of its mean, also where tanh moves the mode elsewhere."""
        p, _, state = self._forward(obs, first, state, judge=not self._late)
        return Decision(self.distribution.action(self.distribution.mode(p)), state)

    def values(self, obs: Any, first: np.ndarray | None = None, state: State = ()) -> np.ndarray:
        """V(s) (N, 1) of numpy observations (N, *S)."""
        return self._values(obs, first, state)[:, None]

    def probabilities(self, obs: Any, first: np.ndarray | None = None, state: State = ()) -> np.ndarray:
        """What `act` draws from, (N, A); (N, 0) where actions are not numbered."""
        p = self._forward(obs, first, state, judge=not self._late)[0]
        return torch.from_numpy(p).softmax(1).numpy() if self._actions else p[:, :0]

    def schedule(self, step: int) -> dict[str, float]:
        """See `Agent.schedule`."""
        return {"train/lr": self._lr(step)}

    def update(self, batch: Rollout, steps: int = 1) -> Update:
        """Learn from a rollout."""
        samples = self.samples(batch)
        self.steps += samples.advantage.numel()
        metrics = {**self.learn(samples), "train/skipped": self.skipped}
        if self.model.normalizer is not None:
            self.model.normalizer.learn(batch.obs)
        copy_weights(self.model, self._actor)
        return Update(metrics, None)

    def samples(self, rollout: Rollout) -> Samples:
        """The rollout with its advantages and returns, on the device."""
        if not rollout.value.size:
            rollout = rollout._replace(value=self._values(joined(rollout.obs)).reshape(rollout.reward.shape))
        ended = rollout.terminated | rollout.truncated
        reward = np.sign(rollout.reward) if self.config.clip_reward else rollout.reward
        if self._reward is not None:
            reward = self._reward(reward, ended)
        cut = np.zeros(0, np.float32)
        if rollout.truncated.any():
            cut = self._values(rollout.cut_obs, None, rollout.cut_state)
        last = self._values(rollout.last_obs, None, rollout.last_state)
        next_value = returns.next_values(rollout.value, last, rollout.truncated, cut)
        advantage, return_ = self.estimate(rollout, reward, next_value)
        inputs = Inputs(rollout.obs)
        if self.model.memory:
            inputs = Inputs(rollout.obs, rollout.first, rollout.state)
        parts = (inputs, rollout.action, rollout.logp, rollout.value, advantage, return_)
        return self._in_sequences(parts) if self.model.memory else self._in_rows(parts)

    def _in_rows(self, parts: Any) -> Samples:
        """(T, N, ...) -> (B, ...), on the device."""
        return samples_of(to_device(joined(parts), self.compute.device))

    def _in_sequences(self, parts: Any) -> Samples:
        """(T, N, ...) -> (M, L, ...) with M = K N, the memory before each from (K, N, ...) to (M, ...)."""
        steps = self._length or len(parts[-1])  # 0: all of them

        def cut(leaf: np.ndarray) -> np.ndarray:
            if not leaf.size:
                return leaf.reshape(-1)
            # (T, N, ...) -> (K, L, N, ...) -> (K, N, L, ...) -> (M, L, ...)
            apart = leaf.reshape(-1, steps, *leaf.shape[1:]).swapaxes(1, 2)
            return apart.reshape(-1, *apart.shape[2:])

        (obs, first, state), *rest = parts
        inputs = (mapped(cut, obs), cut(first), joined(state))
        shown, *others = to_device((inputs, *map(cut, rest)), self.compute.device)
        return Samples(Inputs(*shown), *others)

    def _values(self, obs: Any, first: np.ndarray | None = None, state: State = ()) -> np.ndarray:
        """V(s) (B,) of observations (B, *S), some at a time."""
        count, found = rows(obs), []
        if self._quick is not None and count <= self._quick.rows:
            return self._quick.values_of(obs)
        if first is None:
            first = self._no_first(obs)
        with self.compute.acting():
            for start in range(0, count, PORTION):
                part = mapped(lambda leaf, start=start: leaf[start : start + PORTION], (obs, first, state))
                inputs = Inputs(*to_device(part, self.compute.device))
                found.append(to_numpy(self._actor.values_of(inputs)))
        return np.concatenate(found)

    def _forward(
        self, obs: Any, first: np.ndarray | None, state: State, judge: bool = True
    ) -> tuple[np.ndarray, np.ndarray, State]:
        """Parameters (N, P) and values (N,) of observations (N, *S), and the memory after them; all of it arrays.

        Without `judge`, which is for nets without memory, no critic is asked and the values are (0,).
        """
        value, quick = NOTHING, self._quick
        if quick is not None and len(obs) <= quick.rows:
            if judge:
                p, value = quick.forward(obs)
            else:
                p = quick.parameters_of(obs)
        else:
            shown = (obs, self._no_first(obs) if first is None else first, state)
            inputs = Inputs(*to_device(shown, self.compute.device))
            with self.compute.acting():
                if judge:
                    p, value, state = to_numpy(self._actor.step(inputs))
                else:
                    p = to_numpy(self._actor.parameters_of(inputs))
        if not np.isfinite(p).all():
            raise RunFailed(self._diagnosis())
        return p, value, state

    def _no_first(self, obs: Any) -> Any:
        """That no episode begins at these observations, as nets with memory are told."""
        return np.zeros(rows(obs), bool) if self.model.memory else ()

    def _diagnosis(self) -> str:
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"the policy's output is not finite: {name} holds NaN or infinity. A smaller --lr may help"
        return "the policy's output is not finite though its weights are: observations may be too large"

    def _lr(self, step: int) -> float:
        config = self.config
        return config.lr if config.lr_end is None else linear(config.lr, config.lr_end, config.lr_steps, step)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """See `Agent.state_dict`."""
        counters = {
            "updates": self.updates,
            "learned": self.steps,
            "exploration": self._rng.bit_generator.state,
            "order": self._order.bit_generator.state,
        }
        kept = {"weights": dict(self.model.state_dict()), "counters": counters}
        if self._reward is not None:
            kept["rewards"] = self._reward.state_dict()
        return kept | {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """See `Agent.load_weights`."""
        self.model.load_state_dict(weights)
        copy_weights(self.model, self._actor)

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """See `Agent.load_state_dict`."""
        self.load_weights(state["weights"])
        counters = state["counters"]
        self.updates, self.steps = counters["updates"], counters["learned"]
        self._rng.bit_generator.state = counters["exploration"]
        self._order.bit_generator.state = counters["order"]
        if self._reward is not None:
            self._reward.load_state_dict(state["rewards"])
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state[name])
