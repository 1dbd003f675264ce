"""A whole training step: PyTorch in every way it offers, running this package's reference, and this package.

python benchmarks/bench_train.py [--device cpu|cuda] [--out FOLDER]

A step is everything from random pixel indices to updated weights: rays and colours of the pixels, both levels, the
loss, its gradient, Adam. The images are random and lie on the device for every row. PyTorch's rows run the plain
reference of this package with torch's own random numbers and its fused Adam; under torch.compile pixels, rays, levels
and loss are one compiled function without a break, in its default mode and in max-autotune. The rows of ours are the
trainer's own step, launched as it is and, on a GPU, recorded as a CUDA graph. SIGTERM leaves out the rows of
torch.compile that are still to come.

Errors are of the loss and of the gradient (relative, ||got - want|| / ||want|| over all weights), against the
reference in float64 on the same batch with the same random numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import RESULTS
from benchmarks.row_tables import leave_out_slow, markdown, new_report, put_table, write_report
from benchmarks.rows import (
    BF16,
    FP32,
    OURS,
    PYTORCH,
    TF32,
    Ceilings,
    Row,
    Variant,
    Work,
    ceilings,
    compiled_variants,
    measure_rows,
    no_products,
    relative,
    told_to_end,
    training_work,
)
from mipnerf_fast import _native, ops, preset, use_backend
from mipnerf_fast.cameras import Rays
from mipnerf_fast.config import MipNerfConfig, MlpBackend, MlpDtype, TrainConfig
from mipnerf_fast.counter_rng import FENCEPOSTS, PIXELS, CounterRandom, counter_index, counter_uniform
from mipnerf_fast.cpu_setup import cpu_setup
from mipnerf_fast.data import Dataset, RayBatches
from mipnerf_fast.losses import weighted_loss
from mipnerf_fast.model import MipNerf, build_model
from mipnerf_fast.trainer import Trainer

# Rays per pass of the float64 truth: its memory must not decide what can be measured.
_TRUTH_CHUNK = 256
_BETAS = (0.9, 0.999)
_STEP = 1
# After so many the trainer's step is recorded.
_STEPS_TO_CAPTURE = 5
# torch.compile takes minutes for each batch size.
_AUTOTUNED_RAYS = 4096


def random_images(views: int, size: int) -> Dataset:
    """Views of random pixels around the origin: a step takes the same time whatever they show."""
    generator = torch.Generator().manual_seed(5)
    angles = 2 * math.pi * torch.arange(views) / views
    back = torch.stack([angles.cos(), angles.sin(), torch.full_like(angles, 0.4)], -1)
    back = torch.nn.functional.normalize(back, dim=-1)
    right = torch.nn.functional.normalize(
        torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0]).expand_as(back), back), dim=-1
    )
    c2w = torch.stack([right, torch.linalg.cross(back, right), back, 4 * back], -1)
    return Dataset(
        pixels=torch.randint(0, 256, (views * size * size, 4), dtype=torch.uint8, generator=generator),
        height=torch.full((views,), size),
        width=torch.full((views,), size),
        c2w=c2w,
        focal=torch.full((views,), 1.4 * size, dtype=torch.float64),
        near=torch.full((views,), 2.0),
        far=torch.full((views,), 6.0),
        lossmult=torch.ones(views),
        scale=torch.ones(views, dtype=torch.int64),
        names=[f"r_{k}" for k in range(views)],
        split="train",
        background="white",
    )


class GivenUniforms(CounterRandom):
    """Random numbers that are there already, one tensor per level."""

    def __init__(self, uniforms: Sequence[Tensor]) -> None:
        self.uniforms = uniforms

    def uniform(self, stream: int, columns: int, dtype: torch.dtype) -> Tensor:
        return self.uniforms[stream - FENCEPOSTS].to(dtype)


class Problem:
    """The images, the batch that errors are measured on, and what float64 makes of it."""

    def __init__(self, config: TrainConfig, data: Dataset, device: torch.device) -> None:
        assert isinstance(config.model, MipNerfConfig)
        self.config, self.model_config, self.data, self.device = config, config.model, data, device
        self.batches = RayBatches(data, device)
        count = config.batch_size
        rows = torch.arange(count, device=device)
        # Whose time is taken together: a trainer launches steps ahead of the GPU, and so may the others.
        self.repeats = 5 if device.type == "cuda" else 1
        # The very numbers that the trainer draws in its first step.
        self.index = counter_index(config.seed, _STEP, PIXELS, rows, self.batches.total)
        self.rays, self.target = self.batches.draw(config.seed, _STEP, count)
        self.uniforms = [
            counter_uniform(config.seed, _STEP, FENCEPOSTS + level, rows, self.model_config.num_samples + 1)
            for level in range(self.model_config.num_levels)
        ]
        self.loss, self.gradients = self._truth()

    def new_model(self, dtype: torch.dtype = torch.float32) -> MipNerf:
        """The weights that every row starts from."""
        torch.manual_seed(self.config.seed)
        model = build_model(self.model_config)
        assert isinstance(model, MipNerf)
        return model.to(self.device, dtype)

    def levels_loss(
        self, model: MipNerf, rays: Rays, target: Tensor, uniforms: Sequence[Tensor], total: Tensor
    ) -> Tensor:
        """Equation 17 on some rays, normalised by `total`."""
        levels = model(rays, True, True, GivenUniforms(uniforms))
        losses = [weighted_loss(level.rgb, target, rays.lossmult, "mse", 1.0, total) for level in levels]
        loss: Tensor = self.config.coarse_loss_mult * sum(losses[:-1]) + losses[-1]
        return loss

    def _truth(self) -> tuple[float, list[Tensor]]:
        model, count, whole = self.new_model(torch.float64), self.config.batch_size, 0.0
        total = torch.tensor(float(count), dtype=torch.float64, device=self.device)
        with use_backend("reference"):
            for start in range(0, count, _TRUTH_CHUNK):
                part = slice(start, min(start + _TRUTH_CHUNK, count))
                rays = Rays(*(field[part].double() for field in self.rays))
                uniforms = [u[part] for u in self.uniforms]
                loss = self.levels_loss(model, rays, self.target[part].double(), uniforms, total)
                loss.backward()
                whole += float(loss.detach())
        return whole, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    def errors(self, loss: Tensor | float, gradients: Sequence[Tensor]) -> dict[str, float]:
        """Relative, of a row's loss and gradient on the fixed batch."""
        return {
            "loss": abs(float(loss) - self.loss) / self.loss,
            "gradient": relative(gradients, self.gradients),
        }


