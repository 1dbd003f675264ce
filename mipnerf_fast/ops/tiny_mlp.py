"""The operator `tiny_mlp`: encoded samples to colours and densities, both small networks in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native, reference
from ..reference import TinyMlp
from .arguments import check_float, check_like, check_shape, require
from .finite import reports_non_finite
from .implementations import takes_kernel, why_no_tf32
from .registration import register_differentiable

_GEOMETRY, _HARMONICS = 16, 16
# Hidden neurons and inputs that the kernels take.
_WIDEST, _MOST_INPUTS = {"cpu": 256, "cuda": 64}, {"cpu": 256, "cuda": 96}


def widest_network(device: torch.device) -> int:
    """How many neurons a hidden layer of the fast model's networks may have in the kernels for a device."""
    return _WIDEST[_place(device)]


def _place(device: torch.device) -> str:
    return "cuda" if device.type == "cuda" else "cpu"


@reports_non_finite("tiny_mlp", rows="samples")
def tiny_mlp(
    features: Tensor,
    harmonics: Tensor,
    rays: Tensor,
    density_in: Tensor,
    density_out: Tensor,
    colour_in: Tensor,
    colour_hidden: Tensor | None,
    colour_out: Tensor,
    *,
    tf32: bool = False,
) -> TinyMlp:
    """Colours and densities of encoded samples: the fast model's two networks.

    g = density_out relu(density_in f), density = exp(clamp(g_0 - 2, -12, 9)), h = relu(colour_in [g, harmonics]),
    again h = relu(colour_hidden h) where there is a second layer, and rgb = sigmoid(clamp(colour_out h, -12, 12))
    (1 + 2 p) - p with p = 0.001.

    Args:
        features: [S, E], float32 or float64: encoded samples with the scale inputs (`reference.scale_inputs`).
        harmonics: [B, 16], of each ray's direction (`reference.spherical_harmonics`).
        rays: int64 [S], in [0, B), the ray of each sample.
        density_in: [H, I]; the inputs that features lack, E < I, count as zero. density_out: [16, H].
        colour_in: [H, 32]. colour_hidden: [H, H] or None. colour_out: [3, H]. The kernel takes H in multiples of 8 and
            I in multiples of 4, both up to 256.
        tf32: round the operands of every product, forward and backward, to TF32: `reference.linear`. The kernel does
            so on tensor cores, on CUDA devices of compute capability 8.0 and higher. Nothing but this argument
            decides: torch.backends.cuda.matmul.allow_tf32 is not asked.

    Returns:
        TinyMlp: rgb [S, 3], density [S] per world unit; differentiable once in everything but rays.

    Errors: ValueError naming the argument, what was wanted and what was given; RuntimeError where the backend
    "native" is forced and the kernel cannot run, for a ray outside [0, B), and for a second derivative of the kernel.

    Example:
        >>> weights = torch.randn(64, 28), torch.randn(16, 64), torch.randn(64, 32), None, torch.randn(3, 64)
        >>> directions = torch.nn.functional.normalize(torch.randn(4, 3), dim=-1)
        >>> rays = torch.tensor([0, 0, 1, 3, 3])
        >>> tiny_mlp(torch.rand(5, 27), reference.spherical_harmonics(directions), rays, *weights).rgb.shape
        torch.Size([5, 3])

    Source: Mueller et al. 2022, section 5.4. Kernels: csrc/tiny_mlp.
    """
    name = "tiny_mlp"
    for argument, tensor, meaning in (
        ("features", features, "[S, E]"),
        ("harmonics", harmonics, "[B, 16]"),
        ("density_in", density_in, "[H, I]"),
    ):
        if tensor.dim() != 2:
            require(False, name, argument, f"of shape {meaning}", list(tensor.shape))
    check_float(name, "features", features)
    samples, encoded = features.shape
    hidden, inputs = density_in.shape
    if inputs < encoded:
        require(False, name, "density_in", f"of at least {encoded} columns, as features has", inputs)
    check_shape(name, "harmonics", harmonics, (harmonics.shape[0], _HARMONICS), "[B, 16]")
    check_shape(name, "rays", rays, (samples,), "[S]")
    if rays.dtype != torch.int64:
        require(False, name, "rays", "int64", rays.dtype)
    if rays.device != features.device:
        require(False, name, "rays", f"on {features.device} as features", rays.device)
    check_shape(name, "density_out", density_out, (_GEOMETRY, hidden), "[16, H]")
    check_shape(name, "colour_in", colour_in, (hidden, _GEOMETRY + _HARMONICS), "[H, 32]")
    if colour_hidden is not None:
        check_shape(name, "colour_hidden", colour_hidden, (hidden, hidden), "[H, H]")
        check_like(name, "colour_hidden", colour_hidden, "features", features)
    check_shape(name, "colour_out", colour_out, (3, hidden), "[3, H]")
    for argument, tensor in (
        ("harmonics", harmonics),
        ("density_in", density_in),
        ("density_out", density_out),
        ("colour_in", colour_in),
        ("colour_out", colour_out),
    ):
        check_like(name, argument, tensor, "features", features)
    unsupported = ""
    widest, most_inputs = widest_network(features.device), _MOST_INPUTS[_place(features.device)]
    if hidden % 8 or hidden > widest:
        unsupported = f"the kernel takes multiples of 8 up to {widest} neurons, not {hidden}"
    elif inputs % 4 or inputs > most_inputs:
        unsupported = f"the kernel takes multiples of 4 up to {most_inputs} inputs, not {inputs}"
    elif tf32:
        unsupported = why_no_tf32(features.device)
    arguments = (features, harmonics, rays, density_in, density_out, colour_in, colour_hidden, colour_out)
    if not takes_kernel(name, features, unsupported):
        return reference.tiny_mlp(*arguments, tf32=tf32)
    return TinyMlp(*torch.ops.mipnerf_fast.tiny_mlp_forward(*arguments, tf32))


