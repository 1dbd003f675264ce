"""Truth of sampling and resampling: quantiles, order, degenerate weights, the official blur."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mipnerf_fast import reference


def test_even_samples() -> None:
    near, far = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[6.0]], dtype=torch.float64)
    torch.testing.assert_close(
        reference.sample_t_vals(near, far, 4), torch.tensor([[2.0, 3, 4, 5, 6]], dtype=torch.float64)
    )
    disparity = 1 / reference.sample_t_vals(near, far, 4, lindisp=True)
    torch.testing.assert_close(disparity, torch.linspace(1 / 2, 1 / 6, 5, dtype=torch.float64)[None])


def test_jitter_covers_exactly_its_stratum() -> None:
    near, far = torch.full((1, 1), 2.0, dtype=torch.float64), torch.full((1, 1), 6.0, dtype=torch.float64)
    lowest = reference.sample_t_vals(near, far, 4, torch.zeros(1, 5, dtype=torch.float64))
    highest = reference.sample_t_vals(near, far, 4, torch.ones(1, 5, dtype=torch.float64))
    assert lowest.tolist() == [[2.0, 2.5, 3.5, 4.5, 5.5]]
    assert highest.tolist() == [[2.5, 3.5, 4.5, 5.5, 6.0]]


def test_samples_follow_the_distribution() -> None:
    """The share of samples in each bin is its probability, within one sample for even positions."""
    t_vals = torch.tensor([[0.0, 1, 2, 4, 5]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 0, 3, 2]], dtype=torch.float64)
    m = 600
    samples = reference.sample_piecewise_constant(t_vals, weights, m)[0]
    counts = torch.histogram(samples, t_vals[0]).hist
    assert ((counts - m * weights[0] / 6).abs() <= 1).all()


def test_stratified_positions() -> None:
    t_vals = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    weights = torch.ones(1, 1, dtype=torch.float64)
    u = torch.tensor([[0.0, 0.5, 1.0 - 2**-24]], dtype=torch.float64)
    got = reference.sample_piecewise_constant(t_vals, weights, 3, u)[0]
    eps = 2.0**-23
    want = torch.arange(3, dtype=torch.float64) / 3 + u[0] * (1 / 3 - eps)
    torch.testing.assert_close(got, want.clamp(max=1 - eps), rtol=1e-14, atol=0)


def test_zero_weights_sample_uniformly_over_bins() -> None:
    t_vals = torch.tensor([[0.0, 1, 3]], dtype=torch.float64)
    got = reference.sample_piecewise_constant(t_vals, torch.zeros(1, 2, dtype=torch.float64), 5)[0]
    # Positions end at 1 - 2^-23, and the second bin has 4 units of t per unit of CDF.
    want = torch.tensor([0, 0.5, 1, 2, 3], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=4 * 2.0**-23)


def test_blur_by_hand() -> None:
    weights = torch.tensor([[0.0, 4.0, 0.0, 0.0, 2.0]])
    # maxima of neighbours: 0 4 4 0 2 2
    assert reference.blur_weights(weights, 0.5).tolist() == [[2.5, 4.5, 2.5, 1.5, 2.5]]


def test_as_many_as_came_in_and_no_gradient() -> None:
    t_vals = torch.linspace(2, 6, 9)[None].requires_grad_()
    weights = torch.rand(1, 8, requires_grad=True)
    out = reference.resample(t_vals, weights)
    assert out.shape == (1, 9) and not out.requires_grad
    assert reference.resample(t_vals, weights, 20).shape == (1, 21)


def test_nan_stays_in_its_ray() -> None:
    t_vals = torch.linspace(2, 6, 9).repeat(2, 1)
    weights = torch.rand(2, 8)
    clean = reference.resample(t_vals, weights)
    weights[1, 3] = torch.nan
    out = reference.resample(t_vals, weights)
    assert torch.equal(out[0], clean[0]) and out[1].isnan().any()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 40),
    m=st.integers(1, 50),
    density=st.floats(0, 1),
    padding=st.sampled_from([0.0, 1e-3, 0.01]),
    randomized=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_output_is_sorted_and_inside(
    seed: int, n: int, m: int, density: float, padding: float, randomized: bool, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(seed)
    gaps = torch.rand(3, n + 1, generator=g, dtype=dtype)
    gaps = torch.where(torch.rand(3, n + 1, generator=g) < density, gaps, torch.zeros_like(gaps))
    t_vals = 2 + torch.cumsum(gaps, -1)
    weights = torch.rand(3, n, generator=g, dtype=dtype)
    weights = torch.where(torch.rand(3, n, generator=g) < density, weights, torch.zeros_like(weights))
    u = torch.rand(3, m + 1, generator=g, dtype=dtype) if randomized else None
    out = reference.resample(t_vals, weights, m, u, padding)
    assert (out[:, 1:] >= out[:, :-1]).all()
    assert (out >= t_vals[:, :1]).all() and (out <= t_vals[:, -1:]).all()


def test_counts_are_checked() -> None:
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        reference.sample_t_vals(torch.ones(1, 1), torch.ones(1, 1), 0)
    with pytest.raises(ValueError, match="num_fenceposts must be at least 1, got 0"):
        reference.sample_piecewise_constant(torch.ones(1, 2), torch.ones(1, 1), 0)
