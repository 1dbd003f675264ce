"""Matrix products with the epilogues that the folded network needs, and what computes them.

One interface, three implementations: cuBLASLt on a GPU (`CublasLt`), the same arithmetic and the same rules on the CPU
(`CublasLtTwin`: slow, for checks), and torch's own products in place (`TorchGemm`: the CPU engine). The folded network
is written over the interface, so that the algebra that runs on a GPU is the one that the CPU executes.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import _native

# cuBLASLt counts the leading dimension of a ReLU mask in bits, and wants a multiple of this.
_MASK_ROW_BITS = 128
# What a cuBLASLt product may use beside its operands, bytes; NVIDIA's advice for Hopper, more than enough elsewhere.
_WORKSPACE_BYTES = 32 << 20

# Epilogues as csrc/mlp/gemm_cublaslt.cpp numbers them.
_NONE, _BIAS, _RELU, _RELU_BIAS, _RELU_MASK, _RELU_MASK_BIAS, _DRELU, _COLUMN_SUMS = range(8)


class Gemm(Protocol):
    """Products of row-major matrices whose rows are contiguous; rows and columns of a larger matrix are allowed.

    dtype: of the operands: activations, weights and deltas. Sums are float32 or wider. An `out` of the operands' dtype
    is rounded once.
    align: rows of narrow matrices are padded with zeros to a multiple of this.
    chunk_rows: rows worth doing at a time through all layers.
    bit_masks: whether the backward pass of a ReLU takes a mask from `new_mask`; otherwise it takes the activation.
    """

    dtype: torch.dtype
    align: int
    chunk_rows: int
    bit_masks: bool

    def new_mask(self, out: Tensor) -> Tensor:
        """An empty mask for the ReLU of a product like `out` [R, N]; its rows go with those of `out`."""
        ...

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        beta: float = 0.0,
        bias: Tensor | None = None,
        relu: bool = False,
        mask: Tensor | None = None,
    ) -> None:
        """out [R, N] = x [R, K] weight [N, K]^T + beta out + bias [N], then the ReLU; `mask` keeps where it passed.

        A bias has the dtype of `out`.
        """
        ...

    def grad_input(
        self, delta: Tensor, weight: Tensor, out: Tensor, *, beta: float = 0.0, mask: Tensor | None = None
    ) -> None:
        """out [R, K] = delta [R, N] weight [N, K] + beta out, and zero where the ReLU behind `mask` was."""
        ...

    def grad_weight(
        self,
        delta: Tensor,
        x: Tensor,
        out: Tensor,
        *,
        beta: float = 0.0,
        grad_bias: Tensor | None = None,
    ) -> None:
        """out [N, K] = delta [R, N]^T x [R, K] + beta out; grad_bias [N] = column sums of delta + beta grad_bias.

        out and grad_bias are float32 (float64 with float64 operands).
        """
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
        # 2^12 rows of 256 floats are 4 MB, about a core's second-level cache: of 2^9 to 2^14 the fastest or near it.
        self.chunk_rows = 1 << 12

    def new_mask(self, out: Tensor) -> Tensor:
        """`out` itself."""
        return out

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        beta: float = 0.0,
        bias: Tensor | None = None,
        relu: bool = False,
        mask: Tensor | None = None,
    ) -> None:
        """See `Gemm.forward`."""
        del mask
        if out.dtype != self.dtype:
            # The heads: a few columns of raw outputs, which stay float32.
            x, weight = x.to(out.dtype), weight.to(out.dtype)
        if bias is not None and beta == 0:
            torch.addmm(bias, x, weight.t(), out=out)
        else:
            torch.addmm(out, x, weight.t(), beta=beta, out=out)
            if bias is not None:
                out.add_(bias)
        if relu:
            out.relu_()

    def grad_input(
        self, delta: Tensor, weight: Tensor, out: Tensor, *, beta: float = 0.0, mask: Tensor | None = None
    ) -> None:
        """See `Gemm.grad_input`."""
        if out.dtype != self.dtype:
            delta, weight = delta.to(out.dtype), weight.to(out.dtype)
        torch.addmm(out, delta, weight, beta=beta, out=out)
        if mask is not None:
            torch.ops.aten.threshold_backward.grad_input(out, mask, 0, grad_input=out)

    def grad_weight(
        self,
        delta: Tensor,
        x: Tensor,
        out: Tensor,
        *,
        beta: float = 0.0,
        grad_bias: Tensor | None = None,
    ) -> None:
        """See `Gemm.grad_weight`."""
        if out.dtype == self.dtype:
            torch.addmm(out, delta.t(), x, beta=beta, out=out)
        elif beta == 0:
            out.copy_(torch.mm(delta.t(), x))
        else:
            out.mul_(beta).add_(torch.mm(delta.t(), x))
        if grad_bias is not None:
            sums = torch.sum(delta, 0, dtype=grad_bias.dtype)
            torch.add(sums, grad_bias, alpha=beta, out=grad_bias) if beta else grad_bias.copy_(sums)


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

    def new_mask(self, out: Tensor) -> Tensor:
        """[R, bytes]: a bit per element, rows padded to whole multiples of 128 bits."""
        return new_bit_mask(out)

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        beta: float = 0.0,
        bias: Tensor | None = None,
        relu: bool = False,
        mask: Tensor | None = None,
    ) -> None:
        """See `Gemm.forward`."""
        self._check(x, weight)
        total = torch.mm(x.float(), weight.float().t())
        if beta:
            total += beta * out.float()
        if bias is not None:
            if bias.dtype != out.dtype:
                raise TypeError(f"gemm: bias must be {out.dtype} as the result, got {bias.dtype}")
            total += bias.float()
        if mask is not None:
            _set_bits(mask, total > 0)
        if relu:
            total.relu_()
        out.copy_(total)

    def grad_input(
        self, delta: Tensor, weight: Tensor, out: Tensor, *, beta: float = 0.0, mask: Tensor | None = None
    ) -> None:
        """See `Gemm.grad_input`."""
        self._check(delta, weight)
        total = torch.mm(delta.float(), weight.float())
        if beta:
            total += beta * out.float()
        if mask is not None:
            total *= _bits(mask, out.shape[1])
        out.copy_(total)

    def grad_weight(
        self,
        delta: Tensor,
        x: Tensor,
        out: Tensor,
        *,
        beta: float = 0.0,
        grad_bias: Tensor | None = None,
    ) -> None:
        """See `Gemm.grad_weight`."""
        self._check(delta, x)
        total = torch.mm(delta.float().t(), x.float())
        out.copy_(total + beta * out if beta else total)
        if grad_bias is not None:
            sums = delta.sum(0, dtype=torch.float32)
            grad_bias.copy_(sums + beta * grad_bias if beta else sums)

    def _check(self, *operands: Tensor) -> None:
        for operand in operands:
            if operand.dtype != self.dtype:
                raise TypeError(f"gemm: operands must be {self.dtype}, got {operand.dtype}")


class CublasLt:
    """cuBLASLt: bias, ReLU and its bit mask, its backward pass and the column sums are done by the products themselves.

    A bias is rounded to the dtype of the result, as cuBLASLt wants it; column sums are float32. Source: NVIDIA's
    cuBLAS documentation, cublasLtEpilogue_t; csrc/mlp/gemm_cublaslt.cpp. It has not run on a GPU.
    """

    align = 8
    bit_masks = True
    # So many rows that a product fills any GPU, and few enough that the deltas stay small.
    chunk_rows = 1 << 18

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def new_mask(self, out: Tensor) -> Tensor:
        """[R, bytes], laid out as cuBLASLt likes."""
        return new_bit_mask(out)

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        beta: float = 0.0,
        bias: Tensor | None = None,
        relu: bool = False,
        mask: Tensor | None = None,
    ) -> None:
        """See `Gemm.forward`."""
        plain, biased = (_NONE, _BIAS)
        if relu:
            plain, biased = (_RELU, _RELU_BIAS) if mask is None else (_RELU_MASK, _RELU_MASK_BIAS)
        epilogue = plain if bias is None else biased
        self._run(x, weight, out, False, True, beta, epilogue, bias, mask)

    def grad_input(
        self, delta: Tensor, weight: Tensor, out: Tensor, *, beta: float = 0.0, mask: Tensor | None = None
    ) -> None:
        """See `Gemm.grad_input`."""
        self._run(delta, weight, out, False, False, beta, _NONE if mask is None else _DRELU, None, mask)

    def grad_weight(
        self,
        delta: Tensor,
        x: Tensor,
        out: Tensor,
        *,
        beta: float = 0.0,
        grad_bias: Tensor | None = None,
    ) -> None:
        """See `Gemm.grad_weight`."""
        if grad_bias is None:
            self._run(delta, x, out, True, False, beta, _NONE, None, None)
            return
        sums = torch.empty_like(grad_bias) if beta else grad_bias
        self._run(delta, x, out, True, False, beta, _COLUMN_SUMS, sums, None)
        if beta:
            torch.add(sums, grad_bias, alpha=beta, out=grad_bias)

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
        _cublaslt(a, b, out, transpose_a, transpose_b, beta, epilogue, vector, mask, self._workspace)


def new_bit_mask(out: Tensor) -> Tensor:
    """An empty mask of a bit per element of `out`, rows padded to whole multiples of 128 bits."""
    rows, columns = out.shape
    bits = -(-columns // _MASK_ROW_BITS) * _MASK_ROW_BITS
    return torch.empty(rows, bits // 8, dtype=torch.uint8, device=out.device)


def _set_bits(mask: Tensor, passed: Tensor) -> None:
    padded = torch.nn.functional.pad(passed, (0, 8 * mask.shape[1] - passed.shape[1]))
    mask.copy_(torch.from_numpy(np.packbits(padded.numpy(), axis=1, bitorder="little")))


def _bits(mask: Tensor, columns: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(mask.numpy(), axis=1, count=columns, bitorder="little"))


def has_cublaslt() -> bool:
    """Whether the library was built with the products over cuBLASLt."""
    return _cublaslt is not None


_cublaslt: Any = None
if any(source.endswith("gemm_cublaslt.cpp") for source in _native.build_info().get("sources", ())):
    _cublaslt = torch.ops.mipnerf_fast.gemm_cublaslt.default
