"""Training of the fast model: one step from drawn pixels to updated parameters."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .config import FastConfig, TrainConfig
from .data import Dataset
from .fast_model import FastModel
from .ops.fast_step import FastGradients, PixelSource
from .schedules import log_lerp, warm_up

BETA1, BETA2 = 0.9, 0.99
# Rays per step stay in this range, whatever the number of samples a ray takes.
MIN_RAYS, MAX_RAYS = 192, 8192
_GROUP_RAYS = 64
# Steps between updates of the occupancy grid; until _EARLY_STEPS one cell in 16 is visited each time and what was
# there is soon forgotten, later one in 64.
UPDATE_EVERY = 16
_EARLY_STEPS = 400
_EARLY_STRIDE, _LATE_STRIDE = 16, 64
_EARLY_DECAY, _LATE_DECAY = 0.4, 0.8
# A cell counts as occupied where a step through it would absorb this share of the light.
_OCCUPIED_OPACITY = 0.01
# Half of the cone's radius at t = 1, for a pixel one unit wide there: radius 1/sqrt(3), deviation radius/2.
_DEVIATION_PER_PIXEL = 0.5 / math.sqrt(3.0)


class FastStep(NamedTuple):
    """What a step did: its loss, mean squared error, rays, samples, learning rate, and whether it was taken."""

    loss: float
    squared_error: float
    rays: int
    samples: int
    learning_rate: float
    is_finite: bool


class FastTrainer:
    """Trains a `FastModel` on a dataset; nothing but the state it can save decides what a step does.

    A step draws pixels by counter-based random numbers, runs `ops.fast_train_step` and Adam on the entries that were
    touched, and every UPDATE_EVERY steps renews the occupancy grid. The number of rays follows the number of samples
    that a ray takes, so that a step has `config.batch_size` samples. A step whose gradient is not finite changes
    nothing and is counted.

    Args:
        model: on the CPU; its scale_range is set to the widths that the dataset's cones can have.
        dataset: the training images; scales are told apart by `Dataset.scale`.
        config: its model must be a `FastConfig`.
    """

    def __init__(self, model: FastModel, dataset: Dataset, config: TrainConfig) -> None:
        if not isinstance(config.model, FastConfig):
            raise ValueError(f"FastTrainer: config.model is a {type(config.model).__name__}, not FastConfig")
        self.model, self.config, self.settings = model, config, config.model
        self.source = pixel_source(dataset, self.settings.scale_ratio)
        self.random_background = self.settings.random_background and dataset.pixels.shape[1] == 4
        self.background = 1.0 if dataset.white_background else 0.0
        self.step_number = 0
        self.samples_per_ray = 100.0
        self.skipped_steps = 0
        side = 2 * self.settings.box_half
        low = (dataset.near / dataset.focal).min().item() * _DEVIATION_PER_PIXEL / side
        high = (dataset.far / dataset.focal).max().item() * _DEVIATION_PER_PIXEL / side
        model.scale_range.copy_(torch.tensor([low, high]))
        middle = 0.5 * float(dataset.near.min() + dataset.far.max())
        pixel = middle / float(dataset.focal.max())
        self._cell_scale = pixel * _DEVIATION_PER_PIXEL / side
        step = min(max(self.settings.step_scale * pixel, self.settings.min_step), self.settings.max_step)
        self._max_threshold = _OCCUPIED_OPACITY / step
        self._parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._gradients = {name: torch.zeros_like(tensor) for name, tensor in self._parameters.items()}
        self.moments = {
            moment: {name: torch.zeros_like(tensor) for name, tensor in self._parameters.items()}
            for moment in ("exp_avg", "exp_avg_sq")
        }
        self._gradient_buffers = FastGradients(
            *(self._gradients.get(name) for name in FastGradients._fields)  # type: ignore[arg-type]
        )

    def state(self) -> dict[str, float]:
        """What to save beside the model's state_dict and `moments`."""
        return {
            "step": self.step_number,
            "samples_per_ray": self.samples_per_ray,
            "skipped_steps": self.skipped_steps,
        }

    def load_state(self, state: dict[str, float], moments: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of `state`; the model's state_dict is loaded apart."""
        self.step_number = int(state["step"])
        self.samples_per_ray = float(state["samples_per_ray"])
        self.skipped_steps = int(state["skipped_steps"])
        for moment, tensors in self.moments.items():
            for name, tensor in tensors.items():
                tensor.copy_(moments[moment][name])

    def learning_rate(self, progress: float) -> float:
        """Of the tables: a warm-up by steps, constant for lr_hold of the run, then log-linear to lr_final."""
        config = self.config
        hold = self.settings.lr_hold
        decayed = log_lerp((progress - hold) / (1 - hold), config.lr_init, config.lr_final)
        return float(decayed * warm_up(self.step_number + 1, config.lr_delay_steps, config.lr_delay_mult))

    def step(self, progress: float) -> FastStep:
        """Take one step.

        Args:
            progress: share of the run that is over, by steps or by time, in [0, 1]: for the learning rate.
        """
        config, step = self.config, self.step_number
        fields = self.model.fields()
        if step % UPDATE_EVERY == 0:
            is_early = step < _EARLY_STEPS
            ops.occupancy_update(
                self.model.densities,
                self._cell_scale,
                config.seed,
                step,
                _EARLY_STRIDE if is_early else _LATE_STRIDE,
                _EARLY_DECAY if is_early else _LATE_DECAY,
                self._max_threshold,
                fields,
            )
        wanted = min(max(config.batch_size / self.samples_per_ray, MIN_RAYS), MAX_RAYS)
        count = math.ceil(wanted / _GROUP_RAYS) * _GROUP_RAYS
        rays, target = ops.draw_rays(
            self.source, config.seed, step, count, self.random_background, self.background
        )
        found = ops.fast_train_step(rays, target, config.loss_beta, fields, self._gradient_buffers)
        rate = self.learning_rate(progress)
        self.step_number += 1
        if found.is_finite:
            self._update(rate)
        else:
            self.skipped_steps += 1
        self.samples_per_ray = 0.8 * self.samples_per_ray + 0.2 * max(0.5, found.samples / count)
        return FastStep(found.loss, found.squared_error, count, found.samples, rate, found.is_finite)

    def _update(self, rate: float) -> None:
        for name, values in self._parameters.items():
            ops.sparse_adam(
                values,
                self._gradients[name],
                self.moments["exp_avg"][name],
                self.moments["exp_avg_sq"][name],
                rate if name == "tables" else rate * self.settings.network_lr_ratio,
                BETA1,
                BETA2,
                self.config.adam_eps,
                self.step_number,
            )


def pixel_source(dataset: Dataset, scale_ratio: float) -> PixelSource:
    """A dataset as `ops.draw_rays` takes it; each coarser scale is drawn scale_ratio times as often."""
    scales = sorted(set(dataset.scale.tolist()))
    weights = torch.tensor([scale_ratio**k for k in range(len(scales))], dtype=torch.float64)
    shares = (weights.cumsum(0) / weights.sum()).to(torch.float32)
    shares[-1] = 1.0
    return PixelSource(
        dataset.pixels.contiguous(),
        dataset.offsets,
        dataset.height.contiguous(),
        dataset.width.contiguous(),
        dataset.c2w.contiguous(),
        dataset.focal.to(torch.float32),
        dataset.near.contiguous(),
        dataset.far.contiguous(),
        torch.argsort(dataset.scale, stable=True),
        torch.tensor([int((dataset.scale <= scale).sum()) for scale in scales]),
        shares,
    )
