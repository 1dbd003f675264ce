"""Rows of whole computations, a training step or a rendered frame: what bench_train.py and bench_render.py share.

* The first rows are what the machine can do: a copy, and matrix products of random numbers.
* Then PyTorch, in every way that it offers, running this package's reference; then this package. A row that cannot
  run here says why.
* On a CPU the rows run in turn, one call each, round after round; on a GPU one after the other, because together
  they would not fit its memory. A fixed matrix product is timed beside every call, as in harness.py.
* Every row's results are compared with the reference in float64 on the same batch from the same weights. A row of
  ours may be off by twice what PyTorch's row with the same operands is, plus a floor; without that it gets no time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import Control, copy_bandwidth, peak_bytes, time_once
from mipnerf_fast import MipNerfConfig, TrainConfig, reference
from mipnerf_fast.ops.mlp_backends import CPU_BF16, MlpShape

PYTORCH, OURS = "PyTorch", "ours"
FP32, TF32, BF16 = "fp32", "tf32", "bf16"
# The row that others are compared with first.
BASELINE = "eager fp32"
WARM_UP = 3
NOT_MEASURED = "not measured"
# A row is believed with so many undisturbed calls; on a machine that never rests it waits for so many rounds of them.
FEWEST, PATIENCE = 5, 4
# On top of twice PyTorch's error: what the order of a sum may change in float32 results.
FLOOR = 1e-4


class Computation(Protocol):
    """What a row repeats. repeats: how many steps or frames one call is."""

    repeats: int

    def __call__(self) -> Any:
        """Do it once, on other random numbers than the last time."""

    def errors(self) -> dict[str, float]:
        """Relative differences from float64 on the fixed batch, before anything was trained; names as in the table."""


@dataclass(frozen=True)
class Variant:
    """A row to measure.

    name: in the table. family: PYTORCH or OURS. operands: of the matrix products. make: builds it (and compiles,
    captures and warms up whatever it needs). why_not: why it cannot run here, or "". slow: 0, or takes minutes to make:
    after the others, in the order of these numbers, and left out where time is over.
    """

    name: str
    family: str
    operands: str
    make: Callable[[], Computation]
    why_not: str = ""
    slow: int = 0


@dataclass(frozen=True)
class Work:
    """What one call does.

    title: of the table. rays: and samples of all levels. flops: of the network as the paper writes it, folded_flops:
    with the bottleneck folded and without the gradients that nobody asks for.
    """

    title: str
    rays: int
    samples: int
    flops: float
    folded_flops: float


@dataclass
class Row:
    """One row; times in seconds, None where it was not measured, and `note` says why."""

    name: str
    family: str
    operands: str
    median: float | None = None
    p10: float | None = None
    p90: float | None = None
    kept: int = 0
    discarded: int = 0
    launches: int | None = None
    peak_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    note: str = ""
    slow: int = 0


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do: copy, bytes read plus written per second; FLOP/s of a product of n x n matrices."""

    copy: float
    products: dict[str, float]
    size: int


# Which of PyTorch's compiled rows come first where time may not suffice for all: (mode, operands).
_COMPILED = (
    ("max-autotune", BF16),
    ("default", BF16),
    ("max-autotune", TF32),
    ("max-autotune", FP32),
    ("default", TF32),
    ("default", FP32),
)


def no_products(device: torch.device) -> dict[str, str]:
    """Why a device does not multiply operands that its rows would need, by their names.

    On a CPU torch has bfloat16 products everywhere, but where the processor has none they take minutes.
    """
    if device.type == "cuda":
        return {}
    missing = {TF32: "TF32 is a format of NVIDIA's GPUs"}
    return missing if CPU_BF16 else missing | {BF16: "this processor has no bfloat16 products"}


def compiled_variants(
    make: Callable[[str, str], Computation], missing: Mapping[str, str], why_not: str = ""
) -> list[Variant]:
    """PyTorch's rows of torch.compile, in its default mode and in max-autotune, with all operands.

    Args:
        make: a computation from operands and mode.
        missing: see `no_products`. why_not: why none of them can run; or "".
    """
    variants = []
    for mode in ("default", "max-autotune"):
        for operands, label in ((FP32, "fp32"), (TF32, "TF32"), (BF16, "bf16 autocast")):
            name = " ".join(["torch.compile", *([] if mode == "default" else [mode]), label])
            why = missing.get(operands, "") or why_not
            order = _COMPILED.index((mode, operands)) + 1
            build = functools.partial(make, operands, mode)
            variants.append(Variant(name, PYTORCH, operands, build, why, order))
    return variants


# --------------------------------------------------------------------------------------------------- the work


def multiply_adds(shape: MlpShape) -> tuple[int, int]:
    """Multiply-adds per sample of the network as written: forward, and the gradient to its layers' inputs.

    Autograd computes the latter for all layers but the first; the gradient to the weights is as many as forward.
    """
    shapes = reference.mip_mlp_shapes(*shape)
    forward = sum(i * o for i, o in shapes)
    return forward, forward - shapes[0][0] * shapes[0][1]


