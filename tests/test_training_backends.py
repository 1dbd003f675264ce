"""Training with the native kernels and with the reference gives the same loss curve, but for rounding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mipnerf_fast import MipNerfConfig, TrainConfig, ops, use_backend
from mipnerf_fast.cameras import Rays
from mipnerf_fast.data import Dataset
from mipnerf_fast.data.procedural import demo_scene
from mipnerf_fast.trainer import Trainer

STEPS = 60
# Kernel and reference each round about as often as the other, and both differ from the exact result.
ROUNDINGS = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """This work is too small for more, and the order of sums stays the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return demo_scene("train", size=16, views=4, supersample=1)


def moved_by_an_ulp(rays: Rays, seed: int) -> Rays:
    """Every origin, direction and radius one representable number up or down, at random."""
    generator = torch.Generator().manual_seed(seed)

    def move(x: Tensor) -> Tensor:
        up = torch.rand(x.shape, generator=generator) < 0.5
        return torch.where(up, x.nextafter(torch.tensor(torch.inf)), x.nextafter(torch.tensor(-torch.inf)))

    return rays._replace(origins=move(rays.origins), directions=move(rays.directions), radii=move(rays.radii))


def loss_curve(dataset: Dataset, moved: int | None = None) -> Tensor:
    """The losses of STEPS steps of a model with all 16 degrees, [STEPS]; `moved` is the seed of moved_by_an_ulp."""
    config = TrainConfig(
        model=MipNerfConfig(num_samples=16, net_depth=3, net_width=32, net_width_condition=16, skip_layer=1),
        batch_size=128,
        max_steps=STEPS,
        lr_init=2e-2,
        lr_delay_steps=0,
    )
    trainer = Trainer(config, dataset)
    if moved is not None:
        draw = trainer.batches.draw

        def draw_moved(seed: int, step: int | Tensor, count: int) -> tuple[Rays, Tensor]:
            rays, target = draw(seed, step, count)
            return moved_by_an_ulp(rays, STEPS * moved + int(step)), target

        trainer.batches.draw = draw_moved  # type: ignore[method-assign]
    return torch.tensor([trainer.train_step().loss for _ in range(STEPS)], dtype=torch.float64)


def test_either_backend_gives_the_same_loss_curve(dataset: Dataset) -> None:
    """The bound: what rounding the reference's rays the other way does to its own curve, times the few roundings.

    The same random numbers and weights enter all of them, and training amplifies every difference; a kernel that
    computes something else, if only a little, leaves the band within a few steps (see the test below).
    """
    with use_backend("native"):
        assert {i.used for i in ops.implementations() if i.operation in ("frustum_ipe", "composite")} == {
            "native"
        }
        native = loss_curve(dataset)
    with use_backend("reference"):
        reference = loss_curve(dataset)
        moved = [loss_curve(dataset, seed) for seed in range(3)]
    assert native[-10:].mean() < 0.8 * native[:10].mean()  # it did train
    assert not torch.equal(native, reference)
    band = torch.stack([(curve - reference).abs() for curve in moved]).amax(0).cummax(0).values
    floor = 16 * torch.finfo(torch.float32).eps * reference
    difference = (native - reference).abs()
    assert bool((difference <= ROUNDINGS * band + floor).all()), (difference / band).tolist()


def test_a_small_error_leaves_the_band(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is off by a thousandth of the encoding's attenuation would be found."""
    with use_backend("reference"):
        reference = loss_curve(dataset)
        moved = [loss_curve(dataset, seed) for seed in range(3)]
        exact = ops.frustum_ipe
        monkeypatch.setattr(ops, "frustum_ipe", lambda *a, **k: 0.999 * exact(*a, **k))
        off = loss_curve(dataset)
    band = torch.stack([(curve - reference).abs() for curve in moved]).amax(0).cummax(0).values
    floor = 16 * torch.finfo(torch.float32).eps * reference
    assert not bool(((off - reference).abs() <= ROUNDINGS * band + floor).all())
