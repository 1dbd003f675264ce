"""resample: the native kernels against the truth, the reference, torch's rules for operators, and bad arguments.

A new fencepost is where the CDF reaches a position, so an error of the CDF or of the position moves it by that error
over the density there. The rule of every comparison: the error against float64 is at most twice the error of the
reference in float32, plus a floor of 8 roundings of one in the CDF (a tree of sums over the lanes and tiles of a ray,
the division) times the steepest inverse within the fencepost's reach, plus 4 roundings of the fencepost itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulation import harness
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mipnerf_fast import ops, reference, use_backend

OFFICIAL = dict(np.load(Path(__file__).parent / "data" / "official_mipnerf.npz"))
ROUNDING = 2.0**-24
SHAPES = [
    (0, 5, 5),
    (1, 1, 1),
    (3, 1, 7),
    (9, 33, 33),
    (2, 1024, 1024),
    (300, 64, 64),
    (11, 130, 48),
    (9, 64, 200),
]


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


def make_inputs(
    rays: int, samples: int, num_samples: int, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """t_vals, weights, u; the first rays are the awkward ones where there are enough."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    t_vals = torch.sort(2 + 4 * rand(rays, samples + 1), -1).values
    weights, u = rand(rays, samples) ** 8, rand(rays, num_samples + 1).clamp(max=1 - ROUNDING)
    if rays >= 9:
        weights[0] = 0
        weights[1] = 0
        weights[1, samples // 2] = 1  # a wall
        t_vals[2, 1 : samples // 2] = t_vals[2, :1]  # empty intervals
        t_vals[3] = t_vals[3, :1]  # nothing but empty intervals
        weights[4] = 1e-20
        weights[5] *= 1e6
        u[6], u[7] = 0, 1 - ROUNDING
        weights[8, : samples // 2] = 0
    return t_vals.to(device), weights.to(device), u.to(device)


def steepest(t_vals: Tensor, weights: Tensor, new_t: Tensor, padding: float) -> Tensor:
    """dt/dCDF of the steepest interval that a fencepost lies in or beside, [B, M], in float64."""
    blurred = reference.blur_weights(weights, padding)
    blurred = blurred + (1e-5 - blurred.sum(-1, keepdim=True)).clamp(min=0) / blurred.shape[-1]
    density = blurred / blurred.sum(-1, keepdim=True)
    slope = t_vals.diff(dim=-1) / density.clamp(min=1e-300)
    interval = (torch.searchsorted(t_vals, new_t.contiguous(), right=True) - 1).clamp(0, slope.shape[-1] - 1)
    beside = [(interval + step).clamp(0, slope.shape[-1] - 1) for step in (-1, 0, 1)]
    return torch.stack([slope.gather(-1, index) for index in beside]).amax(0)


def assert_agrees(
    got: Tensor,
    t_vals: Tensor,
    weights: Tensor,
    num_samples: int | None,
    u: Tensor | None,
    padding: float = 0.01,
) -> None:
    t_vals, weights, u = t_vals.cpu(), weights.cpu(), None if u is None else u.cpu()
    double = (t_vals.double(), weights.double(), num_samples, None if u is None else u.double(), padding)
    want = reference.resample(*double)
    single = reference.resample(t_vals, weights, num_samples, u, padding)
    assert got.shape == want.shape
    assert got.dtype == t_vals.dtype
    if want.numel() == 0:
        return
    inverse = steepest(double[0], double[1], want, padding)
    bound = 2 * (single - want).abs() + 8 * ROUNDING * inverse + 4 * ROUNDING * want.abs()
    error = (got.double().cpu() - want).abs()
    worst = int((error - bound).argmax())
    assert (error <= bound).all(), f"{error.flatten()[worst]:.3g}, allowed {bound.flatten()[worst]:.3g}"
    assert_sorted_inside(got, t_vals)


def assert_sorted_inside(new_t: Tensor, t_vals: Tensor) -> None:
    assert (new_t.diff(dim=-1) >= 0).all()
    assert (new_t >= t_vals[:, :1].to(new_t.device)).all()
    assert (new_t <= t_vals[:, -1:].to(new_t.device)).all()


# -------------------------------------------------------------------------------------------------------------- truth


def test_official_values() -> None:
    """The official weights, resampled: in float64 to 1e-9."""
    t_vals = torch.from_numpy(OFFICIAL["t_vals"]).double()
    weights = torch.from_numpy(OFFICIAL["composite_white_weights"])
    want = torch.from_numpy(OFFICIAL["resample_t_vals"])
    torch.testing.assert_close(ops.resample(t_vals, weights), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_weights_keep_even_fenceposts(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        dtype = torch.float32  # the CUDA kernel takes no other
    t_vals = torch.linspace(2, 6, 65, dtype=dtype, device=device).expand(3, 65)
    for weights in (torch.zeros(3, 64, dtype=dtype, device=device), torch.full_like(t_vals[:, :64], 0.25)):
        new_t = ops.resample(t_vals, weights)
        assert (new_t - t_vals).abs().max() < 4 * 2.0**-22  # the last position is 1 - 2^-23


def test_draws_follow_the_weights(device: torch.device) -> None:
    """All but the padding of the draws fall where the blurred weight is; a chi-square test over the intervals."""
    samples, draws = 16, 4096
    t_vals = torch.linspace(0, 1, samples + 1, device=device)[None]
    weights = torch.zeros(1, samples, device=device)
    weights[0, 4], weights[0, 11] = 1.0, 3.0
    u = torch.rand(1, draws, generator=torch.Generator().manual_seed(0)).to(device)
    new_t = ops.resample(t_vals, weights, draws - 1, u).cpu()
    density = reference.blur_weights(weights.double().cpu(), 0.01)[0]
    expected = draws * density / density.sum()
    counts = torch.histc(new_t, samples, 0, 1).double()
    # Stratified draws scatter by one at each end of an interval, not by the root of the count.
    assert (counts - expected).abs().max() <= 2


# ---------------------------------------------------------------------------------------------------------- agreement


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("rays", "samples", "num_samples"), SHAPES)
def test_agreement(rays: int, samples: int, num_samples: int, device: torch.device) -> None:
    t_vals, weights, u = make_inputs(rays, samples, num_samples, device=device)
    for uniforms in (u, None):
        assert_agrees(
            ops.resample(t_vals, weights, num_samples, uniforms), t_vals, weights, num_samples, uniforms
        )


def test_float64_is_exact() -> None:
    t_vals, weights, u = (x.double() for x in make_inputs(40, 37, 50))
    for uniforms in (u, None):
        got, want = (f(t_vals, weights, 50, uniforms) for f in (ops.resample, reference.resample))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_without_padding(device: torch.device) -> None:
    """Then flat stretches of the CDF carry no fencepost, and a ray of zeros is uniform."""
    t_vals, weights, _ = make_inputs(9, 32, 32, device=device)
    weights = weights.clone()
    weights[0] = 0
    weights[1] = 0
    weights[1, 10] = 1.0
    new_t = ops.resample(t_vals, weights, padding=0.0)
    assert_sorted_inside(new_t, t_vals)
    assert_agrees(new_t[:1], t_vals[:1], weights[:1], 32, None, 0.0)
    assert (new_t[1] >= t_vals[1, 9]).all()
    assert (new_t[1] <= t_vals[1, 12]).all()


def test_inputs_of_any_stride(device: torch.device) -> None:
    t_vals, weights, u = make_inputs(12, 64, 30, device=device)
    want = ops.resample(t_vals, weights, 30, u)

    def shift(x: Tensor) -> Tensor:
        flat = torch.empty(x.numel() + 1, device=device)
        flat[1:] = x.flatten()
        return flat[1:].view_as(x)

    for change in (lambda x: x.t().contiguous().t(), shift):
        got = ops.resample(change(t_vals), change(weights), 30, change(u))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_vector_unit(capability: str) -> None:
    """Some of the tests above, on the loops that older processors run."""
    tests = "test_agreement or test_float64 or test_without_padding"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", tests]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "10 passed" in done.stdout, done.stdout[-500:]


# --------------------------------------------------------------------------------------------------------- properties


@st.composite
def any_inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, int, float]:
    """Whatever a ray may be: zeros, repeats, tiny and huge numbers, u at its ends and beyond."""
    samples, num_samples = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    number = st.one_of(
        st.just(0.0), st.floats(0, 1, width=32), st.sampled_from([1e-40, 1e-30, 1e-8, 1e-5, 1.0, 1e4, 1e30])
    )
    steps = draw(st.lists(number, min_size=samples, max_size=samples))
    start = draw(st.sampled_from([0.0, 2.0, -3.0, 1e-6, 1e5]))
    t_vals = torch.tensor([start, *steps], dtype=torch.float64).cumsum(0).float()[None]
    weights = torch.tensor([draw(st.lists(number, min_size=samples, max_size=samples))], dtype=torch.float32)
    uniform = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 1 - ROUNDING, 1.0, -0.5, 7.0, 1e30]))
    u = draw(st.none() | st.lists(uniform, min_size=num_samples + 1, max_size=num_samples + 1))
    padding = draw(st.sampled_from([0.0, 0.01, 1e-12, 5.0]))
    return (
        t_vals,
        weights,
        None if u is None else torch.tensor([u], dtype=torch.float32),
        num_samples,
        padding,
    )


