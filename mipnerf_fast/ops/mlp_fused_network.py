"""The folded network as the fused kernels take it, and the raw operators over these kernels (csrc/mlp)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from .mlp_autograd import Architecture
from .mlp_folding import unfold
from .registration import register_without_derivative

TILE_ROWS = 128  # samples of a block
_OPERATORS = ("mlp_pack", "mlp_forward", "mlp_encoded_forward", "mlp_composited_forward", "mlp_backward")


class Sizes(NamedTuple):
    """The network as the operators take it; without views the last two are 0."""

    width: int
    depth: int
    skip_layer: int
    view_width: int
    view_depth: int


class Kernels(NamedTuple):
    """What packs, and goes forward and back: the raw operators."""

    pack: Callable[..., Tensor]
    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    encoded_forward: Callable[..., tuple[Tensor, Tensor]]
    composited_forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


class FoldedNetwork:
    """The folded parameters of a network, packed for the kernels when they are first asked for, and the way back."""

    def __init__(self, parameters: Sequence[Tensor], architecture: Architecture, has_views: bool) -> None:
        depth, view_depth, skip_layer = architecture
        detached = [parameter.detach() for parameter in parameters]
        self.layers = list(zip(detached[0::2], detached[1::2], strict=True))
        self.depth = depth
        self.width = self.layers[0][0].shape[0]
        self.has_views = has_views
        self._packed: dict[torch.dtype, Tensor] = {}
        if not has_views:
            self.sizes = Sizes(self.width, depth, skip_layer, 0, 0)
            self.matrices = self.layers
        else:
            bottleneck_weight, bottleneck_bias = self.layers[depth + 1]
            weight, bias = self.layers[depth + 2]
            self.sizes = Sizes(self.width, depth, skip_layer, len(weight), view_depth)
            from_bottleneck, self._from_views = weight[:, : self.width], weight[:, self.width :]
            folded = from_bottleneck @ bottleneck_weight
            self._shared_bias = bias + from_bottleneck @ bottleneck_bias
            # In the place of the bias, which is each ray's, stands one that nobody reads.
            self.matrices = [*self.layers[: depth + 1], (folded, bias), *self.layers[depth + 3 :]]

    def ray_bias(self, viewdirs_enc: Tensor | None) -> Tensor | None:
        """The view branch's first bias, of each ray; None without views."""
        if viewdirs_enc is None:
            return None
        return self._directions(viewdirs_enc) @ self._from_views.t() + self._shared_bias

    def _directions(self, viewdirs_enc: Tensor) -> Tensor:
        return viewdirs_enc.detach().to(self.layers[0][0].dtype)

    def packed(self, features: int, dtype: torch.dtype) -> Tensor:
        """As `mlp_pack` gives them."""
        if dtype not in self._packed:
            self._packed[dtype] = operators().pack(self.flat(), features, *self.sizes, dtype)
        return self._packed[dtype]

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """The weights and biases in the array that the kernels know, each at a multiple of 4."""
        parts, at = [], 0
        for tensor in (tensor for matrix in self.matrices for tensor in matrix):
            parts.append(flat[at : at + tensor.numel()].view(tensor.shape))
            at += -(-tensor.numel() // 4) * 4
        return parts

    def flat(self) -> Tensor:
        tensors = [tensor for matrix in self.matrices for tensor in matrix]
        flat = tensors[0].new_empty(sum(-(-tensor.numel() // 4) * 4 for tensor in tensors))
        torch._foreach_copy_(self._parts(flat), tensors)
        return flat

    def unfold(
        self, gradients: Tensor, ray_sums: Tensor, viewdirs_enc: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of the parameters in their order, and of the encoded directions (empty without)."""
        parts = self._parts(gradients)
        if viewdirs_enc is None:
            return parts, gradients.new_empty(0)
        weight, _ = self.layers[self.depth + 2]
        at = 2 * (self.depth + 1)
        grad, sums = parts[at : at + 2]
        bottleneck_weight, bottleneck_bias = self.layers[self.depth + 1]
        directions = self._directions(viewdirs_enc)
        inputs = (grad, sums, ray_sums, directions, weight, bottleneck_weight, bottleneck_bias)
        *unfolded, of_viewdirs = unfold(*inputs)
        return [*parts[:at], *unfolded, *parts[at + 2 :]], of_viewdirs


# By the number of parameters and whether there are views: of one module these are the whole network and its density's.
KeptNetworks = dict[tuple[int, bool], FoldedNetwork]


def folded_network(
    parameters: Sequence[Tensor],
    architecture: Architecture,
    has_views: bool,
    kept: KeptNetworks | None = None,
) -> FoldedNetwork:
    """The network that is kept, or a new one, kept where there is a place."""
    key = (len(parameters), has_views)
    if kept is not None and key in kept:
        return kept[key]
    with torch.autocast(parameters[0].device.type, enabled=False):
        network = FoldedNetwork(parameters, architecture, has_views)
    if kept is not None:
        kept[key] = network
    return network


# ------------------------------------------------------------------------------------------------- operators


def has_hopper(architectures: Sequence[str]) -> bool:
    """Whether a library built for these has the kernels of 9.0a, as which its PTX is built too."""
    return "9.0a" in [name.removesuffix("+PTX") for name in architectures]


# Decided when the package is imported: torch.compile can read module globals, but not ask for them.
HAS_KERNELS = _native.available() and all(
    torch._C._dispatch_has_kernel_for_dispatch_key(f"mipnerf_fast::{name}", "CUDA") for name in _OPERATORS
)
_HAS_HOPPER = has_hopper(_native.build_info().get("architectures", []))
WHY_NO_KERNELS = _native.why_missing() or "the native library was built without its CUDA kernels"


def operators() -> Kernels:
    """The raw operators; tests put twins in this function's place."""
    library = torch.ops.mipnerf_fast
    return Kernels(
        library.mlp_pack,
        library.mlp_forward,
        library.mlp_backward,
        library.mlp_encoded_forward,
        library.mlp_composited_forward,
    )


def _register() -> None:
    """What the raw operators need beside their kernels."""

    def bytes_of(features: int, sizes: tuple[Any, ...], device: torch.device) -> dict[str, int]:
        module = _native.load()
        assert module is not None
        hopper = _HAS_HOPPER and device.type == "cuda" and torch.cuda.get_device_properties(device).major == 9
        return dict(module.mlp_sizes(features, *sizes, hopper))

    def fake_pack(parameters: Tensor, features: int, *options: Any) -> Tensor:
        return parameters.new_empty(
            bytes_of(features, options[:5], parameters.device)["packed"], dtype=torch.uint8
        )

    def fake_forward(
        features: Tensor, ray_bias: Tensor | None, packed: Tensor, samples_per_ray: int, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *sizes, training = options
        count, columns = features.shape
        tiles = (count + TILE_ROWS - 1) // TILE_ROWS if training else 0
        per_tile = bytes_of(columns, tuple(sizes), features.device)
        rgb, density = (features.new_empty(shape, dtype=torch.float32) for shape in ((count, 3), (count,)))
        activations, masks = (
            features.new_empty(tiles * per_tile[name], dtype=torch.uint8) for name in ("activations", "masks")
        )
        return rgb, density, activations, masks

    def fake_encoded_forward(t_vals: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        count = t_vals.shape[0] * (t_vals.shape[1] - 1)
        return t_vals.new_empty(count, 3), t_vals.new_empty(count)

    def fake_composited_forward(t_vals: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rays, samples = t_vals.shape[0], t_vals.shape[1] - 1
        shapes = ((rays, 3), (rays,), (rays,), (rays, samples))
        rgb, distance, acc, weights = (t_vals.new_empty(shape) for shape in shapes)
        return rgb, distance, acc, weights

    def fake_backward(
        grad_rgb: Tensor | None, grad_density: Tensor | None, features: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        samples_per_ray, *sizes, _, to_features = rest[3:]
        count, columns = features.shape
        floats = bytes_of(columns, tuple(sizes), features.device)["gradients"]
        shapes = ((floats,), (count // samples_per_ray, sizes[3]), (count if to_features else 0, columns))
        gradients, ray_sums, grad_features = (
            features.new_empty(shape, dtype=torch.float32) for shape in shapes
        )
        return gradients, ray_sums, grad_features

    fakes: tuple[Callable[..., Any], ...] = (
        fake_pack,
        fake_forward,
        fake_encoded_forward,
        fake_composited_forward,
        fake_backward,
    )
    for name, fake in zip(_OPERATORS, fakes, strict=True):
        register_without_derivative(name, fake, "ops.mlp_fused.fused_mlp")


if _native.available():
    _register()