class ReferenceStep:
    """PyTorch's step: the reference on random pixels, in float32 or under autocast; eager, compiled or captured."""

    def __init__(
        self, problem: Problem, operands: str, compile_mode: str = "", captured: bool = False
    ) -> None:
        self.problem, self.captured, self.repeats = problem, captured, problem.repeats
        device, count = problem.device, problem.config.batch_size
        self.model = problem.new_model()
        self.initial = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.optimizer = torch.optim.Adam(
            self.model.parameters(),
            problem.config.lr_init,
            betas=_BETAS,
            eps=problem.config.adam_eps,
            fused=True,
            capturable=captured,
        )
        self.autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        if operands == BF16:
            # A captured region must not take casts from a cache that was filled outside of it.
            self.autocast = lambda: torch.autocast(device.type, torch.bfloat16, cache_enabled=not captured)
        self.index = torch.empty(count, dtype=torch.int64, device=device)
        columns = problem.model_config.num_samples + 1
        self.uniforms = [
            torch.empty(count, columns, device=device) for _ in range(problem.model_config.num_levels)
        ]
        self.total = torch.tensor(float(count), device=device)
        self.loss: Callable[..., Tensor] = self._loss
        if compile_mode:
            # As one graph: where it breaks, the row does not run.
            self.loss = torch.compile(self._loss, fullgraph=True, mode=compile_mode, dynamic=False)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _loss(self, index: Tensor, uniforms: list[Tensor]) -> Tensor:
        batches = self.problem.batches
        image = torch.div(index, batches.common_size, rounding_mode="floor")
        rays, target = batches.gather(image, index - image * batches.common_size)
        return self.problem.levels_loss(self.model, rays, target, uniforms, self.total)

    def _gradients(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with use_backend("reference"), self.autocast():
            loss = self.loss(self.index, self.uniforms)
        loss.backward()
        return loss.detach()

    def _whole(self) -> Tensor:
        loss = self._gradients()
        self.optimizer.step()
        return loss

    def _capture(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._whole()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self.captured_loss = self._whole()
        return graph

    def __call__(self) -> Tensor:
        for _ in range(self.repeats):
            torch.randint(self.problem.batches.total, self.index.shape, out=self.index)
            for u in self.uniforms:
                torch.rand(u.shape, out=u)
            if self.graph is None:
                loss = self._whole()
            else:
                self.graph.replay()
                loss = self.captured_loss
        return loss

    def errors(self) -> dict[str, float]:
        """On the batch that the truth was computed for."""
        if self.captured:
            self()
            self.graph = self._capture()
        self.index.copy_(self.problem.index)
        for u, given in zip(self.uniforms, self.problem.uniforms, strict=True):
            u.copy_(given)
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), self.initial, strict=True):
                parameter.copy_(value)
        if self.graph is None:
            loss = self._gradients()
        else:
            self.graph.replay()
            loss = self.captured_loss
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return self.problem.errors(loss, gradients)


