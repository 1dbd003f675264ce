"""draw_rays beside its reference in plain PyTorch.

python benchmarks/bench_draw_rays.py [--threads 1 2]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_train import random_images
from benchmarks.harness import Case, Inputs, Outputs, main
from mipnerf_fast import fast_reference, ops
from mipnerf_fast.fast_training import pixel_source
from mipnerf_fast.ops.fast_step import PixelSource

SEED = 3


def case(rays: int, device: torch.device) -> Case:
    """So many rays of 100 random images of 200 x 200, with backgrounds of their own."""
    source = PixelSource(*(field.to(device) for field in pixel_source(random_images(100, 200), 0.72)))
    exact = source._replace(
        **{name: getattr(source, name).double() for name in ("c2w", "focals", "nears", "fars")}
    )

    def make_inputs(seed: int, device: torch.device) -> Inputs:
        # The step's number is a length, which the host knows without waiting for a device.
        return {"step": torch.zeros(seed + 1, device=device)}

    def wrap(draw: Callable[..., Any], of: PixelSource) -> Callable[[Inputs], Outputs]:
        def run(inputs: Inputs) -> Outputs:
            drawn, target = draw(of, SEED, inputs["step"].shape[0], rays, True, 1.0)
            return {name: value for name, value in drawn._asdict().items()} | {"target": target}

        return run

    plain = wrap(fast_reference.draw_rays, source)
    written = 4 * (3 + 3 + 1 + 1 + 1 + 1 + 3 + 3)
    return Case(
        name=f"{rays} rays, float32",
        make_inputs=make_inputs,
        variants=lambda: {"eager": plain, "native": wrap(ops.draw_rays, source)},
        truth=wrap(fast_reference.draw_rays, exact),
        reference=plain,
        floor=1.5e-6,
        floor_why="4 roundings of a far end of 6",
        moved_bytes=rays * (written + 4 + 12 * 4 + 6 * 8),
        flops=rays * 150,
        items=rays,
    )


def cases(device: torch.device) -> Sequence[Case]:
    """A training step's rays on a CPU, and on a large GPU."""
    return [case(2048, device), case(65536, device)]


if __name__ == "__main__":
    main("draw_rays", cases, __doc__ or "")
