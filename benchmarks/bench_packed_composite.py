"""packed_composite beside its reference in plain PyTorch.

python benchmarks/bench_packed_composite.py [--threads 1 2]
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

NAMES = ("rgb", "density", "lengths", "middles", "ray_starts", "background", "near")
LEAVES = ("rgb", "density", "lengths", "background")


def case(rays: int, backward: bool) -> Case:
    """The samples of so many rays through a ball of matter that is never quite opaque."""
    model = fast_scene.model()
    packed = fast_scene.samples(fast_scene.rays(0, rays), model)
    count = int(packed.t0.shape[0])

    def make_inputs(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        drawn = fast_scene.rays(0, rays)
        made = {
            "rgb": torch.rand(count, 3, generator=generator),
            # A ray's depth stays below 6 of the 6.9 at which it would end early.
            "density": 6 * torch.rand(count, generator=generator),
            "lengths": packed.t1 - packed.t0,
            "middles": 0.5 * (packed.t0 + packed.t1),
            "ray_starts": packed.ray_starts,
            "background": drawn["background"],
            "near": drawn["near"],
            "grad": torch.rand(rays, 3, generator=generator),
        }
        return {name: value.to(device) for name, value in made.items()}

    def wrap(composite: Callable[..., Any]) -> Callable[[Inputs], Outputs]:
        def run(inputs: Inputs) -> Outputs:
            if not backward:
                with torch.no_grad():
                    return composite(*(inputs[name] for name in NAMES))._asdict()  # type: ignore[no-any-return]
            leaves = dict(zip(LEAVES, fast_scene.differentiable(inputs, LEAVES), strict=True))
            found = composite(*((inputs | leaves)[name] for name in NAMES))
            grads = torch.autograd.grad(found.rgb, list(leaves.values()), inputs["grad"])
            return {"colour": found.rgb.detach()} | dict(zip(LEAVES, grads, strict=True))

        return run

    def native(*arguments: Any) -> Any:
        with use_backend("native"):
            return ops.packed_composite(*arguments)

    return Case(
        name=f"{'forward + backward' if backward else 'forward'}, {rays} rays of 200 x 200, float32",
        make_inputs=make_inputs,
        variants=lambda: {"eager": wrap(reference.packed_composite), "native": wrap(native)},
        truth=lambda inputs: wrap(reference.packed_composite)(fast_scene.double(inputs)),
        reference=wrap(reference.packed_composite),
        floor=1e-5,
        floor_why="16 roundings of t = 6",
        moved_bytes=count * (28 if not backward else 28 + 24 + 20),
        flops=count * (40 if not backward else 90),
        items=count,
    )


def cases(device: torch.device) -> Sequence[Case]:
    """A training step's rays."""
    del device
    return [case(2048, False), case(2048, True)]


if __name__ == "__main__":
    main("packed_composite", cases, __doc__ or "")
