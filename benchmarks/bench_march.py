"""march beside its reference in plain PyTorch.

python benchmarks/bench_march.py [--threads 1 2]
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

NAMES = ("origins", "directions", "radii", "near", "far", "phase")
Masks = list[tuple[Tensor, Tensor]]
_NUDGES = 2


def steady_rays(seed: int, rays: int, count: Callable[[Inputs], Tensor]) -> Inputs:
    """Rays, those whose samples the last bits of a position do not move in or out.

    count: of the samples of each ray. It is the same in float32, in float64, and with all numbers off by some 4 units
    in the last place this way and that.
    """
    drawn = fast_scene.rays(seed, rays + rays // 8)
    exact, generator = fast_scene.double(drawn), torch.Generator().manual_seed(seed)
    wanted = count(exact)
    steady = count(drawn) == wanted
    for _ in range(_NUDGES):
        apart = {n: 2.0**-21 * x * torch.randn(x.shape, generator=generator) for n, x in exact.items()}
        for sign in (1, -1):
            steady &= count({name: x + sign * apart[name] for name, x in exact.items()}) == wanted
    chosen = steady.nonzero()[:rays, 0]
    if chosen.shape[0] < rays:
        raise RuntimeError(
            f"bench_march: {chosen.shape[0]} of {drawn['near'].shape[0]} rays are steady, not {rays}"
        )
    return {name: drawn[name][chosen] for name in NAMES}


def case(rays: int, device: torch.device) -> Case:
    """So many rays."""
    model = fast_scene.model()
    config = model.config
    numbers = (config.box_half, config.step_scale, config.min_step, config.max_step)
    packed = model.masks.to(device)
    masks = reference.unpack_masks(packed, config.occupancy_resolution)
    drawn_with = reference.unpack_masks(model.masks, config.occupancy_resolution)

    def march(inputs: Inputs, occupied: Masks) -> reference.PackedSamples:
        o, d, radii, near, far, phase = (inputs[name] for name in NAMES)
        return reference.march(o, d, radii, near, far, phase, occupied, *numbers)

    def plain(inputs: Inputs) -> reference.PackedSamples:
        return march(inputs, masks)

    # Of the errors, which are taken on these; those of other seeds are for the time alone.
    steady = steady_rays(0, rays, lambda inputs: march(inputs, drawn_with).ray_starts.diff())

    def make_inputs(seed: int, to: torch.device) -> Inputs:
        drawn = steady if seed == 0 else fast_scene.rays(seed, rays)
        return {name: drawn[name].to(to) for name in NAMES}

    def wrap(march: Callable[[Inputs], Any]) -> Callable[[Inputs], Outputs]:
        def run(inputs: Inputs) -> Outputs:
            with torch.no_grad():
                found = march(inputs)
            return {"t0": found.t0, "t1": found.t1, "means": found.means, "scales": found.scales}

        return run

    def native(inputs: Inputs) -> reference.PackedSamples:
        with use_backend("native"):
            o, d, radii, near, far, phase = (inputs[name] for name in NAMES)
            return ops.march(o, d, radii, near, far, phase, packed, config.occupancy_resolution, *numbers)

    count = int(march(steady, drawn_with).t0.shape[0])
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
    return [case(2048, device), case(16384, device)]


if __name__ == "__main__":
    main("march", cases, __doc__ or "")
