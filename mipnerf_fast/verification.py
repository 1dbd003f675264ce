"""The proof that this machine computes what the reference computes: `mipnerf-fast verify`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import __version__, _native, ops
from .backend import use_backend
from .data import Dataset, RayBatches
from .environment import device_name, revision
from .ops.implementations import implementations
from .verification_case import Case as _Case
from .verification_case import Tensors
from .verification_fast import FAST_CASES
from .verification_mlp import MLP_CASES

# An output must be no further from float64 than this many times the reference in the same precision, plus a floor.
FACTOR = 2.0
# The floor, in ulps of the largest value: a kernel and the reference round in a different order.
FLOOR_ULPS = 8.0
# float64 has no truth above it: there kernel and reference may differ by this many roundings of the inputs, counted
# along the longest way from an input to an output, each as large as its condition number makes it.
ROUNDINGS = 32.0
# N is odd so that the last vector of a ray is a partial one; the rays are more than any block holds.
_RAYS, _SAMPLES = 96, 65


@dataclass(frozen=True)
class Row:
    """One quantity of one operation, in one dtype on one device.

    reference_error, native_error: largest absolute difference from float64; native_error is None where the native
    kernel does not serve the case, and `why` says why. reference_relative, native_relative: ||got - want|| /
    ||want||. bound: what native_error may be. where: ray and sample of the largest native error.
    """

    operation: str
    quantity: str
    dtype: str
    device: str
    reference_error: float
    reference_relative: float
    native_error: float | None
    native_relative: float | None
    bound: float
    where: str
    why: str

    @property
    def passed(self) -> bool:
        """Whether the native error is within its bound (NaN is not); true where there is no native kernel."""
        return self.native_error is None or self.native_error <= self.bound


def _rays(generator: torch.Generator) -> Tensors:
    """Rays as a scene has them, with the degenerate ones: an empty interval, the apex, empty and opaque rays."""

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    t_vals = torch.sort(2 + 4 * rand(_RAYS, _SAMPLES + 1), -1).values
    t_vals[1, 5] = t_vals[1, 4]
    t_vals[2] = torch.linspace(0, 3, _SAMPLES + 1, dtype=torch.float64)
    t_vals[3, :3] = 0
    density = 2 * rand(_RAYS, _SAMPLES, 1)
    density[4], density[5], density[6, 7] = 0, 1e4, torch.inf
    arrays = {
        "t_vals": t_vals,
        "origins": 2 * rand(_RAYS, 3) - 1,
        "directions": 2 * rand(_RAYS, 3) - 1,
        "radii": 1e-3 + 1e-2 * rand(_RAYS, 1),
        "rgb": rand(_RAYS, _SAMPLES, 3),
        "density": density,
        "raw_rgb": 4 * rand(_RAYS, _SAMPLES, 3) - 2,
        "raw_density": 6 * rand(_RAYS, _SAMPLES, 1) - 2,
        "weights": rand(_RAYS, _SAMPLES) ** 8,
        "u": rand(_RAYS, _SAMPLES + 1),
    }
    arrays["weights"][4] = 0
    # Every precision starts from the same numbers, those that float32 holds; a sorted ray stays sorted.
    return {name: value.float().double() for name, value in arrays.items()}


def _encode(**options: object) -> Callable[[Tensors, torch.dtype | None], Tensors]:
    def run(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
        rays = (a["t_vals"], a["origins"], a["directions"], a["radii"])
        return {"features": ops.frustum_ipe(*rays, out_dtype=out_dtype, **options)}  # type: ignore[arg-type]

    return run


def _composite(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
    del out_dtype
    return ops.composite(a["rgb"], a["density"], a["t_vals"], a["directions"])._asdict()


def _composite_raw(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
    del out_dtype
    level, t_vals = ops.composite_resample(
        a["raw_rgb"],
        a["raw_density"],
        a["t_vals"],
        a["directions"],
        density_activation="softplus",
        density_bias=-1.0,
        rgb_activation="sigmoid",
        rgb_padding=0.001,
        u=a["u"].detach(),
    )
    return level._asdict() | {"next_t_vals": t_vals}


def _resample(randomized: bool) -> Callable[[Tensors, torch.dtype | None], Tensors]:
    def run(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
        del out_dtype
        return {"t_vals": ops.resample(a["t_vals"], a["weights"], u=a["u"] if randomized else None)}

    return run


def _images(generator: torch.Generator) -> Tensors:
    """Small images of two sizes, as a data set has them."""
    height, width = torch.tensor([6, 3, 6, 3]), torch.tensor([8, 5, 8, 5])
    count = int((height * width).sum())
    c2w = torch.randn(4, 3, 4, generator=generator).double()
    near = 1 + torch.rand(4, generator=generator).double()
    return {
        "pixels": torch.randint(256, (count, 4), generator=generator, dtype=torch.uint8),
        "height": height,
        "width": width,
        "c2w": c2w,
        "focal": torch.tensor([11.0, 5.5, 10.0, 5.0], dtype=torch.float64),
        "near": near,
        "far": near + 4,
        "lossmult": torch.tensor([1.0, 4.0, 1.0, 4.0], dtype=torch.float64),
    }


def _ray_batch(mode: str, background: str) -> Callable[[Tensors, torch.dtype | None], Tensors]:
    def run(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
        del out_dtype
        scale, names = torch.ones(4, dtype=torch.int64), [str(i) for i in range(4)]
        arrays = {name: value.cpu() for name, value in a.items()}
        data = Dataset(**arrays, scale=scale, names=names, split="train", background=background)
        rays, target = RayBatches(data, a["c2w"].device, mode).draw(11, 5, 500)
        return rays._asdict() | {"target": target}

    return run


_RAY_INPUTS = ("t_vals", "origins", "directions", "radii")
_HALVES = (torch.bfloat16, torch.float16)
_CASES = (
    *(
        _Case(
            "ray_batch",
            f"{mode.replace('_', ' ')}, {background} background",
            (),
            _ray_batch(mode, background),
            differentiable=False,
            in_dtypes=(torch.float32,),
            make=_images,
            unit="ray",
        )
        for mode, background in (("all_images", "white"), ("single_image", "black"))
    ),
    _Case("frustum_ipe", "cone", _RAY_INPUTS, _encode(), out_dtypes=(None, *_HALVES)),
    _Case("frustum_ipe", "cylinder", _RAY_INPUTS, _encode(shape="cylinder")),
    _Case(
        "frustum_ipe", "not integrated, degrees 0 to 10", _RAY_INPUTS, _encode(integrated=False, max_deg=10)
    ),
    _Case("composite", "activated", ("rgb", "density", "t_vals", "directions"), _composite),
    _Case(
        "composite",
        "raw, with resampling",
        ("raw_rgb", "raw_density", "t_vals", "directions"),
        _composite_raw,
    ),
    _Case("resample", "random", ("t_vals", "weights"), _resample(True), differentiable=False),
    _Case("resample", "deterministic", ("t_vals", "weights"), _resample(False), differentiable=False),
)


def _evaluate(
    case: _Case, arrays: Tensors, dtype: torch.dtype, out: torch.dtype | None, device: str
) -> Tensors:
    """Outputs and gradients of a case, in float64 on the CPU; counts and bits stay integers."""
    moved = {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in arrays.items()
    }
    leaves = [moved[name].requires_grad_() for name in case.inputs] if case.differentiable else []
    outputs = case.run(moved, out)
    results = {
        name: value.detach().double().cpu() if value.is_floating_point() else value.cpu()
        for name, value in outputs.items()
    }
    if case.differentiable:
        generator = torch.Generator().manual_seed(7)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for value in outputs.values():
            cotangent = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(
                device, value.dtype
            )
            if value.requires_grad:
                total = total + (value * cotangent).sum().double()
        # What does not depend on an input (a plain encoding on the radii) has a zero gradient, or none.
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        for name, leaf, grad in zip(case.inputs, leaves, grads, strict=True):
            results[f"gradient to {name}"] = (
                torch.zeros_like(leaf).double().cpu() if grad is None else grad.double().cpu()
            )
    return results


def _sensitivity(case: _Case, arrays: Tensors) -> dict[str, float]:
    """The largest change of every result when each input moves by one float64 ulp, up or down at random.

    The move is made 2^29 times as large, one float32 ulp, so that float64 resolves what it does.
    """
    ulp, generator = torch.finfo(torch.float32).eps, torch.Generator().manual_seed(1)
    signs = {name: 2 * torch.randint(0, 2, x.shape, generator=generator) - 1 for name, x in arrays.items()}
    moved = {name: x * (1 + ulp * signs[name]) if name in case.inputs else x for name, x in arrays.items()}
    with use_backend("reference"):
        here, there = (_evaluate(case, a, torch.float64, None, "cpu") for a in (arrays, moved))
    scale = torch.finfo(torch.float64).eps / ulp
    return {name: scale * _largest((there[name] - here[name]).abs()) for name in here}


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _worst(error: Tensor, unit: str | None) -> str:
    """Where the largest (or the first non-finite) error is: ray and sample, or so many of the unit."""
    if not error.numel():
        return ""
    bad = ~error.isfinite()
    index = int((bad if bool(bad.any()) else error).to(torch.float64).argmax())
    ray, rest = divmod(index, max(error[0].numel(), 1))
    if unit is not None:
        return f"{unit} {ray}"
    if error.dim() < 2 or error.shape[1] < _SAMPLES:
        return f"ray {ray}"
    return f"ray {ray}, sample {rest // max(error[0, 0].numel(), 1)}"


def _rows(case: _Case, device: str) -> Iterator[Row]:
    arrays = (case.make or _rays)(torch.Generator().manual_seed(0))
    sensitivity = _sensitivity(case, arrays) if torch.float64 in case.in_dtypes else {}
    for dtype in case.in_dtypes:
        if dtype == torch.float64 and device != "cpu":
            continue  # float64 is for checking, on the CPU
        for out in case.out_dtypes:
            if out is not None and dtype == torch.float64:
                continue
            with use_backend("auto"):
                entry = next(e for e in implementations(device, dtype) if e.operation == case.operation)
                serves, why = entry.used == "native", entry.why
                if case.served is not None:
                    engine_why = case.served(torch.device(device), dtype, out)
                    if engine_why is None:
                        continue
                    serves, why = True, engine_why
            with use_backend("reference"):
                want = _evaluate(case, arrays, torch.float64, None, "cpu")
                plain = _evaluate(case, arrays, dtype, out, device)
            with use_backend("auto"):
                native = _evaluate(case, arrays, dtype, out, device) if serves else None
            result_dtype = out or dtype
            for name, wanted in want.items():
                exact = wanted.double()
                scale = _largest(exact.abs())
                ulp = torch.finfo(result_dtype).eps
                error = (plain[name] - exact).abs()
                bound = FACTOR * _largest(error) + FLOOR_ULPS * ulp * scale
                if not wanted.is_floating_point():
                    bound = 0.0  # counts and bits are the same or wrong
                elif dtype == torch.float64:
                    bound += ROUNDINGS * sensitivity[name]
                mine = None if native is None else (native[name] - exact).abs()
                norm = float(exact.norm()) or 1.0
                label = str(dtype).removeprefix("torch.")
                if out is not None:
                    label += f" to {str(out).removeprefix('torch.')}"
                yield Row(
                    operation=case.operation,
                    quantity=f"{case.name}: {name}",
                    dtype=label,
                    device=device,
                    reference_error=_largest(error),
                    reference_relative=float(error.norm()) / norm,
                    native_error=None if mine is None else _largest(mine),
                    native_relative=None if mine is None else float(mine.norm()) / norm,
                    bound=bound,
                    where="" if mine is None else _worst(mine, case.unit),
                    why=why,
                )


@dataclass(frozen=True)
class Report:
    """The rows, and what they were made on."""

    rows: list[Row]
    environment: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every row passed, and the native library was there to be checked."""
        return bool(self.rows) and not self.environment["missing"] and all(row.passed for row in self.rows)


