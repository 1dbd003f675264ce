"""The fast model's training step on a GPU, in operators that a CUDA graph can capture.

What changes from step to step (the step's number, the learning rate, how many rays are drawn) lies on the device, and
how much memory is used is fixed, so nothing waits for the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .fast_step import (
    FastFields,
    FastGradients,
    MarchRays,
    PixelSource,
    flat_fields,
    native_operators,
    raise_non_finite,
)
from .finite import is_checking
from .implementations import why_no_kernel

# Rays are drawn in multiples of so many.
GROUP_RAYS = 64


class StepClock(NamedTuple):
    """What a captured step reads and advances; every tensor has one element and lies on the GPU.

    step: int64, steps done. active_rays: int32, rays of the next one. samples_per_ray: float32, the running mean.
    learning_rate: float32, of the tables.
    """

    step: Tensor
    active_rays: Tensor
    samples_per_ray: Tensor
    learning_rate: Tensor


def draw_rays_captured(
    source: PixelSource,
    seed: int,
    clock: StepClock,
    count: int,
    random_background: bool,
    background: float,
) -> tuple[MarchRays, Tensor]:
    """`draw_rays` of the clock's step: arrays of `count` rays, of which the first `active_rays` are drawn."""
    *fields, target = native_operators().draw_rays_captured(
        *source, seed, clock.step, clock.active_rays, count, random_background, background
    )
    return MarchRays(*fields), target


def fast_train_step_captured(
    rays: MarchRays,
    target: Tensor,
    clock: StepClock,
    capacity: int,
    loss_beta: float,
    fields: FastFields,
    gradients: FastGradients,
    sums: Tensor | None = None,
) -> Tensor:
    """`fast_train_step` of the first `active_rays` rays, with room for `capacity` samples.

    Rays whose samples have no room take no part, nor do those behind them; the loss is the mean over those that do.

    Args:
        rays, target: as of `draw_rays_captured`.
        capacity: a multiple of 64.
        fields: its tables may be float16, as its gradients may not.
        sums: `table_sums` of the tables, for the same bits in every run; without, the tables' gradients are sums in no
            particular order.

    Returns:
        float64 [6] on the device: loss, mean squared error, samples, samples that counted, whether all is finite, rays
        that took part.

    Errors: NonFiniteError under the finite check, as of `fast_train_step`; a graph cannot capture that.
    """
    flat = flat_fields("fast_train_step_captured", fields)
    statistics: Tensor = native_operators().fast_train_step_captured(
        *rays, target, clock.active_rays, capacity, loss_beta, *flat, *gradients, sums
    )
    if is_checking():
        loss, _, _, _, is_finite, taken = statistics.tolist()
        if is_finite != 1.0:
            part = slice(int(taken))
            drawn = MarchRays(*(None if field is None else field[part] for field in rays))  # type: ignore[arg-type]
            raise_non_finite("fast_train_step_captured", drawn, target[part], fields, loss)
    return statistics


def sparse_adam_captured(
    values: Tensor,
    gradient: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    copy: Tensor | None,
    clock: StepClock,
    rate_ratio: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """`sparse_adam` as the step after the clock's, at rate_ratio times its rate; `copy` follows in float16."""
    native_operators().sparse_adam_captured(
        values,
        gradient,
        moment1,
        moment2,
        copy,
        clock.learning_rate,
        rate_ratio,
        beta1,
        beta2,
        eps,
        clock.step,
    )


def rays_of_pace(samples_per_ray: Tensor, batch: int, least: int, most: int) -> int:
    """As many rays as make a batch at this pace, in float32 as `fast_pace_captured` has it: a run that goes on from a
    checkpoint draws what it would have drawn.

    Args: as of `fast_pace_captured`; samples_per_ray, of one element, on any device.
    """
    wanted = torch.tensor(float(batch)) / samples_per_ray.reshape(()).cpu().to(torch.float32)
    count = math.ceil(min(max(wanted.item(), float(least)), float(most)))
    return -(-count // GROUP_RAYS) * GROUP_RAYS


def fast_pace_captured(statistics: Tensor, clock: StepClock, batch: int, least: int, most: int) -> None:
    """Advance the clock: samples_per_ray <- 0.8 samples_per_ray + 0.2 samples / rays, and as many rays as make a batch.

    Args:
        statistics: of `fast_train_step_captured`.
        batch: samples wanted. least, most: rays; multiples of GROUP_RAYS are taken.
    """
    native_operators().fast_pace_captured(
        statistics, clock.samples_per_ray, clock.active_rays, clock.step, float(batch), least, most
    )


def occupancy_update_captured(
    densities: Tensor,
    cell_scale: float,
    seed: int,
    step: int,
    stride: int,
    decay: float,
    max_threshold: float,
    fields: FastFields,
) -> Tensor:
    """`occupancy_update` whose result, float64 [2], stays on the device."""
    summary: Tensor = native_operators().occupancy_update(
        densities,
        cell_scale,
        seed,
        step,
        stride,
        decay,
        max_threshold,
        *flat_fields("occupancy_update", fields),
    )
    return summary


def kernels_for(device: torch.device) -> str:
    """Why the step cannot run on a device; empty where it can."""
    if device.type != "cuda":
        return f"CUDA graphs are of GPUs, not of {device.type}"
    return why_no_kernel("fast_step", "cuda", torch.float32)
