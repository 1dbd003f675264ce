"""tiny-cuda-nn's networks in the place of mip-NeRF's: ANOTHER ARCHITECTURE, for comparison.

Its fully fused networks are 16, 32, 64 or 128 wide, in fp16, without biases and without skips; mip-NeRF's is 256 wide
with both, and cannot be expressed. What can be is built here: a trunk whose outputs are the density and 15 features
without activation, and a colour network over those features and the encoded direction, as instant-ngp has them.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from .mlp_backends import MlpShape

WHAT = "tiny-cuda-nn's fp16 networks without biases and skips: another architecture than mip-NeRF's"
INSTALL = (
    "it is not on the package index. With a GPU visible (or TCNN_CUDA_ARCHITECTURES=80, say) and an nvcc of torch's "
    "CUDA: pip install --no-build-isolation "
    "'git+https://github.com/NVlabs/tiny-cuda-nn/#subdirectory=bindings/torch'"
)
_WIDTHS = (16, 32, 64, 128)
# Features from the trunk to the colour network: with the density 16 outputs, which the fused kernels write themselves.
_NUM_FEATURES = 15


class TcnnNetworks(nn.Module):
    """The two networks behind `MipMLP(backend="tcnn")`.

    Args:
        shape: of `MipMLP`. net_width and net_width_condition are the networks' widths, net_depth and
            net_depth_condition their hidden layers; there are no skips, so skip_layer must be at least net_depth.
        compute_dtype: "auto" or "fp16".

    Errors: ValueError for what tiny-cuda-nn cannot express, naming the argument; RuntimeError, with the steps to
    install it, where it is missing.

    Source: tiny-cuda-nn's DOCUMENTATION.md (FullyFusedMLP) and bindings/torch; Mueller et al. 2022 for the split.
    """

    def __init__(self, shape: MlpShape, compute_dtype: str) -> None:
        super().__init__()
        _check(shape, compute_dtype)
        tinycudann = _import()
        self.num_features = _NUM_FEATURES if shape.view_features is not None else 3
        self.trunk = _network(
            tinycudann, shape.in_features, 1 + self.num_features, shape.net_width, shape.net_depth
        )
        self.colour = (
            None
            if shape.view_features is None
            else _network(
                tinycudann,
                _NUM_FEATURES + shape.view_features,
                3,
                shape.net_width_condition,
                shape.net_depth_condition,
            )
        )

    def forward(self, features: Tensor, viewdirs_enc: Tensor | None) -> tuple[Tensor, Tensor]:
        """Raw rgb [B, N, 3] and raw density [B, N, 1], float32, from [B, N, F] and [B, V]."""
        rays, samples, _ = features.shape
        if rays * samples == 0:
            # tiny-cuda-nn takes no empty batch.
            return features.new_zeros(rays, samples, 3, dtype=torch.float32), features.new_zeros(
                rays, samples, 1, dtype=torch.float32
            )
        out = self.trunk(features.flatten(0, 1).float())
        density, rest = out[:, :1], out[:, 1:]
        if self.colour is None:
            rgb = rest
        else:
            assert viewdirs_enc is not None
            directions = viewdirs_enc[:, None].expand(-1, samples, -1).flatten(0, 1)
            rgb = self.colour(torch.cat([rest.float(), directions.float()], -1))
        return rgb.float().unflatten(0, (rays, samples)), density.float().unflatten(0, (rays, samples))


def why_not_tcnn(shape: MlpShape, device: torch.device) -> str:
    """Why "tcnn" cannot stand in for a network on a device; empty where it can."""
    reasons = []
    try:
        _check(shape, "auto")
    except ValueError as error:
        reasons.append(str(error).removeprefix("mlp: "))
    if device.type != "cuda":
        reasons.append(f"it runs on a GPU, and the parameters are on {device.type}")
    if importlib.util.find_spec("tinycudann") is None:
        reasons.append("tiny-cuda-nn is not installed")
    return "; ".join(reasons)


def _check(shape: MlpShape, compute_dtype: str) -> None:
    def refuse(argument: str, wanted: str, got: object) -> None:
        raise ValueError(f'mlp: the backend "tcnn" ({WHAT}) wants {argument} {wanted}, got {got}')

    if compute_dtype not in ("auto", "fp16"):
        refuse("compute_dtype", '"auto" or "fp16"', repr(compute_dtype))
    widths = {"net_width": shape.net_width}
    if shape.view_features is not None:
        widths["net_width_condition"] = shape.net_width_condition
        if shape.net_depth_condition < 1:
            refuse("net_depth_condition", "of at least 1", shape.net_depth_condition)
    for name, width in widths.items():
        if width not in _WIDTHS:
            refuse(name, "to be 16, 32, 64 or 128", width)
    if shape.skip_layer < shape.net_depth:
        refuse("skip_layer", f"of at least net_depth = {shape.net_depth} (it has no skips)", shape.skip_layer)


def _import() -> Any:
    try:
        return importlib.import_module("tinycudann")
    except ModuleNotFoundError as error:
        if error.name != "tinycudann":
            raise
        raise RuntimeError(
            f'mlp: the backend "tcnn" needs tiny-cuda-nn, which is not installed; {INSTALL}'
        ) from None
    except (ImportError, OSError) as error:
        # It is installed, but finds no GPU or was built for another one: it says so by such an error.
        raise RuntimeError(
            f'mlp: the backend "tcnn" needs tiny-cuda-nn, which cannot be imported: {error}'
        ) from None


def _network(tinycudann: Any, inputs: int, outputs: int, width: int, layers: int) -> nn.Module:
    config = {
        "otype": "FullyFusedMLP",
        "activation": "ReLU",
        "output_activation": "None",
        "n_neurons": width,
        "n_hidden_layers": layers,
    }
    # Drawn from torch's random numbers, so that the run's seed decides about these weights too.
    seed = int(torch.randint(2**31 - 1, ()))
    network: nn.Module = tinycudann.Network(
        n_input_dims=inputs, n_output_dims=outputs, network_config=config, seed=seed
    )
    return network
