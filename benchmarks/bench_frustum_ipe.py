"""frustum_ipe beside a straight PyTorch port of the official lines and torch.compile of that port.

python benchmarks/bench_frustum_ipe.py [--device cpu|cuda] [--threads 1 2]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Case, Inputs, Outputs, main
from mipnerf_fast import ops, reference, use_backend

RAY_INPUTS = ("t_vals", "origins", "directions", "radii")


def official_frustum_ipe(t_vals: Tensor, origins: Tensor, directions: Tensor, radii: Tensor) -> Tensor:
    """What the official implementation does, operation by operation, in PyTorch (its unused outputs left out).

    Its cosine is a sine of y + pi/2, over the concatenation of both, with its reduction of large arguments.
    """
    t0, t1 = t_vals[..., :-1], t_vals[..., 1:]
    mu, hw = (t0 + t1) / 2, (t1 - t0) / 2
    t_mean = mu + (2 * mu * hw**2) / (3 * mu**2 + hw**2)
    t_var = hw**2 / 3 - (4 / 15) * (hw**4 * (12 * mu**2 - hw**2) / (3 * mu**2 + hw**2) ** 2)
    r_var = radii**2 * (mu**2 / 4 + (5 / 12) * hw**2 - 4 / 15 * hw**4 / (3 * mu**2 + hw**2))
    mean = directions[..., None, :] * t_mean[..., None]
    norm2 = torch.clamp(torch.sum(directions**2, dim=-1, keepdim=True), min=1e-10)
    squared = directions**2
    along = t_var[..., None] * squared[..., None, :]
    across = r_var[..., None] * (1 - squared / norm2)[..., None, :]
    mean, variance = mean + origins[..., None, :], along + across

    scales = 2.0 ** torch.arange(16, dtype=mean.dtype, device=mean.device)
    shape = (*mean.shape[:-1], -1)
    y = (mean[..., None, :] * scales[:, None]).reshape(shape)
    y_variance = (variance[..., None, :] * scales[:, None] ** 2).reshape(shape)
    x = torch.cat([y, y + 0.5 * math.pi], -1)
    x_variance = torch.cat([y_variance, y_variance], -1)
    period = 100 * math.pi
    return torch.exp(-0.5 * x_variance) * torch.sin(torch.where(x.abs() < period, x, x % period))


def make_inputs(rays: int, samples: int) -> Callable[[int, torch.device], Inputs]:
    """Cameras four units from the origin, near 2 and far 6, jittered fenceposts: a Blender scene's rays."""

    def make(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(rays, 3, generator=generator)
        directions /= directions.norm(dim=-1, keepdim=True)
        grid = torch.linspace(2, 6, samples + 1)
        jitter = (torch.rand(rays, samples + 1, generator=generator) - 0.5) * 4 / samples
        inputs = {
            "t_vals": (grid + jitter).clamp(2, 6),
            "origins": -4 * directions + 0.3 * torch.randn(rays, 3, generator=generator),
            "directions": directions,
            "radii": 5.2e-4 * torch.ones(rays, 1),
        }
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    return make


def ray_inputs(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four arguments in the operator's order."""
    return inputs["t_vals"], inputs["origins"], inputs["directions"], inputs["radii"]


def forward_case(rays: int, samples: int, dtype: torch.dtype, graph: bool = False) -> Case:
    size = torch.empty((), dtype=dtype).element_size()

    def native(inputs: Inputs) -> Outputs:
        with use_backend("native"):
            return {"features": ops.frustum_ipe(*ray_inputs(inputs), out_dtype=dtype)}

    def variants() -> dict[str, Callable[[Inputs], Outputs]]:
        def eager(*tensors: Tensor) -> Tensor:
            return official_frustum_ipe(*tensors).to(dtype)

        compiled = torch.compile(eager)
        return {
            "eager": lambda inputs: {"features": eager(*ray_inputs(inputs))},
            "compile": lambda inputs: {"features": compiled(*ray_inputs(inputs))},
            "native": native,
        }

    return Case(
        name=f"forward, {rays} x {samples}, {str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs(rays, samples),
        variants=variants,
        truth=lambda inputs: {
            "features": reference.frustum_ipe(
                *ray_inputs({name: value.double() for name, value in inputs.items()})
            )
        },
        # The straight port decides what is allowed: its errors in the top octaves are part of its results.
        reference=lambda inputs: {"features": official_frustum_ipe(*ray_inputs(inputs)).to(dtype)},
        floor=4 * torch.finfo(dtype).eps,
        floor_why="4 units in the last place of 1",
        moved_bytes=rays * (4 * (samples + 8) + samples * 96 * size),
        # Moments and range reduction about 150, then per feature pair: reduction 4, sine and cosine 11, factor 8.
        flops=rays * samples * (150 + 48 * 25),
        graph=graph,
    )


def backward_case(rays: int, samples: int) -> Case:
    """Forward and backward with gradients to every input."""

    def with_gradients(encode: Callable[..., Tensor]) -> Callable[[Inputs], Outputs]:
        def run(inputs: Inputs) -> Outputs:
            leaves = [inputs[name].detach().requires_grad_() for name in RAY_INPUTS]
            grads = torch.autograd.grad(encode(*leaves), leaves, inputs["cotangent"].to(leaves[0].dtype))
            # The gradient of t_vals reaches 2^15 times the cotangent; errors are relative to the largest entry.
            return {
                name: grad / inputs[f"scale_{name}"] for name, grad in zip(RAY_INPUTS, grads, strict=True)
            }

        return run

    def native(t_vals: Tensor, origins: Tensor, directions: Tensor, radii: Tensor) -> Tensor:
        with use_backend("native"):
            return ops.frustum_ipe(t_vals, origins, directions, radii)

    def make(seed: int, device: torch.device) -> Inputs:
        inputs = make_inputs(rays, samples)(seed, device)
        generator = torch.Generator().manual_seed(seed)
        inputs["cotangent"] = torch.randn(rays, samples, 96, generator=generator).to(device)
        leaves = ray_inputs({name: inputs[name].requires_grad_() for name in RAY_INPUTS})
        grads = torch.autograd.grad(reference.frustum_ipe(*leaves), leaves, inputs["cotangent"])
        for name, grad in zip(RAY_INPUTS, grads, strict=True):
            inputs[f"scale_{name}"] = grad.abs().max()
        return inputs

    def double(inputs: Inputs) -> Outputs:
        return with_gradients(reference.frustum_ipe)({name: value.double() for name, value in inputs.items()})

    return Case(
        name=f"forward + backward, {rays} x {samples}, float32",
        make_inputs=make,
        variants=lambda: {
            "eager": with_gradients(official_frustum_ipe),
            "compile": with_gradients(torch.compile(official_frustum_ipe)),
            "native": with_gradients(native),
        },
        truth=double,
        reference=with_gradients(official_frustum_ipe),
        floor=1e-6,
        floor_why="relative to the largest entry of a gradient",
        moved_bytes=rays * (2 * 4 * (samples + 8) + 4 * (samples + 8) + 2 * samples * 96 * 4),
        flops=rays * samples * 2 * (150 + 48 * 30),
    )


def cases(device: torch.device) -> Sequence[Case]:
    """4096 x 64 is the yardstick on the CPU, 64 x 64 shows that small batches do not lose; a GPU gets 512 MB."""
    if device.type == "cuda":
        return [
            forward_case(32768, 128, torch.float32),
            forward_case(32768, 128, torch.bfloat16),
            forward_case(4096, 128, torch.bfloat16, graph=True),
            backward_case(16384, 128),
        ]
    return [
        forward_case(4096, 64, torch.float32),
        forward_case(64, 64, torch.float32),
        forward_case(4096, 64, torch.bfloat16),
        backward_case(1024, 64),
    ]


if __name__ == "__main__":
    main("frustum_ipe", cases, __doc__ or "")
