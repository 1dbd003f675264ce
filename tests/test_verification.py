"""`mipnerf-fast verify`: it passes here, and a kernel that errs fails it and is named."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mipnerf_fast import _native, cli, fast_reference, ops, reference, verification
from mipnerf_fast.backend import current_backend
from mipnerf_fast.ops import fast_captured
from mipnerf_fast.ops.fast_captured import StepClock
from mipnerf_fast.ops.fast_step import MarchRays, PixelSource
from mipnerf_fast.reference import Composite
from mipnerf_fast.verification_case import Case


@pytest.fixture(scope="module")
def report() -> verification.Report:
    return verification.verify(["cpu"])


def test_every_operation_passes_with_its_kernel(report: verification.Report) -> None:
    assert report.passed
    assert all(row.native_error is not None for row in report.rows)
    assert {row.operation for row in report.rows} == {*ops.OPERATIONS, *ops.FAST_OPERATIONS}
    assert {row.dtype for row in report.rows} >= {
        "float32",
        "float64",
        "float32 to bfloat16",
        "float32 to float16",
    }
    engines = {(row.quantity.split(":")[0], row.dtype) for row in report.rows if row.operation == "mlp"}
    assert engines - {("folded", "float32 to bfloat16")} == {
        ("folded", "float32"),
        ("emulated", "float32 to bfloat16"),
        ("emulated", "float32 to float16"),
    }
    gradients = {row.quantity.partition("gradient to ")[2] for row in report.rows} - {""}
    assert gradients >= {
        "t_vals",
        "origins",
        "directions",
        "radii",
        "rgb",
        "density",
        "raw_rgb",
        "raw_density",
        "features",
        "viewdirs_enc",
        "linears.0.weight",
        "linears.7.bias",
    }


def test_the_encoding_is_far_better_than_the_float32_reference(report: verification.Report) -> None:
    row = next(r for r in report.rows if r.quantity == "cone: features" and r.dtype == "float32")
    assert row.native_error is not None
    assert row.native_error < row.reference_error / 50


def test_command_writes_json_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "verify.json"
    assert cli.main(["verify", "--json", str(path), "--device", "cpu"]) == cli.DONE
    written = json.loads(path.read_text())
    assert written["passed"] is True
    assert len(written["rows"]) == capsys.readouterr().out.count("| pass |")
    assert "| frustum_ipe | cone: features | float32 | cpu |" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("fault", [1.001, math.nan])
def test_a_wrong_kernel_fails_and_is_named(
    fault: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.composite

    def wrong(*arguments: torch.Tensor) -> Composite:
        level = right(*arguments)
        if current_backend() == "reference":
            return level
        factor = torch.ones_like(level.weights)
        factor[17, 31] = fault
        return level._replace(weights=level.weights * factor)

    monkeypatch.setattr(ops, "composite", wrong)
    monkeypatch.setattr(verification, "FAST_CASES", ())
    monkeypatch.setattr(verification, "MLP_CASES", ())
    assert cli.main(["verify", "--device", "cpu"]) == cli.FAILED
    failures = [line for line in capsys.readouterr().out.splitlines() if "**FAIL**" in line]
    assert any("composite | activated: weights | float32" in line for line in failures)
    assert all("activated" in line for line in failures)
    assert any("**FAIL** at ray 17, sample 31" in line for line in failures)


@pytest.mark.parametrize(
    ("name", "operation", "wrong", "row"),
    [
        ("hash_encode", "hash_encode", lambda out: out * 1.0001, "gaussian: features"),
        ("tiny_mlp", "tiny_mlp", lambda out: out._replace(density=out.density * 1.0001), "density"),
        ("march", "march", lambda out: out._replace(ray_starts=out.ray_starts + 1), "ray_starts"),
        ("fast_render", "fast_step", lambda out: (out[0] + 1e-5, *out[1:]), "rendering: rgb"),
    ],
)
def test_a_wrong_kernel_of_the_fast_model_fails_and_is_named(
    name: str,
    operation: str,
    wrong: Callable[[Any], Any],
    row: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = getattr(ops, name)

    def faulty(*arguments: Any, **options: Any) -> Any:
        out = right(*arguments, **options)
        return out if current_backend() == "reference" else wrong(out)

    monkeypatch.setattr(ops, name, faulty)
    monkeypatch.setattr(verification, "_CASES", ())
    monkeypatch.setattr(verification, "MLP_CASES", ())
    chosen = [case for case in verification.FAST_CASES if case.operation == operation]
    monkeypatch.setattr(verification, "FAST_CASES", tuple(chosen))
    report = verification.verify(["cpu"])
    assert any(r.quantity.endswith(row) and not r.passed for r in report.rows)
    assert all(r.operation == operation for r in report.rows)


# The captured step's operators by twins on the CPU: they do what the operators do, in plain PyTorch.


def _draw_captured(
    source: PixelSource, seed: int, clock: StepClock, count: int, *behind: Any
) -> tuple[MarchRays, Tensor]:
    active = int(clock.active_rays)
    rays, target = fast_reference.draw_rays(source, seed, int(clock.step), active, *behind)
    behind_them = torch.full((count - active, 3), math.nan)
    *fields, target = (torch.cat([x, behind_them[:, : x.shape[1]]]) for x in (*rays, target) if x is not None)
    return MarchRays(*fields), target


def _step_captured(
    rays: MarchRays, target: Tensor, clock: StepClock, capacity: int, *arguments: Any
) -> Tensor:
    active = int(clock.active_rays)
    some = MarchRays(*(x[:active] for x in rays))  # type: ignore[index]
    found = fast_reference.fast_train_step(some, target[:active], *arguments[:-1])
    return torch.tensor([*found, active], dtype=torch.float64)


def _adam_captured(*arguments: Any) -> None:
    *state, copy, clock, ratio, beta1, beta2, eps = arguments
    rate = float(clock.learning_rate) * ratio
    fast_reference.sparse_adam(*state, rate, beta1, beta2, eps, int(clock.step) + 1)
    copy.copy_(state[0])


def _pace_captured(statistics: Tensor, clock: StepClock, *limits: int) -> None:
    clock.samples_per_ray.mul_(0.8).add_(0.2 * statistics[2] / statistics[5])
    clock.active_rays.fill_(fast_captured.rays_of_pace(clock.samples_per_ray, *limits))
    clock.step.add_(1)


def _update_captured(*arguments: Any) -> Tensor:
    return torch.tensor(fast_reference.occupancy_update(*arguments))


# By their names: how the cases' names begin, and the twin.
TWINS: dict[str, tuple[str, Callable[..., Any]]] = {
    "draw_rays_captured": ("captured, 448 of 512", _draw_captured),
    "fast_train_step_captured": ("captured training step", _step_captured),
    "fast_pace_captured": ("captured, pace", _pace_captured),
    "occupancy_update_captured": ("captured, visited cells", _update_captured),
    "sparse_adam_captured": ("captured, step 7", _adam_captured),
}


@pytest.fixture
def of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """What only a GPU serves, done by twins on the CPU; `verify` calls nothing else."""
    monkeypatch.setattr(ops, "why_no_tf32", lambda device: "")
    monkeypatch.setattr(fast_captured, "kernels_for", lambda device: "")
    monkeypatch.setattr(ops, "tiny_mlp", reference.tiny_mlp)
    for name in ("fast_train_step", "fast_render", "occupancy_update"):
        monkeypatch.setattr(ops, name, getattr(fast_reference, name))
    for name, (_, twin) in TWINS.items():
        monkeypatch.setattr(fast_captured, name, twin)
    chosen = [case for case in verification.FAST_CASES if case.served is not None]
    monkeypatch.setattr(verification, "_CASES", ())
    monkeypatch.setattr(verification, "MLP_CASES", ())
    monkeypatch.setattr(verification, "FAST_CASES", tuple(chosen))
    return chosen


@pytest.mark.parametrize(
    ("coarse", "of_cases"), [("", ""), ("round_to_tf32", "TF32"), ("round_to_half", "float16 tables")]
)
def test_what_a_gpu_rounds_is_held_to_what_its_rounding_makes(
    coarse: str, of_cases: str, of_a_gpu: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twin takes the kernels' place here: sums as a kernel has them pass, roundings of fewer bits do not."""
    generator = torch.Generator().manual_seed(0)

    def patch(module: str, name: str) -> None:
        file = importlib.import_module(f"mipnerf_fast.reference.{module}")
        right = getattr(file, name)

        def rounded(x: Tensor) -> Tensor:
            if current_backend() == "reference":
                return right(x)  # type: ignore[no-any-return]
            x = x * (1 + 2.0**-23 * (2 * torch.rand(x.shape, generator=generator) - 1))
            spread = (15 if name == coarse else 0) * x  # of the sum four bits fewer are left
            return right(x + spread) - spread  # type: ignore[no-any-return]

        monkeypatch.setattr(file, name, rounded)

    patch("tiny_mlp", "round_to_tf32")
    patch("fast_step", "round_to_half")
    report = verification.verify(["cpu"])
    failed = {(row.operation, row.quantity.split(":")[0]) for row in report.rows if not row.passed}
    assert all(row.native_error is not None for row in report.rows)
    assert {row.operation for row in report.rows} == {
        *("draw_rays", "fast_step", "occupancy", "sparse_adam", "tiny_mlp")
    }
    wanted = {(case.operation, case.name) for case in of_a_gpu if of_cases and of_cases in case.name}
    assert failed == wanted and (len(wanted) > 4) == bool(coarse)