def folded_multiply_adds(shape: MlpShape) -> tuple[int, int]:
    """The same with the bottleneck folded away, the view directions once per ray, no gradient to the encoding."""
    views, depth, width = shape.view_features, shape.net_depth, shape.net_width
    shapes = reference.mip_mlp_shapes(*shape)
    forward, to_inputs = 0, 0
    for number, (i, o) in enumerate(shapes):
        if views is not None and number == depth + 1:
            continue  # the bottleneck
        columns = i
        if views is not None and number == depth + 2:
            columns = shapes[depth + 1][0]  # the first layer after it reads what the bottleneck read
        forward += columns * o
        widened = number <= depth + 2 and columns > width
        to_inputs += 0 if number == 0 else (width if widened else columns) * o
    return forward, to_inputs


def network_shape(config: MipNerfConfig) -> MlpShape:
    """Of the network of a model."""
    return MlpShape(
        6 * (config.max_deg_point - config.min_deg_point),
        3 + 6 * config.deg_view if config.use_viewdirs else None,
        config.net_depth,
        config.net_width,
        config.net_depth_condition,
        config.net_width_condition,
        config.skip_layer,
    )


def training_work(title: str, config: TrainConfig) -> Work:
    """Of one step: forward, and the gradients to inputs and weights."""
    model = config.model
    assert isinstance(model, MipNerfConfig)
    samples = config.batch_size * model.num_samples * model.num_levels
    shape = network_shape(model)
    (forward, to_inputs), (folded, folded_inputs) = multiply_adds(shape), folded_multiply_adds(shape)
    return Work(
        title,
        config.batch_size,
        samples,
        2.0 * samples * (2 * forward + to_inputs),
        2.0 * samples * (2 * folded + folded_inputs),
    )


def rendering_work(title: str, model: MipNerfConfig, rays: int) -> Work:
    """Of one frame: forward on all levels. Folded: the levels but the last compute densities alone."""
    samples = rays * model.num_samples * model.num_levels
    shape = network_shape(model)
    forward, folded = multiply_adds(shape)[0], folded_multiply_adds(shape)[0]
    shapes = reference.mip_mlp_shapes(*shape)
    density_alone = sum(i * o for i, o in shapes[: model.net_depth + 1])
    finest = rays * model.num_samples
    least = 2.0 * (finest * folded + (samples - finest) * density_alone)
    return Work(title, rays, samples, 2.0 * samples * forward, least)


# ------------------------------------------------------------------------------------------------- the machine


@contextlib.contextmanager
def tensor_float(allowed: bool) -> Iterator[None]:
    """Whether float32 products on a GPU may round their operands to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product_size(device: torch.device) -> int:
    """Rows and columns of the large product that a device's rows are held against."""
    return 8192 if device.type == "cuda" else 2048


def product_rates(device: torch.device, size: int) -> dict[str, float]:
    """FLOP/s of a product of n x n random matrices, the median of ten, by the operands that a device multiplies."""
    products, missing = {}, no_products(device)
    for name, dtype in ((BF16, torch.bfloat16), (TF32, torch.float32), (FP32, torch.float32)):
        if name in missing:
            continue
        with tensor_float(name == TF32):
            a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            out = torch.empty_like(a)

            def product(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> None:
                torch.mm(a, b, out=out)

            for _ in range(3):
                product()
            seconds = statistics.median(time_once(product, device) for _ in range(10))
            products[name] = 2.0 * size**3 / seconds
    return products


def ceilings(device: torch.device, size: int | None = None) -> Ceilings:
    """Measure what the rows are held against: the best of seven copies, and products of every kind of operands."""
    size = size or product_size(device)
    return Ceilings(copy_bandwidth(device), product_rates(device, size), size)


def count_launches(call: Callable[[], Any], device: torch.device) -> int | None:
    """Kernels, copies and fills that a GPU runs for one call; None on a CPU."""
    if device.type != "cuda":
        return None
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize(device)
    return int(sum(event.device_type == DeviceType.CUDA for event in trace.events()))


# --------------------------------------------------------------------------------------------------- measuring


def release_pages() -> None:
    """Give the system what malloc keeps, so that what a call takes can be seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def error_bound(operands: str, name: str, rows: Sequence[Row]) -> float:
    """What a row of ours may be off by: twice the largest error of PyTorch's rows with these operands, plus FLOOR."""
    of_pytorch = [
        row.errors[name]
        for row in rows
        if row.family == PYTORCH and row.operands == operands and name in row.errors
    ]
    return 2 * max(of_pytorch, default=math.inf) + FLOOR


def _fault(row: Row, rows: Sequence[Row]) -> str:
    """Why a row's results forbid to time it; "" where they do not."""
    for name, error in row.errors.items():
        if not math.isfinite(error):
            return f"not timed: its {name} is off by {error}"
        bound = error_bound(row.operands, name, rows) if row.family == OURS else math.inf
        if error > bound:
            return f"not timed: its {name} is off by {error:.1e}, more than {bound:.1e}"
    return ""


def _prepare(variant: Variant, row: Row, rows: Sequence[Row], device: torch.device) -> Computation | None:
    """Build a row's computation, check it, count and warm up; None where it cannot be timed, and `note` says why."""
    if variant.why_not:
        row.note = f"not run: {variant.why_not}"
        return None
    row.note = ""
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    try:
        with tensor_float(variant.operands == TF32):
            call = variant.make()
            row.errors = call.errors()
            row.note = _fault(row, rows)
            if row.note:
                return None
            for _ in range(WARM_UP):
                call()
            launches = count_launches(call, device)
            row.launches = None if launches is None else round(launches / call.repeats)
            if on_cuda:
                # Since it was built: what a captured step takes, it took when it was recorded.
                row.peak_bytes = torch.cuda.max_memory_allocated(device) - before
            else:
                release_pages()
                row.peak_bytes = peak_bytes(call, device)
    except Exception as error:
        # One row must not end the others: a compiler that is missing, too little memory.
        row.note = f"not run: {_first_line(error)}"
        return None
    return call


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160] if lines else 'no message'}"


