"""composite beside a straight PyTorch port of the official lines and torch.compile of that port.

python benchmarks/bench_composite.py [--device cpu|cuda] [--threads 1 2]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_resample import official_resample
from benchmarks.harness import Case, Inputs, Outputs, main
from mipnerf_fast import ops, reference, use_backend

NAMES = ("rgb", "density", "t_vals", "directions")
RAW: dict[str, Any] = {
    "density_activation": "softplus",
    "density_bias": -1.0,
    "rgb_activation": "sigmoid",
    "rgb_padding": 0.001,
}
Level = tuple[Tensor, Tensor, Tensor, Tensor]


def official_composite(rgb: Tensor, density: Tensor, t_vals: Tensor, directions: Tensor, raw: bool) -> Level:
    """What the official implementation does, operation by operation, in PyTorch; with raw inputs its activations."""
    if raw:
        density = functional.softplus(density - 1)
        rgb = torch.sigmoid(rgb) * (1 + 2 * 0.001) - 0.001
    t_mids = 0.5 * (t_vals[..., :-1] + t_vals[..., 1:])
    t_dists = t_vals[..., 1:] - t_vals[..., :-1]
    delta = t_dists * torch.linalg.norm(directions[..., None, :], dim=-1)
    density_delta = density[..., 0] * delta
    alpha = 1 - torch.exp(-density_delta)
    before = [torch.zeros_like(density_delta[..., :1]), torch.cumsum(density_delta[..., :-1], -1)]
    weights = alpha * torch.exp(-torch.cat(before, -1))
    comp_rgb = (weights[..., None] * rgb).sum(-2)
    acc = weights.sum(-1)
    distance = torch.nan_to_num((weights * t_mids).sum(-1) / acc)
    distance = torch.minimum(torch.maximum(distance, t_vals[:, 0]), t_vals[:, -1])
    return comp_rgb + (1 - acc[..., None]), distance, acc, weights


def make_inputs(
    rays: int, samples: int, raw: bool, dtype: torch.dtype
) -> Callable[[int, torch.device], Inputs]:
    def make(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        grid = torch.linspace(2, 6, samples + 1)
        inputs = {
            "rgb": (4 * rand(rays, samples, 3) - 2 if raw else rand(rays, samples, 3)).to(dtype),
            "density": (4 * rand(rays, samples, 1) - 2 if raw else 3 * rand(rays, samples, 1)).to(dtype),
            "t_vals": (grid + (rand(rays, samples + 1) - 0.5) * 4 / samples).clamp(2, 6),
            "directions": functional.normalize(rand(rays, 3) - 0.5, dim=-1),
            "cotangent": rand(rays, 3),
            "u": rand(rays, samples + 1).clamp(max=1 - 2**-24),
        }
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    return make


def in_double(run: Callable[[Inputs], Outputs]) -> Callable[[Inputs], Outputs]:
    return lambda inputs: run({name: tensor.double() for name, tensor in inputs.items()})


def training(composite: Callable[..., Any]) -> Callable[[Inputs], Outputs]:
    """Forward and backward as in training: from the colour to the network's outputs."""

    def run(inputs: Inputs) -> Outputs:
        leaves = [inputs[name].detach().requires_grad_() for name in NAMES[:2]]
        level = composite(*leaves, inputs["t_vals"], inputs["directions"])
        grads = torch.autograd.grad(level[0], leaves, inputs["cotangent"].to(level[0].dtype))
        outputs = dict(zip(("rgb", "distance", "acc", "weights"), level, strict=True))
        return {**outputs, "grad_rgb": grads[0], "grad_density": grads[1]}

    return run


def rendering(composite: Callable[..., Any]) -> Callable[[Inputs], Outputs]:
    def run(inputs: Inputs) -> Outputs:
        with torch.no_grad():
            level = composite(*[inputs[name] for name in NAMES])
        return dict(zip(("rgb", "distance", "acc", "weights"), level, strict=True))

    return run


