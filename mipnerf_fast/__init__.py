"""mip-NeRF, exact and anti-aliased, at the speed the hardware allows."""

import os
import sys

# Threads of torch's OpenMP that wait for one another spin for milliseconds by default. On a machine that is busy
# otherwise they spin on the cores that the others need: three small trainings at once on two cores took 540 ms a step,
# with this limit 160 ms; alone they take as long as before. OpenMP reads it once, when torch is loaded.
if "torch" not in sys.modules:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

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
