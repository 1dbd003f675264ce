"""A rendered frame: PyTorch in every way it offers, running this package's reference, and this package.

python benchmarks/bench_render.py [--device cpu|cuda] [--run-dir RUN] [--out FOLDER]

PyTorch's rows run the plain reference of this package without gradients, the coarse level's colours left out as in
ours, in chunks of one size that divides the frame; under torch.compile a chunk is one compiled function without a
break. The rows of ours are `render_image`. Without --run-dir the weights are random (the time does not depend on
them); with it a trained model's frame is measured too, and on it the fast mode, whose time depends on what there is
to see.

Errors are of the colours (relative, ||got - want|| / ||want||) on up to 1,024 rays of the frame, against the
reference in float64; of the fast mode against the exact one, on the rays that `mipnerf-fast render` would compare.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_train import engine_names, parse_size, random_images
from benchmarks.harness import RESULTS
from benchmarks.row_tables import markdown, new_report, put_table, write_report
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
    rendering_work,
)
from mipnerf_fast import _native, preset, use_backend
from mipnerf_fast.cameras import Rays
from mipnerf_fast.checkpoint import load_model
from mipnerf_fast.config import MipNerfConfig, MlpBackend, MlpDtype
from mipnerf_fast.cpu_setup import cpu_setup
from mipnerf_fast.data import load_dataset
from mipnerf_fast.model import MipNerf
from mipnerf_fast.rendering import Rendering, add_deviation, rays_per_chunk, render_image
from mipnerf_fast.rendering_modes import Deviation

_TRUTH_RAYS, _TRUTH_CHUNK = 1024, 256


def chunk_of(rays: int, most: int) -> int:
    """The largest number of rays up to `most` that divides a frame: compiled and captured chunks have one size."""
    return next(size for size in range(min(rays, most), 0, -1) if rays % size == 0)


class Frame:
    """The rays of one picture, the weights, and what float64 makes of some of its pixels."""

    repeats = 1

    def __init__(self, model: MipNerf, rays: Rays, device: torch.device, trained: bool) -> None:
        self.config, self.device, self.trained = model.config, device, trained
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.rays = rays.flatten().map(lambda field: field.to(device, torch.float32))
        self.count = self.rays.origins.shape[0]
        self.chunk = chunk_of(self.count, rays_per_chunk(self.new_model("reference", "fp32"), device))
        stride = max(1, -(-self.count // _TRUTH_RAYS))
        self.subset = torch.arange(0, self.count, stride, device=device)
        exact = self.new_model("reference", "fp32").double()
        chosen = self.rays.map(lambda field: field[self.subset].double())
        with use_backend("reference"):
            self.truth = render_image(exact, chosen, chunk_rays=_TRUTH_CHUNK).rgb

    def new_model(self, mlp_backend: MlpBackend, mlp_dtype: MlpDtype) -> MipNerf:
        """The network with these weights and an engine."""
        config = dataclasses.replace(self.config, mlp_backend=mlp_backend, mlp_dtype=mlp_dtype)
        model = MipNerf(config)
        model.load_state_dict(self.state)
        return model.to(self.device).eval()

    def errors(self, rgb: Tensor) -> dict[str, float]:
        """Relative, of a row's colours."""
        return {"colour": relative([rgb[self.subset]], [self.truth])}


