"""PSNR against seconds of training on a scene, for each backend, and the time to reach given PSNRs.

python benchmarks/bench_quality.py --data path/to/lego --downscale 8 --preset small --minutes 2

Every backend trains the same configuration from the same weights on the same pixels for the same time, which its
learning rate is stretched over. From time to time the clock stands still and the PSNR of the finest level is taken on
a fixed random sample of the test pixels; at the end on all of them, always in float32 where PyTorch trains. What
torch.compile takes is part of its time. One chart holds all curves.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, machine
from mipnerf_fast import preset, use_backend
from mipnerf_fast.cameras import Rays
from mipnerf_fast.config import MipNerfConfig, MlpBackend, MlpDtype, TrainConfig
from mipnerf_fast.cpu_setup import cpu_setup
from mipnerf_fast.data import Dataset, RayBatches, load_dataset
from mipnerf_fast.durable_files import write_durably
from mipnerf_fast.environment import choose_device
from mipnerf_fast.errors import InputError
from mipnerf_fast.evaluation import evaluate
from mipnerf_fast.metrics import mse_to_psnr
from mipnerf_fast.ops import Composite
from mipnerf_fast.rendering import render_image
from mipnerf_fast.trainer import Trainer
from mipnerf_fast.training import make_trainer

SAMPLE = 8192
# Points of a curve, evenly spread over the logarithm of the time.
POINTS = 24


# A break in the graph is an error: then the curve says why it is missing.
_COMPILE: dict[str, Any] = {"fullgraph": True, "dynamic": False}


@dataclass(frozen=True)
class Backend:
    """A curve.

    operations, network, operands: what computes them. capture: whether the step is a CUDA graph. autocast, compile: how
    PyTorch runs the model, in bfloat16 and compiled.
    """

    name: str
    operations: str
    network: MlpBackend = "auto"
    operands: MlpDtype = "auto"
    capture: bool = True
    autocast: bool = False
    compile: bool = False

    @property
    def precision(self) -> str:
        """Of the operands of the network's products in training; everything else is float32."""
        if self.operations == "reference":
            return "bf16 autocast" if self.autocast else "fp32"
        return self.operands


