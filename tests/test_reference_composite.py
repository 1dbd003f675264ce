"""Truth of compositing: closed forms, degenerate rays, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mipnerf_fast import reference


def ray_batch(b: int = 3, n: int = 5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "rgb": torch.rand(b, n, 3, generator=g, dtype=torch.float64),
        "density": 2 * torch.rand(b, n, 1, generator=g, dtype=torch.float64),
        "t_vals": torch.sort(2 + 4 * torch.rand(b, n + 1, generator=g, dtype=torch.float64), -1).values,
        "directions": torch.randn(b, 3, generator=g, dtype=torch.float64),
    }


def render(a: dict[str, Tensor], **options: Any) -> reference.Composite:
    return reference.composite(a["rgb"], a["density"], a["t_vals"], a["directions"], **options)


def test_homogeneous_medium_is_beer_lambert() -> None:
    sigma, n = 0.7, 16
    t_vals = torch.linspace(1, 3, n + 1, dtype=torch.float64)[None]
    direction = torch.tensor([[0.0, 3.0, 4.0]], dtype=torch.float64)
    colour = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    out = reference.composite(
        colour.expand(1, n, 3), torch.full((1, n, 1), sigma, dtype=torch.float64), t_vals, direction
    )
    opacity = 1 - math.exp(-sigma * 2 * 5)
    assert out.acc.item() == pytest.approx(opacity, rel=1e-13)
    torch.testing.assert_close(out.rgb[0], opacity * colour + 1 - opacity, rtol=1e-13, atol=0)


def test_distance_is_the_mean_of_midpoints() -> None:
    t_vals = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    density = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    d = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    out = reference.composite(
        torch.zeros(1, 2, 3, dtype=torch.float64), density, t_vals, d, white_background=False
    )
    w0 = 1 - math.exp(-1)
    w1 = math.exp(-1) * (1 - math.exp(-1))
    assert out.distance.item() == pytest.approx((1.5 * w0 + 3 * w1) / (w0 + w1), rel=1e-13)
    assert (out.rgb == 0).all()


def test_density_shapes_agree() -> None:
    a = ray_batch()
    flat = {**a, "density": a["density"][..., 0]}
    for x, y in zip(render(a), render(flat), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_ray_has_the_near_distance_and_the_background(dtype: torch.dtype) -> None:
    a = {name: value.to(dtype) for name, value in ray_batch().items()}
    a["density"] = torch.zeros_like(a["density"]).requires_grad_()
    out = render(a)
    assert torch.equal(out.distance, a["t_vals"][:, 0])
    assert (out.rgb == 1).all() and (out.acc == 0).all()
    (grad,) = torch.autograd.grad(out.distance.sum(), a["density"])
    assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_density_is_opaque_and_has_finite_gradients(dtype: torch.dtype) -> None:
    a = {name: value.to(dtype) for name, value in ray_batch().items()}
    a["density"][:, 2] = math.inf
    leaves = [a[name].requires_grad_() for name in ("rgb", "density", "t_vals", "directions")]
    out = render(a)
    torch.testing.assert_close(out.acc, torch.ones_like(out.acc), rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert (out.weights[:, 3:] == 0).all()
    value = out.rgb.sum() + out.distance.sum() + out.acc.sum() + out.weights.square().sum()
    for grad in torch.autograd.grad(value, leaves):
        assert grad.isfinite().all()


@pytest.mark.parametrize("density", [0.0, 1.0, 1e4, math.inf])
def test_empty_interval_contributes_nothing(density: float) -> None:
    a = ray_batch(2, 4)
    a["t_vals"][:, 2] = a["t_vals"][:, 1]
    a["density"][:, 1] = density
    a["density"].requires_grad_()
    out = render(a)
    assert (out.weights[:, 1] == 0).all()
    keep = [0, 2, 3]
    without = reference.composite(
        a["rgb"][:, keep], a["density"][:, keep], a["t_vals"][:, [0, 1, 3, 4]], a["directions"]
    )
    for name in ("rgb", "acc", "distance"):
        torch.testing.assert_close(getattr(out, name), getattr(without, name), rtol=1e-13, atol=1e-15)
    (grad,) = torch.autograd.grad(out.rgb.sum(), a["density"])
    assert grad.isfinite().all() and (grad[:, 1] == 0).all()


def test_nan_stays_in_its_ray() -> None:
    a = ray_batch()
    clean = render(a)
    a["density"][1, 2] = math.nan
    out = render(a)
    for x, y in zip(out, clean, strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]])
    assert out.rgb[1].isnan().all() and out.distance[1].isnan()


def test_distance_gradient_is_zero_where_clipped() -> None:
    a = ray_batch(1, 3)
    a["t_vals"] = torch.full((1, 4), 2.0, dtype=torch.float64)
    a["density"].requires_grad_()
    out = render(a)
    assert out.distance.item() == 2.0
    (grad,) = torch.autograd.grad(out.distance.sum(), a["density"])
    assert (grad == 0).all()


def test_gradients_match_finite_differences_and_the_closed_form() -> None:
    a = ray_batch()
    names = ("rgb", "density", "t_vals", "directions")
    leaves = tuple(a[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(lambda *x: tuple(reference.composite(*x)), leaves)
    # dC/dtau_i = T_i (1 - alpha_i)(c_i - bg) - sum_{j > i} w_j (c_j - bg)
    out = render(a)
    (grad,) = torch.autograd.grad(out.rgb.sum(), a["density"])
    lengths = (a["t_vals"][:, 1:] - a["t_vals"][:, :-1]) * a["directions"].norm(dim=-1, keepdim=True)
    contrast = (a["rgb"] - 1).sum(-1)
    after = torch.exp(-torch.cumsum(a["density"][..., 0] * lengths, -1))
    terms = out.weights * contrast
    suffix = terms.sum(-1, keepdim=True) - torch.cumsum(terms, -1)
    torch.testing.assert_close(grad[..., 0], lengths * (after * contrast - suffix), rtol=1e-9, atol=1e-12)


def test_activations_inside_equal_activations_outside() -> None:
    a = ray_batch()
    raw_rgb, raw_density = torch.logit(a["rgb"]), a["density"] - 1
    out = reference.composite(
        raw_rgb,
        raw_density,
        a["t_vals"],
        a["directions"],
        density_activation="softplus",
        density_bias=-1.0,
        rgb_activation="sigmoid",
        rgb_padding=0.001,
    )
    want = reference.composite(
        a["rgb"] * 1.002 - 0.001, torch.log1p(torch.exp(raw_density - 1)), a["t_vals"], a["directions"]
    )
    for x, y in zip(out, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
    relu = reference.composite(a["rgb"], raw_density, a["t_vals"], a["directions"], density_activation="relu")
    want = reference.composite(a["rgb"], raw_density.clamp(min=0), a["t_vals"], a["directions"])
    assert torch.equal(relu.weights, want.weights)


@pytest.mark.parametrize("option", [{"density_activation": "exp"}, {"rgb_activation": "relu"}])
def test_unknown_activation_is_named(option: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        render(ray_batch(), **option)
