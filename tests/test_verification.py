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
from mipnerf_fast.reference import Composite


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


@pytest.mark.parametrize("fraction_bits", [10, 8])
def test_products_in_tf32_are_held_to_what_their_rounding_makes(
    fraction_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twin takes the kernels' place here: sums as a kernel has them, and 10 fraction bits pass, 8 do not."""
    module = importlib.import_module("mipnerf_fast.reference.tiny_mlp")
    right, generator = module.round_to_tf32, torch.Generator().manual_seed(0)

    def rounded(x: Tensor) -> Tensor:
        if current_backend() == "reference":
            return right(x)
        x = x * (1 + 2.0**-23 * (2 * torch.rand(x.shape, generator=generator) - 1))
        spread = (2.0 ** (10 - fraction_bits) - 1) * x  # a sum of which fewer bits are left
        return right(x + spread) - spread

    monkeypatch.setattr(module, "round_to_tf32", rounded)
    monkeypatch.setattr(ops, "why_no_tf32", lambda device: "")
    monkeypatch.setattr(ops, "tiny_mlp", reference.tiny_mlp)
    for name in ("fast_train_step", "fast_render", "occupancy_update"):
        monkeypatch.setattr(ops, name, getattr(fast_reference, name))
    chosen = [case for case in verification.FAST_CASES if case.name.endswith("TF32")]
    monkeypatch.setattr(verification, "_CASES", ())
    monkeypatch.setattr(verification, "MLP_CASES", ())
    monkeypatch.setattr(verification, "FAST_CASES", tuple(chosen))
    report = verification.verify(["cpu"])
    failed = {(row.operation, row.quantity.split(":")[0]) for row in report.rows if not row.passed}
    assert all(row.native_error is not None and row.reference_error > 0 for row in report.rows)
    assert {row.operation for row in report.rows} == {"tiny_mlp", "fast_step", "occupancy"}
    assert failed == (set() if fraction_bits == 10 else {(case.operation, case.name) for case in chosen})


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
