"""The fast model's step on a GPU, its operators stood in for on the CPU: captured or launched, guarded, explained."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from test_fast_step import SMALL, _model, _rays, _zeros
from test_fast_training import _config, _spheres
from torch import Tensor

from mipnerf_fast import fast_captured, ops
from mipnerf_fast.data import Dataset
from mipnerf_fast.fast_captured import READ_EVERY
from mipnerf_fast.fast_skips import rays_at
from mipnerf_fast.fast_training import FastTrainer
from mipnerf_fast.ops.fast_captured import StepClock, fast_train_step_captured, rays_of_pace
from mipnerf_fast.ops.fast_step import FastFields, FastGradients, MarchRays, PixelSource
from mipnerf_fast.ops.finite import NonFiniteError, checking, is_checking
from mipnerf_fast.trainer_base import DivergedError


class StandIns:
    """The captured operators by the plain ones of the CPU, on the same arrays; `launches` are of the step's kernels."""

    def __init__(self) -> None:
        self.launches = 0
        self.dtypes: set[torch.dtype] = set()

    def draw_rays_captured(
        self, source: PixelSource, seed: int, clock: StepClock, count: int, random: bool, background: float
    ) -> tuple[MarchRays, Tensor]:
        return ops.draw_rays(source, seed, int(clock.step), count, random, background)

    def fast_train_step_captured(
        self,
        rays: MarchRays,
        target: Tensor,
        clock: StepClock,
        capacity: int,
        loss_beta: float,
        fields: FastFields,
        gradients: FastGradients,
        sums: Tensor | None = None,
    ) -> Tensor:
        self.launches += 1
        self.dtypes.add(fields.tables.dtype)
        count = int(clock.active_rays)
        fields = fields._replace(tables=fields.tables.float())
        found = ops.fast_train_step(rays_at(rays, slice(count)), target[:count], loss_beta, fields, gradients)
        return torch.tensor(
            [found.loss, found.squared_error, found.samples, found.counted, found.is_finite, count],
            dtype=torch.float64,
        )

    def sparse_adam_captured(
        self,
        values: Tensor,
        gradient: Tensor,
        moment1: Tensor,
        moment2: Tensor,
        copy: Tensor | None,
        clock: StepClock,
        ratio: float,
        *options: float,
    ) -> None:
        rate = float(clock.learning_rate) * ratio
        ops.sparse_adam(values, gradient, moment1, moment2, rate, *options, int(clock.step) + 1)
        if copy is not None:
            copy.copy_(values)

    def fast_pace_captured(
        self, statistics: Tensor, clock: StepClock, batch: int, least: int, most: int
    ) -> None:
        samples, rays = float(statistics[2]), float(statistics[5])
        clock.samples_per_ray.mul_(0.8).add_(0.2 * max(0.5, samples / rays))
        clock.active_rays.fill_(rays_of_pace(clock.samples_per_ray, batch, least, most))
        clock.step.add_(1)

    def occupancy_update_captured(self, densities: Tensor, *arguments: object) -> None:
        *numbers, fields = arguments
        assert isinstance(fields, FastFields)
        plain = fields._replace(tables=fields.tables.float())
        ops.occupancy_update(densities, *numbers, plain)  # type: ignore[arg-type]


