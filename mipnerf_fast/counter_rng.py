"""Counter-based random numbers: the same for any device, chunking or number of ranks, with no state to save.

Every number is a function of (seed, step, stream, row, element). A row is the global index of a ray, so the numbers
of a ray do not depend on which chunk or process handles it, and a resumed run needs only its step number.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox 4x32-10).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from .backend import current_backend

# Streams: one per use within a step. Level k of a model adds k.
PIXELS, IMAGES, FENCEPOSTS, NOISE, FAST_RAYS, OCCUPANCY = 0, 1, 16, 32, 48, 49

_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

# The devices whose words a kernel computes; elsewhere they take some hundred small operations. A library that was built
# before there was this operator has none.
_HAS_KERNEL = _native.available() and hasattr(torch.ops.mipnerf_fast, "counter_words")
_KERNELS = (("cpu", "cuda") if _native.build_info().get("cuda") else ("cpu",)) if _HAS_KERNEL else ()


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four 32-bit words from a counter of four words and a key of two.

    Args:
        counter: four int64 tensors that broadcast together, values in [0, 2^32).
        key: two integers in [0, 2^32).

    Returns:
        Four int64 tensors with values in [0, 2^32).

    Source: Salmon et al. 2011; checked against the published known answers.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two 32-bit numbers wraps to the right 64 bits in int64; >> keeps the sign, & removes it.
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def as_int64(seed: int) -> int:
    """A seed in [0, 2^64) by the same bits in [-2^63, 2^63), as operators take it; ValueError for any other number."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def counter_uint32(seed: int, step: int | Tensor, stream: int, rows: Tensor, columns: int) -> Tensor:
    """Random 32-bit words, one row per ray.

    Args:
        seed: of the run, in [0, 2^64).
        step: of the optimiser, an int or a 0-d int64 tensor (so that a captured step can advance it).
        stream: which use within the step (pixels, coarse fenceposts, fine fenceposts, noise, ...).
        rows: int64 [R], global ray indices, below 2^32.
        columns: how many words each row needs.

    Returns:
        int64 [R, columns] with values in [0, 2^32), on rows' device; the same from the kernel (csrc/counter_words) and
        from the lines below it.
    """
    signed = as_int64(seed)
    blocks = (columns + 3) // 4
    device = rows.device
    step_word = torch.as_tensor(step, dtype=torch.int64, device=device)
    if device.type in _KERNELS and current_backend() != "reference":
        found: Tensor = torch.ops.mipnerf_fast.counter_words.default(signed, step_word, stream, rows, columns)
        return found
    block = torch.arange(blocks, device=device)[None, :]
    counter = (
        block,
        rows[:, None],
        step_word & _MASK,
        torch.full((), stream, dtype=torch.int64, device=device) ^ ((step_word >> 32) << 16 & _MASK),
    )
    words = philox4x32(counter, (seed & _MASK, seed >> 32))
    return torch.stack(words, -1).reshape(rows.shape[0], 4 * blocks)[:, :columns]


def counter_uniform(
    seed: int,
    step: int | Tensor,
    stream: int,
    rows: Tensor,
    columns: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-24 so that float32 holds them exactly: [R, columns]."""
    return ((counter_uint32(seed, step, stream, rows, columns) >> 8) * 2.0**-24).to(dtype)


def counter_normal(
    seed: int,
    step: int | Tensor,
    stream: int,
    rows: Tensor,
    columns: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers by the Box-Muller transform, sqrt(-2 ln u) cos(2 pi v): [R, columns]."""
    words = counter_uint32(seed, step, stream, rows, 2 * columns).to(torch.float64)
    u, v = (words[:, 0::2] + 1.0) * 2.0**-32, words[:, 1::2] * 2.0**-32
    return (torch.sqrt(-2.0 * torch.log(u)) * torch.cos(2.0 * torch.pi * v)).to(dtype)


def counter_index(seed: int, step: int | Tensor, stream: int, rows: Tensor, n: int) -> Tensor:
    """One index in [0, n) per row: int64 [R]; the bias of the modulus is below n / 2^62."""
    if not 1 <= n < 2**40:
        raise ValueError(f"counter_index: n must be in [1, 2^40), got {n}")
    words = counter_uint32(seed, step, stream, rows, 2)
    return ((words[:, 0] >> 2) * 2**32 + words[:, 1]) % n


class CounterRandom:
    """The random numbers of one batch of rays in one step; `MipNerf` accepts it as its `generator`.

    Args:
        seed: of the run.
        step: of the optimiser.
        rows: int64 [B], the global indices of the rays in the batch.
    """

    def __init__(self, seed: int, step: int | Tensor, rows: Tensor) -> None:
        self.seed, self.step, self.rows = seed, step, rows

    def uniform(self, stream: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Uniform numbers in [0, 1): [B, columns]."""
        return counter_uniform(self.seed, self.step, stream, self.rows, columns, dtype)

    def normal(self, stream: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Standard normal numbers: [B, columns]."""
        return counter_normal(self.seed, self.step, stream, self.rows, columns, dtype)


Generator = torch.Generator | CounterRandom | None


def _fake_words(seed: int, step: Tensor, stream: int, rows: Tensor, columns: int) -> Tensor:
    return rows.new_empty(rows.shape[0], columns)


if _HAS_KERNEL:
    torch.library.register_fake("mipnerf_fast::counter_words", _fake_words)


def draw_uniform(generator: Generator, stream: int, columns: int, like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) for every row of like [B, .]: [B, columns] in its dtype and device."""
    if isinstance(generator, CounterRandom):
        return generator.uniform(stream, columns, like.dtype)
    return torch.rand(like.shape[0], columns, dtype=like.dtype, device=like.device, generator=generator)


def draw_normal(generator: Generator, stream: int, columns: int, like: Tensor) -> Tensor:
    """Standard normal numbers for every row of like [B, .]: [B, columns] in its dtype and device."""
    if isinstance(generator, CounterRandom):
        return generator.normal(stream, columns, like.dtype)
    return torch.randn(like.shape[0], columns, dtype=like.dtype, device=like.device, generator=generator)
