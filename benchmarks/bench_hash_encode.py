"""hash_encode beside its reference in plain PyTorch: forward, and with the gradients of tables and positions.

python benchmarks/bench_hash_encode.py [--threads 1 2]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import fast_scene
from benchmarks.harness import Case, Inputs, Outputs, main
from mipnerf_fast import ops, reference, use_backend

NAMES = ("points", "scales", "tables")


def case(rays: int, backward: bool) -> Case:
    """The samples of so many rays through the 8 levels of the model for 200 x 200."""
    model = fast_scene.model()
    tables, grid = model.tables.detach(), model.grid
    count = int(fast_scene.samples(fast_scene.rays(0, rays), model).scales.shape[0])

    def make_inputs(seed: int, device: torch.device) -> Inputs:
        drawn = fast_scene.samples(fast_scene.rays(0, rays), model)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(drawn.scales.shape[0] // 64, generator=generator)
        whole = order.shape[0] * 64
        # Rays in another order: the same work, other addresses.
        index = (order[:, None] * 64 + torch.arange(64)).reshape(-1)
        assert whole <= drawn.scales.shape[0]
        return {
            "points": drawn.means[index].to(device),
            "scales": drawn.scales[index].to(device),
            "tables": tables.to(device),
            "grad": torch.rand(whole, tables.shape[1] * len(grid.resolutions), generator=generator).to(
                device
            ),
        }

    def wrap(encode: Callable[..., Tensor]) -> Callable[[Inputs], Outputs]:
        def run(inputs: Inputs) -> Outputs:
            if not backward:
                with torch.no_grad():
                    return {"features": encode(*(inputs[name] for name in NAMES), grid)}
            leaves = fast_scene.differentiable(inputs, NAMES)
            features = encode(*leaves, grid)
            grads = torch.autograd.grad(features, leaves, inputs["grad"])
            # The gradient to the points grows with the resolution and jumps at the faces of cells: not compared here.
            return {"features": features.detach(), "scales": grads[1], "tables": grads[2]}

        return run

    def native(*arguments: Any) -> Tensor:
        with use_backend("native"):
            return ops.hash_encode(*arguments)

    levels, features = len(grid.resolutions), tables.shape[1]
    return Case(
        name=f"{'forward + backward' if backward else 'forward'}, {rays} rays of 200 x 200, float32",
        make_inputs=make_inputs,
        variants=lambda: {"eager": wrap(reference.hash_encode), "native": wrap(native)},
        truth=lambda inputs: wrap(reference.hash_encode)(fast_scene.double(inputs)),
        reference=wrap(reference.hash_encode),
        floor=1e-4,
        floor_why="16 roundings of the largest gradient of a scale, about 50",
        moved_bytes=count * (16 + 4 * levels * features * (2 if backward else 1)),
        flops=count * levels * 8 * (4 + 2 * features) * (3 if backward else 1),
        items=count // 64 * 64,
    )


def cases(device: torch.device) -> Sequence[Case]:
    """A training step's rays and a picture's row of tiles."""
    del device
    return [case(2048, False), case(2048, True)]


if __name__ == "__main__":
    main("hash_encode", cases, __doc__ or "")
