"""What the policy-gradient agents share: a policy with a critic, acting, and a rollout made ready to learn from.

An agent on top of it adds the loss. Data flow of one update:

    rollout (T, N) -> rewards clipped, scaled -> next values -> advantages, returns -> Samples (B = T N) -> loss
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

import backbones
from agents import returns
from agents.base import State, linear
from agents.distributions import Categorical, Distribution, masked, of_space
from agents.heads import SPREADS, PolicyHead, ValueHead
from agents.normalize import ObsNormalizer, RewardScaler
from agents.optimizers import Optimizer
from backbones.base import Backbone
from backbones.compute import Compute, copy_weights, to_device
from envs.mask import MASK, is_masked
from replay import Decision, Rollout, Rollouts, Update
from replay.tree import mapped
from runs.config import Knob, RunFailed, UserError, check


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
        if self.lr_end is None and self.lr_steps != type(self).lr_steps:
            raise UserError("--lr-steps has no effect without --lr-end")


class Samples(NamedTuple):
    """A rollout to learn from, its T N steps in a row."""

    obs: Any  # (B, *S)
    action: Tensor  # (B, K) what the policy drew
    logp: Tensor  # (B,) then, or (0,) if nobody compares
    value: Tensor  # (B,) V(s) then
    advantage: Tensor  # (B,)
    return_: Tensor  # (B,) what the critic should have said


class ActorCritic(nn.Module):
    """A backbone with a policy head, and a critic on the same or another backbone."""

    def __init__(
        self,
        backbone: Backbone,
        critic: Backbone | None,
        distribution: Distribution,
        config: ActorConfig,
        space: spaces.Space[Any],
        actions: spaces.Space[Any],
        new: bool = True,
    ) -> None:
        """Put new heads on the backbones for observations of a space; `critic` None: it shares that of the policy.

        `new`: the backbones were made for this agent, and may be given other weights.
        """
        super().__init__()
        self.masked = is_masked(space) and isinstance(actions, spaces.Discrete)
        self.normalizer = ObsNormalizer(space) if config.normalize_obs else None
        self.backbone, self.critic = backbone, critic
        self.policy = PolicyHead(backbone.features, distribution, config.spread, config.log_std)
        self.value = ValueHead((critic or backbone).features)
        if config.orthogonal:
            for trunk in [trunk for trunk in (backbone, critic) if trunk is not None and new]:
                orthogonal(trunk, 2**0.5)
            orthogonal(self.policy, 0.01)
            orthogonal(self.value, 1.0)

    def forward(self, obs: Any) -> tuple[Tensor, Tensor]:
        """Parameters of the policy (B, P) and values (B,) of obs (B, *S)."""
        obs = self.seen(obs)
        features = self.backbone(obs)[0]
        of_critic = features if self.critic is None else self.critic(obs)[0]
        return self.limited(self.policy(features), obs), self.value(of_critic)

    def parameters_of(self, obs: Any) -> Tensor:
        """The policy alone."""
        obs = self.seen(obs)
        return self.limited(self.policy(self.backbone(obs)[0]), obs)

    def limited(self, p: Tensor, obs: Any) -> Tensor:
        """Logits without the actions that the observation forbids."""
        return masked(p, obs[MASK]) if self.masked else p

    def values_of(self, obs: Any) -> Tensor:
        """The critic alone."""
        return self.value(self.evaluates(self.seen(obs))[0])

    @property
    def evaluates(self) -> Backbone:
        """The backbone below the value head."""
        return self.backbone if self.critic is None else self.critic

    def seen(self, obs: Any) -> Any:
        """Observations as the backbones get them."""
        return obs if self.normalizer is None else self.normalizer(obs)

    def quick(self) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None:
        """`forward` in numpy for at most `rows` observations, where all parts have that form."""
        trunk, head, value = self.backbone.quick(), self.policy.quick(), self.value.quick()
        critic = trunk if self.critic is None else self.critic.quick()
        if trunk is None or head is None or value is None or critic is None:
            return None
        shared = self.critic is None

        def run(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            x = obs if seen is None else seen(obs)
            features = trunk(x)
            return head(features), value(features if shared else critic(x))[:, 0]

        seen = None if self.normalizer is None else self.normalizer.quick()
        self.rows = min(part.rows for part in (trunk, critic, head, value))
        return run

    rows = 0  # of `quick`


def rounds(config: Any, steps: int, num_envs: int) -> int:
    """Minibatches in so many steps over all environments, several passes over each rollout.

    Raises: UserError if they do not divide a rollout.
    """
    if config.rollout * num_envs % config.batch:
        size = f"--rollout {config.rollout} x --num-envs {num_envs}"
        raise UserError(f"--batch {config.batch} must divide a rollout: {size}")
    return steps * config.epochs // config.batch


def minibatches(parts: tuple[Any, ...], size: int, rng: np.random.Generator) -> Iterator[tuple[Any, ...]]:
    """Samples (B, ...) in a new order, `size` at a time; put in order once, so that each is a view."""
    count = len(parts[-1])
    order = torch.from_numpy(rng.permutation(count)).to(parts[-1].device)
    mixed = mapped(lambda leaf: leaf.index_select(0, order), tuple(parts))
    for start in range(0, count, size):
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
        check(self.Config, knobs)
        self.config = replace(config or self.Config(), **knobs)
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
        weights, exploration, order = seed.spawn(3)
        self._rng, self._order = np.random.default_rng(exploration), np.random.default_rng(order)
        with torch.random.fork_rng(devices=[]):  # torch's initialisers take no generator
            torch.manual_seed(int(weights.generate_state(1, np.uint64)[0] >> 1))
            name = self.backbone or backbones.default(observation_space)
            trunk = backbones.build(name, observation_space, **self.net)
            critic = None
            if config.separate:
                # an object is there once: the critic starts as a copy of it
                own = backbones.build(name, observation_space, **self.net)
                critic = own if isinstance(name, str) else copy.deepcopy(own)
            # a backbone that was given as an object keeps its weights
            parts = (
                trunk,
                critic,
                self.distribution,
                config,
                observation_space,
                action_space,
                isinstance(name, str),
            )
            self.model = ActorCritic(*parts).to(compute.device)
        self._quick = self.model.quick() if compute.device == "cpu" else None
        self._actor = self.model
        if compute.precision == "bf16" and self._quick is None:
            # holds, in bf16, what autocast would cast the weights to each time
            self._actor = copy.deepcopy(self.model).requires_grad_(False)
            for trunk in (self._actor.backbone, self._actor.critic):
                if trunk is not None:
                    trunk.to(torch.bfloat16)
        self._reward = RewardScaler(config.gamma) if config.normalize_reward else None
        self._optimizers = self.prepare(say)

    @abstractmethod
    def prepare(self, say: Callable[[str], None]) -> dict[str, Optimizer]:
        """Make optimisers and graphs for `self.model`; the optimisers by their name in a checkpoint."""

    @abstractmethod
    def learn(self, samples: Samples) -> dict[str, Tensor]:
        """Improve policy and critic; returns metrics."""

    def memory(self, like: Any) -> Rollouts:
        """What collects the steps of one update; observations look like `like` (N, *S)."""
        return Rollouts(self.config.rollout, like)

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
        """No memory."""
        return ()

    def act(self, obs: Any, first: np.ndarray, state: State, step: int) -> Decision:
        """Draw from the policy."""
        noise = self.distribution.noise(self._rng, len(first))
        p, value = self._forward(obs)
        with torch.inference_mode():
            sample = self.distribution.sample(p, torch.from_numpy(noise))
            logp = self.distribution.log_prob(p, sample).numpy() if self.compares else None
        drawn = sample.numpy()
        return Decision(self.distribution.action(drawn), state, drawn, logp, value)

    def greedy(self, obs: Any, first: np.ndarray, state: State) -> Decision:
        """The most probable action; of a Gaussian that of its mean, also where tanh moves the mode elsewhere."""
        p, _ = self._forward(obs)
        return Decision(self.distribution.action(self.distribution.mode(p).numpy()), state)

    def values(self, obs: Any) -> np.ndarray:
        """V(s) (N, 1) of numpy observations (N, *S)."""
        return self._forward(obs)[1][:, None]

    def probabilities(self, obs: Any) -> np.ndarray:
        """What `act` draws from, (N, A); (N, 0) where actions are not numbered."""
        p, _ = self._forward(obs)
        if isinstance(self.distribution, Categorical):
            return p.softmax(1).numpy()
        return np.zeros((len(p), 0), np.float32)

    def schedule(self, step: int) -> dict[str, float]:
        """See `Agent.schedule`."""
        return {"train/lr": self._lr(step)}

    def update(self, batch: Rollout, steps: int = 1) -> Update:
        """Learn from a rollout."""
        samples = self.samples(batch)
        self.steps += len(samples.advantage)
        metrics = {**self.learn(samples), "train/skipped": self.skipped}
        if self.model.normalizer is not None:
            self.model.normalizer.learn(batch.obs)
        copy_weights(self.model, self._actor)
        return Update(metrics, None)

    def samples(self, rollout: Rollout) -> Samples:
        """The rollout with its advantages and returns, on the device."""
        ended = rollout.terminated | rollout.truncated
        reward = np.sign(rollout.reward) if self.config.clip_reward else rollout.reward
        if self._reward is not None:
            reward = self._reward(reward, ended)
        cut = self._forward(rollout.cut_obs)[1] if rollout.truncated.any() else np.zeros(0, np.float32)
        last = self._forward(rollout.last_obs)[1]
        next_value = returns.next_values(rollout.value, last, rollout.truncated, cut)
        advantage, return_ = self.estimate(rollout, reward, next_value)
        flat = [
            mapped(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), part)
            for part in (rollout.obs, rollout.action, rollout.logp, rollout.value, advantage, return_)
        ]
        return Samples(*(to_device(part, self.compute.device) for part in flat))

    def _forward(self, obs: Any) -> tuple[Tensor, np.ndarray]:
        """Parameters (N, P) on the CPU and values (N,) of numpy observations (N, *S)."""
        if self._quick is not None and len(obs) <= self.model.rows:
            numbers, value = self._quick(obs)
            p = torch.from_numpy(numbers)
        else:
            with self.compute.acting():
                p, value = (part.cpu() for part in self._actor(to_device(obs, self.compute.device)))
                numbers, value = p.numpy(), value.numpy()
        if not np.isfinite(numbers).all():
            raise RunFailed(self._diagnosis())
        return p, value

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