class InAutocast(torch.nn.Module):
    """A model whose forward pass runs in bfloat16 where torch.autocast says so; what it returns is float32."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, rays: Rays, **options: Any) -> list[Composite]:
        with torch.autocast(rays.origins.device.type, torch.bfloat16):
            levels = self.model(rays, **options)
        return [Composite(*(field.float() for field in level)) for level in levels]


def backends(device: torch.device) -> list[Backend]:
    """Those that are compared on a device."""
    if device.type == "cuda":
        return [
            Backend("PyTorch fp32", "reference", capture=False),
            Backend("PyTorch bf16 autocast", "reference", capture=False, autocast=True),
            Backend(
                "PyTorch bf16 autocast, torch.compile",
                "reference",
                capture=False,
                autocast=True,
                compile=True,
            ),
            Backend("ours, fused, launched", "auto", "fused", "bf16", capture=False),
            Backend("ours, fused, in a CUDA graph", "auto", "fused", "bf16"),
            Backend("ours, cublaslt, in a CUDA graph", "auto", "cublaslt", "bf16"),
        ]
    return [
        Backend("PyTorch fp32", "reference"),
        Backend("ours, fp32", "auto", "folded", "fp32"),
        Backend("ours, bf16 products", "auto", "folded", "bf16"),
    ]


def marks(seconds: float, points: int = POINTS) -> list[float]:
    """When the PSNR is taken: from a fiftieth of the time to its end, each so many times the one before."""
    return [seconds * 50 ** (k / (points - 1) - 1) for k in range(points)]


def time_to_reach(curve: Sequence[dict[str, Any]], psnr: float) -> float | None:
    """Seconds until a curve first passes a PSNR, between two of its points in proportion; None if never."""
    before = None
    for point in curve:
        if point["psnr"] >= psnr:
            if before is None:
                return float(point["seconds"])
            share = (psnr - before["psnr"]) / (point["psnr"] - before["psnr"])
            return float(before["seconds"] + share * (point["seconds"] - before["seconds"]))
        before = point
    return None


def levels_to_reach(curves: Sequence[Sequence[dict[str, Any]]]) -> list[int]:
    """The whole dB that at least one curve passes and that tell them apart: the last six up to the best."""
    best = max((point["psnr"] for curve in curves for point in curve), default=0.0)
    return list(range(max(1, int(best) - 5), int(best) + 1))


def _at_once(add_gradients: Callable[[Sequence[Tensor]], None], losses: Sequence[Tensor]) -> None:
    add_gradients([torch.stack(list(losses)).sum()])


def train_curve(
    backend: Backend,
    config: TrainConfig,
    train: Dataset,
    test: Dataset,
    device: torch.device,
    seconds: float,
) -> dict[str, Any]:
    """Train with a backend for so long; its curve and its end.

    Errors: RuntimeError where the backend cannot serve here.
    """
    assert isinstance(config.model, MipNerfConfig)
    model = dataclasses.replace(config.model, mlp_backend=backend.network, mlp_dtype=backend.operands)
    config = dataclasses.replace(config, model=model, capture=backend.capture)
    rays, target = RayBatches(test, device).draw(0, 0, min(SAMPLE, test.pixels.shape[0]))
    points: list[dict[str, Any]] = []
    with use_backend(backend.operations):
        trainer = make_trainer(config, train, device, seconds)
        assert isinstance(trainer, Trainer)
        if backend.compile:
            torch.compiler.reset()
            trainer.model.compile(**_COMPILE)
            # Compiled, the levels are one graph, which can be gone back through only once.
            flat = trainer.work.flat
            flat.add_gradients = functools.partial(_at_once, flat.add_gradients)  # type: ignore[method-assign]
        if backend.autocast:
            trainer.work.model = InAutocast(trainer.model)  # type: ignore[assignment]
        waiting = marks(seconds)
        while not trainer.is_done:
            trainer.launch_step()
            trainer.results()
            if waiting and trainer.seconds >= waiting[0]:
                trainer.results(wait=True)
                while waiting and trainer.seconds >= waiting[0]:
                    waiting.pop(0)
                rgb = render_image(trainer.model, rays, test.white_background).rgb
                psnr = float(mse_to_psnr(((rgb - target) ** 2).mean()))
                points.append({"seconds": trainer.seconds, "step": trainer.step, "psnr": psnr})
        trainer.results(wait=True)
        whole = evaluate(trainer.model, test, steps=trainer.step, seconds=trainer.seconds)
    return {
        "backend": asdict(backend),
        "points": points,
        "steps": trainer.step,
        "seconds": trainer.seconds,
        "rays_per_second": trainer.step * config.batch_size / trainer.seconds,
        "test_psnr": whole.mean().psnr,
        "test_ssim": whole.mean().ssim,
        "precision": backend.precision,
    }


def markdown(report: dict[str, Any]) -> str:
    """The table: the end of each curve, and the time to reach each of some PSNRs."""
    ran = [curve for curve in report["curves"] if "points" in curve]
    levels = levels_to_reach([curve["points"] for curve in ran])
    head = [
        "backend",
        "precision",
        "steps",
        "rays/s",
        "test PSNR (dB)",
        "test SSIM",
        *(f"s to {psnr} dB" for psnr in levels),
    ]
    lines = [f"| {' | '.join(head)} |", f"| --- | --- |{' ---: |' * (len(head) - 2)}"]
    for curve in report["curves"]:
        cells = [curve["backend"]["name"]]
        if "points" not in curve:
            cells += ["", f"not run: {curve['why']}", *[""] * (len(head) - 3)]
        else:
            cells += [curve["precision"], f"{curve['steps']:,}", f"{curve['rays_per_second']:,.0f}"]
            ssim = curve["test_ssim"]
            cells += [f"{curve['test_psnr']:.2f}", "n/a" if ssim is None else f"{ssim:.4f}"]
            reached = [time_to_reach(curve["points"], psnr) for psnr in levels]
            cells += ["-" if seconds is None else f"{seconds:.1f}" for seconds in reached]
        lines.append(f"| {' | '.join(cells)} |")
    facts = report["environment"]
    return "\n".join(
        [
            *lines,
            "",
            f"{report['about']} {facts['device']}, torch {facts['torch']}, revision {facts['revision']}.",
            "",
        ]
    )


def draw(report: dict[str, Any], path: Path) -> None:
    """All curves on one chart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), dpi=150)
    for curve in report["curves"]:
        if curve.get("points"):
            x, y = ([point[key] for point in curve["points"]] for key in ("seconds", "psnr"))
            axes.plot(x, y, marker=".", label=curve["backend"]["name"])
    axes.set_xscale("log")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("PSNR on test pixels (dB)")
    axes.set_title(f"{report['title']}\n{report['environment']['device']}", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, write quality_DEVICE.json, .md and .png after every curve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help='scene folder, or "demo"')
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--preset", default="", help="by default paper on a GPU, small on a CPU")
    parser.add_argument("--downscale", type=int, default=0, help="by default 1 on a GPU, 8 on a CPU")
    parser.add_argument("--minutes", type=float, default=2.0, help="of training, for each backend")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    try:
        device = choose_device(options.device)
        name = options.preset or ("paper" if device.type == "cuda" else "small")
        config = preset(name)
        if not isinstance(config.model, MipNerfConfig):
            raise InputError(f"--preset {name}: its model is not mip-NeRF, whose backends are compared")
        if not options.minutes > 0:
            raise InputError(f"--minutes: must be positive, got {options.minutes}")
        downscale = options.downscale or (1 if device.type == "cuda" else 8)
        train, test = (load_dataset(options.data, split, "white", downscale) for split in ("train", "test"))
    except (InputError, OSError) as error:
        print(f"bench_quality: {error}", file=sys.stderr)
        return 2
    scene = Path(options.data).name
    sizes = f"{int(test.width.max())} x {int(test.height.max())}"
    title = f"{scene} at 1/{downscale} ({sizes}), preset {name}, {options.minutes:g} min each"
    about = (
        f"{title}: {len(train)} training views, {len(test)} views of the split test, white background, "
        f"{config.batch_size:,} rays a "
        f"step, learning rate over the time given. Times to a PSNR: on {min(SAMPLE, test.pixels.shape[0]):,} random "
        "test pixels, the clock standing still meanwhile; test PSNR and SSIM: all test pixels, at the end."
    )
    report: dict[str, Any] = {"title": title, "about": about, "environment": machine(device), "curves": []}
    stem = options.out / f"quality_{device.type}"
    options.out.mkdir(parents=True, exist_ok=True)
    with cpu_setup() if device.type == "cpu" else contextlib.nullcontext():
        for backend in backends(device):
            print(f"{backend.name}: {options.minutes:g} min", file=sys.stderr, flush=True)
            try:
                curve = train_curve(backend, config, train, test, device, 60 * options.minutes)
            except RuntimeError as error:
                curve = {"backend": asdict(backend), "why": str(error).splitlines()[0]}
            report["curves"].append(curve)
            write_durably(stem.with_suffix(".json"), (json.dumps(report, indent=1) + "\n").encode())
            write_durably(stem.with_suffix(".md"), markdown(report).encode())
            draw(report, stem.with_suffix(".png"))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
