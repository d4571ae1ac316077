"""Numbers that rlax publishes for its loss functions (github.com/google-deepmind/rlax, value_learning_test.py)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from agents.dqn import c51_target, pick, q_target, quantile_loss, td_loss

ACTION = torch.tensor([0, 1])
Q = torch.tensor([[1.0, 1.0, 0.0], [1.0, 2.0, 0.0]])
REWARD, DISCOUNT = torch.ones(2), torch.tensor([0.0, 1.0])
ONES = torch.ones(2)


def test_q_learning() -> None:
    later = torch.tensor([[0.0, 1.0, 0.0], [1.0, 2.0, 0.0]])
    target = q_target(REWARD, DISCOUNT, later, later)
    assert td_loss(Q, ACTION, target, ONES, huber=False)[1].tolist() == [0.0, 1.0]


def test_double_q_learning() -> None:
    value = torch.tensor([[99.0, 1.0, 98.0], [91.0, 2.0, 66.0]])
    selector = torch.tensor([[2.0, 10.0, 1.0], [11.0, 20.0, 1.0]])
    target = q_target(REWARD, DISCOUNT, value, selector)
    assert td_loss(Q, ACTION, target, ONES, huber=False)[1].tolist() == [0.0, 1.0]


# -- categorical -----------------------------------------------------------------------------------------------------

ATOMS = torch.tensor([0.5, 1.0, 1.5])
BEFORE = torch.tensor(
    [
        [[1, 1, 1], [0, 9, 9], [0, 9, 0], [0, 0, 0]],
        [[9, 9, 0], [9, 0, 9], [0, 0, 0], [9, -9, 0]],
        [[1, 1, 1], [0, 9, 9], [0, 0, 0], [0, 9, 0]],
        [[9, 9, 0], [9, 0, 9], [0, 0, 0], [9, -9, 0]],
        [[9, 9, 0], [9, 0, 9], [0, 0, 0], [9, -9, 0]],
    ]
).float()
AFTER = torch.tensor(
    [
        [[1, 1, 1], [9, 0, 9], [1, 0, 0], [0, 0, 9]],
        [[9, 9, 0], [9, 0, 0], [1, 1, 1], [9, -9, 0]],
        [[1, 1, 1], [9, 0, 9], [0, 0, 9], [1, 0, 0]],
        [[9, 9, 0], [9, 0, 0], [1, 1, 1], [9, -9, 0]],
        [[9, 9, 0], [9, 0, 0], [0, 9, 9], [9, -9, 0]],
    ]
).float()
TAKEN = torch.tensor([2, 1, 3, 0, 1])
REWARDS = torch.tensor([0.5, 0.0, 0.5, 0.8, -0.1])
DISCOUNTS = torch.tensor([0.8, 1.0, 0.8, 0.0, 1.0])


def cross_entropy(selector: Tensor) -> np.ndarray:
    after = pick(AFTER, selector.argmax(1)).softmax(1)
    goal = c51_target(REWARDS, DISCOUNTS, after, ATOMS)
    return -(goal * pick(BEFORE, TAKEN).log_softmax(1)).sum(1).numpy()


def test_categorical_q_learning() -> None:
    mean = (AFTER.softmax(2) * ATOMS).sum(2)
    expected = [8.998915, 3.6932087, 8.998915, 0.69320893, 5.1929307]
    np.testing.assert_allclose(cross_entropy(mean), expected, rtol=1e-4)


def test_categorical_double_q_learning() -> None:
    selector = torch.tensor([[1, 0, 0, 9], [9, 0, 1, 1], [1, 9, 1, 1], [0, 1, 0, 9], [1, 1, 1, 9]])
    expected = [8.998915, 5.192931, 5.400247, 0.693209, 0.693431]
    np.testing.assert_allclose(cross_entropy(selector), expected, rtol=1e-4)


# -- quantiles -------------------------------------------------------------------------------------------------------


def test_quantile_regression_loss() -> None:
    theta = torch.tensor([[-1.0, 3.0], [-1.0, 3.0]])
    tau = torch.tensor([[0.2, 0.7], [0.0, 0.4]])
    target = torch.tensor([[-3.0, 4.0, 2.0], [-3.0, 4.0, 2.0]])
    np.testing.assert_allclose(quantile_loss(theta, tau, target, threshold=2.0), [2.5, 8.5 / 3], rtol=3e-7)