class ReferenceFrame:
    """PyTorch's frame: the reference chunk by chunk, in float32 or under autocast; eager, compiled or captured."""

    repeats = 1

    def __init__(self, frame: Frame, operands: str, compile_mode: str = "", captured: bool = False) -> None:
        self.frame, self.captured = frame, captured
        self.model = frame.new_model("reference", "fp32")
        device = frame.device
        self.autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        if operands == BF16:
            self.autocast = lambda: torch.autocast(device.type, torch.bfloat16, cache_enabled=not captured)
        self.chunk: Callable[[list[Tensor]], tuple[Tensor, Tensor, Tensor]] = self._chunk
        if compile_mode:
            # As one graph: where it breaks, the row does not run.
            self.chunk = torch.compile(self._chunk, fullgraph=True, mode=compile_mode, dynamic=False)
        self.graph: torch.cuda.CUDAGraph | None = None
        if captured:
            self._capture()

    def _chunk(self, fields: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        level = self.model.render_rays(Rays(*fields), True)
        return level.rgb, level.distance, level.acc

    def _capture(self) -> None:
        self.inputs = [field[: self.frame.chunk].clone() for field in self.frame.rays]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), use_backend("reference"):
            with torch.cuda.stream(stream), self.autocast():
                for _ in range(3):
                    self._chunk(self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph), self.autocast():
                self.outputs = self._chunk(self.inputs)
        self.graph = graph

    @torch.no_grad()
    def __call__(self) -> Rendering:
        frame, parts = self.frame, []
        with use_backend("reference"), self.autocast():
            for start in range(0, frame.count, frame.chunk):
                fields = [field[start : start + frame.chunk] for field in frame.rays]
                if self.graph is None:
                    outputs = self.chunk(fields)
                else:
                    for place, field in zip(self.inputs, fields, strict=True):
                        place.copy_(field)
                    self.graph.replay()
                    outputs = self.outputs
                # A graph writes its next chunk to the same place.
                parts.append([output.float().clone() for output in outputs])
        return Rendering(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))

    def errors(self) -> dict[str, float]:
        """Of the whole row, compiled or captured as it is timed."""
        return self.frame.errors(self().rgb)


class OurFrame:
    """Ours: `render_image` with an engine for the network, in the exact or the fast mode."""

    repeats = 1

    def __init__(
        self, frame: Frame, mlp_backend: MlpBackend, mlp_dtype: MlpDtype, mode: str = "exact"
    ) -> None:
        self.frame, self.mode = frame, mode
        self.model = frame.new_model(mlp_backend, mlp_dtype)

    def __call__(self) -> Rendering:
        return render_image(self.model, self.frame.rays, mode=self.mode)

    def errors(self) -> dict[str, float]:
        """Against float64; of the fast mode against the exact one."""
        frame, rgb = self.frame, self().rgb
        if self.mode == "exact":
            return frame.errors(rgb)
        deviation = Deviation(frame.count)
        add_deviation(deviation, self.model, frame.rays, rgb, True)
        # Not the name of an error of PyTorch's rows: what the fast mode may leave out is stated, not bounded by theirs.
        return {"PSNR to exact, dB": deviation.psnr, "largest difference to exact": deviation.largest}


def variants(frame: Frame, autotuned: bool) -> list[Variant]:
    """All rows."""
    on_cuda = frame.device.type == "cuda"
    missing = no_products(frame.device)
    no_graph = "" if on_cuda else "a CUDA graph needs a GPU"
    not_tuned = "" if autotuned else "left out: it compiles for minutes"

    def row(name: str, operands: str, why_not: str = "", **options: Any) -> Variant:
        def make() -> Any:
            return ReferenceFrame(frame, operands, **options)

        return Variant(name, PYTORCH, operands, make, why_not)

    rows = [
        row("eager fp32", FP32),
        row("eager TF32", TF32, missing.get(TF32, "")),
        row("eager bf16 autocast", BF16, missing.get(BF16, "")),
        *compiled_variants(functools.partial(ReferenceFrame, frame), missing, not_tuned),
        row("CUDA graph of eager bf16 autocast", BF16, no_graph, captured=True),
    ]
    untrained = "" if frame.trained else "its time depends on the scene: give a trained model with --run-dir"
    for mode in ("exact", "fast"):
        for engine, dtype, name, why_not in engine_names(frame.new_model("auto", "auto").mlp, frame.device):

            def make(engine: MlpBackend = engine, dtype: MlpDtype = dtype, mode: str = mode) -> OurFrame:
                return OurFrame(frame, engine, dtype, mode)

            if mode == "fast" and (why_not or untrained) and engine != "reference":
                continue  # one line says it for all
            label = name if mode == "exact" else f"{name}, fast mode"
            why = why_not or (untrained if mode == "fast" else "")
            rows.append(Variant(label, OURS, dtype, make, why))
    return rows


