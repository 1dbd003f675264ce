"""ray_batch beside the same batch in plain PyTorch, torch.compile of it, and one drawn by torch.randint.

python benchmarks/bench_ray_batch.py [--device cpu|cuda] [--threads 1 2]

"eager" and "compile" draw the same pixels as the kernel, by the same counter-based random numbers in torch operations;
"randint" is how one would write it without them, and draws others. The images lie on the device for all.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_train import random_images
from benchmarks.harness import Case, Inputs, Outputs, main
from mipnerf_fast import use_backend
from mipnerf_fast.cameras import Rays
from mipnerf_fast.data import Dataset, RayBatches

SEED = 7
Batch = tuple[Rays, Tensor]


@functools.cache
def images(device_type: str) -> Dataset:
    """100 views, on a GPU of 400 x 400, 64 MB that no cache holds, on a CPU of 200 x 200."""
    return random_images(100, 400 if device_type == "cuda" else 200)


def case(rays: int, device: torch.device, graph: bool = False) -> Case:
    """A batch of so many rays from all pixels of all images."""
    data = images(device.type)
    batches = RayBatches(data, device)
    cameras = {name: getattr(data, name).double() for name in ("c2w", "near", "far", "lossmult")}
    exact = RayBatches(dataclasses.replace(data, **cameras), device)

    def make_inputs(seed: int, to: torch.device) -> Inputs:
        return {"step": torch.tensor(seed + 1, device=to)}

    def wrap(draw: Callable[[Tensor], Batch], backend: str = "reference") -> Callable[[Inputs], Outputs]:
        def run(inputs: Inputs) -> Outputs:
            with use_backend(backend):
                found, target = draw(inputs["step"])
            return found._asdict() | {"target": target}

        return run

    def drawn(step: Tensor) -> Batch:
        return batches.gather(*batches.choose(SEED, step, rays))

    def randint(step: Tensor) -> Batch:
        del step
        index = torch.randint(batches.total, (rays,), device=device)
        image = torch.div(index, batches.common_size, rounding_mode="floor")
        return batches.gather(image, index - image * batches.common_size)

    def in_float64(step: Tensor) -> Batch:
        return exact.gather(*exact.choose(SEED, step, rays))

    return Case(
        name=f"{rays} rays of 100 views",
        make_inputs=make_inputs,
        variants=lambda: {
            "eager": wrap(drawn),
            "compile": wrap(torch.compile(drawn)),
            "randint": wrap(randint),
            "native": wrap(lambda step: batches.draw(SEED, step, rays), "native"),
        },
        truth=wrap(in_float64),
        reference=wrap(drawn),
        floor=4 * 2.0**-23,
        floor_why="8 roundings of a direction of 1",
        # 13 numbers of a ray, 3 of its colour, and the pixel.
        moved_bytes=rays * (4 * 16 + data.pixels.shape[1]),
        # The random numbers about 100, the ray 50.
        flops=rays * 150,
        graph=graph,
        items=rays,
        unchecked={"randint": "other pixels, drawn by torch.randint"},
    )


def cases(device: torch.device) -> Sequence[Case]:
    """The paper's batch, and a small and a large one."""
    if device.type == "cuda":
        return [case(4096, device, graph=True), case(65536, device)]
    return [case(4096, device), case(64, device)]


if __name__ == "__main__":
    main("ray_batch", cases, __doc__ or "")
