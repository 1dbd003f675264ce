"""The fast model's deterministic mode: gradients of the tables summed in fixed point, and a resume that is exact.

The emulation runs threads and blocks in an order that its seed draws. Sums of floats then differ in their last bits,
which shows that a test of equality can fail; those in fixed point must not. Bounds: as in test_fast_kernels.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulation import harness
from cuda_emulation.faults import broken_program
from cuda_emulation.harness import EmulationError
from test_fast_kernels import (
    ENCODING,
    FLOOR,
    OPERATORS,
    STEP,
    bounded,
    emulate,
    emulate_step,
)
from test_fast_step import SMALL, _model, _rays
from test_fast_training import TINY, _config, _spheres
from torch import Tensor

from mipnerf_fast import fast_captured, ops, reference
from mipnerf_fast.checkpoint import load_checkpoint
from mipnerf_fast.fast_training import FastTrainer
from mipnerf_fast.ops.fast_captured import StepClock, rays_of_pace
from mipnerf_fast.ops.fast_step import FastFields, FastGradients, MarchRays, PixelSource

SEEDS = range(6)
GRID = reference.hash_grid(levels=4, coarsest=4, finest=50, table_size=2**9)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


# --------------------------------------------------------------------------------------------------- the encoding


def scatter_inputs(samples: int, features: int) -> dict[str, Tensor]:
    return {
        "points": torch.rand(samples, 3),
        "scales": 0.001 + 0.05 * torch.rand(samples) ** 2,
        "tables": torch.randn(GRID.entries, features),
        "grad_features": torch.randn(samples, 4 * features),
    }


def scatter(
    given: dict[str, Tensor],
    seed: int,
    fixed: bool = True,
    grid: reference.HashGrid = GRID,
    kind: int = 1,
    **options: Any,
) -> dict[str, np.ndarray]:
    """One backward pass of the encoding; in fixed point the sums are left as they were found."""
    outputs = {f"grad_{name}": torch.zeros_like(given[name]) for name in ("points", "scales", "tables")}
    outputs |= {"features": given["grad_features"].shape}  # type: ignore[dict-item]
    if fixed:
        outputs["table_sums"] = np.zeros(given["tables"].shape, np.int64)  # type: ignore[assignment]
        outputs["largest"] = np.zeros(len(grid.resolutions), np.uint32)  # type: ignore[assignment]
    scalars = {"table_size": grid.table_size, "attenuation": kind, "cutoff": 0.02}
    arrays = {**given, "resolutions": np.array(grid.resolutions)}
    program = options.pop("program", ENCODING)
    found = emulate(program, "", arrays, outputs, scalars | options.pop("scalars", {}), seed, **options)
    assert not fixed or not found["table_sums"].any(), "the sums are not zero afterwards"
    return found


def on_cpu(
    given: dict[str, Tensor], dtype: torch.dtype, grid: reference.HashGrid = GRID, kind: int = 1
) -> Tensor:
    """The gradient of the tables."""
    points, scales, tables, cotangent = (value.to(dtype) for value in given.values())
    options = (list(grid.resolutions), grid.table_size, kind, 0.02, True)
    result: Tensor = torch.ops.mipnerf_fast.hash_encode_backward(cotangent, points, scales, tables, *options)[
        2
    ]
    return result


def check_scatter(given: dict[str, Tensor], found: dict[str, np.ndarray], **options: Any) -> None:
    rounded, truth = (on_cpu(given, dtype, **options) for dtype in (torch.float32, torch.float64))
    bounded(found["grad_tables"], rounded, truth)


@pytest.mark.parametrize(("samples", "features"), [(133, 4), (200, 2)])
def test_the_encoding_has_the_same_gradients_in_any_order(samples: int, features: int) -> None:
    given = scatter_inputs(samples, features)
    fixed = [scatter(given, seed)["grad_tables"] for seed in SEEDS]
    assert all(same(fixed[0], other) for other in fixed[1:])
    check_scatter(given, {"grad_tables": fixed[0]})
    floats = [scatter(given, seed, fixed=False, checks=["memory"])["grad_tables"] for seed in SEEDS]
    assert any(not same(floats[0], other) for other in floats[1:])


@pytest.mark.parametrize("samples", [0, 1])
def test_few_samples_are_no_special_case(samples: int) -> None:
    given = scatter_inputs(samples, 2)
    check_scatter(given, scatter(given, 0))


@pytest.mark.parametrize("exponent", [-80, 100])
def test_the_scale_follows_the_gradients(exponent: int) -> None:
    """All of them by a power of two: the same bits, so nothing was lost and nothing overflowed at either end."""
    given = scatter_inputs(90, 4)
    plain = scatter(given, 1, checks=["memory"])["grad_tables"]
    moved = given | {"grad_features": given["grad_features"] * 2.0**exponent}
    found = scatter(moved, 2, checks=["memory"])["grad_tables"]
    assert same(found, plain * np.float32(2.0**exponent))


def test_gradients_that_are_hardly_numbers() -> None:
    """Subnormal ones, whose own rounding is all that is lost."""
    given = scatter_inputs(50, 2)
    given["grad_features"] = given["grad_features"] * 2.0**-140
    found = scatter(given, 3)["grad_tables"]
    truth = on_cpu(given, torch.float64).numpy()
    assert np.abs(found - truth).max() <= 8 * 50 * 2.0**-149
    assert np.abs(truth).max() > 100 * 2.0**-149


def test_small_gradients_beside_large_ones() -> None:
    """Of one level: 2^-24 of the largest is still known to 16 bits, 2^-50 is nothing. Other levels do not matter."""
    given = scatter_inputs(64, 2)
    points = given["points"]
    points[:32], points[32:] = 0.2 * points[:32], 0.8 + 0.2 * points[32:]  # of different cells
    gradient = given["grad_features"]
    gradient[:32, :2] *= 2.0**-24
    gradient[:, 2:4] *= 2.0**-50
    found = scatter(given, 4)["grad_tables"]
    truth = on_cpu(given, torch.float64).numpy()
    dense = (GRID.resolutions[0] + 1) ** 3
    small = (np.abs(truth[:dense]) < 2.0**-20) & (truth[:dense] != 0)
    assert small.sum() == 8 * 2  # of one cell
    # A unit is 2^(6 - 62) of the power of two above the largest, which is at most 8; of 32 samples four corners round.
    assert np.abs(found[:dense] - truth[:dense])[small].max() <= 2.0**-24 * 2.0**-23 * 64 + 128 * 2.0**-53
    second = slice(dense + 7 & ~7, (dense + 7 & ~7) + (GRID.resolutions[1] + 1) ** 3)
    assert np.abs(found[second]).max() > 2.0**-54


def worst_case(samples: int = 256) -> dict[str, Tensor]:
    """Every share is as large as one can be, in the same entry: all corners of a level meet in few."""
    return {
        "points": torch.full((samples, 3), 0.5),
        "scales": torch.full((samples,), 0.01),
        "tables": torch.zeros(8, 2),
        "grad_features": torch.full((samples, 2), 2 - 2.0**-23),
    }


WORST = reference.hash_grid(levels=1, coarsest=2, finest=2, table_size=8)


def check_worst_case(**options: Any) -> None:
    """Exactly the sum: it needs fewer bits than there are. An overflow would be one of signed integers, to UBSan."""
    given = worst_case()
    found = scatter(given, 5, grid=WORST, kind=0, checks=["memory"], **options)["grad_tables"]
    assert found.max() == np.float32(256 * (2 - 2.0**-23))


def test_the_largest_sum_does_not_overflow() -> None:
    assert WORST.entries == 8
    check_worst_case()


@pytest.mark.parametrize("place", ["grad_features", "points", "scales"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_passed_on(place: str, value: float) -> None:
    given = scatter_inputs(40, 2)
    if place == "scales" and value == math.inf:
        value = math.nan  # a level of infinite width is attenuated to nothing
    given[place].view(-1)[3] = value
    found = scatter(given, 6, checks=["memory"])["grad_tables"]
    levels = 1 if place == "grad_features" else 4
    assert np.isnan(found).any()
    sizes = [min((n + 1) ** 3 + 7 & ~7, 2**9) for n in GRID.resolutions]
    starts = np.cumsum([0, *sizes])
    whole = [bool(np.isnan(found[a:b]).all()) for a, b in itertools.pairwise(starts)]
    assert sum(whole) == levels and np.isfinite(found).sum() == 2 * (
        GRID.entries - sum(np.array(sizes)[whole])
    )


# --------------------------------------------------------------------------------------------------- broken twins

# Of hash_encode_sums*: what stands there, what is put in its place, and what finds it.
FAULTS: dict[str, tuple[str, str, str, Callable[..., None], str | None]] = {
    "the number of samples is forgotten": (
        "hash_encode_sums_math.h",
        "kSumBits - ceil_log2(samples)",
        "kSumBits - (fault ? 0 : ceil_log2(samples))",
        check_worst_case,
        "signed integer overflow",
    ),
    "the exponent is that below the largest": (
        "hash_encode_sums_math.h",
        "- 126)",
        "- 126 - 2 * fault)",
        check_worst_case,
        "signed integer overflow",
    ),
    "the sums are not scaled back": (
        "hash_encode_sums.cuh",
        "from_fixed(total[f / 2].value[f % 2], inverse)",
        "from_fixed(total[f / 2].value[f % 2], fault ? PowerOfTwo{1.0f, 1.0f} : inverse)",
        lambda **options: check_random(**options),
        None,
    ),
    "the sums are not zeroed": (
        "hash_encode_sums.cuh",
        "store_pack(total_at + 2 * i, Pack<std::int64_t, 2>{{0, 0}})",
        "if (!fault) store_pack(total_at + 2 * i, Pack<std::int64_t, 2>{{0, 0}})",
        lambda **options: check_random(**options),
        "not zero afterwards",
    ),
    "a level's scale is that of the first": (
        "hash_encode_sums.cuh",
        "return scale_exponent(largest[level],",
        "return scale_exponent(largest[fault ? 0 : level],",
        lambda **options: check_levels(**options),
        None,
    ),
}


def check_random(**options: Any) -> None:
    given = scatter_inputs(60, 2)
    check_scatter(given, scatter(given, 7, checks=["memory"], **options))


def check_levels(**options: Any) -> None:
    """Levels whose gradients are of very different sizes."""
    given = scatter_inputs(60, 2)
    sizes = torch.tensor([1.0, 2.0**-60, 2.0**60, 1.0]).repeat_interleave(2)
    given["grad_features"] *= sizes
    found = scatter(given, 8, checks=["memory"], **options)["grad_tables"]
    truth = on_cpu(given, torch.float64).numpy()
    at = 0
    for n, size in zip(GRID.resolutions, sizes[::2].tolist(), strict=True):
        level = slice(at, at := at + min((n + 1) ** 3 + 7 & ~7, 2**9))
        np.testing.assert_allclose(found[level], truth[level], rtol=0, atol=60 * 2.0**-23 * size)


@pytest.fixture(scope="module")
def broken() -> Path:
    faults = [(f"hash_encode/{fault[0]}", *fault[1:3]) for fault in FAULTS.values()]
    return broken_program("hash_encode", faults)


def test_the_copy_without_a_fault_is_sound(broken: Path) -> None:
    for check in dict.fromkeys((check_worst_case, check_random, check_levels)):
        check(program=broken, scalars={"fault": 0})


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_sums_is_caught(broken: Path, name: str) -> None:
    *_, check, sentence = FAULTS[name]
    number = list(FAULTS).index(name) + 1
    with pytest.raises(AssertionError, match=sentence):  # EmulationError is one
        check(program=broken, scalars={"fault": number})


def test_additions_in_fixed_point_must_be_atomic_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIPNERF_EMULATION_PLAIN_ATOMICS", "1")
    for seed in SEEDS:
        with pytest.raises(EmulationError, match="race"):
            scatter(worst_case(3), seed, grid=WORST, kind=0, checks=["races"])


# ------------------------------------------------------------------------------------------------ the training step


@pytest.mark.parametrize("half", [False, True])
def test_the_step_has_the_same_gradients_in_any_order(half: bool) -> None:
    model, rays, target = _model(SMALL), _rays(16), torch.rand(16, 3)
    fields = model.fields()
    if half:
        fields = fields._replace(tables=fields.tables.half())

    def step(seed: int, fixed: bool) -> dict[str, np.ndarray]:
        checks = harness.CHECKS if seed == 0 else ["memory"]
        return emulate_step(rays, target, fields, seed, capacity=1024, fixed=fixed, checks=checks)

    runs, floats = ([step(seed, fixed) for seed in SEEDS] for fixed in (True, False))
    for run in runs[1:]:
        for name, value in run.items():
            assert same(value, runs[0][name]), name
    assert runs[0]["statistics"][5] == 16 and not runs[0]["table_sums"].any()
    tables = [run["grad_tables"] for run in floats]
    assert any(not same(tables[0], other) for other in tables[1:])
    for name, value in floats[0].items():
        if name != "grad_tables":
            assert same(value, runs[0][name]), name
    np.testing.assert_allclose(
        runs[0]["grad_tables"], tables[0], rtol=0, atol=FLOOR * np.abs(tables[0]).max()
    )


def updated(gradients: dict[str, np.ndarray], fields: FastFields, seed: int) -> dict[str, np.ndarray]:
    """Parameters, moments and the copy of the tables after Adam."""
    found = {}
    for name in FastGradients._fields:
        value = getattr(fields, name)
        if value is None:
            continue
        flat = value.reshape(-1)
        zeros = np.zeros(flat.shape, np.float32)
        state = {"values": flat.numpy().copy(), "gradient": gradients[f"grad_{name}"].reshape(-1)}
        state |= {"moment1": zeros, "moment2": zeros.copy(), "copy": flat.half().numpy()}
        numbers = {"rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-15, "step": 1}
        for part, after in emulate(
            OPERATORS, "sparse_adam", {}, state, numbers, seed, checks=["memory"]
        ).items():
            found[f"{name}.{part}"] = after
    return found


def test_whole_steps_give_the_same_parameters_in_any_order() -> None:
    model, rays, target = _model(SMALL), _rays(30), torch.rand(30, 3)
    fields = model.fields()

    def after(seed: int, fixed: bool) -> dict[str, np.ndarray]:
        found = emulate_step(rays, target, fields, seed, capacity=2048, fixed=fixed, checks=["memory"])
        return updated(found, fields, seed)

    first, second = after(11, True), after(12, True)
    for name, value in first.items():
        assert same(value, second[name]), name
    assert (first["tables.values"] != fields.tables.reshape(-1).numpy()).sum() > 1000
    assert not first["tables.gradient"].any()
    assert not same(after(11, False)["tables.moment1"], after(12, False)["tables.moment1"])


def test_the_room_for_samples_does_not_change_a_bit() -> None:
    model, rays, target = _model(SMALL), _rays(12), torch.rand(12, 3)
    runs = [
        emulate_step(rays, target, model.fields(), seed, capacity=room, fixed=True, checks=["memory"])
        for seed, room in ((0, 512), (1, 4096))
    ]
    assert runs[0]["statistics"][5] == 12
    for name, value in runs[0].items():
        assert same(value, runs[1][name]), name


def overflowing() -> FastFields:
    """Features so small and weights so large that the encoding's gradient alone is infinite."""
    model = _model(dataclasses.replace(SMALL, attenuation="none"))
    fields = model.fields()
    fields.tables.copy_(3e-42 * torch.rand_like(fields.tables))
    fields.density_in[:, : 3 * 4] = 3e38 * torch.randn_like(fields.density_in[:, : 3 * 4]).sign()
    fields.density_in[:, 12:] = 0
    fields.density_out.mul_(500)
    return fields


