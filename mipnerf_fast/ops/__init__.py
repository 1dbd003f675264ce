"""The public operators, with one signature on every backend."""

from ..reference import Composite
from .composite import composite, composite_resample
from .frustum_ipe import frustum_ipe
from .mlp import MipMLP
from .resample import resample

__all__ = ["Composite", "MipMLP", "composite", "composite_resample", "frustum_ipe", "resample"]
