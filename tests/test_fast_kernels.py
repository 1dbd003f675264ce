"""The fast model's CUDA kernels, emulated, against the CPU operators and float64.

Bounds: an emulated kernel may differ from float64 truth by twice what the CPU operator (or the float32 reference) does,
plus a floor of a few units in the last place of the largest value: both round, in different orders. What is compared
with ``assert_array_equal`` comes from the same formulas, compiled without contraction on both sides.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulation import harness
from cuda_emulation.faults import broken_program
from cuda_emulation.harness import EmulationError
from rounding_bound import within_rounding
from test_fast_step import SMALL, VARIANTS, _composed, _model, _rays, _source
from torch import Tensor

from mipnerf_fast import fast_reference, ops, reference
from mipnerf_fast.ops.fast_step import FastFields, FastGradients, MarchRays

FLOOR = 16 * 2.0**-23
SEEDS = range(20)
OPERATORS, STEP, ENCODING = "fast_operators", "fast_step", "hash_encode"
RAYS = ("origins", "directions", "radii", "near", "far", "phase")


def instance(tables: np.ndarray) -> tuple[str, ...]:
    """How the program of the step is built for tables: none for four numbers of float32."""
    kind, features = "Half" if tables.dtype == np.float16 else "float", tables.shape[1]
    is_usual = kind == "float" and features == 4
    return () if is_usual else (f"MIPNERF_TABLES={kind}", f"MIPNERF_FEATURES={features}")


def emulate(
    program: str,
    kernel: str,
    arrays: Mapping[str, Tensor | np.ndarray | None],
    outputs: Mapping[str, Any],
    scalars: Mapping[str, int | float] | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, np.ndarray]:
    """One run of a program: float32 for tensors of floats; an output is a shape, of float32, or first values."""
    given = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in arrays.items()}
    if program == STEP and (tables := given.get("tables")) is not None:
        options["defines"] = instance(tables)
    wanted = {
        name: value.numpy().copy()
        if isinstance(value, Tensor)
        else value
        if isinstance(value, np.ndarray)
        else (value, np.float32)
        for name, value in outputs.items()
    }
    return harness.run(program, given, wanted, {"kernel": kernel, **(scalars or {})}, seed, **options)


def bounded(found: np.ndarray, rounded: Tensor, truth: Tensor, floor: float = FLOOR) -> None:
    """The rule at the top of this file."""
    size = max(truth.abs().max().item(), 1e-30) if truth.numel() else 0.0
    allowed = 2 * ((rounded.double() - truth).abs().max().item() if truth.numel() else 0.0) + floor * size
    error = np.abs(found.astype(np.float64).reshape(truth.shape) - truth.detach().numpy())
    assert not np.isnan(error).any()
    assert error.max(initial=0.0) <= allowed


# ------------------------------------------------------------------------------------------------ small operators


@pytest.mark.parametrize(
    ("samples", "features", "kind", "seed"), [(133, 4, 1, 0), (70, 2, 2, 1), (1, 4, 0, 2), (0, 2, 1, 3)]
)
def test_hash_encode(samples: int, features: int, kind: int, seed: int) -> None:
    grid = reference.hash_grid(levels=4, coarsest=4, finest=50, table_size=2**9)
    points, scales = torch.rand(samples, 3), 0.001 + 0.05 * torch.rand(samples) ** 2
    if samples > 2:
        points[0], points[1] = 0.0, 1.0
    tables, cotangent = torch.randn(grid.entries, features), torch.randn(samples, 4 * features)
    options = (list(grid.resolutions), grid.table_size, kind, 0.02)
    found = emulate(
        ENCODING,
        "",
        {
            "points": points,
            "scales": scales,
            "tables": tables,
            "grad_features": cotangent,
            "resolutions": np.array(grid.resolutions),
        },
        {
            "features": cotangent.shape,
            "grad_points": points.shape,
            "grad_scales": scales.shape,
            "grad_tables": torch.zeros_like(tables),
        },
        {"table_size": grid.table_size, "attenuation": kind, "cutoff": 0.02},
        seed,
    )
    raw = torch.ops.mipnerf_fast
    results = []
    for dtype in (torch.float32, torch.float64):
        p, s, t, g = (x.to(dtype) for x in (points, scales, tables, cotangent))
        results.append(
            (
                raw.hash_encode_forward(p, s, t, *options),
                *raw.hash_encode_backward(g, p, s, t, *options, False),
            )
        )
    for name, rounded, truth in zip(
        ("features", "grad_points", "grad_scales", "grad_tables"), *results, strict=True
    ):
        bounded(found[name], rounded, truth)


def march_inputs(count: int) -> tuple[MarchRays, Tensor, dict[str, float]]:
    rays = _rays(count)
    if count > 3:
        rays.origins[1] = torch.tensor([9.0, 9.0, 9.0])  # misses the box
        rays.directions[2, 1] = 0.0
    masks = reference.pack_masks(reference.occupancy_masks(torch.rand(32, 32, 32), 0.97))
    numbers = {"box_half": 1.5, "step_scale": 1.0, "min_step": 0.02, "max_step": 0.06}
    return rays, masks, numbers


@pytest.mark.parametrize(
    ("count", "active", "capacity", "seed"),
    [(150, None, 10**6, 0), (150, 97, 900, 1), (5, 0, 10, 2), (3, 3, 0, 3)],
)
def test_march(count: int, active: int | None, capacity: int, seed: int) -> None:
    rays, masks, numbers = march_inputs(count)
    walked = count if active is None else active
    wanted = torch.ops.mipnerf_fast.march(
        *(field[:walked] for field in rays[:6]),
        masks,
        32,
        *numbers.values(),  # type: ignore[index]
    )
    samples = wanted[1].shape[0]
    found = emulate(
        OPERATORS,
        "march",
        {
            **dict(zip(RAYS, rays[:6], strict=True)),
            "masks": masks.numpy().view(np.uint32),
            "active_rays": None if active is None else np.array([active], np.int32),
        },
        {
            "starts": np.full(count + 1, -1),
            "rays": np.full(samples, -1),
            "t0": (samples,),
            "t1": (samples,),
            "means": (samples, 3),
            "scales": (samples,),
            "fit_rays": np.full(1, -1, np.int32),
            "fit_samples": np.full(1, -1, np.int32),
        },
        {**numbers, "resolution": 32, "capacity": capacity},
        seed,
    )
    starts = wanted[0].numpy()
    np.testing.assert_array_equal(found["starts"][: walked + 1], starts)
    assert (found["starts"][walked:] == samples).all()
    for name, truth in zip(("rays", "t0", "t1", "means", "scales"), wanted[1:], strict=True):
        np.testing.assert_array_equal(found[name], truth.numpy())
    fits = int((starts[1:] <= capacity).sum())
    assert found["fit_rays"][0] == fits
    assert found["fit_samples"][0] == starts[fits]
    assert walked < 100 or (samples > 900 and 0 < (starts[1:] == starts[:-1]).sum() < walked)


@pytest.mark.parametrize(
    ("lengths", "seed"), [([3, 0, 41, 1, 8, 16, 0, 9] * 5, 0), ([0], 1), ([200], 2), ([], 3)]
)
def test_packed_composite(lengths: list[int], seed: int) -> None:
    rays, samples = len(lengths), sum(lengths)
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)
    density = 6 * torch.rand(samples) ** 3
    density[::17] = 0.0
    density[5::50] = 1e4  # opaque: what lies behind does not count
    inputs = {
        "rgb": torch.rand(samples, 3),
        "density": density,
        "lengths": 0.2 * torch.rand(samples),
        "middles": 2 + torch.rand(samples),
        "ray_starts": starts,
        "background": torch.rand(rays, 3),
        "near": torch.full((rays, 1), 2.0),
    }
    cotangents = (torch.randn(rays, 3), torch.randn(rays), torch.randn(rays), torch.randn(samples))
    found = emulate(
        OPERATORS,
        "packed_composite",
        {
            **inputs,
            **dict(zip(("cot_rgb", "cot_distance", "cot_acc", "cot_weights"), cotangents, strict=True)),
        },
        {
            "out_rgb": (rays, 3),
            "out_distance": (rays,),
            "out_acc": (rays,),
            "out_weights": (samples,),
            "grad_rgb": (samples, 3),
            "grad_density": (samples,),
            "grad_lengths": (samples,),
            "grad_background": (rays, 3),
        },
        seed=seed,
    )
    raw, results = torch.ops.mipnerf_fast, []
    for dtype in (torch.float32, torch.float64):
        given = [x.to(dtype) if x.is_floating_point() else x for x in inputs.values()]
        cots = [x.to(dtype) for x in cotangents]
        results.append((*raw.packed_composite_forward(*given), *raw.packed_composite_backward(*cots, *given)))
    names = [f"out_{n}" for n in ("rgb", "distance", "acc", "weights")]
    names += [f"grad_{n}" for n in ("rgb", "density", "lengths", "background")]
    for name, rounded, truth in zip(names, *results, strict=True):
        bounded(found[name], rounded, truth)


@pytest.mark.parametrize(
    ("size", "on_device"), [(4100, False), (4099, False), (1, True), (64, True), (0, False)]
)
def test_sparse_adam(size: int, on_device: bool) -> None:
    step, rate, ratio = 700, 1e-2, 0.5
    state = {"values": torch.randn(size), "gradient": torch.randn(size)}
    state |= {"moment1": torch.randn(size) * 0.1, "moment2": torch.rand(size) * 0.01}
    state["gradient"][torch.rand(size) < 0.6] = 0
    state["gradient"][: size // 2] = 0
    found = emulate(
        OPERATORS,
        "sparse_adam",
        {
            "step_on_device": np.array([step - 1]) if on_device else None,
            "rate_on_device": np.array([rate / ratio], np.float32) if on_device else None,
        },
        {**state, "copy": state["values"].half()},
        {"rate": rate, "beta1": 0.9, "beta2": 0.99, "eps": 1e-15, "step": step, "rate_ratio": ratio},
    )
    order = ("values", "gradient", "moment1", "moment2")
    wanted = {name: value.clone() for name, value in state.items()}
    ops.sparse_adam(*(wanted[name] for name in order), rate, 0.9, 0.99, 1e-15, step)
    for name in order:
        # The device's clock knows the rate to float32: a few units in the last place of an update of at most 10 rates.
        atol = 100 * rate * 2.0**-23 if on_device else 0.0
        np.testing.assert_allclose(
            found[name], wanted[name].numpy(), rtol=0 if not on_device else 2e-7, atol=atol
        )
    np.testing.assert_array_equal(found["copy"], found["values"].astype(np.float16))


@pytest.mark.parametrize(("channels", "active", "seed"), [(4, None, 0), (3, 77, 1)])
def test_draw_rays(channels: int, active: int | None, seed: int) -> None:
    source, count, step = _source(channels), 200, 2**33 + 5
    rays, target = ops.draw_rays(source, 11, step, count, True, 1.0)
    drawn = count if active is None else active
    wanted = (*rays, target)
    names = (*RAYS, "background", "target")
    found = emulate(
        OPERATORS,
        "draw_rays",
        {
            **source._asdict(),
            "active_rays": None if active is None else np.array([active], np.int32),
            "step_on_device": None if active is None else np.array([step]),
        },
        {name: field.shape for name, field in zip(names, wanted, strict=True)},  # type: ignore[union-attr]
        {"seed": 11, "step": step if active is None else 0, "random_background": 1, "background_value": 1.0},
        seed,
    )
    for name, field in zip(names, wanted, strict=True):
        assert field is not None
        np.testing.assert_array_equal(found[name][:drawn], field[:drawn].numpy())
        assert np.isnan(found[name][drawn:]).all()  # untouched


class TinyMlpCase:
    """Numbers for the kernels of the two networks, and what they should give."""

    NAMES = ("out_rgb", "out_density", "grad_features", "grad_harmonics", "grad_weights")

    def __init__(self, samples: int, encoded: int, hidden: int, layers: int) -> None:
        inputs, rays = (encoded + 3) // 4 * 4, 9
        shapes = {"density_in": (hidden, inputs), "density_out": (16, hidden), "colour_in": (hidden, 32)}
        shapes |= {"colour_hidden": (hidden, hidden)} if layers == 2 else {}
        shapes |= {"colour_out": (3, hidden)}
        self.given = {"features": torch.randn(samples, encoded), "harmonics": torch.randn(rays, 16)}
        self.index = torch.randint(rays, (samples,))
        self.weights = {name: torch.randn(shape) / math.sqrt(shape[1]) for name, shape in shapes.items()}
        self.cotangents = torch.randn(samples, 3), torch.randn(samples)

    def emulated(
        self, seed: int, tf32: bool, program: str = OPERATORS, fault: int = 0, **options: Any
    ) -> dict[str, np.ndarray]:
        samples, encoded = self.given["features"].shape
        arrays = {**self.given, "rays": self.index, **self.weights}
        arrays |= dict(zip(("cot_rgb", "cot_density"), self.cotangents, strict=True))
        outputs: dict[str, Any] = {"out_rgb": (samples, 3), "out_density": (samples,)}
        outputs |= {"grad_features": (samples, encoded), "grad_harmonics": torch.zeros(9, 16)}
        outputs |= {"grad_weights": (sum(w.numel() for w in self.weights.values()),)}
        scalars = {"parts": 2, "tf32": int(tf32), "fault": fault}
        return emulate(program, "tiny_mlp", arrays, outputs, scalars, seed, **options)

    def by_reference(self, dtype: torch.dtype, tf32: bool) -> list[Tensor]:
        named = {name: x.to(dtype).requires_grad_() for name, x in (self.given | self.weights).items()}
        order = ("density_in", "density_out", "colour_in", "colour_hidden", "colour_out")
        out = reference.tiny_mlp(
            named["features"],
            named["harmonics"],
            self.index,
            *(named.get(name) for name in order),  # type: ignore[arg-type]
            tf32=tf32,
        )
        grads = torch.autograd.grad(out, list(named.values()), [c.to(dtype) for c in self.cotangents])
        flat = torch.cat([grad.reshape(-1) for grad in grads[2:]])
        return [out.rgb.detach(), out.density.detach(), *grads[:2], flat]


@pytest.mark.parametrize(
    ("samples", "encoded", "hidden", "layers", "seed"),
    [(150, 27, 64, 2, 0), (64, 67, 16, 1, 1), (1, 3, 40, 1, 2)],
)
def test_tiny_mlp(samples: int, encoded: int, hidden: int, layers: int, seed: int) -> None:
    case = TinyMlpCase(samples, encoded, hidden, layers)
    found = case.emulated(seed, tf32=False)
    raw, results = torch.ops.mipnerf_fast, []
    for dtype in (torch.float32, torch.float64):
        w = {name: value.to(dtype) for name, value in case.weights.items()}
        matrices = [
            w.get(n) for n in ("density_in", "density_out", "colour_in", "colour_hidden", "colour_out")
        ]
        arguments = (
            case.given["features"].to(dtype),
            case.given["harmonics"].to(dtype),
            case.index,
            *matrices,
            False,
        )
        grads = raw.tiny_mlp_backward(*(c.to(dtype) for c in case.cotangents), *arguments, True, True)
        flat = torch.cat([g.reshape(-1) for g in grads[2:]])
        results.append((*raw.tiny_mlp_forward(*arguments), *grads[:2], flat))
    for name, rounded, truth in zip(case.NAMES, *results, strict=True):
        bounded(found[name], rounded, truth)


@pytest.mark.parametrize(
    ("samples", "encoded", "hidden", "layers", "seed"),
    [(150, 35, 64, 2, 0), (64, 67, 16, 1, 1), (1, 3, 40, 1, 2), (200, 93, 56, 2, 3)],
)
def test_tiny_mlp_in_tf32(samples: int, encoded: int, hidden: int, layers: int, seed: int) -> None:
    case = TinyMlpCase(samples, encoded, hidden, layers)
    found = case.emulated(seed, tf32=True)
    rounded, truth = (case.by_reference(dtype, True) for dtype in (torch.float32, torch.float64))
    exact = case.by_reference(torch.float64, False)
    for name, *numbers in zip(case.NAMES, rounded, truth, exact, strict=True):
        within_rounding(found[name], *numbers)


# --------------------------------------------------------------------------------------------- the training step


def model_arrays(fields: FastFields) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model as the program of the step takes it: arrays, scalars."""
    arrays: dict[str, Any] = {n: getattr(fields, n) for n in FastGradients._fields}
    arrays |= {"masks": fields.masks.numpy().view(np.uint32), "resolutions": np.array(fields.resolutions)}
    kinds = {"none": 0, "gaussian": 1, "erf": 2}
    kind = fields.attenuation
    scalars = {
        n: getattr(fields, n) for n in FastFields._fields if isinstance(getattr(fields, n), int | float)
    }
    scalars |= {"attenuation": kinds.get(kind, kind), "scale_input": int(fields.scale_input)}  # type: ignore[call-overload]
    scalars["tf32"] = int(fields.tf32)
    return arrays, scalars