class TrainerStep:
    """Ours: the trainer's own step with an engine for the network, captured as a CUDA graph or not."""

    def __init__(
        self, problem: Problem, mlp_backend: MlpBackend, mlp_dtype: MlpDtype, captured: bool = False
    ) -> None:
        model = dataclasses.replace(problem.model_config, mlp_backend=mlp_backend, mlp_dtype=mlp_dtype)
        # One pass, as every other row.
        config = dataclasses.replace(
            problem.config, model=model, capture=captured, chunk_rays=problem.config.batch_size
        )
        self.problem, self.captured = problem, captured
        self.repeats = problem.repeats
        self.trainer = Trainer(config, problem.data, problem.device)

    def __call__(self) -> Any:
        for _ in range(self.repeats):
            self.trainer.launch_step()
        return self.trainer.results(wait=True)

    def errors(self) -> dict[str, float]:
        """Of the trainer's first step, whose batch and random numbers the truth has; a graph replays it."""
        trainer, flat = self.trainer, self.trainer.work.flat
        if self.captured:
            # Until the step is recorded, it is launched as it is; then from the beginning again.
            initial = flat.values.detach().clone()
            for _ in range(_STEPS_TO_CAPTURE):
                trainer.train_step()
            with torch.no_grad():
                flat.values.copy_(initial)
            trainer.work.go_on_from(0, 0, 0, 1.0, 0)
        result = trainer.train_step()
        return self.problem.errors(result.loss, list(flat.split(flat.gradients).values()))


# ------------------------------------------------------------------------------------------------------ the rows


def reference_variants(problem: Problem, autotuned: bool) -> list[Variant]:
    """PyTorch's rows."""
    on_cuda = problem.device.type == "cuda"
    missing = no_products(problem.device)
    no_graph = "" if on_cuda else "a CUDA graph needs a GPU"
    not_tuned = (
        "" if autotuned else f"compiled at {_AUTOTUNED_RAYS} rays only: it takes minutes for each size"
    )

    def row(name: str, operands: str, why_not: str = "", **options: Any) -> Variant:
        def make() -> Any:
            return ReferenceStep(problem, operands, **options)

        return Variant(name, PYTORCH, operands, make, why_not)

    return [
        row("eager fp32", FP32),
        row("eager TF32", TF32, missing.get(TF32, "")),
        row("eager bf16 autocast", BF16, missing.get(BF16, "")),
        *compiled_variants(functools.partial(ReferenceStep, problem), missing, not_tuned),
        row("CUDA graph of eager bf16 autocast", BF16, no_graph, captured=True),
    ]


# An engine for the network and its operands, as `MipNerfConfig` has them.
ENGINES: tuple[tuple[MlpBackend, MlpDtype], ...] = (
    ("reference", "fp32"),
    ("folded", "fp32"),
    ("folded", "bf16"),
    ("cublaslt", "bf16"),
    ("fused", "bf16"),
)


