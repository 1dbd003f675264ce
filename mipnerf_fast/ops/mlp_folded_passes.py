"""The two passes of the folded network over the products of `gemm`; `mlp_folded` makes a function of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .gemm import CublasLt, CublasLtTwin, Gemm, TorchGemm
from .mlp_autograd import Architecture, loss_scale

# Which products an operator uses; operators take numbers.
TORCH, TWIN, CUBLASLT = range(3)


class _Network:
    """The parameters as operands: packed, folded, their columns split as the inputs of the layers are."""

    def __init__(
        self,
        viewdirs_enc: Tensor | None,
        parameters: Sequence[Tensor],
        architecture: Architecture,
        gemm: Gemm,
    ) -> None:
        detached = [parameter.detach() for parameter in parameters]
        layers = list(zip(detached[0::2], detached[1::2], strict=True))
        depth = architecture.net_depth
        self.architecture, self.depth = architecture, depth
        self.width, self.num_features = layers[0][0].shape
        self.layers = layers
        self.has_views = viewdirs_enc is not None
        density_weight, self.density_bias = layers[depth]
        # The layer above the trunk that takes its output: the view layer with the bottleneck folded in, or rgb.
        self.view_depth = architecture.net_depth_condition if self.has_views else 0
        fold_weight, fold_bias = layers[depth + 2] if self.has_views else layers[depth + 1]
        rows = fold_weight.shape[0]
        self.rows = rows
        # One matrix of everything that reads the trunk's output: the folded layer, density, rows of zeros.
        top = fold_weight.new_zeros(_padded(rows + 1, gemm.align), density_weight.shape[1])
        if self.has_views:
            bottleneck_weight, bottleneck_bias = layers[depth + 1]
            from_bottleneck = fold_weight[:, : self.width]
            torch.mm(from_bottleneck, bottleneck_weight, out=top[:rows])
            assert viewdirs_enc is not None
            constant = torch.addmv(fold_bias, from_bottleneck, bottleneck_bias)
            from_views = fold_weight[:, self.width :]
            self.offsets = _product(viewdirs_enc.detach().to(constant.dtype), from_views.t(), constant)
        else:
            top[:rows] = fold_weight
            self.offsets = fold_bias[None]
        top[rows] = density_weight[0]

        trunk = [tensor for layer in layers[:depth] for tensor in layer]
        views = [tensor for layer in layers[depth + 3 : depth + 2 + self.view_depth] for tensor in layer]
        heads = [top]
        if self.view_depth:
            rgb_weight, self.rgb_bias = layers[-1]
            self.rgb_rows = _padded(3, gemm.align)
            heads.append(torch.nn.functional.pad(rgb_weight, (0, 0, 0, self.rgb_rows - 3)))
        packed = _rounded([*trunk, *views, *heads], gemm.dtype)
        self.trunk = list(zip(packed[0 : 2 * depth : 2], packed[1 : 2 * depth : 2], strict=True))
        rest = packed[2 * depth : 2 * depth + len(views)]
        self.views = list(zip(rest[0::2], rest[1::2], strict=True))
        self.top = packed[2 * depth + len(views)]
        self.rgb_weight = packed[-1]

    def widened(self, layer: int) -> bool:
        """Whether this layer reads the features beside the activations; layer `depth` stands for the heads."""
        return layer > 1 and (layer - 1) % self.architecture.skip_layer == 0

    def split(self, layer: int, matrix: Tensor) -> list[Tensor]:
        """The columns of a matrix that multiply the layer's inputs: activations (layer 0: features), features."""
        if self.widened(layer):
            return [matrix[:, : self.width], matrix[:, self.width :]]
        return [matrix]

    def inputs(self, layer: int, x: Tensor, features: Tensor) -> list[Tensor]:
        """What the layer reads, of the rows of x."""
        return [x, features] if self.widened(layer) else [x]


