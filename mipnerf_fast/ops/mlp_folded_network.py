"""What both passes of the folded network know of it: its parameters as operands, and what is kept in between."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from .gemm import CublasLt, CublasLtTwin, Gemm, TorchGemm, new_bit_mask
from .mlp_autograd import Architecture
from .mlp_folding import unfold
from .registration import register_without_derivative

# Which products an operator uses; operators take numbers.
TORCH, TWIN, CUBLASLT = range(3)

# Whether the library is there: its forward pass folds the bottleneck and goes through all layers tile by tile
# (csrc/mlp/mlp_tiles_cpu.cpp), few samples go back layer by layer (csrc/mlp/mlp_layer_backward_cpu.cpp), and what the
# bottleneck's gradients come from is unfolded (csrc/mlp/mlp_folding_cpu.cpp).
_HAS_TILES = _native.available()
# A layer's way down in the library starts the threads once, where torch starts them for every product and sum; with
# more rows than these MKL's products are as fast, and from 2^12 on faster.
_FEW_ROWS = 1 << 9


class Plan(NamedTuple):
    """What the shapes of a call decide.

    view_depth: layers with a ReLU above the trunk. colour_rows: of the colour branch's matrix that reads the trunk.
    widths: columns of the activations: of the trunk, of the view layers.
    """

    view_depth: int
    colour_rows: int
    widths: list[int]


def plan(has_views: bool, parameters: Sequence[Tensor], architecture: Architecture) -> Plan:
    """Looks at nothing but shapes."""
    depth, width = architecture.net_depth, parameters[0].shape[0]
    if not has_views:
        return Plan(0, 3, [width] * depth)
    rows, view_depth = parameters[2 * (depth + 2)].shape[0], architecture.net_depth_condition
    return Plan(view_depth, rows, [width] * depth + [rows] * view_depth)


def does_first_again(parameters: Sequence[Tensor], net_depth: int, products: int) -> bool:
    """Whether the backward pass does the first layer again instead of keeping what it gave.

    Where its products are few beside the others', an eighth of the paper's trunk is saved for 1.5% of them. On a GPU
    memory is not what is short.
    """
    width, in_features = parameters[0].shape
    return products == TORCH and net_depth > 1 and 16 * in_features <= width * net_depth


def new_stash(
    features: Tensor, viewdirs_enc: Tensor | None, parameters: Sequence[Tensor], options: tuple[Any, ...]
) -> list[Tensor]:
    """Room for what the backward pass needs: activations, the bit masks of their ReLUs, the matrix over the trunk.

    The first layer's has no rows where `does_first_again`.
    """
    *architecture, products, dtype = options
    shapes = plan(viewdirs_enc is not None, parameters, Architecture(*architecture))
    kind = _KINDS[products]
    rows, new = features.shape[0] * features.shape[1], parameters[0].new_empty
    layers = [new(rows, columns, dtype=dtype) for columns in shapes.widths]
    if does_first_again(parameters, architecture[0], products):
        layers[0] = new(0, shapes.widths[0], dtype=dtype)
    masks = [new_bit_mask(layer) for layer in layers] if kind.bit_masks else []
    columns = parameters[2 * architecture[0]].shape[1]
    top = new(padded(shapes.colour_rows + 1, kind.align), columns, dtype=dtype)
    return [*layers, *masks, top]


class Network:
    """The parameters as operands, their columns split as the inputs of the layers are.

    What the library's forward pass does without is made when asked for: beside few samples it would count.

    to_viewdirs: whether the backward pass has to find their gradient.
    """

    to_viewdirs = True

    def __init__(
        self,
        features: Tensor,
        viewdirs_enc: Tensor | None,
        parameters: Sequence[Tensor],
        options: tuple[Any, ...],
    ) -> None:
        *architecture, products, dtype = options
        self.parameters, self.options, self._device = parameters, options, features.device
        self.architecture = Architecture(*architecture)
        self.dtype = dtype
        on_cpu = products == TORCH and features.device.type == "cpu"
        self.by_tiles = _HAS_TILES and on_cpu and dtype == torch.float32
        self.down_by_layers = self.by_tiles and features.shape[0] * features.shape[1] <= _FEW_ROWS
        self.weights, self.biases = parameters[0::2], parameters[1::2]
        self.depth, self.width = self.architecture.net_depth, parameters[0].shape[0]
        self.has_views = viewdirs_enc is not None

    @functools.cached_property
    def plan(self) -> Plan:
        """See `plan`."""
        return plan(self.has_views, self.parameters, self.architecture)

    @functools.cached_property
    def gemm(self) -> Gemm:
        """What multiplies."""
        return gemm_of(self.options[-2], self.dtype, self._device)

    def between_passes(self) -> None:
        """Let go of what the backward pass makes again: on a GPU products have a workspace of 32 MB."""
        self.__dict__.pop("gemm", None)

    @property
    def does_first_again(self) -> bool:
        """See `does_first_again`."""
        return does_first_again(self.parameters, self.depth, self.options[-2])

    @property
    def rgb_rows(self) -> int:
        """Of the last matrix as an operand."""
        return padded(3, self.gemm.align) if self.plan.view_depth else 3

    @functools.cached_property
    def _matrices(self) -> list[Tensor]:
        depth, view_depth = self.depth, self.plan.view_depth
        matrices = [*self.weights[:depth], *self.weights[depth + 3 : depth + 2 + view_depth]]
        if view_depth:
            matrices.append(self.weights[-1])
        matrices = rounded(matrices, self.dtype)
        if self.rgb_rows > 3:
            matrices[-1] = torch.nn.functional.pad(matrices[-1], (0, 0, 0, self.rgb_rows - 3))
        return matrices

    @functools.cached_property
    def trunk(self) -> list[tuple[Tensor, Tensor | None]]:
        """Of its layers, each matrix as `split` splits it."""
        return [self.split(number, matrix) for number, matrix in enumerate(self._matrices[: self.depth])]

    @property
    def views(self) -> list[Tensor]:
        """Of the layers above the lowest that reads the directions, colour among them."""
        return self._matrices[self.depth :]

    def widened(self, layer: int) -> bool:
        """Whether this layer reads the features beside the activations; layer `depth` stands for the heads."""
        return layer > 1 and (layer - 1) % self.architecture.skip_layer == 0

    def split(self, layer: int, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """The columns of a matrix that multiply the layer's input, and those for the features beside it."""
        return (matrix[:, : self.width], matrix[:, self.width :]) if self.widened(layer) else (matrix, None)

    @property
    def _folded_layers(self) -> Sequence[Tensor]:
        """Weights and biases of density, the bottleneck and the layer above it."""
        return self.parameters[2 * self.depth : 2 * self.depth + 6]

    def unfold(
        self, grad_top: Tensor, sums: Tensor, of_ray_biases: Tensor, viewdirs_enc: Tensor
    ) -> list[Tensor]:
        """Gradients of weight and bias of density, the bottleneck and the layer above it, and of viewdirs_enc."""
        *_, weight, bias, of_views, _ = self._folded_layers
        directions = operand(viewdirs_enc, sums.dtype)
        if self.by_tiles:
            gradients: list[Tensor] = torch.ops.mipnerf_fast.mlp_unfold(
                grad_top, sums, of_ray_biases, directions, of_views, weight, bias, self.to_viewdirs
            )
            return gradients
        rows = self.plan.colour_rows
        of_density = [grad[rows : rows + 1].clone() for grad in (grad_top, sums)]
        inputs = (of_ray_biases, directions, of_views, weight, bias, self.to_viewdirs)
        return [*of_density, *unfold(grad_top[:rows], sums[:rows], *inputs)]

    def heads(self) -> list[Tensor]:
        """What of the colour branch and of density reads the trunk's output."""
        density, colour = self.weights[self.depth : self.depth + 2]
        if self.has_views:
            colour = torch.mm(self.weights[self.depth + 2][:, : self.width], colour)
        return [colour, density]

    def top(self, heads: list[Tensor]) -> Tensor:
        """Both as one matrix of operands, with rows of zeros up to a multiple of `align`."""
        rows = self.plan.colour_rows + 1
        zeros = padded(rows, self.gemm.align) - rows
        if zeros:
            heads = [*heads, heads[0].new_zeros(zeros, heads[0].shape[1])]
        return torch.cat(heads).to(self.dtype)

    def ray_biases(self, viewdirs_enc: Tensor) -> Tensor:
        """Of the layer that reads the directions, one row for every ray; of the dtype of its outputs."""
        *_, of_bottleneck, weight, bias = self._folded_layers
        bias = torch.addmv(bias, weight[:, : self.width], of_bottleneck)
        rows = torch.nn.functional.linear(viewdirs_enc.to(bias.dtype), weight[:, self.width :], bias)
        return rows if rows.dtype == self.dtype or not self.plan.view_depth else rows.to(self.dtype)


