"""mip-NeRF: cones to pixels, coarse to fine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops
from .cameras import Rays
from .config import FastConfig, MipNerfConfig, ModelConfig, NerfConfig
from .counter_rng import FENCEPOSTS, NOISE, Generator, draw_normal, draw_uniform
from .fast_model import FastModel
from .nerf import Nerf
from .proposal_model import ProposalModel
from .reference import (
    Activations,
    Composite,
    activate_density,
    activate_rgb,
    integrated_pos_enc,
    pos_enc,
    sample_t_vals,
)


class MipNerf(nn.Module):
    """mip-NeRF (Barron et al., ICCV 2021).

    Every level encodes the frusta between its fenceposts, runs the MLP and composites; the next level's
    fenceposts are drawn from its weights.

    Args:
        config: `MipNerfConfig`; None: the paper's.

    Example:
        >>> model = MipNerf(MipNerfConfig(num_samples=8, net_depth=2, net_width=16))
        >>> rays = cameras.pinhole_rays(torch.eye(4)[:3], height=4, width=6, focal=5.0)
        >>> coarse, fine = model(rays)
        >>> fine.rgb.shape
        torch.Size([4, 6, 3])
    """

    def __init__(self, config: MipNerfConfig | None = None) -> None:
        super().__init__()
        self.config = config or MipNerfConfig()
        count = self.config.num_levels if self.config.separate_mlps else 1
        self.mlps = nn.ModuleList(_build_mlp(self.config) for _ in range(count))

    @property
    def mlp(self) -> ops.MipMLP:
        """The network (of the first level, with separate_mlps)."""
        first = self.mlps[0]
        assert isinstance(first, ops.MipMLP)
        return first

    def forward(
        self,
        rays: Rays,
        randomized: bool = False,
        white_background: bool = True,
        generator: Generator = None,
    ) -> list[Composite]:
        """Render rays.

        Args:
            rays: of any leading shape.
            randomized: whether to jitter the fenceposts and add density noise, as in training.
            white_background: white or black behind everything.
            generator: of the random numbers: a torch.Generator, a CounterRandom, or None for the global one.

        Returns:
            One Composite per level, coarse first, in the leading shape of rays; differentiable in the parameters
            and, through origins, directions and radii, in the rays.
        """
        levels = self._levels(rays.flatten(), randomized, white_background, generator)
        return [level.unflatten(rays.batch_shape) for level in levels]

    @property
    def activations(self) -> Activations:
        """What turns the network's raw outputs into colours and densities, as `composite` takes it."""
        config = self.config
        return {
            "density_activation": config.density_activation,
            "density_bias": config.density_bias,
            "rgb_activation": "sigmoid",
            "rgb_padding": config.rgb_padding,
        }

    def render_rays(self, rays: Rays, white_background: bool = True) -> Composite:
        """The finest level alone, without randomness: that of `forward`, in less time.

        Of the coarse levels only the weights are needed, so their colour branch is left out. Bit by bit the same, but
        for the fused network without gradients, which goes from rays to pixels in one kernel: then within the rounding
        of its 16-bit features.

        Args:
            rays: of any leading shape.
            white_background: white or black behind everything.

        Returns:
            Composite in the leading shape of rays.
        """
        flat = rays.flatten()
        t_vals, _ = self.propose(flat)
        level = self.pixels(t_vals, flat, white_background)
        return level.unflatten(rays.batch_shape)

    def propose(self, rays: Rays) -> tuple[Tensor, Tensor | None]:
        """The fenceposts of the finest level, without randomness, from the densities of the levels before it.

        Args:
            rays: of one leading dimension, [B, .].

        Returns:
            t_vals [B, N+1] and the opacity [B] of the last level before the finest; None where there is only one.
        """
        config = self.config
        t_vals = sample_t_vals(rays.near, rays.far, config.num_samples, None, config.lindisp)
        acc = None
        for number in range(config.num_levels - 1):
            mlp = self._mlp(number)
            if mlp.composites(config.num_samples, density_alone=True):
                level = mlp.composited(
                    self._frusta(t_vals, rays),
                    self._encoding,
                    None,
                    False,
                    self.activations,
                    density_alone=True,
                )
                t_vals = ops.resample(t_vals, level.weights, padding=config.resample_padding)
            else:
                raw_density = mlp.density(self._features(number, t_vals, rays))
                no_rgb = raw_density.new_zeros(*raw_density.shape[:-1], 3)
                level, t_vals = ops.composite_resample(
                    no_rgb,
                    raw_density,
                    t_vals,
                    rays.directions,
                    False,
                    **self.activations,
                    padding=config.resample_padding,
                )
            acc = level.acc
        return t_vals, acc

    def pixels(self, t_vals: Tensor, rays: Rays, white_background: bool) -> Composite:
        """The finest level between the fenceposts t_vals [B, N+1] of rays [B, .], without randomness."""
        number = self.config.num_levels - 1
        mlp, viewdirs_enc = self._mlp(number), self._viewdirs_enc(rays)
        if mlp.composites(t_vals.shape[1] - 1):
            frusta = self._frusta(t_vals, rays)
            return mlp.composited(frusta, self._encoding, viewdirs_enc, white_background, self.activations)
        raw = self._raw(number, t_vals, rays, viewdirs_enc)
        return ops.composite(*raw, t_vals, rays.directions, white_background, **self.activations)

    def _levels(
        self, rays: Rays, randomized: bool, white_background: bool, generator: Generator
    ) -> list[Composite]:
        config = self.config
        viewdirs_enc = self._viewdirs_enc(rays)

        def uniforms(level: int) -> Tensor | None:
            if not randomized:
                return None
            return draw_uniform(generator, FENCEPOSTS + level, config.num_samples + 1, rays.origins)

        activations = self.activations
        t_vals = sample_t_vals(rays.near, rays.far, config.num_samples, uniforms(0), config.lindisp)
        levels: list[Composite] = []
        for level in range(config.num_levels):
            raw_rgb, raw_density = self._raw(level, t_vals, rays, viewdirs_enc)
            if randomized and config.density_noise > 0:
                noise = draw_normal(generator, NOISE + level, config.num_samples, rays.origins)
                raw_density = raw_density + config.density_noise * noise[..., None]
            inputs = (raw_rgb, raw_density, t_vals, rays.directions, white_background)
            if level == config.num_levels - 1:
                levels.append(ops.composite(*inputs, **activations))
            else:
                result, t_vals = ops.composite_resample(
                    *inputs, **activations, u=uniforms(level + 1), padding=config.resample_padding
                )
                levels.append(result)
        return levels

    def _raw(
        self, level: int, t_vals: Tensor, rays: Rays, viewdirs_enc: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        mlp = self._mlp(level)
        if mlp.encodes:
            return mlp.encoded(self._frusta(t_vals, rays), self._encoding, viewdirs_enc)
        raw: tuple[Tensor, Tensor] = mlp(self._features(level, t_vals, rays), viewdirs_enc)
        return raw

    def _viewdirs_enc(self, rays: Rays) -> Tensor | None:
        config = self.config
        return pos_enc(rays.viewdirs, 0, config.deg_view) if config.use_viewdirs else None

    def _frusta(self, t_vals: Tensor, rays: Rays) -> ops.Frusta:
        return ops.Frusta(t_vals, rays.origins, rays.directions, rays.radii)

    @property
    def _encoding(self) -> ops.Encoding:
        config = self.config
        is_cylinder, integrated = config.ray_shape == "cylinder", not config.disable_integration
        return ops.Encoding(config.min_deg_point, config.max_deg_point, is_cylinder, integrated)

    def _mlp(self, level: int) -> ops.MipMLP:
        mlp = self.mlps[level if self.config.separate_mlps else 0]
        assert isinstance(mlp, ops.MipMLP)
        return mlp

    def _features(self, level: int, t_vals: Tensor, rays: Rays) -> Tensor:
        config = self.config
        return ops.frustum_ipe(
            t_vals,
            rays.origins,
            rays.directions,
            rays.radii,
            config.min_deg_point,
            config.max_deg_point,
            config.ray_shape,
            integrated=not config.disable_integration,
            out_dtype=self._mlp(level).feature_dtype,
        )

    def query(self, points: Tensor, viewdirs: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """Colour and density of the finest network in isotropic Gaussians, for grids and meshes.

        Args:
            points: [B, 3], world units.
            viewdirs: [B, 3], unit length.
            radius: standard deviation of the Gaussian along each axis, world units; 0 for a point.

        Returns:
            rgb [B, 3] and density [B], per world unit.
        """
        config = self.config
        variances = torch.full_like(points, 0.0 if config.disable_integration else radius**2)
        features = integrated_pos_enc(
            points[:, None], variances[:, None], config.min_deg_point, config.max_deg_point
        )
        viewdirs_enc = pos_enc(viewdirs, 0, config.deg_view) if config.use_viewdirs else None
        raw_rgb, raw_density = self.mlps[-1](features, viewdirs_enc)
        density = activate_density(raw_density[:, 0, 0], config.density_activation, config.density_bias)
        return activate_rgb(raw_rgb[:, 0], "sigmoid", config.rgb_padding), density


def _build_mlp(config: MipNerfConfig) -> ops.MipMLP:
    return ops.MipMLP(
        in_features=6 * (config.max_deg_point - config.min_deg_point),
        view_features=3 + 6 * config.deg_view if config.use_viewdirs else None,
        net_depth=config.net_depth,
        net_width=config.net_width,
        net_depth_condition=config.net_depth_condition,
        net_width_condition=config.net_width_condition,
        skip_layer=config.skip_layer,
        backend=config.mlp_backend,
        compute_dtype=config.mlp_dtype,
        deterministic=config.mlp_deterministic,
    )


Model = MipNerf | Nerf | FastModel


def build_model(config: ModelConfig) -> Model:
    """The model that a configuration describes, with freshly drawn weights (from torch's global generator)."""
    if isinstance(config, FastConfig):
        return ProposalModel(config) if config.sampling == "proposal" else FastModel(config)
    return Nerf(config) if isinstance(config, NerfConfig) else MipNerf(config)
