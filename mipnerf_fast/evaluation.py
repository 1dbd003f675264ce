"""Evaluation: PSNR, SSIM, LPIPS and average error per scale, as JSON, Markdown, CSV and a table for the terminal."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import metrics, ops
from .durable_files import write_durably
from .environment import device_name, revision
from .fast_model import FastModel
from .model import Model
from .pictures import to_uint8, write_png
from .progress import Progress
from .ranks import ALONE, Ranks
from .rendering import add_deviation, render_image
from .rendering_modes import Deviation, check_mode

if TYPE_CHECKING:
    from .data.dataset import Dataset

LPIPS_NETWORK = "vgg"
_LPIPS_WEIGHTS = "vgg16-397923af.pth"
_SSIM_WINDOW = 11

Lpips = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Scores:
    """The metrics of one image, or their means over the images of a scale; None: not available."""

    psnr: float | None
    ssim: float | None
    lpips: float | None


@dataclass(frozen=True)
class ViewScores:
    """The metrics of one image."""

    name: str
    scale: int
    height: int
    width: int
    scores: Scores


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    split, background: of the data. views: one per image. run: device, torch, revision, backend, precision, mode,
    steps, seconds. lpips_note: the network behind LPIPS, or why there is none.
    """

    split: str
    background: str
    views: list[ViewScores]
    run: dict[str, Any]
    lpips_note: str

    def scales(self) -> dict[int, tuple[Scores, int]]:
        """Per scale the means over its images, and their number."""
        result = {}
        for scale in sorted({view.scale for view in self.views}):
            of_scale = [view.scores for view in self.views if view.scale == scale]
            result[scale] = (_mean(of_scale), len(of_scale))
        return result

    def mean(self) -> Scores:
        """The mean over scales, each weighing the same."""
        return _mean([scores for scores, _ in self.scales().values()])

    def average_error(self) -> float | None:
        """The average error of the means; None unless all three metrics are there."""
        mean = self.mean()
        if mean.psnr is None or mean.ssim is None or mean.lpips is None:
            return None
        return metrics.average_error(mean.psnr, mean.ssim, mean.lpips)

    def to_dict(self) -> dict[str, Any]:
        """The contents of metrics.json."""
        return {
            "split": self.split,
            "background": self.background,
            "scales": {
                str(scale): _as_dict(scores) | {"images": count}
                for scale, (scores, count) in self.scales().items()
            },
            "mean": _as_dict(self.mean()) | {"average_error": self.average_error()},
            "run": self.run,
        }

    def caption(self) -> str:
        """One sentence saying what was measured, on what."""
        run = self.run
        sizes = sorted({(view.scale, view.width, view.height) for view in self.views})
        scales = ", ".join(f"1/{scale} ({width} x {height})" for scale, width, height in sizes)
        mode = "" if run["mode"] == "exact" else f"; {run['mode']}"
        return (
            f"{self.split} split, {len(self.views)} images, {self.background} background, scale {scales}; "
            f"{run['precision']}, backend {run['backend']}, {run['device']}, torch {run['torch']}, "
            f"revision {run['revision']}, after {run['steps']} steps in "
            f"{_number(run['seconds'], 1)} s of training{mode}"
        )

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """The table, without its head: scale, images, PSNR, SSIM, LPIPS, average error."""
        table = [
            (str(scale), str(count), *_cells(scores), "") for scale, (scores, count) in self.scales().items()
        ]
        mean = ("mean", str(len(self.views)), *_cells(self.mean()), _number(self.average_error(), 4))
        return [*table, mean]


_HEAD = ("scale", "images", "PSNR (dB)", "SSIM", "LPIPS", "average error")


def _mean(scores: list[Scores]) -> Scores:
    def mean(values: list[float | None]) -> float | None:
        present = [value for value in values if value is not None]
        return sum(present) / len(present) if present and len(present) == len(values) else None

    return Scores(
        mean([s.psnr for s in scores]), mean([s.ssim for s in scores]), mean([s.lpips for s in scores])
    )


def _as_dict(scores: Scores) -> dict[str, Any]:
    return {"psnr": scores.psnr, "ssim": scores.ssim, "lpips": scores.lpips}


