"""Models whose pictures are known in closed form, behind the interface of `MipNerf`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mipnerf_fast import Composite, MipNerfConfig, Rays


class Ball(nn.Module):
    """An opaque ball around the origin, with the colour 0.5 + 0.5 p / radius at its point p, on the background."""

    def __init__(self, radius: float = 1.0, inside: float = 100.0, outside: float = 1e-3) -> None:
        super().__init__()
        self.config = MipNerfConfig(num_samples=8, net_width=16)
        self.anchor = nn.Parameter(torch.zeros(()))
        self.radius, self.inside, self.outside = radius, inside, outside

    def forward(
        self, rays: Rays, randomized: bool = False, white_background: bool = True, generator: object = None
    ) -> list[Composite]:
        o, d = rays.origins, rays.directions
        a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - self.radius**2
        root = b * b - a * c
        hit = root > 0
        t = torch.where(hit, (-b - root.clamp(min=0).sqrt()) / a, rays.near[..., 0])
        colour = 0.5 + 0.5 * (o + t[..., None] * d) / self.radius
        acc = hit.to(t)
        rgb = torch.where(hit[..., None], colour, torch.full_like(colour, float(white_background)))
        return [Composite(rgb, t, acc, acc[..., None])]

    def render_rays(self, rays: Rays, white_background: bool = True) -> Composite:
        """As `MipNerf.render_rays`."""
        return self(rays, False, white_background)[-1]

    def query(self, points: Tensor, viewdirs: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """The density falls across the surface like a sigmoid of 0.05; the colour says where one looks to."""
        share = torch.sigmoid((self.radius - points.norm(dim=-1)) / 0.05)
        return 0.5 + 0.5 * viewdirs, self.outside + (self.inside - self.outside) * share