class _Buffers:
    """Activations of a pass: kept for the backward pass, or two of each kind in turn."""

    def __init__(
        self,
        network: _Network,
        gemm: Gemm,
        like: Tensor,
        rows: int,
        chunk: int,
        stash: Sequence[Tensor] | None,
        training: bool,
    ) -> None:
        depth, view_depth = network.depth, network.view_depth
        self.kept = training
        self.depth = depth
        self.masks: list[Tensor] = []
        if stash is not None:
            self.layers, self.masks = list(stash[: depth + view_depth]), list(stash[depth + view_depth :])
            return

        def empty(count: int, columns: int) -> list[Tensor]:
            size = rows if training else chunk
            return [like.new_empty(size, columns, dtype=gemm.dtype) for _ in range(count)]

        widths = [network.width] * depth + [network.rows] * view_depth
        if training:
            self.layers = [tensor for columns in widths for tensor in empty(1, columns)]
            if gemm.bit_masks:
                self.masks = [gemm.new_mask(layer) for layer in self.layers]
        else:
            turns = {columns: empty(2, columns) for columns in dict.fromkeys(widths)}
            self.layers = [turns[columns][number % 2] for number, columns in enumerate(widths)]

    def layer(self, number: int, rows: slice) -> Tensor:
        """Output of a layer with a ReLU: the trunk's, then the view branch's."""
        buffer = self.layers[number]
        return buffer[rows] if self.kept else buffer[: rows.stop - rows.start]

    def mask(self, number: int, rows: slice) -> Tensor | None:
        """The mask of that ReLU; None where nobody will ask for it."""
        if not self.kept:
            return None
        return self.masks[number][rows] if self.masks else self.layers[number][rows]