def verify(devices: list[str]) -> Report:
    """Compare every operation, in every dtype, on these devices with the float64 reference.

    Each row holds |native - float64| against 2 |reference - float64| + 8 ulps of the largest value: a kernel's
    error stays within twice PyTorch's own in the same precision. A float64 kernel is held to the reference itself,
    within 32 times what moving every input by one ulp does to the result. Counts and bits must be equal.

    Args:
        devices: "cpu", "cuda".

    Returns:
        The report; it has not passed where the native library is missing, because nothing was checked then.
    """
    rows = [
        row
        for device in devices
        for case in (*_CASES, *MLP_CASES, *FAST_CASES)
        for row in _rows(case, device)
    ]
    environment = {
        "package": __version__,
        "revision": revision(),
        "torch": torch.__version__,
        "devices": "; ".join(device_name(torch.device(device)) for device in devices),
        "missing": _native.why_missing(),
    }
    return Report(rows, environment)


def to_dict(report: Report) -> dict[str, Any]:
    """The report as JSON-ready values; infinities and NaN as strings."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    rows = [{k: plain(v) for k, v in asdict(row).items()} | {"passed": row.passed} for row in report.rows]
    return {"environment": report.environment, "passed": report.passed, "rows": rows}


def markdown(report: Report) -> str:
    """The report as a table with a verdict, one line a quantity."""
    facts = report.environment
    lines = [
        f"mipnerf_fast {facts['package']} ({facts['revision']}), torch {facts['torch']}, {facts['devices']}",
        "",
        "Largest error against float64 (relative error ||got - want|| / ||want|| in brackets); bound = 2 x the "
        "reference's error + 8 ulps of the largest value (float64: + 32 times what an ulp of every input changes).",
        "",
        "| operation | quantity | dtype | device | reference | native | bound | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report.rows:
        native = f"not run: {row.why}"
        if row.native_error is not None and row.native_relative is not None:
            native = f"{row.native_error:.1e} ({row.native_relative:.1e})"
        verdict = "pass" if row.passed else f"**FAIL** at {row.where}"
        lines.append(
            f"| {row.operation} | {row.quantity} | {row.dtype} | {row.device} "
            f"| {row.reference_error:.1e} ({row.reference_relative:.1e}) | {native} | {row.bound:.1e} "
            f"| {verdict if row.native_error is not None else '-'} |"
        )
    failed = sum(not row.passed for row in report.rows)
    checked = sum(row.native_error is not None for row in report.rows)
    lines += ["", f"{checked} of {len(report.rows)} quantities ran a native kernel; {failed} failed."]
    if facts["missing"]:
        lines.append(f"Nothing was verified: {facts['missing']}.")
    return "\n".join(lines)
