"""frustum_ipe: the native kernels against the truth, the reference, torch's rules for operators, and bad arguments.

The rule of every comparison: the error against float64 is at most twice the error of the reference in the same
precision, plus a floor. For features the floor is 6e-7 (16-bit features: half a unit in the last place of 1): the
polynomials are good to 1.4e-7, 2^x to 1e-7, the variance to 6 roundings of which the Gaussian passes 0.37, and the
product rounds once. For gradients it is 32 roundings of the largest entry, the length of the longest chain.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_emulation import harness
from torch import Tensor

from mipnerf_fast import ops, reference, use_backend

OFFICIAL = dict(np.load(Path(__file__).parent / "data" / "official_mipnerf.npz"))
NAMES = ("t_vals", "origins", "directions", "radii")
EPS = torch.finfo(torch.float32).eps
FEATURE_FLOOR = {torch.float32: 6e-7, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float64: 1e-10}
GRADIENT_FLOOR = 32 * EPS
SHAPES = [(0, 5), (1, 1), (3, 1), (1, 1024), (7, 65), (33, 64), (5, 130)]
FEW_SHAPES = [(1, 1), (7, 65)]
DEGREES = [(0, 16), (0, 10), (3, 8), (0, 1), (15, 16), (2, 16)]
VARIANTS = [("cone", True), ("cone", False), ("cylinder", True), ("cylinder", False)]
OPTIONS = {"cone": False, "cylinder": True}

Rays = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    """Whatever this file calls runs the kernel, or says why not."""
    with use_backend("native"):
        yield


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors are full of NaN, so that an element that a kernel leaves out is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(64).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def make_rays(rays: int, intervals: int, seed: int = 0, device: torch.device | str = "cpu") -> Rays:
    """Random rays in float32; the first ones, where there are enough, are the awkward ones."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    t_vals = torch.sort(2 + 4 * rand(rays, intervals + 1), -1).values
    origins, directions = 8 * rand(rays, 3) - 4, 2 * rand(rays, 3) - 1
    radii = 1e-3 + 1e-2 * rand(rays, 1)
    if rays >= 7:
        t_vals[0] = torch.linspace(0, 3, intervals + 1)  # from the apex
        t_vals[1, :3] = 0  # a point at the apex
        t_vals[2, 1:3] = t_vals[2, :1]  # empty intervals
        directions[3] = 0
        directions[4] = torch.tensor([0.0, 0.0, -1.0])
        directions[5] = 1e-7  # shorter than the clamp on its length
        origins[6] *= 100
    return tuple(x.to(device) for x in (t_vals, origins, directions, radii))  # type: ignore[return-value]


def in_double(rays: Rays) -> Rays:
    return tuple(x.double().cpu() for x in rays)  # type: ignore[return-value]


def by_degree(difference: Tensor, degrees: int) -> Tensor:
    """Largest entry per degree of [B, N, 6 degrees]."""
    if difference.numel() == 0:
        return difference.new_zeros(degrees)
    return difference.abs().double().cpu().unflatten(-1, (2, degrees, 3)).amax((0, 1, 2, 4))


def gradients(encode: object, rays: Rays, cotangent: Tensor, *options: object) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in rays]
    features = encode(*leaves, *options)  # type: ignore[operator]
    return list(torch.autograd.grad(features, leaves, cotangent.to(features), allow_unused=True))


def relative_error(got: Tensor | None, want: Tensor | None) -> float:
    """Largest difference over the largest entry; an absent gradient is zero."""
    if want is None or want.numel() == 0:
        assert got is None or not got.any()
        return 0.0
    if got is None:
        got = torch.zeros_like(want)
    assert got.isfinite().all()
    return float((got.double().cpu() - want).abs().max() / want.abs().max().clamp(min=1e-30))


