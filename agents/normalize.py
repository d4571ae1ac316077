"""Observations brought to mean 0 and spread 1, rewards to size 1, by statistics that are learned with the policy.

Both learn once per rollout, so that nothing has to be done per step: of observations after the update, so that what
acted and what learns see the same numbers; of rewards before they are scaled. The statistics of observations are
buffers of the net, saved with its weights and still when it is evaluated.

Source: running moments, Chan et al. 1979; as in OpenAI Baselines' VecNormalize.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from backbones.dense import MOST, Quick
from runs.config import UserError

CLIP, EPSILON = 10.0, 1e-8


def merged(
    mean: np.ndarray, var: np.ndarray, count: float, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean, variance and count of `count` rows with this mean and variance, and the new `rows` (B, D) together.

    Source: Chan et al. 1979, eq. 1.5.
    """
    new, total = rows.mean(0, np.float64), count + len(rows)
    delta = new - mean
    squares = var * count + rows.var(0, np.float64) * len(rows) + delta**2 * (count * len(rows) / total)
    return mean + delta * (len(rows) / total), squares / total, total


class ObsNormalizer(nn.Module):
    """x -> (x - mean) / spread within +-10, for vectors. Shapes: (B, D) or (T, B, D) -> the same, float32."""

    mean: Tensor  # (D,) float64
    var: Tensor
    count: Tensor  # ()
    shift: Tensor  # (D,) float32, the mean again
    scale: Tensor  # 1 / spread

    def __init__(self, space: spaces.Space[Any]) -> None:
        """Start as the identity within +-10. Raises: UserError for anything but vectors."""
        super().__init__()
        if not isinstance(space, spaces.Box) or len(space.shape) != 1 or space.dtype is None:
            raise UserError(f"--normalize-obs works on vectors, observations here are {space}")
        size = space.shape[0]
        for name, start in (("mean", torch.zeros), ("var", torch.ones)):
            self.register_buffer(name, start(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, obs: Tensor) -> Tensor:
        """Normalised observations."""
        return ((obs.float() - self.shift) * self.scale).clamp(-CLIP, CLIP)

    def quick(self) -> Quick:
        """The same in numpy."""
        shift, scale = self.shift.numpy(), self.scale.numpy()

        def run(x: np.ndarray) -> np.ndarray:  # float32 first, as in `forward`
            return np.clip((x.astype(np.float32, copy=False) - shift) * scale, -CLIP, CLIP)

        return Quick((run,), MOST)

    @torch.no_grad()
    def learn(self, obs: np.ndarray) -> None:
        """Take in the observations (T, N, D) of a rollout."""
        rows = obs.reshape(-1, obs.shape[-1])
        mean, var, count = merged(self.mean.cpu().numpy(), self.var.cpu().numpy(), float(self.count), rows)
        self.mean.copy_(torch.from_numpy(mean))
        self.var.copy_(torch.from_numpy(var))
        self.count.fill_(count)
        self.shift.copy_(self.mean)
        self.scale.copy_((self.var + EPSILON).rsqrt())


class RewardScaler:
    """r -> r / spread of the discounted return so far, within +-10; the mean stays.

    R_t = gamma R_{t-1} + r_t runs along each environment, and starts anew with each episode.
    """

    def __init__(self, gamma: float) -> None:
        """No return yet."""
        self.gamma = gamma
        self.mean, self.var, self.count = np.zeros(1), np.ones(1), 0.0
        self._running: np.ndarray | None = None  # (N,)

    def __call__(self, reward: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Take in the rewards (T, N) of a rollout and where episodes ended, and scale them."""
        running = np.zeros(reward.shape[1]) if self._running is None else self._running
        seen = np.empty(reward.shape, np.float64)
        for t in range(len(reward)):
            seen[t] = running = running * self.gamma + reward[t]
            running = np.where(ended[t], 0.0, running)
        self._running = running
        self.mean, self.var, self.count = merged(self.mean, self.var, self.count, seen.reshape(-1, 1))
        scale = 1 / np.sqrt(self.var[0] + EPSILON)
        return np.clip(reward * scale, -CLIP, CLIP).astype(np.float32)

    def state_dict(self) -> dict[str, Tensor]:
        """The statistics, and where the returns stand."""
        kept = {"mean": self.mean, "var": self.var, "count": np.array(self.count)}
        kept |= {} if self._running is None else {"running": self._running}
        return {name: torch.from_numpy(np.array(value)) for name, value in kept.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.mean, self.var = state["mean"].numpy().copy(), state["var"].numpy().copy()
        self.count = float(state["count"])
        self._running = state["running"].numpy().copy() if "running" in state else None
