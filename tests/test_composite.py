"""composite and composite_resample: native kernels against the truth, the reference and torch's rules for operators.

The rule of every comparison, ray by ray: the error against float64 is at most twice the error of the reference in the
same precision, plus a floor of 16 roundings of the largest entry: a length takes 5 of them, an activation 4, the sums
along a ray up to 5 (a tree over lanes, then one per tile), the exponentials and the weight 2. Where a gradient is a sum
of numbers that cancel, the floor is of those. Gradients in 16 bits round once more, by half a unit in their last place.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulation import harness
from torch import Tensor

from mipnerf_fast import ops, reference, use_backend
from mipnerf_fast.reference import Composite

OFFICIAL = dict(np.load(Path(__file__).parent / "data" / "official_mipnerf.npz"))
INPUTS = ("rgb", "density", "t_vals", "directions")
ROUNDING = 2.0**-24
FLOOR = 16 * ROUNDING
# Of gradients of rgb and density: relative, and absolute where numbers are subnormal.
LAST_PLACE = {torch.float32: (0.0, 0.0), torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, 2.0**-25)}
SHAPES = [(0, 5), (1, 1), (3, 1), (9, 33), (2, 1024), (300, 64), (11, 130)]
RAW = {
    "density_activation": "softplus",
    "density_bias": -1.0,
    "rgb_activation": "sigmoid",
    "rgb_padding": 0.001,
}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "activated": {},
    "paper": RAW,
    "relu": {"density_activation": "relu", "density_bias": 0.25, "rgb_activation": "sigmoid"},
}

Arrays = tuple[Tensor, ...]


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
    rays: int,
    samples: int,
    raw: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Arrays:
    """Random rays; where there are enough, the first ones are the awkward ones. rgb and density in `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    rgb, density = rand(rays, samples, 3), 3 * rand(rays, samples, 1) ** 2
    if raw:
        rgb, density = 8 * rgb - 4, 6 * rand(rays, samples, 1) - 4
    t_vals = torch.sort(2 + 4 * rand(rays, samples + 1), -1).values
    directions = 2 * rand(rays, 3) - 1
    if rays >= 9:
        density[0] = -200 if raw else 0  # empty
        density[1] = 1e4  # opaque from the start
        t_vals[2, 1:5] = t_vals[2, min(4, samples)]  # empty intervals
        t_vals[3] = t_vals[3, :1]  # nothing but empty intervals
        density[4, samples // 2] = torch.inf  # a wall in the middle
        density[5, ::3] = torch.inf
        t_vals[5, : samples // 2 + 1] = t_vals[5, :1]  # walls without thickness, then one with
        directions[6] = 0
        density[7] = -30 if raw else 1e-9  # so thin that in float32 1 - exp(-x) would be zero
        density[8, :2] = 1e30
    return tuple(x.to(device) for x in (rgb.to(dtype), density.to(dtype), t_vals, directions))


def make_cotangents(rays: int, samples: int, device: torch.device | str = "cpu") -> Arrays:
    generator = torch.Generator().manual_seed(99)
    shapes = ((rays, 3), (rays,), (rays,), (rays, samples))
    return tuple(torch.randn(shape, generator=generator).to(device) for shape in shapes)


def in_precision(inputs: Sequence[Tensor], dtype: torch.dtype) -> Arrays:
    return tuple(x.detach().cpu().to(dtype) for x in inputs)


def outputs_and_gradients(
    composite: Callable[..., Composite],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    white_background: bool = True,
    **options: Any,
) -> Arrays:
    leaves = [x.detach().requires_grad_() for x in inputs]
    level = composite(*leaves, white_background, **options)
    grads = torch.autograd.grad(level, leaves, [c.to(o) for c, o in zip(cotangents, level, strict=True)])
    return (*[x.detach() for x in level], *grads)


NAMES = (*Composite._fields, *(f"grad_{name}" for name in INPUTS))


def cancelling_terms(
    inputs: Sequence[Tensor], cotangents: Sequence[Tensor], white_background: bool = True, **options: Any
) -> dict[str, Tensor]:
    """Per ray the size of what some gradients add up, in float64.

    dL/ddensity_i holds delta_i dL/ddistance (m_i - distance) / acc, a difference of numbers up to t_N, which in a thin
    ray is large and cancels. With s_i = |density_i dL/ddensity_i|, that term included: the gradient of a fencepost is
    a difference of two s_i / (t_{i+1} - t_i), that of the direction holds sum s_i / ||d||.
    """
    rgb, density, t_vals, directions = in_precision(inputs, torch.float64)
    bias, padding = options.get("density_bias", 0.0), options.get("rgb_padding", 0.0)
    raw = density.clone().requires_grad_()
    active = reference.activate_density(raw, options.get("density_activation"), bias)
    (slope,) = torch.autograd.grad(active.sum(), raw)
    density = active.detach().requires_grad_()
    rgb = reference.activate_rgb(rgb, options.get("rgb_activation"), padding)
    level = reference.composite(rgb, density, t_vals, directions, white_background)
    (grad,) = torch.autograd.grad(level, density, in_precision(cotangents, torch.float64))
    gaps, norm = t_vals.diff(dim=-1), directions.norm(dim=-1)
    acc = level.acc.detach()
    towards = torch.where(
        acc > 0, cotangents[1].double().cpu().abs() * t_vals[:, -1] / acc.clamp(min=1e-300), 0
    )
    of_distance = towards[:, None] * gaps * norm[:, None]
    terms = torch.where(density == torch.inf, 0, density.detach())[..., 0] * (
        grad[..., 0].abs() + of_distance
    )
    per_gap = torch.where(gaps > 0, terms / gaps.clamp(min=1e-300), 0)
    return {
        "grad_density": (of_distance * slope[..., 0]).amax(-1),
        "grad_t_vals": per_gap.amax(-1),
        "grad_directions": terms.sum(-1) / norm.clamp(min=1e-300),
    }


def assert_within_rule(
    got: Sequence[Tensor],
    single: Sequence[Tensor],
    truth: Sequence[Tensor],
    terms: dict[str, Tensor],
    last_place: tuple[float, float],
) -> None:
    """The rule above; an awkward ray with large numbers hides no other."""
    for name, mine, theirs, want in zip(NAMES, got, single, truth, strict=True):
        if want.numel() == 0:
            assert mine.shape == want.shape
            continue

        def per_ray(x: Tensor, want: Tensor = want) -> Tensor:
            return x.reshape(want.shape[0], -1).double().cpu().abs().amax(-1)

        error, allowed = per_ray(mine.double().cpu() - want), 2 * per_ray(theirs.double() - want)
        relative, absolute = last_place if name in ("grad_rgb", "grad_density") else (0.0, 0.0)
        scale = torch.maximum(per_ray(want), terms.get(name, torch.zeros(())))
        # float64 has its limits too: torch differentiates expm1(x) as expm1(x) + 1, which is zero below -37.
        bound = allowed + (FLOOR + relative) * scale + 1e-14 * per_ray(want).max() + absolute
        worst = int((error - bound).argmax())
        message = f"{name}, ray {worst}: {error[worst]:.3g} instead of at most {bound[worst]:.3g}"
        assert (error <= bound).all(), message


def assert_agrees(
    got: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    white_background: bool = True,
    **options: Any,
) -> None:
    """That outputs and gradients obey the rule; gradients that were not computed are left out at the end."""
    double, single = (
        outputs_and_gradients(
            reference.composite,
            in_precision(inputs, dtype),
            in_precision(cotangents, dtype),
            white_background,
            **options,
        )
        for dtype in (torch.float64, torch.float32)
    )
    got = [*got, *double[len(got) :]]
    terms = cancelling_terms(inputs, cotangents, white_background, **options)
    assert_within_rule(got, single, double, terms, LAST_PLACE[inputs[0].dtype])


# -------------------------------------------------------------------------------------------------------------- truth


@pytest.mark.parametrize("background", ["white", "black"])
def test_official_values(background: str) -> None:
    inputs = [torch.from_numpy(OFFICIAL[name]).double() for name in INPUTS]
    level = ops.composite(*inputs, background == "white")
    for name, value in level._asdict().items():
        want = torch.from_numpy(OFFICIAL[f"composite_{background}_{name}"])
        torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-9)


def test_official_gradients() -> None:
    leaves = [torch.from_numpy(OFFICIAL[name]).double().requires_grad_() for name in INPUTS]
    level = ops.composite(*leaves)
    cotangents = {
        name: torch.from_numpy(OFFICIAL[f"composite_cot_{name}"]) for name in ("rgb", "acc", "weights")
    }
    loss = sum((getattr(level, name) * cotangent).sum() for name, cotangent in cotangents.items())
    assert isinstance(loss, Tensor)
    for name, grad in zip(INPUTS[:3], torch.autograd.grad(loss, leaves[:3]), strict=True):
        want = torch.from_numpy(OFFICIAL[f"composite_white_grad_{name}"])
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-9)


def test_a_uniform_medium_has_a_closed_form(device: torch.device) -> None:
    """w_i = exp(-i tau) (1 - exp(-tau)); rgb = c (1 - exp(-N tau)) + exp(-N tau)."""
    samples, tau = 100, 0.0625
    t_vals = torch.arange(samples + 1.0, device=device)[None] / 4
    directions = torch.tensor([[0.0, 3.0, 4.0]], device=device)  # length 5, so that delta = 1.25
    density = torch.full((1, samples), tau / 1.25, device=device)
    level = ops.composite(torch.full((1, samples, 3), 0.25, device=device), density, t_vals, directions)
    steps = torch.arange(samples, dtype=torch.float64)
    want = torch.exp(-tau * steps) * -np.expm1(-tau)
    assert (level.weights[0].double().cpu() - want).abs().max() < FLOOR
    left = np.exp(-tau * samples)
    assert abs(float(level.acc) - (1 - left)) < FLOOR
    assert (level.rgb.double().cpu() - (0.25 * (1 - left) + left)).abs().max() < FLOOR


# ---------------------------------------------------------------------------------------------------------- agreement


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("activations", list(ACTIVATIONS))
@pytest.mark.parametrize(("rays", "samples"), SHAPES)
def test_agreement(rays: int, samples: int, activations: str, device: torch.device) -> None:
    options = ACTIVATIONS[activations]
    inputs = make_inputs(rays, samples, bool(options), device=device)
    cotangents = make_cotangents(rays, samples, device)
    for white in (True, False):
        got = outputs_and_gradients(ops.composite, inputs, cotangents, white, **options)
        assert all(x.isfinite().all() for x in got)
        assert_agrees(got, inputs, cotangents, white, **options)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activations", ["activated", "paper"])
def test_agreement_in_16_bits(activations: str, dtype: torch.dtype, device: torch.device) -> None:
    options = ACTIVATIONS[activations]
    for rays, samples in ((40, 64), (5, 35)):
        inputs = make_inputs(rays, samples, bool(options), device=device, dtype=dtype)
        cotangents = make_cotangents(rays, samples, device)
        got = outputs_and_gradients(ops.composite, inputs, cotangents, **options)
        assert [x.dtype for x in got] == [torch.float32] * 4 + [dtype] * 2 + [torch.float32] * 2
        assert_agrees(got, inputs, cotangents, **options)


@pytest.mark.parametrize("activations", list(ACTIVATIONS))
def test_float64_is_exact(activations: str) -> None:
    """On the CPU, from the same formulas. Activated inputs: torch rounds its softplus above 20 by 2e-9."""
    options = ACTIVATIONS[activations]
    inputs = in_precision(make_inputs(40, 37, bool(options)), torch.float64)
    cotangents = in_precision(make_cotangents(40, 37), torch.float64)
    got = outputs_and_gradients(ops.composite, inputs, cotangents, **options)
    want = outputs_and_gradients(reference.composite, inputs, cotangents, **options)
    for name, mine, theirs in zip(NAMES, got, want, strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=1e-9, atol=1e-11 + 1e-11 * float(theirs.abs().max()), msg=name
        )


def test_inputs_of_any_stride(device: torch.device) -> None:
    """Transposed, broadcast, sliced and off alignment: the same numbers."""
    plain = make_inputs(12, 64, device=device)
    cotangents = make_cotangents(12, 64, device)
    want = outputs_and_gradients(ops.composite, plain, cotangents)

    def scatter(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, device=device)
        wide[..., 1::2] = x
        return wide[..., 1::2]

    def shift(x: Tensor) -> Tensor:
        flat = torch.empty(x.numel() + 1, device=device)
        flat[1:] = x.flatten()
        return flat[1:].view_as(x)

    for change in (scatter, shift, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)):
        got = outputs_and_gradients(
            ops.composite, [change(x) for x in plain], [change(c) for c in cotangents]
        )
        for mine, theirs in zip(got, want, strict=True):
            assert_same = torch.testing.assert_close
            assert_same(mine, theirs, rtol=0, atol=4 * FLOOR * float(theirs.abs().max()))
    broadcast = [plain[0][:1].expand_as(plain[0]), plain[1], plain[2][:1].expand_as(plain[2]), plain[3]]
    level = ops.composite(*broadcast)
    again = ops.composite(*[x.contiguous() for x in broadcast])
    assert all(torch.equal(x, y) for x, y in zip(level, again, strict=True))


def test_density_with_and_without_a_last_axis(device: torch.device) -> None:
    rgb, density, t_vals, directions = make_inputs(10, 20, device=device)
    flat = density[..., 0].clone().requires_grad_()
    density.requires_grad_()
    one, other = ops.composite(rgb, density, t_vals, directions), ops.composite(rgb, flat, t_vals, directions)
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    one.rgb.sum().backward()
    other.rgb.sum().backward()
    assert density.grad is not None
    assert flat.grad is not None
    assert density.grad.shape == (10, 20, 1)
    assert torch.equal(density.grad[..., 0], flat.grad)


@pytest.mark.parametrize("output", range(4))
def test_each_output_alone(output: int, device: torch.device) -> None:
    """A gradient that is not there is zero, and costs nothing."""
    inputs = make_inputs(20, 40, True, device=device)

    cotangents = [
        c if i == output else torch.zeros_like(c) for i, c in enumerate(make_cotangents(20, 40, device))
    ]
    leaves = [x.detach().requires_grad_() for x in inputs]
    level = ops.composite(*leaves, **RAW)
    loss = (level[output] * cotangents[output]).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    assert_agrees([*[x.detach() for x in level], *grads], inputs, cotangents, **RAW)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_vector_unit(capability: str) -> None:
    """Some of the tests above, on the loops that older processors run."""
    tests = "test_agreement and (paper or 16_bits) or test_float64"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", tests]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "14 passed" in done.stdout, done.stdout[-500:]


# ---------------------------------------------------------------------------------------------------- degenerate rays


def test_an_empty_ray_shows_the_background(device: torch.device) -> None:
    rgb, _, t_vals, directions = make_inputs(2, 8, device=device)
    density = torch.zeros(2, 8, device=device, requires_grad=True)
    for white in (True, False):
        level = ops.composite(rgb, density, t_vals, directions, white)
        assert torch.equal(level.rgb, torch.full_like(level.rgb, float(white)))
        assert torch.equal(level.distance, t_vals[:, 0])
        assert not level.acc.any()
        (grad,) = torch.autograd.grad(level.distance.sum(), density)
        assert not grad.any()


def test_infinite_density_is_opaque(device: torch.device) -> None:
    rgb, density, t_vals, directions = make_inputs(1, 8, device=device)
    density = density.clone()
    density[0, 3] = torch.inf
    leaves = [x.requires_grad_() for x in (rgb, density, t_vals, directions)]
    level = ops.composite(*leaves)
    assert abs(float(level.acc.detach()) - 1) < FLOOR
    assert not level.weights[0, 4:].any()
    grads = torch.autograd.grad((level.rgb.sum() + level.distance.sum()), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[1][0, 3:].any()
    assert not grads[0][0, 4:].any()


def test_an_empty_interval_contributes_nothing(device: torch.device) -> None:
    """Whatever its density: taking it out changes no output and no gradient of the others."""
    rgb, density, t_vals, directions = make_inputs(1, 6, device=device)
    for value in (0.0, 1e4, 1e30, torch.inf):
        with_it = [
            torch.cat([rgb[:, :3], torch.full_like(rgb[:, :1], 9.0), rgb[:, 3:]], 1),
            torch.cat([density[:, :3], torch.full_like(density[:, :1], value), density[:, 3:]], 1),
            torch.cat([t_vals[:, :4], t_vals[:, 3:]], 1),
        ]
        leaves = [x.detach().requires_grad_() for x in with_it]
        level = ops.composite(*leaves, directions)
        without = [x.detach().requires_grad_() for x in (rgb, density, t_vals)]
        plain = ops.composite(*without, directions)
        assert level.weights[0, 3] == 0
        for name in ("rgb", "distance", "acc"):
            torch.testing.assert_close(getattr(level, name), getattr(plain, name), rtol=0, atol=FLOOR * 6)
        keep = torch.tensor([0, 1, 2, 4, 5, 6], device=device)
        grads, wanted = (torch.autograd.grad(x.rgb.sum(), y) for x, y in ((level, leaves), (plain, without)))
        assert all(grad.isfinite().all() for grad in grads)
        for grad, want in zip(grads[:2], wanted[:2], strict=True):
            torch.testing.assert_close(grad[:, keep], want, rtol=0, atol=FLOOR * float(want.abs().max()))
            assert not grad[0, 3].any()


def test_a_nan_stays_in_its_ray(device: torch.device) -> None:
    inputs = [x.clone() for x in make_inputs(20, 40, device=device)]
    cotangents = make_cotangents(20, 40, device)
    want = outputs_and_gradients(ops.composite, inputs, cotangents)
    for which, index in ((0, (12, 7, 1)), (1, (12, 7, 0)), (2, (12, 7)), (3, (12, 1))):
        spoilt = [x.clone() for x in inputs]
        spoilt[which][index] = torch.nan
        got = outputs_and_gradients(ops.composite, spoilt, cotangents)
        others = torch.arange(20, device=device) != 12
        assert got[0][12].isnan().any()
        assert all(torch.equal(x[others], y[others]) for x, y in zip(got, want, strict=True))


def test_the_distance_is_clipped_without_gradient(device: torch.device) -> None:
    """Weights of a thin medium round so that the mean can leave [t_0, t_N]; a ray of one point shows it for certain."""
    t_vals = torch.full((1, 4), 3.0, device=device)
    t_vals[0, 1:3] = torch.tensor([2.0, 4.5])  # not sorted: the mean of the middles is 3.25 > t_N = 3
    leaf = t_vals.requires_grad_()
    density = torch.tensor([[0.0, 1e3, 0.0]], device=device)
    level = ops.composite(torch.rand(1, 3, 3, device=device), density, leaf, torch.ones(1, 3, device=device))
    assert float(level.distance.detach()) == 3.0
    (grad,) = torch.autograd.grad(level.distance.sum(), leaf)
    assert not grad.any()


# ---------------------------------------------------------------------------------------------------------- operators


def raw_inputs(rays: int = 4, samples: int = 6, device: torch.device | str = "cpu") -> tuple[Any, ...]:
    return (*make_inputs(rays, samples, True, device=device), True, 1, -1.0, 1, 0.001)


@pytest.mark.parametrize("activations", list(ACTIVATIONS))
def test_gradcheck(activations: str) -> None:
    options = ACTIVATIONS[activations]
    leaves = [x.double().requires_grad_() for x in make_inputs(4, 5, bool(options), seed=3)]
    assert torch.autograd.gradcheck(lambda *x: tuple(ops.composite(*x, **options)), leaves)
    assert torch.autograd.gradcheck(lambda *x: tuple(ops.composite_resample(*x, False, **options)[0]), leaves)


def test_opcheck(device: torch.device) -> None:
    operators = torch.ops.mipnerf_fast
    inputs = raw_inputs(device=device)
    leaves = (*[x.clone().requires_grad_() for x in inputs[:4]], *inputs[4:])
    u = torch.rand(4, 9, device=device)
    cotangents = make_cotangents(4, 6, device)
    torch.library.opcheck(operators.composite_forward.default, leaves)
    torch.library.opcheck(operators.composite_resample_forward.default, (*leaves, 8, u, 0.01))
    torch.library.opcheck(operators.composite_resample_forward.default, (*leaves, 6, None, 0.01))
    for geometry in (True, False):
        torch.library.opcheck(operators.composite_backward.default, (*cotangents, *inputs, geometry))
        some = (cotangents[0], None, None, cotangents[3])
        torch.library.opcheck(operators.composite_backward.default, (*some, *inputs, geometry))


def test_the_raw_operators_differentiate(device: torch.device) -> None:
    inputs, cotangents = raw_inputs(20, 30, device), make_cotangents(20, 30, device)
    want = outputs_and_gradients(ops.composite, inputs[:4], cotangents, **RAW)[4:]
    for operator, more in (("composite_forward", ()), ("composite_resample_forward", (30, None, 0.01))):
        leaves = [x.clone().requires_grad_() for x in inputs[:4]]
        level = getattr(torch.ops.mipnerf_fast, operator)(*leaves, *inputs[4:], *more)
        got = torch.autograd.grad(level[:4], leaves, cotangents)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_a_second_derivative_raises(device: torch.device) -> None:
    leaves = [x.requires_grad_() for x in make_inputs(3, 4, device=device)]
    for level in (ops.composite(*leaves), ops.composite_resample(*leaves)[0]):
        (grad,) = torch.autograd.grad(level.rgb.sum(), leaves[1], create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            grad.sum().backward()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(compiler: str, dynamic: bool, device: torch.device) -> None:
    def loss(*inputs: Tensor) -> Tensor:
        coarse, t_vals = ops.composite_resample(*inputs, **RAW)
        fine = ops.composite(*inputs[:2], t_vals, inputs[3], **RAW)
        return coarse.rgb.square().sum() + coarse.distance.sum() + (fine.weights * fine.acc[:, None]).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=compiler, dynamic=dynamic)
    for rays, samples in [(6, 32), (9, 21)] if dynamic else [(6, 32)]:
        leaves = [x.requires_grad_() for x in make_inputs(rays, samples, True, device=device)]
        results = [(f(*leaves), *torch.autograd.grad(f(*leaves), leaves)) for f in (loss, compiled)]
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, eager, rtol=1e-5, atol=1e-6 * float(eager.detach().abs().max()))


def test_composite_resample_is_both(device: torch.device) -> None:
    inputs = make_inputs(30, 50, True, device=device)
    cotangents = make_cotangents(30, 50, device)
    for num_samples, u in ((None, None), (20, torch.rand(30, 21, device=device)), (130, None)):
        level, t_vals = ops.composite_resample(*inputs, **RAW, num_samples=num_samples, u=u)
        plain = ops.composite(*inputs, **RAW)
        assert all(torch.equal(x, y) for x, y in zip(level, plain, strict=True))
        assert torch.equal(t_vals, ops.resample(inputs[2], plain.weights, num_samples, u))

    def only_level(*leaves: Tensor, **options: Any) -> Composite:
        level, t_vals = ops.composite_resample(*leaves, **options)
        assert not t_vals.requires_grad
        return level

    got = outputs_and_gradients(only_level, inputs, cotangents, **RAW)
    want = outputs_and_gradients(ops.composite, inputs, cotangents, **RAW)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


BAD = {
    "rgb": (lambda i: {"rgb": i["rgb"][..., :2]}, r"rgb must be of shape \[4, 6, 3\].*got \[4, 6, 2\]"),
    "density": (lambda i: {"density": i["density"][:, :-1]}, r"density must be .*got \[4, 5, 1\]"),
    "t_vals": (lambda i: {"t_vals": i["t_vals"][0]}, r"t_vals must be .*got \[7\]"),
    "directions": (lambda i: {"directions": i["directions"][:3]}, r"directions must be .*got \[3, 3\]"),
    "dtype": (lambda i: {"directions": i["directions"].double()}, "directions must be torch.float32"),
    "integers": (lambda i: {"rgb": i["rgb"].int()}, "rgb must be float32.*got torch.int32"),
    "device": (lambda i: {"density": i["density"].to("meta")}, "density must be on .*got meta"),
    "activation": (
        lambda i: {"density_activation": "elu"},
        'density_activation must be None, "softplus".*elu',
    ),
    "colours": (lambda i: {"rgb_activation": "relu"}, "rgb_activation must be None.*relu"),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", list(BAD))
def test_bad_arguments_are_named(case: str, backend: str, device: torch.device) -> None:
    inputs = dict(zip(INPUTS, make_inputs(4, 6, device=device), strict=True))
    change, message = BAD[case]
    with use_backend(backend):
        for operator in (ops.composite, ops.composite_resample):
            with pytest.raises(ValueError, match=f"^{operator.__name__}: {message}"):
                operator(**{**inputs, **change(inputs)})


def test_bad_arguments_of_the_raw_operators(device: torch.device) -> None:
    good = raw_inputs(device=device)
    forward = torch.ops.mipnerf_fast.composite_forward
    for index, bad, message in (
        (0, good[0][:, :-1], r"composite_forward: rgb must be of shape \[4, 6, 3\] .*got \[4, 5, 3\]"),
        (1, good[1].half(), "density must be float32 as rgb, got float16"),
        (2, good[2].half(), "t_vals must be float32.*got float16"),
        (5, 3, r"density_activation must be 0 \(none\), 1 \(softplus\) or 2 \(relu\), got 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*good[:index], bad, *good[index + 1 :])
    with pytest.raises(RuntimeError, match=r"composite_backward: grad_acc must be of shape \[4\]"):
        torch.ops.mipnerf_fast.composite_backward(None, None, good[2], None, *good, False)


def test_the_backend_decides(device: torch.device) -> None:
    rgb, density, t_vals, directions = make_inputs(4, 6, device=device)
    mixed = (rgb.half(), density, t_vals, directions)
    with pytest.raises(RuntimeError, match=r"composite: the backend is set to native, but .*density"):
        ops.composite(*mixed)
    with use_backend("auto"):
        want = reference.composite(*mixed)
        assert all(torch.equal(x, y) for x, y in zip(ops.composite(*mixed), want, strict=True))
    leaf = density.clone().requires_grad_()
    with use_backend("reference"):
        assert "Composite" not in type(ops.composite(rgb, leaf, t_vals, directions).rgb.grad_fn).__name__
    assert "_Composite" in type(ops.composite(rgb, leaf, t_vals, directions).rgb.grad_fn).__name__


# ----------------------------------------------------------------------------------------- the CUDA kernels, emulated


def to_numpy(x: Tensor) -> np.ndarray:
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def from_numpy(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(x).view(dtype)


def emulate(
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    options: dict[str, Any],
    white: bool = True,
    seed: int = 0,
    geometry: bool = True,
    **more: Any,
) -> Arrays:
    """What the forward and the backward kernel give for outputs_and_gradients."""
    rays, samples = inputs[0].shape[:2]
    arrays = {name: to_numpy(x) for name, x in zip(INPUTS, inputs, strict=True)}
    scalars = {"white_background": int(white), "density_bias": 0.0, "rgb_padding": 0.0}
    scalars |= {name: options.get(name) or "none" for name in ("density_activation", "rgb_activation")}
    scalars |= options
    shapes = {"rgb": (rays, 3), "distance": (rays,), "acc": (rays,), "weights": (rays, samples)}
    outputs: dict[str, Any] = {f"out_{name}": (shape, np.float32) for name, shape in shapes.items()}
    forward = harness.run("composite", arrays, outputs, {**scalars, "kernel": "forward"}, seed, **more)
    names = ("cot_rgb", "cot_distance", "cot_acc", "cot_weights")
    given = {n: None if c is None else to_numpy(c) for n, c in zip(names, cotangents, strict=True)}
    wanted = INPUTS if geometry else INPUTS[:2]
    outputs = {f"grad_{name}": (arrays[name].shape, arrays[name].dtype) for name in wanted}
    backward = harness.run("composite", {**arrays, **given}, outputs, {**scalars, "kernel": "backward"}, seed)
    grads = [from_numpy(backward[f"grad_{n}"], x.dtype) for n, x in zip(wanted, inputs, strict=False)]
    return (*[from_numpy(forward[f"out_{name}"], torch.float32) for name in shapes], *grads)


# Every tile count, aligned and not; then the same in shuffled orders.
EMULATED = [(9, 1, 0), (9, 31, 1), (10, 64, 2), (9, 128, 3), (9, 131, 4), (2, 1024, 5), (1, 2500, 6)]


@pytest.mark.parametrize("activations", list(ACTIVATIONS))
@pytest.mark.parametrize(("rays", "samples", "seed"), EMULATED)
def test_cuda_kernels_emulated(rays: int, samples: int, seed: int, activations: str) -> None:
    options, white = ACTIVATIONS[activations], seed % 2 == 0
    inputs, cotangents = make_inputs(rays, samples, bool(options)), make_cotangents(rays, samples)
    got = emulate(inputs, cotangents, options, white, seed)
    assert all(x.isfinite().all() for x in got)
    assert_agrees(got, inputs, cotangents, white, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rays", "samples"), [(9, 32), (3, 45)])
def test_cuda_kernels_emulated_in_16_bits(rays: int, samples: int, dtype: torch.dtype) -> None:
    inputs, cotangents = make_inputs(rays, samples, True, dtype=dtype), make_cotangents(rays, samples)
    got = emulate(inputs, cotangents, RAW, seed=7)
    assert_agrees(got, inputs, cotangents, **RAW)


@pytest.mark.parametrize("seed", range(4))
def test_cuda_kernels_emulated_with_some_gradients(seed: int) -> None:
    """Any of the four cotangents missing, the geometry not wanted, arrays off alignment."""
    inputs, cotangents = make_inputs(9, 132, True), make_cotangents(9, 132)
    given = [None if i == seed else c for i, c in enumerate(cotangents)]
    zeros = [torch.zeros_like(c) if i == seed else c for i, c in enumerate(cotangents)]
    misalign = {"rgb": 4, "density": 8, "out_weights": 12} if seed % 2 else {}
    got = emulate(inputs, given, RAW, seed=seed, geometry=seed > 1, misalign=misalign)
    assert_agrees(got, inputs, zeros, **RAW)


@pytest.mark.parametrize(
    ("rays", "samples", "fenceposts", "seed"),
    [(5, 1, 2, 0), (9, 128, 129, 1), (9, 131, 50, 2), (2, 1000, 1025, 3)],
)
def test_cuda_fused_kernel_emulated(rays: int, samples: int, fenceposts: int, seed: int) -> None:
    """The weights are those of the forward kernel, the fenceposts those of the resampling kernel, bit by bit."""
    inputs = make_inputs(rays, samples, True)
    arrays = {name: to_numpy(x) for name, x in zip(INPUTS, inputs, strict=True)}
    u = torch.rand(rays, fenceposts).numpy() if seed % 2 else None
    shapes = {"rgb": (rays, 3), "distance": (rays,), "acc": (rays,), "weights": (rays, samples)}
    outputs = {f"out_{name}": (shape, np.float32) for name, shape in shapes.items()}
    scalars = {**RAW, "white_background": 1}
    plain = harness.run("composite", arrays, outputs, {**scalars, "kernel": "forward"}, seed)
    new = {"out_t_vals": ((rays, fenceposts), np.float32)}
    fused = harness.run(
        "composite",
        {**arrays, "u": u},
        {**outputs, **new},
        {**scalars, "kernel": "fused", "padding": 0.01},
        seed,
    )
    assert all(np.array_equal(fused[name], plain[name]) for name in outputs)
    apart = harness.run(
        "resample",
        {"t_vals": arrays["t_vals"], "weights": plain["out_weights"], "u": u},
        new,
        {"padding": 0.01},
        seed,
    )
    assert np.array_equal(fused["out_t_vals"], apart["out_t_vals"])
