"""mip-NeRF in plain PyTorch, any float dtype, to be read beside the paper: the truth of every native kernel."""

from .composite import (
    Activations,
    Composite,
    activate_density,
    activate_rgb,
    composite,
    expected_distance,
    weights_from_density,
)
from .frustum import frustum_gaussians
from .frustum_ipe import frustum_ipe
from .hash_encode import HashGrid, attenuation, density_inputs, hash_encode, hash_grid, scale_inputs
from .ipe import integrated_pos_enc, pos_enc
from .mlp import mip_mlp, mip_mlp_shapes
from .occupancy import (
    occupancy_layout,
    occupancy_masks,
    occupancy_threshold,
    occupancy_words,
    pack_masks,
    unpack_masks,
)
from .resample import blur_weights, resample, sample_piecewise_constant, sample_t_vals

__all__ = [
    "Activations",
    "Composite",
    "activate_density",
    "activate_rgb",
    "blur_weights",
    "composite",
    "expected_distance",
    "frustum_gaussians",
    "frustum_ipe",
    "integrated_pos_enc",
    "mip_mlp",
    "mip_mlp_shapes",
    "pos_enc",
    "resample",
    "sample_piecewise_constant",
    "sample_t_vals",
    "weights_from_density",
]