@settings(max_examples=300)
@given(any_inputs())
def test_the_result_is_sorted_and_inside(inputs: tuple[Tensor, Tensor, Tensor | None, int, float]) -> None:
    t_vals, weights, u, num_samples, padding = inputs
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        arguments = [None if x is None else x.to(device) for x in (t_vals, weights, u)]
        with use_backend("native"):
            new_t = ops.resample(arguments[0], arguments[1], num_samples, arguments[2], padding)  # type: ignore[arg-type]
        assert_sorted_inside(new_t, t_vals)


def test_a_nan_stays_in_its_ray(device: torch.device) -> None:
    t_vals, weights, u = make_inputs(20, 40, 40, device=device)
    want = ops.resample(t_vals, weights, 40, u)
    for which in range(2):
        spoilt = [t_vals.clone(), weights.clone()]
        spoilt[which][12, 7] = torch.nan
        got = ops.resample(*spoilt, 40, u)
        others = torch.arange(20, device=device) != 12
        assert torch.equal(got[others], want[others])
    assert got[12].isnan().any()  # of the weights: it is in every value of the CDF


# ---------------------------------------------------------------------------------------------------------- operators


def test_there_is_no_gradient(device: torch.device) -> None:
    t_vals, weights, u = (x.requires_grad_() for x in make_inputs(4, 8, 8, device=device))
    assert not ops.resample(t_vals, weights, 8, u).requires_grad
    assert not torch.ops.mipnerf_fast.resample(t_vals, weights, 8, u, 0.01).requires_grad


