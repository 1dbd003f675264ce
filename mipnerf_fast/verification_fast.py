"""The fast model's operations for `verify`.

The networks' products in TF32, tables in float16 and the operators of a captured step are cases of their own, where
the device has them. What float64 computes there is not rounded so; the reference in float32 is, so a kernel's error
stays within twice what this rounding makes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import fast_reference, ops
from . import verification_fast_arrays as arrays
from .backend import current_backend
from .ops import fast_captured
from .ops.fast_captured import StepClock
from .ops.fast_step import FastFields, FastGradients, MarchRays, PixelSource, table_sums
from .ops.implementations import why_no_kernel
from .verification_case import Case, Tensors
from .verification_fast_arrays import CELLS, CUTOFF, GRID, MARCH

_FLOAT32 = (torch.float32,)


def _native() -> bool:
    return current_backend() != "reference"


def _served(
    operation: str, tf32: bool = False, captured: bool = False
) -> Callable[[torch.device, torch.dtype, torch.dtype | None], str | None]:
    def served(device: torch.device, dtype: torch.dtype, out_dtype: torch.dtype | None) -> str | None:
        missing = why_no_kernel(operation, device.type, dtype)
        if tf32:
            missing = missing or ops.why_no_tf32(device)
        if captured:
            missing = missing or fast_captured.kernels_for(device)
        return None if missing else "tensor cores" if tf32 else "captured steps"

    return served


# ----------------------------------------------------------------------------------------------------- encoding


def _encode(kind: str) -> Case:
    def run(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
        del out_dtype
        return {"features": ops.hash_encode(a["points"], a["scales"], a["tables"], GRID, kind, CUTOFF)}

    inputs = ("points", "scales", "tables")
    return Case("hash_encode", kind, inputs, run, make=arrays.points, unit="sample or entry")


# ----------------------------------------------------------------------------------------------- rays and the model


def _march(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
    del out_dtype
    rays = (a["origins"], a["directions"], a["radii"], a["near"], a["far"], a["phase"])
    found = ops.march(*rays, a["masks"], CELLS, *MARCH.values())
    return {
        "ray_starts": found.ray_starts,
        "t0": found.t0,
        "t1": found.t1,
        "means": found.means,
        "scales": found.scales,
    }


def _fields(a: Tensors, half: bool, tf32: bool) -> FastFields:
    """The model in arrays; tables in float16 and products in TF32 if wanted, but not what they are compared with."""
    is_truth = a["tables"].dtype == torch.float64
    return FastFields(
        tables=a["tables"].half() if half and not is_truth else a["tables"],
        density_in=a["density_in"],
        density_out=a["density_out"],
        colour_in=a["colour_in"],
        colour_hidden=a.get("colour_hidden"),
        colour_out=a["colour_out"],
        masks=a["masks"],
        resolutions=list(GRID.resolutions),
        table_size=GRID.table_size,
        attenuation="gaussian",
        cutoff=CUTOFF,
        scale_input=True,
        scale_low=1e-3,
        scale_high=2e-2,
        occupancy_resolution=CELLS,
        box_half=MARCH["box_half"],
        step_scale=MARCH["step_scale"],
        min_step=MARCH["min_step"],
        max_step=MARCH["max_step"],
        tf32=tf32 and not is_truth,
    )


def _marched(a: Tensors) -> MarchRays:
    return MarchRays(*(a[name] for name in MarchRays._fields))


def _render(a: Tensors, half: bool, tf32: bool) -> Tensors:
    render = ops.fast_render if _native() else fast_reference.fast_render
    return dict(zip(("rgb", "distance", "acc"), render(_marched(a), _fields(a, half, tf32)), strict=True))


def _zeros(a: Tensors) -> FastGradients:
    return FastGradients(
        *(None if a.get(name) is None else torch.zeros_like(a[name]) for name in FastGradients._fields)  # type: ignore[arg-type]
    )


def _of_step(loss: float, squared_error: float, gradients: FastGradients) -> Tensors:
    numbers = {"loss and squared error": torch.tensor([loss, squared_error], dtype=torch.float64)}
    return numbers | {f"gradient to {n}": g for n, g in gradients._asdict().items() if g is not None}


def _step(a: Tensors, half: bool, tf32: bool) -> Tensors:
    gradients = _zeros(a)
    step = ops.fast_train_step if _native() else fast_reference.fast_train_step
    found = step(_marched(a), a["target"], 0.1, _fields(a, half, tf32), gradients)
    named = _of_step(found.loss, found.squared_error, gradients)
    if not tf32 and not half:  # where a ray ends is the rounding of its densities too
        named["samples"] = torch.tensor([found.samples, found.counted])
    return named


def _of_model(
    operation: str,
    name: str,
    run: Callable[[Tensors, bool, bool], Tensors],
    make: Callable[[torch.Generator], Tensors],
    unit: str,
    in_half: tuple[bool, ...] = (False, True),
) -> tuple[Case, ...]:
    """What the whole model computes, from tables in float32 and in float16, in float32 and with products in TF32."""

    def case(half: bool, tf32: bool) -> Case:
        return Case(
            operation,
            f"{name}{', float16 tables' if half else ''}{', TF32' if tf32 else ''}",
            (),
            lambda a, out_dtype: run(a, half, tf32),
            differentiable=False,
            in_dtypes=_FLOAT32,
            make=make,
            unit=unit,
            served=_served(operation, tf32, half) if half or tf32 else None,
        )

    return tuple(case(half, tf32) for half in in_half for tf32 in (False, True))


# ------------------------------------------------------------------------------------------ networks, compositing


def _mlp(layers: int, tf32: bool) -> Case:
    hidden = ("colour_hidden",) if layers == 2 else ()
    names = ("features", "harmonics", "density_in", "density_out", "colour_in", *hidden, "colour_out")

    def run(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
        del out_dtype
        weights = (a["density_in"], a["density_out"], a["colour_in"], a.get("colour_hidden"), a["colour_out"])
        rounds = tf32 and a["features"].dtype == torch.float32
        return ops.tiny_mlp(a["features"], a["harmonics"], a["rays"], *weights, tf32=rounds)._asdict()

    return Case(
        "tiny_mlp",
        f"{layers} colour layer{'s' if layers == 2 else ''}{', TF32' if tf32 else ''}",
        names,
        run,
        in_dtypes=_FLOAT32 if tf32 else (torch.float32, torch.float64),
        served=_served("tiny_mlp", tf32) if tf32 else None,
        make=lambda generator: arrays.samples(layers, generator),
        unit="row",
    )


def _packed_composite(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
    del out_dtype
    names = ("rgb", "density", "lengths", "middles", "ray_starts", "background", "near")
    return ops.packed_composite(*(a[name] for name in names))._asdict()


# --------------------------------------------------------------------------------- occupancy, drawing, optimiser


def _update(a: Tensors, half: bool, tf32: bool) -> Tensors:
    densities, masks = a["densities"].clone(), a["masks"].clone()
    update = ops.occupancy_update if _native() else fast_reference.occupancy_update
    # The mean of the grid is above the largest threshold allowed: rounding does not decide which cells are occupied.
    update(densities, 0.01, 7, 32, 16, 0.5, 0.25, _fields(a | {"masks": masks}, half, tf32))
    return {"densities": densities}


def _build_masks(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
    del out_dtype
    masks = torch.zeros_like(a["masks"])
    build = ops.occupancy_masks if _native() else fast_reference.occupancy_masks
    build(a["densities"], 0.25, masks)
    return {"masks": masks}


def _drawn(rays: MarchRays, target: Tensor) -> Tensors:
    return {name: value for name, value in rays._asdict().items() if value is not None} | {"target": target}


def _draw(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
    del out_dtype
    draw = ops.draw_rays if _native() else fast_reference.draw_rays
    return _drawn(*draw(PixelSource(*(a[name] for name in PixelSource._fields)), 11, 5, 500, True, 1.0))


def _state(a: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of Adam, to be changed: values, gradient and moments."""
    return a["values"].clone(), a["gradient"].clone(), a["moment1"].clone(), a["moment2"].clone()


