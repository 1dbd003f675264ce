"""Matrix products with the epilogues that the folded network needs, and what computes them.

One interface, three implementations: cuBLASLt on a GPU (`CublasLt`), the same arithmetic and the same rules on the CPU
(`CublasLtTwin`: slow, for checks), and torch's own products in place (`TorchGemm`: the CPU engine). The folded network
is written over the interface, so that the algebra that runs on a GPU is the one that the CPU executes.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _native
from .registration import register_without_derivative

# cuBLASLt counts the leading dimension of a ReLU mask in bits, and wants a multiple of this.
_MASK_ROW_BITS = 128
# What a cuBLASLt product may use beside its operands, bytes; NVIDIA's advice for Hopper, more than enough elsewhere.
_WORKSPACE_BYTES = 32 << 20

# Above so many outputs of a layer the CPU does its rows in parts, so that what does not outlast them takes less memory,
# and stays in the cache: eighths, but no fewer outputs at a time than these: a smaller product is not worth two threads
# (8 parts of 512 x 64 took 1.4 times as long as one). Rows that go down together free what was kept of them instead.
_TOGETHER = 1 << 18
_FEWEST_OUTPUTS = 1 << 17

# Numbers of a row that an AMX product takes at a time.
_AMX_COLUMNS = 32

# Looking it up takes as long as a small product.
_threshold_backward = torch.ops.aten.threshold_backward.grad_input

# Epilogues as csrc/mlp/gemm_cublaslt.cpp numbers and names them.
_NONE, _BIAS, _RELU, _RELU_BIAS, _RELU_MASK, _RELU_MASK_BIAS, _DRELU, _COLUMN_SUMS = range(8)
_EPILOGUES = (
    "none",
    "bias",
    "ReLU",
    "bias and ReLU",
    "ReLU and mask",
    "bias, ReLU and mask",
    "ReLU's mask",
    "column sums",
)


class Gemm(Protocol):
    """Products of row-major matrices whose rows are contiguous; rows and columns of a larger matrix are allowed.

    dtype: of the operands: activations, weights and deltas. Sums are float32 or wider. An `out` of the operands' dtype
    is rounded once.
    align: rows of narrow matrices are padded with zeros to a multiple of this.
    bit_masks: whether the backward pass of a ReLU takes a mask from `new_mask`; otherwise it takes the activation.
    """

    dtype: torch.dtype
    align: int
    bit_masks: bool

    def rows_at_a_time(self, rows: int, width: int, training: bool) -> int:
        """Of so many rows, how many are worth doing together through all layers, of so many outputs each.

        training: in the passes of a training step, which keep the outputs of all layers.
        """
        ...

    def new_mask(self, out: Tensor) -> Tensor:
        """An empty mask for the ReLU of a product like `out` [R, N]; its rows go with those of `out`."""
        ...

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor | None = None,
        *,
        beta: float = 0.0,
        bias: Tensor | None = None,
        relu: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """out [R, N] = x [R, K] weight [N, K]^T + beta out + bias, then the ReLU; `mask` keeps where it passed.

        The bias is [N], or [rays, N] with a row for every run of R / rays rows. It has the dtype of `out`, and without
        an `out` decides about that of the new one; beta is zero where there is a bias, or one or zero.
        """
        ...

    def grad_input(
        self,
        delta: Tensor,
        weight: Tensor,
        out: Tensor | None = None,
        *,
        beta: float = 0.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """out [R, K] = delta [R, N] weight [N, K] + beta out, and zero where the ReLU behind `mask` was."""
        ...

    def grad_weight(self, delta: Tensor, x: Tensor, total: Tensor | None = None) -> Tensor:
        """total [N, K] with delta [R, N]^T x [R, K] added, in place, or without a total the product itself.

        Sums are float32 (float64 with float64 operands).
        """
        ...

    def grad_layer(
        self, delta: Tensor, x: Tensor, totals: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same, and the column sums [N] of delta: a layer's gradients of weight and bias."""
        ...

    def sums(self, delta: Tensor, dim: int) -> Tensor:
        """Of delta over a dimension, as the gradients of a bias are."""
        ...


