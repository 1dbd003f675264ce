"""The fast model without a box: a proposal network instead of the occupancy grid says where to look."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops, reference
from .cameras import Rays
from .config import FastConfig
from .fast_model import FastModel
from .reference import Composite, PackedComposite

# The proposal's grid is coarse: it has to find matter, not to draw it.
_LEVELS, _FEATURES, _COARSEST, _FINEST, _LOG2_TABLE, _WIDTH = 5, 2, 16, 128, 15, 16
# Of mip-NeRF's resampling (its alpha).
_PADDING = 0.01


class ProposalLevels(NamedTuple):
    """Both levels of a batch: fenceposts t [B, P+1] and weights [B, P] of the proposal, fenceposts [B, N+1] and result
    of the final level; its weights are [B N]."""

    proposal_t_vals: Tensor
    proposal_weights: Tensor
    t_vals: Tensor
    result: PackedComposite


class ProposalModel(FastModel):
    """A `FastModel` for scenes without a box: all of space, contracted, sampled by mip-NeRF's resampling.

    A small hash grid with one hidden layer gives densities on `proposal_samples` intervals of a ray; `num_samples`
    fenceposts are drawn from their weights (equation 18), and the networks of `FastModel` colour those intervals. Space
    outside the ball of radius box_half is contracted into one twice as large. A Gaussian's width is that of the sphere
    of the same variance, since resampled intervals may be long.

    Parameters, beside those of `FastModel`: proposal_tables [entries, 2], proposal_in [16, inputs], proposal_out
    [1, 16]. It has no occupancy grid.

    Args:
        config: with sampling = "proposal".

    Source: Barron et al. 2021, section 3.2 (resampling); Barron et al. 2022, section 3 (proposals, contraction).
    """

    def __init__(self, config: FastConfig) -> None:
        super().__init__(config)
        del self.densities, self.masks
        self.proposal_grid = reference.hash_grid(_LEVELS, _COARSEST, _FINEST, 2**_LOG2_TABLE)
        inputs = reference.density_inputs(_LEVELS * _FEATURES)
        self.proposal_tables = nn.Parameter(torch.empty(self.proposal_grid.entries, _FEATURES))
        self.proposal_in = nn.Parameter(torch.empty(_WIDTH, inputs))
        self.proposal_out = nn.Parameter(torch.empty(1, _WIDTH))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as `FastModel` does; the proposal's too, once it is there."""
        super().reset_parameters()
        if not hasattr(self, "proposal_out"):
            return
        nn.init.uniform_(self.proposal_tables, -1e-2, 1e-2)
        for weight in (self.proposal_in, self.proposal_out):
            bound = math.sqrt(6.0 / weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)

    def levels(
        self, rays: Rays, background: Tensor, u: tuple[Tensor, Tensor] | None = None
    ) -> ProposalLevels:
        """Both levels of flat rays; differentiable in the parameters.

        Args:
            rays: of one leading dimension B, float32.
            background: [B, 3].
            u: uniform numbers in [0, 1) that jitter the fenceposts, [B, proposal_samples + 1] and [B, num_samples + 1];
                None: evenly spaced.
        """
        config = self.config
        first, second = u if u is not None else (None, None)
        t_vals = reference.sample_t_vals(rays.near, rays.far, config.proposal_samples, first, config.lindisp)
        means, scales, _ = self._gaussians(rays, t_vals)
        density = self._proposal_density(means, scales).reshape(t_vals.shape[0], -1, 1)
        # Only the weights are wanted: a black proposal on black.
        dark = density.new_zeros(*density.shape[:2], 3)
        weights = ops.composite(dark, density, t_vals, rays.directions, white_background=False).weights
        fine = ops.resample(t_vals.detach(), weights.detach(), config.num_samples, second, _PADDING)
        means, scales, rows = self._gaussians(rays, fine)
        rgb, density = self._field(means, scales, rays.viewdirs, rows)
        norms = torch.linalg.vector_norm(rays.directions, dim=-1)
        count = config.num_samples
        result = ops.packed_composite(
            rgb,
            density,
            (fine.diff() * norms[:, None]).reshape(-1),
            (0.5 * (fine[:, 1:] + fine[:, :-1])).reshape(-1),
            torch.arange(fine.shape[0] + 1, device=fine.device) * count,
            background,
            rays.near,
        )
        return ProposalLevels(t_vals, weights, fine, result)

    @property
    def rendered_tables(self) -> torch.dtype:
        """What rendering reads the tables in: as they are, by operators that training has too."""
        return self.tables.dtype

    def _gaussians(self, rays: Rays, t_vals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means [S, 3] and widths [S] in the unit cube, and the ray of each sample [S]."""
        means, variances = reference.frustum_gaussians(t_vals, rays.origins, rays.directions, rays.radii)
        contracted, scales = reference.contract_gaussians(
            means.reshape(-1, 3), torch.sqrt(variances.mean(-1)).reshape(-1), self.config.box_half
        )
        rows = torch.arange(means.shape[0], device=means.device).repeat_interleave(means.shape[1])
        return contracted, scales, rows

    def _proposal_density(self, means: Tensor, scales: Tensor) -> Tensor:
        config = self.config
        low, high = self._scale_bounds()
        kind, cutoff = config.attenuation, config.attenuation_cutoff
        encoded = ops.hash_encode(means, scales, self.proposal_tables, self.proposal_grid, kind, cutoff)
        extra = reference.scale_inputs(scales, config.scale_input, low, high)
        geometry = reference.density_network(
            torch.cat([encoded, extra], -1), self.proposal_in, self.proposal_out
        )
        return reference.fast_density(geometry)

    def _field(self, means: Tensor, scales: Tensor, viewdirs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Colour [S, 3] and density [S]; differentiable in the parameters."""
        config = self.config
        low, high = self._scale_bounds()
        kind, cutoff = config.attenuation, config.attenuation_cutoff
        encoded = ops.hash_encode(means, scales, self.tables, self.grid, kind, cutoff)
        extra = reference.scale_inputs(scales, config.scale_input, low, high)
        return ops.tiny_mlp(
            torch.cat([encoded, extra], -1),
            reference.spherical_harmonics(viewdirs),
            rows,
            self.density_in,
            self.density_out,
            self.colour_in,
            self.colour_hidden,
            self.colour_out,
            tf32=self.uses_tf32(),
        )

    def render_rays(self, rays: Rays, white_background: bool = True) -> Composite:
        """Render rays, deterministically and without gradients; see `FastModel.render_rays`."""
        flat = rays.flatten().map(lambda field: field.to(torch.float32))
        background = torch.full_like(flat.origins, 1.0 if white_background else 0.0)
        with torch.no_grad():
            result = self.levels(flat, background).result
        weights = background.new_zeros(background.shape[0], 0)
        return Composite(result.rgb, result.distance, result.acc, weights).unflatten(rays.batch_shape)

    @torch.no_grad()
    def query(self, points: Tensor, viewdirs: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """Colour and density in isotropic Gaussians anywhere; see `FastModel.query`."""
        scales = torch.full_like(points[:, 0], radius)
        means, scales = reference.contract_gaussians(points, scales, self.config.box_half)
        rows = torch.arange(points.shape[0], device=points.device)
        return self._field(means, scales, viewdirs, rows)