def _number(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _cells(scores: Scores) -> tuple[str, str, str]:
    return _number(scores.psnr, 2), _number(scores.ssim, 4), _number(scores.lpips, 4)


def find_lpips(device: torch.device) -> tuple[Lpips | None, str]:
    """LPIPS with the network VGG, and its name; or None, and why there is none. Never downloads anything."""
    try:
        import lpips
    except ImportError:
        return None, "the package lpips is not installed"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / _LPIPS_WEIGHTS
    if not weights.is_file():
        return None, f"the weights of VGG are not at {weights}"
    network = lpips.LPIPS(net=LPIPS_NETWORK, verbose=False).to(device).eval()

    def distance(a: Tensor, b: Tensor) -> float:
        first, second = ((image.clamp(0, 1) * 2 - 1).permute(2, 0, 1)[None] for image in (a, b))
        return float(network(first, second))

    return distance, f"LPIPS with {LPIPS_NETWORK}"


@torch.no_grad()
def score(prediction: Tensor, target: Tensor, lpips: Lpips | None = None) -> Scores:
    """The metrics of one image.

    PSNR and SSIM take the prediction as it is, unclipped and unrounded, as in the original; SSIM is None for an
    image smaller than its 11 x 11 window, and a value that is not finite is None.

    Args:
        prediction, target: [H, W, 3].
        lpips: see `find_lpips`.

    Source: algorithm 1.11.
    """

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    small = min(prediction.shape[:2]) < _SSIM_WINDOW
    return Scores(
        finite(float(metrics.psnr(prediction, target))),
        None if small else finite(float(metrics.ssim(prediction, target))),
        None if lpips is None else finite(lpips(prediction, target)),
    )


def evaluate(
    model: Model,
    data: Dataset,
    *,
    steps: int = 0,
    seconds: float | None = None,
    chunk_rays: int | None = None,
    pictures: Path | None = None,
    mode: str = "exact",
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Render every view of a data set and compare it with the truth.

    Args:
        model: a trained model; its finest level is rendered, without randomness.
        data: of any split; its background is used.
        steps, seconds: of the training, for the record.
        chunk_rays: see `render_image`.
        pictures: a folder to write the predictions to as PNG, or None.
        mode: "exact", or "fast": then the record says how far from exact.
        ranks: this process among those that share the images.

    Returns:
        Evaluation, the same in every process.

    Errors: InputError for a mode that the model does not have.
    """
    check_mode(model, mode)
    deviation = Deviation(data.pixels.shape[0])
    parameter = next(model.parameters())
    lpips, note = find_lpips(parameter.device)
    mine = range(ranks.rank, len(data), ranks.size)
    views = {}
    count = sum(data.images[i].shape[0] * data.images[i].shape[1] for i in mine)
    with Progress("evaluating", count, "rays", is_silent=not ranks.is_writer) as bar:
        for i in mine:
            target = data.target(i, parameter.device)
            rays = data.rays(i)
            prediction = render_image(model, rays, data.white_background, chunk_rays, bar, mode).rgb
            if mode == "fast":
                add_deviation(deviation, model, rays, prediction, data.white_background, chunk_rays)
            views[i] = ViewScores(
                data.names[i],
                int(data.scale[i]),
                int(data.height[i]),
                int(data.width[i]),
                score(prediction.to(target), target, lpips),
            )
            if pictures is not None:
                write_png(pictures / f"{i:04d}.png", to_uint8(prediction))
    views = {i: view for part in ranks.gather(views) for i, view in part.items()}
    mine_compared = deviation
    deviation = Deviation(data.pixels.shape[0])
    for part in ranks.gather(mine_compared):
        deviation.include(part)
    operations = ops.FAST_OPERATIONS if isinstance(model, FastModel) else ops.OPERATIONS
    run = {
        "device": device_name(parameter.device),
        "torch": torch.__version__,
        "revision": revision(),
        "backend": ops.backend_in_use(parameter.device, parameter.dtype, operations) + _network(model),
        "precision": _precision(model),
        "mode": str(deviation) if mode == "fast" else mode,
        "steps": steps,
        "seconds": seconds,
    }
    return Evaluation(data.split, data.background, [views[i] for i in range(len(data))], run, note)


def _precision(model: Model) -> str:
    """What pictures are computed in; of a model that has a choice for its network, `_network` says more."""
    if isinstance(model, FastModel):
        return model.precision
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _network(model: Model) -> str:
    """What computes the network, of a model that has a choice."""
    mlps = getattr(model, "mlps", None)
    if mlps is None:
        return ""
    mlp = mlps[-1]
    assert isinstance(mlp, ops.MipMLP)
    engine, dtype, _ = mlp.implementation
    if engine == "tcnn":
        engine = "tcnn (another architecture)"
    return f", network {engine} in {str(dtype).removeprefix('torch.')}"


def terminal_table(evaluation: Evaluation) -> str:
    """The table in aligned columns, with what it was measured on above it."""
    lines = [_HEAD, *evaluation.rows()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    body = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    notes = [] if evaluation.mean().lpips is not None else [f"LPIPS n/a: {evaluation.lpips_note}"]
    return "\n".join([evaluation.caption(), "", *body, *notes])


def markdown_table(evaluation: Evaluation) -> str:
    """The table as Markdown, with what it was measured on below it."""

    def row(cells: tuple[str, ...]) -> str:
        return f"| {' | '.join(cells)} |"

    lines = [row(_HEAD), row(("---:",) * len(_HEAD)), *map(row, evaluation.rows()), ""]
    note = evaluation.lpips_note
    lpips = f"LPIPS n/a: {note}." if evaluation.mean().lpips is None else f"{note}."
    return "\n".join([*lines, f"Measured on the {evaluation.caption()}. {lpips}", ""])


def _csv(head: tuple[str, ...], rows: list[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, head, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write_reports(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write metrics.json, metrics.md, metrics.csv (per scale and mean) and views.csv (per image), each atomically.

    Returns:
        The paths written.
    """
    measured = {"split": evaluation.split, "background": evaluation.background} | evaluation.run
    scales: list[Mapping[str, Any]] = [
        {"scale": scale, "images": count, **_as_dict(scores), **measured}
        for scale, (scores, count) in evaluation.scales().items()
    ]
    mean = {"scale": "mean", "images": len(evaluation.views), **_as_dict(evaluation.mean())}
    scales.append(mean | {"average_error": evaluation.average_error()} | measured)
    views: list[Mapping[str, Any]] = [
        {"name": v.name, "scale": v.scale, "height": v.height, "width": v.width, **_as_dict(v.scores)}
        for v in evaluation.views
    ]
    scale_head = ("scale", "images", "psnr", "ssim", "lpips", "average_error", *measured)
    contents = {
        "metrics.json": (json.dumps(evaluation.to_dict(), indent=2, allow_nan=False) + "\n").encode(),
        "metrics.md": markdown_table(evaluation).encode(),
        "metrics.csv": _csv(scale_head, scales),
        "views.csv": _csv(("name", "scale", "height", "width", "psnr", "ssim", "lpips"), views),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        write_durably(folder / name, data)
    return [folder / name for name in contents]
