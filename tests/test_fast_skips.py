"""The fast model's steps that are not finite: they change nothing, end a run by its limits, and are explained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fast_devices import stepped
from test_fast_training import _config, _spheres
from test_proposal import TINY as PROPOSAL
from tiny_runs import write_scene
from torch import Tensor

from mipnerf_fast import InputError, fast_reference, ops
from mipnerf_fast.checkpoint import checkpoint_path, load_checkpoint
from mipnerf_fast.data import Dataset
from mipnerf_fast.fast_skips import PART_RAYS
from mipnerf_fast.fast_training import FastTrainer
from mipnerf_fast.ops.fast_step import MarchRays
from mipnerf_fast.ops.finite import NonFiniteError
from mipnerf_fast.proposal_training import ProposalTrainer
from mipnerf_fast.trainer_base import DivergedError, StepResult
from mipnerf_fast.training import run_training

pytestmark = pytest.mark.usefixtures("one_thread")

PROPOSED = dataclasses.replace(
    PROPOSAL, levels=2, log2_table_size=9, proposal_samples=12, num_samples=6, net_width=16
)
RAY = PART_RAYS + 5


@pytest.fixture(scope="module")
def scene() -> Dataset:
    return _spheres(12, 6)


def poison(monkeypatch: pytest.MonkeyPatch, steps: Callable[[int], bool]) -> None:
    """The colour of a ray of some steps is not a number."""
    draw = ops.draw_rays

    def poisoned(*arguments: Any) -> tuple[MarchRays, Tensor]:
        rays, target = draw(*arguments)
        if steps(arguments[2] + 1):
            target[RAY, 1] = math.nan
        return rays, target

    monkeypatch.setattr(ops, "draw_rays", poisoned)


def _place(trainer: FastTrainer, scene: Dataset, step: int, ray: int) -> str:
    """Found by what was drawn, not by how: the one pixel whose ray is the same."""
    drawn, _ = fast_reference.draw_rays(trainer.source, trainer.config.seed, step - 1, ray + 1, False, 1.0)
    for image, name in enumerate(scene.names):
        rays = scene.rays(image)
        hit = (rays.directions - drawn.directions[ray]).abs().amax(-1) < 1e-6
        hit &= (rays.origins - drawn.origins[ray]).abs().amax(-1) < 1e-6
        if hit.any():
            y, x = (int(i) for i in hit.nonzero()[0])
            return f"pixel ({x}, {y}) of image {name}"
    raise AssertionError("the ray is of no pixel")


def test_steps_that_fail_change_nothing_and_end_the_run(scene: Dataset) -> None:
    trainer = FastTrainer(_config(1000, batch_size=512, max_skips_in_row=4), scene)
    for _ in range(3):
        trainer.train_step()
    trainer.model.colour_out.data[0, 0] = math.nan
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for k in range(1, 4):
        result = trainer.train_step()
        assert (result.is_skipped, result.skips, result.failures_in_row) == (True, k, k)
    message = (
        "step 7: the loss is nan, its gradient is not finite; 4 steps in a row and 4 in all were skipped"
    )
    with pytest.raises(DivergedError, match=message):
        trainer.train_step()
    assert [result.step for result in trainer.unread_results()] == [7]
    for name in trainer._parameters:
        assert torch.equal(trainer.model.state_dict()[name], before[name]) or name == "colour_out"
    assert trainer.model.skipped_steps == 4


def test_scattered_skips_end_a_run_by_their_number(
    scene: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And those of the part before a checkpoint count."""
    poison(monkeypatch, lambda step: step % 3 == 0)
    config = _config(1000, batch_size=512, max_skips_in_row=2, max_skips=3)
    trainer = FastTrainer(config, scene)
    skips = [trainer.train_step().skips for _ in range(7)]
    assert skips == [0, 0, 1, 1, 1, 2, 2]
    path = tmp_path / "checkpoint.safetensors"
    trainer.save(path, None)
    saved = load_checkpoint(path)
    assert (saved.info.skips, saved.info.failures) == (2, 2)
    # With a lower limit the first result is the last, and not said to be what was wrong.
    stricter = FastTrainer(dataclasses.replace(config, max_skips=2), scene, checkpoint=saved)
    with pytest.raises(DivergedError, match=r"step 8: the loss is 0[.\d]+; 0 steps in a row and 2 in all"):
        stricter.train_step()
    again = FastTrainer(config, scene, checkpoint=saved)
    assert again.train_step().skips == 2
    with pytest.raises(DivergedError, match=r"step 9: .* 1 steps in a row and 3 in all"):
        again.train_step()


