"""The scale-aware hash encoding: its layout, its formulas, its derivatives."""

from __future__ import annotations

import math

import pytest
import torch

from mipnerf_fast import ops, reference, use_backend


def _grid() -> reference.HashGrid:
    return reference.hash_grid(levels=3, coarsest=3, finest=20, table_size=256)


def test_layout_follows_from_the_resolutions() -> None:
    grid = _grid()
    assert grid.resolutions == (3, 8, 20)
    assert grid.is_dense == (True, False, False)
    assert grid.offsets == (0, 64, 320) and grid.entries == 576


def test_a_vertex_of_a_dense_level_has_its_own_entry() -> None:
    grid = reference.hash_grid_of([4], 128)
    tables = torch.arange(grid.entries, dtype=torch.float64)[:, None]
    vertices = torch.cartesian_prod(*[torch.arange(5)] * 3)
    found = reference.hash_encode(vertices / 4.0, torch.ones(125).double(), tables, grid, "none")[:, 0]
    x, y, z = vertices.unbind(-1)
    torch.testing.assert_close(found, (x + 5 * y + 25 * z).double())


def test_a_linear_function_is_interpolated_exactly() -> None:
    n = 6
    grid = reference.hash_grid_of([n], 512)
    vertex = torch.arange(grid.entries)
    position = (
        torch.stack([vertex % (n + 1), vertex // (n + 1) % (n + 1), vertex // (n + 1) ** 2], -1).double() / n
    )
    slopes = torch.tensor([[1.0, 2.0], [-3.0, 0.5], [0.25, 4.0]], dtype=torch.float64)
    tables = position @ slopes + 1
    x = torch.rand(50, 3, dtype=torch.float64)
    found = reference.hash_encode(x, torch.ones(50).double(), tables, grid, "none")
    wanted = x @ slopes + 1
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "erf"])
def test_attenuation_falls_from_one_to_zero(kind: str) -> None:
    scale = torch.logspace(-6, 0, 200, dtype=torch.float64)
    kept = reference.attenuation(scale, 50, kind)
    assert kept[0] > 1 - 1e-6 and (kept.diff() <= 0).all()
    assert ((kept == 0) | (kept >= 0.02)).all()
    if kind == "gaussian":
        assert kept[-1] == 0
        torch.testing.assert_close(kept[100], torch.exp(-2 * (scale[100] * 50) ** 2))


def test_attenuation_is_what_a_gaussian_leaves_of_a_wave() -> None:
    """exp(-2 s^2 n^2) is the mean of cos(2 n x) over a Gaussian of deviation s, as in equation 14 of mip-NeRF."""
    s, n = 0.03, 20
    x = torch.linspace(-10 * s, 10 * s, 200_001, dtype=torch.float64)
    density = torch.exp(-0.5 * (x / s) ** 2)
    mean = (density * torch.cos(2 * n * x)).sum() / density.sum()
    kept = reference.attenuation(torch.tensor([s], dtype=torch.float64), n, "gaussian")
    torch.testing.assert_close(kept[0], mean, rtol=1e-9, atol=0)


def test_none_is_blind_to_the_scale() -> None:
    grid, x = _grid(), torch.rand(20, 3)
    tables = torch.randn(grid.entries, 4)
    fine = reference.hash_encode(x, torch.full((20,), 1e-4), tables, grid, "none")
    coarse = reference.hash_encode(x, torch.full((20,), 0.3), tables, grid, "none")
    assert torch.equal(fine, coarse)
    faded = reference.hash_encode(x, torch.full((20,), 0.3), tables, grid, "gaussian")
    assert not faded[:, 8:].any() and fine[:, 8:].any()


def test_unknown_attenuation_is_refused() -> None:
    with pytest.raises(ValueError, match="sinc"):
        reference.attenuation(torch.ones(1), 4, "sinc")


@pytest.mark.parametrize("kind", ["gaussian", "erf", "none"])
def test_gradients_agree_with_finite_differences(kind: str) -> None:
    grid = reference.hash_grid(levels=2, coarsest=2, finest=9, table_size=32)
    # Away from the faces of cells, where the interpolation has a kink.
    x = (torch.rand(6, 3, dtype=torch.float64) * 0.98 + 0.01).requires_grad_()
    scale = (torch.rand(6, dtype=torch.float64) * 0.05 + 0.01).requires_grad_()
    tables = torch.randn(grid.entries, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, s, t: reference.hash_encode(x, s, t, grid, kind, cutoff=0.0), (x, scale, tables), eps=1e-7
    )


def test_scale_inputs_are_clamped_to_the_trained_range() -> None:
    scale = torch.tensor([1e-5, 1e-3, 1e-2, 0.5], dtype=torch.float64)
    found = reference.scale_inputs(scale, True, 1e-3, 1e-2)
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert not torch.equal(found[1], found[2])
    assert found[:, 0].eq(1).all()
    assert not reference.scale_inputs(scale, False, 1e-3, 1e-2)[:, 1:].any()