def emulate_step(
    rays: MarchRays, target: Tensor, fields: FastFields, seed: int, capacity: int = 4096, **options: Any
) -> dict[str, np.ndarray]:
    arrays, scalars = model_arrays(fields)
    outputs = {
        f"grad_{name}": np.zeros(value.shape, np.float32)
        for name in FastGradients._fields
        if (value := getattr(fields, name)) is not None
    }
    active = options.pop("active", None)
    if options.pop("fixed", False):
        outputs["table_sums"] = np.zeros(fields.tables.shape, np.int64)
    return emulate(
        STEP,
        "step",
        {
            **dict(zip(RAYS, rays[:6], strict=True)),
            "background": rays.background,
            "target": target,
            "active_rays": active,
            **arrays,
        },
        {**outputs, "statistics": np.zeros(6)},
        {**scalars, "beta": 0.1, "capacity": capacity, "parts": 3},
        seed,
        **options,
    )


@pytest.mark.parametrize(
    ("variant", "seed", "fixed"),
    [
        ("gaussian", 0, False),
        ("two colour layers", 1, False),
        ("aliased", 2, False),
        ("gaussian", 3, True),
        ("two colour layers", 4, True),
    ],
)
def test_step(variant: str, seed: int, fixed: bool) -> None:
    model, rays = _model(VARIANTS[variant]), _rays()
    rays.origins[5] = 9.0  # no sample
    with torch.no_grad():
        model.density_out[0] += 1.2  # some samples lie behind opaque matter
    fields, target = model.fields(), torch.rand(70, 3)
    found = emulate_step(rays, target, fields, seed, fixed=fixed)
    wanted = {}
    for dtype in (torch.float32, torch.float64):
        result, parameters = _composed(rays, fields, dtype)
        loss = torch.nn.functional.smooth_l1_loss(result.rgb, target.to(dtype), beta=0.1)
        loss.backward()
        wanted[dtype] = {name: parameter.grad for name, parameter in parameters.items()}
    statistics = found["statistics"]
    assert math.isclose(statistics[0], loss.item(), rel_tol=1e-6)
    assert math.isclose(statistics[1], ((result.rgb - target) ** 2).mean().item(), rel_tol=1e-6)
    marched = reference.fast_samples(*rays[:6], fields).rays.shape[0]
    assert statistics[2] == marched
    assert 0 < statistics[3] < marched
    assert list(statistics[4:]) == [1, 70]
    for name, truth in wanted[torch.float64].items():
        rounded = wanted[torch.float32][name]
        assert truth is not None and rounded is not None and truth.abs().max() > 0
        bounded(found[f"grad_{name}"], rounded, truth)


