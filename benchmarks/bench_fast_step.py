"""The fused training step and rendering of the fast model beside the same composed of plain PyTorch.

python benchmarks/bench_fast_step.py [--threads 1 2]

On a GPU also as it trains and renders: tables in float16, products in TF32 where there are any, the step replayed from
a CUDA graph. The error of those rows is held to that of plain PyTorch with the same roundings.
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
from mipnerf_fast.ops.fast_captured import GROUP_RAYS, StepClock, fast_train_step_captured
from mipnerf_fast.ops.fast_step import FastFields, FastGradients

BETA = 0.1
CAPTURED, AS_RENDERED = "captured, float16 tables", "native, float16 tables"


def _truth(inputs: Inputs, exact: FastFields, backward: bool) -> Outputs:
    """In float64, on the samples that the float32 march finds."""
    found = _marched(inputs, exact)
    rays = {name: value.double() for name, value in inputs.items()}
    t0, t1 = found.t0.double(), found.t1.double()
    means, scales = reference.sample_gaussians(
        rays["origins"], rays["directions"], rays["radii"], found.rays, t0, t1, exact.box_half
    )
    packed = reference.PackedSamples(found.ray_starts, found.rays, t0, t1, means, scales)
    leaves = {
        name: value.double().requires_grad_()
        for name in FastGradients._fields
        if (value := getattr(exact, name)) is not None
    }
    fields = exact._replace(**leaves)
    result = reference.fast_composite(packed, rays["directions"], rays["near"], rays["background"], fields)
    if not backward:
        return {"rgb": result.rgb.detach(), "acc": result.acc.detach()}
    loss = torch.nn.functional.smooth_l1_loss(result.rgb, rays["target"], beta=BETA)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach()[None]} | dict(zip(leaves, grads, strict=True))


def _zeros(fields: FastFields) -> FastGradients:
    values = (getattr(fields, name) for name in FastGradients._fields)
    return FastGradients(
        *(None if value is None else torch.zeros_like(value, dtype=torch.float32) for value in values)  # type: ignore[arg-type]
    )


def _outputs(loss: Tensor, gradients: FastGradients) -> Outputs:
    return {"loss": loss} | {name: value for name, value in gradients._asdict().items() if value is not None}


def _stepping(step: Callable[..., Any], fields: FastFields) -> Callable[[Inputs], Outputs]:
    """A step, `ops.fast_train_step` or its reference, from zeros."""

    def run(inputs: Inputs) -> Outputs:
        gradients = _zeros(fields)
        found = step(fast_scene.march_rays(inputs), inputs["target"], BETA, fields, gradients)
        return _outputs(inputs["target"].new_tensor([found.loss], dtype=torch.float64), gradients)

    return run


class ReplayedStep:
    """The step that training replays, from zeros, of rays that are copied to where the graph reads them.

    Args:
        fields: the model, its tables in float16.
        samples: more than the rays have: there is room for so many.
    """

    def __init__(self, fields: FastFields, samples: int) -> None:
        self._fields, self._capacity = fields, -(-samples // GROUP_RAYS) * GROUP_RAYS
        self._gradients = _zeros(fields)
        self._place: Inputs = {}
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Inputs) -> Outputs:
        """Loss and gradients, which the next call writes to the same place."""
        if self._graph is None:
            self._record(inputs)
        assert self._graph is not None
        for name, value in self._place.items():
            value.copy_(inputs[name])
        self._graph.replay()
        return _outputs(self._statistics[:1], self._gradients)

    def _record(self, inputs: Inputs) -> None:
        self._place = {name: value.clone() for name, value in inputs.items()}
        count, device = inputs["target"].shape[0], inputs["target"].device
        self._clock = StepClock(
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.full((1,), count, dtype=torch.int32, device=device),
            torch.ones(1, device=device),
            torch.zeros(1, device=device),
        )
        self._launch()  # loads the kernels, which a capture must not
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._launch()

    def _launch(self) -> None:
        for gradient in self._gradients:
            if gradient is not None:
                gradient.zero_()
        self._statistics = fast_train_step_captured(
            fast_scene.march_rays(self._place),
            self._place["target"],
            self._clock,
            self._capacity,
            BETA,
            self._fields,
            self._gradients,
        )


def training(rays: int, device: torch.device) -> Case:
    """Everything from marching to gradients."""
    model = fast_scene.model()
    exact, rounded = fast_scene.in_float32(model, device), fast_scene.as_on_gpu(model, device)
    samples = _samples(rays, model, exact)
    plain = _stepping(fast_reference.fast_train_step, exact)
    variants = {"eager": plain, "native": _stepping(ops.fast_train_step, exact)}
    references = {}
    if device.type == "cuda":
        variants[CAPTURED] = ReplayedStep(rounded, 2 * samples)
        references[CAPTURED] = _stepping(fast_reference.fast_train_step, fast_scene.for_reference(rounded))
    not_run = {} if device.type == "cuda" else {CAPTURED: "a CUDA graph needs a GPU"}
    return _case("training step", rays, samples, exact, True, plain, variants, references, not_run)


def rendering(rays: int, device: torch.device) -> Case:
    """From rays to colours."""
    model = fast_scene.model()
    exact, rounded = fast_scene.in_float32(model, device), fast_scene.as_on_gpu(model, device)

    def with_(render: Callable[..., Any], fields: FastFields) -> Callable[[Inputs], Outputs]:
        def run(inputs: Inputs) -> Outputs:
            with torch.no_grad():
                rgb, _, acc = render(fast_scene.march_rays(inputs), fields)
            return {"rgb": rgb, "acc": acc}

        return run

    plain = with_(fast_reference.fast_render, exact)
    variants = {"eager": plain, "native": with_(ops.fast_render, exact)}
    references = {}
    if device.type == "cuda":
        variants[AS_RENDERED] = with_(ops.fast_render, rounded)
        references[AS_RENDERED] = with_(fast_reference.fast_render, fast_scene.for_reference(rounded))
    not_run = {} if device.type == "cuda" else {AS_RENDERED: "the CPU's tables are float32"}
    samples = _samples(rays, model, exact)
    return _case("rendering", rays, samples, exact, False, plain, variants, references, not_run)


def _marched(inputs: Inputs, fields: FastFields) -> reference.PackedSamples:
    return reference.fast_samples(*fast_scene.march_rays(inputs)[:6], fields)


def _drawn(seed: int, rays: int, fields: FastFields) -> Inputs:
    """Rays on the model's device; on a GPU, whose positions differ from the reference's in their last bit, the first
    ones, on which errors are measured, are those to which that bit gives neither more nor fewer samples."""
    device = fields.masks.device
    if device.type != "cuda" or seed:
        return {name: value.to(device) for name, value in fast_scene.rays(seed, rays).items()}
    drawn = {name: value.to(device) for name, value in fast_scene.rays(seed, rays + rays // 16).items()}
    found = [_marched(given, fields).ray_starts.diff() for given in (drawn, fast_scene.double(drawn))]
    same = (found[0] == found[1]).nonzero()[:rays, 0]
    return {name: value[same] for name, value in drawn.items()}


def _samples(rays: int, model: FastModel, fields: FastFields) -> int:
    """How many the first rays have; counted on the CPU, but for a GPU's own rays."""
    if fields.masks.device.type != "cuda":
        fields = fast_scene.in_float32(model, torch.device("cpu"))
    return int(_marched(_drawn(0, rays, fields), fields).t0.shape[0])


