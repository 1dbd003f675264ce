"""The fused training step and rendering of the fast model beside the same composed of plain PyTorch.

python benchmarks/bench_fast_step.py [--threads 1 2]
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
from mipnerf_fast import FastModel, fast_reference, ops, reference
from mipnerf_fast.ops.fast_step import FastGradients

BETA = 0.1


def _parameters(model: FastModel) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def _truth(inputs: Inputs, model: FastModel, backward: bool) -> Outputs:
    """In float64, on the samples that the float32 march finds."""
    found = fast_scene.samples(inputs, model)
    rays = {name: value.double() for name, value in inputs.items()}
    t0, t1 = found.t0.double(), found.t1.double()
    means, scales = reference.sample_gaussians(
        rays["origins"], rays["directions"], rays["radii"], found.rays, t0, t1, model.config.box_half
    )
    packed = reference.PackedSamples(found.ray_starts, found.rays, t0, t1, means, scales)
    leaves = {name: value.double().requires_grad_() for name, value in _parameters(model).items()}
    fields = model.fields()._replace(**leaves)  # type: ignore[arg-type]
    result = reference.fast_composite(packed, rays["directions"], rays["near"], rays["background"], fields)
    if not backward:
        return {"rgb": result.rgb.detach(), "acc": result.acc.detach()}
    loss = torch.nn.functional.smooth_l1_loss(result.rgb, rays["target"], beta=BETA)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach()[None]} | dict(zip(leaves, grads, strict=True))


def training(rays: int) -> Case:
    """Everything from marching to gradients."""
    model = fast_scene.model()

    def wrap(step: Callable[..., Any]) -> Callable[[Inputs], Outputs]:
        def run(inputs: Inputs) -> Outputs:
            parameters = _parameters(model)
            gradients = FastGradients(
                *(torch.zeros_like(parameters[n]) if n in parameters else None for n in FastGradients._fields)  # type: ignore[arg-type]
            )
            found = step(fast_scene.march_rays(inputs), inputs["target"], BETA, model.fields(), gradients)
            named = {name: value for name, value in gradients._asdict().items() if value is not None}
            return {"loss": torch.tensor([found.loss], dtype=torch.float64)} | named

        return run

    return _case(
        "training step", rays, model, True, wrap(fast_reference.fast_train_step), wrap(ops.fast_train_step)
    )


def rendering(rays: int) -> Case:
    """From rays to colours."""
    model = fast_scene.model()

    def wrap(render: Callable[..., Any]) -> Callable[[Inputs], Outputs]:
        def run(inputs: Inputs) -> Outputs:
            with torch.no_grad():
                rgb, _, acc = render(fast_scene.march_rays(inputs), model.fields())
            return {"rgb": rgb, "acc": acc}

        return run

    return _case("rendering", rays, model, False, wrap(fast_reference.fast_render), wrap(ops.fast_render))


def _case(
    what: str,
    rays: int,
    model: FastModel,
    backward: bool,
    plain: Callable[[Inputs], Outputs],
    native: Callable[[Inputs], Outputs],
) -> Case:
    def make_inputs(seed: int, device: torch.device) -> Inputs:
        return {name: value.to(device) for name, value in fast_scene.rays(seed, rays).items()}

    count = int(fast_scene.samples(make_inputs(0, torch.device("cpu")), model).t0.shape[0])
    products = 64 * (36 + 16 + 32 + 3)
    return Case(
        name=f"{what}, {rays} rays of 200 x 200, float32",
        make_inputs=make_inputs,
        variants=lambda: {"eager": plain, "native": native},
        truth=lambda inputs: _truth(inputs, model, backward),
        reference=plain,
        floor=2e-7 if backward else 1e-5,
        floor_why="8 roundings of a loss of 0.2; of a rendering 100 of a colour of 1, for some 40 samples a ray",
        moved_bytes=count * 8 * 8 * 16 * (3 if backward else 1),
        flops=2 * count * products * (3 if backward else 1),
        items=count,
    )


def cases(device: torch.device) -> Sequence[Case]:
    """A training step's rays, and a picture of 200 x 200 in four parts."""
    del device
    return [training(1024), rendering(10_000)]


if __name__ == "__main__":
    main("fast_step", cases, __doc__ or "")