def test_a_diverging_run_ends_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_scene(tmp_path / "scene")
    poison(monkeypatch, lambda step: step >= 7)
    config = _config(50, batch_size=512, save_every=6, test_every=0, print_every=2, max_skips_in_row=3)
    with pytest.raises(InputError) as caught:
        run_training(str(folder), config, "fast", tmp_path / "run")
    message = str(caught.value)
    assert message.startswith(
        "step 9: the loss is nan, its gradient is not finite; 3 steps in a row and 3 in all"
    )
    assert message.endswith("; a smaller lr_init may keep it finite")
    assert "step_00000009" in message and "grad_max_norm" not in message
    said = capfd.readouterr().err
    why = f"the loss is nan, its gradient is not finite; batch: target is nan at ray {RAY} of the batch, pixel ("
    assert f"train: step 7 skipped (1 so far): {why}" in said
    assert "step 8 skipped" not in said and "norm of its gradient" not in said
    good, last = (load_checkpoint(checkpoint_path(tmp_path / "run", step)) for step in (6, 9))
    assert (good.info.skips, last.info.skips, last.info.failures) == (0, 3, 3)
    for name, value in good.weights().items():
        if name in ("tables", "density_in", "density_out", "colour_in", "colour_out"):
            assert torch.equal(value, last.weights()[name])


def test_a_skipped_step_is_explained(scene: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda step: step == 2)
    trainer = FastTrainer(_config(100), scene)
    good, skipped = trainer.train_step(), trainer.train_step()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    place = _place(trainer, scene, 2, RAY)
    assert skipped.is_skipped and not good.is_skipped
    assert trainer.explain_skip(skipped) == f"batch: target is nan at ray {RAY} of the batch, {place}"
    done_again = "done again by the reference with the weights of step 2, every operation is finite"
    assert trainer.explain_skip(good) == done_again
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    assert not any(gradient.any() for gradient in trainer._gradients.values())


def test_a_weight_that_is_not_finite_is_found_by_what_it_does(scene: Dataset) -> None:
    trainer = FastTrainer(_config(100, batch_size=512), scene)
    trainer.model.colour_out.data[1, 3] = math.nan
    result = trainer.train_step()
    assert result.is_skipped
    # The first ray that has samples.
    rays, _ = trainer._draw(0, result.rays)
    fields = trainer.model.fields()
    packed = ops.march(*rays[:6], fields.masks, fields.occupancy_resolution)  # type: ignore[arg-type]
    first = int(packed.rays[0])
    place = _place(trainer, scene, 1, first)
    wanted = f"tiny_mlp: rgb is nan at ray {first}, sample 0 of the batch, {place}"
    assert trainer.explain_skip(result) == wanted


def test_an_entry_that_is_not_finite_is_found_at_the_sample_that_reads_it(scene: Dataset) -> None:
    trainer = FastTrainer(_config(100, batch_size=2048), scene)
    grid = trainer.model.grid
    trainer.model.tables.data[grid.offsets[-1] + 77] = math.inf
    result = trainer.train_step()
    assert result.is_skipped
    rays, _ = trainer._draw(0, result.rays)
    fields = trainer.model.fields()
    packed = ops.march(*rays[:6], fields.masks, fields.occupancy_resolution)  # type: ignore[arg-type]
    encoded = ops.hash_encode(packed.means, packed.scales, fields.tables, grid, fields.attenuation, 0.0)
    sample = int((~encoded.isfinite()).any(-1).nonzero()[0])
    ray = int(packed.rays[sample])
    assert ray >= 1
    said = trainer.explain_skip(result)
    value = said.split(" is ")[1].split()[0]
    within = sample - int(packed.ray_starts[ray])
    assert value in ("inf", "nan") and said == (
        f"hash_encode: features is {value} at ray {ray}, sample {within} of the batch, "
        f"{_place(trainer, scene, 1, ray)}"
    )


