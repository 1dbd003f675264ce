"""The emulated tensor-core products and asynchronous copies do what the PTX ISA says, and find their misuse."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_emulation import harness
from cuda_emulation.harness import EmulationError, from_bfloat16, run, to_bfloat16

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
