"""resample beside a straight PyTorch port of the official lines (with searchsorted) and torch.compile of that port.

python benchmarks/bench_resample.py [--device cpu|cuda] [--threads 1 2]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Case, Inputs, Outputs, main
from mipnerf_fast import ops, reference, use_backend

EPSILON = 2.0**-23


def official_resample(t_vals: Tensor, weights: Tensor, u: Tensor | None, padding: float = 0.01) -> Tensor:
    """What the official implementation does, operation by operation, in PyTorch.

    Where it compares every position with every edge of the CDF, in a mask [B, M, N+1], PyTorch's searchsorted stands.
    """
    padded = torch.cat([weights[..., :1], weights, weights[..., -1:]], -1)
    maxima = torch.maximum(padded[..., :-1], padded[..., 1:])
    weights = 0.5 * (maxima[..., :-1] + maxima[..., 1:]) + padding

    weight_sum = weights.sum(-1, keepdim=True)
    missing = torch.clamp(1e-5 - weight_sum, min=0)
    weights = weights + missing / weights.shape[-1]
    weight_sum = weight_sum + missing
    pdf = weights / weight_sum
    cdf = torch.clamp(torch.cumsum(pdf[..., :-1], -1), max=1)
    cdf = torch.cat([torch.zeros_like(cdf[..., :1]), cdf, torch.ones_like(cdf[..., :1])], -1)

    m = t_vals.shape[-1]
    if u is None:
        position = torch.linspace(0, 1 - EPSILON, m, dtype=cdf.dtype, device=cdf.device).expand(len(cdf), m)
        position = position.contiguous()
    else:
        steps = torch.arange(m, dtype=cdf.dtype, device=cdf.device) / m
        position = torch.clamp(steps + u * (1 / m - EPSILON), max=1 - EPSILON)
    above = torch.searchsorted(cdf, position, right=True)
    below = torch.clamp(above - 1, min=0)
    above = torch.clamp(above, max=cdf.shape[-1] - 1)
    bins0, bins1 = torch.gather(t_vals, -1, below), torch.gather(t_vals, -1, above)
    cdf0, cdf1 = torch.gather(cdf, -1, below), torch.gather(cdf, -1, above)
    fraction = torch.clamp(torch.nan_to_num((position - cdf0) / (cdf1 - cdf0)), 0, 1)
    return bins0 + fraction * (bins1 - bins0)


def make_inputs(rays: int, samples: int, with_u: bool) -> Callable[[int, torch.device], Inputs]:
    """Fenceposts between 2 and 6, and the weights of a ray that meets one surface."""

    def make(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        grid = torch.linspace(2, 6, samples + 1)
        t_vals = (grid + (rand(rays, samples + 1) - 0.5) * 4 / samples).clamp(2, 6)
        distance = (t_vals[:, 1:] - 2 - 4 * rand(rays, 1)) * 5
        inputs = {"t_vals": t_vals, "weights": 0.2 * torch.exp(-(distance**2)) * rand(rays, samples)}
        if with_u:
            inputs["u"] = rand(rays, samples + 1).clamp(max=1 - 2**-24)
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    return make


def case(rays: int, samples: int, with_u: bool, graph: bool = False) -> Case:
    def wrap(resample: Callable[..., Tensor]) -> Callable[[Inputs], Outputs]:
        return lambda inputs: {"t_vals": resample(inputs["t_vals"], inputs["weights"], inputs.get("u"))}

    def native(t_vals: Tensor, weights: Tensor, u: Tensor | None) -> Tensor:
        with use_backend("native"):
            return ops.resample(t_vals, weights, u=u)

    def truth(inputs: Inputs) -> Outputs:
        double = {name: tensor.double() for name, tensor in inputs.items()}
        return wrap(lambda t_vals, weights, u: reference.resample(t_vals, weights, u=u))(double)

    return Case(
        name=f"{rays} x {samples}, {'stratified' if with_u else 'even'}",
        make_inputs=make_inputs(rays, samples, with_u),
        variants=lambda: {
            "eager": wrap(official_resample),
            "compile": wrap(torch.compile(official_resample)),
            "native": wrap(native),
        },
        truth=truth,
        reference=wrap(official_resample),
        floor=2e-5,
        floor_why="8 roundings of 1 in the CDF over its least slope, 0.01 / (sum + 0.01 N) per interval of 4 / N",
        moved_bytes=4 * rays * (3 * samples + 2 + (samples + 1) * with_u),
        flops=60 * rays * samples,
        graph=graph,
    )


def cases(device: torch.device) -> Sequence[Case]:
    """4096 x 64 is the yardstick on the CPU, 64 x 64 shows that small batches do not lose; a GPU gets 512 MB."""
    if device.type == "cuda":
        return [case(262144, 128, True), case(262144, 128, False), case(4096, 128, True, graph=True)]
    return [case(4096, 64, True), case(4096, 64, False), case(64, 64, True), case(64, 64, False)]


if __name__ == "__main__":
    main("resample", cases, __doc__ or "")