def engine_names(
    mlp: ops.MipMLP, device: torch.device, engines: Sequence[tuple[MlpBackend, MlpDtype]] = ENGINES
) -> list[tuple[MlpBackend, MlpDtype, str, str]]:
    """(engine, operands, name, why it cannot run here) of every engine of ours for a network."""
    found = []
    for engine, dtype in engines:
        why_not = ""
        try:
            ops.choose_mlp(mlp.shape, device, torch.float32, engine, dtype)
        except RuntimeError as error:
            why_not = str(error).partition(", but ")[2] or str(error)
        found.append((engine, dtype, f"ours, network {engine} {dtype}", why_not))
    return found


def our_variants(problem: Problem) -> list[Variant]:
    """Ours: every engine for the network uncaptured and, on a GPU, in the graph."""
    no_graph = "" if problem.device.type == "cuda" else "a CUDA graph needs a GPU"
    variants = []
    for captured in (False, True):
        for engine, dtype, name, why_not in engine_names(problem.new_model().mlp, problem.device):
            if captured and no_graph and engine != "fused":
                continue  # one line says it for all

            def make(
                engine: MlpBackend = engine, dtype: MlpDtype = dtype, captured: bool = captured
            ) -> TrainerStep:
                return TrainerStep(problem, engine, dtype, captured)

            in_graph = " in a CUDA graph" if captured else ""
            why = (no_graph if captured else "") or why_not
            variants.append(Variant(f"{name}{in_graph}", OURS, dtype, make, why))
    return variants


def sizes_of(device: torch.device) -> list[tuple[str, int]]:
    """(preset, rays) of the tables: the paper's on a GPU, on a CPU what it does in a second."""
    if device.type == "cuda":
        return [("paper", 4096), ("paper", 1024), ("paper", 16384)]
    return [("small", 512), ("paper", 64)]


def parse_size(text: str) -> tuple[str, int]:
    """PRESET:RAYS."""
    name, _, rays = text.partition(":")
    if not rays.isdigit() or int(rays) < 1:
        raise argparse.ArgumentTypeError(f"expected PRESET:RAYS such as paper:4096, got {text!r}")
    return name, int(rays)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write train_DEVICE.json and .md after every table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=parse_size, nargs="+", help="such as paper:4096; default by device")
    parser.add_argument(
        "--runs", type=int, default=0, help="undisturbed calls of each row; default 50, CPU 15"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing per row, when they are over")
    parser.add_argument("--no-compile", action="store_true", help="leave out the rows of torch.compile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    if not _native.available():
        parser.error(_native.why_missing())
    runs = options.runs or (50 if device.type == "cuda" else 15)
    sizes = options.sizes or sizes_of(device)

    def end() -> bool:
        complete = leave_out_slow(report, len(sizes))
        write_report(report, options.out, f"train_{device.type}")
        return complete

    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(cpu_setup())
        report = new_report("A training step", device, ceilings(device), ABOUT)
        stack.enter_context(told_to_end(end))
        for name, rays in sizes:
            config = dataclasses.replace(preset(name), batch_size=rays)
            data = random_images(100, 400 if device.type == "cuda" else 100)
            problem = Problem(config, data, device)
            work = training_work(f"{name}, {rays:,} rays", config)
            print(work.title, file=sys.stderr, flush=True)
            # What the machine does is measured again beside every table.
            limits = ceilings(device)
            autotuned = not options.no_compile and (device.type == "cpu" or rays == _AUTOTUNED_RAYS)
            variants = reference_variants(problem, autotuned) + our_variants(problem)

            def keep(rows: list[Row], work: Work = work, limits: Ceilings = limits) -> None:
                put_table(report, work, rows, limits)
                write_report(report, options.out, f"train_{device.type}")

            keep(measure_rows(variants, device, runs, options.seconds, keep))
    print(markdown(report))
    return 0


ABOUT = (
    "A step is everything from random pixel indices to updated weights, with one pass for the whole batch; medians. "
    "PyTorch's rows run this package's reference. TFLOP/s: of the network as the paper writes it, and folded (without "
    "what need not be computed); the share of the ceiling is that of the product with the same operands. Error: "
    "relative, of the loss and of the gradient over all weights, against the reference in float64 on the same batch. "
    "On a CPU malloc keeps its pages for every row."
)


if __name__ == "__main__":
    sys.exit(main())
