"""march beside its reference in plain PyTorch.

python benchmarks/bench_march.py [--threads 1 2]
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
from mipnerf_fast import ops, reference, use_backend

NAMES = ("origins", "directions", "radii", "near", "far", "phase")


def case(rays: int) -> Case:
    """So many rays, those whose samples the last bit of a position does not move in or out."""
    model = fast_scene.model()
    config = model.config
    numbers = (config.box_half, config.step_scale, config.min_step, config.max_step)
    masks = reference.unpack_masks(model.masks, config.occupancy_resolution)

    def plain(inputs: Inputs) -> reference.PackedSamples:
        o, d, radii, near, far, phase = (inputs[name] for name in NAMES)
        return reference.march(o, d, radii, near, far, phase, masks, *numbers)

    def make_inputs(seed: int, device: torch.device) -> Inputs:
        drawn = fast_scene.rays(seed, rays + rays // 16)
        found = [plain(d).ray_starts.diff() for d in (drawn, fast_scene.double(drawn))]
        same = (found[0] == found[1]).nonzero()[:rays, 0]
        return {name: drawn[name][same].to(device) for name in NAMES}

    def wrap(march: Callable[[Inputs], Any]) -> Callable[[Inputs], Outputs]:
        def run(inputs: Inputs) -> Outputs:
            with torch.no_grad():
                found = march(inputs)
            return {"t0": found.t0, "t1": found.t1, "means": found.means, "scales": found.scales}

        return run

    def native(inputs: Inputs) -> reference.PackedSamples:
        with use_backend("native"):
            o, d, radii, near, far, phase = (inputs[name] for name in NAMES)
            return ops.march(
                o, d, radii, near, far, phase, model.masks, config.occupancy_resolution, *numbers
            )

    count = int(plain(make_inputs(0, torch.device("cpu"))).t0.shape[0])
    return Case(
        name=f"{rays} rays of 200 x 200, float32",
        make_inputs=make_inputs,
        variants=lambda: {"eager": wrap(plain), "native": wrap(native)},
        truth=lambda inputs: wrap(plain)(fast_scene.double(inputs)),
        reference=wrap(plain),
        floor=2e-5,
        floor_why="32 roundings of t = 6",
        moved_bytes=rays * 48 + count * 32,
        flops=count * 60,
        items=count,
    )


def cases(device: torch.device) -> Sequence[Case]:
    """A training step's rays, and more."""
    del device
    return [case(2048), case(16384)]


if __name__ == "__main__":
    main("march", cases, __doc__ or "")