# ------------------------------------------------------------------------------------------------ the kernel


def _inputs(dtype: torch.dtype, features: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    points = torch.rand(300, 3, dtype=dtype) * 0.999
    points[0] = torch.tensor([0.0, 1.0, 1.0])  # on the faces of the box
    scales = torch.logspace(-4, -0.5, 300, dtype=dtype)
    return points, scales, torch.randn(_grid().entries, features, dtype=dtype)


@pytest.mark.parametrize("kind", ["gaussian", "erf", "none"])
@pytest.mark.parametrize("features", [2, 4])
def test_the_kernel_in_float64_is_the_reference(kind: str, features: int) -> None:
    grid = _grid()
    inputs = [x.requires_grad_() for x in _inputs(torch.float64, features)]
    with use_backend("native"):
        found = ops.hash_encode(*inputs, grid, kind)
    wanted = reference.hash_encode(*inputs, grid, kind)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(found, inputs, cotangent, materialize_grads=True),
        torch.autograd.grad(wanted, inputs, cotangent, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["gaussian", "erf", "none"])
def test_the_kernel_in_float32_rounds_as_little_as_the_reference(kind: str) -> None:
    grid, inputs = _grid(), _inputs(torch.float32)
    truth = reference.hash_encode(*(x.double() for x in inputs), grid, kind, cutoff=0.0)
    rounded = reference.hash_encode(*inputs, grid, kind, cutoff=0.0)
    found = ops.hash_encode(*inputs, grid, kind, cutoff=0.0)
    floor = 8 * 2.0**-23 * truth.abs().max()  # eight products summed
    assert (found - truth).abs().max() <= 2 * (rounded - truth).abs().max() + floor


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.3, 1.7])
def test_a_point_that_is_no_place_in_the_box_stays_in_its_row(value: float) -> None:
    grid, inputs = _grid(), _inputs(torch.float32)
    wanted = ops.hash_encode(*inputs, grid)
    inputs[0][7, 1] = value
    points, scales, tables = (x.requires_grad_() for x in inputs)
    found = ops.hash_encode(points, scales, tables, grid)
    found.sum().backward()
    others = torch.arange(300) != 7
    assert torch.equal(found[others], wanted[others])
    assert not math.isfinite(value) or bool(torch.isfinite(found).all())
    assert math.isfinite(value) or not bool(torch.isfinite(found[7]).any())


def test_the_kernel_is_a_proper_operator() -> None:
    points, scales, tables = (x[:20] if x.shape[0] == 300 else x for x in _inputs(torch.float64))
    grid = _grid()
    arguments = (points, scales, tables, list(grid.resolutions), grid.table_size, 1, 0.02)
    torch.library.opcheck(torch.ops.mipnerf_fast.hash_encode_forward, arguments)
    grad = torch.rand(points.shape[0], 12, dtype=torch.float64)
    for deterministic in (False, True):
        torch.library.opcheck(torch.ops.mipnerf_fast.hash_encode_backward, (grad, *arguments, deterministic))
    compiled = torch.compile(ops.hash_encode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(points, scales, tables, grid), ops.hash_encode(points, scales, tables, grid)
    )


def test_compiled_gradients_are_the_eager_ones() -> None:
    grid, inputs = _grid(), _inputs(torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(ops.hash_encode, fullgraph=True, backend="aot_eager")
    found = []
    for encode in (ops.hash_encode, compiled):
        leaves = [x.clone().requires_grad_() for x in inputs]
        features = encode(*leaves, grid)
        found.append([features, *torch.autograd.grad(features.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_second_derivative_is_refused() -> None:
    grid, inputs = _grid(), [x.requires_grad_() for x in _inputs(torch.float32)]
    features = ops.hash_encode(*inputs, grid)
    (grad,) = torch.autograd.grad(features.square().sum(), inputs[2], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_wrong_arguments_are_named() -> None:
    points, scales, tables = _inputs(torch.float32)
    with pytest.raises(ValueError, match="scales"):
        ops.hash_encode(points, scales[1:], tables, _grid())
    with pytest.raises(ValueError, match="tables"):
        ops.hash_encode(points, scales, tables[1:], _grid())
    with pytest.raises(RuntimeError, match="tables must be"):
        torch.ops.mipnerf_fast.hash_encode_forward(points, scales, tables, [3, 9], 256, 1, 0.02)
    with pytest.raises(RuntimeError, match=r"attenuation must be 0 .*, got 3"):
        torch.ops.mipnerf_fast.hash_encode_forward(points, scales, tables, [3, 8, 20], 256, 3, 0.02)
