"""NeRF, the comparison system: point samples, plain positional encoding, a coarse and a fine network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops
from .cameras import Rays
from .config import NerfConfig
from .counter_rng import FENCEPOSTS, Generator, draw_uniform
from .reference import (
    Composite,
    activate_density,
    activate_rgb,
    expected_distance,
    pos_enc,
    sample_piecewise_constant,
    sample_t_vals,
    weights_from_density,
)

# The last point of a ray stands for everything behind it.
_LAST_LENGTH = 1e10
# Added to the coarse weights before drawing from them.
_WEIGHT_PADDING = 1e-5


class Nerf(nn.Module):
    """NeRF (Mildenhall et al., ECCV 2020) behind the interface of `MipNerf`, for comparisons.

    64 stratified points go through the coarse network; 128 more are drawn from its weights over the midpoints and
    the fine network sees the sorted union. Density is relu(raw), colour sigmoid(raw).

    Differences from the paper's own runs: distance is normalised by the opacity and clipped, as mip-NeRF's; the
    deterministic fine points are evenly spaced in [0, 1 - 2^-23] of the CDF; no noise on the density.

    Source: algorithm 1.13.
    """

    def __init__(self, config: NerfConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or NerfConfig()
        self.mlps = nn.ModuleList(
            ops.MipMLP(
                in_features=3 + 6 * config.max_deg_point,
                view_features=3 + 6 * config.deg_view,
                net_depth=config.net_depth,
                net_width=config.net_width,
                net_width_condition=config.net_width_condition,
                skip_layer=config.skip_layer,
            )
            for _ in range(2)
        )

    def forward(
        self,
        rays: Rays,
        randomized: bool = False,
        white_background: bool = True,
        generator: Generator = None,
    ) -> list[Composite]:
        """Render rays, as `MipNerf.forward`: [coarse, fine]. The radii are not used."""
        levels = self._levels(rays.flatten(), randomized, white_background, generator)
        return [level.unflatten(rays.batch_shape) for level in levels]

    def render_rays(self, rays: Rays, white_background: bool = True) -> Composite:
        """The fine level alone, without randomness: that of `forward`, the coarse network's colours left out."""
        flat, config = rays.flatten(), self.config
        t_vals = sample_t_vals(flat.near, flat.far, config.num_coarse - 1, None, config.lindisp)
        coarse = self._weights(self.mlps[0].density(self._features(t_vals, flat)), t_vals, flat)  # type: ignore[operator]
        t_vals = self._fine_t_vals(t_vals, coarse, None)
        viewdirs_enc = pos_enc(flat.viewdirs, 0, config.deg_view)
        return self._render(1, t_vals, flat, viewdirs_enc, white_background).unflatten(rays.batch_shape)

    def _levels(
        self, rays: Rays, randomized: bool, white_background: bool, generator: Generator
    ) -> list[Composite]:
        config = self.config
        viewdirs_enc = pos_enc(rays.viewdirs, 0, config.deg_view)

        def uniforms(level: int, columns: int) -> Tensor | None:
            return draw_uniform(generator, FENCEPOSTS + level, columns, rays.origins) if randomized else None

        t_vals = sample_t_vals(
            rays.near, rays.far, config.num_coarse - 1, uniforms(0, config.num_coarse), config.lindisp
        )
        coarse = self._render(0, t_vals, rays, viewdirs_enc, white_background)
        t_vals = self._fine_t_vals(t_vals, coarse.weights, uniforms(1, config.num_fine))
        return [coarse, self._render(1, t_vals, rays, viewdirs_enc, white_background)]

    def _fine_t_vals(self, t_vals: Tensor, weights: Tensor, u: Tensor | None) -> Tensor:
        """The coarse points and those drawn from their weights, sorted."""
        mids = (t_vals[:, 1:] + t_vals[:, :-1]) / 2
        drawn = sample_piecewise_constant(mids, weights[:, 1:-1] + _WEIGHT_PADDING, self.config.num_fine, u)
        return torch.sort(torch.cat([t_vals, drawn], -1), -1).values

    def _features(self, t_vals: Tensor, rays: Rays) -> Tensor:
        points = rays.origins[:, None] + rays.directions[:, None] * t_vals[..., None]
        return pos_enc(points, 0, self.config.max_deg_point)

    def _weights(self, raw_density: Tensor, t_vals: Tensor, rays: Rays) -> Tensor:
        gaps = torch.cat([t_vals[:, 1:] - t_vals[:, :-1], torch.full_like(t_vals[:, :1], _LAST_LENGTH)], -1)
        lengths = gaps * torch.linalg.vector_norm(rays.directions, dim=-1, keepdim=True)
        return weights_from_density(activate_density(raw_density[..., 0], "relu"), lengths)

    def _render(
        self, level: int, t_vals: Tensor, rays: Rays, viewdirs_enc: Tensor, white_background: bool
    ) -> Composite:
        raw_rgb, raw_density = self.mlps[level](self._features(t_vals, rays), viewdirs_enc)
        rgb = activate_rgb(raw_rgb, "sigmoid")
        weights = self._weights(raw_density, t_vals, rays)
        acc = weights.sum(-1)
        colour = (weights[..., None] * rgb).sum(-2)
        if white_background:
            colour = colour + (1 - acc[:, None])
        return Composite(colour, expected_distance(weights, t_vals, acc, t_vals), acc, weights)

    def query(self, points: Tensor, viewdirs: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """Colour [B, 3] and density [B] of the fine network at points [B, 3] seen along viewdirs; no radius."""
        del radius  # a point sample has none
        features = pos_enc(points[:, None], 0, self.config.max_deg_point)
        raw_rgb, raw_density = self.mlps[1](features, pos_enc(viewdirs, 0, self.config.deg_view))
        return activate_rgb(raw_rgb[:, 0], "sigmoid"), activate_density(raw_density[:, 0, 0], "relu")