def _case(
    what: str,
    rays: int,
    samples: int,
    exact: FastFields,
    backward: bool,
    plain: Callable[[Inputs], Outputs],
    variants: dict[str, Callable[[Inputs], Outputs]],
    references: dict[str, Callable[[Inputs], Outputs]],
    not_run: dict[str, str],
) -> Case:
    def make_inputs(seed: int, device: torch.device) -> Inputs:
        return {name: value.to(device) for name, value in _drawn(seed, rays, exact).items()}

    products = 64 * (36 + 16 + 32 + 3)
    return Case(
        name=f"{what}, {rays} rays of 200 x 200, float32",
        make_inputs=make_inputs,
        variants=lambda: variants,
        truth=lambda inputs: _truth(inputs, exact, backward),
        reference=plain,
        floor=2e-7 if backward else 1e-5,
        floor_why="8 roundings of a loss of 0.2; of a rendering 100 of a colour of 1, for some 40 samples a ray",
        moved_bytes=samples * 8 * 8 * 16 * (3 if backward else 1),
        flops=2 * samples * products * (3 if backward else 1),
        items=samples,
        references=references,
        not_run=not_run,
    )


def cases(device: torch.device) -> Sequence[Case]:
    """A training step's rays, and a picture of 200 x 200 in four parts."""
    return [training(1024, device), rendering(10_000, device)]


if __name__ == "__main__":
    main("fast_step", cases, __doc__ or "")
