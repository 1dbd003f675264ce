"""The two passes of the folded network over the products of `gemm`; `mlp_folded` makes a function of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gemm import CublasLt, CublasLtTwin, Gemm, TorchGemm, new_bit_mask
from .mlp_autograd import Architecture, loss_scale

# Which products an operator uses; operators take numbers.
TORCH, TWIN, CUBLASLT = range(3)


class Plan(NamedTuple):
    """What the shapes of a call decide.

    view_depth: layers with a ReLU above the trunk. colour_rows: of the colour branch's matrix that reads the trunk.
    widths: columns of the activations: of the trunk, of the view layers.
    """

    view_depth: int
    colour_rows: int
    widths: list[int]


def plan(viewdirs_enc: Tensor | None, parameters: Sequence[Tensor], architecture: Architecture) -> Plan:
    """Looks at nothing but shapes."""
    depth, width = architecture.net_depth, parameters[0].shape[0]
    if viewdirs_enc is None:
        return Plan(0, 3, [width] * depth)
    rows, view_depth = parameters[2 * (depth + 2)].shape[0], architecture.net_depth_condition
    return Plan(view_depth, rows, [width] * depth + [rows] * view_depth)


def does_first_again(parameters: Sequence[Tensor], net_depth: int, products: int) -> bool:
    """Whether the backward pass does the first layer again instead of keeping what it gave.

    Where its products are few beside the others', an eighth of the paper's trunk is saved for 1.5% of them. On a GPU
    memory is not what is short.
    """
    width, in_features = parameters[0].shape
    return products == TORCH and 16 * in_features <= width * net_depth


def new_stash(
    features: Tensor, viewdirs_enc: Tensor | None, parameters: Sequence[Tensor], options: tuple[Any, ...]
) -> list[Tensor]:
    """Room for what the backward pass needs: activations, the bit masks of their ReLUs, the matrix over the trunk.

    The first layer's has no rows where `does_first_again`.
    """
    *architecture, products, dtype = options
    shapes, kind = plan(viewdirs_enc, parameters, Architecture(*architecture)), _KINDS[products]
    rows, new = features.shape[0] * features.shape[1], parameters[0].new_empty
    layers = [new(rows, columns, dtype=dtype) for columns in shapes.widths]
    if does_first_again(parameters, architecture[0], products):
        layers[0] = new(0, shapes.widths[0], dtype=dtype)
    masks = [new_bit_mask(layer) for layer in layers] if kind.bit_masks else []
    columns = parameters[2 * architecture[0]].shape[1]
    top = new(_padded(shapes.colour_rows + 1, kind.align), columns, dtype=dtype)
    return [*layers, *masks, top]


class _Network:
    """The parameters as operands, their columns split as the inputs of the layers are."""

    def __init__(
        self,
        features: Tensor,
        viewdirs_enc: Tensor | None,
        parameters: Sequence[Tensor],
        options: tuple[Any, ...],
    ) -> None:
        *architecture, products, dtype = options
        self.architecture = Architecture(*architecture)
        self.plan = plan(viewdirs_enc, parameters, self.architecture)
        self.gemm = gemm = _gemm(products, dtype, features.device)
        self.weights, self.biases = parameters[0::2], parameters[1::2]
        self.depth = depth = self.architecture.net_depth
        self.does_first_again = does_first_again(parameters, depth, products)
        self.width = self.weights[0].shape[0]
        view_depth = self.plan.view_depth
        matrices = [*self.weights[:depth], *self.weights[depth + 3 : depth + 2 + view_depth]]
        self.has_views = viewdirs_enc is not None
        if self.has_views:
            self.from_bottleneck = self.weights[depth + 2][:, : self.width]
            self.from_views = self.weights[depth + 2][:, self.width :]
        if view_depth:
            matrices.append(self.weights[-1])
        matrices = _rounded(matrices, gemm.dtype)
        self.trunk = [self.split(number, matrix) for number, matrix in enumerate(matrices[:depth])]
        # Above the lowest of the view layers.
        self.views = matrices[depth:]
        self.rgb_rows = _padded(3, gemm.align) if view_depth else 3
        if self.rgb_rows > 3:
            self.views[-1] = torch.nn.functional.pad(self.views[-1], (0, 0, 0, self.rgb_rows - 3))

    def widened(self, layer: int) -> bool:
        """Whether this layer reads the features beside the activations; layer `depth` stands for the heads."""
        return layer > 1 and (layer - 1) % self.architecture.skip_layer == 0

    def split(self, layer: int, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """The columns of a matrix that multiply the layer's input, and those for the features beside it."""
        return (matrix[:, : self.width], matrix[:, self.width :]) if self.widened(layer) else (matrix, None)

    def heads(self) -> list[Tensor]:
        """What of the colour branch and of density reads the trunk's output."""
        density, colour = self.weights[self.depth], self.weights[self.depth + 1]
        return [torch.mm(self.from_bottleneck, colour) if self.has_views else colour, density]

    def top(self, heads: list[Tensor]) -> Tensor:
        """Both as one matrix of operands, with rows of zeros up to a multiple of `align`."""
        rows = self.plan.colour_rows + 1
        zeros = _padded(rows, self.gemm.align) - rows
        if zeros:
            heads = [*heads, heads[0].new_zeros(zeros, heads[0].shape[1])]
        return torch.cat(heads).to(self.gemm.dtype)

    def ray_biases(self, viewdirs_enc: Tensor) -> Tensor:
        """Of the layer that reads the directions, one row for every ray; of the dtype of its outputs."""
        bias = torch.addmv(self.biases[self.depth + 2], self.from_bottleneck, self.biases[self.depth + 1])
        rows = torch.nn.functional.linear(viewdirs_enc.to(bias.dtype), self.from_views, bias)
        return rows.to(self.gemm.dtype) if self.plan.view_depth else rows


