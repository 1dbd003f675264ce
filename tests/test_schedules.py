"""The learning-rate schedule; the official values are in test_official.py."""

from __future__ import annotations

import pytest
import torch

from mipnerf_fast import schedules

PAPER = (5e-4, 5e-6, 1_000_000, 2500, 0.01)


def test_ends_and_middle() -> None:
    assert schedules.learning_rate(0, *PAPER) == pytest.approx(5e-6)
    assert schedules.learning_rate(1_000_000, *PAPER) == pytest.approx(5e-6)
    assert schedules.learning_rate(2_000_000, *PAPER) == pytest.approx(5e-6)
    assert schedules.learning_rate(500_000, *PAPER) == pytest.approx((5e-4 * 5e-6) ** 0.5)
    assert schedules.learning_rate(10, 1e-3, 1e-3, 100) == pytest.approx(1e-3)


@pytest.mark.parametrize("step", [0, 1, 100, 2500, 2501, 400_000, 1_000_000, 1_500_000])
def test_tensor_steps_agree(step: int) -> None:
    want = schedules.learning_rate(step, *PAPER)
    got = schedules.learning_rate(torch.tensor(step, dtype=torch.float64), *PAPER)
    assert isinstance(got, torch.Tensor) and got.item() == pytest.approx(want, rel=1e-12)
    single = schedules.learning_rate(torch.tensor(step), *PAPER)
    assert isinstance(single, torch.Tensor) and single.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("values", [(0.0, 1e-3, 10), (1e-3, 0.0, 10), (1e-3, 1e-3, 0)])
def test_bad_values_are_named(values: tuple[float, float, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        schedules.learning_rate(1, *values)