def sizes_of(device: torch.device) -> list[tuple[str, int]]:
    """(preset, pixels along a side) of the tables."""
    return [("paper", 800)] if device.type == "cuda" else [("small", 100), ("paper", 16)]


def random_frame(name: str, side: int, device: torch.device) -> Frame:
    """A preset's model as training starts it, and a view of nothing in particular."""
    config = preset(name).model
    assert isinstance(config, MipNerfConfig)
    torch.manual_seed(preset(name).seed)
    return Frame(MipNerf(config), random_images(1, side).rays(0), device, trained=False)


def trained_frame(run_dir: Path, side: int, device: torch.device) -> Frame:
    """A run's model and its first test view, `side` pixels wide.

    Errors: ValueError where the run is of another model than mip-NeRF.
    """
    model, run, _ = load_model(run_dir, device)
    if not isinstance(model, MipNerf):
        raise ValueError(
            f"--run-dir {run_dir}: its model is {type(model).__name__}, and mip-NeRF was expected"
        )
    data = load_dataset(run["data"], "test", run["background"], run["downscale"])
    scale = side / int(data.width[0])
    data.focal = data.focal * scale
    data.height, data.width = torch.full_like(data.height, side), torch.full_like(data.width, side)
    return Frame(model, data.rays(0), device, trained=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write render_DEVICE.json and .md after every table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=parse_size, nargs="*", help="such as paper:800; default by device")
    parser.add_argument("--run-dir", type=Path, help="a trained mip-NeRF; for the fast mode")
    parser.add_argument(
        "--side", type=int, default=0, help="pixels of the trained frame; default 800, CPU 100"
    )
    parser.add_argument(
        "--runs", type=int, default=0, help="undisturbed calls of each row; default 20, CPU 7"
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="of timing per row, when they are over")
    parser.add_argument("--no-compile", action="store_true", help="leave out the rows of torch.compile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    on_cuda = device.type == "cuda"
    if on_cuda and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    if not _native.available():
        parser.error(_native.why_missing())
    frames: list[tuple[str, Callable[[], Frame]]] = []
    if options.run_dir is not None:
        side = options.side or (800 if on_cuda else 100)
        title = f"the trained model of {options.run_dir.name}, {side} x {side}"
        frames.append((title, lambda: trained_frame(options.run_dir, side, device)))
    for name, pixels in sizes_of(device) if options.sizes is None else options.sizes:

        def make(name: str = name, pixels: int = pixels) -> Frame:
            return random_frame(name, pixels, device)

        frames.append((f"{name}, {pixels} x {pixels}, random weights", make))
    with cpu_setup() if not on_cuda else contextlib.nullcontext():
        report = new_report("A rendered frame", device, ceilings(device), ABOUT)
        for title, make_frame in frames:
            print(title, file=sys.stderr, flush=True)
            try:
                frame = make_frame()
            except (ValueError, OSError) as error:
                parser.error(str(error))
            work = rendering_work(title, frame.config, frame.count)

            # What the machine does is measured again beside every table.
            limits = ceilings(device)

            def keep(rows: list[Row], work: Work = work, limits: Ceilings = limits) -> None:
                put_table(report, work, rows, limits)
                write_report(report, options.out, f"render_{device.type}")

            rows = variants(frame, not options.no_compile)
            keep(measure_rows(rows, device, options.runs or (20 if on_cuda else 7), options.seconds, keep))
    print(markdown(report))
    return 0


ABOUT = (
    "A frame is all its rays on the device to colours, distances and opacities there; medians. PyTorch's rows run this "
    "package's reference, the coarse colours left out as in ours. TFLOP/s: of the network on all samples of both "
    "levels as the paper writes it, and of what is computed at least; the share of the ceiling is that of the product "
    "with the same operands. Error: relative, of the colours, against the reference in float64; of the fast mode its "
    "difference from the exact one. On a CPU malloc keeps its pages for every row."
)


if __name__ == "__main__":
    sys.exit(main())
