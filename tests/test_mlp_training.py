"""Short trainings: every engine that runs here ends as the reference does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from analytic_models import Ball
from mlp_engines import ENGINES, Engine, by_engine
from tiny_scenes import dataset
from torch import Tensor

from mipnerf_fast import MipNerfConfig, TrainConfig
from mipnerf_fast.ops import mlp_folded_network
from mipnerf_fast.ops.gemm import CublasLtTwin
from mipnerf_fast.rendering import render_image
from mipnerf_fast.trainer import Trainer

# A skip after two layers, a view branch; 64 wide, which every engine takes.
CONFIG = TrainConfig(
    model=MipNerfConfig(
        num_samples=16,
        max_deg_point=8,
        deg_view=2,
        net_depth=3,
        net_width=64,
        net_width_condition=32,
        skip_layer=1,
    ),
    batch_size=128,
    max_steps=200,
    lr_init=1e-2,
    lr_final=1e-4,
    lr_delay_steps=20,
    lr_delay_mult=0.1,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Batches this small gain nothing from a second thread and wait for it where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def psnr_after_training(engine: Engine) -> float:
    """Of the training views of a ball, after 200 steps from the same weights with the same random numbers."""
    model = dataclasses.replace(CONFIG.model, mlp_backend=engine.backend, mlp_dtype=engine.compute_dtype)
    data = dataset([24] * 6, [1] * 6, Ball())
    trainer = Trainer(dataclasses.replace(CONFIG, model=model), data, engine.device)
    for _ in range(CONFIG.max_steps):
        trainer.train_step()
    total = 0.0
    for view in range(len(data)):
        rgb = render_image(trainer.model, data.rays(view), data.white_background).rgb.cpu()
        total += float(((rgb - data.target(view, torch.device("cpu"))) ** 2).mean())
    return -10 * math.log10(total / len(data))


@pytest.fixture(scope="module")
def reference_psnr() -> float:
    return psnr_after_training(Engine("reference", "auto", "cpu"))


@by_engine
def test_training_ends_as_with_the_reference(engine: Engine, reference_psnr: float) -> None:
    assert reference_psnr > 20  # a picture of one colour scores below 12
    assert abs(psnr_after_training(engine) - reference_psnr) <= 0.1


def test_wrong_arithmetic_does_not(reference_psnr: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound above would see a ReLU whose backward pass uses the mask of the neuron beside it."""

    class Shifted(CublasLtTwin):
        def grad_input(
            self,
            delta: Tensor,
            weight: Tensor,
            out: Tensor | None = None,
            *,
            beta: float = 0.0,
            mask: Any = None,
        ) -> Tensor:
            mask = None if mask is None else mask.roll(1, 1)
            return super().grad_input(delta, weight, out, beta=beta, mask=mask)

    twin = next(engine for engine in ENGINES if engine.backend == "emulated")
    key = (mlp_folded_network.TWIN, torch.bfloat16, torch.device("cpu"))
    monkeypatch.setitem(mlp_folded_network._gemms, key, Shifted(torch.bfloat16))
    assert abs(psnr_after_training(twin) - reference_psnr) > 0.1
