"""The emulation of Hopper's warpgroup products, bulk copies, barriers and clusters: right, and finds faults."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_emulation.harness import CHECKS, from_bfloat16, run, to_bfloat16

SEEDS = range(20)
WIDTHS = (8, 32, 40, 48, 64, 72, 96, 128, 136, 256)
CHUNKS = 6


def self_test(arrays, outputs, seed=0, checks=("memory",), **scalars):
    return run("hopper_self_test", arrays, outputs, scalars, seed, checks=checks)


@pytest.mark.parametrize("mode", ["registers", "k", "mn"])
@pytest.mark.parametrize("kind", ["bfloat16", "half"])
def test_products_are_plain_matrix_products(mode, kind):
    rng = np.random.default_rng(0)
    for i, width in enumerate(WIDTHS):
        # Whole numbers up to 8: every sum is exact in float32, and no other placement gives the same.
        a, b = rng.integers(-8, 9, (64, 48)), rng.integers(-8, 9, (width, 48))
        c = rng.integers(-99, 99, (64, width)) if i % 2 else None
        of_kind = {
            "bfloat16": lambda x: to_bfloat16(x.astype(np.float32)),
            "half": lambda x: x.astype(np.float16),
        }
        arrays = {"a": of_kind[kind](a), "b": of_kind[kind](b)}
        arrays["c"] = None if c is None else c.astype(np.float32)
        checks = CHECKS if width in (8, 72) else ("memory",)
        d = self_test(arrays, {"d": ((64, width), np.float32)}, i, checks, what="product", mode=mode)["d"]
        np.testing.assert_array_equal(d, a @ b.T + (0 if c is None else c))


def test_descriptors_there_and_back():
    rng = np.random.default_rng(1)
    fields = rng.integers(0, 2**14 - 2, (500, 4)).astype(np.uint32) * 16
    fields[:, 3] = rng.integers(0, 4, 500)
    outputs = {"words": ((500,), np.uint64), "back": (fields.shape, np.uint32)}
    y = self_test({"fields": fields}, outputs, what="descriptors")
    np.testing.assert_array_equal(y["back"], fields)
    wide = fields.astype(np.uint64)
    wanted = wide[:, 0] >> 4 | wide[:, 1] >> 4 << 16 | wide[:, 2] >> 4 << 32 | wide[:, 3] << 62
    np.testing.assert_array_equal(y["words"], wanted)


# Numbers as in the program's enumeration, the check, and what the sentence must say. Which of a fault's
# consequences comes first depends on the order that was drawn.
FAULTS = {
    "reads before the wait": (1, "memory", "wrong numbers"),
    "releases before the wait": (2, "memory", "a bulk copy replaces .* a product of warpgroup"),
    "wrong parity": (3, "memory", "a bulk copy may be under way|a bulk copy replaces|divergence: no thread"),
    "no wait for empty": (4, "memory", "a bulk copy replaces|more arrivals"),
    "wrong stride": (5, "memory", "wrong numbers"),
    "stale stage": (6, "memory", "a bulk copy replaces|wrong numbers"),
    "no proxy fence": (7, "races", "without a proxy_fence"),
    "no wgmma_fence": (8, "memory", "touched since the last wgmma_fence"),
    "diverges": (9, "memory", "divergence"),
    "writes accumulators": (10, "memory", "wrote to the accumulators"),
    "writes operand": (11, "memory", "wrote to operand A"),
    "ends early": (12, "memory", "may end before|has ended|ends while"),
    "forgets its peer": (13, "memory", "a bulk copy replaces|more arrivals|divergence: no thread"),
    "uses a barrier early": (14, "memory", "no barrier between its initialisation|there is no barrier"),
    "forgets bytes": (
        15,
        "memory",
        "fewer bytes were expected|bytes outstanding|divergence: no thread|a bulk copy",
    ),
    "no barrier before the product": (16, "races", "race: a product reads"),
}


def pipeline(fault, seed, checks=CHECKS):
    rng = np.random.default_rng(2)
    x = to_bfloat16(rng.normal(size=(64, 16)).astype(np.float32))
    w = to_bfloat16(rng.normal(size=(CHUNKS, 64, 16)).astype(np.float32))
    # Core matrices of 8 columns x 8 k: octets of columns first, then of k.
    packed = w.reshape(CHUNKS, 8, 8, 2, 8).transpose(0, 3, 1, 2, 4).reshape(CHUNKS, -1)
    outputs = {"y": ((4, 64, 64), np.float32)}
    arrays = {"x": x, "w": np.ascontiguousarray(packed).view(np.uint8)}
    y = self_test(arrays, outputs, seed, checks, what="pipeline", fault=fault)["y"]
    terms = np.einsum("rk,cnk->cnrk", from_bfloat16(x).astype(float), from_bfloat16(w).astype(float))
    # 96 products summed in float32 in any order: 96 * 2^-24 of the sum of their sizes.
    return y, terms.sum((0, 3)).T, 96 * 2.0**-24 * np.abs(terms).sum((0, 3)).max()


def check_pipeline(fault, seed, checks=CHECKS):
    y, wanted, bound = pipeline(fault, seed, checks)
    assert np.abs(y - wanted).max() <= bound, "wrong numbers"


@pytest.mark.parametrize("seed", SEEDS)
def test_sound_pipeline_for_every_seed(seed):
    check_pipeline(0, seed)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught_for_every_seed(fault):
    number, check, sentence = FAULTS[fault]
    for seed in SEEDS:
        with pytest.raises(AssertionError, match=sentence):
            check_pipeline(number, seed, [check])