def case(
    rays: int,
    samples: int,
    raw: bool = False,
    backward: bool = True,
    dtype: torch.dtype = torch.float32,
    graph: bool = False,
) -> Case:
    wrap = training if backward else rendering
    options = RAW if raw else {}

    def official(*tensors: Tensor) -> Level:
        rgb, density, t_vals, directions = tensors
        return official_composite(rgb.to(t_vals.dtype), density.to(t_vals.dtype), t_vals, directions, raw)

    def native(rgb: Tensor, density: Tensor, t_vals: Tensor, directions: Tensor) -> Any:
        with use_backend("native"):
            return ops.composite(rgb, density, t_vals, directions, **options)

    size = torch.empty((), dtype=dtype).element_size()
    per_sample = 4 * size + 4 + 4 + (8 * size + 4 if backward else 0)
    what = "forward + backward" if backward else "forward"
    return Case(
        name=f"{what}, {rays} x {samples}, {'raw ' if raw else ''}{str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs(rays, samples, raw, dtype),
        variants=lambda: {
            "eager": wrap(official),
            "compile": wrap(torch.compile(official)),
            "native": wrap(native),
        },
        truth=in_double(wrap(lambda *tensors: reference.composite(*tensors, **options))),
        reference=wrap(official),
        floor=1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps,
        floor_why="16 roundings of 1 (gradients in 16 bits: half a unit in their last place)",
        moved_bytes=rays * samples * per_sample,
        flops=rays * samples * ((30 + 20 * raw) + (40 + 20 * raw) * backward),
        graph=graph,
    )


def coarse_case(rays: int, samples: int, graph: bool = False) -> Case:
    """The whole of the coarse level in a rendering: compositing, and the fenceposts of the next level."""

    def run(level: Callable[..., tuple[Any, Tensor]]) -> Callable[[Inputs], Outputs]:
        def call(inputs: Inputs) -> Outputs:
            with torch.no_grad():
                composite, t_vals = level(*[inputs[name] for name in NAMES], inputs["u"])
            return {"rgb": composite[0], "weights": composite[3], "t_vals": t_vals}

        return call

    def official(
        rgb: Tensor, density: Tensor, t_vals: Tensor, directions: Tensor, u: Tensor
    ) -> tuple[Level, Tensor]:
        level = official_composite(rgb, density, t_vals, directions, True)
        return level, official_resample(t_vals, level[3], u)

    def native(
        rgb: Tensor, density: Tensor, t_vals: Tensor, directions: Tensor, u: Tensor
    ) -> tuple[Any, Tensor]:
        with use_backend("native"):
            return ops.composite_resample(rgb, density, t_vals, directions, **RAW, u=u)

    def truth(
        rgb: Tensor, density: Tensor, t_vals: Tensor, directions: Tensor, u: Tensor
    ) -> tuple[Any, Tensor]:
        level = reference.composite(rgb, density, t_vals, directions, **RAW)
        return level, reference.resample(t_vals, level.weights, u=u)

    return Case(
        name=f"coarse level, {rays} x {samples}, raw float32",
        make_inputs=make_inputs(rays, samples, True, torch.float32),
        variants=lambda: {
            "eager": run(official),
            "compile": run(torch.compile(official)),
            "native": run(native),
        },
        truth=in_double(run(truth)),
        reference=run(official),
        floor=1e-6,
        floor_why="16 roundings of 1 (gradients in 16 bits: half a unit in their last place)",
        moved_bytes=rays * samples * (16 + 4 + 4 + 4 + 4),
        flops=rays * samples * 110,
        graph=graph,
    )


def cases(device: torch.device) -> Sequence[Case]:
    """4096 x 64 is the yardstick on the CPU, 64 x 64 shows that small batches do not lose; a GPU gets 512 MB."""
    if device.type == "cuda":
        return [
            case(262144, 128, backward=False),
            case(262144, 128),
            case(262144, 128, raw=True, dtype=torch.bfloat16),
            case(4096, 128, raw=True, backward=False, graph=True),
            case(4096, 128, raw=True, graph=True),
            coarse_case(4096, 128, graph=True),
        ]
    return [
        case(4096, 64),
        case(4096, 64, raw=True),
        case(4096, 64, backward=False),
        case(64, 64),
        case(64, 64, raw=True),
        coarse_case(4096, 64),
    ]


if __name__ == "__main__":
    main("composite", cases, __doc__ or "")
