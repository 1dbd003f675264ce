"""The public operators, with one signature on every backend."""

from ..reference import Composite
from .composite import composite, composite_resample
from .fast_step import (
    draw_rays,
    fast_render,
    fast_train_step,
    occupancy_masks,
    occupancy_update,
    sparse_adam,
)
from .frustum_ipe import frustum_ipe
from .implementations import Implementation, backend_in_use, implementations
from .mlp import MipMLP
from .resample import resample

__all__ = [
    "Composite",
    "Implementation",
    "MipMLP",
    "backend_in_use",
    "composite",
    "composite_resample",
    "draw_rays",
    "fast_render",
    "fast_train_step",
    "frustum_ipe",
    "implementations",
    "occupancy_masks",
    "occupancy_update",
    "resample",
    "sparse_adam",
]
