"""tiny_mlp beside its reference in plain PyTorch, and torch.compile of it.

python benchmarks/bench_tiny_mlp.py [--threads 1 2]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import fast_scene
from benchmarks.harness import Case, Inputs, Outputs, main
from mipnerf_fast import ops, reference, use_backend

WEIGHTS = ("density_in", "density_out", "colour_in", "colour_out")
INPUTS, WIDTH = 36, 64


def case(samples: int, backward: bool) -> Case:
    """So many samples through both networks of the model for 200 x 200, with one colour layer."""

    def make_inputs(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        directions = torch.nn.functional.normalize(randn(samples // 6, 3), dim=-1)
        made = {
            "features": randn(samples, INPUTS - 1),
            "harmonics": reference.spherical_harmonics(directions),
            "rays": torch.randint(samples // 6, (samples,), generator=generator).sort().values,
            "density_in": randn(WIDTH, INPUTS) * math.sqrt(2 / INPUTS),
            "density_out": randn(16, WIDTH) * math.sqrt(2 / WIDTH),
            "colour_in": randn(WIDTH, 32) * 0.25,
            "colour_out": randn(3, WIDTH) * math.sqrt(2 / WIDTH),
            "grad_rgb": torch.rand(samples, 3, generator=generator) / samples,
            "grad_density": torch.rand(samples, generator=generator) / samples,
        }
        return {name: value.to(device) for name, value in made.items()}

    def wrap(networks: Callable[..., Any]) -> Callable[[Inputs], Outputs]:
        def run(inputs: Inputs) -> Outputs:
            fixed = (inputs["harmonics"], inputs["rays"])
            if not backward:
                with torch.no_grad():
                    features, density_in, density_out, colour_in, colour_out = (
                        inputs[name] for name in ("features", *WEIGHTS)
                    )
                    found = networks(features, *fixed, density_in, density_out, colour_in, None, colour_out)
                return {"rgb": found[0], "density": found[1]}
            leaves = fast_scene.differentiable(inputs, ("features", *WEIGHTS))
            features, density_in, density_out, colour_in, colour_out = leaves
            found = networks(features, *fixed, density_in, density_out, colour_in, None, colour_out)
            grads = torch.autograd.grad(tuple(found), leaves, (inputs["grad_rgb"], inputs["grad_density"]))
            return {"rgb": found[0].detach()} | dict(zip(("features", *WEIGHTS), grads, strict=True))

        return run

    def native(*arguments: Any) -> Any:
        with use_backend("native"):
            return ops.tiny_mlp(*arguments)

    products = WIDTH * (INPUTS + 16 + 32 + 3)
    return Case(
        name=f"{'forward + backward' if backward else 'forward'}, {samples} samples, float32",
        make_inputs=make_inputs,
        variants=lambda: {
            "eager": wrap(reference.tiny_mlp),
            "compile": wrap(torch.compile(reference.tiny_mlp)),
            "native": wrap(native),
        },
        truth=lambda inputs: wrap(reference.tiny_mlp)(fast_scene.double(inputs)),
        reference=wrap(reference.tiny_mlp),
        floor=1e-5,
        floor_why="16 roundings of the largest density, about 8",
        moved_bytes=samples * 4 * (INPUTS + 4) * (2 if backward else 1),
        flops=2 * samples * products * (4 if backward else 1),  # backward computes the hidden layers again
        items=samples,
    )


def cases(device: torch.device) -> Sequence[Case]:
    """A training step's samples, and more."""
    del device
    return [case(8192, False), case(8192, True), case(65536, False)]


if __name__ == "__main__":
    main("tiny_mlp", cases, __doc__ or "")