def forward_pass(
    features: Tensor,
    viewdirs_enc: Tensor | None,
    parameters: Sequence[Tensor],
    options: tuple[Any, ...],
    training: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """raw rgb, raw density, and with `training` what the backward pass needs."""
    *architecture, products, dtype = options
    gemm = _gemm(products, dtype, features.device)
    network = _Network(viewdirs_enc, parameters, Architecture(*architecture), gemm)
    rays, samples, num_features = features.shape
    depth, view_depth, top_rows = network.depth, network.view_depth, network.rows
    flat = features.detach().reshape(rays * samples, num_features)
    master = parameters[0]
    rgb, density = master.new_empty(rays, samples, 3), master.new_empty(rays, samples, 1)
    spans = list(_spans(rays, samples, gemm.chunk_rows))
    chunk = max((rows.stop - rows.start for _, rows in spans), default=0)
    buffers = _Buffers(network, gemm, master.detach(), rays * samples, chunk, None, training)
    top = network.split(depth, network.top)
    for part, rows in spans:
        x = encoded = _operand(flat[rows], gemm.dtype)
        for layer in range(depth):
            weight, bias = network.trunk[layer]
            out = buffers.layer(layer, rows)
            inputs = network.inputs(layer, x, encoded)
            _layer(
                gemm,
                inputs,
                network.split(layer, weight),
                out,
                bias=bias,
                relu=True,
                mask=buffers.mask(layer, rows),
            )
            x = out
        inputs = network.inputs(depth, x, encoded)
        raw_rgb, raw_density = rgb[part].view(-1, 3), density[part].view(-1, 1)
        raw_density.copy_(network.density_bias)
        _layer(gemm, inputs, [matrix[top_rows : top_rows + 1] for matrix in top], raw_density, beta=1.0)
        # The bias per ray is what the products are added to.
        out = buffers.layer(depth, rows) if view_depth else raw_rgb
        offsets = network.offsets[part] if network.has_views else network.offsets
        out.view(-1, samples, top_rows).copy_(offsets[:, None, :])
        fold = [matrix[:top_rows] for matrix in top]
        _layer(
            gemm,
            inputs,
            fold,
            out,
            beta=1.0,
            relu=view_depth > 0,
            mask=buffers.mask(depth, rows) if view_depth else None,
        )
        for number, (weight, bias) in enumerate(network.views, 1):
            x, out = out, buffers.layer(depth + number, rows)
            mask = buffers.mask(depth + number, rows)
            gemm.forward(x, weight, out, bias=bias, relu=True, mask=mask)
        if view_depth:
            raw_rgb.copy_(network.rgb_bias)
            gemm.forward(out, network.rgb_weight[:3], raw_rgb, beta=1.0)
    return rgb, density, [*buffers.layers, *buffers.masks] if training else []


def backward_pass(
    grad_rgb: Tensor | None,
    grad_density: Tensor | None,
    features: Tensor,
    viewdirs_enc: Tensor | None,
    parameters: Sequence[Tensor],
    stash: Sequence[Tensor],
    options: tuple[Any, ...],
    to_features: bool,
) -> list[Tensor]:
    """Gradients of features (empty unless wanted), viewdirs_enc (empty without) and the parameters."""
    *architecture, products, dtype = options
    gemm = _gemm(products, dtype, features.device)
    network = _Network(viewdirs_enc, parameters, Architecture(*architecture), gemm)
    rays, samples, num_features = features.shape
    depth, view_depth, top_rows = network.depth, network.view_depth, network.rows
    flat = features.detach().reshape(rays * samples, num_features)
    master = parameters[0].detach()
    spans = list(_spans(rays, samples, gemm.chunk_rows))
    chunk = max((rows.stop - rows.start for _, rows in spans), default=0)
    kept = _Buffers(network, gemm, master, rays * samples, chunk, stash, True)
    scale = loss_scale([g for g in (grad_rgb, grad_density) if g is not None], gemm.dtype)

    # The first products overwrite, the others add; without samples there are none.
    new = master.new_empty if spans else master.new_zeros
    grads = [new(parameter.shape) for parameter in parameters]
    layers = list(zip(grads[0::2], grads[1::2], strict=True))
    # Of the padded matrices; their zero rows have no gradient.
    grad_top, sums = new(network.top.shape), new(len(network.top))
    grad_offsets = new(rays, top_rows)
    grad_features = flat.new_zeros(flat.shape if to_features else (0, num_features))

    def empty(columns: int) -> Tensor:
        return master.new_empty(chunk, columns, dtype=gemm.dtype)

    deltas = [empty(network.width), empty(network.width)]
    delta_top = empty(len(network.top)).zero_()
    if view_depth:
        delta_rgb = empty(network.rgb_rows).zero_()
        delta_views = [empty(top_rows), empty(top_rows)] if view_depth > 1 else []
        grad_rgb_weight, rgb_sums = new(network.rgb_rows, top_rows), new(network.rgb_rows)

    beta = 0.0
    for part, rows in spans:
        count = rows.stop - rows.start
        encoded = _operand(flat[rows], gemm.dtype)
        feature_beta = 0.0
        # Down the colour branch, into the columns of the top's delta.
        above = delta_top[:count]
        if view_depth:
            delta = delta_rgb[:count]
            _set(delta[:, :3], grad_rgb, part, scale)
            x = kept.layer(depth + view_depth - 1, rows)
            gemm.grad_weight(delta, x, grad_rgb_weight, beta=beta, grad_bias=rgb_sums)
            weight = network.rgb_weight
            for number in range(view_depth - 1, 0, -1):
                out = delta_views[number % 2][:count]
                gemm.grad_input(delta, weight, out, mask=kept.mask(depth + number, rows))
                delta, weight = out, network.views[number - 1][0]
                grad_weight, grad_bias = layers[depth + 2 + number]
                x = kept.layer(depth + number - 1, rows)
                gemm.grad_weight(delta, x, grad_weight, beta=beta, grad_bias=grad_bias)
            gemm.grad_input(delta, weight, above[:, :top_rows], mask=kept.mask(depth, rows))
        else:
            _set(above[:, :3], grad_rgb, part, scale)
        _set(above[:, top_rows : top_rows + 1], grad_density, part, scale)
        if network.has_views:
            per_ray = above[:, :top_rows].unflatten(0, (-1, samples))
            torch.sum(per_ray, 1, dtype=master.dtype, out=grad_offsets[part])

        # Down the trunk.
        delta, number = above, depth
        matrices = network.split(depth, network.top)
        outs = network.split(depth, grad_top)
        out_bias = sums
        while True:
            x = kept.layer(number - 1, rows) if number else encoded
            for index, read in enumerate(network.inputs(number, x, encoded)):
                gemm.grad_weight(delta, read, outs[index], beta=beta, grad_bias=None if index else out_bias)
            if to_features and (network.widened(number) or number == 0):
                gemm.grad_input(delta, matrices[-1], grad_features[rows], beta=feature_beta)
                feature_beta = 1.0
            if number == 0:
                break
            out = deltas[number % 2][:count]
            gemm.grad_input(delta, matrices[0], out, mask=kept.mask(number - 1, rows))
            delta, number = out, number - 1
            matrices = network.split(number, network.trunk[number][0])
            outs = network.split(number, layers[number][0])
            out_bias = layers[number][1]
        beta = 1.0

    grad_density_weight, grad_density_bias = layers[depth]
    grad_density_weight[0] = grad_top[top_rows]
    grad_density_bias[0] = sums[top_rows]
    if view_depth:
        layers[-1][0].copy_(grad_rgb_weight[:3])
        layers[-1][1].copy_(rgb_sums[:3])
    grad_viewdirs = master.new_empty(0)
    if viewdirs_enc is None:
        layers[depth + 1][0].copy_(grad_top[:top_rows])
        layers[depth + 1][1].copy_(sums[:top_rows])
    else:
        views = viewdirs_enc.detach().to(master.dtype)
        _unfold(network, layers, grad_top[:top_rows], sums[:top_rows], grad_offsets, views)
        from_views = network.layers[depth + 2][0][:, network.width :]
        grad_viewdirs = _product(grad_offsets, from_views)
    if scale is not None:
        for grad in (*grads, grad_features, grad_viewdirs):
            grad.div_(scale)
    shape = (rays if to_features else 0, samples, num_features)
    return [grad_features.view(shape), grad_viewdirs, *grads]


def _unfold(
    network: _Network,
    layers: Sequence[tuple[Tensor, Tensor]],
    grad_fold: Tensor,
    sums: Tensor,
    grad_offsets: Tensor,
    viewdirs_enc: Tensor,
) -> None:
    """The gradients of the two layers that were folded into one, from those of the one."""
    depth, width = network.depth, network.width
    bottleneck_weight, bottleneck_bias = network.layers[depth + 1]
    from_bottleneck = network.layers[depth + 2][0][:, :width]
    grad_bottleneck_weight, grad_bottleneck_bias = layers[depth + 1]
    grad_fold_weight, grad_fold_bias = layers[depth + 2]
    torch.mm(grad_fold, bottleneck_weight.t(), out=grad_fold_weight[:, :width])
    grad_fold_weight[:, :width].addr_(sums, bottleneck_bias)
    torch.mm(grad_offsets.t(), viewdirs_enc, out=grad_fold_weight[:, width:])
    grad_fold_bias.copy_(sums)
    torch.mm(from_bottleneck.t(), grad_fold, out=grad_bottleneck_weight)
    torch.mv(from_bottleneck.t(), sums, out=grad_bottleneck_bias)


def _layer(
    gemm: Gemm,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    out: Tensor,
    *,
    beta: float = 0.0,
    bias: Tensor | None = None,
    relu: bool = False,
    mask: Tensor | None = None,
) -> None:
    """out = the sum of the products of inputs and weights + beta out + bias, then the ReLU."""
    for index, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        last = index == len(inputs) - 1
        gemm.forward(
            x,
            weight,
            out,
            beta=1.0 if index else beta,
            bias=None if index else bias,
            relu=relu and last,
            mask=mask if last else None,
        )


def _spans(rays: int, samples: int, chunk_rows: int) -> Iterator[tuple[slice, slice]]:
    """Whole rays, and their samples, about chunk_rows of them at a time; none where there are none."""
    step = max(1, chunk_rows // max(1, samples))
    for start in range(0, rays if samples else 0, step):
        stop = min(start + step, rays)
        yield slice(start, stop), slice(start * samples, stop * samples)


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _rounded(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of this dtype, of all tensors in one pass; the tensors themselves where they have it."""
    if tensors[0].dtype == dtype:
        return tensors
    rounded = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(rounded, tensors)
    return rounded


def _product(a: Tensor, b: Tensor, row: Tensor | None = None) -> Tensor:
    """a b, + row where there is one; into an output, which autocast leaves alone."""
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.mm(a, b, out=out) if row is None else torch.addmm(row, a, b, out=out)


def _padded(count: int, align: int) -> int:
    return -(-count // align) * align


def _set(delta: Tensor, grad: Tensor | None, rays: slice, scale: Tensor | None) -> None:
    """Round the gradient of an output for these rays into a delta; None is zero."""
    if grad is None:
        delta.zero_()
    else:
        rows = grad[rays].flatten(0, 1)
        delta.copy_(rows if scale is None else rows * scale)


_gemms: dict[tuple[int, torch.dtype, torch.device], Gemm] = {}


def _gemm(products: int, dtype: torch.dtype, device: torch.device) -> Gemm:
    if products == CUBLASLT:
        # With a workspace of its own for every stream: two must not share one.
        return CublasLt(dtype, device)
    key = (products, dtype, device)
    if key not in _gemms:
        _gemms[key] = TorchGemm(dtype) if products == TORCH else CublasLtTwin(dtype)
    return _gemms[key]
