"""Heads: features -> the parameters of a decision."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class QHead(nn.Module):
    """Action values, one linear layer.

    Computed in fp32 also under autocast: bf16 has three digits, less than the differences between actions need.
    Shapes: features (B, F) -> q (B, A).
    """

    def __init__(self, features: int, actions: int) -> None:
        """One linear layer."""
        super().__init__()
        self.q = nn.Linear(features, actions)

    def forward(self, features: Tensor) -> Tensor:
        """Values of all actions."""
        if not torch.is_autocast_enabled(features.device.type):
            return self.q(features.float())
        with torch.autocast(features.device.type, enabled=False):
            return self.q(features.float())
