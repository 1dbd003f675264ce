"""occupancy_update beside its reference in plain PyTorch, on copies of the grid that are made inside the timed call.

python benchmarks/bench_occupancy.py [--threads 1 2]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import fast_scene
from benchmarks.harness import Case, Inputs, Outputs, main
from mipnerf_fast import fast_reference, ops, reference
from mipnerf_fast.ops.fast_step import FastFields, FastGradients

SEED, CELL_SCALE, THRESHOLD = 3, 1e-3, 0.5


def case(stride: int, decay: float, device: torch.device) -> Case:
    """One of so many cells visited, and as many of those that hold the scene's ball."""
    model = fast_scene.model()
    fields, cells = fast_scene.in_float32(model, device), model.config.occupancy_resolution
    exact = fields._replace(
        **{n: v.double() for n in FastGradients._fields if (v := getattr(fields, n)) is not None}
    )
    ball = reference.unpack_masks(model.masks, cells)[0][0].float()

    def make_inputs(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(cells, cells, cells, generator=generator)
        return {"densities": (ball * (THRESHOLD + drawn)).to(device), "masks": model.masks.to(device)}

    def wrap(update: Callable[..., Any], of: FastFields) -> Callable[[Inputs], Outputs]:
        def run(inputs: Inputs) -> Outputs:
            densities = inputs["densities"].to(of.tables.dtype, copy=True)
            given = of._replace(masks=inputs["masks"].clone())
            _, threshold = update(densities, CELL_SCALE, SEED, 0, stride, decay, THRESHOLD, given)
            return {"densities": densities, "threshold": densities.new_tensor([threshold])}

        return run

    def error(found: Outputs, truth: Outputs) -> float:
        parts = [(found[n].double() - truth[n]).abs().max() / truth[n].abs().max() for n in truth]
        return float(torch.stack(parts).max())

    plain = wrap(fast_reference.occupancy_update, fields)
    visits = 2 * cells**3 // stride
    return Case(
        name=f"{cells}^3 cells, one in {stride}, float32",
        make_inputs=make_inputs,
        variants=lambda: {"eager": plain, "native": wrap(ops.occupancy_update, fields)},
        truth=wrap(fast_reference.occupancy_update, exact),
        reference=plain,
        floor=2e-6,
        floor_why="32 roundings",
        moved_bytes=cells**3 * 4 * 3 + visits * 8 * 8 * 16,
        flops=2 * visits * 64 * (36 + 16),
        items=visits,
        error=error,
    )


def cases(device: torch.device) -> Sequence[Case]:
    """As at the beginning of training, and as later."""
    return [case(16, 0.4, device), case(64, 0.8, device)]


if __name__ == "__main__":
    main("occupancy", cases, __doc__ or "", error="largest difference, over the largest value,")
