"""The README's table of what is known of every engine of the network, against what happens here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from mlp_engines import SHAPES, Engine, evaluate, exact, inputs, plain, relative_errors

from benchmarks.readme import mlp_evidence
from benchmarks.readme_gpu import kernel_reports
from mipnerf_fast.ops import MLP_BACKENDS, MipMLP

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHAPE = SHAPES["64 wide"]
ROWS = {
    cells[0]: cells[1:]
    for cells in (re.split(r" \| ", line.strip("| ")) for line in mlp_evidence(RESULTS).splitlines()[2:])
}
DTYPES = {"reference": "auto", "folded": "fp32", "emulated": "bf16"}


def test_the_readme_has_the_table_of_every_engine() -> None:
    assert mlp_evidence(RESULTS) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert {row.split(",")[0] for row in ROWS} == set(MLP_BACKENDS) - {"auto"}


@pytest.mark.parametrize("engine", list(ROWS))
def test_on_a_cpu(engine: str) -> None:
    """ "executed" computes outputs and gradients within the bound of its precision; "not run" refuses to."""
    name = engine.split(",")[0]
    assert ROWS[engine][0].startswith("executed") == (name in DTYPES)
    if name not in DTYPES:
        assert ROWS[engine][0].startswith("not run")
        with pytest.raises((RuntimeError, ValueError)):
            MipMLP(*SHAPE, backend=name)(*inputs(SHAPE, 2, 3))
        return
    mlp = Engine(name, DTYPES[name], "cpu").build(SHAPE)
    assert mlp.implementation.engine == name
    given = inputs(SHAPE, 16, 64)
    want = exact(mlp, *given)
    dtype = torch.float32 if mlp.implementation.dtype == torch.float32 else torch.bfloat16
    found, allowed = (
        relative_errors(evaluate(mlp, *given), want),
        relative_errors(plain(mlp, *given, dtype), want),
    )
    for quantity in ("all outputs", "all gradients"):
        assert found[quantity] <= 2 * allowed[quantity] + 1e-6


def test_the_files_that_it_names_exist() -> None:
    named = re.findall(r"`(tests/\w+\.py)`", mlp_evidence(RESULTS))
    assert named and all((ROOT / path).is_file() for path in named)


def test_nothing_is_said_to_have_run_on_a_gpu_without_its_results() -> None:
    if not kernel_reports(RESULTS, ("mlp",)):
        assert all(cells[2] in ("**not run**", "-") for cells in ROWS.values())
    compiled = "mlp" in (RESULTS / "cuda_check.json").read_text(encoding="utf-8")
    assert ("compiled by `make cuda-check`" in ROWS["fused"][1]) == compiled
