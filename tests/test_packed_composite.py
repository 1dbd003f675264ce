"""Compositing packed samples: against the composite of equal rays, closed forms, finite differences."""

from __future__ import annotations

import pytest
import torch

from mipnerf_fast import ops, reference, use_backend


def _case(counts: list[int]) -> dict[str, torch.Tensor]:
    total = sum(counts)
    return {
        "rgb": torch.rand(total, 3, dtype=torch.float64),
        "density": torch.rand(total, dtype=torch.float64) * 3,
        "lengths": torch.rand(total, dtype=torch.float64) * 0.2 + 0.01,
        "middles": torch.rand(total, dtype=torch.float64) + 2,
        "ray_starts": torch.tensor([0, *counts]).cumsum(0),
        "background": torch.rand(len(counts), 3, dtype=torch.float64),
        "near": torch.full((len(counts), 1), 2.0, dtype=torch.float64),
    }


def test_equals_composite_where_rays_have_equal_samples() -> None:
    case = _case([7] * 5)
    t = torch.cat([torch.zeros(5, 1).double(), case["lengths"].reshape(5, 7).cumsum(-1)], -1) + 2
    case["middles"] = ((t[:, 1:] + t[:, :-1]) / 2).reshape(-1)
    case["background"] = torch.ones(5, 3, dtype=torch.float64)
    found = reference.packed_composite(**case)
    direction = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64).expand(5, 3)
    wanted = reference.composite(
        case["rgb"].reshape(5, 7, 3), case["density"].reshape(5, 7, 1), t, direction, white_background=True
    )
    torch.testing.assert_close(found.rgb, wanted.rgb, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.acc, wanted.acc, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.distance, wanted.distance, rtol=1e-11, atol=1e-12)


def test_empty_rays_show_the_background_at_the_near_end() -> None:
    case = _case([3, 0, 2])
    found = reference.packed_composite(**case)
    assert torch.equal(found.rgb[1], case["background"][1])
    assert found.acc[1] == 0 and found.distance[1] == 2.0


def test_samples_behind_an_opaque_one_do_not_count() -> None:
    case = _case([4])
    case["density"][1] = 1e4
    found = reference.packed_composite(**case)
    assert found.weights[2:].eq(0).all() and found.acc[0] > 0.999
    case["rgb"][2:] = 100.0
    assert torch.equal(reference.packed_composite(**case).rgb, found.rgb)


def test_gradients_agree_with_finite_differences() -> None:
    case = _case([4, 0, 1, 6])
    inputs = [case[name].requires_grad_() for name in ("rgb", "density", "lengths", "background")]

    def outputs(rgb, density, lengths, background):  # type: ignore[no-untyped-def]
        given = case | {"rgb": rgb, "density": density, "lengths": lengths, "background": background}
        return reference.packed_composite(**given)[:3]

    assert torch.autograd.gradcheck(outputs, inputs)


def _differentiable(case: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [case[name].requires_grad_() for name in ("rgb", "density", "lengths", "background")]


def test_the_kernel_in_float64_is_the_reference() -> None:
    case = _case([5, 0, 30, 1, 200])
    case["density"][40:] *= 4  # the last ray ends early
    inputs = _differentiable(case)
    with use_backend("native"):
        found = ops.packed_composite(**case)
    wanted = reference.packed_composite(**case)
    assert (wanted.weights[-100:] == 0).any()
    cotangents = [torch.randn_like(field) for field in wanted]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found, inputs, cotangents),
        torch.autograd.grad(wanted, inputs, cotangents),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_the_kernel_in_float32_rounds_as_little_as_the_reference() -> None:
    case = _case([5, 0, 30, 1, 60])
    truth = reference.packed_composite(**case)
    single = {n: v if n == "ray_starts" else v.float() for n, v in case.items()}
    found, rounded = ops.packed_composite(**single), reference.packed_composite(**single)
    for a, b, c in zip(found, rounded, truth, strict=True):
        floor = 60 * 2.0**-23 * c.abs().max()  # a sum over the longest ray
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + floor


def test_the_kernel_is_a_proper_operator() -> None:
    case = _case([3, 0, 4])
    _differentiable(case)
    torch.library.opcheck(torch.ops.mipnerf_fast.packed_composite_forward, tuple(case.values()))
    with pytest.raises(RuntimeError, match="ray_starts must be ascending"):
        ops.packed_composite(**(case | {"ray_starts": torch.tensor([0, 9, 3, 7])}))
    with pytest.raises(ValueError, match="lengths"):
        ops.packed_composite(**(case | {"lengths": case["lengths"][1:]}))