def test_the_gradient_of_a_skipped_step_is_named(scene: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = FastTrainer(_config(100, batch_size=512), scene)
    result = trainer.train_step()
    composite = ops.packed_composite

    def broken(
        rgb: Tensor, density: Tensor, lengths: Tensor, middles: Tensor, starts: Tensor, *rest: Any
    ) -> Any:
        hit = torch.zeros_like(density)
        if len(density):
            hit[min(3, len(density) - 1)] = math.inf
        # Behind the operator's own look at the gradient of what it returned.
        density = density.clone()
        density.register_hook(lambda gradient: gradient + hit)
        return composite(rgb, density, lengths, middles, starts, *rest)

    monkeypatch.setattr(ops, "packed_composite", broken)
    place = _place(trainer, scene, 1, 0)
    wanted = f"tiny_mlp: the gradient of density is inf at ray 0, sample 3 of the batch, {place}"
    assert trainer.explain_skip(result) == wanted


def test_the_sum_of_gradients_has_no_ray(scene: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = FastTrainer(_config(100, batch_size=2048), scene)
    result = trainer.train_step()
    assert result.rays > PART_RAYS  # each part's is finite
    huge = {"colour_out": torch.full((3, 32), 2.5e38)}
    monkeypatch.setattr(FastTrainer, "_composed_gradients", lambda *arguments: huge)
    said = trainer.explain_skip(result)
    assert said.startswith("backward: the gradient of colour_out is inf, index [0, 0]")


def test_where_nothing_has_samples_nothing_is_found(scene: Dataset) -> None:
    trainer = FastTrainer(_config(100, batch_size=512), scene)
    trainer.train_step()
    empty = StepResult(0.0, 0.0, 0, 1, 1e-3, is_skipped=True)
    assert "every operation is finite" in trainer.explain_skip(empty)
    trainer.model.masks.zero_()
    assert "every operation is finite" in trainer.explain_skip(dataclasses.replace(empty, rays=20))


@pytest.mark.parametrize(
    ("parameter", "wanted"),
    [
        ("proposal_tables", "hash_encode: features is nan at ray 0, sample"),
        ("colour_out", "tiny_mlp: rgb is nan at ray 0, sample 0"),
        ("proposal_out", "composite: rgb is nan at ray 0"),
    ],
)
def test_with_a_proposal_both_levels_are_looked_at(scene: Dataset, parameter: str, wanted: str) -> None:
    trainer = ProposalTrainer(_config(100, PROPOSED, batch_size=600), scene)
    assert not trainer.train_step().is_skipped
    getattr(trainer.model, parameter).data.fill_(math.nan)
    before = trainer.model.tables.detach().clone()
    result = trainer.train_step()
    assert result.is_skipped and result.rays == 100
    said = trainer.explain_skip(result)
    assert said.startswith(wanted)
    assert said.endswith(f" of the batch, {_place(trainer, scene, 2, 0)}")
    assert torch.equal(trainer.model.tables, before)


def test_a_part_of_the_proposals_batch_has_its_own_random_numbers(scene: Dataset) -> None:
    """The parts' gradients are those of the whole, each at its rays' fenceposts."""
    trainer = ProposalTrainer(_config(100, PROPOSED, batch_size=600), scene)
    rays, target = trainer._draw(0, 100)
    whole = trainer._composed_gradients(0, rays, target, slice(0, 100), 100)
    sums = {name: torch.zeros_like(gradient) for name, gradient in whole.items()}
    for part in (slice(0, 30), slice(30, 100)):
        drawn = MarchRays(*(None if field is None else field[part] for field in rays))  # type: ignore[arg-type]
        for name, gradient in trainer._composed_gradients(0, drawn, target[part], part, 100).items():
            sums[name] += gradient
    for name, gradient in whole.items():
        size = gradient.abs().max()
        assert size > 0 and (sums[name] - gradient).abs().max() <= 600 * 2.0**-23 * size


def test_the_parts_of_a_batch_have_the_gradients_of_the_step(scene: Dataset) -> None:
    """What is explained is the step: composed part by part it gives the fused step's gradients."""
    trainer = FastTrainer(_config(100, batch_size=2048), scene)
    rays, target = trainer._draw(0, 300)
    found, of_step = stepped(rays, target, trainer.model.fields(), trainer.config.loss_beta)
    gradients = {name: value for name, value in of_step._asdict().items() if value is not None}
    sums = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    for part in (slice(0, 128), slice(128, 300)):
        drawn = MarchRays(*(None if field is None else field[part] for field in rays))  # type: ignore[arg-type]
        for name, gradient in trainer._composed_gradients(0, drawn, target[part], part, 300).items():
            sums[name] += gradient
    assert found.is_finite
    for name, gradient in gradients.items():
        # Sums of so many terms of similar size, in two orders.
        bound = math.sqrt(found.samples) * 2.0**-23 * 16
        assert (sums[name] - gradient).norm() <= bound * gradient.norm()


def test_an_error_of_a_part_names_the_ray_of_the_batch() -> None:
    error = NonFiniteError(
        "tiny_mlp", "rgb", math.inf, None, 4, "index [4, 0] of shape [9, 3] (1 places in all)"
    )
    assert error.of_batch(130, "pixel (1, 2) of image r_0") == (
        "tiny_mlp: rgb is inf at ray 130, sample 4 of the batch, pixel (1, 2) of image r_0"
    )