def _named(state: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensors:
    return dict(zip(("values", "gradient", "moment1", "moment2"), state, strict=True))


def _adam(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
    del out_dtype
    state = _state(a)
    adam = ops.sparse_adam if _native() else fast_reference.sparse_adam
    adam(*state, 1e-2, 0.9, 0.99, 1e-15, 7)
    return _named(state)


# --------------------------------------------------------------------------------------- the step that is captured

# Outside of a graph they do the same step. Not all rays are active: what lies behind must count for nothing.
_ACTIVE, _ROOM = 100, 64 * 1024


def _clock(device: torch.device, steps: int, active: int) -> StepClock:
    return StepClock(
        torch.tensor([steps], device=device),
        torch.tensor([active], dtype=torch.int32, device=device),
        torch.tensor([10.0], device=device),
        torch.tensor([0.02], device=device),
    )


def _captured_draw(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
    del out_dtype
    source = PixelSource(*(a[name] for name in PixelSource._fields))
    if not _native():
        return _drawn(*fast_reference.draw_rays(source, 11, 5, 448, True, 1.0))
    clock = _clock(source.pixels.device, 5, 448)
    rays, target = fast_captured.draw_rays_captured(source, 11, clock, 512, True, 1.0)
    return {name: value[:448] for name, value in _drawn(rays, target).items()}


def _captured_step(a: Tensors, half: bool, tf32: bool) -> Tensors:
    """With a second colour layer the tables' gradient is summed in fixed point."""
    rays, fields, gradients = _marched(a), _fields(a, half, tf32), _zeros(a)
    if _native():
        sums = None if fields.colour_hidden is None else table_sums(fields.tables)
        clock = _clock(fields.tables.device, 0, _ACTIVE)
        statistics = fast_captured.fast_train_step_captured(
            rays, a["target"], clock, _ROOM, 0.1, fields, gradients, sums
        )
        loss, squared_error, _, _, is_finite, taken = statistics.tolist()
    else:
        some = MarchRays(*(None if field is None else field[:_ACTIVE] for field in rays))  # type: ignore[arg-type]
        found = fast_reference.fast_train_step(some, a["target"][:_ACTIVE], 0.1, fields, gradients)
        loss, squared_error, is_finite, taken = found.loss, found.squared_error, found.is_finite, _ACTIVE
    counts = {"finite, rays": torch.tensor([int(is_finite), int(taken)])}
    return _of_step(loss, squared_error, gradients) | counts


def _captured_update(a: Tensors, half: bool, tf32: bool) -> Tensors:
    densities, fields = a["densities"].clone(), _fields(a | {"masks": a["masks"].clone()}, half, tf32)
    update = fast_captured.occupancy_update_captured if _native() else fast_reference.occupancy_update
    _, threshold = update(densities, 0.01, 7, 32, 16, 0.5, 0.25, fields)
    return {"densities": densities, "threshold": torch.tensor([float(threshold)], dtype=torch.float64)}


def _captured_adam(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
    """With the copy of the values in float16, which follows where they change."""
    del out_dtype
    state = _state(a)
    copy = state[0].clone() if state[0].dtype == torch.float64 else state[0].half()
    if _native():
        clock = _clock(copy.device, 6, 0)
        fast_captured.sparse_adam_captured(*state, copy, clock, 0.5, 0.9, 0.99, 1e-15)
    else:
        fast_reference.sparse_adam(*state, 0.01, 0.9, 0.99, 1e-15, 7)
        copy.copy_(state[0])
    return _named(state) | {"copy": copy}


def _statistics(generator: torch.Generator) -> Tensors:
    del generator
    return {"statistics": torch.tensor([0.1, 0.2, 3000.0, 2000.0, 1.0, 500.0], dtype=torch.float64)}


def _captured_pace(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
    """0.8 x 10 + 0.2 x 6 samples a ray make 445.2 rays of a batch of 4096."""
    del out_dtype
    statistics, clock = a["statistics"], _clock(a["statistics"].device, 41, 0)
    if _native():
        fast_captured.fast_pace_captured(statistics.double(), clock, 4096, 192, 8192)
        return {
            "samples per ray": clock.samples_per_ray,
            "rays, step": torch.cat([clock.active_rays, clock.step]),
        }
    pace = 0.8 * clock.samples_per_ray.to(statistics.dtype) + 0.2 * statistics[2] / statistics[5]
    rays = fast_captured.rays_of_pace(pace, 4096, 192, 8192)
    return {"samples per ray": pace, "rays, step": torch.tensor([rays, 42])}


def _captured(
    operation: str,
    name: str,
    run: Callable[[Tensors, torch.dtype | None], Tensors],
    make: Callable[[torch.Generator], Tensors],
    unit: str,
) -> Case:
    served = _served(operation, captured=True)
    return Case(operation, f"captured, {name}", (), run, False, (None,), _FLOAT32, make, unit, served)


FAST_CASES = (
    Case(
        "draw_rays", "random background", (), _draw, False, in_dtypes=_FLOAT32, make=arrays.source, unit="ray"
    ),
    _captured("draw_rays", "448 of 512", _captured_draw, arrays.source, "ray"),
    Case("march", "rays of many widths", (), _march, False, make=arrays.rays, unit="sample"),
    *(_encode(kind) for kind in ("gaussian", "erf", "none")),
    *(_mlp(layers, tf32) for tf32 in (False, True) for layers in (1, 2)),
    Case(
        "packed_composite",
        "rays that end early, empty rays",
        ("rgb", "density", "lengths", "background"),
        _packed_composite,
        make=arrays.packed,
        unit="row",
    ),
    *_of_model("fast_step", "training step", _step, lambda g: arrays.scene(1, g), "row"),
    *_of_model(
        "fast_step", "training step, two colour layers", _step, lambda g: arrays.scene(2, g), "row", (False,)
    ),
    *_of_model(
        "fast_step", "captured training step", _captured_step, lambda g: arrays.scene(1, g), "row", (True,)
    ),
    *_of_model(
        "fast_step",
        "captured training step, two colour layers",
        _captured_step,
        lambda g: arrays.scene(2, g),
        "row",
        (True,),
    ),
    *_of_model("fast_step", "rendering", _render, lambda g: arrays.scene(1, g), "ray"),
    _captured("fast_step", "pace", _captured_pace, _statistics, "number"),
    *_of_model("occupancy", "visited cells", _update, arrays.occupancy, "layer", (False,)),
    *_of_model("occupancy", "captured, visited cells", _captured_update, arrays.occupancy, "layer", (True,)),
    Case(
        "occupancy", "masks", (), _build_masks, False, in_dtypes=_FLOAT32, make=arrays.occupancy, unit="word"
    ),
    Case(
        "sparse_adam",
        "step 7, a third untouched",
        (),
        _adam,
        False,
        in_dtypes=_FLOAT32,
        make=arrays.moments,
        unit="entry",
    ),
    _captured("sparse_adam", "step 7, with a copy", _captured_adam, arrays.moments, "entry"),
)
