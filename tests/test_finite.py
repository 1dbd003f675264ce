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


FAST = """
import torch
from mipnerf_fast import FastConfig, FastModel, fast_reference, ops
from mipnerf_fast.cameras import pinhole_rays
from mipnerf_fast.ops.fast_step import FastGradients, MarchRays
model = FastModel(FastConfig(levels=2, finest_resolution=32, log2_table_size=9, occupancy_resolution=32, net_width=16))
c2w = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4]])
rays = pinhole_rays(c2w, 3, 3, 4.0).flatten()
white = torch.ones(9, 3)
def step(rays, target, fields):
    zeros = (getattr(fields, name) for name in FastGradients._fields)
    zeros = FastGradients(*(None if value is None else torch.zeros_like(value) for value in zeros))
    return operators.fast_train_step(rays, target, 0.1, fields, zeros).is_finite
def tell(call, *arguments):
    try:
        found = call(*arguments)
        print(found if isinstance(found, bool) else bool(found[0].isnan().any()))
    except FloatingPointError as error:
        print(error)
good = MarchRays(*rays[:2], rays.radii, rays.near, rays.far, None, white)
bad = good._replace(background=white.clone())
bad.background[5, 1] = torch.nan
target = white.clone()
target[7] = torch.inf
for operators in (ops, fast_reference):
    tell(step, good, white, model.fields())
    tell(step, bad, white, model.fields())
    tell(step, good, target, model.fields())
    tell(operators.fast_render, good, model.fields())
    tell(operators.fast_render, bad, model.fields())
"""


@pytest.mark.parametrize("check", ["0", "1"])
def test_the_fused_operators_of_the_fast_model_name_the_ray(check: str) -> None:
    environment = {**os.environ, "MIPNERF_FAST_CHECK": check}
    result = subprocess.run([sys.executable, "-c", FAST], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    wanted = [
        "True",
        "fast_train_step: rgb is nan at ray 5, index [5, 1] of shape [9, 3] (1 places in all)",
        "fast_train_step: target is inf at ray 7, index [7, 0] of shape [9, 3] (1 places in all)",
        "False",
        "fast_render: rgb is nan at ray 5, index [5, 1] of shape [9, 3] (1 places in all)",
    ]
    silent = ["True", "False", "False", "False", "True"]
    assert result.stdout.splitlines() == 2 * (wanted if check == "1" else silent)


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
    packed = torch.zeros(5, 3)
    packed[4, 2] = -torch.inf
    for rows, place in (("pixels", " at ray 4"), ("samples", " at sample 4"), ("none", "")):
        with pytest.raises(NonFiniteError, match=rf"tiny_mlp: rgb is -inf{place}, index \[4, 2\]"):
            check_finite("tiny_mlp", "rgb", packed, rows)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="is nan at ray 1, sample 0, index"):
        check_finite("composite", "weights", distance[:, None])