# ---------------------------------------------------------------------------------------------------------- truth


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("cone_ipe_deg0_16", {}),
        ("cylinder_ipe_deg0_16", {"shape": "cylinder"}),
        ("cone_pe_deg0_10", {"max_deg": 10, "integrated": False}),
    ],
)
def test_official_features(key: str, options: dict[str, object]) -> None:
    want = torch.from_numpy(OFFICIAL[key])
    rays = [torch.from_numpy(OFFICIAL[name]).double()[: len(want)] for name in NAMES]
    got = ops.frustum_ipe(*rays, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_official_gradients() -> None:
    rays = tuple(torch.from_numpy(OFFICIAL[name]).double() for name in NAMES)
    cotangent = torch.from_numpy(OFFICIAL["ipe_deg0_8_cotangent"]).double().expand(24, 32, 48)
    got = gradients(ops.frustum_ipe, rays, cotangent, 0, 8)  # type: ignore[arg-type]
    for name, grad in zip(NAMES, got, strict=True):
        want = torch.from_numpy(OFFICIAL[f"ipe_deg0_8_grad_{name}"])
        assert relative_error(grad, want) < 1e-9, name


def test_a_frustum_without_extent_encodes_its_point(device: torch.device) -> None:
    t_vals = torch.tensor([[0.0, 0.0, 0.0]], device=device)
    origins = torch.tensor([[0.3, -1.25, 2.0]], device=device)
    got = ops.frustum_ipe(
        t_vals, origins, torch.ones(1, 3, device=device), torch.full((1, 1), 0.1, device=device)
    )
    y = origins.double().cpu() * 2.0 ** torch.arange(16, dtype=torch.float64)[:, None]
    want = torch.cat([torch.sin(y).flatten(), torch.cos(y).flatten()])
    assert (got.double().cpu() - want).abs().max() < FEATURE_FLOOR[torch.float32]


def test_top_octaves_are_as_accurate_as_the_lowest(device: torch.device) -> None:
    """The mean is a pair of floats up to the range reduction; in plain float32 degree 15 is off by percents."""
    rays = make_rays(64, 65, 3, device)
    rays[1].clamp_(-4, 4)
    for integrated in (True, False):
        want = reference.frustum_ipe(*in_double(rays), integrated=integrated)
        got = ops.frustum_ipe(*rays, integrated=integrated)
        plain = reference.frustum_ipe(*rays, integrated=integrated)
        assert by_degree(got.cpu() - want, 16).max() < FEATURE_FLOOR[torch.float32]
        if not integrated:  # with integration rays as wide as these hardly reach degree 15
            assert by_degree(plain.cpu() - want, 16)[15] > 1e-3  # what a float32 mean costs


# ------------------------------------------------------------------------------------------------------ agreement


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "integrated"), VARIANTS)
@pytest.mark.parametrize("degrees", DEGREES)
def test_features_agree(device: torch.device, shape: str, integrated: bool, degrees: tuple[int, int]) -> None:
    number = degrees[1] - degrees[0]
    for rays_intervals in SHAPES if number == 16 else FEW_SHAPES:
        rays = make_rays(*rays_intervals, device=device)
        options = (*degrees, shape, integrated)
        want = reference.frustum_ipe(*in_double(rays), *options)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            got = ops.frustum_ipe(*rays, *options, dtype)
            assert got.shape == (*rays_intervals, 6 * number)
            assert got.dtype == dtype
            assert got.is_contiguous()
            plain = reference.frustum_ipe(*rays, *options, dtype)
            bound = 2 * by_degree(plain.double().cpu() - want, number) + FEATURE_FLOOR[dtype]
            error = by_degree(got.double().cpu() - want, number)
            assert (error <= bound).all(), (rays_intervals, dtype, error, bound)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "integrated"), VARIANTS)
