"""The bottleneck folded into the layer above it in the library, and its gradients unfolded, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mipnerf_fast.ops.mlp_folding import unfold

# Outputs of the view layer, columns that the bottleneck reads, that it gives, directions, rays: around the widths of
# vectors, of their blocks and of the terms that are packed at a time.
SIZES = [(1, 1, 1, 1, 1), (5, 7, 3, 2, 4), (64, 64, 64, 27, 2), (130, 300, 33, 27, 150), (33, 16, 258, 0, 3)]
OF_UNFOLD = (
    "grad_top",
    "sums",
    "of_ray_biases",
    "viewdirs_enc",
    "view_weight",
    "bottleneck_weight",
    "bottleneck_bias",
)


def tensors(outputs: int, columns: int, width: int, directions: int, rays: int) -> dict[str, Tensor]:
    """In float64, of numbers that float32 has."""
    shapes: dict[str, Sequence[int]] = {
        "viewdirs_enc": (rays, directions),
        "view_weight": (outputs, width + directions),
        "view_bias": (outputs,),
        "bottleneck_weight": (width, columns),
        "bottleneck_bias": (width,),
        "density_weight": (1, columns),
        "grad_top": (outputs + 1, columns),
        "sums": (outputs + 1,),
        "of_ray_biases": (rays, outputs),
    }
    return {name: torch.randn(*shape).double() for name, shape in shapes.items()}


def folded(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The matrix over the trunk and the rays' biases, by the formulas."""
    width = len(x["bottleneck_bias"])
    of_trunk, of_views = x["view_weight"][:, :width], x["view_weight"][:, width:]
    top = torch.cat([of_trunk @ x["bottleneck_weight"], x["density_weight"]])
    shared = of_trunk @ x["bottleneck_bias"] + x["view_bias"]
    return top, x["viewdirs_enc"] @ of_views.t() + shared