class TorchGemm:
    """torch's products (MKL and oneDNN on a CPU) written into their outputs, the epilogues in place after them.

    The ReLU needs no mask: its output tells where it passed. With bfloat16 operands a weight's gradient is the float32
    sum of the products of every chunk of rows, each rounded to bfloat16.
    """

    align = 1
    bit_masks = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._sums = torch.float64 if dtype == torch.float64 else torch.float32
        # 2^12 rows of 256 floats are 4 MB, about a core's second-level cache: of 2^9 to 2^14 the fastest or near it.
        self.chunk_rows = 1 << 12

    def rows_at_a_time(self, rows: int, width: int, training: bool) -> int:
        """See `Gemm.rows_at_a_time`."""
        if rows * width <= _TOGETHER:
            return self.chunk_rows
        if self.dtype == torch.bfloat16:
            # Products take a seventh of the time there, what is around them does not, and rows take half of the room:
            # a training step of 2^12 samples takes 0.6 of the time that it does in the parts below.
            return 4 * self.chunk_rows if training else min(self.chunk_rows, max(1, rows // 2))
        return min(self.chunk_rows, max(_FEWEST_OUTPUTS // width, rows // 8))

    def new_mask(self, out: Tensor) -> Tensor:
        """`out` itself."""
        return out

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor | None = None,
        *,
        beta: float = 0.0,
        bias: Tensor | None = None,
        relu: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """See `Gemm.forward`."""
        del mask
        like = bias if out is None else out
        if like is not None and like.dtype != x.dtype:
            # The heads: a few columns of raw outputs, which stay float32.
            x, weight = x.to(like.dtype), weight.to(like.dtype)
        x = _with_numbers_behind(x)
        if bias is not None and bias.dim() == 2:
            # It is what the products are added to.
            if out is None:
                out = bias.repeat_interleave(x.shape[0] // bias.shape[0], 0)
            else:
                out.unflatten(0, (len(bias), -1)).copy_(bias.unsqueeze(1))
            out.addmm_(x, weight.t())
        elif out is None:
            out = torch.nn.functional.linear(x, weight, bias)
        elif beta == 1:
            out.addmm_(x, weight.t())
        elif bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)
        return out.relu_() if relu else out

    def grad_input(
        self,
        delta: Tensor,
        weight: Tensor,
        out: Tensor | None = None,
        *,
        beta: float = 0.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """See `Gemm.grad_input`."""
        if out is None:
            out = torch.mm(_with_numbers_behind(delta), weight)
        else:
            if out.dtype != delta.dtype:
                delta, weight = delta.to(out.dtype), weight.to(out.dtype)
            delta = _with_numbers_behind(delta)
            if beta == 1:
                out.addmm_(delta, weight)
            else:
                torch.mm(delta, weight, out=out)
        return out if mask is None else _threshold_backward(out, mask, 0, grad_input=out)

    def grad_weight(self, delta: Tensor, x: Tensor, total: Tensor | None = None) -> Tensor:
        """See `Gemm.grad_weight`."""
        # With few samples a call that does nothing counts too.
        wide = self._sums == self.dtype
        if total is None:
            product = torch.mm(delta.t(), x)
            return product if wide else product.to(self._sums)
        return total.addmm_(delta.t(), x) if wide else total.add_(torch.mm(delta.t(), x))

    def grad_layer(
        self, delta: Tensor, x: Tensor, totals: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Gemm.grad_layer`."""
        sums = self.sums(delta, 0)
        if totals is None:
            return self.grad_weight(delta, x), sums
        return self.grad_weight(delta, x, totals[0]), totals[1].add_(sums)

    def sums(self, delta: Tensor, dim: int) -> Tensor:
        """See `Gemm.sums`."""
        # Asked for the wider dtype torch would copy the deltas to it first. It adds in it anyway, and rounds the sum.
        sums = torch.sum(delta, dim)
        return sums if self._sums == self.dtype else sums.to(self._sums)


def _with_numbers_behind(x: Tensor) -> Tensor:
    """Rows that a bfloat16 product may read beyond their end; copied where something else lies there.

    With AMX oneDNN 3.12 (torch 2.13) reads whole multiples of 32 columns and multiplies those behind the last by zero,
    which a NaN there outlives (its issue 5717). Behind a row of the copy is the next one.
    """
    if x.dtype != torch.bfloat16 or x.shape[1] % _AMX_COLUMNS == 0 or x.stride(0) == x.shape[1]:
        return x
    return x.contiguous()


class CublasLtTwin:
    """cuBLASLt's arithmetic on the CPU: rounded operands, float32 sums, one rounding of the result, bit masks.

    It refuses what cuBLASLt does: a bias of another dtype than the result's, operands of the wrong dtype, a mask of
    the wrong shape.
    """

    align = 8
    bit_masks = True

    def __init__(self, dtype: torch.dtype, chunk_rows: int = 1 << 18) -> None:
        self.dtype = dtype
        self.chunk_rows = chunk_rows

    def rows_at_a_time(self, rows: int, width: int, training: bool) -> int:
        """See `Gemm.rows_at_a_time`."""
        return self.chunk_rows

    def new_mask(self, out: Tensor) -> Tensor:
        """[R, bytes]: a bit per element, rows padded to whole multiples of 128 bits."""
        return new_bit_mask(out)

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor | None = None,
        *,
        beta: float = 0.0,
        bias: Tensor | None = None,
        relu: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """See `Gemm.forward`."""
        self._check(x, weight)
        out = _room(x, len(weight), out, bias)
        if bias is not None and bias.dtype != out.dtype:
            raise TypeError(f"gemm: bias must be {out.dtype} as the result, got {bias.dtype}")
        beta, bias = _added_first(out, beta, bias)
        total = torch.mm(x.float(), weight.float().t())
        if beta:
            total += beta * out.float()
        if bias is not None:
            total += bias.float()
        if mask is not None:
            _set_bits(mask, total > 0)
        if relu:
            total.relu_()
        return out.copy_(total)

    def grad_input(
        self,
        delta: Tensor,
        weight: Tensor,
        out: Tensor | None = None,
        *,
        beta: float = 0.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """See `Gemm.grad_input`."""
        self._check(delta, weight)
        out = _room(delta, weight.shape[1], out)
        total = torch.mm(delta.float(), weight.float())
        if beta:
            total += beta * out.float()
        if mask is not None:
            total *= _bits(mask, out.shape[1])
        return out.copy_(total)

    def grad_weight(self, delta: Tensor, x: Tensor, total: Tensor | None = None) -> Tensor:
        """See `Gemm.grad_weight`."""
        self._check(delta, x)
        product = torch.mm(delta.float().t(), x.float())
        return product if total is None else total.add_(product)

    def grad_layer(
        self, delta: Tensor, x: Tensor, totals: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Gemm.grad_layer`."""
        sums = self.sums(delta, 0)
        if totals is None:
            return self.grad_weight(delta, x), sums
        return self.grad_weight(delta, x, totals[0]), totals[1].add_(sums)

    def sums(self, delta: Tensor, dim: int) -> Tensor:
        """See `Gemm.sums`."""
        return torch.sum(delta, dim, dtype=torch.float32)

    def _check(self, *operands: Tensor) -> None:
        for operand in operands:
            if operand.dtype != self.dtype:
                raise TypeError(f"gemm: operands must be {self.dtype}, got {operand.dtype}")


class CublasLt:
    """cuBLASLt: bias, ReLU and its bit mask, its backward pass and the column sums are done by the products themselves.

    A bias is rounded to the dtype of the result, as cuBLASLt wants it; column sums are float32. Where cuBLASLt has no
    algorithm with an epilogue, as may be on older GPUs, it does the product alone and torch the rest, with the same
    roundings, and a warning says so. Source: NVIDIA's cuBLAS documentation, cublasLtEpilogue_t;
    csrc/mlp/gemm_cublaslt.cpp. It has not run on a GPU.
    """

    align = 8
    bit_masks = True

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def rows_at_a_time(self, rows: int, width: int, training: bool) -> int:
        """See `Gemm.rows_at_a_time`: enough that a product fills any GPU, and few enough that the deltas stay small."""
        return 1 << 18

    def new_mask(self, out: Tensor) -> Tensor:
        """[R, bytes], laid out as cuBLASLt likes."""
        return new_bit_mask(out)

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor | None = None,
        *,
        beta: float = 0.0,
        bias: Tensor | None = None,
        relu: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """See `Gemm.forward`."""
        out = _room(x, len(weight), out, bias)
        beta, bias = _added_first(out, beta, bias)
        plain, biased = (_NONE, _BIAS)
        if relu:
            plain, biased = (_RELU, _RELU_BIAS) if mask is None else (_RELU_MASK, _RELU_MASK_BIAS)
        epilogue = plain if bias is None else biased
        self._run(x, weight, out, False, True, beta, epilogue, bias, mask)
        return out

    def grad_input(
        self,
        delta: Tensor,
        weight: Tensor,
        out: Tensor | None = None,
        *,
        beta: float = 0.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """See `Gemm.grad_input`."""
        out = _room(delta, weight.shape[1], out)
        self._run(delta, weight, out, False, False, beta, _NONE if mask is None else _DRELU, None, mask)
        return out

    def grad_weight(self, delta: Tensor, x: Tensor, total: Tensor | None = None) -> Tensor:
        """See `Gemm.grad_weight`."""
        return self._grad_weight(delta, x, total, _NONE, None)

    def grad_layer(
        self, delta: Tensor, x: Tensor, totals: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Gemm.grad_layer`."""
        sums = delta.new_empty(delta.shape[1], dtype=torch.float32)
        if totals is None:
            return self._grad_weight(delta, x, None, _COLUMN_SUMS, sums), sums
        return self._grad_weight(delta, x, totals[0], _COLUMN_SUMS, sums), totals[1].add_(sums)

    def sums(self, delta: Tensor, dim: int) -> Tensor:
        """See `Gemm.sums`."""
        return torch.sum(delta, dim, dtype=torch.float32)

    def _grad_weight(
        self, delta: Tensor, x: Tensor, total: Tensor | None, epilogue: int, vector: Tensor | None
    ) -> Tensor:
        beta = 0.0 if total is None else 1.0
        if total is None:
            total = delta.new_empty(delta.shape[1], x.shape[1], dtype=torch.float32)
        self._run(delta, x, total, True, False, beta, epilogue, vector, None)
        return total

    def _run(
        self,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        transpose_a: bool,
        transpose_b: bool,
        beta: float,
        epilogue: int,
        vector: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        options = (transpose_a, transpose_b, beta, epilogue, vector, mask)
        if not _cublaslt(a, b, out, *options, self._workspace):
            self._run_apart(a, b, out, *options)

    def _run_apart(self, a: Tensor, b: Tensor, out: Tensor, *options: Any) -> None:
        """The same without cuBLASLt's epilogue: the product in float32, then torch's operators, one rounding."""
        transpose_a, transpose_b, beta, epilogue, vector, mask = options
        warnings.warn(
            f'gemm: cuBLASLt has no algorithm for {out.shape[1]} columns with the epilogue "{_EPILOGUES[epilogue]}" on '
            "this GPU: torch does what is missing, slower",
            stacklevel=2,
        )
        plain = (transpose_a, transpose_b, beta, _NONE, None, None)
        if epilogue == _NONE:
            product = (a.t() if transpose_a else a).float() @ (b.t() if transpose_b else b).float()
            out.copy_(product.add_(out, alpha=beta) if beta else product)
            return
        if epilogue == _COLUMN_SUMS:
            self._run(a, b, out, *plain)
            torch.sum(a, 0, dtype=vector.dtype, out=vector)
            return
        total = out
        if out.dtype != torch.float32:
            total = out.float() if beta else out.new_empty(out.shape, dtype=torch.float32)
        self._run(a, b, total, *plain)
        if epilogue == _DRELU:
            total *= _bits(mask, out.shape[1])
        elif vector is not None:
            total += vector
        if epilogue in (_RELU_MASK, _RELU_MASK_BIAS):
            _set_bits(mask, total > 0)
        if epilogue not in (_BIAS, _DRELU):
            total.relu_()
        if total is not out:
            out.copy_(total)


def _room(x: Tensor, columns: int, out: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """The result to write: a new one where none is given, of the bias's dtype, or x's without one."""
    if out is not None:
        return out
    return x.new_empty(x.shape[0], columns, dtype=x.dtype if bias is None else bias.dtype)


def _added_first(out: Tensor, beta: float, bias: Tensor | None) -> tuple[float, Tensor | None]:
    """Biases that are no epilogue, those of rays and of the few columns of the heads, become what is added to."""
    if bias is None or (bias.dim() == 1 and bias.dtype != torch.float32):
        return beta, bias
    rows = bias.unsqueeze(1) if bias.dim() == 2 else bias
    (out.unflatten(0, (len(bias), -1)) if bias.dim() == 2 else out).copy_(rows)
    return 1.0, None


def new_bit_mask(out: Tensor) -> Tensor:
    """An empty mask of a bit per element of `out`, rows padded to whole multiples of 128 bits."""
    rows, columns = out.shape
    bits = -(-columns // _MASK_ROW_BITS) * _MASK_ROW_BITS
    return torch.empty(rows, bits // 8, dtype=torch.uint8, device=out.device)


def _set_bits(mask: Tensor, passed: Tensor) -> None:
    padded = torch.nn.functional.pad(passed, (0, 8 * mask.shape[1] - passed.shape[1])).unflatten(1, (-1, 8))
    torch.sum(padded.byte() << _places(mask), -1, dtype=torch.uint8, out=mask)


def _bits(mask: Tensor, columns: int) -> Tensor:
    """Zeros and ones [R, columns]."""
    return ((mask.unsqueeze(-1) >> _places(mask)) & 1).flatten(1)[:, :columns]


def _places(mask: Tensor) -> Tensor:
    """Of a byte's bits, the lowest first."""
    return torch.arange(8, dtype=torch.uint8, device=mask.device)


def has_cublaslt() -> bool:
    """Whether the library was built with the products over cuBLASLt."""
    return _cublaslt is not None


_cublaslt: Any = None
if any(source.endswith("gemm_cublaslt.cpp") for source in _native.build_info().get("sources", ())):
    _cublaslt = torch.ops.mipnerf_fast.gemm_cublaslt.default
    # Whether there is an algorithm is known when it runs.
    register_without_derivative("gemm_cublaslt", lambda *_: True, "ops.mlp_folded.folded_mlp")
