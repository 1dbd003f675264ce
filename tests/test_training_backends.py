"""Replayed and launched native steps and those of the reference give the same loss curve, but for rounding."""

from __future__ import annotations

import functools

import pytest
import torch
from recorded_operations import capture
from torch import Tensor

from mipnerf_fast import MipNerfConfig, TrainConfig, ops, use_backend
from mipnerf_fast.cameras import Rays
from mipnerf_fast.data import Dataset
from mipnerf_fast.data.procedural import demo_scene
from mipnerf_fast.trainer import Trainer

STEPS = 60
# Kernel and reference each round about as often as the other, and both differ from the exact result.
ROUNDINGS = 4
pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def dataset() -> Dataset:
    return demo_scene("train", size=16, views=4, supersample=1)


def moved_by_an_ulp(rays: Rays, seed: int) -> Rays:
    """Every origin, direction and radius one representable number up or down, at random."""
    generator = torch.Generator().manual_seed(seed)

    def move(x: Tensor) -> Tensor:
        up = (torch.rand(x.shape, generator=generator) < 0.5).to(x.device)
        ends = (torch.full((), end, device=x.device) for end in (torch.inf, -torch.inf))
        return torch.where(up, *(x.nextafter(end) for end in ends))

    return rays._replace(origins=move(rays.origins), directions=move(rays.directions), radii=move(rays.radii))


def loss_curve(device: torch.device, captured: bool = False, moved: int | None = None) -> Tensor:
    """The losses of STEPS steps of a model with all 16 degrees, [STEPS].

    captured: whether steps are replayed. moved: the seed of moved_by_an_ulp. The network multiplies float32 on a GPU
    too: 16-bit operands round otherwise, and the curves are compared within roundings.
    """
    config = TrainConfig(
        model=MipNerfConfig(
            num_samples=16,
            net_depth=3,
            net_width=32,
            net_width_condition=16,
            skip_layer=1,
            mlp_dtype="fp32",
        ),
        batch_size=128,
        max_steps=STEPS,
        lr_init=2e-2,
        lr_delay_steps=0,
        capture=captured,
    )
    trainer = Trainer(config, dataset(), device)
    if captured:
        capture(trainer)
    if moved is not None:
        draw = trainer.batches.draw

        def draw_moved(seed: int, step: int | Tensor, count: int) -> tuple[Rays, Tensor]:
            rays, target = draw(seed, step, count)
            return moved_by_an_ulp(rays, STEPS * moved + int(step)), target

        trainer.batches.draw = draw_moved  # type: ignore[method-assign]
    return torch.tensor([trainer.train_step().loss for _ in range(STEPS)], dtype=torch.float64)


@functools.cache
def reference_and_bound(device: torch.device) -> tuple[Tensor, Tensor]:
    """The reference's curve, and how far another may be from it.

    The bound: what rounding the reference's rays the other way does to its own curve, times the few roundings. The
    same random numbers and weights enter all curves, and training amplifies every difference.
    """
    with use_backend("reference"):
        reference = loss_curve(device)
        moved = [loss_curve(device, moved=seed) for seed in range(3)]
    band = torch.stack([(curve - reference).abs() for curve in moved]).amax(0).cummax(0).values
    return reference, ROUNDINGS * band + 16 * torch.finfo(torch.float32).eps * reference


def test_captured_launched_and_reference_steps_give_the_same_loss_curve(device: torch.device) -> None:
    """A kernel that computes something else, if only a little, leaves the bound within a few steps (see below)."""
    reference, bound = reference_and_bound(device)
    with use_backend("native"):
        used = {i.operation: i.used for i in ops.implementations(device)}
        assert {used[name] for name in ops.OPERATIONS} == {"native"}
        captured, launched = (loss_curve(device, captured) for captured in (True, False))
    for curve in (captured, launched):
        assert curve[-10:].mean() < 0.8 * curve[:10].mean()  # it did train
        assert not torch.equal(curve, reference)
        difference = (curve - reference).abs()
        assert bool((difference <= bound).all()), (difference / bound).tolist()
    assert bool(((captured - launched).abs() <= bound).all())
    # On a GPU in the deterministic mode alone: see test_captured_step.py.
    assert torch.equal(captured, launched) or device.type == "cuda"


def test_a_small_error_leaves_the_band(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is off by a thousandth of the encoding's attenuation would be found."""
    reference, bound = reference_and_bound(device)
    exact = ops.frustum_ipe
    monkeypatch.setattr(ops, "frustum_ipe", lambda *a, **k: 0.999 * exact(*a, **k))
    with use_backend("reference"):
        off = loss_curve(device)
    assert not bool(((off - reference).abs() <= bound).all())
