"""Compositing behind the fused network's forward: inputs for both kernel generations, and what it should give."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mipnerf_fast import reference

ACTIVATIONS = {"density": (None, "softplus", "relu"), "rgb": (None, "sigmoid")}
# As mip-NeRF composites, and as NeRF does.
OPTIONS: list[dict[str, Any]] = [
    {
        "density": "softplus",
        "rgb": "sigmoid",
        "white_background": 1,
        "density_bias": -1.0,
        "rgb_padding": 0.001,
    },
    {"density": "relu", "rgb": "sigmoid", "white_background": 0, "density_bias": 0.5, "rgb_padding": 0.0},
]


def make_rays(rays: int, samples_per_ray: int, seed: int = 3) -> dict[str, np.ndarray]:
    """Fenceposts and rays as the encoding takes them, some intervals empty."""
    rng = np.random.default_rng(seed)
    t_vals = np.sort(rng.uniform(2, 6, (rays, samples_per_ray + 1)), 1)
    if samples_per_ray > 3:
        t_vals[:, 2] = t_vals[:, 3]
    arrays = {
        "t_vals": t_vals,
        "origins": rng.normal(size=(rays, 3)),
        "directions": rng.normal(size=(rays, 3)),
        "radii": rng.uniform(1e-3, 1e-2, (rays, 1)),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def outputs(rays: int, samples_per_ray: int) -> dict[str, Any]:
    shapes = {"pixels": (rays, 3), "distance": (rays,), "acc": (rays,), "weights": (rays, samples_per_ray)}
    return {name: (shape, np.float32) for name, shape in shapes.items()}


def scalars(options: dict[str, Any]) -> dict[str, Any]:
    numbers = {f"{kind}_activation": ACTIVATIONS[kind].index(options[kind]) for kind in ("density", "rgb")}
    return numbers | {name: value for name, value in options.items() if name not in ("density", "rgb")}


def check(
    found: dict[str, np.ndarray],
    raw_rgb: np.ndarray,
    raw_density: np.ndarray,
    rays: dict[str, np.ndarray],
    options: dict[str, Any],
) -> None:
    """Against the reference over the same raw numbers: twice its error in float32, and four ulps of the largest."""
    count, samples = rays["t_vals"].shape[0], rays["t_vals"].shape[1] - 1
    results = []
    for dtype in (torch.float32, torch.float64):
        given = (raw_rgb.reshape(count, samples, 3), raw_density.reshape(count, samples, 1))
        inputs = [torch.from_numpy(x.copy()).to(dtype) for x in (*given, rays["t_vals"], rays["directions"])]
        results.append(
            reference.composite(
                *inputs,
                bool(options["white_background"]),
                density_activation=options["density"],
                density_bias=options["density_bias"],
                rgb_activation=options["rgb"],
                rgb_padding=options["rgb_padding"],
            )
        )
    for name, rounded, exact in zip(("pixels", "distance", "acc", "weights"), *results, strict=True):
        largest = float(exact.abs().max())
        allowed = 2 * float((rounded.double() - exact).abs().max()) + 4 * 2.0**-23 * max(largest, 1.0)
        error = np.abs(found[name].reshape(exact.shape) - exact.numpy())
        assert error.max() <= allowed, (name, error.max(), allowed)