def test_an_encoding_whose_gradient_is_infinite_skips_the_step() -> None:
    fields, rays, target = overflowing(), _rays(7), torch.rand(7, 3)
    found = emulate_step(rays, target, fields, 8, capacity=1024, fixed=True, checks=["memory"])
    assert found["statistics"][3] > 0 and found["statistics"][4] == 0
    assert all((value == 0).all() for name, value in found.items() if name != "statistics")
    floats = emulate_step(rays, target, fields, 8, capacity=1024, checks=["memory"])
    assert floats["statistics"][4] == 1 and not np.isfinite(floats["grad_tables"]).all()


# ------------------------------------------------------------------------------------------------------- the resume


def test_a_run_goes_on_with_as_many_rays_as_it_would_have() -> None:
    at = [7.3, 9.15, 4096 / 448, 4096 / 448.3, 4096 / 447.9999, 2.0, 0.5, 40.0, 21.33333]
    for pace in at:
        found = emulate(
            STEP,
            "pace",
            {"statistics": np.array([0.1, 0.2, 100 * pace, 90.0, 1.0, 100.0])},
            {
                "samples_per_ray": np.array([pace], np.float32),
                "active_rays": np.zeros(1, np.int32),
                "step": np.array([0]),
            },
            {"batch": 4096.0, "least": 192, "most": 8192},
            checks=["memory"],
        )
        # As the model's buffer and a checkpoint keep it.
        kept = torch.tensor(found["samples_per_ray"].astype(np.float64))
        assert rays_of_pace(kept, 4096, 192, 8192) == found["active_rays"][0]


