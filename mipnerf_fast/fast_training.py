"""Training of the fast model: one step from drawn pixels to updated parameters."""

from __future__ import annotations

import dataclasses
import math
import time

import torch
from torch import Tensor

from . import fast_reference, ops
from .backend import current_backend
from .checkpoint import MOMENTS, Checkpoint, CheckpointInfo
from .config import FastConfig, TrainConfig, check_options
from .data import Dataset
from .fast_captured import READ_EVERY, AdamSettings, CapturedStep
from .fast_model import FastModel
from .fast_skips import Gradients, check_batch, composed_gradients, find_non_finite, rays_at
from .ops.fast_captured import GROUP_RAYS, kernels_for
from .ops.fast_step import MarchRays, NetworkGradients, PixelSource, StepStatistics, TableMoments
from .schedules import log_lerp, warm_up
from .trainer_base import DivergedError, StepResult, TrainerBase

BETA1, BETA2 = 0.9, 0.99
# Rays per step stay in this range, whatever the number of samples a ray takes.
MIN_RAYS, MAX_RAYS = 192, 8192
# On a GPU at most as many rays as make a batch of so few samples each.
_FEWEST_SAMPLES = 4
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

    A step draws pixels by counter-based random numbers, runs `ops.fast_train_update` (on the backend "reference" the
    same by autograd: `fast_reference`), which moves the entries that were touched, and Adam of the networks, and every
    UPDATE_EVERY steps renews the occupancy grid. The number of rays follows the number of samples that a ray takes, so
    that a step has `config.batch_size` samples. A step whose loss or gradient is not finite changes nothing and is
    counted in `model.skipped_steps`; config.max_skips_in_row or config.max_skips of them end the run.

    On a GPU a step is one CUDA graph (`CapturedStep`), unless config.capture is false: tables are read in float16, and
    what a step found is read back every READ_EVERY steps. There, unless config.deterministic is set, the gradients of
    the tables are sums in no particular order, so that two runs differ in their last bits; everything else is summed in
    a fixed order.

    Args:
        config: of the run; its model is a `FastConfig` for the images (see `FastConfig.for_images`).
        dataset: training views; scales are told apart by `Dataset.scale`.
        device: the CPU, or a GPU that the native library has kernels for.
        max_seconds: of training; the learning rate follows max(step / max_steps, seconds / max_seconds).
        checkpoint: to go on from, or None.

    Errors: ValueError where it cannot train on the device; InputError for an option that the fast model does not have,
    where config.model.mlp_dtype is "tf32" and the device has no products in TF32, and where its networks are wider than
    the device's kernels take.
    """

    # Parameters that without a GPU have no gradient outside of the step that moves them.
    _moved_within_a_step: tuple[str, ...] = ("tables",)

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
        check_options(config)
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
        if on_gpu:
            self.model.check_width()
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
        self._gradients = {
            name: torch.zeros_like(tensor)
            for name, tensor in self._parameters.items()
            if name not in self._moved_within_a_step
        }
        self._moments = {
            moment: {
                name: torch.zeros_like(tensor)
                if checkpoint is None
                else checkpoint.moments(moment)[name].clone().to(self.device)
                for name, tensor in self._parameters.items()
            }
            for moment in MOMENTS
        }
        self._names = dataset.names
        self.samples = 0  # marched by this trainer
        # Skipped steps: the last in a row, and of the run; why it has to end, once it has.
        self._failures, self._skips, self._divergence = 0, int(self.model.skipped_steps), ""
        self._pending: list[tuple[int, float]] = []  # steps launched and not read, and their rates
        self._captured = self._captured_step() if on_gpu else None

    def _captured_step(self) -> CapturedStep:
        config = self.config
        self._gradients |= {
            name: torch.zeros_like(self._parameters[name]) for name in self._moved_within_a_step
        }
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
        graph = ", captured" if self._captured is not None and self.config.capture else ""
        return f"{self.config.batch_size:,} samples a step{graph}"

    def learning_rate(self) -> float:
        """Of the tables: a warm-up by steps, constant for lr_hold of the run, then log-linear to lr_final."""
        config, hold = self.config, self.settings.lr_hold
        decayed = log_lerp((self.progress - hold) / (1 - hold), config.lr_init, config.lr_final)
        return float(decayed * warm_up(self.step + 1, config.lr_delay_steps, config.lr_delay_mult))

    def launch_step(self) -> None:
        """Begin a step: on a GPU its result comes with those of READ_EVERY steps; it is timed."""
        start = time.perf_counter()
        if self.step % UPDATE_EVERY == 0:
            self._renew_occupancy()
        rate = self.learning_rate()
        if self._captured is None:
            self._do_step(rate)
        else:
            self._captured(rate)
            self.step += 1
            self._pending.append((self.step, rate))
            if self.step % READ_EVERY == 0:
                self._read(self._captured)
        self.seconds += time.perf_counter() - start

    def _do_step(self, rate: float) -> None:
        """One step without a GPU, to its end."""
        model = self.model
        samples_per_ray, count = model.samples_per_ray.item(), self._ray_count()
        rays, target = self._draw(self.step, count)
        found = self._learn(rays, target, rate)
        self.step += 1
        model.samples_per_ray.fill_(0.8 * samples_per_ray + 0.2 * max(0.5, found.samples / count))
        if not found.is_finite:
            model.skipped_steps += 1
        self._note(self.step, rate, found, count)

    def _draw(self, step: int, count: int) -> tuple[MarchRays, Tensor]:
        """The batch after so many steps, and its colours."""
        rays, target = self._engine.draw_rays(
            self.source, self.config.seed, step, count, self.random_background, self.background
        )
        return rays, target

    def results(self, wait: bool = False) -> list[StepResult]:
        """The results, in order, of the steps that have been read since the last call; see `TrainerBase`."""
        if wait and self._captured is not None:
            start = time.perf_counter()
            self._read(self._captured)
            self.seconds += time.perf_counter() - start
        if self._divergence:
            raise DivergedError(self._divergence)
        return self.unread_results()

    def _read(self, captured: CapturedStep) -> None:
        history = captured.history.tolist() if self._pending else []
        for step, rate in self._pending:
            loss, squared_error, samples, counted, finite, rays = history[(step - 1) % READ_EVERY]
            found = StepStatistics(loss, squared_error, int(samples), int(counted), finite == 1.0)
            self._note(step, rate, found, int(rays))
        self._pending.clear()

    def _note(self, step: int, rate: float, found: StepStatistics, rays: int) -> None:
        """Take in what a step found."""
        is_skipped = not found.is_finite
        self.samples += found.samples
        self._failures = self._failures + 1 if is_skipped else 0
        self._skips += is_skipped
        result = StepResult(
            found.loss,
            found.squared_error,
            rays,
            step,
            rate,
            is_skipped=is_skipped,
            skips=self._skips,
            failures_in_row=self._failures,
        )
        self._results.append(result)
        self._divergence = self._divergence or self.divergence(result, self._skips)

    def explain_skip(self, result: StepResult) -> str:
        """Where the first value that is not finite arises in the batch of a skipped step, in words.

        The batch is done again by the composed reference under the finite check, with the weights of now: skipping has
        not changed them, but on a GPU some later steps may have.
        """
        step = result.step - 1  # done before it: what its random numbers count
        rays, target = self._draw(step, result.rays)

        def gradients_of(part: slice) -> Gradients:
            check_batch(drawn := rays_at(rays, part), target[part])
            return self._composed_gradients(step, drawn, target[part], part, result.rays)

        found = find_non_finite(gradients_of, result.rays)
        if found is None:
            return (
                f"done again by the reference with the weights of step {self.step}, every operation is finite"
            )
        error, ray = found
        if ray is None:
            return str(error)
        where = fast_reference.describe_ray(self.source, self._names, self.config.seed, step, ray)
        return error.of_batch(ray, where)

    def _composed_gradients(
        self, step: int, rays: MarchRays, target: Tensor, part: slice, total: int
    ) -> Gradients:
        """Of the part of a batch of `total` rays, by autograd over the operators; see `fast_skips`."""
        fields = self.model.fields() if self._captured is None else self._captured.fields
        return composed_gradients(rays, target, total, self.config.loss_beta, fields)

    def checkpoint_info(self, test_psnr: float | None) -> CheckpointInfo:
        """What the checkpoint of now says about itself; every skipped step is a failure, there is no loss scale."""
        skips = int(self.model.skipped_steps)
        return dataclasses.replace(super().checkpoint_info(test_psnr), skips=skips, failures=skips)

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

    def _learn(self, rays: MarchRays, target: Tensor, rate: float) -> StepStatistics:
        """Move the parameters by the gradients of a batch, unless one of them is not finite."""
        found: StepStatistics = self._engine.fast_train_update(
            rays,
            target,
            self.config.loss_beta,
            self.model.fields(),
            NetworkGradients(*(self._gradients.get(name) for name in NetworkGradients._fields)),  # type: ignore[arg-type]
            TableMoments(*(self._moments[moment]["tables"] for moment in TableMoments._fields)),
            *self._adam("tables", rate),
        )
        if found.is_finite:
            self._update(rate)
        return found

    def _adam(self, name: str, rate: float) -> tuple[float, float, float, float, int]:
        """The numbers of `ops.sparse_adam` for a parameter in the step that is being done."""
        of_parameter = rate if name.endswith("tables") else rate * self.settings.network_lr_ratio
        return of_parameter, BETA1, BETA2, self.config.adam_eps, self.step + 1

    def _update(self, rate: float) -> None:
        """Adam with the gradients there are, which become zero."""
        for name, gradient in self._gradients.items():
            moments = (self._moments[moment][name] for moment in MOMENTS)
            self._engine.sparse_adam(self._parameters[name], gradient, *moments, *self._adam(name, rate))


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