# ------------------------------------------------------------------------- the raw operators, as torch sees them


def _forward_fake(features: Tensor, *others: Tensor | bool | None) -> tuple[Tensor, Tensor]:
    samples = features.shape[0]
    return features.new_empty((samples, 3)), features.new_empty((samples,))


def _backward_fake(
    grad_rgb: Tensor,
    grad_density: Tensor,
    features: Tensor,
    harmonics: Tensor,
    rays: Tensor,
    density_in: Tensor,
    density_out: Tensor,
    colour_in: Tensor,
    colour_hidden: Tensor | None,
    colour_out: Tensor,
    tf32: bool,
    wants_features: bool,
    wants_harmonics: bool,
) -> tuple[Tensor, ...]:
    hidden = density_in.shape[0]
    return (
        features.new_empty((features.shape[0] if wants_features else 0, features.shape[1])),
        features.new_empty((harmonics.shape[0] if wants_harmonics else 0, _HARMONICS)),
        features.new_empty(density_in.shape),
        features.new_empty(density_out.shape),
        features.new_empty(colour_in.shape),
        features.new_empty((0 if colour_hidden is None else hidden, hidden)),
        features.new_empty(colour_out.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.tf32 = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_rgb: Tensor, grad_density: Tensor) -> tuple[Tensor | None, ...]:
    needs, saved = ctx.needs_input_grad, list(ctx.saved_tensors)
    by_sample = needs[1] and torch.are_deterministic_algorithms_enabled()
    rows, rays = saved[1], saved[2]
    if by_sample:
        # On a GPU the kernel adds samples to their rays in no particular order; torch can do it in a fixed one.
        saved[1:3] = rows[rays], torch.arange(rays.shape[0], device=rays.device)
    features, harmonics, *weights = torch.ops.mipnerf_fast.tiny_mlp_backward(
        grad_rgb, grad_density, *saved, ctx.tf32, needs[0], needs[1]
    )
    if by_sample:
        harmonics = torch.zeros_like(rows).index_add(0, rays, harmonics)
    density_in, density_out, colour_in, colour_hidden, colour_out = weights
    return (
        features if needs[0] else None,
        harmonics if needs[1] else None,
        None,
        density_in,
        density_out,
        colour_in,
        colour_hidden if needs[6] else None,
        colour_out,
        None,
    )


if _native.available():
    register_differentiable("tiny_mlp", _forward_fake, _backward_fake, _differentiate, _save)
