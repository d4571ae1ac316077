"""Heads: features -> the parameters of a decision."""

from __future__ import annotations

from torch import Tensor, nn


class QHead(nn.Module):
    """Action values, one linear layer.

    Shapes: features (B, F) -> q (B, A), fp32.
    """

    def __init__(self, features: int, actions: int) -> None:
        """One linear layer."""
        super().__init__()
        self.q = nn.Linear(features, actions)

    def forward(self, features: Tensor) -> Tensor:
        """Values of all actions."""
        return self.q(features).float()
