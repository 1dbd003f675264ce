"""The curves of a training run: loss, PSNR and learning rate against steps and against seconds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .durable_files import write_durably
from .run_folder import read_metrics

FILE = "curves.png"


def draw_curves(run_dir: Path) -> Path:
    """Draw curves.png of a run folder from its metrics.csv.

    Returns:
        The path of the picture.

    Errors: InputError where metrics.csv is missing or broken; ImportError without matplotlib.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = read_metrics(run_dir)
    # Figure and canvas directly, without pyplot: no display and no global state.
    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 2, sharex="col")
    for column, (against, label) in enumerate((("step", "steps"), ("seconds", "seconds of training"))):
        x = metrics[against]
        loss, psnr, rate = panels[:, column]
        _line(loss, x, metrics["loss"], "training batches", "tab:blue")
        loss.set_yscale("log")
        loss.set_ylabel("loss")
        _line(psnr, x, metrics["psnr"], "training batches", "tab:blue")
        _line(psnr, x, metrics["test_psnr"], "fixed sample of test pixels", "tab:red", ".-")
        _line(psnr, x, metrics["test_view_psnr"], "one test view in turn", "tab:orange", "x")
        psnr.set_ylabel("PSNR [dB]")
        if psnr.has_data():
            psnr.legend(loc="lower right")
        _line(rate, x, metrics["lr"], "learning rate", "tab:green")
        rate.set_yscale("log")
        rate.set_ylabel("learning rate")
        rate.set_xlabel(label)
        for panel in (loss, psnr, rate):
            panel.grid(True, which="both", alpha=0.25)
    figure.suptitle(run_dir.resolve().name)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    path = run_dir / FILE
    write_durably(path, picture.getvalue())
    return path


def _line(panel: Any, x: list[float], y: list[float], label: str, colour: str, style: str = "-") -> None:
    """A curve through the values that there are."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    if points:
        panel.plot(*zip(*points, strict=True), style, label=label, color=colour, linewidth=1.2)
