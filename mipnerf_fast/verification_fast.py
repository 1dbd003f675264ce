"""The fast model's operations for `verify`: each with arrays on which rounding decides nothing but roundings.

Rays and points keep away from the faces of cells, where the last bit of a position decides what is found.

The networks' products in TF32 are cases of their own, where the device has them. What float64 computes there is not
rounded to TF32; the reference in float32 is, so a kernel's error stays within twice what this rounding makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import fast_reference, ops, reference
from .backend import current_backend
from .ops.fast_step import FastFields, FastGradients, MarchRays, PixelSource
from .ops.implementations import why_no_kernel
from .verification_case import Case, Tensors

_GRID = reference.hash_grid(levels=4, coarsest=4, finest=40, table_size=2**9)
_CELLS, _WIDTH, _FEATURES, _CUTOFF = 32, 24, 4, 0.02
_MARCH = {"box_half": 1.5, "step_scale": 1.0, "min_step": 0.01, "max_step": 0.05}
# How far, in cells, points and the middles of samples stay from the faces that matter. Positions in cells are at most
# 40 and are sums of some hundred steps: in float32 they are right to 100 x 40 x 2^-24 = 2.4e-4.
_MARGIN = 1e-3
_FLOAT32 = (torch.float32,)


def _rounded(arrays: Tensors) -> Tensors:
    """The values that float32 holds, in float64; integers as they are."""
    return {
        name: value.float().double() if value.is_floating_point() else value for name, value in arrays.items()
    }


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _native() -> bool:
    return current_backend() != "reference"


def _served_in_tf32(operation: str) -> Callable[[torch.device, torch.dtype, torch.dtype | None], str | None]:
    def served(device: torch.device, dtype: torch.dtype, out_dtype: torch.dtype | None) -> str | None:
        missing = ops.why_no_tf32(device) or why_no_kernel(operation, device.type, dtype)
        return None if missing else "tensor cores"

    return served


# ----------------------------------------------------------------------------------------------------- encoding


def _points(generator: torch.Generator, count: int = 600) -> Tensors:
    points, scales = _rand(generator, count, 3), 10 ** (-4 + 3.5 * _rand(generator, count))
    keep = torch.ones(count, dtype=torch.bool)
    for n in _GRID.resolutions:
        keep &= ((points * n - (points * n).round()).abs() > _MARGIN).all(-1)
        for kind in ("gaussian", "erf"):
            keep &= (reference.attenuation(scales, n, kind, 0.0) - _CUTOFF).abs() > _MARGIN * _CUTOFF
    return _rounded(
        {
            "points": points[keep],
            "scales": scales[keep],
            "tables": _randn(generator, _GRID.entries, _FEATURES),
        }
    )


def _encode(kind: str) -> Case:
    def run(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
        del out_dtype
        return {"features": ops.hash_encode(a["points"], a["scales"], a["tables"], _GRID, kind, _CUTOFF)}

    inputs = ("points", "scales", "tables")
    return Case("hash_encode", kind, inputs, run, make=_points, unit="sample or entry")


# ----------------------------------------------------------------------------------------------- rays and the model


def _block() -> tuple[tuple[int, int], ...]:
    """The occupied cells along z, y, x."""
    return ((9, 22), (7, 25), (10, 20))


def _masks() -> list[tuple[Tensor, Tensor]]:
    densities = torch.zeros(_CELLS, _CELLS, _CELLS)
    (z0, z1), (y0, y1), (x0, x1) = _block()
    densities[z0:z1, y0:y1, x0:x1] = 1
    return reference.occupancy_masks(densities, 0.5)


def _rays(generator: torch.Generator, count: int = 300) -> Tensors:
    """Rays of many widths towards a block of occupied cells, those whose samples rounding could not move in or out."""
    origins = torch.tensor([0.0, 0.0, 4.0], dtype=torch.float64) + 0.1 * _randn(generator, count, 3)
    directions = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64) + 0.2 * _randn(generator, count, 3)
    one = torch.ones(count, 1, dtype=torch.float64)
    arrays = _rounded(
        {
            "origins": origins,
            "directions": directions,
            "radii": 0.002 + 0.05 * _rand(generator, count, 1) ** 3,
            "near": 2 * one,
            "far": 6 * one,
            "phase": _rand(generator, count, 1),
            "background": _rand(generator, count, 3),
            "target": _rand(generator, count, 3),
        }
    )
    keep = _unambiguous(arrays)
    return {name: value[keep] for name, value in arrays.items()} | {"masks": reference.pack_masks(_masks())}


def _unambiguous(a: Tensors) -> Tensor:
    """Which rays keep their middles a margin away from the faces of every mask's block, and their number of steps."""
    side, pixel = 2 * _MARCH["box_half"], a["radii"] * math.sqrt(3.0)
    enter, leave = reference.box_interval(
        a["origins"], a["directions"], a["near"], a["far"], _MARCH["box_half"]
    )
    width = (0.5 * (enter + leave))[:, None] * pixel / side * _CELLS
    edges = torch.tensor([0.75, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)  # of `reference.mask_for_width`
    keep = ((width - edges).abs() > _MARGIN).all(-1)

    def step(t: Tensor) -> Tensor:
        return torch.clamp(_MARCH["step_scale"] * pixel[:, 0] * t, _MARCH["min_step"], _MARCH["max_step"])

    t = enter + a["phase"][:, 0] * step(enter)
    faces = [
        torch.tensor([face / mask.shape[0] for face in _faces(mask, axis)], dtype=torch.float64)
        for mask, _ in _masks()
        for axis in range(3)
    ]
    while bool((t < leave).any()):
        middle = t + 0.5 * step(t)
        x = (a["origins"] + middle[:, None] * a["directions"] + _MARCH["box_half"]) / side
        for number, positions in enumerate(faces):
            apart = (x[:, number % 3, None] - positions).abs() * _CELLS
            keep &= (apart > _MARGIN).all(-1)
        t = t + step(t)
        keep &= (t - leave).abs() > _MARGIN / _CELLS
    return keep


def _faces(mask: Tensor, axis: int) -> list[int]:
    """Where a mask's occupied block begins and ends along an axis (0 is x, the mask's last); the box's sides too."""
    along = mask.amax(tuple(d for d in range(3) if d != 2 - axis)).nonzero()[:, 0]
    return [0, int(along[0]), int(along[-1]) + 1, mask.shape[0]]


def _march(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
    del out_dtype
    rays = (a["origins"], a["directions"], a["radii"], a["near"], a["far"], a["phase"])
    found = ops.march(*rays, a["masks"], _CELLS, *_MARCH.values())
    return {
        "ray_starts": found.ray_starts,
        "t0": found.t0,
        "t1": found.t1,
        "means": found.means,
        "scales": found.scales,
    }


def _networks(generator: torch.Generator, layers: int) -> Tensors:
    inputs = reference.density_inputs(len(_GRID.resolutions) * _FEATURES)
    arrays = {
        "tables": 0.5 * _randn(generator, _GRID.entries, _FEATURES),
        "density_in": _randn(generator, _WIDTH, inputs) * math.sqrt(2 / inputs),
        "density_out": _randn(generator, 16, _WIDTH) * math.sqrt(2 / _WIDTH),
        "colour_in": _randn(generator, _WIDTH, 32) * 0.25,
        "colour_out": _randn(generator, 3, _WIDTH) * math.sqrt(2 / _WIDTH),
    }
    if layers == 2:
        arrays["colour_hidden"] = _randn(generator, _WIDTH, _WIDTH) * math.sqrt(2 / _WIDTH)
    return arrays


def _fields(a: Tensors, tf32: bool = False) -> FastFields:
    """The model in arrays; tf32: its products in TF32, but in float64, which is what they are compared with."""
    return FastFields(
        tables=a["tables"],
        density_in=a["density_in"],
        density_out=a["density_out"],
        colour_in=a["colour_in"],
        colour_hidden=a.get("colour_hidden"),
        colour_out=a["colour_out"],
        masks=a["masks"],
        resolutions=list(_GRID.resolutions),
        table_size=_GRID.table_size,
        attenuation="gaussian",
        cutoff=_CUTOFF,
        scale_input=True,
        scale_low=1e-3,
        scale_high=2e-2,
        occupancy_resolution=_CELLS,
        box_half=_MARCH["box_half"],
        step_scale=_MARCH["step_scale"],
        min_step=_MARCH["min_step"],
        max_step=_MARCH["max_step"],
        tf32=tf32 and a["tables"].dtype == torch.float32,
    )


def _scene(layers: int, generator: torch.Generator) -> Tensors:
    return _rays(generator) | _rounded(_networks(generator, layers))


def _marched(a: Tensors) -> MarchRays:
    return MarchRays(*(a[name] for name in MarchRays._fields))


def _render(a: Tensors, tf32: bool) -> Tensors:
    render = ops.fast_render if _native() else fast_reference.fast_render
    return dict(zip(("rgb", "distance", "acc"), render(_marched(a), _fields(a, tf32)), strict=True))


def _step(a: Tensors, tf32: bool) -> Tensors:
    fields = _fields(a, tf32)
    gradients = FastGradients(
        *(None if a.get(name) is None else torch.zeros_like(a[name]) for name in FastGradients._fields)  # type: ignore[arg-type]
    )
    step = ops.fast_train_step if _native() else fast_reference.fast_train_step
    found = step(_marched(a), a["target"], 0.1, fields, gradients)
    numbers = torch.tensor([found.loss, found.squared_error], dtype=torch.float64)
    named = {f"gradient to {n}": g for n, g in gradients._asdict().items() if g is not None}
    if not tf32:  # where a ray ends is the rounding of its densities too
        named["samples"] = torch.tensor([found.samples, found.counted])
    return {"loss and squared error": numbers} | named


def _of_model(
    operation: str,
    name: str,
    run: Callable[[Tensors, bool], Tensors],
    make: Callable[[torch.Generator], Tensors],
    unit: str,
) -> tuple[Case, Case]:
    """What the whole model computes, in float32 and with products in TF32."""

    def case(tf32: bool) -> Case:
        return Case(
            operation,
            f"{name}, TF32" if tf32 else name,
            (),
            lambda a, out_dtype: run(a, tf32),
            differentiable=False,
            in_dtypes=_FLOAT32,
            make=make,
            unit=unit,
            served=_served_in_tf32(operation) if tf32 else None,
        )

    return case(False), case(True)


# ------------------------------------------------------------------------------------------ networks, compositing


def _samples(layers: int, generator: torch.Generator) -> Tensors:
    samples, rays = 333, 20
    directions = torch.nn.functional.normalize(_randn(generator, rays, 3), dim=-1)
    arrays = _networks(generator, layers)
    del arrays["tables"]
    return _rounded(
        arrays
        | {
            "features": _randn(generator, samples, len(_GRID.resolutions) * _FEATURES + 3),
            "harmonics": reference.spherical_harmonics(directions),
            "rays": torch.randint(rays, (samples,), generator=generator),
        }
    )


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
        served=_served_in_tf32("tiny_mlp") if tf32 else None,
        make=lambda generator: _samples(layers, generator),
        unit="row",
    )


def _packed(generator: torch.Generator) -> Tensors:
    counts = torch.randint(0, 60, (50,), generator=generator)
    counts[3], counts[4] = 0, 1
    samples = int(counts.sum())
    density = 20 * _rand(generator, samples) ** 2
    density[::7] = 0
    return _rounded(
        {
            "rgb": _rand(generator, samples, 3),
            "density": density,
            "lengths": 0.02 + 0.02 * _rand(generator, samples),
            "middles": 2 + 4 * _rand(generator, samples),
            "ray_starts": torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            "background": _rand(generator, 50, 3),
            "near": torch.full((50, 1), 2.0, dtype=torch.float64),
        }
    )


def _packed_composite(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
    del out_dtype
    names = ("rgb", "density", "lengths", "middles", "ray_starts", "background", "near")
    return ops.packed_composite(*(a[name] for name in names))._asdict()


# --------------------------------------------------------------------------------- occupancy, drawing, optimiser


def _occupancy(generator: torch.Generator) -> Tensors:
    arrays = _scene(1, generator)
    return arrays | {"densities": (2 * _rand(generator, _CELLS, _CELLS, _CELLS)).float().double()}


def _update(a: Tensors, tf32: bool) -> Tensors:
    densities, masks = a["densities"].clone(), a["masks"].clone()
    update = ops.occupancy_update if _native() else fast_reference.occupancy_update
    # The mean of the grid is above the largest threshold allowed: rounding does not decide which cells are occupied.
    update(densities, 0.01, 7, 32, 16, 0.5, 0.25, _fields(a | {"masks": masks}, tf32))
    return {"densities": densities}


def _build_masks(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
    del out_dtype
    masks = torch.zeros_like(a["masks"])
    build = ops.occupancy_masks if _native() else fast_reference.occupancy_masks
    build(a["densities"], 0.25, masks)
    return {"masks": masks}


def _source(generator: torch.Generator) -> Tensors:
    heights, widths = torch.tensor([6, 3, 6, 3]), torch.tensor([8, 4, 8, 4])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (heights * widths).cumsum(0)])
    return {
        "pixels": torch.randint(256, (int(offsets[-1]), 4), generator=generator, dtype=torch.uint8),
        "offsets": offsets,
        "heights": heights,
        "widths": widths,
        "c2w": _randn(generator, 4, 3, 4).float().double(),
        "focals": torch.tensor([10.0, 5.0, 10.0, 5.0], dtype=torch.float64),
        "nears": torch.full((4,), 2.0, dtype=torch.float64),
        "fars": torch.full((4,), 6.0, dtype=torch.float64),
        "order": torch.tensor([0, 2, 1, 3]),
        "group_ends": torch.tensor([2, 4]),
        "group_shares": torch.tensor([0.625, 1.0], dtype=torch.float64),
    }


def _draw(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
    del out_dtype
    draw = ops.draw_rays if _native() else fast_reference.draw_rays
    rays, target = draw(PixelSource(*(a[name] for name in PixelSource._fields)), 11, 5, 500, True, 1.0)
    return {name: value for name, value in rays._asdict().items() if value is not None} | {"target": target}


_ADAM = ("values", "gradient", "moment1", "moment2")


def _moments(generator: torch.Generator) -> Tensors:
    count = 1003
    gradient = _randn(generator, count)
    gradient[::3] = 0
    return _rounded(
        {
            "values": _randn(generator, count),
            "gradient": gradient,
            "moment1": 0.1 * _randn(generator, count),
            "moment2": 0.01 * _rand(generator, count),
        }
    )


def _adam(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
    del out_dtype
    mine = {name: a[name].clone() for name in _ADAM}
    adam = ops.sparse_adam if _native() else fast_reference.sparse_adam
    adam(mine["values"], mine["gradient"], mine["moment1"], mine["moment2"], 1e-2, 0.9, 0.99, 1e-15, 7)
    return mine


FAST_CASES = (
    Case("draw_rays", "random background", (), _draw, False, in_dtypes=_FLOAT32, make=_source, unit="ray"),
    Case("march", "rays of many widths", (), _march, False, make=_rays, unit="sample"),
    *(_encode(kind) for kind in ("gaussian", "erf", "none")),
    *(_mlp(layers, tf32) for tf32 in (False, True) for layers in (1, 2)),
    Case(
        "packed_composite",
        "rays that end early, empty rays",
        ("rgb", "density", "lengths", "background"),
        _packed_composite,
        make=_packed,
        unit="row",
    ),
    *_of_model("fast_step", "training step", _step, lambda g: _scene(1, g), "row"),
    *_of_model("fast_step", "training step, two colour layers", _step, lambda g: _scene(2, g), "row"),
    *_of_model("fast_step", "rendering", _render, lambda g: _scene(1, g), "ray"),
    *_of_model("occupancy", "visited cells", _update, _occupancy, "layer"),
    Case("occupancy", "masks", (), _build_masks, False, in_dtypes=_FLOAT32, make=_occupancy, unit="word"),
    Case(
        "sparse_adam",
        "step 7, a third untouched",
        (),
        _adam,
        False,
        in_dtypes=_FLOAT32,
        make=_moments,
        unit="entry",
    ),
)
