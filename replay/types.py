"""The types that cross the rooms. Sizes: T time, N envs, B batch, S observation shape, A action shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # envs fill Transitions without paying for the import of torch
    from torch import Tensor


class Transition(NamedTuple):
    """One step of N environments, as the world gave it.

    `next_obs` is the true successor, never the observation after a reset. Rewards are unclipped. `terminated` means
    that no reward can follow (bootstrap with zero), `truncated` that the episode was cut from outside (bootstrap with
    the value of `next_obs`). `first` marks observations that follow a reset.
    """

    obs: np.ndarray  # (N, *S)
    action: np.ndarray  # (N, *A)
    reward: np.ndarray  # (N,) float32
    next_obs: np.ndarray  # (N, *S)
    terminated: np.ndarray  # (N,) bool
    truncated: np.ndarray  # (N,) bool
    first: np.ndarray  # (N,) bool


class Batch(NamedTuple):
    """B samples to learn from; everything a loss needs to know about time is in `reward` and `discount`."""

    obs: Tensor  # (B, *S)
    action: Tensor  # (B, *A)
    reward: Tensor  # (B,) sum of gamma^i r_i over the k <= n steps really summed
    next_obs: Tensor  # (B, *S), k steps later
    discount: Tensor  # (B,) gamma^k * (1 - terminated)
    weight: Tensor  # (B,) importance weight, 1 for uniform sampling
    index: Tensor  # (B,) where the samples lie, for update_priority


class Sequences(NamedTuple):
    """B runs of T consecutive steps to learn from, for nets with memory.

    The steps are burn_in + L + n: L of them are learned, those before bring the memory up to date, and the n behind
    are successors. Where an episode ends its last observation is a step of its own, at which nothing was done.
    """

    obs: Tensor  # (T, B, *S)
    first: Tensor  # (T, B) bool, where an episode begins: the memory is reset before
    state: tuple[Tensor, ...]  # (B, ...) what was remembered before the first step
    action: Tensor  # (L, B, *A)
    reward: Tensor  # (L, B) sum of gamma^i r_i over the k <= n steps really summed
    successor: Tensor  # (L, B) int64, the step in [0, T) that comes k later
    discount: Tensor  # (L, B) gamma^k * (1 - terminated)
    acted: Tensor  # (L, B) bool; False where nothing was done
    weight: Tensor  # (B,) importance weight, 1 for uniform sampling
    index: Tensor  # (B,) where the sequences lie, for update_priority


class Five(NamedTuple):
    """One step of N environments and what is done after it, (s, a, r, s', a'): what SARSA learns from."""

    obs: np.ndarray  # (N, *S)
    action: np.ndarray  # (N, *A)
    reward: np.ndarray  # (N,)
    next_obs: np.ndarray  # (N, *S), the true successor
    terminated: np.ndarray  # (N,) bool
    next_action: (
        np.ndarray
    )  # (N, *A), taken in next_obs; where the episode was cut there, drawn by the policy


class Update(NamedTuple):
    """What gradient steps report: scalars of the last one by name, and new priorities if the replay wants them."""

    metrics: dict[str, Tensor]
    priority: Tensor | None  # (B,)


class Decision(NamedTuple):
    """What an agent decided for N environments, and the memory it carries to the next step."""

    action: Any  # (N, *A), as the environment takes it; a dict or tuple of such in Dict and Tuple spaces
    state: tuple[Any, ...]  # (N, ...) after this observation; () for agents without memory
    sample: np.ndarray | None = None  # (N, K) float32: what the policy drew, before it became the action
    logp: np.ndarray | None = None  # (N,) its log-probability
    value: np.ndarray | None = None  # (N,) what the critic expects


class Rollout(NamedTuple):
    """T steps of N environments in order, as they were acted.

    `terminated` cuts the bootstrap, `terminated | truncated` the trace. Observations stand here once: the successor of
    step t is that of step t + 1, or for the last one `last_obs`; only where an episode was truncated the successor is
    in `cut_obs`.
    """

    obs: Any  # (T, N, *S)
    action: np.ndarray  # (T, N, K) what a policy drew; (T, N, *A) actions of agents that draw from none
    reward: np.ndarray  # (T, N) float32, unclipped
    terminated: np.ndarray  # (T, N) bool
    truncated: np.ndarray  # (T, N) bool, False where terminated
    first: np.ndarray  # (T, N) bool
    logp: np.ndarray  # (T, N), or (T, 0) if nobody asked
    value: np.ndarray  # (T, N), or (T, 0)
    cut_obs: Any  # (C, *S) true successors of the truncated steps, in the order of np.nonzero(truncated)
    last_obs: Any  # (N, *S) what is seen after the last step
    last: Decision  # there, of agents that commit to it; else the one before
    # of agents with memory, else (): what they remembered
    state: tuple[Any, ...] = ()  # (K, N, ...) before every k-th step, the first among them
    cut_state: tuple[Any, ...] = ()  # (C, ...) before cut_obs was seen
    last_state: tuple[Any, ...] = ()  # (N, ...) before last_obs was seen
