"""The copies of the CPU kernels for other vector units: each is run, whatever this processor would choose.

A copy is chosen once per process, so every unit has a process of its own; what it computes is held against float64,
as `verify` does.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlp_engines import SHAPES, Engine, inputs
from torch import Tensor

from mipnerf_fast import _native, use_backend, verification

ROOT = Path(__file__).resolve().parent.parent
UNITS = {"baseline": "default", "avx2": "avx2", "avx512": "avx512"}  # and torch's names for them
# What `verify` calls on every device; the others are of GPUs.
CASES = tuple(c for c in (*verification._CASES, *verification.FAST_CASES) if c.served is None)

COMPUTE = """
import sys, torch
from mipnerf_fast import _native, use_backend, verification
from test_vector_units import CASES, arrays_of, network_outputs
found = {"unit": _native.vector_unit()}
with use_backend("native"):
    for number, case in enumerate(CASES):
        found[number] = verification._evaluate(case, arrays_of(case), torch.float32, None, "cpu")
found["network"] = network_outputs("folded")
torch.save(found, sys.argv[1])
"""


def arrays_of(case: verification._Case) -> dict[str, Tensor]:
    """The arrays that `verify` gives the case."""
    return (case.make or verification._rays)(torch.Generator().manual_seed(0))


def network_outputs(backend: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of the exact network, with a tile that is not full and layers of no whole number of blocks; [S, 4]."""
    shape = SHAPES["heads read the skip"]
    mlp = Engine(backend, "fp32", "cpu").build(shape).to(dtype)
    with torch.no_grad():
        outputs = mlp(*(x if x is None else x.to(dtype) for x in inputs(shape, 3, 35)))
    return torch.cat(outputs, -1).flatten(0, 1)


def _computed(unit: str, folder: Path) -> dict[object, object]:
    """What a process limited to this unit computes."""
    path = folder / f"{unit}.pt"
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": UNITS[unit],
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    subprocess.run([sys.executable, "-c", COMPUTE, str(path)], env=environment, cwd=ROOT, check=True)
    found: dict[object, object] = torch.load(path)
    return found


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[object, object]]:
    """Of every unit that this processor has: the one chosen here and those below it."""
    units = list(UNITS)
    assert _native.build_info()["vector_units"] == units, (
        "built for this processor alone; `make test` builds it whole"
    )
    folder = tmp_path_factory.mktemp("units")
    return {unit: _computed(unit, folder) for unit in units[: units.index(_native.vector_unit()) + 1]}


def test_every_unit_of_this_processor_was_run(computed: dict[str, dict[object, object]]) -> None:
    assert [found["unit"] for found in computed.values()] == list(computed)
    assert next(iter(computed)) == "baseline"


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c.operation} {c.name}" for c in CASES])
def test_every_copy_is_as_exact_as_the_reference(
    number: int, computed: dict[str, dict[object, object]]
) -> None:
    """2 |reference in float32 - float64| + 8 ulps, as in `verify`; two copies differ by no more than twice that."""
    case = CASES[number]
    with use_backend("reference"):
        truth = verification._evaluate(case, arrays_of(case), torch.float64, None, "cpu")
        plain = verification._evaluate(case, arrays_of(case), torch.float32, None, "cpu")
    for unit, found in computed.items():
        results = found[number]
        assert isinstance(results, dict) and results.keys() == truth.keys()
        for name, exact in truth.items():
            if not exact.is_floating_point():
                assert torch.equal(results[name], exact), f"{unit}: {name}"
                continue
            bound = verification.FACTOR * (plain[name] - exact).abs().max()
            bound += verification.FLOOR_ULPS * torch.finfo(torch.float32).eps * exact.abs().max()
            assert (results[name] - exact).abs().max() <= bound, f"{unit}: {name}"


def test_the_copies_are_different_code(computed: dict[str, dict[object, object]]) -> None:
    """Wider vectors sum in another order, and the baseline has no fused multiply-add: some bit must tell."""
    numbers = [i for i, case in enumerate(CASES) if case.operation in ("fast_step", "tiny_mlp")]
    units = list(computed)
    for one, other in itertools.pairwise(units):
        differs = False
        for number in numbers:
            a, b = computed[one][number], computed[other][number]
            assert isinstance(a, dict) and isinstance(b, dict)
            differs = differs or any(not torch.equal(a[name], b[name]) for name in a)
        assert differs, f"{one} and {other} computed the same bits"


def test_the_exact_network_in_every_copy(computed: dict[str, dict[object, object]]) -> None:
    """The same bound on the norm."""
    truth = network_outputs("reference", torch.float64)
    bound = (
        2 * (network_outputs("reference") - truth).norm() + 8 * torch.finfo(torch.float32).eps * truth.norm()
    )
    for unit, found in computed.items():
        results = found["network"]
        assert isinstance(results, Tensor)
        assert (results - truth).norm() <= bound, unit
