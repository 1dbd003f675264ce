"""The backward pass of the folded network over the products of `gemm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .mlp_autograd import loss_scale
from .mlp_folded_network import Activations, Network, apply_layer, operand, row_chunks


def backward_pass(
    network: Network,
    grad_rgb: Tensor | None,
    grad_density: Tensor | None,
    features: Tensor,
    viewdirs_enc: Tensor | None,
    stash: list[Tensor],
    to_features: bool,
) -> list[Tensor]:
    """Gradients of features and viewdirs_enc (each empty unless wanted) and of the parameters.

    Records no gradient of its own. Empties `stash`: what nobody else holds of it is freed on the way down, where the
    rows are few enough to go together, and gradients take its place.
    """
    if torch.is_autocast_enabled(features.device.type):
        inputs = (network, grad_rgb, grad_density, features, viewdirs_enc, stash, to_features)
        with torch.autocast(features.device.type, enabled=False):
            return backward_pass(*inputs)
    parameters = network.parameters
    rays, samples, num_features = features.shape
    if rays * samples == 0:
        of_features = features.new_zeros(rays if to_features else 0, samples, num_features)
        of_viewdirs = parameters[0].new_zeros(0 if viewdirs_enc is None else viewdirs_enc.shape)
        return [of_features, of_viewdirs, *map(torch.zeros_like, parameters)]
    scale = loss_scale([g for g in (grad_rgb, grad_density) if g is not None], network.gemm.dtype)
    of_features = parameters[0].new_empty(rays * samples if to_features else 0, num_features)
    if to_features:
        of_features.zero_()
    gradients = _Gradients(network)
    _descend(network, (grad_rgb, grad_density), features, stash, scale, gradients, of_features)
    grads, of_viewdirs = gradients.by_parameter(viewdirs_enc)
    if scale is not None:
        for grad in (*grads, of_features, of_viewdirs):
            grad.div_(scale)
    shape = (rays if to_features else 0, samples, num_features)
    return [of_features.view(shape), of_viewdirs, *grads]


class _Gradients:
    """Of the folded network's layers, summed over the chunks of rows."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.views: list[Any] = [None] * network.plan.view_depth
        # Of the trunk's layers, and of the matrix over the trunk. Where the features are beside the activations there
        # are two of a matrix, columns of one whole.
        self.trunk: list[Any] = [None] * (network.depth + 1)
        self.wholes: dict[int, Tensor] = {}
        self.of_rays: list[Tensor] = []

    def down(
        self,
        number: int,
        delta: Tensor,
        x: Tensor,
        encoded: Tensor,
        weights: tuple[Tensor, Tensor | None],
        to_features: Tensor | None,
        out: Tensor | None = None,
        mask: Any = None,
    ) -> Tensor | None:
        """Some rows' part of a trunk layer's, or of the matrix over it, and of the features' where it reads them.

        Returns the delta of the layer below, in `out` where there is one; None where its ReLU has no mask: there is no
        such layer.
        """
        network, total = self.network, self.trunk[number]
        weight, beside = weights
        if to_features is not None and (number == 0 or beside is not None):
            network.gemm.grad_input(delta, weight if beside is None else beside, to_features, beta=1.0)
        if network.down_by_layers:
            others = None if beside is None else encoded
            of_rays = self.of_rays[-1] if self.of_rays and number == network.depth else None
            self.trunk[number], below = _in_one_pass(
                delta, x, others, weight, total, out, mask is not None, of_rays
            )
            return below
        if beside is None:
            self.trunk[number] = network.gemm.grad_layer(delta, x, total)
        else:
            if total is None:
                columns = [x.shape[1], encoded.shape[1]]
                whole = network.weights[0].new_zeros(delta.shape[1], sum(columns))
                of_weight, of_beside = whole.split(columns, 1)
                total = of_weight, whole.new_zeros(delta.shape[1]), of_beside
                self.wholes[number], self.trunk[number] = whole, total
            network.gemm.grad_layer(delta, x, total[:2])
            network.gemm.grad_weight(delta, encoded, total[2])
        return None if mask is None else network.gemm.grad_input(delta, weight, out, mask=mask)

    def down_the_views(self, number: int, delta: Tensor, x: Tensor, out: Tensor | None, mask: Any) -> Tensor:
        """The same of a view layer."""
        network, total = self.network, self.views[number]
        if network.down_by_layers:
            self.views[number], below = _in_one_pass(delta, x, None, network.views[number], total, out, True)
            assert below is not None
            return below
        self.views[number] = network.gemm.grad_layer(delta, x, total)
        return network.gemm.grad_input(delta, network.views[number], out, mask=mask)

    def sum_over_rays(self, delta: Tensor, samples: int) -> None:
        """Some rays' part of the gradient of their biases; where layers go down in one pass, room that it fills."""
        network, columns = self.network, self.network.plan.colour_rows
        if network.down_by_layers:
            self.of_rays.append(delta.new_empty(delta.shape[0] // samples, columns))
        else:
            self.of_rays.append(network.gemm.sums(delta[:, :columns].view(-1, samples, columns), 1))

    def by_parameter(self, viewdirs_enc: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Those of the parameters, the bottleneck unfolded, and that of viewdirs_enc (empty unless wanted)."""
        network = self.network
        layered = [(self.wholes.get(number, total[0]), total[1]) for number, total in enumerate(self.trunk)]
        grad_top, sums = layered.pop()
        grads = [grad for layer in layered for grad in layer]
        of_viewdirs = sums.new_empty(0)
        if viewdirs_enc is None:
            rows = network.plan.colour_rows
            grads += [grad[rows : rows + 1].clone() for grad in (grad_top, sums)]
            grads += [grad_top[:rows], sums[:rows]]
        else:
            of_ray_biases = self.of_rays[0] if len(self.of_rays) == 1 else torch.cat(self.of_rays)
            *of_heads, of_viewdirs = network.unfold(grad_top, sums, of_ray_biases, viewdirs_enc)
            grads += of_heads
        for number, layer in enumerate(self.views):
            rows = 3 if number + 1 == len(self.views) else len(layer[1])
            grads += layer if rows == len(layer[1]) else [grad[:rows] for grad in layer]
        return grads, of_viewdirs


def _descend(
    network: Network,
    grads: tuple[Tensor | None, Tensor | None],
    features: Tensor,
    stash: list[Tensor],
    scale: Tensor | None,
    gradients: _Gradients,
    of_features: Tensor,
) -> None:
    """Down through the layers, once for every chunk of rows; adds to `of_features`, if it has rows."""
    rays, samples, num_features = features.shape
    gemm, flat = network.gemm, features.reshape(rays * samples, num_features)
    chunks, most = row_chunks(rays, samples, gemm.rows_at_a_time(rays * samples, network.width, True))
    alone = len(chunks) == 1
    top = stash.pop()
    activations = Activations(network, rays * samples, most, stash)
    stash.clear()
    deltas = _Deltas(network, top.shape[0], None if alone else most)
    for part, rows in chunks:
        encoded = operand(flat if alone else flat[rows], gemm.dtype)
        kept = activations.take_all() if alone else activations.part(rows)
        to_features = of_features[rows] if of_features.shape[0] else None
        delta = _down_the_colour_branch(network, grads, part, kept, scale, top, deltas, gradients)
        if network.has_views:
            gradients.sum_over_rays(delta, samples)
        weights = network.split(network.depth, top)
        if alone:
            del top
        for number in range(network.depth, int(network.does_first_again), -1):
            x, mask = kept.pop()
            out = deltas.of_trunk(number, delta.shape[0])
            below = gradients.down(number, delta, x, encoded, weights, to_features, out, mask)
            assert below is not None
            delta, weights = below, network.trunk[number - 1]
            del x, mask, out, below
        if not network.does_first_again:
            gradients.down(0, delta, encoded, encoded, weights, to_features)
            continue
        # In halves: most gradients are there already, and whole the rows would take more than was kept of them.
        size = -(-delta.shape[0] // 2) if alone else most
        for start in range(0, delta.shape[0], size):
            half = slice(start, start + size)
            to_half = None if to_features is None else to_features[half]
            _down_the_lowest_two(network, delta[half], encoded[half], deltas, gradients, to_half)


def _down_the_lowest_two(
    network: Network,
    delta: Tensor,
    encoded: Tensor,
    deltas: _Deltas,
    gradients: _Gradients,
    to_features: Tensor | None,
) -> None:
    """With what the first layer gave done again."""
    first, second = network.trunk[:2]
    x = deltas.first_again(encoded)
    below = gradients.down(1, delta, x, encoded, second, to_features, deltas.of_trunk(1, delta.shape[0]), x)
    assert below is not None
    gradients.down(0, below, encoded, encoded, first, to_features)


def _in_one_pass(
    delta: Tensor,
    x: Tensor,
    beside: Tensor | None,
    weight: Tensor,
    total: tuple[Tensor, Tensor] | None,
    out: Tensor | None,
    wants_below: bool,
    of_rays: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """A layer's way down in the library: its gradients, added to what there is of them, and the delta below.

    of_rays: room for the sums of the delta's first columns over the rays.
    """
    add = total is not None
    if total is None:
        columns = x.shape[1] + (0 if beside is None else beside.shape[1])
        total = x.new_empty(delta.shape[1], columns), x.new_empty(delta.shape[1])
    if wants_below and out is None:
        out = x.new_empty(x.shape)
    torch.ops.mipnerf_fast.mlp_layer_backward.default(
        delta, x, beside, weight, out if wants_below else None, *total, of_rays, add
    )
    return total, out


class _Deltas:
    """Room for what comes down, for chunks of at most so many rows.

    None: there is one chunk alone, whose products make their outputs themselves, so that each is freed once it is used.
    """

    def __init__(self, network: Network, top_rows: int, most: int | None) -> None:
        self.network, self.most = network, most
        shapes, width = network.plan, network.width
        self.trunk: list[Any] = [None, None]
        self.views = self.trunk
        self.first: Tensor | None = None
        self.top: Tensor | None = None
        if most is None:
            return
        self.trunk = [self._new(most, width) for _ in range(2)]
        if shapes.view_depth > 1:
            self.views = [self._new(most, shapes.widths[-1]) for _ in range(2)]
        if network.does_first_again:
            self.first = self._new(most, width)
        # Done with when its room is needed for a delta of the trunk.
        self.top = self.trunk[(network.depth - 1) % 2] if top_rows <= width else self._new(most, top_rows)

    def of_trunk(self, number: int, rows: int) -> Tensor | None:
        """Of what the trunk's layer of this number reads."""
        return None if self.most is None else self.trunk[number % 2][:rows]

    def of_view_layer(self, number: int, rows: int) -> Tensor | None:
        """Of what the view layer of this number, not the lowest, reads."""
        return None if self.most is None else self.views[number % 2][:rows]

    def of_top(self, rows: int, columns: int) -> Tensor:
        """Of the trunk's output, a column for every row of the matrix over it."""
        if self.top is None:
            return self._new(rows, columns)
        # Its rows one behind the other: a product that reads on behind the last column finds the next row.
        return self.top.view(-1)[: rows * columns].view(rows, columns)

    def first_again(self, encoded: Tensor) -> Tensor:
        """What the first layer gave."""
        network, out = self.network, self.first
        bias = network.biases[0].to(network.gemm.dtype)
        out = out if out is None else out[: encoded.shape[0]]
        return apply_layer(network.gemm, encoded, encoded, network.trunk[0], out, bias, True)

    def _new(self, rows: int, columns: int) -> Tensor:
        return self.network.weights[0].new_empty(rows, columns, dtype=self.network.gemm.dtype)


def _down_the_colour_branch(
    network: Network,
    grads: tuple[Tensor | None, Tensor | None],
    part: slice,
    kept: list[tuple[Tensor, Any]],
    scale: Tensor | None,
    top: Tensor,
    deltas: _Deltas,
    gradients: _Gradients,
) -> Tensor:
    """What comes down on the trunk's output for these rays, each written into its columns.

    The colour branch's, density's, and zeros for the rows of `top` that are none. Takes the view layers out of `kept`.
    """
    shapes, count = network.plan, kept[-1][0].shape[0]
    grad_rgb, grad_density = grads
    rows, columns = shapes.colour_rows, top.shape[0]
    of_top = deltas.of_top(count, columns)
    of_colour, of_density = of_top[:, :rows], of_top[:, rows : rows + 1]
    if shapes.view_depth:
        delta = _delta(grad_rgb, part, scale, network.rgb_rows, of_top)
    else:
        _write_delta(of_colour, grad_rgb, part, scale)
    for number in range(shapes.view_depth - 1, -1, -1):
        x, mask = kept.pop()
        out = deltas.of_view_layer(number, count) if number else of_colour
        delta = gradients.down_the_views(number, delta, x, out, mask)
    _write_delta(of_density, grad_density, part, scale)
    if columns > rows + 1:
        of_top[:, rows + 1 :].zero_()
    return of_top


def _delta(grad: Tensor | None, rays: slice, scale: Tensor | None, columns: int, like: Tensor) -> Tensor:
    """The gradient of an output for these rays as an operand [R, columns], zeros beside it; None is zero.

    With as many rows as `like`, and of its dtype.
    """
    if grad is None:
        return like.new_zeros(like.shape[0], columns)
    rows = grad[rays].flatten(0, 1)
    rows = operand(rows if scale is None else rows * scale, like.dtype)
    missing = columns - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows


def _write_delta(out: Tensor, grad: Tensor | None, rays: slice, scale: Tensor | None) -> None:
    """The same into the columns of an operand."""
    if grad is None:
        out.zero_()
    else:
        rows = grad[rays].flatten(0, 1)
        out.copy_(rows if scale is None else rows * scale)
