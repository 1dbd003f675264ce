"""What the trainers of both model families share: progress, the clock, checkpoints."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
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
    """The loss or the gradient of a step is not finite; the weights are those from before it."""


@dataclass(frozen=True)
class StepResult:
    """Of one optimiser step: the loss, the mean squared error of the finest level, the number of rays."""

    loss: float
    mse: float
    rays: int


class TrainerBase(ABC):
    """A model at some step of its training.

    config: of the run. device: to train on. step, seconds: done so far. max_seconds: of training. chunk_rays: rays
    per pass, or 0. model: what is trained. last_rate: learning rate of the last step.
    """

    model: Model
    chunk_rays: int = 0
    last_rate: float = 0.0

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

    @property
    def is_done(self) -> bool:
        """Whether the steps or the time are used up."""
        return self.step >= self.config.max_steps or self.seconds >= self.max_seconds

    @property
    def progress(self) -> float:
        """Of the next step: the share of the steps or of the time, whichever is larger."""
        share = self.seconds / self.max_seconds if math.isfinite(self.max_seconds) else 0.0
        return max((self.step + 1) / self.config.max_steps, share)

    @abstractmethod
    def train_step(self) -> StepResult:
        """Do one step; it is timed."""

    @abstractmethod
    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Of Adam: {"exp_avg": {parameter name: tensor}, "exp_avg_sq": ...}."""

    @abstractmethod
    def describe_batch(self) -> str:
        """What a step takes, in words."""

    def save(self, path: Path, test_psnr: float | None) -> None:
        """Write a checkpoint."""
        info = CheckpointInfo(
            step=self.step,
            seconds=self.seconds,
            config=self.config,
            chunk_rays=self.chunk_rays,
            test_psnr=test_psnr,
            package=__version__,
            revision=revision(),
            torch=torch.__version__,
        )
        save_checkpoint(path, info, self.model, self.moments())