class Activations:
    """Outputs of the layers with their masks: kept for the backward pass, or two in turn for a chunk of rows."""

    def __init__(self, network: Network, rows: int, chunk: int, stash: Sequence[Tensor] | None) -> None:
        self.masks: list[Any]
        widths, self.rows = network.plan.widths, rows
        self.kept = stash is not None
        if stash is None:
            new, dtype = network.weights[0].new_empty, network.gemm.dtype
            turns = [new(chunk, max(widths), dtype=dtype) for _ in widths[:2]]
            self.layers = [turns[n % 2][:, :columns] for n, columns in enumerate(widths)]
            self.masks, self.rows = [None] * len(widths), chunk
            return
        self.layers = list(stash[: len(widths)])
        self.masks = self.layers
        if network.gemm.bit_masks:
            self.masks = list(stash[len(widths) : 2 * len(widths)])

    def part(self, rows: slice) -> list[tuple[Tensor, Any]]:
        """Those of these rows, each beside its mask."""
        if rows.stop - rows.start != self.rows:
            if not self.kept:
                rows = slice(rows.stop - rows.start)
            masks = [None if mask is None else mask[rows] for mask in self.masks]
            return [(layer[rows], mask) for layer, mask in zip(self.layers, masks, strict=True)]
        return list(zip(self.layers, self.masks, strict=True))

    def take_all(self) -> list[tuple[Tensor, Any]]:
        """All of them, given away."""
        pairs = list(zip(self.layers, self.masks, strict=True))
        self.layers, self.masks = [], []
        return pairs


