"""MIPNERF_FAST_CHECK=1 names operation, ray and sample of the first value that is not finite."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mipnerf_fast.ops.finite import NonFiniteError, check_finite

SCRIPT = """
import torch
from mipnerf_fast import ops, use_backend
t_vals = torch.linspace(2.0, 6.0, 9).repeat(5, 1)
rgb, density = torch.rand(5, 8, 3), torch.rand(5, 8, 1)
density[3, 4] = torch.nan
for backend in ("reference", "native"):
    with use_backend(backend):
        try:
            level = ops.composite(rgb, density, t_vals, torch.ones(5, 3))
            print(int(level.rgb.isnan().any(-1).sum()))
        except FloatingPointError as error:
            print(error)
"""


PACKED = """
import torch
from mipnerf_fast import ops, reference
grid = reference.hash_grid(levels=2, coarsest=2, finest=4, table_size=64)
tables = torch.zeros(grid.entries, 2)
scales = torch.full((6,), 0.01)
scales[4] = torch.nan
try:
    ops.hash_encode(torch.rand(6, 3), scales, tables, grid)
except FloatingPointError as error:
    print(error)
"""


def test_of_packed_samples_the_sample_is_named() -> None:
    environment = {**os.environ, "MIPNERF_FAST_CHECK": "1"}
    result = subprocess.run([sys.executable, "-c", PACKED], env=environment, capture_output=True, text=True)
    assert result.stdout.startswith("hash_encode: features is nan at sample 4, index [4, 0]"), result.stderr


@pytest.mark.parametrize(("check", "wanted"), [("0", "1"), ("1", "composite: rgb is nan at ray 3, sample 0")])
def test_the_ray_is_named_on_request_and_alone_otherwise(check: str, wanted: str) -> None:
    environment = {**os.environ, "MIPNERF_FAST_CHECK": check}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result.stderr
    assert all(line.startswith(wanted) for line in lines)


def test_ray_and_sample_of_the_first() -> None:
    features = torch.zeros(4, 6, 9)
    check_finite("frustum_ipe", "features", features)
    features[2, 5, 1] = torch.inf
    features[3, 0, 0] = torch.nan
    with pytest.raises(
        NonFiniteError, match=r"frustum_ipe: features is inf at ray 2, sample 5, index \[2, 5, 1\]"
    ):
        check_finite("frustum_ipe", "features", features)
    distance = torch.tensor([1.0, torch.nan])
    with pytest.raises(NonFiniteError, match="distance is nan at ray 1, index"):
        check_finite("composite", "distance", distance)
