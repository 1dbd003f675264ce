"""The training loss."""

from __future__ import annotations

import math

import pytest
import torch

from mipnerf_fast import losses


def test_squared_error_is_three_times_the_mean() -> None:
    rgb, target = torch.rand(7, 3), torch.rand(7, 3)
    got = losses.weighted_loss(rgb, target, torch.ones(7, 1))
    torch.testing.assert_close(got, 3 * ((rgb - target) ** 2).mean())


def test_area_weights() -> None:
    rgb, target = torch.tensor([[1.0, 0, 0], [0, 0, 0]]), torch.tensor([[0.0, 0, 0], [0, 2, 0]])
    weights = torch.tensor([[4.0], [16.0]])
    assert losses.weighted_loss(rgb, target, weights).item() == pytest.approx((4 * 1 + 16 * 4) / 20)


def test_chunks_add_up_to_the_batch() -> None:
    rgb, target, weights = (
        torch.rand(9, 3).double(),
        torch.rand(9, 3).double(),
        4.0 ** torch.arange(9.0)[:, None],
    )
    whole = losses.weighted_loss(rgb, target, weights)
    parts = sum(
        losses.weighted_loss(rgb[k], target[k], weights[k], total_lossmult=weights.sum())
        for k in (slice(0, 4), slice(4, 9))
    )
    torch.testing.assert_close(parts, whole)


def test_smooth_l1_at_beta_one_is_half_the_squared_error_on_colours() -> None:
    error = torch.linspace(-1, 1, 101)
    torch.testing.assert_close(losses.penalty(error, "smooth_l1", 1.0), error**2 / 2)


@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0])
def test_robust_penalties_are_quadratic_inside_and_linear_outside(beta: float) -> None:
    small, large = torch.tensor(beta * 1e-3).double(), torch.tensor(beta * 1e3).double()
    for kind in ("smooth_l1", "charbonnier"):
        assert losses.penalty(small, kind, beta).item() == pytest.approx(
            small.item() ** 2 / (2 * beta), rel=1e-5
        )
        assert losses.penalty(large, kind, beta).item() == pytest.approx(large.item(), rel=2e-3)
    torch.testing.assert_close(
        losses.penalty(torch.linspace(-2, 2, 41), "smooth_l1", beta),
        torch.nn.functional.smooth_l1_loss(
            torch.linspace(-2, 2, 41), torch.zeros(41), reduction="none", beta=beta
        ),
    )
    assert losses.penalty(torch.tensor(0.0), "charbonnier", beta).item() == 0


def test_bad_choices_are_named() -> None:
    with pytest.raises(ValueError, match=r"huber.*mse, smooth_l1, charbonnier"):
        losses.penalty(torch.zeros(1), "huber")
    with pytest.raises(ValueError, match=r"beta must be positive, got -3\.14"):
        losses.penalty(torch.zeros(1), "smooth_l1", -math.pi)