@pytest.mark.parametrize("degrees", DEGREES)
def test_gradients_agree(
    device: torch.device, shape: str, integrated: bool, degrees: tuple[int, int]
) -> None:
    number = degrees[1] - degrees[0]
    generator = torch.Generator().manual_seed(1)
    for rays_intervals in SHAPES if number == 16 else FEW_SHAPES:
        rays = make_rays(*rays_intervals, device=device)
        options = (*degrees, shape, integrated)
        cotangent = torch.randn(*rays_intervals, 6 * number, generator=generator).to(device)
        want = gradients(reference.frustum_ipe, in_double(rays), cotangent, *options)
        plain = gradients(reference.frustum_ipe, rays, cotangent, *options)
        got = gradients(ops.frustum_ipe, rays, cotangent, *options)
        for name, g, p, w in zip(NAMES, got, plain, want, strict=True):
            assert g.is_contiguous()
            bound = 2 * relative_error(p, w) + GRADIENT_FLOOR
            assert relative_error(g, w) <= bound, (rays_intervals, name)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bit_features(device: torch.device, dtype: torch.dtype) -> None:
    for degrees in ((0, 16), (0, 5)):
        rays = make_rays(9, 33, device=device)
        cotangent = torch.randn(9, 33, 6 * degrees[1], generator=torch.Generator().manual_seed(2)).to(dtype)
        options = (*degrees, "cone", True)
        want = gradients(reference.frustum_ipe, in_double(rays), cotangent, *options)
        plain = gradients(reference.frustum_ipe, rays, cotangent.to(device), *options)
        got = gradients(ops.frustum_ipe, rays, cotangent.to(device), *options, dtype)
        for name, g, p, w in zip(NAMES, got, plain, want, strict=True):
            assert relative_error(g, w) <= 2 * relative_error(p, w) + GRADIENT_FLOOR, name


def test_degree_16_gradient_in_float64_is_that_of_the_reference() -> None:
    rays = tuple(x.double() for x in make_rays(9, 17))
    cotangent = torch.randn(9, 17, 96, dtype=torch.float64)
    for shape, integrated in VARIANTS:
        want = gradients(reference.frustum_ipe, rays, cotangent, 0, 16, shape, integrated)  # type: ignore[arg-type]
        got = gradients(ops.frustum_ipe, rays, cotangent, 0, 16, shape, integrated)  # type: ignore[arg-type]
        for name, g, w in zip(NAMES, got, want, strict=True):
            # 2^15 x an ulp of the phase, which the reference does not carry in pairs.
            assert relative_error(g, w) < 2.0**15 * 64 * torch.finfo(torch.float64).eps, (shape, name)


def test_inputs_need_not_be_contiguous(device: torch.device) -> None:
    rays = make_rays(9, 21, device=device)
    cotangent = torch.randn(9, 96, 21, device=device).transpose(1, 2)
    scattered = (
        rays[0].T.contiguous().T,
        torch.stack([rays[1], rays[1]], -1)[..., 1],
        torch.cat([rays[2], rays[2]], 1)[:, :3],
        rays[3].expand(9, 2)[:, 1:],
    )
    assert not any(x.is_contiguous() for x in scattered[:3])
    assert torch.equal(ops.frustum_ipe(*scattered), ops.frustum_ipe(*rays))
    for a, b in zip(
        gradients(ops.frustum_ipe, scattered, cotangent),
        gradients(ops.frustum_ipe, rays, cotangent.contiguous()),
        strict=True,
    ):
        assert torch.equal(a, b)
    one_for_all = rays[1][:1].expand(9, 3)
    assert torch.equal(
        ops.frustum_ipe(rays[0], one_for_all, *rays[2:]),
        ops.frustum_ipe(rays[0], one_for_all.contiguous(), *rays[2:]),
    )


