"""The emulation of CUDA on the CPU computes what CUDA would, and finds the faults it is there to find."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cuda_emulation import harness
from cuda_emulation.harness import EmulationError, run

SEEDS = range(20)
LANES = np.arange(32)


def self_test(kernel, arrays, outputs, seed=0, **scalars):
    return run("self_test", arrays, outputs, {"kernel": kernel, **scalars}, seed)


@pytest.mark.parametrize(("width", "argument"), list(itertools.product([8, 32], [0, 1, 5, 9, 31])))
def test_shuffles(width, argument):
    x = np.random.default_rng(0).integers(-1000, 1000, 32).astype(np.int32)
    y = self_test("shuffle", {"x": x}, {"y": ((4, 32), np.int32)}, width=width, argument=argument)["y"]
    start, lane = LANES // width * width, LANES % width
    up = np.where(lane - argument < 0, lane, lane - argument)
    down = np.where(lane + argument >= width, lane, lane + argument)
    across = np.where((lane ^ argument) >= width, lane, lane ^ argument)
    for row, source in zip(y, [np.full(32, argument % width), up, down, across], strict=True):
        np.testing.assert_array_equal(row, x[start + source])


@pytest.mark.parametrize(
    ("dtype", "width", "threads"), [(np.float32, 32, 96), (np.float64, 32, 64), (np.float32, 4, 32)]
)
def test_reductions_and_scans(dtype, width, threads):
    x = (
        np.random.default_rng(1).integers(-50, 50, threads).astype(dtype)
    )  # whole numbers: any order of sums is exact
    y = self_test("scan", {"x": x}, {"y": ((11, threads), dtype)}, seed=3, width=width)["y"]
    rows = x.reshape(-1, width)
    sums, largest = np.cumsum(rows, 1), np.maximum.accumulate(rows, 1)
    back_sums, back_largest = (
        np.cumsum(rows[:, ::-1], 1)[:, ::-1],
        np.maximum.accumulate(rows[:, ::-1], 1)[:, ::-1],
    )
    ends, least = np.zeros((len(rows), 1)), np.full((len(rows), 1), dtype(-1e30))
    expected = [
        np.repeat(rows.sum(1), width),
        np.repeat(rows.max(1), width),
        np.repeat(rows.min(1), width),
        sums,
        np.hstack([ends, sums[:, :-1]]),
        back_sums,
        np.hstack([back_sums[:, 1:], ends]),
        largest,
        np.hstack([least, largest[:, :-1]]),
        back_largest,
        np.hstack([back_largest[:, 1:], least]),
    ]
    for row, wanted in zip(y, expected, strict=True):
        np.testing.assert_array_equal(row, wanted.reshape(-1))


def test_exclusive_sum_keeps_infinities_apart():
    x = np.zeros(32, np.float32)
    x[7] = np.inf
    y = self_test("scan", {"x": x}, {"y": ((11, 32), np.float32)}, width=32)["y"]
    np.testing.assert_array_equal(y[4], np.where(LANES > 7, np.inf, 0))
    np.testing.assert_array_equal(y[6], np.where(LANES < 7, np.inf, 0))


@pytest.mark.parametrize("bits", [0, 1, 0x80000000, 0x00F0C001, 0xFFFFFFFF])
def test_votes(bits):
    x = (bits >> LANES & 1).astype(np.int32)
    y = self_test("vote", {"x": x}, {"y": ((5, 32), np.int32)})["y"]
    assert set(y[0].view(np.uint32)) == {bits}
    assert set(y[1]) == {int(bits != 0)}
    assert set(y[2]) == {int(bits == 0xFFFFFFFF)}
    np.testing.assert_array_equal(
        y[3].view(np.uint32), np.where(LANES < 16, bits & 0xFFFF, bits & 0xFFFF0000)
    )
    places = [lane for lane in range(32) if bits >> lane & 1]
    assert set(y[4]) == {len(places) * 10000 + places[0] * 100 + places[-1] if places else -1}


@pytest.mark.parametrize("seed", SEEDS)
def test_barriers_for_every_order(seed):
    x = np.random.default_rng(2).random((5, 70), np.float32)
    y = self_test("reverse", {"x": x}, {"y": (x.shape, x.dtype)}, seed, rounds=3)["y"]
    np.testing.assert_array_equal(y, ((x + np.float32(1)) + np.float32(1) + np.float32(1))[:, ::-1])


def test_the_portable_switch_runs_threads_in_the_same_order():
    x = np.random.default_rng(2).random((3, 70), np.float32)
    portable = ["MIPNERF_EMULATION_UCONTEXT"]
    outputs = {"y": (x.shape, x.dtype)}
    y = run("self_test", {"x": x}, outputs, {"kernel": "reverse", "rounds": 1}, 1, defines=portable)["y"]
    np.testing.assert_array_equal(y, x[:, ::-1] + np.float32(1))
    outputs = {"y": ((192,), np.int32), "next": np.zeros(1, np.int32)}
    np.testing.assert_array_equal(
        run("self_test", {}, outputs, {"kernel": "order"}, 2, defines=portable)["y"], orders(2)
    )


def test_barriers_count_only_threads_that_are_still_there():
    x = np.random.default_rng(3).random(45, np.float32)
    y = self_test("leave_early", {"x": x}, {"y": (x.shape, x.dtype)}, seed=5)["y"]
    np.testing.assert_array_equal(y, np.roll(x, -1))


def test_atomics():
    x = np.random.default_rng(4).integers(0, 4, 777).astype(np.int32)
    outputs = {"counts": np.zeros(4, np.int32), "sum": np.zeros(1, np.float32), "total": np.zeros(1)}
    outputs |= {"whole": np.zeros(1, np.int64), "most": np.zeros(1, np.uint32)}
    y = self_test("histogram", {"x": x}, outputs, seed=6)
    np.testing.assert_array_equal(y["counts"], np.bincount(x, minlength=4))
    assert y["sum"][0] == y["total"][0] == x.sum()
    assert y["whole"][0] == (int(x.sum()) << 40) - 777
    assert y["most"][0] == (np.arange(777, dtype=np.uint32) * np.uint32(2654435761)).max()


def test_three_dimensional_blocks():
    y = self_test("coordinates", {}, {"y": ((4, 12, 16), np.int32)}, seed=7)["y"]
    z, row, x = np.meshgrid(np.arange(4) % 2, np.arange(12) % 4, np.arange(16) % 8, indexing="ij")
    np.testing.assert_array_equal(y, (z * 4 + row) * 8 + x + 32000)


def orders(seed):
    return self_test("order", {}, {"y": ((192,), np.int32), "next": np.zeros(1, np.int32)}, seed)["y"]


def test_order_is_drawn_from_the_seed():
    drawn = [orders(seed) for seed in range(6)]
    for order in drawn:
        np.testing.assert_array_equal(np.sort(order), np.arange(192))
    assert len({order.tobytes() for order in drawn}) == len(drawn)
    assert len({tuple(order[::64] // 64) for order in drawn}) > 1, "blocks always come in the same order"
    np.testing.assert_array_equal(drawn[3], orders(3))


def awkward_floats():
    rng = np.random.default_rng(5)
    edges = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        65504,
        65519.99,
        65520,
        65536,
        3.4e38,
        2.0**-14,
        2.0**-24,
        2.0**-25,
        2.0**-149,
    ]
    edges += [
        1 + 2.0**-11,
        1 + 3 * 2.0**-11,
        1 + 2.0**-8,
        1 + 3 * 2.0**-8,
        2.0**-15 * (1 + 2.0**-10),
        5.96e-8,
        8.94e-8,
    ]
    random = rng.integers(0, 2**32, 4096 - len(edges), dtype=np.uint64).astype(np.uint32).view(np.float32)
    small = rng.normal(size=4096).astype(np.float32) * np.float32(2.0) ** rng.integers(-27, 17, 4096).astype(
        np.float32
    )
    x = np.concatenate([np.array(edges, np.float32), random, small])
    return x[~np.isnan(x)][:8184]


def test_half_conversion_agrees_with_numpy():
    x = awkward_floats()
    x = x[: len(x) // 8 * 8]
    with np.errstate(over="ignore"):
        wanted = x.astype(np.float16)
    y = self_test("convert", {"x": x}, {"narrow": (x.shape, np.float16), "wide": (x.shape, np.float32)})
    np.testing.assert_array_equal(y["narrow"].view(np.uint16), wanted.view(np.uint16))
    np.testing.assert_array_equal(y["wide"], wanted.astype(np.float32))


def test_bfloat16_conversion_agrees_with_torch():
    torch = pytest.importorskip("torch")
    x = awkward_floats()
    x = x[: len(x) // 8 * 8]
    wanted = torch.from_numpy(x).to(torch.bfloat16)
    y = self_test("convert", {"x": x}, {"narrow": (x.shape, np.uint16), "wide": (x.shape, np.float32)})
    np.testing.assert_array_equal(y["narrow"], wanted.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(y["narrow"], harness.to_bfloat16(x))
    np.testing.assert_array_equal(y["wide"], wanted.float().numpy())
    np.testing.assert_array_equal(y["wide"], harness.from_bfloat16(y["narrow"]))


def test_a_misaligned_vector_access_is_found():
    x = np.zeros(64, np.float32)
    outputs = {"narrow": (x.shape, np.float16), "wide": (x.shape, np.float32)}
    with pytest.raises(EmulationError, match="misaligned load of 16 bytes"):
        run("self_test", {"x": x}, outputs, {"kernel": "convert"}, misalign={"x": 4})
    run("self_test", {"x": x}, outputs, {"kernel": "convert"}, misalign={"x": 16})


# What the sentence must say, the check that says it, and the shape of the launch.
TWINS = {
    "missing_barrier": ("races", "race: .* of shared memory"),
    "missing_warp_sync": ("races", "race: .* of shared memory|has not written"),
    "missing_second_barrier": ("races", "race: .* of shared memory"),
    "off_by_one_shared": ("memory", "AddressSanitizer"),
    "off_by_one_global": ("memory", "AddressSanitizer"),
    "off_by_one_between_blocks": ("races", "race between blocks"),
    "mask_too_wide": ("memory", "divergence"),
    "mask_too_narrow": ("memory", "is not in the mask|is not taking part"),
    "stale_read": ("races", "which this block has not written"),
    "stale_round": ("races", "race: .* of shared memory"),
    "divergent_barrier": ("memory", "divergence"),
    "two_barriers": ("memory", "meet at different barriers"),
    "barrier_against_shuffle": ("memory", "divergence: no thread of the block can go on"),
    "lost_update": ("races", "race: .* of shared memory"),
    "halves_of_a_word": ("races", "race: .* of shared memory|has not written"),
}
BLOCKS, THREADS = 3, 64


def twin(kernel, fault, seed, checks=harness.CHECKS):
    x = np.random.default_rng(6).normal(size=BLOCKS * THREADS).astype(np.float32)
    n = {"off_by_one_global": x.size - 9, "stale_read": THREADS - 1}.get(kernel, 0)
    if kernel == "off_by_one_global":
        x = x[:n]
    sizes = {"missing_barrier": BLOCKS, "stale_read": BLOCKS, "lost_update": BLOCKS}
    sizes["off_by_one_between_blocks"] = BLOCKS * (THREADS - 1)
    scalars = {"kernel": kernel, "fault": int(fault), "blocks": BLOCKS, "threads": THREADS, "n": n}
    y = run(
        "broken_twins", {"x": x}, {"y": ((sizes.get(kernel, x.size),), x.dtype)}, scalars, seed, checks=checks
    )["y"]
    return x.reshape(BLOCKS, -1), y


def expected_of_twin(kernel, x):
    rows = np.arange(BLOCKS)
    if kernel == "missing_barrier":
        return x.astype(np.float64).sum(1)
    if kernel == "missing_warp_sync":
        return np.roll(x.reshape(-1, 32), -1, 1)
    if kernel == "missing_second_barrier":
        return np.roll(x, -4 * 33, 1)
    if kernel == "off_by_one_shared":
        return np.hstack([x[:, 1:] - x[:, :-1], np.zeros((BLOCKS, 1))])
    if kernel == "off_by_one_between_blocks":
        return x.reshape(-1)[: BLOCKS * (THREADS - 1)]
    if kernel == "mask_too_wide":
        return np.repeat(x.reshape(-1, 32)[:, :16].astype(np.float64).sum(1), 32)
    if kernel == "mask_too_narrow":
        return np.repeat(x.reshape(-1, 32).astype(np.float64).sum(1), 32)
    if kernel == "stale_read":
        n = THREADS - 1
        return np.array([x.reshape(-1)[r * n : r * n + n - r].astype(np.float64).sum() for r in rows])
    if kernel == "stale_round":
        return np.roll(2 * x[:, ::-1], -32, 1)
    if kernel in ("divergent_barrier", "two_barriers"):
        return np.roll(x, -1, 1)
    if kernel == "barrier_against_shuffle":
        return x.reshape(-1, 2)[:, ::-1]
    if kernel == "lost_update":
        return (x > 0).sum(1)
    if kernel == "halves_of_a_word":
        halves = harness.from_bfloat16(harness.to_bfloat16(x)).reshape(-1, 2)
        return np.repeat(halves.sum(1), 2)
    return x


@pytest.mark.parametrize("kernel", TWINS)
def test_sound_twin_passes_for_every_seed(kernel):
    for seed in SEEDS:
        x, y = twin(kernel, False, seed)
        # A sum of n float32 numbers in any order is off by at most n * 2^-24 times the sum of their sizes.
        bound = THREADS * 2.0**-24 * np.abs(x).sum(1).max()
        np.testing.assert_allclose(y, expected_of_twin(kernel, x).reshape(-1), rtol=0, atol=bound)


@pytest.mark.parametrize("kernel", TWINS)
def test_broken_twin_is_caught_for_every_seed(kernel):
    check, sentence = TWINS[kernel]
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=sentence) as caught:
            twin(kernel, True, seed, checks=[check])
        assert "emulate_broken_twins.cpp" in str(caught.value), "the message does not say where"


def test_a_write_to_an_input_is_found_by_either_check():
    x = np.zeros(64, np.float32)
    for check in harness.CHECKS:
        with pytest.raises(
            EmulationError, match=r"AddressSanitizer|writes to an input: byte \d+ of the array 'x'"
        ):
            run("self_test", {"x": x}, {}, {"kernel": "write_input"}, checks=[check])


def test_a_read_only_load_of_an_output_is_found():
    with pytest.raises(EmulationError, match="read-only path"):
        run("self_test", {}, {"y": np.zeros(64, np.float32)}, {"kernel": "read_only_load_of_output"})


def test_wrong_types_and_names_are_said():
    x = np.zeros(32)
    with pytest.raises(EmulationError, match="array 'x' is <f8, the program wants <i4"):
        self_test("vote", {"x": x}, {"y": ((5, 32), np.int32)})
    with pytest.raises(EmulationError, match="no scalar 'rounds' was given"):
        self_test("reverse", {"x": np.zeros((1, 32), np.float32)}, {"y": ((1, 32), np.float32)})


def test_a_compiler_without_address_sanitizer_is_an_error(tmp_path, monkeypatch):
    fake = tmp_path / "g++"
    answers = [
        "#!/bin/sh",
        'case "$*" in',
        '*-MM*) echo "a.o: $0";;',
        "*--version*) echo 1;;",
        "*) echo '/usr/bin/ld: cannot find libasan.so.8: No such file or directory' >&2; exit 1;;",
        "esac",
    ]
    fake.write_text("\n".join(answers) + "\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setattr(harness, "CACHE", tmp_path / "cache")
    harness._compile.cache_clear()
    harness.build.cache_clear()
    try:
        with pytest.raises(EmulationError, match="cannot link AddressSanitizer and UBSan"):
            harness.build("self_test")
        monkeypatch.setenv("CXX", str(tmp_path / "missing-compiler"))
        with pytest.raises(EmulationError, match="is not on this machine: install g"):
            harness.build("self_test")
    finally:
        harness._compile.cache_clear()
        harness.build.cache_clear()