def by_autograd(rays: MarchRays, target: Tensor, fields: FastFields, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of the step, and its loss as `loss`."""
    result, parameters = _composed(rays, fields, dtype)
    loss = torch.nn.functional.smooth_l1_loss(result.rgb, target.to(dtype), beta=0.1)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    return {**grads, "loss": loss.detach()}


def checks_of(variant: str) -> Sequence[str]:
    """Two features take another program, and their threads do what those of four do: one build less."""
    return ["memory"] if VARIANTS[variant].features == 2 else harness.CHECKS


def rounding(fields: FastFields, half: bool, tf32: bool) -> tuple[FastFields, FastFields]:
    """A model that rounds as wanted, tables and features to float16, products to TF32; and one of its tables that does
    not round further."""
    tables = fields.tables.half() if half else fields.tables
    return fields._replace(tables=tables, tf32=tf32), fields._replace(tables=tables.float())


@pytest.mark.parametrize(
    ("variant", "half", "tf32", "fixed"),
    [
        ("gaussian", False, True, False),
        ("two colour layers", False, True, True),
        ("gaussian", True, False, True),
        ("gaussian", True, True, False),
        ("two colour layers", True, True, True),
        ("aliased", True, False, False),
        ("erf", True, False, False),
    ],
)
def test_step_that_rounds(variant: str, half: bool, tf32: bool, fixed: bool) -> None:
    """To float16, of tables all of whose entries differ, and to TF32."""
    model, rays, target = _model(VARIANTS[variant]), _rays(), torch.rand(70, 3)
    with torch.no_grad():
        model.density_out[0] += 1.2
    fields, precise = rounding(model.fields(), half, tf32)
    found = emulate_step(rays, target, fields, 3, fixed=fixed, checks=checks_of(variant))
    rounded, truth = (by_autograd(rays, target, fields, d) for d in (torch.float32, torch.float64))
    exact = by_autograd(rays, target, precise, torch.float64)
    assert found["statistics"][4] == 1 and found["statistics"][3] > 64
    within_rounding(found["statistics"][:1], *(x["loss"] for x in (rounded, truth, exact)))
    for name in parameter_names(fields):
        within_rounding(found[f"grad_{name}"], rounded[name], truth[name], exact[name])


def parameter_names(fields: FastFields) -> list[str]:
    return [name for name in FastGradients._fields if getattr(fields, name) is not None]


def test_step_leaves_rays_out_that_have_no_room() -> None:
    model, rays, target = _model(SMALL), _rays(), torch.rand(70, 3)
    fields = model.fields()
    starts = reference.fast_samples(*rays[:6], fields).ray_starts
    capacity = int(starts[40]) // 64 * 64
    fits = int((starts[1:] <= capacity).sum())
    found = emulate_step(rays, target, fields, 4, capacity=capacity)
    some = MarchRays(*(None if field is None else field[:fits] for field in rays))  # type: ignore[arg-type]
    alone = emulate_step(some, target[:fits], fields, 5)
    assert 0 < fits < 70 and found["statistics"][5] == fits
    active = emulate_step(rays, target, fields, 6, active=np.array([fits], np.int32))
    for name, value in alone.items():
        if name == "grad_tables":  # sums of floats in any order
            scale = np.abs(value).max()
            np.testing.assert_allclose(found[name], value, rtol=0, atol=FLOOR * scale)
            np.testing.assert_allclose(active[name], value, rtol=0, atol=FLOOR * scale)
        else:  # the order of these does not depend on the blocks'
            np.testing.assert_array_equal(found[name], value)
            np.testing.assert_array_equal(active[name], value)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("case", ["no rays", "no room", "no samples", "nan"])
def test_step_without_gradients(case: str, fixed: bool) -> None:
    model, rays = _model(SMALL), _rays(7)
    if case == "no samples":
        rays.origins.fill_(9.0)
    fields = model.fields()
    if case == "nan":
        fields.density_in[0, 0] = math.nan
    active = np.array([0], np.int32) if case == "no rays" else None
    capacity = 0 if case == "no room" else 1024
    found = emulate_step(rays, torch.rand(7, 3), fields, 7, capacity=capacity, active=active, fixed=fixed)
    assert all((value == 0).all() for name, value in found.items() if name != "statistics")
    assert found["statistics"][4] == (case != "nan")
    assert found["statistics"][5] == (7 if case in ("no samples", "nan") else 0)


def emulate_render(
    rays: MarchRays, fields: FastFields, seed: int, blocks: int, program: str = STEP, **options: Any
) -> list[np.ndarray]:
    """Colour, distance and opacity of rays."""
    (arrays, scalars), count = model_arrays(fields), len(rays.origins)
    outputs = {"out_rgb": (count, 3), "out_distance": (count,), "out_acc": (count,)}
    found = emulate(
        program,
        "render",
        {**dict(zip(RAYS, rays[:6], strict=True)), "background": rays.background, **arrays},
        {**outputs, "next_ray": np.zeros(1, np.int32)},
        {**scalars, "blocks": blocks, **options.pop("scalars", {})},
        seed,
        **options,
    )
    return [found[name] for name in outputs]


@pytest.mark.parametrize(
    ("variant", "blocks", "seed"),
    [("gaussian", 1, 0), ("two colour layers", 2, 1), ("aliased", 5, 2)],
)
def test_render(variant: str, blocks: int, seed: int) -> None:
    model, rays = _model(VARIANTS[variant]), _rays(150)
    rays.origins[[1, 70]] = 9.0
    fields = model.fields()
    found = emulate_render(rays, fields, seed, blocks)
    with torch.no_grad():
        rounded, truth = (_composed(rays, fields, d)[0] for d in (torch.float32, torch.float64))
    for one, a, b in zip(found, rounded, truth, strict=False):
        bounded(one, a, b)
    assert found[2][1] == 0 and found[1][1] == 2


def check_render_that_rounds(
    variant: str, half: bool, tf32: bool, seed: int, blocks: int, **options: Any
) -> None:
    model, rays = _model(VARIANTS[variant]), _rays(100)
    fields, precise = rounding(model.fields(), half, tf32)
    found = emulate_render(rays, fields, seed, blocks, **options)
    with torch.no_grad():
        rounded, truth = (_composed(rays, fields, d)[0] for d in (torch.float32, torch.float64))
        exact = _composed(rays, precise, torch.float64)[0]
    for one, *numbers in zip(found, rounded, truth, exact, strict=False):
        within_rounding(one, *numbers)


@pytest.mark.parametrize(
    ("variant", "half", "tf32", "blocks"),
    [
        ("gaussian", False, True, 1),
        ("two colour layers", False, True, 2),
        ("gaussian", True, False, 2),
        ("gaussian", True, True, 1),
        ("two colour layers", True, True, 5),
        ("erf", True, True, 1),
    ],
)
def test_render_that_rounds(variant: str, half: bool, tf32: bool, blocks: int) -> None:
    check_render_that_rounds(variant, half, tf32, 1, blocks, checks=checks_of(variant))


# Faults of tables in float16: file, what stands there, what is put in its place.
HALF_FAULTS = {
    "another corner's entry": (
        "hash_encode/hash_encode_device.cuh",
        "corner_entry(level, cell, corner))",
        "corner_entry(level, cell, corner ^ fault))",
    ),
    "numbers of an entry exchanged": (
        "hash_encode/hash_encode_device.cuh",
        "to_float(entry[corner].value[f])",
        "to_float(entry[corner].value[f ^ fault])",
    ),
    "features not rounded": (
        "fast_step/fast_step_device.cuh",
        "features = pack_to_float(rounded);",
        "if (!fault) features = pack_to_float(rounded);",
    ),
}


@pytest.fixture(scope="module")
def broken_half() -> Path:
    """A program that renders with four features of float16, over sources with every fault built in."""
    text = (harness.HERE / f"emulate_{STEP}.cpp").read_text()
    text = text[: text.index("template <typename S, int F>\nstatic void step(")]
    text += "int main(int argc, char** argv) {\n    const emulation::Program program(argc, argv);\n"
    text += "    render<Half, 4>(program);\n}\n"
    return broken_program(STEP, list(HALF_FAULTS.values()), text)


# Products in TF32 round their operands to as many bits as features have: there it is no fault not to.
@pytest.mark.parametrize(
    ("fault", "tf32"),
    [("", False), ("", True), *((name, False) for name in HALF_FAULTS), ("another corner's entry", True)],
)
def test_a_fault_of_tables_in_half_is_caught(fault: str, tf32: bool, broken_half: Path) -> None:
    number = ["", *HALF_FAULTS].index(fault)
    options: dict[str, Any] = {
        "program": str(broken_half),
        "scalars": {"fault": number},
        "checks": ["memory"],
    }
    if number == 0:  # the copy is sound
        check_render_that_rounds("gaussian", True, tf32, 1, 1, **options)
        return
    with pytest.raises(AssertionError, match="from the truth"):
        check_render_that_rounds("gaussian", True, tf32, 1, 1, **options)


def test_pace() -> None:
    statistics = np.array([0.1, 0.2, 3000.0, 2000.0, 1.0, 500.0])
    for given, batch, wanted_pace, wanted_rays in (
        (statistics, 4096, 0.8 * 10 + 0.2 * 6, 448),  # 4096 / 9.2 = 445.2 rays
        (statistics, 1e9, 9.2, 8192),
        (statistics, 10, 9.2, 192),
        (np.zeros(6), 4096, 20.0, 256),  # not one ray had room
    ):
        outputs = {"samples_per_ray": np.array([10.0], np.float32), "active_rays": np.zeros(1, np.int32)}
        found = emulate(
            STEP,
            "pace",
            {"statistics": given},
            {**outputs, "step": np.array([41])},
            {"batch": float(batch), "least": 192, "most": 8192},
            checks=["memory"],
        )
        assert math.isclose(found["samples_per_ray"][0], wanted_pace, rel_tol=1e-6)
        assert found["active_rays"][0] == wanted_rays and found["step"][0] == 42


# -------------------------------------------------------------------------------------------- the occupancy grid


@pytest.mark.parametrize(("highest", "seed"), [(0.05, 0), (10.0, 1)])
def test_masks(highest: float, seed: int) -> None:
    densities = torch.rand(32, 32, 32) ** 8
    words = reference.occupancy_words(32)
    found = emulate(
        STEP,
        "masks",
        {"densities": densities},
        {"out_masks": np.zeros(words, np.uint32), "summary": np.zeros(2)},
        {"max_threshold": highest},
        seed,
        checks=["races"] if seed else ["memory"],
    )
    wanted = reference.occupancy_threshold(densities.double(), highest)
    assert math.isclose(found["summary"][1], wanted.item(), rel_tol=1e-6)
    masks = reference.occupancy_masks(densities, float(found["summary"][1]))
    np.testing.assert_array_equal(found["out_masks"].view(np.int32), reference.pack_masks(masks).numpy())
    assert found["summary"][0] == masks[0][0].double().mean().item()


@pytest.mark.parametrize(("half", "tf32"), [(False, True), (True, False), (True, True)])
def test_visits_that_round(half: bool, tf32: bool) -> None:
    model = _model(SMALL)
    model.densities.zero_()  # so that a visited cell takes what is found
    (fields, precise), stride = rounding(model.fields(), half, tf32), 300
    arrays, scalars = model_arrays(fields)
    numbers = {"seed": 7, "step": 48, "visits": -(-(32**3) // stride), "cell_scale": 0.01, "decay": 0.5}
    found = emulate(STEP, "visits", arrays, {"densities": model.densities}, {**scalars, **numbers})

    def wanted(fields: FastFields, dtype: torch.dtype) -> Tensor:
        weights = {n: getattr(fields, n).to(dtype) for n in parameter_names(fields) if n != "tables"}
        tables = fields.tables if fields.tables.dtype == torch.float16 else fields.tables.to(dtype)
        own = fields._replace(**weights, tables=tables, masks=fields.masks.clone())
        densities = model.densities.to(dtype, copy=True)
        fast_reference.occupancy_update(densities, 0.01, 7, 48, stride, 0.5, 0.9, own)
        return densities

    truth = wanted(fields, torch.float64)
    assert 100 < (truth > 0).sum() < 300
    within_rounding(found["densities"], wanted(fields, torch.float32), truth, wanted(precise, torch.float64))


@pytest.mark.parametrize("stride", [1000, 150])
def test_visits(stride: int) -> None:
    model = _model(SMALL)
    fields = model.fields()
    cells = 32**3
    visits, seed, step, decay, scale = -(-cells // stride), 7, 48, 0.5, 0.01
    wanted = model.densities.clone()
    own = fields._replace(masks=fields.masks.clone())
    ops.occupancy_update(wanted, scale, seed, step, stride, decay, 0.9, own)
    arrays, scalars = model_arrays(fields)
    found = emulate(
        STEP,
        "visits",
        {**arrays, "step_on_device": np.array([step]) if stride == 150 else None},
        {"densities": model.densities},
        {
            **scalars,
            "seed": seed,
            "step": 0 if stride == 150 else step,
            "visits": visits,
            "cell_scale": scale,
            "decay": decay,
        },
        seed=2,
    )
    changed = wanted != model.densities
    assert visits < changed.sum() <= 2 * visits
    np.testing.assert_array_equal(found["densities"] != model.densities.numpy(), changed.numpy())
    np.testing.assert_allclose(found["densities"], wanted.numpy(), rtol=2e-5, atol=1e-7)


# --------------------------------------------------------------------------------------------------- broken twins


TWIN = dataclasses.replace(SMALL, levels=1, net_width=8, min_step=0.1, max_step=0.1)


def small_step(seed: int, checks: list[str], tf32: bool = False) -> None:
    """Two tiles of counted samples, one after the other in the one block that sums weight gradients."""
    model, rays = _model(TWIN), _rays(6)
    model.masks.fill_(-1)
    with torch.no_grad():
        model.density_out.zero_()  # so that all of them count
    arrays, scalars = model_arrays(model.fields()._replace(tf32=tf32))
    outputs = {
        f"grad_{n}": np.zeros(arrays[n].shape, np.float32) for n in FastGradients._fields if n != HIDDEN
    }
    emulate(
        STEP,
        "step",
        {
            **dict(zip(RAYS, rays[:6], strict=True)),
            "background": rays.background,
            "target": rays.background,
            **{name: array for name, array in arrays.items() if array is not None},
        },
        {**outputs, "statistics": np.zeros(6)},
        {**scalars, "beta": 0.1, "capacity": 256, "parts": 1},
        seed,
        checks=checks,
    )


def small_render(seed: int, checks: list[str], tf32: bool = False) -> None:
    model, rays = _model(dataclasses.replace(TWIN, min_step=0.6, max_step=0.6)), _rays(66)
    model.masks.fill_(-1)
    emulate_render(rays, model.fields()._replace(tf32=tf32), seed, 1, checks=checks)


def small_visits(seed: int, checks: list[str], tf32: bool = False) -> None:
    model = _model(TWIN)
    arrays, scalars = model_arrays(model.fields()._replace(tf32=tf32))
    numbers = {"seed": 1, "step": 2, "visits": 64, "cell_scale": 0.01, "decay": 0.5}
    emulate(
        STEP, "visits", arrays, {"densities": model.densities}, {**scalars, **numbers}, seed, checks=checks
    )


def small_masks(seed: int, checks: list[str]) -> None:
    outputs = {"out_masks": np.zeros(reference.occupancy_words(32), np.uint32), "summary": np.zeros(2)}
    densities = torch.zeros(32, 32, 32)
    emulate(STEP, "masks", {"densities": densities}, outputs, {"max_threshold": 1.0}, seed, checks=checks)


def small_tiny_mlp(seed: int, checks: list[str], tf32: bool = False) -> None:
    samples, encoded, hidden = 70, 3, 8
    shapes = {"density_in": (hidden, 4), "density_out": (16, hidden), "colour_in": (hidden, 32)}
    arrays = {name: torch.randn(shape) for name, shape in {**shapes, "colour_out": (3, hidden)}.items()}
    arrays |= {"features": torch.randn(samples, encoded), "harmonics": torch.randn(2, 16)}
    arrays |= {"rays": torch.zeros(samples, dtype=torch.int64)}
    arrays |= {"cot_rgb": torch.randn(samples, 3), "cot_density": torch.randn(samples)}
    outputs = {"out_rgb": (samples, 3), "out_density": (samples,), "grad_features": (samples, encoded)}
    weights = sum(torch.Size(shape).numel() for shape in shapes.values()) + 3 * hidden
    outputs |= {"grad_harmonics": torch.zeros(2, 16), "grad_weights": (weights,)}  # type: ignore[dict-item]
    emulate(OPERATORS, "tiny_mlp", arrays, outputs, {"parts": 1, "tf32": int(tf32)}, seed, checks=checks)


def small_hash_encode(seed: int, checks: list[str]) -> None:
    arrays = {"points": torch.full((3, 3), 0.3), "scales": torch.full((3,), 0.01)}
    arrays |= {"tables": torch.zeros(8, 2), "grad_features": torch.ones(3, 2)}
    outputs = {
        "features": (3, 2),
        "grad_points": (3, 3),
        "grad_scales": (3,),
        "grad_tables": torch.zeros(8, 2),
    }
    scalars = {"table_size": 8, "attenuation": 0, "cutoff": 0.02}
    emulate(
        ENCODING,
        "",
        {**arrays, "resolutions": np.array([1])},
        outputs,
        scalars,
        seed,
        checks=checks,
    )


HIDDEN = "colour_hidden"
# Which run meets the barriers of a file.
BARRIERS = {
    "march/march_device.cuh": small_step,
    "fast_step/fast_step_kernels.cuh": small_step,
    "fast_step/fast_render.cuh": small_render,
    "tiny_mlp/tiny_mlp_device.cuh": small_tiny_mlp,
    "tiny_mlp/tiny_mlp_kernels.cuh": small_tiny_mlp,
    "tiny_mlp/tiny_mlp_products.cuh": small_tiny_mlp,
    "occupancy/occupancy_kernels.cuh": small_visits,
}
PLACES = [
    (file, line)
    for file in BARRIERS
    for line, text in enumerate((harness.ROOT / "csrc" / file).read_text().splitlines(), 1)
    if re.search(r"\bblock_sync\(\)", text)
]


def test_every_file_with_barriers_is_listed() -> None:
    names = ("fast_step", "hash_encode", "march", "occupancy", "packed_composite", "sparse_adam", "tiny_mlp")
    files = [path for name in names for path in (harness.ROOT / "csrc" / name).glob("*.cuh")]
    found = {f"{path.parent.name}/{path.name}" for path in files if "block_sync()" in path.read_text()}
    assert found == set(BARRIERS)


@pytest.mark.parametrize("run", [*dict.fromkeys(BARRIERS.values()), small_hash_encode])
def test_the_sound_twin_passes_for_every_seed(run: Callable[[int, list[str]], None]) -> None:
    for seed in SEEDS:
        run(seed, ["races"])


@pytest.mark.parametrize("run", [small_step, small_render, small_visits, small_tiny_mlp])
def test_the_sound_twin_in_tf32_passes_for_every_seed(run: Callable[..., None]) -> None:
    for seed in SEEDS:
        run(seed, ["races"], tf32=True)


# Faults of the products in TF32, all in one program: what stands in the kernels, what the fault puts in its place, and
# the sentence with which the emulation stops; without one, the results are wrong.
FAULTS = {
    "inputs of a fragment exchanged": (
        "* 8 + (register_index >> 1) * 4 + lane % 4",
        "* 8 + (fault ? lane % 4 * 2 + (register_index >> 1) : (register_index >> 1) * 4 + lane % 4)",
        "",
    ),
    "a sample's neighbour": ("x[8 * j + 4 * kRowStride]", "x[8 * j + (fault ? 3 : 4) * kRowStride]", ""),
    "rows of a weight gradient exchanged": (
        "{low.value[0], high.value[0], low.value[1], high.value[1]}",
        "{low.value[0], fault ? low.value[1] : high.value[0], fault ? high.value[0] : low.value[1], high.value[1]}",
        "",
    ),
    "hidden layers not rounded": (
        "value.value[j] = operand<kTf32>(value.value[j])",
        "value.value[j] = fault ? value.value[j] : operand<kTf32>(value.value[j])",
        "was not rounded to TF32",
    ),
    "padding not written": (
        "for (int k = 0; k < rows; ++k)",
        "for (int k = 0; k < (fault ? sizes.encoded : rows); ++k)",
        "was not rounded to TF32",
    ),
}


@pytest.fixture(scope="module")
def broken_tiny_mlp() -> str:
    return str(broken_program(OPERATORS, [in_tiny_mlp(*fault[:2]) for fault in FAULTS.values()]))


def in_tiny_mlp(sound: str, fault: str) -> tuple[str, str, str]:
    """With the file that it stands in."""
    for path in (harness.ROOT / "csrc/tiny_mlp").glob("*.cuh"):
        if sound in path.read_text():
            return f"tiny_mlp/{path.name}", sound, fault
    raise AssertionError(f"{sound!r} stands nowhere")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_products_in_tf32_is_caught(name: str, broken_tiny_mlp: str) -> None:
    *_, sentence = FAULTS[name]
    case = TinyMlpCase(70, 27, 64, 1)
    options: dict[str, Any] = {
        "program": broken_tiny_mlp,
        "fault": list(FAULTS).index(name) + 1,
        "checks": ["memory"],
    }
    if sentence:
        with pytest.raises(EmulationError, match=sentence):
            case.emulated(0, True, **options)
        return
    found = case.emulated(0, True, **options)
    rounded, truth = (case.by_reference(dtype, True) for dtype in (torch.float32, torch.float64))
    exact = case.by_reference(torch.float64, False)
    far = 0
    for output, *numbers in zip(case.NAMES, rounded, truth, exact, strict=True):
        try:
            within_rounding(found[output], *numbers)
        except AssertionError:
            far += 1
    assert far > 0


@pytest.mark.parametrize(("file", "line"), PLACES)
def test_a_missing_barrier_is_caught(file: str, line: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIPNERF_EMULATION_OMIT", f"{file.split('/')[1]}:{line}")
    run = BARRIERS[file]
    if run is small_visits and line < 100:  # of the masks
        run = small_masks
    # What the race detector says does not depend on the order that the seed draws; one place of each file shows it.
    is_first = (file, line) == next(place for place in PLACES if place[0] == file)
    for seed in SEEDS if is_first else SEEDS[:4]:
        with pytest.raises(
            EmulationError, match=r"race: .* of shared memory|has not written|race: .* of the array"
        ):
            run(seed, ["races"])


@pytest.mark.parametrize("run", [small_step, small_render, small_tiny_mlp, small_hash_encode])
def test_additions_that_are_not_atomic_are_caught_for_every_seed(
    run: Callable[[int, list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIPNERF_EMULATION_PLAIN_ATOMICS", "1")
    for seed in SEEDS:
        with pytest.raises(EmulationError, match="race"):
            run(seed, ["races"])