def apply_layer(
    gemm: Gemm,
    x: Tensor,
    encoded: Tensor,
    weights: tuple[Tensor, Tensor | None],
    out: Tensor | None,
    bias: Tensor,
    relu: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """x W^T + encoded W_features^T + bias, then the ReLU; the second product where it is one."""
    weight, beside = weights
    if beside is None:
        return gemm.forward(x, weight, out, bias=bias, relu=relu, mask=mask)
    out = gemm.forward(x, weight, out, bias=bias)
    return gemm.forward(encoded, beside, out, beta=1.0, relu=relu, mask=mask)


def row_chunks(rays: int, samples: int, at_a_time: int) -> tuple[list[tuple[slice, slice]], int]:
    """Whole rays, and their samples, about so many samples at a time, none where there are none; the most samples."""
    step = max(1, at_a_time // max(1, samples))
    starts = range(0, rays if samples else 0, step)
    stops = [min(start + step, rays) for start in starts]
    spans = [
        (slice(start, stop), slice(start * samples, stop * samples))
        for start, stop in zip(starts, stops, strict=True)
    ]
    return spans, min(step, rays) * samples


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    # With few samples a call that does nothing counts too.
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def rounded(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of this dtype, on a GPU of all tensors in one launch; the tensors themselves where they have it."""
    if not tensors or tensors[0].dtype == dtype:
        return tensors
    if tensors[0].device.type == "cpu":
        return [tensor.to(dtype) for tensor in tensors]
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def padded(count: int, align: int) -> int:
    return -(-count // align) * align


_KINDS: tuple[type[TorchGemm] | type[CublasLtTwin] | type[CublasLt], ...] = (
    TorchGemm,
    CublasLtTwin,
    CublasLt,
)
_gemms: dict[tuple[int, torch.dtype, torch.device], Gemm] = {}


def gemm_of(products: int, dtype: torch.dtype, device: torch.device) -> Gemm:
    if products == CUBLASLT:
        # With a workspace of its own for every stream: two must not share one.
        return CublasLt(dtype, device)
    key = (products, dtype, device)
    if key not in _gemms:
        _gemms[key] = TorchGemm(dtype) if products == TORCH else CublasLtTwin(dtype)
    return _gemms[key]


# ------------------------------------------------------------------------------------------------- operators


def _register() -> None:
    """What the CPU's raw operators need beside their kernels."""

    def fake_forward(
        features: Tensor,
        viewdirs_enc: Tensor | None,
        parameters: list[Tensor],
        depth: int,
        skip_layer: int,
        first_kept: int,
    ) -> list[Tensor]:
        weights = parameters[0::2]
        layers = [*weights[: depth + 1], *weights[depth + (1 if viewdirs_enc is None else 2) :]]
        kept = [n for n in range(first_kept, len(layers) - 1) if n != depth]
        columns = [3, 1, *[len(layers[n]) for n in kept]]
        top = features.new_empty(len(layers[depth + 1]) + 1, layers[depth].shape[1])
        return [*[features.new_empty(len(features), count) for count in columns], top]

    def fake_unfold(
        grad_top: Tensor,
        sums: Tensor,
        of_ray_biases: Tensor,
        viewdirs_enc: Tensor,
        view_weight: Tensor,
        bottleneck_weight: Tensor,
        bottleneck_bias: Tensor,
        to_viewdirs: bool,
    ) -> list[Tensor]:
        rays, directions = viewdirs_enc.shape
        width, columns = bottleneck_weight.shape
        weights = ((1, columns), (1,), (width, columns), (width,), view_weight.shape, (len(view_weight),))
        return [grad_top.new_empty(shape) for shape in (*weights, (rays if to_viewdirs else 0, directions))]

    instead = "ops.mlp_folded.folded_mlp"
    register_without_derivative("mlp_tiles_forward", fake_forward, instead)
    register_without_derivative("mlp_unfold", fake_unfold, instead)
    register_without_derivative("mlp_layer_backward", lambda *_: None, instead)


if _HAS_TILES:
    _register()
