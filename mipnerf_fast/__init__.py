"""mip-NeRF, exact and anti-aliased, at the speed the hardware allows."""

from . import cameras, metrics, ops, reference, schedules
from .backend import use_backend
from .cameras import Rays
from .config import FastConfig, MipNerfConfig, NerfConfig, TrainConfig, preset
from .errors import InputError
from .fast_model import FastModel
from .model import MipNerf, build_model
from .nerf import Nerf
from .reference import Composite

__version__ = "0.1.0"

__all__ = [
    "Composite",
    "FastConfig",
    "FastModel",
    "InputError",
    "MipNerf",
    "MipNerfConfig",
    "Nerf",
    "NerfConfig",
    "Rays",
    "TrainConfig",
    "build_model",
    "cameras",
    "metrics",
    "ops",
    "preset",
    "reference",
    "schedules",
    "use_backend",
]
