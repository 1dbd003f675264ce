"""A recorded step is the launched one: replayed it gives the same bits, unless a number of Python's is baked in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from recorded_operations import capture, record_operations
from tiny_runs import TINY, state, tiny, tiny_dataset
from torch import Tensor

from mipnerf_fast import MipNerfConfig, NerfConfig, TrainConfig, schedules
from mipnerf_fast.captured_step import Captured
from mipnerf_fast.data import Dataset
from mipnerf_fast.determinism import deterministic
from mipnerf_fast.trainer import Trainer

STEPS = 8
pytestmark = pytest.mark.usefixtures("one_thread")
NOISY = dataclasses.replace(TINY.model, density_noise=0.3)
CONFIGS = {
    "noisy, clipped, in chunks": tiny(
        model=NOISY, grad_max_value=0.1, grad_max_norm=0.1, weight_decay_mult=0.1, chunk_rays=20
    ),
    # On a GPU with 16-bit operands.
    "all degrees": tiny(model=MipNerfConfig(num_samples=16, net_depth=3, net_width=64), grad_max_norm=0.1),
    "a scaled loss": tiny(model=dataclasses.replace(TINY.model, mlp_dtype="fp16")),
    "one image": tiny(batching="single_image", loss="charbonnier", loss_beta=0.1),
    "nerf": tiny(model=NerfConfig(num_coarse=8, num_fine=8, net_width=16, net_width_condition=8)),
}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset()


def train(trainer: Trainer) -> tuple[list[float], list[Tensor]]:
    """Losses and rates of some steps, and what the trainer is then."""
    results = [trainer.train_step() for _ in range(STEPS)]
    return [number for result in results for number in (result.loss, result.rate)], state(trainer)


def same(a: tuple[list[float], list[Tensor]], b: tuple[list[float], list[Tensor]]) -> bool:
    return a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_captured_and_launched_steps_agree_bit_by_bit(
    dataset: Dataset, device: torch.device, name: str
) -> None:
    config = dataclasses.replace(CONFIGS[name], deterministic=True)
    with deterministic():
        captured = train(capture(Trainer(config, dataset, device)))
        launched = train(Trainer(dataclasses.replace(config, capture=False), dataset, device))
    assert same(captured, launched)
    assert all(math.isfinite(number) for number in captured[0])
    assert len(set(captured[0][::2])) == STEPS


def test_what_the_host_puts_in_reaches_a_replay(dataset: Dataset, device: torch.device) -> None:
    """The share of the time, which decides the rate here; before and after the recording."""

    def train_by_the_clock(trainer: Trainer) -> tuple[list[float], list[Tensor]]:
        rates = []
        for step in range(STEPS):
            trainer.seconds = 10.0 * step
            rates.append(trainer.train_step().rate)
        return rates, state(trainer)

    config = tiny(max_steps=10**6, lr_delay_steps=0, deterministic=True)
    with deterministic():
        captured = train_by_the_clock(capture(Trainer(config, dataset, device, max_seconds=100)))
        launched = Trainer(dataclasses.replace(config, capture=False), dataset, device, max_seconds=100)
        assert same(captured, train_by_the_clock(launched))
    wanted = [schedules.log_lerp(step / 10, config.lr_init, config.lr_final) for step in range(1, STEPS)]
    # The share reaches the device as float32: its rounding, times ln(lr_init / lr_final).
    assert captured[0][1:] == pytest.approx(wanted, rel=math.log(10) * 2.0**-24)


def test_halves_are_recorded_apart(dataset: Dataset) -> None:
    """As where several processes sum their gradients between them."""
    trainer = Trainer(tiny(), dataset)
    trainer._halves = (trainer.work.gradients, trainer.work.update)
    assert same(train(capture(trainer)), train(Trainer(tiny(), dataset)))


def reads_the_rate_back(trainer: Trainer, config: TrainConfig) -> None:
    work, step = trainer.work, trainer.work.optimizer.step

    def with_a_number() -> None:
        work.optimizer.param_groups[0]["lr"] = float(work.words[1])
        step()

    work.optimizer.step = with_a_number  # type: ignore[method-assign, assignment]


def takes_the_rate_of_the_hosts_count(trainer: Trainer, config: TrainConfig) -> None:
    work, step = trainer.work, trainer.work.optimizer.step

    def with_a_number() -> None:
        rate = schedules.learning_rate(trainer.step + 1, config.lr_init, config.lr_final, config.max_steps)
        work._rate.fill_(rate)
        step()

    work.optimizer.step = with_a_number  # type: ignore[method-assign, assignment]


def draws_by_the_hosts_count(trainer: Trainer, config: TrainConfig) -> None:
    draw = trainer.batches.draw
    trainer.batches.draw = lambda seed, step, count: draw(seed, trainer.step + 1, count)  # type: ignore[method-assign]


def remembers_a_tensor_of_the_last_call(trainer: Trainer, config: TrainConfig) -> None:
    work, gradients = trainer.work, trainer.work.gradients
    last = torch.zeros_like(work.flat.gradients)

    def with_momentum() -> None:
        nonlocal last
        gradients()
        work.flat.gradients.add_(last, alpha=0.1)
        last = work.flat.gradients.clone()

    work.gradients = with_momentum  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "breaks",
    [
        reads_the_rate_back,
        takes_the_rate_of_the_hosts_count,
        draws_by_the_hosts_count,
        remembers_a_tensor_of_the_last_call,
    ],
)
def test_a_step_that_cannot_be_recorded_is_found(
    dataset: Dataset, breaks: Callable[[Trainer, TrainConfig], None]
) -> None:
    """Launched, each of these is a step like any other; on a GPU the test above would be the first to differ."""
    config = tiny(lr_delay_steps=0)
    found = []
    for records in (True, False):
        trainer = Trainer(config, dataset)
        breaks(trainer, config)
        found.append(train(capture(trainer) if records else trainer))
    assert not same(*found)
    # The first three are launched in either.
    assert found[0][0][:6] == found[1][0][:6]


def test_the_first_calls_are_launched_and_the_others_replayed() -> None:
    number, doubled, calls = torch.zeros(()), torch.zeros(()), []

    def function() -> None:
        calls.append(len(calls))
        number.add_(1)
        doubled.copy_(number * 2)

    captured = Captured(function, record_operations)
    for count in range(1, 9):
        captured()
        assert (float(number), float(doubled)) == (count, 2 * count)
    assert len(calls) == 4
