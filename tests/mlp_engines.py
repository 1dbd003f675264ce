"""What the tests of the network's engines share: which engines run here, networks of many shapes, errors."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mipnerf_fast import reference
from mipnerf_fast.ops import MipMLP, MlpShape
from mipnerf_fast.ops.mlp_backends import CPU_BF16


class Engine(NamedTuple):
    """An engine with its operands: `MipMLP(backend=, compute_dtype=)`, and where its parameters are."""

    backend: str
    compute_dtype: str
    device: str

    def build(self, shape: MlpShape) -> MipMLP:
        """A network with random biases too, so that every term counts."""
        torch.manual_seed(0)
        mlp = MipMLP(*shape, backend=self.backend, compute_dtype=self.compute_dtype)
        for linear in mlp.linears:
            torch.nn.init.normal_(linear.bias, std=0.3)  # type: ignore[arg-type]
        return mlp.to(self.device)


# On this machine: the CPU's engines everywhere, in bfloat16 where the processor multiplies it; a GPU's with one.
ENGINES = [
    Engine("folded", "fp32", "cpu"),
    Engine("emulated", "bf16", "cpu"),
    Engine("emulated", "fp16", "cpu"),
]
if CPU_BF16:
    ENGINES.append(Engine("folded", "bf16", "cpu"))
if torch.cuda.is_available():
    ENGINES += [
        Engine(backend, dtype, "cuda") for backend in ("cublaslt", "fused") for dtype in ("bf16", "fp16")
    ]
    ENGINES.append(Engine("folded", "fp32", "cuda"))

SHAPES = {
    "paper": MlpShape(),
    "64 wide": MlpShape(48, 9, 8, 64, 1, 32, 4),
    "depth 1": MlpShape(16, 9, 1, 64, 1, 64, 4),
    "heads read the skip": MlpShape(24, 9, 5, 64, 2, 32, 4),
    "skips everywhere": MlpShape(24, 9, 4, 64, 3, 48, 1),
    "two skips, no views": MlpShape(48, None, 6, 128, 1, 64, 2),
}
NO_VIEW_LAYER = MlpShape(24, 9, 3, 64, 0, 64, 4)

by_engine = pytest.mark.parametrize(
    "engine", ENGINES, ids=lambda e: f"{e.backend}-{e.compute_dtype}-{e.device}"
)


def inputs(shape: MlpShape, rays: int, samples: int) -> tuple[Tensor, Tensor | None]:
    """Features and directions in [-1, 1], as encodings are."""
    generator = torch.Generator().manual_seed(1)
    features = 2 * torch.rand(rays, samples, shape.in_features, generator=generator) - 1
    if shape.view_features is None:
        return features, None
    return features, 2 * torch.rand(rays, shape.view_features, generator=generator) - 1


def evaluate(
    mlp: MipMLP, features: Tensor, viewdirs_enc: Tensor | None, with_inputs: bool = True
) -> dict[str, Tensor]:
    """Outputs and all gradients, in float64 on the CPU; the network's own engine."""
    weight = mlp.linears[0].weight
    assert isinstance(weight, Tensor)
    moved = [x if x is None else x.to(weight).requires_grad_(with_inputs) for x in (features, viewdirs_enc)]
    rgb, density = mlp(*moved)
    leaves = {name: p for name, p in mlp.named_parameters()}
    if with_inputs:
        leaves |= {
            name: x for name, x in zip(("features", "viewdirs_enc"), moved, strict=True) if x is not None
        }
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(x.shape, generator=generator).to(x) for x in (rgb, density)]
    grads = torch.autograd.grad((rgb, density), list(leaves.values()), cotangents)
    results = {"rgb": rgb, "density": density} | dict(zip(leaves, grads, strict=True))
    return {name: value.detach().double().cpu() for name, value in results.items()}


def exact(mlp: MipMLP, features: Tensor, viewdirs_enc: Tensor | None) -> dict[str, Tensor]:
    """The same in float64 by the reference."""
    return evaluate(_plain(mlp).double(), features, viewdirs_enc)


def plain(
    mlp: MipMLP, features: Tensor, viewdirs_enc: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """By the reference in float32, for a 16-bit dtype under PyTorch's autocast."""
    device = mlp.linears[0].weight.device.type  # type: ignore[union-attr]
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):  # type: ignore[arg-type]
        return evaluate(_plain(mlp), features, viewdirs_enc)


def _plain(mlp: MipMLP) -> MipMLP:
    copy = MipMLP(*mlp.shape, backend="reference")
    copy.load_state_dict(mlp.state_dict())
    return copy.to(mlp.linears[0].weight.device)  # type: ignore[arg-type]


def relative_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """||got - want|| / ||want|| of every tensor, of the outputs together and of the gradients together."""
    assert got.keys() == want.keys()

    def error(names: list[str]) -> float:
        a, b = (torch.cat([x[name].flatten() for name in names]) for x in (got, want))
        return float((a - b).norm() / b.norm())

    outputs = ["rgb", "density"]
    gradients = [name for name in want if name not in outputs]
    each = {name: error([name]) for name in want}
    return each | {"all outputs": error(outputs), "all gradients": error(gradients)}


def mip_mlp(mlp: MipMLP, features: Tensor, viewdirs_enc: Tensor | None) -> tuple[Tensor, Tensor]:
    """The reference over this network's layers."""
    return reference.mip_mlp(
        features, viewdirs_enc, mlp.linears, mlp.net_depth, mlp.net_depth_condition, mlp.skip_layer
    )
