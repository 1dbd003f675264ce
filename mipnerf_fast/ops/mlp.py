"""The module `MipMLP`: the network's parameters and its forward pass."""

from __future__ import annotations

from torch import Tensor, nn

from .. import reference
from .finite import reports_non_finite


class MipMLP(nn.Module):
    """The mip-NeRF network: 8 x 256 with a skip, a linear bottleneck and a view branch (612,740 parameters).

    The forward pass is `mipnerf_fast.reference.mip_mlp` over `linears`: the trunk layers, density, bottleneck,
    view layers and rgb. Weights start Glorot-uniform, biases at zero, as in the original.

    Args:
        in_features: of the encoded position (96 for degrees 0 to 16).
        view_features: of the encoded view direction (27 for 4 octaves), or None without view directions.
        net_depth, net_width, net_depth_condition, net_width_condition, skip_layer: of the architecture.

    Source: algorithm 1.5; Barron et al. 2021, section 4.
    """

    def __init__(
        self,
        in_features: int = 96,
        view_features: int | None = 27,
        net_depth: int = 8,
        net_width: int = 256,
        net_depth_condition: int = 1,
        net_width_condition: int = 128,
        skip_layer: int = 4,
    ) -> None:
        super().__init__()
        self.net_depth, self.net_depth_condition, self.skip_layer = net_depth, net_depth_condition, skip_layer
        shapes = reference.mip_mlp_shapes(
            in_features,
            view_features,
            net_depth,
            net_width,
            net_depth_condition,
            net_width_condition,
            skip_layer,
        )
        self.linears = nn.ModuleList(nn.Linear(i, o) for i, o in shapes)
        for linear in self.linears:
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    @reports_non_finite("mlp", "rgb", "density")
    def forward(self, features: Tensor, viewdirs_enc: Tensor | None) -> tuple[Tensor, Tensor]:
        """Raw rgb [B, N, 3] and raw density [B, N, 1] from features [B, N, F] and encoded directions [B, V]."""
        return reference.mip_mlp(
            features, viewdirs_enc, self.linears, self.net_depth, self.net_depth_condition, self.skip_layer
        )

    @reports_non_finite("mlp", "density")
    def density(self, features: Tensor) -> Tensor:
        """Raw density [B, N, 1] alone, bit by bit that of the forward pass, without the colour branch's cost."""
        return reference.mip_mlp_density(features, self.linears, self.net_depth, self.skip_layer)