def floats(x: dict[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    return [x[name].float() for name in names]


def close(got: Tensor, want: Tensor, terms: int) -> None:
    """Sums of so many products of numbers of size about 1: each of n roundings is of a sum of size sqrt(n), and the
    errors add up as sqrt(n) of them."""
    assert got.dtype == torch.float32 and got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4 * 2.0**-24 * (1 + terms))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sizes", SIZES)
def test_folded_in_the_forward_pass(sizes: tuple[int, ...], threads: int) -> None:
    """A trunk that passes one feature of one on, so that the layer above shows the matrix and the rays' biases."""
    x = tensors(*sizes)
    outputs, columns, *_, rays = sizes
    one = torch.zeros(columns, 1, dtype=torch.float64)
    one[0] = 1
    x |= {"trunk": one, "trunk_bias": torch.zeros(columns), "density_bias": torch.zeros(1)}
    x |= {"colour": torch.randn(3, outputs).double(), "colour_bias": torch.zeros(3)}
    layers = ("trunk", "trunk_bias", "density_weight", "density_bias", "bottleneck_weight", "bottleneck_bias")
    parameters = floats(x, (*layers, "view_weight", "view_bias", "colour", "colour_bias"))
    features = torch.rand(2 * rays, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = torch.ops.mipnerf_fast.mlp_tiles_forward(
            features, x["viewdirs_enc"].float(), parameters, 1, 4, 0
        )
    finally:
        torch.set_num_threads(before)
    *_, view_layer, top = results
    want_top, ray_biases = folded(x)
    close(top, want_top, sum(sizes))
    products = features.double() * want_top[:outputs, 0] + ray_biases.repeat_interleave(2, 0)
    close(view_layer, products.relu(), sum(sizes))


@pytest.mark.parametrize("to_viewdirs", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_unfolding_is_the_derivative_of_folding(sizes: tuple[int, ...], to_viewdirs: bool) -> None:
    """As autograd has it in float64; torch's implementation, which other engines share, to its last digits."""
    x, outputs = tensors(*sizes), sizes[0]
    # The sums of a layer's deltas over all samples are those over its rays.
    x["sums"][:outputs] = x["of_ray_biases"].sum(0)
    got = torch.ops.mipnerf_fast.mlp_unfold(*floats(x, OF_UNFOLD), to_viewdirs)
    names = ("viewdirs_enc", "view_weight", "view_bias", "bottleneck_weight", "bottleneck_bias")
    leaves = [x[name].requires_grad_() for name in (*names, "density_weight")]
    viewdirs, view, view_bias, bottleneck, bottleneck_bias, density = torch.autograd.grad(
        folded(x), leaves, (x["grad_top"], x["of_ray_biases"])
    )
    want = [density, x["sums"][outputs:], bottleneck, bottleneck_bias, view, view_bias]
    want.append(viewdirs if to_viewdirs else viewdirs[:0])
    for a, b in zip(got, want, strict=True):
        close(a, b, sum(sizes))
    given = [x[name].detach() for name in OF_UNFOLD]
    given[:2] = given[0][:outputs], given[1][:outputs]
    for a, b in zip(unfold(*given, to_viewdirs), want[2:], strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rows_apart_are_read_as_they_lie() -> None:
    """Tensors that are not contiguous give what their copies do."""
    given = floats(tensors(5, 7, 3, 2, 4), OF_UNFOLD)
    apart = [torch.stack([t, t + 1], -1)[..., 0] for t in given]
    assert not any(t.is_contiguous() for t in apart)
    unfolding: Any = torch.ops.mipnerf_fast.mlp_unfold
    for a, b in zip(unfolding(*apart, True), unfolding(*given, True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("to_viewdirs", [False, True])
def test_opcheck(to_viewdirs: bool) -> None:
    given = floats(tensors(5, 7, 3, 2, 4), OF_UNFOLD)
    unfolding: Any = torch.ops.mipnerf_fast.mlp_unfold
    torch.library.opcheck(unfolding, (*given, to_viewdirs))
    with pytest.raises(RuntimeError, match="mlp_unfold: the raw operator has no derivative of its own"):
        unfolding(given[0].requires_grad_(), *given[1:], to_viewdirs)[0].sum().backward()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("view_weight", torch.rand(4, 8), r"view_weight must be of shape \[4, 10\] \(\[C, W \+ V\]\)"),
        ("view_weight", torch.rand(4, 10).double(), "view_weight must be float32, got float64"),
        ("bottleneck_weight", torch.rand(6), r"bottleneck_weight must be of shape \[W, K\], got \[6\]"),
        ("bottleneck_bias", torch.rand(7), r"bottleneck_bias must be of shape \[6\] \(\[W\]\), got \[7\]"),
        ("viewdirs_enc", torch.rand(4), r"viewdirs_enc must be of shape \[B, V\], got \[4\]"),
        ("viewdirs_enc", torch.rand(2, 4).half(), "viewdirs_enc must be float32 as view_weight, got float16"),
        ("grad_top", torch.rand(4, 9), r"grad_top must be of shape \[5, 9\] \(\[C \+ 1, K\]\), got \[4, 9\]"),
        ("sums", torch.rand(4), r"sums must be of shape \[5\] \(\[C \+ 1\]\), got \[4\]"),
        ("of_ray_biases", torch.rand(3, 4), r"of_ray_biases must be of shape \[2, 4\] \(\[B, C\]\)"),
        ("sums", torch.rand(5).double(), "sums must be float32 as view_weight, got float64"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: Tensor, message: str) -> None:
    x: dict[str, Any] = {name: tensor.float() for name, tensor in tensors(4, 9, 6, 4, 2).items()}
    x[name] = value
    with pytest.raises(RuntimeError, match=f"mlp_unfold: {message}"):
        torch.ops.mipnerf_fast.mlp_unfold(*[x[name] for name in OF_UNFOLD], False)