class _Activations:
    """Outputs of the layers with their masks: kept for the backward pass, or two in turn for a chunk of rows."""

    def __init__(self, network: _Network, rows: int, chunk: int, stash: Sequence[Tensor] | None) -> None:
        self.masks: Sequence[Tensor | None]
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

    def part(self, rows: slice) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """Those of these rows."""
        if rows.stop - rows.start == self.rows:
            return self.layers, self.masks
        if not self.kept:
            rows = slice(rows.stop - rows.start)
        layers = [layer[rows] for layer in self.layers]
        if self.masks is self.layers:
            return layers, layers
        return layers, [None if mask is None else mask[rows] for mask in self.masks]


def forward_pass(
    features: Tensor,
    viewdirs_enc: Tensor | None,
    parameters: Sequence[Tensor],
    options: tuple[Any, ...],
    training: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """raw rgb, raw density, and with `training` what the backward pass needs. Records no gradient."""
    if torch.is_autocast_enabled(features.device.type):
        with torch.autocast(features.device.type, enabled=False):
            return forward_pass(features, viewdirs_enc, parameters, options, training)
    network = _Network(features, viewdirs_enc, parameters, options)
    gemm, depth, shapes, biases = network.gemm, network.depth, network.plan, network.biases
    rays, samples, num_features = features.shape
    flat = features.reshape(rays * samples, num_features)
    spans, chunk = _spans(rays, samples, gemm.rows_at_a_time(rays * samples, network.width, training))
    # A product makes its output itself where that serves: with few samples every call of torch counts.
    alone = len(spans) == 1 and not (training and gemm.bit_masks)
    stash: list[Tensor] = []
    if training and not alone:
        stash = new_stash(features, viewdirs_enc, parameters, options)[:-1]
    outputs = stash if training and alone else None
    heads = network.heads()
    if training:
        top = network.top(heads)
        colour, to_density = top[: shapes.colour_rows], top[shapes.colour_rows : shapes.colour_rows + 1]
    else:
        colour, to_density = _rounded(heads, gemm.dtype)
    of_colour, of_density = network.split(depth, colour), network.split(depth, to_density)
    # A bias is of its product's dtype.
    plain_biases = _rounded([*biases[:depth], *biases[depth + 3 : -1]], gemm.dtype)
    ray_biases = None if viewdirs_enc is None else network.ray_biases(viewdirs_enc)
    if alone:
        rgb = density = None
        layers: Any = [None] * len(shapes.widths)
        masks: Any = layers
    else:
        rgb, density = (parameters[0].new_empty(rays, samples, columns) for columns in (3, 1))
        activations = _Activations(network, rays * samples, chunk, stash if training else None)
    forgets_first = training and network.does_first_again
    first = None
    if forgets_first and not alone:
        first = parameters[0].new_empty(chunk, network.width, dtype=gemm.dtype)

    for part, rows in spans:
        encoded = _operand(flat if alone else flat[rows], gemm.dtype)
        raw_rgb = raw_density = None
        if rgb is not None and density is not None:
            layers, masks = activations.part(rows)
            if first is not None:
                layers = [first[: rows.stop - rows.start], *layers[1:]]
            raw_rgb, raw_density = rgb[part].view(-1, 3), density[part].view(-1, 1)
        x = encoded
        for number, weights in enumerate(network.trunk):
            x = _layer(gemm, x, encoded, weights, layers[number], plain_biases[number], True, masks[number])
            if outputs is not None:
                outputs.append(x.new_empty(0, network.width) if forgets_first and number == 0 else x)
        raw_density = _layer(gemm, x, encoded, of_density, raw_density, biases[depth])
        if ray_biases is None:
            raw_rgb = _layer(gemm, x, encoded, of_colour, raw_rgb, biases[depth + 1])
        else:
            of_rays = ray_biases if alone else ray_biases[part]
            if shapes.view_depth == 0:
                raw_rgb = _layer(gemm, x, encoded, of_colour, raw_rgb, of_rays)
            else:
                x = _layer(gemm, x, encoded, of_colour, layers[depth], of_rays, True, masks[depth])
                if outputs is not None:
                    outputs.append(x)
                for number, bias in enumerate(plain_biases[depth:], depth + 1):
                    weight = network.views[number - depth - 1]
                    x = gemm.forward(x, weight, layers[number], bias=bias, relu=True, mask=masks[number])
                    if outputs is not None:
                        outputs.append(x)
                raw_rgb = gemm.forward(x, network.views[-1][:3], raw_rgb, bias=biases[-1])
        if alone:
            rgb, density = raw_rgb.view(rays, samples, 3), raw_density.view(rays, samples, 1)
    assert rgb is not None and density is not None
    return rgb, density, [*stash, top] if training else []


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
    """Gradients of features (empty unless wanted), viewdirs_enc (empty without) and the parameters.

    Records no gradient of its own.
    """
    inputs = (grad_rgb, grad_density, features, viewdirs_enc, parameters, stash, options, to_features)
    if torch.is_autocast_enabled(features.device.type):
        with torch.autocast(features.device.type, enabled=False):
            return backward_pass(*inputs)
    rays, samples, num_features = features.shape
    if rays * samples == 0:
        of_features = features.new_zeros(rays if to_features else 0, samples, num_features)
        of_viewdirs = parameters[0].new_zeros(0 if viewdirs_enc is None else viewdirs_enc.shape)
        return [of_features, of_viewdirs, *map(torch.zeros_like, parameters)]
    network = _Network(features, viewdirs_enc, parameters, options)
    gemm, depth, shapes = network.gemm, network.depth, network.plan
    flat = features.reshape(rays * samples, num_features)
    master = parameters[0]
    scale = loss_scale([g for g in (grad_rgb, grad_density) if g is not None], gemm.dtype)
    spans, chunk = _spans(rays, samples, gemm.rows_at_a_time(rays * samples, network.width, True))
    activations = _Activations(network, rays * samples, chunk, stash)
    top, colour_rows = stash[-1], shapes.colour_rows
    matrices = [*network.trunk, network.split(depth, top)]
    alone = len(spans) == 1

    def room(columns: int, count: int = 2) -> list[Any]:
        """For deltas, in turn; a product makes its output itself where there is one chunk."""
        return [None if alone else master.new_empty(chunk, columns, dtype=gemm.dtype) for _ in range(count)]

    of_first = room(network.width, 1) if network.does_first_again else []
    deltas = room(network.width)
    delta_views = room(shapes.widths[-1]) if shapes.view_depth > 1 else []
    # What comes down on the trunk's output, each written into its columns: the colour branch's, density's, and zeros
    # for the rows of `top` that are none. It is done with when its room is needed for a delta of the trunk.
    tops = deltas[(depth - 1) % 2]
    if tops is None or len(top) > network.width:
        tops = master.new_empty(chunk, len(top), dtype=gemm.dtype)
    of_rays: list[Tensor] = []
    grad_features = flat.new_zeros(flat.shape if to_features else (0, num_features))
    # Sums over the chunks so far.
    view_totals: list[Any] = [None] * shapes.view_depth
    totals: list[Any] = [None] * (depth + 1)
    wholes: dict[int, Tensor] = {}

    for part, rows in spans:
        count = rows.stop - rows.start

        def of_chunk(buffer: Tensor | None, count: int = count) -> Tensor | None:
            return buffer if buffer is None else buffer[:count]

        encoded = _operand(flat if alone else flat[rows], gemm.dtype)
        layers, masks = activations.part(rows)
        if network.does_first_again:
            bias = network.biases[0].to(gemm.dtype)
            layers = [
                _layer(gemm, encoded, encoded, network.trunk[0], of_chunk(of_first[0]), bias, True),
                *layers[1:],
            ]
            masks = layers
        # Down the colour branch.
        of_top = tops[:count, : len(top)]
        of_colour, of_density = of_top[:, :colour_rows], of_top[:, colour_rows : colour_rows + 1]
        if shapes.view_depth:
            delta = _delta(grad_rgb, part, scale, network.rgb_rows, master, count, gemm.dtype)
        else:
            _write_delta(of_colour, grad_rgb, part, scale)
        for number in range(shapes.view_depth - 1, -1, -1):
            layer = depth + number
            view_totals[number] = gemm.grad_layer(delta, layers[layer], view_totals[number])
            delta = gemm.grad_input(
                delta,
                network.views[number],
                of_chunk(delta_views[number % 2]) if number else of_colour,
                mask=masks[layer],
            )
        if network.has_views:
            of_rays.append(gemm.sums(of_colour.unflatten(0, (-1, samples)), 1))
        _write_delta(of_density, grad_density, part, scale)
        if len(top) > colour_rows + 1:
            of_top[:, colour_rows + 1 :].zero_()

        # Down the trunk.
        delta = of_top
        feature_beta = 0.0
        for number in range(depth, -1, -1):
            weight, beside = matrices[number]
            x = layers[number - 1] if number else encoded
            if beside is not None and totals[number] is None:
                # Its parts are columns of one matrix.
                whole = master.new_zeros(delta.shape[1], weight.shape[1] + beside.shape[1])
                of_weight, of_beside = whole.split([weight.shape[1], beside.shape[1]], 1)
                wholes[number] = whole
                totals[number] = of_weight, master.new_zeros(delta.shape[1]), of_beside
            total = totals[number]
            parts: tuple[Tensor, ...] = gemm.grad_layer(delta, x, total and total[:2])
            if beside is not None:
                parts = (*parts, gemm.grad_weight(delta, encoded, total and total[2]))
            totals[number] = parts
            if to_features and (beside is not None or number == 0):
                to_encoded = weight if beside is None else beside
                gemm.grad_input(delta, to_encoded, grad_features[rows], beta=feature_beta)
                feature_beta = 1.0
            if number:
                delta = gemm.grad_input(delta, weight, of_chunk(deltas[number % 2]), mask=masks[number - 1])

    # Nobody reads them again, and what follows takes memory of its own.
    del (
        activations,
        layers,
        masks,
        x,
        delta,
        deltas,
        delta_views,
        of_first,
        tops,
        of_top,
        of_colour,
        of_density,
    )
    layered = [(wholes.get(number, total[0]), total[1]) for number, total in enumerate(totals)]
    grad_top, sums = layered.pop()
    layered.append(
        (grad_top[colour_rows : colour_rows + 1].clone(), sums[colour_rows : colour_rows + 1].clone())
    )
    grad_colour = grad_top[:colour_rows], sums[:colour_rows]
    grad_viewdirs = master.new_empty(0)
    if viewdirs_enc is None:
        layered.append(grad_colour)
    else:
        grad_ray_biases = of_rays[0] if alone else torch.cat(of_rays)
        views = viewdirs_enc.to(master.dtype)
        layered += _unfolded(network, grad_colour, grad_ray_biases, views)
        grad_viewdirs = torch.mm(grad_ray_biases, network.from_views)
    layered += view_totals[:-1]
    if shapes.view_depth:
        layered.append((view_totals[-1][0][:3], view_totals[-1][1][:3]))
    grads = [grad for layer in layered for grad in layer]
    if scale is not None:
        for grad in (*grads, grad_features, grad_viewdirs):
            grad.div_(scale)
    shape = (rays if to_features else 0, samples, num_features)
    return [grad_features.view(shape), grad_viewdirs, *grads]


def _unfolded(
    network: _Network,
    grad_colour: tuple[Tensor, Tensor],
    grad_ray_biases: Tensor,
    viewdirs_enc: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    """The gradients of the two layers that were folded into one, from those of the one."""
    of_views = torch.mm(grad_ray_biases.t(), viewdirs_enc)
    depth, from_bottleneck = network.depth, network.from_bottleneck
    grad_fold, sums = grad_colour
    of_bottleneck = torch.addmm(
        torch.outer(sums, network.biases[depth + 1]), grad_fold, network.weights[depth + 1].t()
    )
    grad_bottleneck = torch.mm(from_bottleneck.t(), grad_fold), torch.mv(from_bottleneck.t(), sums)
    return [grad_bottleneck, (torch.cat([of_bottleneck, of_views], 1), sums)]


def _layer(
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


def _spans(rays: int, samples: int, at_a_time: int) -> tuple[list[tuple[slice, slice]], int]:
    """Whole rays, and their samples, about so many samples at a time, none where there are none; the most samples."""
    step = max(1, at_a_time // max(1, samples))
    starts = range(0, rays if samples else 0, step)
    stops = [min(start + step, rays) for start in starts]
    spans = [
        (slice(start, stop), slice(start * samples, stop * samples))
        for start, stop in zip(starts, stops, strict=True)
    ]
    return spans, min(step, rays) * samples


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _rounded(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of this dtype, on a GPU of all tensors in one launch; the tensors themselves where they have it."""
    if not tensors or tensors[0].dtype == dtype:
        return tensors
    if tensors[0].device.type == "cpu":
        return [tensor.to(dtype) for tensor in tensors]
    rounded = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(rounded, tensors)
    return rounded


def _padded(count: int, align: int) -> int:
    return -(-count // align) * align


def _delta(
    grad: Tensor | None,
    rays: slice,
    scale: Tensor | None,
    columns: int,
    master: Tensor,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of an output for these rays as an operand [count, columns], zeros beside it; None is zero."""
    if grad is None:
        return master.new_zeros(count, columns, dtype=dtype)
    rows = grad[rays].flatten(0, 1)
    rows = (rows if scale is None else rows * scale).to(dtype)
    missing = columns - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows


def _write_delta(out: Tensor, grad: Tensor | None, rays: slice, scale: Tensor | None) -> None:
    """The same into the columns of an operand."""
    if grad is None:
        out.zero_()
    else:
        rows = grad[rays].flatten(0, 1)
        out.copy_(rows if scale is None else rows * scale)


_KINDS: tuple[type[TorchGemm] | type[CublasLtTwin] | type[CublasLt], ...] = (
    TorchGemm,
    CublasLtTwin,
    CublasLt,
)
_gemms: dict[tuple[int, torch.dtype, torch.device], Gemm] = {}


def _gemm(products: int, dtype: torch.dtype, device: torch.device) -> Gemm:
    if products == CUBLASLT:
        # With a workspace of its own for every stream: two must not share one.
        return CublasLt(dtype, device)
    key = (products, dtype, device)
    if key not in _gemms:
        _gemms[key] = TorchGemm(dtype) if products == TORCH else CublasLtTwin(dtype)
    return _gemms[key]
