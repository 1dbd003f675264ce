"""The fast mode of rendering: what cannot be seen is left out, and what that changes is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .cameras import Rays
from .errors import InputError
from .model import MipNerf, Model
from .reference import Composite

MODES = ("exact", "fast")
# Half a level of an 8-bit colour. A ray whose coarse level is less opaque than this is taken for empty, and a ray ends
# where less than this share of its light is left: neither can change a colour by more, if the coarse level is right.
NEGLIGIBLE = 1 / 512
# Of a ray's samples at the finest level, the shares after which rays end that let no more light through. Resampling
# spreads half of the fenceposts evenly (its padding) and crowds the others at the surface, so that hardly a ray ends
# before half of them; and at each decision the host waits for the device.
_DECISIONS = (0.5, 0.75)
# Rays that are also rendered exactly, to measure the difference.
SUBSET = 4096


def check_mode(model: Model, mode: str) -> None:
    """Errors: InputError for an unknown mode, or for "fast" with a model that has no such mode."""
    if mode not in MODES:
        raise InputError(f"--mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "fast" and not isinstance(model, MipNerf):
        raise InputError(
            f"--mode: fast is for mip-NeRF with a coarse level, not for {type(model).__name__}; leave it at exact"
        )


@torch.no_grad()
def render_rays_fast(model: MipNerf, rays: Rays, white_background: bool = True) -> Composite:
    """Render rays like `MipNerf.render_rays`, leaving out what contributes less than `NEGLIGIBLE` to a colour.

    Rays that the coarse level shows empty get the background and no finest level; of the others the finest level is
    computed in groups of samples, front to back, for those rays alone whose transmittance is still above the limit.
    Which rays those are is asked once before the finest level and once between two groups: there the host waits.

    Args:
        model: with any number of levels; with one level no ray is known to be empty beforehand.
        rays: of one leading dimension, [B, .].
        white_background: white or black behind everything.

    Returns:
        Composite; its weights are empty, samples are not kept. Rounded otherwise than the exact mode even where
        nothing was left out.
    """
    t_vals, opacity = model.propose(rays)
    samples = t_vals.shape[1] - 1
    transmittance = torch.ones_like(t_vals[:, 0])
    colour, depth = torch.zeros_like(rays.origins), torch.zeros_like(transmittance)
    # What goes on: which rays of all, they themselves with their fenceposts, and the light that they let through.
    rows, part, ends, before = torch.arange(len(t_vals), device=t_vals.device), rays, t_vals, transmittance
    goes_on = None if opacity is None else opacity >= NEGLIGIBLE
    stops = sorted({math.ceil(share * samples) for share in (*_DECISIONS, 1)})
    for start, stop in zip([0, *stops], stops, strict=False):
        if goes_on is not None:
            kept = goes_on.nonzero()[:, 0]
            rows, ends, before = rows[kept], ends[kept], before[kept]
            part = Rays(*(field[kept] for field in part))
        if rows.shape[0] == 0:
            break
        group = ends[:, start : stop + 1].contiguous()
        level = model.pixels(group, part, False)
        middles = 0.5 * (group[:, :-1] + group[:, 1:])
        colour[rows] += before[:, None] * level.rgb
        depth[rows] += before * (level.weights * middles).sum(-1)
        before = before * (1 - level.acc)
        transmittance[rows] = before
        goes_on = before >= NEGLIGIBLE
    acc = 1 - transmittance
    # As the exact one: the mean of t under the weights, kept inside the ray; near where nothing is.
    distance = torch.nan_to_num(depth / acc).clamp(t_vals[:, 0], t_vals[:, -1])
    if white_background:
        colour = colour + (1 - acc)[:, None]
    return Composite(colour, distance, acc, colour.new_zeros(len(t_vals), 0))


@dataclass
class Deviation:
    """How far pictures of the fast mode are from the exact ones, on every `stride`-th of their rays.

    total: rays of all pictures. rays: of those rendered both ways so far. squares: sum of the squared differences of
    their colours. largest: of the absolute differences.
    """

    total: int
    rays: int = 0
    squares: float = 0.0
    largest: float = 0.0

    @property
    def stride(self) -> int:
        """Distance between the rays that are compared, so that about `SUBSET` are."""
        return max(1, -(-self.total // SUBSET))

    def subset(self, count: int) -> Tensor:
        """The rays to compare in a picture of so many."""
        return torch.arange(self.stride // 2, count, self.stride)

    def add(self, fast: Tensor, exact: Tensor) -> None:
        """Count the colours [n, 3] of a picture's subset."""
        difference = (fast - exact).double().abs()
        self.rays += fast.shape[0]
        self.squares += float((difference**2).sum())
        if difference.numel():
            self._raise_to(float(difference.max()))

    def include(self, other: Deviation) -> None:
        """Count what another process has compared, of the same pictures."""
        self.rays += other.rays
        self.squares += other.squares
        self._raise_to(other.largest)

    def _raise_to(self, found: float) -> None:
        # NaN is kept: max() may drop it.
        if math.isnan(found) or not math.isnan(self.largest):
            self.largest = found if math.isnan(found) else max(self.largest, found)

    @property
    def psnr(self) -> float:
        """Of the fast colours against the exact ones, dB; infinite where they are equal."""
        if self.squares == 0:
            return math.inf
        return -10 * math.log10(self.squares / (3 * max(self.rays, 1)))

    def __str__(self) -> str:
        return (
            f"fast mode: {self.psnr:.2f} dB PSNR against the exact mode, largest difference {self.largest:.2g}, on "
            f"{self.rays:,} of {self.total:,} rays (one in {self.stride}, rendered both ways)"
        )
