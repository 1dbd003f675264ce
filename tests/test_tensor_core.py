"""The emulated tensor-core products and asynchronous copies do what the PTX ISA says, and find their misuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_emulation import harness
from cuda_emulation.harness import EmulationError, from_bfloat16, run, to_bfloat16

from mipnerf_fast import reference

SEEDS = range(20)
LANES = np.arange(32)


def product(dtype, a, b, c, seed=0, fault=0, checks=harness.CHECKS):
    store = to_bfloat16 if dtype == "bfloat16" else lambda x: x.astype(np.float16)
    arrays = {"a": store(a), "b": store(b), "c": c}
    outputs = {"d": (c.shape, np.float32)}
    return run("tensor_core", arrays, outputs, {"kernel": "product", "fault": fault}, seed, checks=checks)[
        "d"
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_product_of_a_warp(dtype):
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 16), (16, 8)))
    c = rng.normal(size=(16, 8)).astype(np.float32)
    load = (
        (lambda x: from_bfloat16(to_bfloat16(x))) if dtype == "bfloat16" else lambda x: x.astype(np.float16)
    )
    a, b = (load(x).astype(np.float64) for x in (a, b))
    # Whole numbers: exact, so that one misplaced element shows.
    for left, right in ((a, b), (np.arange(256.0).reshape(16, 16), np.arange(128.0).reshape(16, 8) - 64)):
        exact = c + left @ right
        bound = 2.0**-24 * np.abs(exact)  # the sum is rounded once
        d = product(dtype, left.astype(np.float32), right.astype(np.float32), c)
        assert (np.abs(d - exact) <= bound).all()


def test_matrices_reach_the_lanes_that_the_isa_names():
    x = np.arange(256, dtype=np.uint16)
    outputs = {"y": ((2, 32, 4), np.uint32)}
    y = run("tensor_core", {"x": x.view(np.float16)}, outputs, {"kernel": "matrices"})["y"]
    group, quad = LANES // 4, LANES % 4
    for j, matrix in enumerate(x.reshape(4, 8, 8).astype(np.uint32)):
        np.testing.assert_array_equal(y[0, :, j], matrix[group, 2 * quad] | matrix[group, 2 * quad + 1] << 16)
        np.testing.assert_array_equal(y[1, :, j], matrix[2 * quad, group] | matrix[2 * quad + 1, group] << 16)


@pytest.mark.parametrize(("fault", "sentence"), [(1, "divergence"), (2, "divergence: lane")])
def test_a_product_by_part_of_a_warp_is_found(fault, sentence):
    zeros = np.zeros((16, 16), np.float32)
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=sentence):
            product("bfloat16", zeros, zeros[:, :8], zeros[:, :8], seed, fault, checks=["memory"])


def to_tf32(x):
    """float32 rounded to 10 fraction bits, ties away from zero, by the bits (finite values and infinities)."""
    return ((np.asarray(x, np.float32).view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


def tf32_product(a, b, c, seed=0, fault=0, checks=harness.CHECKS):
    arrays, outputs = {"a": a, "b": b, "c": c}, {"d": (c.shape, np.float32)}
    scalars = {"kernel": "tf32_product", "fault": fault}
    return run("tensor_core", arrays, outputs, scalars, seed, checks=checks)["d"]


def test_tf32_product_of_a_warp():
    rng = np.random.default_rng(1)
    a, b, c = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    # Whole numbers: exact, so that one misplaced element shows.
    numbers = np.arange(128.0).reshape(16, 8), np.arange(64.0).reshape(8, 8) - 30
    for left, right in ((a, b), numbers):
        exact = c + to_tf32(left).astype(np.float64) @ to_tf32(right).astype(np.float64)
        d = tf32_product(left.astype(np.float32), right.astype(np.float32), c)
        assert (np.abs(d - exact) <= 2.0**-24 * np.abs(exact)).all()  # the sum is rounded once


def test_rounding_to_tf32():
    rng = np.random.default_rng(2)
    x = rng.normal(size=1000).astype(np.float32) * np.float32(2) ** rng.integers(-120, 120, 1000)
    ties = (1 + (2 * np.arange(50) + 1) * 2.0**-11).astype(np.float32)
    x = np.concatenate([x, ties, -ties, [0.0, -0.0, np.inf, -np.inf]]).astype(np.float32)
    found = run("tensor_core", {"x": x}, {"y": (x.shape, np.float32)}, {"kernel": "rounded"})["y"]
    np.testing.assert_array_equal(found.view(np.uint32), to_tf32(x).view(np.uint32))
    np.testing.assert_array_equal(found[1000:1050], ties + np.float32(2.0**-11))  # away from zero
    # The reference rounds alike, in float32 and in float64.
    for dtype in (torch.float32, torch.float64):
        rounded = reference.round_to_tf32(torch.from_numpy(x).to(dtype))
        np.testing.assert_array_equal(rounded.float().numpy(), found)
    nan = np.array([np.nan, 0x7FFFFFFF, 0xFFFFFFFF], np.float32)
    nan[1:] = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    found = run("tensor_core", {"x": nan}, {"y": (nan.shape, np.float32)}, {"kernel": "rounded"})["y"]
    assert np.isnan(found).all() and reference.round_to_tf32(torch.from_numpy(nan)).isnan().all()


@pytest.mark.parametrize(("fault", "sentence"), [(1, "divergence"), (3, "was not rounded to TF32")])
def test_a_broken_tf32_product_is_found(fault, sentence):
    rng = np.random.default_rng(1)
    a, b, c = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=sentence):
            tf32_product(a, b, c, seed, fault, checks=["memory"])


THREADS, ROUNDS = 64, 7
SOUND, WAIT_TOO_SHORT, NO_BARRIER, STAGE_TOO_EARLY, NO_WAIT, PAST_THE_END = range(6)


def ring(fault, seed, checks=harness.CHECKS):
    x = np.random.default_rng(2).normal(size=THREADS * 4 * ROUNDS - 24).astype(np.float32)
    scalars = {"kernel": "ring", "rounds": ROUNDS, "fault": fault}
    return x, run("tensor_core", {"x": x}, {"y": ((THREADS * 4,), np.float32)}, scalars, seed, checks=checks)[
        "y"
    ]


def test_a_ring_of_copies():
    for seed in SEEDS:
        x, y = ring(SOUND, seed)
        rows = np.append(x, np.zeros(24, np.float32)).reshape(ROUNDS, THREADS, 4)
        wanted = np.zeros((THREADS, 4), np.float32)
        for row in rows:
            wanted = wanted + np.roll(row, -33, 0)
        np.testing.assert_array_equal(y, wanted.reshape(-1))


@pytest.mark.parametrize(
    ("fault", "check", "sentence"),
    [
        (WAIT_TOO_SHORT, "races", "which an asynchronous copy may still be writing"),
        (NO_BARRIER, "races", "may still be writing|race: .* of shared memory|has not written"),
        (STAGE_TOO_EARLY, "races", "may still be writing|race: .* of shared memory"),
        (NO_WAIT, "memory", "ends without waiting for its asynchronous copies"),
        (NO_WAIT, "races", "which an asynchronous copy may still be writing"),
        (PAST_THE_END, "memory", "AddressSanitizer"),
    ],
)
def test_a_broken_ring_is_caught_for_every_seed(fault, check, sentence):
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=sentence):
            ring(fault, seed, checks=[check])


def test_what_has_not_landed_is_not_a_number():
    for seed in SEEDS:
        _, y = ring(WAIT_TOO_SHORT, seed, checks=["memory"])
        assert np.isnan(y).any()