@pytest.mark.parametrize("name", TWINS)
def test_a_captured_operator_that_takes_another_step_fails_and_is_named(
    name: str, of_a_gpu: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    begins, twin = TWINS[name]

    def faulty(*arguments: Any) -> Any:
        changed = [
            x._replace(step=x.step + 1, active_rays=x.active_rays - 1) if isinstance(x, StepClock) else x
            for x in arguments
        ]
        if name == "occupancy_update_captured":
            changed[3] += 1
        return twin(*changed)

    monkeypatch.setattr(fast_captured, name, faulty)
    chosen = [case for case in of_a_gpu if case.name.startswith(begins)]
    monkeypatch.setattr(verification, "FAST_CASES", tuple(chosen))
    report = verification.verify(["cpu"])
    failed = {row.quantity.split(":")[0] for row in report.rows if not row.passed}
    assert failed == {case.name for case in chosen} and len(failed) > 0


def test_the_cpu_has_no_rows_of_what_only_a_gpu_serves(report: verification.Report) -> None:
    names = {case.name for case in verification.FAST_CASES if case.served is not None}
    assert len(names) > 15 and not names & {row.quantity.split(":")[0] for row in report.rows}


def test_without_the_library_nothing_is_verified(
    report: verification.Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "why_missing", lambda: "the native library has not been built")
    monkeypatch.setattr(verification, "_CASES", verification._CASES[-1:])
    monkeypatch.setattr(verification, "FAST_CASES", ())
    monkeypatch.setattr(verification, "MLP_CASES", ())
    missing = verification.verify(["cpu"])
    assert not missing.passed
    assert "Nothing was verified: the native library has not been built." in verification.markdown(missing)