def _summarise(row: Row, times: list[float], runs: int) -> None:
    if row.kept < min(runs, FEWEST):
        row.note = (
            f"not measured: the control moved beside {row.discarded} of {row.kept + row.discarded} calls"
        )
        return
    ordered = sorted(times)
    row.median = statistics.median(ordered)
    row.p10, row.p90 = ordered[len(ordered) // 10], ordered[(9 * len(ordered)) // 10]


def measure_rows(
    variants: Sequence[Variant],
    device: torch.device,
    runs: int,
    seconds: float = math.inf,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Measure the rows of one table.

    Args:
        variants: PyTorch's first, so that ours have something to be held against.
        device: of all.
        runs: undisturbed calls of each row; fewer, but at least FEWEST, where `seconds` per row are over.
        keep: on a GPU called with all rows at the beginning and after each that is done; those to come are marked as
            not measured.

    Returns:
        One Row per variant, in the same order.
    """
    rows = [Row(v.name, v.family, v.operands, note=NOT_MEASURED, slow=v.slow) for v in variants]
    together = device.type == "cpu"
    control = Control(device) if together else None
    waiting: list[tuple[Variant, Row, Computation]] = []
    # Once for the table: where the rows run in turn, a reset for one would throw away what another has compiled.
    torch.compiler.reset()
    if not together:
        keep(rows)
    for variant, row in sorted(zip(variants, rows, strict=True), key=lambda pair: pair[0].slow):
        call = _prepare(variant, row, rows, device)
        if call is not None:
            waiting.append((variant, row, call))
        print(f"  {row.name}: {row.note or 'ready'}", file=sys.stderr, flush=True)
        if not together and waiting:
            _time_in_turn(waiting, Control(device), device, runs, seconds)
            waiting.clear()
        if not together:
            del call
            gc.collect()
            torch.compiler.reset()
            torch.cuda.empty_cache()
            keep(rows)
    if control is not None and waiting:
        _time_in_turn(waiting, control, device, runs, seconds)
    return rows


@contextlib.contextmanager
def told_to_end(end: Callable[[], bool]) -> Iterator[None]:
    """While in the context SIGTERM, by which gpu_check.py says that time is over, calls `end` and ends the process.

    Its status is 0 where `end` says that all is there that must be. At once, whatever a compiler is busy with.
    """

    def handle(number: int, frame: Any) -> None:
        complete = end()
        sys.stderr.flush()
        os._exit(0 if complete else 128 + number)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _time_in_turn(
    waiting: Sequence[tuple[Variant, Row, Computation]],
    control: Control,
    device: torch.device,
    runs: int,
    seconds: float,
) -> None:
    times: dict[str, list[float]] = {row.name: [] for _, row, _ in waiting}
    limit = time.monotonic() + seconds * len(waiting)
    before = control()
    for _ in range(PATIENCE * runs):
        rested = all(row.kept >= min(runs, FEWEST) for _, row, _ in waiting)
        if all(row.kept >= runs for _, row, _ in waiting) or (rested and time.monotonic() > limit):
            break
        for variant, row, call in waiting:
            with tensor_float(variant.operands == TF32):
                spent = time_once(call, device) / call.repeats
            after = control()
            if control.moved(before) or control.moved(after):
                row.discarded += 1
            else:
                row.kept += 1
                times[row.name].append(spent)
            before = after
    for _, row, _ in waiting:
        _summarise(row, times[row.name], runs)


def relative(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """||got - want|| / ||want|| over all of them together; NaN is kept."""
    apart = sum(float(((a.double() - b.double()) ** 2).sum()) for a, b in zip(got, want, strict=True))
    whole = sum(float((b.double() ** 2).sum()) for b in want)
    return math.sqrt(apart / whole) if apart == apart else math.nan
