"""The fast model's networks."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mipnerf_fast import ops, reference, use_backend


def test_harmonics_are_orthonormal_on_the_sphere() -> None:
    # Gauss-Legendre in cos(theta), evenly spaced in phi: exact for the products' degree 6.
    z, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(8))
    phi = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    radius = torch.sqrt(1 - z * z)
    directions = torch.stack(
        [radius[:, None] * phi.cos(), radius[:, None] * phi.sin(), z[:, None].expand(8, 16)], -1
    ).reshape(-1, 3)
    weights = (weight[:, None] * (2 * math.pi / 16)).expand(8, 16).reshape(-1)
    harmonics = reference.spherical_harmonics(directions)
    gram = (harmonics * weights[:, None]).T @ harmonics
    torch.testing.assert_close(gram, torch.eye(16, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_the_view_part_is_one_bias_per_ray() -> None:
    geometry, harmonics = torch.randn(10, 16).double(), torch.randn(3, 16).double()
    rays = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 1, 2])
    first, second = torch.randn(24, 32).double(), torch.randn(24, 24).double()
    last = torch.randn(3, 24).double()
    for hidden in (None, second):
        found = reference.colour_network(geometry, harmonics, rays, first, hidden, last)
        h = torch.relu(torch.cat([geometry, harmonics[rays]], -1) @ first.T)
        h = h if hidden is None else torch.relu(h @ hidden.T)
        wanted = torch.sigmoid((h @ last.T).clamp(-12, 12)) * 1.002 - 0.001
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_extreme_outputs_stay_finite_and_pass_no_gradient() -> None:
    geometry = torch.zeros(3, 16, dtype=torch.float64)
    geometry[:, 0] = torch.tensor([-1e6, 0.0, 1e6])
    geometry.requires_grad_()
    density = reference.fast_density(geometry)
    density.sum().backward()
    assert torch.isfinite(density).all() and (density.diff() > 0).all()
    assert geometry.grad is not None
    assert geometry.grad[0, 0] == 0 and geometry.grad[2, 0] == 0 and geometry.grad[1, 0] > 0


# ------------------------------------------------------------------------------------------------- the kernel

NAMES = (
    "features",
    "harmonics",
    "rays",
    "density_in",
    "density_out",
    "colour_in",
    "colour_hidden",
    "colour_out",
)
DIFFERENTIABLE = tuple(name for name in NAMES if name != "rays")
# Samples, rays, encoded features, inputs, neurons, colour layers: empty, single, odd, more than a tile, more than a
# task of tiles, one ray of many samples.
SHAPES = [
    (0, 0, 4, 8, 8, 1),
    (0, 3, 4, 8, 8, 2),
    (1, 1, 5, 8, 8, 1),
    (129, 7, 27, 28, 64, 1),
    (1500, 40, 35, 36, 24, 2),
    (77, 1, 8, 8, 256, 2),
]


def _arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    samples, rays, encoded, inputs, width, layers = shape
    directions = torch.nn.functional.normalize(torch.randn(rays, 3, dtype=torch.float64), dim=-1)
    weight = {"dtype": torch.float64}
    values: dict[str, Tensor | None] = {
        "features": torch.randn(samples, encoded, **weight),
        "harmonics": reference.spherical_harmonics(directions),
        "rays": torch.randint(max(rays, 1), (samples,)),
        "density_in": torch.randn(width, inputs, **weight) * (2 / inputs) ** 0.5,
        "density_out": torch.randn(16, width, **weight) * (2 / width) ** 0.5,
        "colour_in": torch.randn(width, 32, **weight) * 0.25,
        "colour_hidden": torch.randn(width, width, **weight) * (2 / width) ** 0.5 if layers == 2 else None,
        "colour_out": torch.randn(3, width, **weight) * (2 / width) ** 0.5,
    }
    # What float32 holds, so that every precision starts from the same numbers.
    return {
        name: value if value is None or name == "rays" else value.float().to(dtype)
        for name, value in values.items()
    }


def _with_gradients(run: Any, values: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Outputs and the gradients of a fixed functional of both."""
    leaves = {
        name: value if value is None or name == "rays" else value.detach().clone().requires_grad_()
        for name, value in values.items()
    }
    rgb, density = run(*leaves.values())
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.rand(x.shape, generator=generator, dtype=torch.float64) for x in (rgb, density))
    ((rgb * first.to(rgb.dtype)).sum() + (density * second.to(rgb.dtype)).sum()).backward()
    found = {"rgb": rgb.detach(), "density": density.detach()}
    for name, leaf in leaves.items():
        if leaf is not None and name != "rays":
            found[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_in_float64_is_the_reference(shape: tuple[int, ...]) -> None:
    values = _arguments(shape)
    wanted = _with_gradients(reference.tiny_mlp, values)
    with use_backend("native"):
        found = _with_gradients(ops.tiny_mlp, values)
    # Sums of up to 1500 terms in another order.
    for name, truth in wanted.items():
        scale = float(truth.abs().max()) if truth.numel() else 1.0
        torch.testing.assert_close(found[name], truth, rtol=1e-11, atol=1e-12 * max(scale, 1.0))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_in_float32_rounds_as_little_as_the_reference(shape: tuple[int, ...]) -> None:
    """Twice the float32 reference's error plus 16 units in the last place of the largest value."""
    values = _arguments(shape, torch.float32)
    double = {n: v if v is None or n == "rays" else v.double() for n, v in values.items()}
    truth = _with_gradients(reference.tiny_mlp, double)
    rounded = _with_gradients(reference.tiny_mlp, values)
    with use_backend("native"):
        found = _with_gradients(ops.tiny_mlp, values)
    for name, exact in truth.items():
        if not exact.numel():
            assert found[name].shape == exact.shape
            continue
        allowed = 2 * (rounded[name] - exact).abs().max() + 16 * 2.0**-23 * exact.abs().max()
        assert (found[name] - exact).abs().max() <= allowed, name


def test_no_thread_count_changes_a_bit() -> None:
    values = _arguments((5000, 40, 35, 36, 64, 1), torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(_with_gradients(ops.tiny_mlp, values))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


@pytest.mark.parametrize("layers", [1, 2])
def test_gradients_agree_with_finite_differences(layers: int) -> None:
    values = _arguments((5, 2, 5, 8, 8, layers))
    leaves = [v if v is None or n == "rays" else v.requires_grad_() for n, v in values.items()]
    with use_backend("native"):
        assert torch.autograd.gradcheck(lambda *x: tuple(ops.tiny_mlp(*x)), leaves)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_kernel_is_a_proper_operator(layers: int) -> None:
    values = _arguments((40, 5, 7, 8, 16, layers), torch.float32)
    leaves = [v if v is None or n == "rays" else v.requires_grad_() for n, v in values.items()]
    torch.library.opcheck(torch.ops.mipnerf_fast.tiny_mlp_forward, (*leaves, False))
    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in leaves)
    cotangents = torch.rand(40, 3), torch.rand(40)
    torch.library.opcheck(torch.ops.mipnerf_fast.tiny_mlp_backward, (*cotangents, *plain, False, True, False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_gradients_are_the_eager_ones(dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(ops.tiny_mlp, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for samples in (40, 53):
        values = _arguments((samples, 5, 7, 8, 16, 1), torch.float32)
        wanted, found = _with_gradients(ops.tiny_mlp, values), _with_gradients(compiled, values)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_inputs_need_not_be_contiguous_and_gradients_only_where_wanted() -> None:
    values = _arguments((50, 4, 7, 8, 16, 1), torch.float32)
    wanted = ops.tiny_mlp(*values.values())
    features, weight = values["features"], values["density_in"]
    assert features is not None and weight is not None
    strided = values | {
        "features": features.repeat_interleave(2, 1)[:, ::2],
        "density_in": weight.T.contiguous().T.requires_grad_(),
    }
    found = ops.tiny_mlp(*strided.values())
    assert torch.equal(found.rgb, wanted.rgb) and torch.equal(found.density, wanted.density)
    found.density.sum().backward()
    assert strided["density_in"].grad is not None  # type: ignore[union-attr]


def test_a_nan_stays_in_its_sample() -> None:
    values = _arguments((300, 4, 7, 8, 16, 1), torch.float32)
    features = values["features"]
    assert features is not None
    features[5, 2] = math.nan
    rgb, density = ops.tiny_mlp(*values.values())
    bad = ~torch.isfinite(density) | ~torch.isfinite(rgb).all(-1)
    assert bad.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("features", torch.zeros(9), r"features must be of shape \[S, E\]"),
        ("harmonics", torch.zeros(4, 9), "harmonics must be of shape"),
        ("rays", torch.zeros(5, dtype=torch.int64), "rays must be of shape"),
        ("rays", torch.zeros(9, dtype=torch.int32), "rays must be int64"),
        ("density_in", torch.zeros(16, 4), "density_in must be of at least 7"),
        (
            "density_in",
            torch.zeros(16, 8, dtype=torch.float64),
            "density_in must be torch.float32 as features",
        ),
        ("density_out", torch.zeros(15, 16), "density_out must be of shape"),
        ("colour_in", torch.zeros(16, 31), "colour_in must be of shape"),
        ("colour_hidden", torch.zeros(16, 8), "colour_hidden must be of shape"),
        ("colour_out", torch.zeros(4, 16), "colour_out must be of shape"),
    ],
)
def test_wrong_arguments_are_named(argument: str, value: Tensor, message: str) -> None:
    values = _arguments((9, 4, 7, 8, 16, 1), torch.float32) | {argument: value}
    with pytest.raises(ValueError, match=f"tiny_mlp: {message}"):
        ops.tiny_mlp(*values.values())


def test_rays_out_of_range_and_unserved_sizes_are_refused() -> None:
    values = _arguments((9, 4, 7, 8, 16, 1), torch.float32)
    with pytest.raises(RuntimeError, match="rays must be in"):
        ops.tiny_mlp(*(values | {"rays": torch.full((9,), 4)}).values())
    odd = _arguments((9, 4, 7, 8, 12, 1), torch.float32)
    with use_backend("native"), pytest.raises(RuntimeError, match="multiples of 8"):
        ops.tiny_mlp(*odd.values())
    torch.testing.assert_close(ops.tiny_mlp(*odd.values()), reference.tiny_mlp(*odd.values()))


def test_products_in_tf32_are_the_references_where_there_are_no_tensor_cores() -> None:
    values = _arguments((60, 4, 7, 8, 16, 2), torch.float32)
    found = _with_gradients(functools.partial(ops.tiny_mlp, tf32=True), values)
    wanted = _with_gradients(functools.partial(reference.tiny_mlp, tf32=True), values)
    exact = _with_gradients(reference.tiny_mlp, values)
    for name, value in wanted.items():
        assert torch.equal(found[name], value)
        # Rounded, and not by more than the few operands of 11 bits on a value's way can make.
        assert 0 < (value - exact[name]).norm() <= 2.0**-8 * exact[name].norm()
    with use_backend("native"), pytest.raises(RuntimeError, match="TF32 are of CUDA devices, not of cpu"):
        ops.tiny_mlp(*values.values(), tf32=True)
    with pytest.raises(RuntimeError, match="tiny_mlp_forward: tf32 must be false on the CPU"):
        torch.ops.mipnerf_fast.tiny_mlp_forward(*values.values(), True)


def test_rounding_passes_the_gradient_of_the_rounded_product() -> None:
    x, weight = torch.randn(9, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    grad = torch.randn(9, 4)
    out = reference.linear(x, weight, tf32=True)
    rounded = [reference.round_to_tf32(value.detach()) for value in (x, weight, grad)]
    assert all(torch.equal(reference.round_to_tf32(value), value) for value in rounded)
    assert torch.equal(out, rounded[0] @ rounded[1].T)
    of_x, of_weight = torch.autograd.grad(out, (x, weight), grad)
    assert torch.equal(of_x, rounded[2] @ rounded[1]) and torch.equal(of_weight, rounded[2].T @ rounded[0])


def test_a_second_derivative_is_refused() -> None:
    values = _arguments((9, 4, 7, 8, 16, 1), torch.float32)
    features = values["features"]
    assert features is not None
    features.requires_grad_()
    density = ops.tiny_mlp(*values.values()).density
    (grad,) = torch.autograd.grad(density.sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