def test_a_gradient_may_start_anywhere_in_memory(device: torch.device) -> None:
    """Wide loads need 16 bytes; a view may begin between."""
    rays = make_rays(3, 40, device=device)
    cotangent = torch.randn(3 * 40 * 96 + 1, device=device)
    shifted, aligned = cotangent[1:].view(3, 40, 96), cotangent[1:].clone().view(3, 40, 96)
    raw = torch.ops.mipnerf_fast.frustum_ipe_backward
    for a, b in zip(
        raw(shifted, *rays, 0, 16, False, True), raw(aligned, *rays, 0, 16, False, True), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_large_results_are_those_of_small_ones(device: torch.device) -> None:
    """Above 16 MiB the CPU writes past its caches."""
    rays = make_rays(1500, 64, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        whole = ops.frustum_ipe(*rays, out_dtype=dtype)
        assert whole.numel() * whole.element_size() > 16 << 20
        parts = [
            ops.frustum_ipe(*(x[i : i + 100] for x in rays), out_dtype=dtype) for i in range(0, 1500, 100)
        ]
        assert torch.equal(whole, torch.cat(parts))


def test_the_number_of_threads_changes_nothing() -> None:
    rays = make_rays(300, 33)
    cotangent = torch.randn(300, 33, 96)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append([ops.frustum_ipe(*rays), *gradients(ops.frustum_ipe, rays, cotangent)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_backward_gives_the_same_bits_every_time(device: torch.device) -> None:
    rays, cotangent = make_rays(50, 200, device=device), torch.randn(50, 200, 96, device=device)
    first, second = (gradients(ops.frustum_ipe, rays, cotangent) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def results_on_this_processor(rays: Rays, cotangent: Tensor) -> list[Tensor]:
    """Features of every kind, then gradients; what test_every_instruction_set compares between processes."""
    results = []
    for degrees in ((0, 16), (0, 10), (3, 8)):
        for shape, integrated in VARIANTS:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                results.append(ops.frustum_ipe(*rays, *degrees, shape, integrated, dtype))
    for options in ((0, 16, *variant) for variant in VARIANTS):
        results += gradients(ops.frustum_ipe, rays, cotangent, *options)
    return results


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability: str, tmp_path: Path) -> None:
    """This process runs the widest vectors of the machine; a child runs a narrower copy, to the same bits.

    Only the gradients' sums over degrees may be added up in another order.
    """
    inputs, outputs = tmp_path / "inputs.pt", tmp_path / "outputs.pt"
    # Made here: torch's own functions do not give the same bits on all of them.
    rays, cotangent = make_rays(9, 70), torch.randn(9, 70, 96)
    torch.save((rays, cotangent), inputs)
    code = (
        "import sys, torch, test_frustum_ipe as t\n"
        "torch.save(t.results_on_this_processor(*torch.load(sys.argv[1])), sys.argv[2])"
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": capability,
        "MIPNERF_FAST_BACKEND": "native",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    subprocess.run([sys.executable, "-c", code, str(inputs), str(outputs)], env=environment, check=True)
    for here, there in zip(results_on_this_processor(rays, cotangent), torch.load(outputs), strict=True):
        if here.dim() == 3:
            assert torch.equal(here, there)
        else:
            assert relative_error(there, here.double()) <= GRADIENT_FLOOR


# ---------------------------------------------------------------------------------------------- degenerate inputs


def test_the_apex_has_no_gradient(device: torch.device) -> None:
    t_vals = torch.tensor([[0.0, 0.0, 0.0, 1.0]], device=device)
    rays = (t_vals, *make_rays(1, 3, device=device)[1:])
    leaves = [x.clone().requires_grad_() for x in rays]
    features = ops.frustum_ipe(*leaves)
    grads = torch.autograd.grad(features[:, :2].square().sum() + features[:, :2].sum(), leaves)
    assert not grads[0].any()
    assert not grads[3].any()
    assert not grads[2].any()
    assert grads[1].all()  # the origin still moves the point
    assert all(grad.isfinite().all() for grad in gradients(ops.frustum_ipe, rays, torch.ones(1, 3, 96)))


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-19, 1e-12])
def test_squares_may_underflow(device: torch.device, size: float) -> None:
    t_vals = size * torch.tensor([[0.0, 1.0, 2.0, 3.0]], device=device)
    rays = (t_vals, *make_rays(1, 3, device=device)[1:])
    want = reference.frustum_ipe(*in_double(rays))
    assert (ops.frustum_ipe(*rays).double().cpu() - want).abs().max() < FEATURE_FLOOR[torch.float32]
    assert all(grad.isfinite().all() for grad in gradients(ops.frustum_ipe, rays, torch.ones(1, 3, 96)))


def test_far_coordinates(device: torch.device) -> None:
    """The pair holds x / pi to 2^-46 of it: at 2^15 x 1e5 the phase is good to 1e-4; a float has none left."""
    rays = list(make_rays(20, 30, device=device))
    rays[1] = rays[1] * 25000
    largest = float(rays[1].abs().max())
    for integrated in (True, False):
        want = reference.frustum_ipe(*in_double(tuple(rays)), integrated=integrated)  # type: ignore[arg-type]
        error = by_degree(ops.frustum_ipe(*rays, integrated=integrated).cpu() - want, 16)  # type: ignore[arg-type]
        assert (error < largest * 2.0 ** (torch.arange(16) - 46) + FEATURE_FLOOR[torch.float32]).all(), error


def test_a_nan_stays_in_its_ray(device: torch.device) -> None:
    for position in range(4):
        rays = [x.clone() for x in make_rays(40, 33, device=device)]
        clean = ops.frustum_ipe(*rays)
        rays[position][8, 0] = math.nan
        dirty = ops.frustum_ipe(*rays)
        assert dirty[8].isnan().any()
        others = [i for i in range(40) if i != 8]
        assert torch.equal(dirty[others], clean[others])
        grads = gradients(ops.frustum_ipe, tuple(rays), torch.ones(40, 33, 96))  # type: ignore[arg-type]
        assert grads[position][8].isnan().any()
        assert all(grad[others].isfinite().all() for grad in grads)


# --------------------------------------------------------------------------------------- torch's rules, operators


def double_rays(rays: int = 3, intervals: int = 4) -> list[Tensor]:
    t_vals, origins, directions, radii = (x.double() for x in make_rays(rays, intervals))
    return [x.requires_grad_() for x in (t_vals, origins, directions, 20 * radii)]


@pytest.mark.parametrize(("shape", "integrated"), VARIANTS)
def test_gradcheck(shape: str, integrated: bool) -> None:
    leaves = double_rays()
    assert torch.autograd.gradcheck(lambda *x: ops.frustum_ipe(*x, 0, 8, shape, integrated), leaves)
    clamped = double_rays()
    with torch.no_grad():
        clamped[2].mul_(1e-6)  # below the clamp on the direction's length
    assert torch.autograd.gradcheck(
        lambda *x: ops.frustum_ipe(*x[:2], 1e-6 * x[2], x[3], 0, 4, shape, integrated), double_rays()
    )


def test_opcheck(device: torch.device) -> None:
    forward, backward = (
        torch.ops.mipnerf_fast.frustum_ipe_forward,
        torch.ops.mipnerf_fast.frustum_ipe_backward,
    )
    for dtype in (torch.float32, torch.bfloat16):
        rays = make_rays(4, 5, device=device)
        for leaves in (rays, tuple(x.clone().requires_grad_() for x in rays)):
            torch.library.opcheck(forward, (*leaves, 0, 16, False, True, dtype))
        cotangent = torch.randn(4, 5, 96, device=device).to(dtype)
        torch.library.opcheck(backward, (cotangent, *rays, 0, 16, True, True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(device: torch.device, backend: str, dynamic: bool) -> None:
    torch.compiler.reset()

    def loss(*rays: Tensor) -> Tensor:
        return (ops.frustum_ipe(*rays, 0, 8) * 1.5).square().sum(-1)

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
    for rays_intervals in ((3, 6), (5, 9)) if dynamic else ((3, 6),):
        rays = make_rays(*rays_intervals, device=device)
        cotangent = torch.randn(rays_intervals, device=device)
        torch.testing.assert_close(compiled(*rays), loss(*rays), rtol=1e-5, atol=1e-5)
        eager, traced = (gradients(f, rays, cotangent) for f in (loss, compiled))
        with use_backend("reference"):
            want = gradients(loss, in_double(rays), cotangent)
            plain = gradients(loss, rays, cotangent)
        for name, e, c, p, w in zip(NAMES, eager, traced, plain, want, strict=True):
            bound = 2 * relative_error(p, w) + GRADIENT_FLOOR
            assert relative_error(e, w) <= bound, name
            assert relative_error(c, w) <= bound, name


def test_the_raw_operator_differentiates(device: torch.device) -> None:
    rays, cotangent = make_rays(3, 5, device=device), torch.randn(3, 5, 96, device=device)

    def raw(*leaves: Tensor) -> Tensor:
        return torch.ops.mipnerf_fast.frustum_ipe_forward(*leaves, 0, 16, False, True, torch.float32)

    for a, b in zip(
        gradients(raw, rays, cotangent), gradients(ops.frustum_ipe, rays, cotangent), strict=True
    ):
        assert torch.equal(a, b)


def test_a_second_derivative_raises(device: torch.device) -> None:
    leaves = [x.requires_grad_() for x in make_rays(2, 3, device=device)]
    (grad,) = torch.autograd.grad(ops.frustum_ipe(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="frustum_ipe: the native kernel has no second derivative"):
        grad.sum().backward()


def test_nothing_but_the_inputs_is_saved(device: torch.device) -> None:
    rays = make_rays(2, 3, device=device)
    assert ops.frustum_ipe(*rays).grad_fn is None
    saved: list[Tensor] = []
    leaves = [rays[0].requires_grad_(), *rays[1:]]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ops.frustum_ipe(*leaves)
    assert sorted(x.data_ptr() for x in saved) == sorted(x.data_ptr() for x in leaves)


# ------------------------------------------------------------------------------------- dispatch and bad arguments


def test_backends() -> None:
    rays = make_rays(3, 4)
    native_features = ops.frustum_ipe(*rays)
    with use_backend("reference"):
        assert torch.equal(ops.frustum_ipe(*rays), reference.frustum_ipe(*rays))
        assert not torch.equal(ops.frustum_ipe(*rays), native_features)
    with use_backend("auto"):
        assert torch.equal(ops.frustum_ipe(*rays), native_features)


@pytest.mark.parametrize(
    ("dtype", "options", "why"),
    [
        (torch.bfloat16, {}, "the native kernel for cpu does not take torch.bfloat16"),
        (torch.float32, {"max_deg": 18}, "the kernel goes up to max_deg 16, not 18"),
        (
            torch.float64,
            {"out_dtype": torch.float32},
            "does not make torch.float32 features of torch.float64 inputs",
        ),
    ],
)
def test_what_the_kernel_does_not_do(dtype: torch.dtype, options: dict[str, object], why: str) -> None:
    rays = [x.to(dtype) for x in make_rays(3, 4)]
    with pytest.raises(RuntimeError, match="frustum_ipe: the backend is set to native, but .*" + why):
        ops.frustum_ipe(*rays, **options)  # type: ignore[arg-type]
    with use_backend("auto"):
        got = ops.frustum_ipe(*rays, **options)  # type: ignore[arg-type]
    assert torch.equal(got, reference.frustum_ipe(*rays, **options))  # type: ignore[arg-type]


def changed(position: int, change: object) -> list[Tensor]:
    rays = list(make_rays(3, 4))
    rays[position] = change(rays[position])  # type: ignore[operator]
    return rays


BAD_TENSORS = [
    (0, lambda x: x[0], r"t_vals must be of shape \[B, N\+1\].*got \[5\]"),
    (0, lambda x: x[:, :1], r"t_vals must be of shape \[B, N\+1\] with N at least 1, got \[3, 1\]"),
    (1, lambda x: x[:, :2], r"origins must be of shape \[3, 3\] \(\[B, 3\]\), got \[3, 2\]"),
    (2, lambda x: x[:2], r"directions must be of shape \[3, 3\] \(\[B, 3\]\), got \[2, 3\]"),
    (3, lambda x: x[:, 0], r"radii must be of shape \[3, 1\] \(\[B, 1\]\), got \[3\]"),
    (1, lambda x: x.double(), r"origins must be .*float32 as t_vals, got .*float64"),
    (3, lambda x: x.to("meta"), r"radii must be on cpu as t_vals, got meta"),
    (0, lambda x: x.long(), r"t_vals must be .*float32.* got .*"),
]


@pytest.mark.parametrize("backend", ["native", "auto", "reference"])
@pytest.mark.parametrize(("position", "change", "message"), BAD_TENSORS)
def test_bad_tensors(backend: str, position: int, change: object, message: str) -> None:
    with use_backend(backend), pytest.raises(ValueError, match=r"^frustum_ipe: " + message):
        ops.frustum_ipe(*changed(position, change))


@pytest.mark.parametrize(
    ("position", "change", "message"), [row for row in BAD_TENSORS if "meta" not in row[2]]
)
def test_bad_tensors_for_the_raw_operators(position: int, change: object, message: str) -> None:
    rays = changed(position, change)
    with pytest.raises(RuntimeError, match=r"frustum_ipe_forward: " + message):
        torch.ops.mipnerf_fast.frustum_ipe_forward(*rays, 0, 16, False, True, torch.float32)
    with pytest.raises(RuntimeError, match=r"frustum_ipe_backward: " + message):
        torch.ops.mipnerf_fast.frustum_ipe_backward(torch.zeros(3, 4, 96), *rays, 0, 16, False, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_deg": -1}, "min_deg must be 0 or more, got -1"),
        ({"min_deg": 4, "max_deg": 4}, r"max_deg must be greater than min_deg \(4\), got 4"),
        ({"shape": "sphere"}, 'shape must be "cone" or "cylinder", got \'sphere\''),
        ({"out_dtype": torch.int32}, "out_dtype must be a floating-point dtype, got torch.int32"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    for backend in ("native", "reference"):
        with use_backend(backend), pytest.raises(ValueError, match="^frustum_ipe: " + message):
            ops.frustum_ipe(*make_rays(3, 4), **options)  # type: ignore[arg-type]


def test_bad_options_of_the_raw_operators() -> None:
    rays = make_rays(3, 4)
    forward, backward = (
        torch.ops.mipnerf_fast.frustum_ipe_forward,
        torch.ops.mipnerf_fast.frustum_ipe_backward,
    )
    with pytest.raises(RuntimeError, match="frustum_ipe_forward: max_deg must be at most 16, got 17"):
        forward(*rays, 0, 17, False, True, torch.float32)
    with pytest.raises(RuntimeError, match=r"frustum_ipe_forward: out_dtype must be .*, got float64"):
        forward(*rays, 0, 16, False, True, torch.float64)
    with pytest.raises(RuntimeError, match=r"grad_features must be of shape \[3, 4, 96\].*got \[3, 4, 95\]"):
        backward(torch.zeros(3, 4, 95), *rays, 0, 16, False, True)
    with pytest.raises(RuntimeError, match=r"grad_features must be .*, got float64"):
        backward(torch.zeros(3, 4, 96).double(), *rays, 0, 16, False, True)


# ------------------------------------------------------------------------------- the CUDA kernels, on the CPU


def to_numpy(x: Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def from_numpy(x: np.ndarray) -> Tensor:
    return (
        torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        if x.dtype == np.uint16
        else torch.from_numpy(x)
    )


def emulate(
    rays: Rays,
    cotangent: Tensor,
    degrees: tuple[int, int],
    shape: str,
    integrated: bool,
    seed: int,
    misalign: int = 0,
) -> list[Tensor]:
    """Features and gradients from the CUDA kernels, run by tests/cuda_emulation."""
    arrays = {name: x.numpy() for name, x in zip(NAMES, rays, strict=True)}
    grad_features = to_numpy(cotangent)
    outputs = {f"grad_{name}": (tuple(x.shape), np.float32) for name, x in zip(NAMES, rays, strict=True)}
    got = harness.run(
        "frustum_ipe",
        {**arrays, "grad_features": grad_features},
        {"features": (grad_features.shape, grad_features.dtype), **outputs},
        {
            "min_deg": degrees[0],
            "max_deg": degrees[1],
            "cylinder": int(OPTIONS[shape]),
            "integrated": int(integrated),
        },
        seed,
        misalign={"grad_features": misalign} if misalign else None,
    )
    return [from_numpy(got["features"]), *(torch.from_numpy(got[f"grad_{name}"]) for name in NAMES)]


@pytest.mark.parametrize(
    ("rays_intervals", "degrees", "shape", "integrated", "dtype", "seed", "misalign"),
    [
        ((7, 37), (0, 16), "cone", True, torch.float32, 0, 0),
        ((7, 37), (0, 16), "cone", True, torch.bfloat16, 1, 0),
        ((7, 37), (0, 16), "cylinder", False, torch.float16, 2, 0),
        ((7, 19), (0, 16), "cylinder", True, torch.float32, 3, 4),
        ((7, 37), (0, 10), "cone", True, torch.float32, 4, 0),
        ((7, 19), (3, 8), "cylinder", True, torch.bfloat16, 5, 2),
        ((9, 9), (2, 9), "cone", False, torch.float16, 6, 0),
        ((1, 1), (0, 16), "cone", True, torch.float32, 7, 0),
        ((1, 70), (15, 16), "cone", True, torch.float32, 8, 0),
        ((0, 3), (0, 16), "cone", True, torch.float32, 9, 0),
    ],
)
def test_cuda_kernels_emulated(
    rays_intervals: tuple[int, int],
    degrees: tuple[int, int],
    shape: str,
    integrated: bool,
    dtype: torch.dtype,
    seed: int,
    misalign: int,
) -> None:
    rays = make_rays(*rays_intervals, seed)
    number = degrees[1] - degrees[0]
    cotangent = torch.randn(*rays_intervals, 6 * number).to(dtype)
    features, *grads = emulate(rays, cotangent, degrees, shape, integrated, seed, misalign)
    options = (*degrees, shape, integrated)
    want = reference.frustum_ipe(*in_double(rays), *options)
    plain = reference.frustum_ipe(*rays, *options, dtype)
    bound = 2 * by_degree(plain.double() - want, number) + FEATURE_FLOOR[dtype]
    assert (by_degree(features.double() - want, number) <= bound).all()
    want_grads = gradients(reference.frustum_ipe, in_double(rays), cotangent, *options)
    plain_grads = gradients(reference.frustum_ipe, rays, cotangent, *options)
    for name, g, p, w in zip(NAMES, grads, plain_grads, want_grads, strict=True):
        assert relative_error(g, w) <= 2 * relative_error(p, w) + GRADIENT_FLOOR, name


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_threads_changes_nothing(seed: int) -> None:
    rays, cotangent = make_rays(3, 40), torch.randn(3, 40, 96, generator=torch.Generator().manual_seed(0))
    first = emulate(rays, cotangent, (0, 16), "cone", True, 100)
    again = emulate(rays, cotangent, (0, 16), "cone", True, seed)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
