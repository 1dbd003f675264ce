"""sparse_adam beside its reference in plain PyTorch.

python benchmarks/bench_sparse_adam.py [--threads 1 2]

The operation changes its arguments in place, so every variant goes on from what its last call on the same inputs left;
the gradient, which it zeroes, is copied into place inside the timed call.
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
from mipnerf_fast import fast_reference, ops
from mipnerf_fast.ops.fast_captured import StepClock, sparse_adam_captured

STEP, RATE, BETA1, BETA2, EPS = 500, 2e-2, 0.9, 0.99, 1e-15
NAMES = ("values", "gradient", "moment1", "moment2")
WITH_COPY = "native, captured step's, with a float16 copy"


class InPlace:
    """Calls an operation on arrays of its own, which begin as copies of the inputs.

    Args:
        operation: of values, gradient, moment1, moment2.
    """

    def __init__(self, operation: Callable[[Tensor, Tensor, Tensor, Tensor], None]) -> None:
        self._operation = operation
        self._kept: dict[int, Inputs] = {}

    def __call__(self, inputs: Inputs) -> Outputs:
        """Values and moments after one more step."""
        key = inputs["values"].data_ptr()
        if key not in self._kept:
            self._kept[key] = {name: inputs[name].clone() for name in NAMES}
        own = self._kept[key]
        own["gradient"].copy_(inputs["gradient"])
        self._operation(*(own[name] for name in NAMES))
        return {name: own[name] for name in NAMES if name != "gradient"}


def _captured(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """As in a captured step: the step's number and the rate are on the device, the tables' float16 copy follows."""
    clock = StepClock(
        torch.tensor([STEP - 1], device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.ones(1, device=device),
        torch.tensor([RATE], device=device),
    )
    copies: dict[int, Tensor] = {}

    def run(values: Tensor, gradient: Tensor, moment1: Tensor, moment2: Tensor) -> None:
        copy = copies.setdefault(values.data_ptr(), torch.empty_like(values, dtype=torch.float16))
        sparse_adam_captured(values, gradient, moment1, moment2, copy, clock, 1.0, BETA1, BETA2, EPS)

    return run


def case(share: float, device: torch.device) -> Case:
    """The tables of the model for 200 x 200; this share of the entries has a gradient."""
    shape = fast_scene.model().tables.shape

    def make_inputs(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def rand(*size: int) -> Tensor:
            return torch.rand(*size, generator=generator).to(device)

        return {
            "values": rand(*shape) - 0.5,
            "gradient": (rand(*shape) - 0.5) * (rand(shape[0], 1) < share),
            "moment1": 0.1 * (rand(*shape) - 0.5),
            "moment2": 0.1 * (0.1 + rand(*shape)),
        }

    def wrap(step: Callable[..., Any]) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
        return lambda *arrays: step(*arrays, RATE, BETA1, BETA2, EPS, STEP)

    def truth(inputs: Inputs) -> Outputs:
        return InPlace(wrap(fast_reference.sparse_adam))(fast_scene.double(inputs))

    on_gpu, count = device.type == "cuda", shape[0] * shape[1]

    def variants() -> dict[str, Callable[[Inputs], Outputs]]:
        found: dict[str, Callable[[Inputs], Outputs]] = {
            "eager": InPlace(wrap(fast_reference.sparse_adam)),
            "native": InPlace(wrap(ops.sparse_adam)),
        }
        return found | ({WITH_COPY: InPlace(_captured(device))} if on_gpu else {})

    return Case(
        name=f"{count:,} parameters, {share:.0%} of the entries touched, float32",
        make_inputs=make_inputs,
        variants=variants,
        truth=truth,
        # A fresh one every time: it is called to find its error, on inputs that must stay as they are.
        reference=lambda inputs: InPlace(wrap(fast_reference.sparse_adam))(inputs),
        floor=2.5e-7,
        floor_why="4 roundings of a value of 1",
        # Copying the gradient and reading it; of what is touched the rest, and the gradient's zeros.
        moved_bytes=int(count * 4 * (3 + 7 * share)),
        flops=int(count * share * 12),
        items=count,
        not_run={} if on_gpu else {WITH_COPY: "it is of a GPU's captured step"},
    )


def cases(device: torch.device) -> Sequence[Case]:
    """A step's share of the tables, small batches on a CPU and large ones on a GPU."""
    return [case(0.1, device), case(0.7, device)]


if __name__ == "__main__":
    main("sparse_adam", cases, __doc__ or "")
