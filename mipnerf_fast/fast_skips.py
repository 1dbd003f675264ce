"""Where a skipped step of the fast model's training went wrong: its batch done again, operator by operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import ops
from .backend import use_backend
from .ops.fast_step import FastFields, FastGradients, MarchRays
from .ops.finite import NonFiniteError, check_finite, checking

# Rays at once: the composed operators keep what they compute of every sample.
PART_RAYS = 128

Gradients = dict[str, Tensor]


def rays_at(rays: MarchRays, part: slice) -> MarchRays:
    """Some of the rays."""
    return MarchRays(*(None if field is None else field[part] for field in rays))  # type: ignore[arg-type]


def check_batch(rays: MarchRays, target: Tensor) -> None:
    """Errors: NonFiniteError for a ray or a colour that is not finite before anything was computed."""
    for name, field in (*zip(MarchRays._fields, rays, strict=True), ("target", target)):
        if field is not None:
            check_finite("batch", name, field, "pixels")


def composed_gradients(
    rays: MarchRays, target: Tensor, total: int, loss_beta: float, fields: FastFields
) -> Gradients:
    """The gradients of the part of a step's loss that is some rays', by autograd over the operators.

    Args:
        rays, target: of the part. total: rays of the whole batch, over which the loss is a mean.
        loss_beta, fields: as of `ops.fast_train_step`; tables of any dtype.

    Errors: NonFiniteError under the finite check, naming operator, ray or sample.
    """
    names = [name for name in FastGradients._fields if getattr(fields, name) is not None]
    leaves = {name: getattr(fields, name).detach().float().requires_grad_() for name in names}
    phase = torch.full_like(rays.near, 0.5) if rays.phase is None else rays.phase
    samples = ops.march(
        *rays[:5],
        phase,
        fields.masks,
        fields.occupancy_resolution,
        fields.box_half,
        fields.step_scale,
        fields.min_step,
        fields.max_step,
    )
    norms = torch.linalg.vector_norm(rays.directions, dim=-1)
    with torch.enable_grad():
        rgb, density = ops.fast_query(
            samples.means,
            samples.scales,
            rays.directions / norms[:, None],
            samples.rays,
            fields._replace(**leaves),
        )
        found = ops.packed_composite(
            rgb,
            density,
            (samples.t1 - samples.t0) * norms[samples.rays],
            0.5 * (samples.t0 + samples.t1),
            samples.ray_starts,
            rays.background,
            rays.near,
        )
        penalties = torch.nn.functional.smooth_l1_loss(found.rgb, target, beta=loss_beta, reduction="sum")
        loss = penalties / (3 * total)
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def find_non_finite(
    gradients_of: Callable[[slice], Gradients], count: int
) -> tuple[NonFiniteError, int | None] | None:
    """The first value that is not finite, with the number of its ray in the batch where it is one ray's.

    Everything is done by the reference, under the finite check.

    Args:
        gradients_of: does some rays of the batch, forward and backward.
        count: rays of the batch.

    Returns:
        None where all values, and the sums of the gradients, are finite.
    """
    sums: Gradients = {}
    for first in range(0, count, PART_RAYS):
        part = range(first, min(first + PART_RAYS, count))
        done = _done(gradients_of, part)
        if isinstance(done, NonFiniteError):
            return _first_ray(gradients_of, part, done)
        for name, gradient in done.items():
            sums[name] = sums[name] + gradient if name in sums else gradient
    try:
        for name, gradient in sums.items():
            check_finite("backward", f"the gradient of {name}", gradient, "none")
    except NonFiniteError as error:
        return error, None
    return None


def _done(gradients_of: Callable[[slice], Gradients], part: range) -> Gradients | NonFiniteError:
    try:
        with use_backend("reference"), checking():
            return gradients_of(slice(part.start, part.stop))
    except NonFiniteError as error:
        return error


def _first_ray(
    gradients_of: Callable[[slice], Gradients], part: range, error: NonFiniteError
) -> tuple[NonFiniteError, int | None]:
    """Whose it is: operators on packed samples do not know, so the part is halved until one ray is left."""
    while error.ray is None and error.sample is not None and len(part) > 1:
        middle = len(part) // 2
        for half in (part[:middle], part[middle:]):
            done = _done(gradients_of, half)
            if isinstance(done, NonFiniteError):
                part, error = half, done
                break
        else:
            return error, None  # of the rays together
    if error.ray is not None:
        return error, part[error.ray]
    return error, None if error.sample is None else part[0]
