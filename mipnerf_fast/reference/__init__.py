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
from .fast_step import fast_composite, fast_query, fast_render, fast_samples
from .frustum import frustum_gaussians
from .frustum_ipe import frustum_ipe
from .hash_encode import (
    HashGrid,
    attenuation,
    density_inputs,
    hash_encode,
    hash_grid,
    hash_grid_of,
    round_to_half,
    scale_inputs,
)
from .ipe import integrated_pos_enc, pos_enc
from .march import PackedSamples, box_interval, march, mask_for_width, sample_gaussians
from .mlp import mip_mlp, mip_mlp_density, mip_mlp_shapes
from .occupancy import (
    occupancy_layout,
    occupancy_masks,
    occupancy_threshold,
    occupancy_words,
    pack_masks,
    unpack_masks,
)
from .packed_composite import PackedComposite, packed_composite
from .proposal import contract_gaussians, interlevel_loss
from .resample import blur_weights, resample, sample_piecewise_constant, sample_t_vals
from .sparse_adam import sparse_adam
from .tiny_mlp import (
    TinyMlp,
    colour_network,
    density_network,
    fast_density,
    linear,
    round_to_tf32,
    spherical_harmonics,
    tiny_mlp,
)

__all__ = [
    "Activations",
    "Composite",
    "HashGrid",
    "PackedComposite",
    "PackedSamples",
    "TinyMlp",
    "activate_density",
    "activate_rgb",
    "attenuation",
    "blur_weights",
    "box_interval",
    "colour_network",
    "composite",
    "contract_gaussians",
    "density_inputs",
    "density_network",
    "expected_distance",
    "fast_composite",
    "fast_density",
    "fast_query",
    "fast_render",
    "fast_samples",
    "frustum_gaussians",
    "frustum_ipe",
    "hash_encode",
    "hash_grid",
    "hash_grid_of",
    "integrated_pos_enc",
    "interlevel_loss",
    "linear",
    "march",
    "mask_for_width",
    "mip_mlp",
    "mip_mlp_density",
    "mip_mlp_shapes",
    "occupancy_layout",
    "occupancy_masks",
    "occupancy_threshold",
    "occupancy_words",
    "pack_masks",
    "packed_composite",
    "pos_enc",
    "resample",
    "round_to_half",
    "round_to_tf32",
    "sample_gaussians",
    "sample_piecewise_constant",
    "sample_t_vals",
    "scale_inputs",
    "sparse_adam",
    "spherical_harmonics",
    "tiny_mlp",
    "unpack_masks",
    "weights_from_density",
]