def test_opcheck(device: torch.device) -> None:
    t_vals, weights, u = make_inputs(4, 8, 12, device=device)
    for arguments in ((t_vals, weights, 12, u, 0.01), (t_vals, weights, 3, None, 0.5)):
        torch.library.opcheck(torch.ops.mipnerf_fast.resample.default, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(compiler: str, dynamic: bool, device: torch.device) -> None:
    def run(t_vals: Tensor, weights: Tensor) -> Tensor:
        return ops.resample(t_vals, weights, padding=0.02) * 2

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=compiler, dynamic=dynamic)
    for rays, samples in [(6, 32), (9, 21)] if dynamic else [(6, 32)]:
        t_vals, weights, _ = make_inputs(rays, samples, 1, device=device)
        assert torch.equal(compiled(t_vals, weights), run(t_vals, weights))


BAD = {
    "weights": (
        lambda i: {"weights": i["weights"][:, :-1]},
        r"weights must be of shape \[4, 6\].*got \[4, 5\]",
    ),
    "t_vals": (lambda i: {"t_vals": i["t_vals"][..., None]}, r"t_vals must be .*got \[4, 7, 1\]"),
    "u": (lambda i: {"u": i["u"][:, 1:]}, r"u must be of shape \[4, 9\] .*got \[4, 8\]"),
    "count": (lambda i: {"num_samples": 0, "u": None}, "num_samples must be at least 1, got 0"),
    "dtype": (lambda i: {"weights": i["weights"].double()}, "weights must be torch.float32 as t_vals"),
    "device": (lambda i: {"weights": i["weights"].to("meta")}, "weights must be on .*got meta"),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", list(BAD))
def test_bad_arguments_are_named(case: str, backend: str, device: torch.device) -> None:
    t_vals, weights, u = make_inputs(4, 6, 8, device=device)
    inputs: dict[str, Any] = {"t_vals": t_vals, "weights": weights, "num_samples": 8, "u": u}
    change, message = BAD[case]
    with use_backend(backend), pytest.raises(ValueError, match=f"^resample: {message}"):
        ops.resample(**{**inputs, **change(inputs)})


def test_bad_arguments_of_the_raw_operator(device: torch.device) -> None:
    t_vals, weights, u = make_inputs(4, 6, 8, device=device)
    raw = torch.ops.mipnerf_fast.resample
    for arguments, message in (
        ((t_vals, weights[:2], 8, u, 0.01), r"resample: weights must be of shape \[4, 6\] .*got \[2, 6\]"),
        ((t_vals, weights, 7, u, 0.01), r"resample: u must be of shape \[4, 8\]"),
        ((t_vals.half(), weights.half(), 8, None, 0.01), "resample: t_vals must be float32.*got float16"),
        ((t_vals, weights, 0, None, 0.01), "resample: num_samples must be at least 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw(*arguments)


# ------------------------------------------------------------------------------------------ the CUDA kernel, emulated


def emulate(t_vals: Tensor, weights: Tensor, u: Tensor | None, num_samples: int, **more: Any) -> Tensor:
    arrays = {"t_vals": t_vals.numpy(), "weights": weights.numpy(), "u": None if u is None else u.numpy()}
    shape = (t_vals.shape[0], num_samples + 1)
    scalars = {"padding": more.pop("padding", 0.01)}
    result = harness.run("resample", arrays, {"out_t_vals": (shape, np.float32)}, scalars, **more)
    return torch.from_numpy(result["out_t_vals"])


# Every tile count, aligned and not, and a ray for which one warp fills a block's shared memory.
EMULATED = [*[shape for shape in SHAPES if shape[0] not in (0, 300)], (2, 4096, 300), (2, 2500, 10)]


@pytest.mark.parametrize(("rays", "samples", "num_samples"), EMULATED)
def test_cuda_kernel_emulated(rays: int, samples: int, num_samples: int) -> None:
    t_vals, weights, u = make_inputs(rays, samples, num_samples)
    for seed, uniforms in enumerate((u, None)):
        got = emulate(t_vals, weights, uniforms, num_samples, seed=seed)
        assert_agrees(got, t_vals, weights, num_samples, uniforms)


@pytest.mark.parametrize("seed", range(4))
def test_cuda_kernel_emulated_in_any_order(seed: int) -> None:
    """The order of the threads does not show, nor where the arrays begin."""
    t_vals, weights, u = make_inputs(9, 132, 132, seed=5)
    plain = emulate(t_vals, weights, u, 132, seed=100)
    again = emulate(t_vals, weights, u, 132, seed=seed, misalign={"weights": 4 * (seed % 3), "t_vals": 4})
    assert torch.equal(plain, again)


@settings(max_examples=25)
@given(any_inputs())
def test_the_emulated_result_is_sorted_and_inside(
    inputs: tuple[Tensor, Tensor, Tensor | None, int, float],
) -> None:
    t_vals, weights, u, num_samples, padding = inputs
    assert_sorted_inside(
        emulate(t_vals, weights, u, num_samples, padding=padding, checks=("memory",)), t_vals
    )
