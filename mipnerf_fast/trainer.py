"""The trainer: one optimisation step, and the state that a checkpoint holds."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from .cameras import Rays
from .checkpoint import MOMENTS, Checkpoint
from .config import MipNerfConfig, NerfConfig, TrainConfig
from .counter_rng import CounterRandom
from .cpu_setup import free_memory
from .data import Dataset, RayBatches
from .losses import weighted_loss
from .model import build_model
from .schedules import log_lerp, warm_up
from .trainer_base import DivergedError, StepResult, TrainerBase

_BETAS = (0.9, 0.999)
# Share of the free memory that one pass may take.
_MEMORY_SHARE = 0.5


def bytes_per_ray(config: TrainConfig) -> int:
    """About what the graph of one ray takes in a training pass of the plain-PyTorch model, an upper estimate.

    Per sample in float32: the encoding with its temporaries (4 times the features), every layer's output before and
    after its ReLU, the concatenated inputs, and as much as the largest of these again for the backward pass.
    """
    model = config.model
    if isinstance(model, MipNerfConfig):
        samples = model.num_samples * model.num_levels
        features = 6 * (model.max_deg_point - model.min_deg_point)
        view_layers = model.net_depth_condition
    elif isinstance(model, NerfConfig):
        samples = 2 * model.num_coarse + model.num_fine
        features = 3 + 6 * model.max_deg_point
        view_layers = 1
    else:
        raise TypeError("bytes_per_ray: the fast model keeps no graph")
    skips = (model.net_depth - 1) // model.skip_layer
    layers = 2 * model.net_depth * model.net_width + 2 * view_layers * model.net_width_condition
    inputs = skips * (model.net_width + features) + 2 * model.net_width + 3 + 6 * model.deg_view
    backward = 2 * (model.net_width + features)
    return 4 * samples * (4 * features + layers + inputs + backward + 32)


def choose_chunk(config: TrainConfig, device: torch.device) -> int:
    """Rays per pass: as configured, or as many of the batch as half of the free memory holds.

    Where the batch does not fit it is cut into equal parts.
    """
    if config.chunk_rays:
        return min(config.chunk_rays, config.batch_size)
    fitting = max(1, int(_MEMORY_SHARE * free_memory(device) / bytes_per_ray(config)))
    parts = math.ceil(config.batch_size / fitting)
    return math.ceil(config.batch_size / parts)


def clip_gradients(gradients: list[Tensor], max_value: float, max_norm: float) -> Tensor:
    """Clip gradients in place, by value and then by norm; return the norm in between.

    g <- clip(g, -max_value, max_value), then g <- g min(1, max_norm / (1e-7 + ||g||)) with the norm over all of
    them. A limit of 0 does nothing.

    Source: algorithm 1.8.
    """
    if max_value > 0:
        for gradient in gradients:
            gradient.clamp_(-max_value, max_value)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    if max_norm > 0:
        factor = torch.clamp(max_norm / (1e-7 + norm), max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)
    return norm


class Trainer(TrainerBase):
    """A model, its optimiser and its batches: everything that a step needs and a checkpoint holds.

    Random numbers depend on (seed, step, ray) alone, so a trainer built from a checkpoint goes on exactly as the one
    that wrote it would have, bit by bit on the CPU with as many threads (and without a time limit: that makes the
    learning rate depend on the clock).

    Args:
        config: of the run.
        dataset: training views.
        device: to train on.
        max_seconds: of training; the learning rate follows max(step / max_steps, seconds / max_seconds).
        checkpoint: to go on from, or None. Its configuration must describe the same model.
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
        self.white_background = dataset.white_background
        self.batches = RayBatches(dataset, self.device, config.batching)
        self.rows = torch.arange(config.batch_size, device=self.device)
        # The same weights on every device, and the caller's global random numbers left alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = build_model(config.model)
        if checkpoint is not None:
            model.load_state_dict(checkpoint.weights())
        self.model = model.to(self.device)
        remembered = checkpoint.info.chunk_rays if checkpoint and not config.chunk_rays else 0
        self.chunk_rays = remembered or choose_chunk(config, self.device)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.Adam(
            self.parameters, config.lr_init, betas=_BETAS, eps=config.adam_eps, fused=True
        )
        for name, parameter in zip(self.names, self.parameters, strict=True):
            moments = {
                moment: torch.zeros_like(parameter)
                if checkpoint is None
                else checkpoint.moments(moment)[name].to(self.device)
                for moment in MOMENTS
            }
            steps_done = torch.tensor(float(self.step), device=self.device)
            self.optimizer.state[parameter] = {"step": steps_done, **moments}

    def learning_rate(self) -> float:
        """Of the next step; steps count from 1."""
        config, step = self.config, self.step + 1
        rate = log_lerp(self.progress, config.lr_init, config.lr_final)
        return float(rate * warm_up(step, config.lr_delay_steps, config.lr_delay_mult))

    def train_step(self) -> StepResult:
        """Do one step; it is timed.

        Errors: DivergedError where the loss or the gradient is not finite; nothing has changed then.
        """
        start = time.perf_counter()
        step = self.step + 1
        rays, target = self.batches.draw(self.config.seed, step, self.config.batch_size)
        self.optimizer.zero_grad(set_to_none=True)
        loss, mse = self.accumulate_gradients(step, rays, target)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = clip_gradients(gradients, self.config.grad_max_value, self.config.grad_max_norm)
        # One transfer for all three: on a GPU every one waits for the device.
        loss_value, mse_value, norm_value = torch.stack([loss, mse, norm]).tolist()
        if not math.isfinite(loss_value + norm_value):
            raise DivergedError(
                f"step {step}: the loss is {loss_value}, the norm of its gradient {norm_value}"
            )
        self.last_rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = self.last_rate
        self.optimizer.step()
        self.step = step
        self.seconds += time.perf_counter() - start
        return StepResult(loss_value, mse_value, self.config.batch_size)

    def accumulate_gradients(self, step: int, rays: Rays, target: Tensor) -> tuple[Tensor, Tensor]:
        """Add the gradient of a batch's loss to the parameters' .grad, chunk by chunk.

        loss = coarse_loss_mult * (levels but the last) + last level + weight_decay_mult * mean(parameter^2), every
        level normalised by the lossmult of the whole batch.

        Args:
            step: of the optimiser, for the random numbers.
            rays, target: a batch, [B, .] and [B, 3].

        Returns:
            The loss and the mean squared error of the finest level, without gradient.

        Source: algorithm 1.8.
        """
        config, count = self.config, target.shape[0]
        lossmult = torch.ones_like(rays.lossmult) if config.disable_multiscale_loss else rays.lossmult
        total = lossmult.sum()
        loss_sum, squares = torch.zeros_like(total), torch.zeros_like(total)
        for start in range(0, count, self.chunk_rays):
            part = slice(start, min(start + self.chunk_rays, count))
            levels = self.model(
                Rays(*(field[part] for field in rays)),
                randomized=True,
                white_background=self.white_background,
                generator=CounterRandom(config.seed, step, self.rows[part]),
            )
            losses = [
                weighted_loss(level.rgb, target[part], lossmult[part], config.loss, config.loss_beta, total)
                for level in levels
            ]
            loss = config.coarse_loss_mult * sum(losses[:-1]) + losses[-1]
            loss.backward()
            loss_sum += loss.detach()
            squares += ((levels[-1].rgb.detach() - target[part]) ** 2).sum()
        if config.weight_decay_mult > 0:
            size = sum(parameter.numel() for parameter in self.parameters)
            decay = config.weight_decay_mult / size * sum((p * p).sum() for p in self.parameters)
            assert isinstance(decay, Tensor)
            decay.backward()
            loss_sum += decay.detach()
        return loss_sum, squares / (3 * count)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Of Adam: {"exp_avg": {parameter name: tensor}, "exp_avg_sq": ...}."""
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        return {
            moment: {name: state[moment] for name, state in zip(self.names, states, strict=True)}
            for moment in MOMENTS
        }

    def describe_batch(self) -> str:
        """What a step takes, in words."""
        return f"{self.config.batch_size:,} rays a step in chunks of {self.chunk_rays:,}"
