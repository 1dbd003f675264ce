"""Every array of the official implementation (float64), reproduced in float64 to 1e-9 and in float32 within a bound.

The float32 bound of an array is stated from its condition number, never from the observed error: every input is moved
by one float32 ulp, up or down at random, several times over, and the largest change of the output (computed in
float64) is multiplied by the number of roundings on the longest way from an input to the output. For the encodings
that number contains the 2^15 phase amplification, because moving a mean by an ulp moves the phase by 2^15 of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mipnerf_fast import (
    MipNerf,
    MipNerfConfig,
    Rays,
    cameras,
    losses,
    metrics,
    reference,
    schedules,
    use_backend,
)
from mipnerf_fast.data import multiscale

OFFICIAL = dict(np.load(Path(__file__).parent / "data" / "official_mipnerf.npz"))
RTOL_FLOAT64 = 1e-9
# Roundings on the longest chain from an input to an output, counted generously: moments 8, lifting 4, phase and
# attenuation 4, compositing 10; ten layers of the network, forward and backward, round once per layer each.
ROUNDINGS = 32
TRIALS = 4
ULP = 2.0**-23

Arrays = dict[str, Tensor]


def t(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.asarray(OFFICIAL[name])).to(dtype)


def hash_uniform(tag: int, rows: int, cols: int) -> np.ndarray:
    """The hash that golden/README.md defines, so that weights and probes need no storage."""
    i = np.arange(rows, dtype=np.uint32)[:, None]
    j = np.arange(cols, dtype=np.uint32)[None, :]
    with np.errstate(over="ignore"):
        x = np.uint32(tag * 0x9E3779B1 & 0xFFFFFFFF) + i * np.uint32(0x85EBCA77) + j * np.uint32(0xC2B2AE3D)
        x = x + np.uint32(1)
        x ^= x >> np.uint32(15)
        x *= np.uint32(0x2C1B3C6D)
        x ^= x >> np.uint32(12)
        x *= np.uint32(0x297A2D39)
        x ^= x >> np.uint32(15)
    return x.astype(np.float64) / 2**32


def gaussians(shape: str) -> Callable[[Arrays], Arrays]:
    def run(a: Arrays) -> Arrays:
        rays = (a["t_vals"], a["origins"], a["directions"], a["radii"])
        means, variances = reference.frustum_gaussians(*rays, shape=shape)
        _, full = reference.frustum_gaussians(*(x[:6] for x in rays), shape=shape, full_covariance=True)
        out = {
            f"{shape}_means": means,
            f"{shape}_variances": variances,
            f"{shape}_full_covariances": full,
            f"{shape}_ipe_deg0_16": reference.integrated_pos_enc(means[:8], variances[:8], 0, 16),
        }
        if shape == "cone":
            out["cone_pe_deg0_10"] = reference.frustum_ipe(
                *(x[:6] for x in rays), max_deg=10, integrated=False
            )
        return out

    return run


def view_encoding(a: Arrays) -> Arrays:
    return {"viewdirs_enc_deg0_4": reference.pos_enc(a["viewdirs"], 0, 4)}


def ipe_gradients(a: Arrays) -> Arrays:
    names = ("t_vals", "origins", "directions", "radii")
    leaves = [a[name].detach().requires_grad_() for name in names]
    features = reference.frustum_ipe(*leaves, max_deg=8)
    grads = torch.autograd.grad((features * a["ipe_deg0_8_cotangent"]).sum(), leaves)
    return {f"ipe_deg0_8_grad_{name}": grad for name, grad in zip(names, grads, strict=True)}


def compositing(a: Arrays) -> Arrays:
    out: Arrays = {}
    leaves = [a[name].detach().requires_grad_() for name in ("rgb", "density", "t_vals")]
    for name, white in (("white", True), ("black", False)):
        result = reference.composite(*leaves, a["directions"], white)
        out |= {f"composite_{name}_{field}": getattr(result, field) for field in result._fields}
        if white:
            value = (
                (result.rgb * a["composite_cot_rgb"]).sum()
                + (result.acc * a["composite_cot_acc"]).sum()
                + (result.weights * a["composite_cot_weights"]).sum()
            )
            grads = torch.autograd.grad(value, leaves)
            for field, grad in zip(("rgb", "density", "t_vals"), grads, strict=True):
                out[f"composite_white_grad_{field}"] = grad
    return out


def resampling(a: Arrays) -> Arrays:
    weights = reference.composite(a["rgb"], a["density"], a["t_vals"], a["directions"]).weights
    return {
        "resample_t_vals": reference.resample(a["t_vals"], weights),
        "pdf_samples_same": reference.sample_piecewise_constant(a["t_vals"], a["pdf_weights"], 33),
        "pdf_samples_101": reference.sample_piecewise_constant(a["t_vals"], a["pdf_weights"], 101),
        "sample_t_vals_linear": reference.sample_t_vals(a["near"], a["far"], 32),
        "sample_t_vals_lindisp": reference.sample_t_vals(a["near"], a["far"], 32, lindisp=True),
    }


def image_metrics(a: Arrays) -> Arrays:
    return {"ssim": metrics.ssim(a["ssim_a"], a["ssim_b"]), "psnr": metrics.psnr(a["ssim_a"], a["ssim_b"])}


def camera_rays(a: Arrays) -> Arrays:
    height, width, focal = (float(x) for x in OFFICIAL["camera_hwf"])
    rays = cameras.pinhole_rays(a["camera_c2w"], int(height), int(width), focal)
    ndc = cameras.ndc_rays(a["ndc_in_origins"], a["ndc_in_directions"], focal, int(width), int(height))
    return {
        "camera_origins": rays.origins,
        "camera_directions": rays.directions,
        "camera_viewdirs": rays.viewdirs,
        "camera_radii": rays.radii,
        "ndc_origins": ndc[0],
        "ndc_directions": ndc[1],
    }


def whole_model(a: Arrays) -> Arrays:
    seed = int(OFFICIAL["model_weight_seed"])
    model = MipNerf(MipNerfConfig(num_samples=int(OFFICIAL["model_num_samples"]))).to(a["origins"].dtype)
    for k, linear in enumerate(model.mlp.linears):
        rows, cols = linear.in_features, linear.out_features
        kernel = (2 * hash_uniform(seed + k, rows, cols) - 1) * np.sqrt(6 / (rows + cols))
        bias = (2 * hash_uniform(seed + k + 1000, 1, cols)[0] - 1) * 0.1
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(kernel.astype(np.float32).T))
            linear.bias.copy_(torch.from_numpy(bias.astype(np.float32)))
    names = ("origins", "directions", "viewdirs", "radii", "near", "far")
    rays = Rays(*(a[name] for name in names), a["model_lossmult"])
    with use_backend("reference"):
        levels = model(rays)
    out: Arrays = {}
    for k, level in enumerate(levels):
        out |= {f"model_level{k}_{field}": getattr(level, field) for field in ("rgb", "distance", "acc")}
    per_level = [losses.weighted_loss(level.rgb, a["model_target"], a["model_lossmult"]) for level in levels]
    loss = 0.1 * per_level[0] + per_level[1]
    loss.backward()
    out["model_loss"] = loss
    for k, linear in enumerate(model.mlp.linears):
        kernel, bias = linear.weight.grad.T.double(), linear.bias.grad.double()
        out[f"model_grad_layer{k}_norms"] = torch.stack([kernel.norm(), bias.norm()])
        probes = [
            (kernel * torch.from_numpy(2 * hash_uniform(seed + 500 + q, *kernel.shape) - 1)).sum()
            for q in range(3)
        ]
        probes += [
            (bias * torch.from_numpy(2 * hash_uniform(seed + 600 + q, 1, len(bias))[0] - 1)).sum()
            for q in range(3)
        ]
        out[f"model_grad_layer{k}_probes"] = torch.stack(probes)
    return out


RAYS = ["t_vals", "origins", "directions", "radii"]
GROUPS: dict[Callable[[Arrays], Arrays], list[str]] = {
    gaussians("cone"): RAYS,
    gaussians("cylinder"): RAYS,
    view_encoding: ["viewdirs"],
    ipe_gradients: [*RAYS, "ipe_deg0_8_cotangent"],
    compositing: [
        *("rgb", "density", "t_vals", "directions"),
        *("composite_cot_rgb", "composite_cot_acc", "composite_cot_weights"),
    ],
    resampling: ["rgb", "density", "t_vals", "directions", "near", "far", "pdf_weights"],
    image_metrics: ["ssim_a", "ssim_b"],
    camera_rays: ["camera_c2w", "ndc_in_origins", "ndc_in_directions"],
    whole_model: [
        *("origins", "directions", "viewdirs", "radii", "near", "far"),
        *("model_target", "model_lossmult"),
    ],
}
NAMES = ["cone", "cylinder", "views", "ipe_gradients", "composite", "resample", "metrics", "cameras", "model"]
BY_NAME = dict(zip(NAMES, GROUPS.items(), strict=True))


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm())


@pytest.mark.parametrize("name", NAMES)
def test_float64_reproduces_the_official_values(name: str) -> None:
    function, inputs = BY_NAME[name]
    for key, got in function({i: t(i) for i in inputs}).items():
        want = t(key)
        assert got.shape == want.shape, key
        error = distance(got.detach(), want) / float(want.norm())
        assert error <= RTOL_FLOAT64, f"{key}: relative error {error:.2e}"


@pytest.mark.parametrize("name", NAMES)
def test_float32_stays_within_its_condition(name: str) -> None:
    function, inputs = BY_NAME[name]
    exact = {i: t(i) for i in inputs}
    generator = torch.Generator().manual_seed(1)
    base = {key: value.detach() for key, value in function(exact).items()}
    sensitivity = dict.fromkeys(base, 0.0)
    for _ in range(TRIALS):
        moved = {
            key: x * (1 + ULP * (2 * torch.randint(0, 2, x.shape, generator=generator) - 1))
            for key, x in exact.items()
        }
        for key, value in function(moved).items():
            sensitivity[key] = max(sensitivity[key], distance(value.detach(), base[key]))
    got = function({i: t(i, torch.float32) for i in inputs})
    for key, value in got.items():
        want = t(key)
        bound = ROUNDINGS * (sensitivity[key] + ULP / 2 * float(want.norm()))
        error = distance(value.detach(), want)
        assert error <= bound, f"{key}: error {error:.2e} above {bound:.2e}"
        # A bound near the value itself would let anything pass. The largest is a quarter: the gradient of layer 0
        # through the top octaves, where an ulp of the mean is 2^-8 of a radian.
        assert bound < 0.5 * float(want.norm()), (
            f"{key}: vacuous bound {bound:.2e} for {float(want.norm()):.2e}"
        )


def test_schedule_and_average_error() -> None:
    values = [
        schedules.learning_rate(int(step), 5e-4, 5e-6, 1_000_000, 2500, 0.01) for step in OFFICIAL["lr_steps"]
    ]
    assert np.linalg.norm(values - OFFICIAL["lr_values"]) <= RTOL_FLOAT64 * np.linalg.norm(
        OFFICIAL["lr_values"]
    )
    error = metrics.average_error(*OFFICIAL["avg_error_inputs"])
    assert abs(error - float(OFFICIAL["avg_error"])) <= RTOL_FLOAT64 * float(OFFICIAL["avg_error"])


def test_pyramid_is_bit_exact() -> None:
    level = OFFICIAL["pyramid_d0"].astype(np.float32) / np.float32(255)
    for k in range(1, 4):
        level = multiscale.downsample2(level)
        assert np.array_equal((level * 255).astype(np.uint8), OFFICIAL[f"pyramid_d{k}"]), f"level {k}"


def test_every_official_array_is_compared() -> None:
    covered = {"lr_values", "avg_error", "pyramid_d1", "pyramid_d2", "pyramid_d3"}
    inputs = {
        "lr_steps",
        "avg_error_inputs",
        "pyramid_d0",
        "camera_hwf",
        "model_num_samples",
        "model_weight_seed",
    }
    for function, names in GROUPS.items():
        inputs |= set(names)
        covered |= set(function({i: t(i) for i in names}))
    assert covered | inputs == set(OFFICIAL)
    assert not covered & inputs
