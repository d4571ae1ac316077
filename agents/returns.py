"""Returns and advantages of rollouts: pure functions of arrays.

Shapes: everything (T, N), or (T,), in order of time. `terminated` says that nothing follows a step (no bootstrap),
`ended` (terminated or truncated) that the next step belongs to another episode (no trace). `next_value` is the value
of the true successor, also where the next row starts another episode: see `next_values`.
"""

from __future__ import annotations

import numpy as np


def next_values(value: np.ndarray, last: np.ndarray, truncated: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """V(s') of each step: that of the next row, `last` (N,) after the last one, and `cut` (C,) where it was truncated.

    Shapes: value, truncated (T, N); cut in the order of np.nonzero(truncated) -> (T, N).
    """
    following = np.concatenate([value[1:], last[None]])
    following[truncated] = cut
    return following


def gae(
    reward: np.ndarray,
    value: np.ndarray,
    next_value: np.ndarray,
    terminated: np.ndarray,
    ended: np.ndarray,
    gamma: float,
    lam: float,
) -> np.ndarray:
    """Generalised advantages: A_t = delta_t + gamma lam (1 - ended_t) A_{t+1},
    delta_t = r_t + gamma (1 - terminated_t) V(s_t') - V(s_t).

    Source: Schulman et al. 2016, arXiv 1506.02438, eq. 11 and 16.
    """
    delta = reward + gamma * np.where(terminated, 0, next_value).astype(value.dtype) - value
    trace = (gamma * lam * ~ended).astype(value.dtype)
    following = np.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        following = delta[t] = delta[t] + trace[t] * following
    return delta


def discounted(
    reward: np.ndarray, next_value: np.ndarray, terminated: np.ndarray, ended: np.ndarray, gamma: float
) -> np.ndarray:
    """Returns: G_t = r_t + gamma G_{t+1}, with V(s_t') for G_{t+1} where the episode was cut, 0 where it terminated.

    Source: Sutton and Barto 2018, eq. 3.9; the last row counts as cut.
    """
    follows = np.where(terminated, 0, next_value).astype(reward.dtype)
    result = np.empty_like(reward)
    following = follows[-1]
    for t in range(len(reward) - 1, -1, -1):
        following = result[t] = reward[t] + gamma * np.where(ended[t], follows[t], following)
    return result


def lambda_returns(
    reward: np.ndarray,
    discount: np.ndarray,
    next_value: np.ndarray,
    lam: float,
    ended: np.ndarray | None = None,
) -> np.ndarray:
    """G_t = r_t + discount_t ((1 - lam) V(s_t') + lam G_{t+1}), with V(s_t') for G_{t+1} where the episode ended.

    discount = gamma (1 - terminated); the last row counts as ended. GAE is this minus V(s_t).
    Source: Sutton and Barto 2018, eq. 12.18.
    """
    result, following = np.empty_like(reward), next_value[-1]
    for t in range(len(reward) - 1, -1, -1):
        if ended is not None:
            following = np.where(ended[t], next_value[t], following)
        following = result[t] = reward[t] + discount[t] * ((1 - lam) * next_value[t] + lam * following)
    return result
