"""What a training run shows of itself: progress line, metrics.csv, TensorBoard, previews, curves."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .curves import draw_curves
from .pictures import to_uint8, write_png
from .run_folder import MetricsFile

TENSORBOARD = "tensorboard"
PREVIEWS = "previews"
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_UPDATES = 0.2
# Drawing takes about a second: with frequent checkpoints it must not take over.
_SECONDS_BETWEEN_CURVES = 30.0


class ProgressLine:
    """How far training is: a bar on a terminal, plain lines anywhere else, on standard error.

    Args:
        step, max_steps: done and wanted.
        seconds, max_seconds: of training, done and allowed (infinite: no limit).
        is_silent: in all processes but the one that speaks.
        passes: how a step is cut, or nothing.
    """

    def __init__(
        self,
        step: int,
        max_steps: int,
        seconds: float,
        max_seconds: float,
        is_silent: bool = False,
        passes: str = "",
    ) -> None:
        self._is_silent = is_silent
        self._passes = f" in {passes}" if passes else ""
        self._max_steps, self._max_seconds = max_steps, max_seconds
        self._first = (step, seconds)
        self._shown_at = time.monotonic()
        self._note = ""
        self._fraction = 0.0
        self._bar: Any = None
        if sys.stderr.isatty() and not is_silent:
            self._bar = tqdm(
                total=1.0, bar_format="train {percentage:3.0f}%|{bar}| {desc}", dynamic_ncols=True
            )

    def update(self, step: int, seconds: float, rays_per_second: float, psnr: float) -> None:
        """Show where training is, unless that was done a moment ago."""
        self._fraction = min(1.0, max(step / self._max_steps, seconds / self._max_seconds))
        self._note = (
            f"step {step:,} of {self._max_steps:,}, {rays_per_second:,.0f} rays/s{self._passes}, "
            f"PSNR {psnr:.2f} dB, {_clock(self._seconds_left(step, seconds))} left"
        )
        now = time.monotonic()
        pause = _SECONDS_BETWEEN_LINES if self._bar is None else _SECONDS_BETWEEN_UPDATES
        if now - self._shown_at >= pause:
            self._shown_at = now
            self._show()

    def _show(self) -> None:
        if self._is_silent:
            return
        if self._bar is None:
            print(f"train: {self._note}", file=sys.stderr, flush=True)
        else:
            self._bar.n = self._fraction
            self._bar.set_description_str(self._note, refresh=True)

    def _seconds_left(self, step: int, seconds: float) -> float:
        steps_here, seconds_here = step - self._first[0], seconds - self._first[1]
        by_steps = (self._max_steps - step) * seconds_here / max(steps_here, 1)
        return max(0.0, min(by_steps, self._max_seconds - seconds))

    def say(self, message: str) -> None:
        """Print a line without tearing the bar."""
        if self._is_silent:
            return
        if self._bar is None:
            print(message, file=sys.stderr, flush=True)
        else:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar where training is and go on below it."""
        if self._bar is not None:
            self._show()
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Reports:
    """Everything that a run writes but for config.json and the checkpoints; a context manager.

    Args:
        run_dir: of the run.
        step: that the run continues from; what was written after it is dropped.
        progress: where to say what is skipped.

    Errors: InputError where metrics.csv of the run to continue is broken.
    """

    def __init__(self, run_dir: Path, step: int, progress: ProgressLine) -> None:
        self._run_dir, self._progress = run_dir, progress
        self._metrics = MetricsFile(run_dir, step)
        self._board = _open_tensorboard(run_dir / TENSORBOARD, step, progress)
        self._drawn_at = -math.inf
        self._draws = True

    def row(self, values: dict[str, Any]) -> None:
        """One row of metrics.csv, and the same numbers to TensorBoard."""
        self._metrics.add(values)
        if self._board is None:
            return
        names = {
            "loss": "train/loss",
            "psnr": "train/psnr",
            "lr": "train/learning_rate",
            "rays_per_second": "train/rays_per_second",
            "test_psnr": "test/psnr_of_sample",
            "test_view_psnr": "test/psnr_of_view",
        }
        for name, tag in names.items():
            if values.get(name) is not None:
                self._board.add_scalar(tag, values[name], values["step"])

    def preview(self, step: int, rendered: Tensor, truth: Tensor) -> None:
        """A test view beside its ground truth (left), both [H, W, 3]."""
        picture = to_uint8(torch.cat([truth.cpu(), rendered.cpu()], 1))
        write_png(self._run_dir / PREVIEWS / f"step_{step:08d}.png", picture)
        if self._board is not None:
            self._board.add_image("test/truth_and_render", picture, step, dataformats="HWC")

    def sync(self) -> None:
        """Put the metrics on disk: before a checkpoint that continues them."""
        self._metrics.sync()
        if self._board is not None:
            self._board.flush()

    def curves(self, at_least_every: float = _SECONDS_BETWEEN_CURVES) -> None:
        """Draw curves.png, unless that was done less than so many seconds ago."""
        now = time.monotonic()
        if not self._draws or now - self._drawn_at < at_least_every:
            return
        self._drawn_at = now
        try:
            draw_curves(self._run_dir)
        except ImportError as error:
            self._draws = False
            self._progress.say(f"curves.png skipped: {error}")

    def __enter__(self) -> Reports:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        if self._board is not None:
            self._board.close()


def _open_tensorboard(folder: Path, step: int, progress: ProgressLine) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        progress.say(f"TensorBoard events skipped: {error}")
        return None
    # Events after the step that the run continues from are hidden: those steps come again.
    return SummaryWriter(str(folder), purge_step=step + 1)
