"""The forward pass of the folded network: tile by tile in the library, or in products of `gemm`."""

from __future__ import annotations

import torch
from torch import Tensor

from .mlp_folded_network import Activations, Network, apply_layer, new_stash, operand, rounded, row_chunks


def forward_pass(
    network: Network, features: Tensor, viewdirs_enc: Tensor | None, training: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """raw rgb, raw density, and with `training` what the backward pass needs. Records no gradient."""
    if torch.is_autocast_enabled(features.device.type):
        with torch.autocast(features.device.type, enabled=False):
            return forward_pass(network, features, viewdirs_enc, training)
    if network.by_tiles:
        return _by_tiles(network, features, viewdirs_enc, training)
    heads = network.heads()
    stash: list[Tensor] = []
    if training:
        stash = new_stash(features, viewdirs_enc, network.parameters, network.options)
        stash[-1] = top = network.top(heads)
        colour_rows = network.plan.colour_rows
        heads = [top[:colour_rows], top[colour_rows : colour_rows + 1]]
    else:
        heads = rounded(heads, network.dtype)
    ray_biases = None if viewdirs_enc is None else network.ray_biases(viewdirs_enc)
    rgb, density = _by_layers(network, features, heads, ray_biases, stash[:-1] if training else None)
    return rgb, density, stash


def _by_tiles(
    network: Network, features: Tensor, viewdirs_enc: Tensor | None, training: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """In the library: two tiles a thread, and what is kept, are all the memory that it takes."""
    rays, samples, num_features = features.shape
    parameters = network.parameters
    first_kept = int(network.does_first_again) if training else len(parameters)
    rgb, density, *kept = torch.ops.mipnerf_fast.mlp_tiles_forward(
        operand(features.reshape(rays * samples, num_features), network.dtype),
        None if viewdirs_enc is None else operand(viewdirs_enc, network.dtype),
        parameters,
        network.depth,
        network.architecture.skip_layer,
        first_kept,
    )
    if first_kept == 1:
        kept.insert(0, rgb.new_empty(0, network.width))
    return rgb.view(rays, samples, 3), density.view(rays, samples, 1), kept if training else []


def _by_layers(
    network: Network,
    features: Tensor,
    heads: list[Tensor],
    ray_biases: Tensor | None,
    stash: list[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """In products of chunks of rows, into the stash, or with none into two buffers in turn."""
    gemm, depth, shapes, biases = network.gemm, network.depth, network.plan, network.biases
    rays, samples, num_features = features.shape
    flat = features.reshape(rays * samples, num_features)
    chunks, most = row_chunks(
        rays, samples, gemm.rows_at_a_time(rays * samples, network.width, stash is not None)
    )
    of_colour, of_density = (network.split(depth, head) for head in heads)
    # A bias is of its product's dtype.
    plain_biases = rounded([*biases[:depth], *biases[depth + 3 : -1]], gemm.dtype)
    rgb, density = (network.weights[0].new_empty(rays, samples, columns) for columns in (3, 1))
    activations = Activations(network, rays * samples, most, stash)
    first = None
    if stash is not None and network.does_first_again:
        first = network.weights[0].new_empty(most, network.width, dtype=gemm.dtype)
    for part, rows in chunks:
        x = encoded = operand(flat[rows], gemm.dtype)
        outputs = activations.part(rows)
        if first is not None:
            outputs[0] = first[: len(encoded)], None
        raw_rgb, raw_density = rgb[part].view(-1, 3), density[part].view(-1, 1)
        for number, weights in enumerate(network.trunk):
            out, mask = outputs[number]
            x = apply_layer(gemm, x, encoded, weights, out, plain_biases[number], True, mask)
        apply_layer(gemm, x, encoded, of_density, raw_density, biases[depth])
        bias = biases[depth + 1] if ray_biases is None else ray_biases[part]
        if shapes.view_depth == 0:
            apply_layer(gemm, x, encoded, of_colour, raw_rgb, bias)
            continue
        out, mask = outputs[depth]
        x = apply_layer(gemm, x, encoded, of_colour, out, bias, True, mask)
        for number, bias in enumerate(plain_biases[depth:], depth + 1):
            out, mask = outputs[number]
            x = gemm.forward(x, network.views[number - depth - 1], out, bias=bias, relu=True, mask=mask)
        gemm.forward(x, network.views[-1][:3], raw_rgb, bias=biases[-1])
    return rgb, density
