"""The public operators, with one signature on every backend."""

from ..reference import Composite
from .composite import composite, composite_resample
from .fast_step import (
    draw_rays,
    fast_query,
    fast_render,
    fast_train_step,
    fast_train_update,
    occupancy_masks,
    occupancy_update,
    sparse_adam,
)
from .frustum_ipe import frustum_ipe
from .hash_encode import hash_encode
from .implementations import (
    FAST_OPERATIONS,
    OPERATIONS,
    Implementation,
    MlpEngine,
    backend_in_use,
    implementations,
    mlp_engines,
    why_no_tf32,
)
from .keeping import KeepsWeights, keeping_weights
from .march import march
from .mlp import MipMLP
from .mlp_backends import MLP_BACKENDS, MLP_DTYPES, MlpChoice, MlpShape, choose_mlp
from .mlp_fused import Encoding, Frusta
from .packed_composite import packed_composite
from .resample import resample
from .tiny_mlp import tiny_mlp, widest_network

__all__ = [
    "FAST_OPERATIONS",
    "MLP_BACKENDS",
    "MLP_DTYPES",
    "OPERATIONS",
    "Composite",
    "Encoding",
    "Frusta",
    "Implementation",
    "KeepsWeights",
    "MipMLP",
    "MlpChoice",
    "MlpEngine",
    "MlpShape",
    "backend_in_use",
    "choose_mlp",
    "composite",
    "composite_resample",
    "draw_rays",
    "fast_query",
    "fast_render",
    "fast_train_step",
    "fast_train_update",
    "frustum_ipe",
    "hash_encode",
    "implementations",
    "keeping_weights",
    "march",
    "mlp_engines",
    "occupancy_masks",
    "occupancy_update",
    "packed_composite",
    "resample",
    "sparse_adam",
    "tiny_mlp",
    "why_no_tf32",
    "widest_network",
]