class Graph:
    """In place of torch.cuda.CUDAGraph: `made` and `replays` of all of them."""

    made, replays = 0, 0

    def __init__(self) -> None:
        Graph.made += 1

    def replay(self) -> None:
        Graph.replays += 1


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    """The stand-ins in place, and no graph yet."""
    found = StandIns()
    for name in dir(found):
        if name.endswith("_captured"):
            monkeypatch.setattr(fast_captured, name, getattr(found, name))
    monkeypatch.setattr(Graph, "made", 0)
    monkeypatch.setattr(Graph, "replays", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    return found


@pytest.fixture(scope="module")
def scene() -> Dataset:
    return _spheres(12, 12)


def _trainer(scene: Dataset, **changes: object) -> FastTrainer:
    """One that trains as on a GPU."""
    trainer = FastTrainer(_config(200, batch_size=1024, **changes), scene)
    trainer._captured = trainer._captured_step()
    return trainer


def test_without_capture_every_step_is_launched(operators: StandIns, scene: Dataset) -> None:
    trainer = _trainer(scene, capture=False)
    before = trainer.model.tables.detach().clone()
    steps, results = 2 * READ_EVERY + 3, []
    while trainer.step < steps:
        trainer.launch_step()
        results += trainer.results()
    assert len(results) == 2 * READ_EVERY
    results += trainer.results(wait=True)
    assert operators.launches == steps and Graph.made == 0
    assert operators.dtypes == {torch.float16}
    assert [result.step for result in results] == list(range(1, steps + 1))
    assert len({result.loss for result in results}) == steps  # of a batch of its own each
    assert sum(r.loss for r in results[-5:]) < 0.9 * sum(r.loss for r in results[:5])
    assert not torch.equal(trainer.model.tables, before)
    assert float(trainer.model.samples_per_ray) != 100.0
    assert "captured" not in trainer.describe_batch()


def test_steps_that_are_read_one_by_one_are_the_same(operators: StandIns, scene: Dataset) -> None:
    ahead, waiting = (_trainer(scene, capture=False) for _ in range(2))
    while ahead.step < READ_EVERY + 4:
        ahead.launch_step()
    losses = [result.loss for result in ahead.results(wait=True)]
    assert [waiting.train_step().loss for _ in range(READ_EVERY + 4)] == losses


def test_the_second_step_is_captured_and_replayed(operators: StandIns, scene: Dataset) -> None:
    trainer = _trainer(scene)
    for _ in range(READ_EVERY - 1):
        trainer.launch_step()
    # Once to load the kernels, once into the graph.
    assert operators.launches == 2 and (Graph.made, Graph.replays) == (1, READ_EVERY - 2)
    assert trainer.describe_batch() == "1,024 samples a step, captured"


def test_the_finite_check_is_not_captured(operators: StandIns, scene: Dataset) -> None:
    trainer = _trainer(scene)
    with checking():
        for _ in range(4):
            trainer.launch_step()
    assert operators.launches == 4 and Graph.made == 0


def test_the_guard_is_that_of_the_configuration(operators: StandIns, scene: Dataset) -> None:
    """Steps that were launched before anybody looked do not hide which one was too much."""
    trainer = _trainer(scene, capture=False, max_skips_in_row=3)
    for _ in range(2):
        trainer.launch_step()
    trainer.model.colour_out.data[0, 0] = math.nan
    tables = trainer.model.tables.detach().clone()
    while trainer.step < READ_EVERY:
        trainer.launch_step()
    with pytest.raises(DivergedError, match=r"step 5: the loss is nan, .* 3 steps in a row and 3 in all"):
        trainer.results()
    results = trainer.unread_results()
    assert [r.failures_in_row for r in results] == [0, 0, *range(1, READ_EVERY - 1)]
    assert torch.equal(trainer.model.tables, tables)
    info = trainer.checkpoint_info(None)
    assert info.skips == info.failures == results[-1].skips == READ_EVERY - 2


def test_a_table_out_of_the_range_of_float16_is_found(operators: StandIns, scene: Dataset) -> None:
    """What is explained is what was computed: tables as the GPU reads them, not their float32 masters."""
    trainer = _trainer(scene, capture=False)
    assert not trainer.train_step().is_skipped
    trainer._parameters["tables"][: 17**3, 0] = 1e5
    assert trainer._captured is not None
    trainer._captured.fields.tables.copy_(trainer._parameters["tables"])
    result = trainer.train_step()
    assert result.is_skipped
    said = trainer.explain_skip(result)
    assert said.startswith("hash_encode: features is inf at ray 0, sample 0 of the batch, pixel (")
    trainer._captured.fields.tables.clamp_(-1, 1)
    assert "every operation is finite" in trainer.explain_skip(result)


def test_the_check_names_the_step_and_its_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the wrapper of the operator: of the rays that took part, and of no other."""
    model, rays = _model(SMALL), _rays()
    rays.background[3] = math.nan
    statistics = torch.tensor([math.nan, math.nan, 9, 9, 0, 0], dtype=torch.float64)

    class Native:
        fast_render = staticmethod(torch.ops.mipnerf_fast.fast_render)

        @staticmethod
        def fast_train_step_captured(*arguments: object) -> Tensor:
            return statistics

    for module in ("fast_step", "fast_captured"):
        monkeypatch.setattr(f"mipnerf_fast.ops.{module}.native_operators", Native)
    clock = StepClock(*(torch.zeros(1) for _ in StepClock._fields))
    step = (rays, torch.rand(70, 3), clock, 4096, 0.1, model.fields(), _zeros(model.fields()))
    run = fast_train_step_captured
    assert run(*step) is statistics and not is_checking()
    with checking():
        statistics[5] = 3
        with pytest.raises(NonFiniteError, match=r"^fast_train_step_captured: the gradient is not finite"):
            run(*step)
        statistics[5] = 70
        with pytest.raises(NonFiniteError, match=r"^fast_train_step_captured: rgb is nan at ray 3, index"):
            run(*step)
        statistics[4] = 1
        assert run(*step) is statistics
