"""How many rays a pass may take: from the memory that is free and what a ray takes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .config import MipNerfConfig, NerfConfig, TrainConfig
from .cpu_setup import free_memory

# Share of the free memory that one pass may take.
_MEMORY_SHARE = 0.5
# Rays of the passes that are measured on a GPU: small beside any batch, large beside what a pass takes whatever its
# size.
_PROBE_RAYS = (64, 192)


def bytes_per_ray(config: TrainConfig) -> int:
    """About what the graph of one ray takes in a training pass of the plain-PyTorch model, an upper estimate.

    Per sample in float32: the encoding with its temporaries (4 times the features), every layer's output before and
    after its ReLU, the concatenated inputs, and as much as the largest of these again for the backward pass.
    """
    model = config.model
    if isinstance(model, MipNerfConfig):
        samples = model.num_samples * model.num_levels
        features = 6 * (model.max_deg_point - model.min_deg_point)
        view_layers = model.net_depth_condition
    elif isinstance(model, NerfConfig):
        samples = 2 * model.num_coarse + model.num_fine
        features = 3 + 6 * model.max_deg_point
        view_layers = 1
    else:
        raise TypeError("bytes_per_ray: the fast model keeps no graph")
    skips = (model.net_depth - 1) // model.skip_layer
    layers = 2 * model.net_depth * model.net_width + 2 * view_layers * model.net_width_condition
    inputs = skips * (model.net_width + features) + 2 * model.net_width + 3 + 6 * model.deg_view
    backward = 2 * (model.net_width + features)
    return 4 * samples * (4 * features + layers + inputs + backward + 32)


def measured_bytes_per_ray(do_pass: Callable[[int], None], device: torch.device) -> int:
    """What one ray takes on a GPU: the difference of the peaks of two passes over the difference of their sizes.

    Args:
        do_pass: forward and backward of so many rays; may leave gradients behind.
        device: the GPU.
    """
    peaks = []
    for rays in _PROBE_RAYS:
        # The first one takes workspaces that stay.
        do_pass(rays)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        do_pass(rays)
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    return max(1, math.ceil((peaks[1] - peaks[0]) / (_PROBE_RAYS[1] - _PROBE_RAYS[0])))


def choose_chunk(rays: int, bytes_of_ray: int, device: torch.device) -> int:
    """Rays per pass: as many of a process's rays as half of the free memory holds.

    Where they do not fit they are cut into equal parts.
    """
    fitting = max(1, int(_MEMORY_SHARE * free_memory(device) / bytes_of_ray))
    parts = math.ceil(rays / fitting)
    return math.ceil(rays / parts)
