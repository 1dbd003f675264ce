"""Counter-based random numbers: the published known answers, distribution, independence of chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_emulation.harness import run

from mipnerf_fast import use_backend
from mipnerf_fast.counter_rng import (
    counter_index,
    counter_normal,
    counter_uint32,
    counter_uniform,
    philox4x32,
)

# From the kat_vectors file of the Random123 distribution: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], want: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox4x32((c0, c1, c2, c3), key)) == want


def test_rows_do_not_depend_on_their_chunk() -> None:
    rows = torch.arange(100)
    whole = counter_uniform(1, 2, 3, rows, 7)
    assert torch.equal(counter_uniform(1, 2, 3, rows[40:60], 7), whole[40:60])
    assert torch.equal(counter_uniform(1, 2, 3, rows, 5), whole[:, :5])


def test_every_part_of_the_key_matters() -> None:
    rows = torch.arange(8)
    base = counter_uint32(1, 2, 3, rows, 8)
    for seed, step, stream in ((2, 2, 3), (1 + 2**32, 2, 3), (1, 3, 3), (1, 2 + 2**32, 3), (1, 2, 4)):
        assert (counter_uint32(seed, step, stream, rows, 8) != base).float().mean() > 0.95
    assert torch.equal(counter_uint32(1, torch.tensor(2), 3, rows, 8), base)


def test_uniform_and_normal_have_their_moments() -> None:
    n = 400_000
    rows = torch.arange(n // 100)
    u = counter_uniform(5, 1, 0, rows, 100, torch.float64).flatten()
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) <= 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) <= 5 * (1 / 180 / n) ** 0.5
    z = counter_normal(5, 1, 0, rows, 100, torch.float64).flatten()
    assert abs(z.mean()) <= 5 / n**0.5 and abs(z.var() - 1) <= 5 * (2 / n) ** 0.5
    assert z.isfinite().all()
    # Neighbouring columns and neighbouring rows are uncorrelated.
    for a, b in ((u[:-1], u[1:]), (u[:-100], u[100:])):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) <= 5 / n**0.5


def test_float32_uniform_is_below_one() -> None:
    u = counter_uniform(0, 0, 0, torch.arange(2**14), 64)
    assert u.dtype == torch.float32 and u.max() < 1
    assert torch.equal(u * 2**24, (u * 2**24).round())


def test_index_reaches_every_value_equally() -> None:
    n, draws = 37, 200_000
    index = counter_index(9, 4, 1, torch.arange(draws), n)
    counts = torch.bincount(index, minlength=n)
    assert len(counts) == n
    chi2 = ((counts - draws / n) ** 2 / (draws / n)).sum()
    assert chi2 < 36 + 6 * (2 * 36) ** 0.5
    big = counter_index(9, 4, 1, torch.arange(1000), 2**39)
    assert big.max() > 2**38 and big.min() >= 0


SEEDS = (0, 20200823, 2**63, 2**64 - 1)
STEPS = (0, 1_000_000, 2**32 + 5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (1, 1), (7, 4), (300, 129)])
def test_the_kernel_gives_the_same_words(
    device: torch.device, seed: int, step: int, rows: int, columns: int
) -> None:
    numbers = 2**32 - 1 - 5 * torch.arange(rows, device=device)
    with use_backend("reference"):
        expected = counter_uint32(seed, step, 17, numbers, columns)
    assert torch.equal(counter_uint32(seed, step, 17, numbers, columns), expected)
    assert torch.equal(
        counter_uint32(seed, torch.tensor(step, device=device), 17, numbers, columns), expected
    )
    strided = torch.stack([numbers, numbers], 1)[:, 0]
    assert torch.equal(counter_uint32(seed, step, 17, strided, columns), expected)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (70, 5)])
def test_the_cuda_kernel_gives_the_same_words(rows: int, columns: int) -> None:
    numbers = np.arange(rows, dtype=np.int64) + 2**31
    step = np.array([2**32 + 3], dtype=np.int64)
    arrays, outputs = {"step": step, "rows": numbers}, {"words": ((rows, columns), np.int64)}
    for seed in range(2):
        found = run("counter_words", arrays, outputs, {"seed": 20200823, "stream": 16}, seed)["words"]
        expected = counter_uint32(20200823, int(step[0]), 16, torch.from_numpy(numbers), columns)
        np.testing.assert_array_equal(found, expected.numpy())


def test_wrong_arguments_of_the_operator_are_named() -> None:
    words = torch.ops.mipnerf_fast.counter_words.default
    rows, step = torch.arange(3), torch.tensor(1)
    with pytest.raises(RuntimeError, match=r"counter_words: rows must be of shape \[R\]"):
        words(0, step, 0, rows[None], 1)
    with pytest.raises(RuntimeError, match=r"counter_words: rows must be .*got float32"):
        words(0, step, 0, rows.float(), 1)
    with pytest.raises(RuntimeError, match=r"counter_words: step must be of shape \[\]"):
        words(0, rows, 0, rows, 1)
    with pytest.raises(RuntimeError, match="counter_words: columns must be 0 or more, got -1"):
        words(0, step, 0, rows, -1)
    torch.library.opcheck(words, (0, step, 0, rows, 5))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="seed must be in"):
        counter_uint32(-1, 0, 0, torch.arange(1), 1)
    with pytest.raises(ValueError, match="n must be in"):
        counter_index(0, 0, 0, torch.arange(1), 0)
