"""Training of the fast model: one step from drawn pixels to updated parameters."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from . import fast_reference, ops
from .backend import current_backend
from .checkpoint import MOMENTS, Checkpoint
from .config import FastConfig, TrainConfig
from .data import Dataset
from .fast_captured import READ_EVERY, AdamSettings, CapturedStep
from .fast_model import FastModel
from .ops.fast_captured import GROUP_RAYS, kernels_for
from .ops.fast_step import FastGradients, MarchRays, PixelSource, StepStatistics
from .schedules import log_lerp, warm_up
from .trainer_base import DivergedError, StepResult, TrainerBase

BETA1, BETA2 = 0.9, 0.99
# Rays per step stay in this range, whatever the number of samples a ray takes.
MIN_RAYS, MAX_RAYS = 192, 8192
# On a GPU at most as many rays as make a batch of so few samples each.
_FEWEST_SAMPLES = 4
# Steps in a row without a finite gradient after which nothing will come of it.
MAX_FAILURES = 100
# Steps between updates of the occupancy grid; until _EARLY_STEPS one cell in 16 is visited each time and what was
# there is soon forgotten, later one in 64.
UPDATE_EVERY = 16
_EARLY_STEPS = 400
_EARLY_STRIDE, _LATE_STRIDE = 16, 64
_EARLY_DECAY, _LATE_DECAY = 0.4, 0.8
# A cell counts as occupied where a step through it would absorb this share of the light.
_OCCUPIED_OPACITY = 0.01
# Half of the cone's radius at t = 1, for a pixel one unit wide there: radius 1/sqrt(3), deviation radius/2.
DEVIATION_PER_PIXEL = 0.5 / math.sqrt(3.0)


class FastTrainer(TrainerBase):
    """Trains a `FastModel` on a dataset; nothing but its checkpoint decides how it goes on, bit by bit.

    A step draws pixels by counter-based random numbers, runs `ops.fast_train_step` (on the backend "reference" the
    same by autograd: `fast_reference`) and Adam on the entries that were touched, and every UPDATE_EVERY steps renews
    the occupancy grid. The number of rays follows the number of samples that a ray takes, so that a step
    has `config.batch_size` samples. A step whose gradient is not finite changes nothing and is counted in
    `model.skipped_steps`; many in a row end the run.

    On a GPU a step is one CUDA graph (`CapturedStep`): tables are read in float16, and what a step found is read back
    every READ_EVERY steps. There, unless config.deterministic is set, the gradients of the tables are sums in no
    particular order, so that two runs differ in their last bits; everything else is summed in a fixed order.

    Args:
        config: of the run; its model is a `FastConfig` for the images (see `FastConfig.for_images`).
        dataset: training views; scales are told apart by `Dataset.scale`.
        device: the CPU, or a GPU that the native library has kernels for.
        max_seconds: of training; the learning rate follows max(step / max_steps, seconds / max_seconds).
        checkpoint: to go on from, or None.

    Errors: ValueError where it cannot train on the device; InputError where config.model.mlp_dtype is "tf32" and the
    device has no products in TF32.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        device: torch.device | str = "cpu",
        max_seconds: float = math.inf,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        super().__init__(config, device, max_seconds, checkpoint)
        if not isinstance(config.model, FastConfig):
            raise ValueError(f"FastTrainer: takes a FastConfig, not {type(config.model).__name__}")
        on_gpu = self.device.type != "cpu"
        missing = "the backend is set to reference" if current_backend() == "reference" else ""
        if config.model.sampling == "proposal":
            missing = "with a proposal it trains on the CPU"
        if on_gpu and (missing := missing or kernels_for(self.device)):
            raise ValueError(f"FastTrainer: cannot train on {device}: {missing}")
        self.settings = config.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model: FastModel = self._build_model(config.model).to(self.device)
        self.model.uses_tf32()  # raises where it should and cannot
        # Both have the same functions; what is chosen now stays for the whole run.
        self._engine = fast_reference if current_backend() == "reference" else ops
        source = pixel_source(dataset, self.settings.scale_ratio)
        self.source = PixelSource(*(tensor.to(self.device) for tensor in source))
        self.random_background = self.settings.random_background and dataset.pixels.shape[1] == 4
        self.background = 1.0 if dataset.white_background else 0.0
        side = 2 * self.settings.box_half
        self.model.scale_range.copy_(torch.tensor(self._scale_range(dataset)))
        middle = 0.5 * float(dataset.near.min() + dataset.far.max())
        pixel = middle / float(dataset.focal.max())
        self._cell_scale = pixel * DEVIATION_PER_PIXEL / side
        step = min(max(self.settings.step_scale * pixel, self.settings.min_step), self.settings.max_step)
        self._max_threshold = _OCCUPIED_OPACITY / step
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint.weights())
        self._parameters = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        self._gradients = {name: torch.zeros_like(tensor) for name, tensor in self._parameters.items()}
        self._moments = {
            moment: {
                name: torch.zeros_like(tensor)
                if checkpoint is None
                else checkpoint.moments(moment)[name].clone().to(self.device)
                for name, tensor in self._parameters.items()
            }
            for moment in MOMENTS
        }
        self._failures = 0
        self.samples = 0  # marched by this trainer
        self._skips = int(self.model.skipped_steps)
        self._pending: list[tuple[int, float]] = []  # steps launched and not read, and their rates
        self._captured = self._captured_step() if on_gpu else None

    def _captured_step(self) -> CapturedStep:
        config = self.config
        return CapturedStep(
            config,
            self.model,
            self.source,
            self.random_background,
            self.background,
            self._parameters,
            self._gradients,
            self._moments,
            AdamSettings(self.settings.network_lr_ratio, BETA1, BETA2, config.adam_eps),
            self.step,
            MIN_RAYS,
            max(MAX_RAYS, config.batch_size // _FEWEST_SAMPLES // GROUP_RAYS * GROUP_RAYS),
        )

    def _build_model(self, config: FastConfig) -> FastModel:
        return FastModel(config)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Of Adam: {"exp_avg": {parameter name: tensor}, "exp_avg_sq": ...}."""
        return self._moments

    def describe_batch(self) -> str:
        """What a step takes, in words."""
        return f"{self.config.batch_size:,} samples a step"

    def learning_rate(self) -> float:
        """Of the tables: a warm-up by steps, constant for lr_hold of the run, then log-linear to lr_final."""
        config, hold = self.config, self.settings.lr_hold
        decayed = log_lerp((self.progress - hold) / (1 - hold), config.lr_init, config.lr_final)
        return float(decayed * warm_up(self.step + 1, config.lr_delay_steps, config.lr_delay_mult))

    def train_step(self) -> StepResult:
        """Do one step; it is timed.

        Errors: DivergedError after MAX_FAILURES steps in a row whose gradient was not finite.
        """
        if self._captured is not None:
            self.launch_step()
            return self.results(wait=True)[-1]
        start = time.perf_counter()
        config, model, step = self.config, self.model, self.step
        if step % UPDATE_EVERY == 0:
            self._renew_occupancy()
        samples_per_ray = model.samples_per_ray.item()
        count = self._ray_count()
        rays, target = self._engine.draw_rays(
            self.source, config.seed, step, count, self.random_background, self.background
        )
        found = self._add_gradients(rays, target)
        rate = self.learning_rate()
        self.samples += found.samples
        self.step += 1
        model.samples_per_ray.fill_(0.8 * samples_per_ray + 0.2 * max(0.5, found.samples / count))
        if found.is_finite:
            self._failures = 0
            self._update(rate)
        else:
            self._failures += 1
            model.skipped_steps += 1
        self.seconds += time.perf_counter() - start
        if self._failures == MAX_FAILURES:
            raise DivergedError(
                f"step {self.step}: {MAX_FAILURES} steps in a row had a gradient that is not finite"
            )
        return StepResult(
            found.loss,
            found.squared_error,
            count,
            self.step,
            rate,
            is_skipped=not found.is_finite,
            skips=int(model.skipped_steps),
            failures_in_row=self._failures,
        )

    def launch_step(self) -> None:
        """Begin a step: on a GPU its result comes with those of READ_EVERY steps."""
        if self._captured is None:
            super().launch_step()
            return
        start = time.perf_counter()
        if self.step % UPDATE_EVERY == 0:
            self._renew_occupancy()
        rate = self.learning_rate()
        self._captured(rate)
        self.step += 1
        self._pending.append((self.step, rate))
        self.seconds += time.perf_counter() - start
        if self.step % READ_EVERY == 0:
            self._read(self._captured)

    def results(self, wait: bool = False) -> list[StepResult]:
        """The results, in order, of the steps that have been read since the last call; see `TrainerBase`."""
        if wait and self._captured is not None:
            self._read(self._captured)
        return super().results(wait)

    def _read(self, captured: CapturedStep) -> None:
        start = time.perf_counter()
        history = captured.history.tolist() if self._pending else []
        for step, rate in self._pending:
            loss, squared_error, samples, _, finite, rays = history[(step - 1) % READ_EVERY]
            is_skipped = finite != 1.0
            self.samples += int(samples)
            self._failures = self._failures + 1 if is_skipped else 0
            self._skips += is_skipped
            self._results.append(
                StepResult(
                    loss,
                    squared_error,
                    int(rays),
                    step,
                    rate,
                    is_skipped=is_skipped,
                    skips=self._skips,
                    failures_in_row=self._failures,
                )
            )
        self._pending.clear()
        self.seconds += time.perf_counter() - start
        if self._failures >= MAX_FAILURES:
            raise DivergedError(
                f"step {self.step}: {self._failures} steps in a row had a gradient that is not finite"
            )

    def _scale_range(self, dataset: Dataset) -> tuple[float, float]:
        """The least and the largest width that a sample can have, in units of the box's side."""
        side = 2 * self.settings.box_half
        low = (dataset.near / dataset.focal).min().item() * DEVIATION_PER_PIXEL / side
        high = (dataset.far / dataset.focal).max().item() * DEVIATION_PER_PIXEL / side
        return low, high

    def _ray_count(self) -> int:
        """As many as make batch_size samples, by the samples that rays have taken lately; whole groups."""
        wanted = self.config.batch_size / self.model.samples_per_ray.item()
        return math.ceil(min(max(wanted, MIN_RAYS), MAX_RAYS) / GROUP_RAYS) * GROUP_RAYS

    def _renew_occupancy(self) -> None:
        is_early = self.step < _EARLY_STEPS
        stride, decay = (_EARLY_STRIDE, _EARLY_DECAY) if is_early else (_LATE_STRIDE, _LATE_DECAY)
        if self._captured is not None:
            self._captured.update_occupancy(self._cell_scale, self.step, stride, decay, self._max_threshold)
            return
        self._engine.occupancy_update(
            self.model.densities,
            self._cell_scale,
            self.config.seed,
            self.step,
            stride,
            decay,
            self._max_threshold,
            self.model.fields(),
        )

    def _add_gradients(self, rays: MarchRays, target: Tensor) -> StepStatistics:
        """Add the gradients of a batch to `_gradients`, unless one of them is not finite."""
        buffers = FastGradients(
            *(self._gradients.get(name) for name in FastGradients._fields)  # type: ignore[arg-type]
        )
        found: StepStatistics = self._engine.fast_train_step(
            rays, target, self.config.loss_beta, self.model.fields(), buffers
        )
        return found

    def _update(self, rate: float) -> None:
        for name, values in self._parameters.items():
            self._engine.sparse_adam(
                values,
                self._gradients[name],
                self._moments["exp_avg"][name],
                self._moments["exp_avg_sq"][name],
                rate if name.endswith("tables") else rate * self.settings.network_lr_ratio,
                BETA1,
                BETA2,
                self.config.adam_eps,
                self.step,
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
