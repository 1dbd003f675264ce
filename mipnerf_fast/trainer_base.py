"""What the trainers of both model families share: progress, the clock, checkpoints."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import __version__
from .checkpoint import Checkpoint, CheckpointInfo, save_checkpoint
from .config import TrainConfig
from .environment import revision
from .errors import InputError
from .model import Model


class DivergedError(InputError):
    """Too many steps had a loss or a gradient that is not finite; none of them has changed the weights."""


@dataclass(frozen=True)
class StepResult:
    """Of one optimiser step.

    loss, mse: of the batch and of its finest level. rays: in the batch. step: its number, from 1. rate: the learning
    rate. norm: of the gradient before it was scaled down, None where nobody measures it. is_skipped: whether loss or
    gradient was not finite, and the step changed nothing. skips: steps of the run skipped so far. failures_in_row:
    skipped steps up to this one that no loss scale explains.
    """

    loss: float
    mse: float
    rays: int
    step: int
    rate: float
    norm: float | None = None
    is_skipped: bool = False
    skips: int = 0
    failures_in_row: int = 0

    @property
    def numbers(self) -> str:
        """Loss and gradient, in words: of a skipped step what was not finite."""
        if self.norm is not None:
            gradient = f", the norm of its gradient {self.norm:g}"
        else:
            gradient = ", its gradient is not finite" if self.is_skipped else ""
        return f"the loss is {self.loss:g}{gradient}"


class TrainerBase(ABC):
    """A model at some step of its training.

    config: of the run. device: to train on. step: the last one launched. seconds: of training so far. max_seconds: of
    training. chunk_rays: rays per pass, or 0. model: what is trained. stop_requested: asked between steps. remedy: what
    may help a run whose steps are not finite.
    """

    model: Model
    remedy: str = "a smaller lr_init"
    chunk_rays: int = 0

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device | str,
        max_seconds: float,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.config, self.device, self.max_seconds = config, torch.device(device), max_seconds
        self.step = checkpoint.info.step if checkpoint else 0
        self.seconds = checkpoint.info.seconds if checkpoint else 0.0
        self.stop_requested: Callable[[], bool] = lambda: False
        self._results: list[StepResult] = []

    @property
    def is_done(self) -> bool:
        """Whether the steps or the time are used up."""
        return self.step >= self.config.max_steps or self.seconds >= self.max_seconds

    @property
    def is_stopped(self) -> bool:
        """Whether the run ends here because that was requested."""
        return self.stop_requested()

    @property
    def time_share(self) -> float:
        """Of the time that is over; 0 without a limit."""
        return self.seconds / self.max_seconds if math.isfinite(self.max_seconds) else 0.0

    @property
    def progress(self) -> float:
        """Of the next step: the share of the steps or of the time, whichever is larger."""
        return max((self.step + 1) / self.config.max_steps, self.time_share)

    def train_step(self) -> StepResult:
        """Do one step and wait for its result; it is timed.

        Errors: as of `results`.
        """
        self.launch_step()
        return self.results(wait=True)[-1]

    @abstractmethod
    def launch_step(self) -> None:
        """Begin a step; its result comes from `results`, maybe some steps later; it is timed."""

    @abstractmethod
    def results(self, wait: bool = False) -> list[StepResult]:
        """The results, in order, of the steps that have finished since the last call.

        Args:
            wait: for all steps that have been launched.

        Errors: DivergedError after config.max_skips_in_row or config.max_skips skipped steps.
        """

    def unread_results(self) -> list[StepResult]:
        """Those that have arrived and nobody has taken, whatever came after them."""
        unread, self._results = self._results, []
        return unread

    def divergence(self, result: StepResult, failures: int) -> str:
        """Why the run ends with this step; empty where it goes on. failures: skips that no loss scale explains."""
        config, in_row = self.config, result.failures_in_row
        if in_row < config.max_skips_in_row and failures < config.max_skips:
            return ""
        return (
            f"step {result.step}: {result.numbers}; {in_row} steps in a row and {failures} in all were skipped because "
            "of such values"
        )

    @abstractmethod
    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Of Adam: {"exp_avg": {parameter name: tensor}, "exp_avg_sq": ...}."""

    @abstractmethod
    def describe_batch(self) -> str:
        """What a step takes, in words."""

    def describe_passes(self) -> str:
        """How the rays of a step are cut, in a few words; empty where they are not."""
        return ""

    @abstractmethod
    def explain_skip(self, result: StepResult) -> str:
        """Where the first value that is not finite arises in the batch of a skipped step, in words."""

    def save(self, path: Path, test_psnr: float | None) -> None:
        """Write a checkpoint."""
        save_checkpoint(path, self.checkpoint_info(test_psnr), self.model, self.moments())

    def checkpoint_info(self, test_psnr: float | None) -> CheckpointInfo:
        """What the checkpoint of now says about itself."""
        return CheckpointInfo(
            step=self.step,
            seconds=self.seconds,
            config=self.config,
            chunk_rays=self.chunk_rays,
            test_psnr=test_psnr,
            package=__version__,
            revision=revision(),
            torch=torch.__version__,
        )
