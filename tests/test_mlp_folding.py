"""The bottleneck folded into the layer above it in the library, and its gradients unfolded, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mipnerf_fast import _native
from mipnerf_fast.ops.mlp_folding import unfold

pytestmark = pytest.mark.skipif(not _native.available(), reason="the native library is not built")

NAMES = (
    "viewdirs_enc",
    "view_weight",
    "view_bias",
    "bottleneck_weight",
    "bottleneck_bias",
    "density_weight",
    "grad_top",
    "sums",
    "of_ray_biases",
)
# Outputs of the view layer, columns that the bottleneck reads, that it gives, directions, rays: around the widths of
# vectors, of their blocks and of the terms that are packed at a time.
SIZES = [(1, 1, 1, 1, 1), (5, 7, 3, 2, 4), (64, 64, 64, 27, 2), (130, 300, 33, 27, 150), (33, 16, 258, 0, 3)]


def tensors(outputs: int, columns: int, width: int, directions: int, rays: int) -> dict[str, Tensor]:
    shapes: Sequence[Sequence[int]] = (
        (rays, directions),
        (outputs, width + directions),
        (outputs,),
        (width, columns),
        (width,),
        (1, columns),
        (outputs + 1, columns),
        (outputs + 1,),
        (rays, outputs),
    )
    return {name: torch.randn(*shape).double() for name, shape in zip(NAMES, shapes, strict=True)}


def folded(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """By the formulas."""
    width = len(x["bottleneck_bias"])
    of_trunk, of_views = x["view_weight"][:, :width], x["view_weight"][:, width:]
    top = torch.cat([of_trunk @ x["bottleneck_weight"], x["density_weight"]])
    shared = of_trunk @ x["bottleneck_bias"] + x["view_bias"]
    return top, x["viewdirs_enc"] @ of_views.t() + shared


def floats(x: dict[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    return [x[name].float() for name in names]


def of_fold() -> tuple[str, ...]:
    return NAMES[:6]


def of_unfold() -> tuple[str, ...]:
    return (*NAMES[6:], "viewdirs_enc", "view_weight", "bottleneck_weight", "bottleneck_bias")


def close(got: Tensor, want: Tensor, terms: int) -> None:
    """Sums of so many products of numbers of size about 1: each of n roundings is of a sum of size sqrt(n), and the
    errors add up as sqrt(n) of them."""
    assert got.dtype == torch.float32 and got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4 * 2.0**-24 * (1 + terms))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sizes", SIZES)
def test_fold(sizes: tuple[int, ...], threads: int) -> None:
    x = tensors(*sizes)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = torch.ops.mipnerf_fast.mlp_fold(*floats(x, of_fold()))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(got, folded({n: t.float().double() for n, t in x.items()}), strict=True):
        close(a, b, sum(sizes))


@pytest.mark.parametrize("to_viewdirs", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_unfold_is_the_derivative_of_fold(sizes: tuple[int, ...], to_viewdirs: bool) -> None:
    """Of autograd through the formulas in float64; the torch implementation that other engines share is it too."""
    x = {name: tensor.float().double() for name, tensor in tensors(*sizes).items()}
    outputs = sizes[0]
    # The sums of a layer's deltas over all samples are those over its rays.
    x["sums"][:outputs] = x["of_ray_biases"].sum(0)
    got = torch.ops.mipnerf_fast.mlp_unfold(*floats(x, of_unfold()), to_viewdirs)
    leaves = [x[name].requires_grad_() for name in of_fold()]
    top, ray_biases = folded(x)
    viewdirs, view, view_bias, bottleneck, bottleneck_bias, density = torch.autograd.grad(
        (top, ray_biases), leaves, (x["grad_top"], x["of_ray_biases"])
    )
    want = [density, x["sums"][outputs:], bottleneck, bottleneck_bias, view, view_bias]
    want.append(viewdirs if to_viewdirs else viewdirs[:0])
    for a, b in zip(got, want, strict=True):
        close(a, b, sum(sizes))
    given = [x[name].detach() for name in of_unfold()]
    given[:2] = given[0][:outputs], given[1][:outputs]
    for a, b in zip(unfold(*given, to_viewdirs), want[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rows_apart_are_read_as_they_lie() -> None:
    """Tensors that are not contiguous give what their copies do."""
    x = tensors(5, 7, 3, 2, 4)
    for names, operator in (
        (of_fold(), torch.ops.mipnerf_fast.mlp_fold),
        (of_unfold(), torch.ops.mipnerf_fast.mlp_unfold),
    ):
        options = [True] if operator is torch.ops.mipnerf_fast.mlp_unfold else []
        given = floats(x, names)
        apart = [torch.stack([t, t + 1], -1)[..., 0] for t in given]
        assert not any(t.is_contiguous() for t in apart if t.numel() > 1)
        for a, b in zip(operator(*apart, *options), operator(*given, *options), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("operator", "name", "value", "message"),
    [
        (
            "fold",
            "view_weight",
            torch.rand(4, 8),
            r"view_weight must be of shape \[4, 10\] \(\[C, W \+ V\]\)",
        ),
        ("fold", "view_weight", torch.rand(4, 10).double(), "view_weight must be float32, got float64"),
        ("fold", "view_bias", torch.rand(5), r"view_bias must be of shape \[4\] \(\[C\]\), got \[5\]"),
        (
            "fold",
            "bottleneck_weight",
            torch.rand(6),
            r"bottleneck_weight must be of shape \[W, K\], got \[6\]",
        ),
        ("fold", "bottleneck_bias", torch.rand(7), r"bottleneck_bias must be of shape \[6\] \(\[W\]\)"),
        ("fold", "density_weight", torch.rand(1, 5), r"density_weight must be of shape \[1, 9\]"),
        ("fold", "viewdirs_enc", torch.rand(4), r"viewdirs_enc must be of shape \[B, V\], got \[4\]"),
        ("fold", "viewdirs_enc", torch.rand(2, 4).half(), "viewdirs_enc must be float32 as view_weight, got"),
        ("unfold", "grad_top", torch.rand(4, 9), r"grad_top must be of shape \[5, 9\] \(\[C \+ 1, K\]\)"),
        ("unfold", "sums", torch.rand(4), r"sums must be of shape \[5\] \(\[C \+ 1\]\), got \[4\]"),
        (
            "unfold",
            "of_ray_biases",
            torch.rand(3, 4),
            r"of_ray_biases must be of shape \[2, 4\] \(\[B, C\]\)",
        ),
        ("unfold", "sums", torch.rand(5).double(), "sums must be float32 as view_weight, got float64"),
    ],
)
def test_what_does_not_fit_is_refused(operator: str, name: str, value: Tensor, message: str) -> None:
    x: dict[str, Any] = {name: tensor.float() for name, tensor in tensors(4, 9, 6, 4, 2).items()}
    x[name] = value
    names, options = (of_fold(), []) if operator == "fold" else (of_unfold(), [False])
    with pytest.raises(RuntimeError, match=f"mlp_{operator}: {message}"):
        getattr(torch.ops.mipnerf_fast, f"mlp_{operator}")(*[x[name] for name in names], *options)