def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The captured step's operators by those of the CPU, every step launched; returns a list of the rays drawn."""
    drawn: list[int] = []

    def draw(
        source: PixelSource, seed: int, clock: StepClock, count: int, *behind: Any
    ) -> tuple[MarchRays, Tensor]:
        drawn.append(int(clock.active_rays))
        assert drawn[-1] <= count
        return ops.draw_rays(source, seed, int(clock.step), drawn[-1], *behind)

    def step(rays: MarchRays, target: Tensor, clock: StepClock, capacity: int, *more: Any) -> Tensor:
        loss_beta, fields, gradients, sums = more
        assert sums is not None and sums.dtype == torch.int64 and sums.shape == gradients.tables.shape
        assert fields.tables.dtype == torch.float16 and not gradients.tables.any()
        wide = fields._replace(tables=fields.tables.float())
        return torch.tensor(
            [*ops.fast_train_step(rays, target, loss_beta, wide, gradients), len(target)]
        ).double()

    def adam(
        values: Tensor,
        gradient: Tensor,
        m1: Tensor,
        m2: Tensor,
        copy: Tensor | None,
        clock: StepClock,
        *numbers: float,
    ) -> None:
        ratio, *rest = numbers
        ops.sparse_adam(
            values, gradient, m1, m2, float(clock.learning_rate) * ratio, *rest, int(clock.step) + 1
        )
        if copy is not None:
            copy.copy_(values)

    def pace(statistics: Tensor, clock: StepClock, batch: int, least: int, most: int) -> None:
        latest = max(0.5, float(statistics[2] / statistics[5]))
        clock.samples_per_ray.copy_(0.8 * clock.samples_per_ray + torch.tensor(0.2 * latest))
        wanted = float(torch.tensor(float(batch)) / clock.samples_per_ray)
        clock.active_rays.fill_(-(-math.ceil(min(max(wanted, least), most)) // 64) * 64)
        clock.step.add_(1)

    def occupancy(*arguments: Any) -> None:
        *settings, fields = arguments
        ops.occupancy_update(*settings, fields._replace(tables=fields.tables.float()))

    def launched(captured: fast_captured.CapturedStep, rate: float) -> None:
        captured._clock.learning_rate.fill_(rate)
        captured._launch()

    for name, function in {
        "draw_rays_captured": draw,
        "fast_train_step_captured": step,
        "sparse_adam_captured": adam,
        "fast_pace_captured": pace,
        "occupancy_update_captured": occupancy,
    }.items():
        monkeypatch.setattr(fast_captured, name, function)
    monkeypatch.setattr(fast_captured.CapturedStep, "__call__", launched)
    return drawn


def test_a_captured_run_goes_on_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that decides a step comes back from the checkpoint, whenever the statistics are read."""
    drawn = stand_ins(monkeypatch)
    model = dataclasses.replace(TINY, min_step=0.03, max_step=0.06)  # few samples a ray: the pace has a say
    scene, config = _spheres(16, 6), _config(45, model, deterministic=True, batch_size=16384)

    def trainer(path: Path | None = None) -> FastTrainer:
        made = FastTrainer(config, scene, checkpoint=None if path is None else load_checkpoint(path))
        made._captured = made._captured_step()
        return made

    whole = trainer()
    while not whole.is_done:
        whole.launch_step()
    results = whole.results(wait=True)
    rays = drawn.copy()
    drawn.clear()
    part = trainer()
    for stop in (7, 29, 45):
        while part.step < stop:
            found = part.train_step()
        assert found.loss == results[stop - 1].loss
        part.save(tmp_path / "checkpoint.safetensors", None)
        part = trainer(tmp_path / "checkpoint.safetensors")
    assert drawn == rays and len(set(rays)) > 2
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, part.model.state_dict()[name]), name
    for moment, tensors in whole.moments().items():
        for name, value in tensors.items():
            assert torch.equal(value, part.moments()[moment][name]), (moment, name)
