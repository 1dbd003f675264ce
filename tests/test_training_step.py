"""The step as work for the device alone: it asks the host nothing, skips what is not finite, and is read back late."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY, same_tensors, state, tiny, tiny_dataset, write_scene
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mipnerf_fast import InputError, NerfConfig, ops
from mipnerf_fast import trainer as trainer_module
from mipnerf_fast.cameras import Rays
from mipnerf_fast.checkpoint import checkpoint_path, load_checkpoint
from mipnerf_fast.data import Dataset, RayBatches
from mipnerf_fast.determinism import deterministic
from mipnerf_fast.flat_parameters import FlatParameters
from mipnerf_fast.ops import mlp_folded_network
from mipnerf_fast.ops.finite import reports_non_finite
from mipnerf_fast.readback import Readback
from mipnerf_fast.trainer import Trainer
from mipnerf_fast.trainer_base import DivergedError
from mipnerf_fast.training import run_training
from mipnerf_fast.training_step import WORDS, TrainingStep

# Steps that are under way when the first of them is known: none but on a GPU.
AHEAD = {"cpu": 0, "cuda": trainer_module._STEPS_AHEAD - 1}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset()


class HostWork(TorchDispatchMode):
    """Notes every operation that reads a value of the device, or sends one of the host to it."""

    FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "_unique2", "equal", "item")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.FORBIDDEN:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def without_waiting(device: torch.device) -> Iterator[None]:
    """On a GPU, torch raises where anything in the context waits for it, operators' own code included."""
    if device.type == "cpu":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


NOISY = dataclasses.replace(TINY.model, density_noise=0.3)
CONFIGS = {
    "plain": tiny(),
    "clipped": tiny(grad_max_value=0.1, grad_max_norm=0.01, weight_decay_mult=0.1),
    "noisy, in chunks": tiny(model=NOISY, chunk_rays=20),
    "one image": tiny(batching="single_image", loss="charbonnier", loss_beta=0.1),
    "disparity": tiny(model=dataclasses.replace(TINY.model, lindisp=True, use_viewdirs=False)),
    "nerf": tiny(model=NerfConfig(num_coarse=8, num_fine=8, net_width=16, net_width_condition=8)),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sizes", ["one size", "two sizes"])
def test_the_step_asks_the_host_nothing(
    dataset: Dataset, name: str, sizes: str, device: torch.device
) -> None:
    """So it can be recorded once and replayed: any of these operations in a recording is an error on a GPU."""
    if sizes == "two sizes":
        dataset = dataclasses.replace(
            dataset,
            height=torch.cat([torch.tensor([6, 6]), dataset.height[1:]]),
            width=torch.cat([torch.tensor([12, 12]), dataset.width[1:]]),
            names=["a", *dataset.names],
            **{
                field: torch.cat([getattr(dataset, field)[:1], getattr(dataset, field)])
                for field in ("c2w", "focal", "near", "far", "lossmult", "scale")
            },
        )
    trainer = Trainer(CONFIGS[name], dataset, device)
    trainer.train_step()
    with without_waiting(device), HostWork() as watch:
        trainer.work.gradients()
        trainer.work.update()
    assert not watch.found
    with HostWork() as watch:
        float(trainer.work.words[0])
        torch.tensor([1.0])
    assert watch.found == ["_local_scalar_dense", "lift_fresh"]


class Launches(TorchDispatchMode):
    """Counts what a GPU would launch, but for what is called from the operators' own files."""

    # Views and allocations.
    NONE = ("alias", "detach", "empty", "expand", "new_empty", "select", "slice", "t", "unsqueeze", "view")
    NONE += ("_unsafe_view", "_record_function_enter_new", "_record_function_exit", "unbind")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, frame = func.overloadpacket.__name__, inspect.currentframe()
        callers = []
        while frame is not None:
            callers.append(Path(frame.f_code.co_filename).parent)
            frame = frame.f_back
        if name not in self.NONE and Path(ops.__file__).parent not in callers:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("depth", [2, 5])
def test_the_step_launches_little_beside_its_operators(
    dataset: Dataset, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many parameters there are: on a GPU each of these takes as long as a small kernel takes to start.

    The operations are the same there but for the optimiser's, so they are counted on the CPU alone.
    """
    # As on a GPU, layer by layer.
    monkeypatch.setattr(mlp_folded_network, "_HAS_TILES", False)
    config = tiny(model=dataclasses.replace(TINY.model, net_depth=depth))
    work = Trainer(config, dataset).work
    with Launches() as first:
        work.gradients()
    with Launches() as second:
        work.update()
    assert (len(first.found), len(second.found)) == (58, 27), (first.found, second.found)


def test_gradients_of_levels_add_up_as_those_of_their_sum_do(dataset: Dataset) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    unused = torch.nn.Parameter(torch.ones(3))
    model.register_parameter("unused", unused)
    flat = FlatParameters(model)
    inputs = torch.randn(3, 16, 4)

    def losses() -> list[Tensor]:
        return [model(x).square().mean() for x in inputs]

    found = []
    for add in (lambda: sum(losses()).backward(), lambda: flat.add_gradients(losses())):
        flat.sums.copy_(torch.arange(len(flat.sums)) % 7 - 3.0)
        add()
        found.append(flat.gradients.clone())
    # Of three terms backward adds the last two first, as add_gradients does.
    assert torch.equal(*found)
    assert torch.equal(
        flat.split(found[0])["unused"], flat.split(torch.arange(len(found[0])) % 7 - 3.0)["unused"]
    )


def test_parameters_and_gradients_are_views_of_one_tensor_each(
    dataset: Dataset, device: torch.device
) -> None:
    trainer = Trainer(tiny(), dataset, device)
    flat = trainer.work.flat
    assert flat.size == sum(p.numel() for p in trainer.parameters) < flat.values.numel()
    for p in trainer.parameters:
        assert p.grad is not None
        assert p.untyped_storage().data_ptr() == flat.values.untyped_storage().data_ptr()
        assert p.grad.untyped_storage().data_ptr() == flat.sums.untyped_storage().data_ptr()
        # Wide loads want it.
        assert (p.storage_offset() * 4) % 256 == 0
    trainer.train_step()
    # The gaps between the parameters are as they were.
    inside = torch.zeros_like(flat.values, dtype=torch.bool)
    for view in flat.split(inside).values():
        view.fill_(True)
    assert not flat.values[~inside].any()
    assert flat.values[inside].all()


def test_a_loaded_state_reaches_the_flat_tensor() -> None:
    source, target = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    flat = FlatParameters(target)
    target.load_state_dict(source.state_dict())
    assert torch.equal(flat.split(flat.values.detach())["weight"], source.weight)


def poison(
    monkeypatch: pytest.MonkeyPatch, steps: Callable[[Tensor], Tensor], value: float = math.nan
) -> None:
    """The target of ray 5 of some steps is not finite; decided on the device, so that a recording can have it."""
    draw = RayBatches.draw

    def poisoned(self: RayBatches, seed: int, step: int | Tensor, count: int) -> tuple[Rays, Tensor]:
        rays, target = draw(self, seed, step, count)
        if count > 5:
            number = torch.as_tensor(step, device=self.device)
            target[5, 1] = torch.where(steps(number), value, target[5, 1])
        return rays, target

    monkeypatch.setattr(RayBatches, "draw", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
# On a GPU step 2 is launched and step 6 replayed.
@pytest.mark.parametrize("bad", [2, 6])
def test_a_step_that_is_not_finite_changes_nothing(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, value: float, bad: int, device: torch.device
) -> None:
    poison(monkeypatch, lambda step: step == bad, value)
    # Clipped by value, an infinite gradient would be a finite one.
    trainer = Trainer(tiny(grad_max_value=0.1), dataset, device)
    for _ in range(bad - 1):
        assert not trainer.train_step().is_skipped
    before = state(trainer)
    result = trainer.train_step()
    assert (result.step, result.is_skipped, result.skips, result.failures_in_row) == (bad, True, 1, 1)
    assert not math.isfinite(result.loss)
    assert all(torch.equal(a, b) for a, b in zip(before, state(trainer), strict=True))
    result = trainer.train_step()
    assert (result.step, result.is_skipped, result.skips, result.failures_in_row) == (bad + 1, False, 1, 0)
    after = state(trainer)
    assert not torch.equal(after[0], before[0])
    assert float(after[3]) == bad  # of Adam


def test_a_skipped_step_is_explained(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    poison(monkeypatch, lambda step: step == 2)
    trainer = Trainer(tiny(chunk_rays=4), dataset, device)
    good = trainer.train_step()
    before = state(trainer)
    skipped = trainer.train_step()
    image, pixel = (int(x[5]) for x in trainer.batches.choose(TINY.seed, 2, 64))
    place = f"pixel ({pixel % 12}, {pixel // 12}) of image {dataset.names[image]}"
    assert trainer.explain_skip(skipped) == f"batch: target is nan at ray 5, sample 1 of the batch, {place}"
    assert "every operation is finite" in trainer.explain_skip(good)
    assert all(torch.equal(a, b) for a, b in zip(before, state(trainer), strict=True))


def test_a_skipped_step_is_explained_in_smaller_passes(dataset: Dataset) -> None:
    """The recording of the step keeps the memory of a whole pass, and a second one may not fit beside it."""
    trainer = Trainer(tiny(chunk_rays=32), dataset)
    rays: list[int] = []
    accumulate = trainer.work.accumulate_gradients

    def counting(step: int, chunk: Rays, target: Tensor, total: Tensor, rows: Tensor) -> None:
        rays.append(target.shape[0])
        accumulate(step, chunk, target, total, rows)

    result = trainer.train_step()
    trainer.work.accumulate_gradients = counting  # type: ignore[method-assign, assignment]
    assert "every operation is finite" in trainer.explain_skip(result)
    assert rays == [8] * 8


def test_a_step_that_cannot_be_explained_for_memory_is_skipped_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], device: torch.device
) -> None:
    poison(monkeypatch, lambda step: step == 2)

    def full(self: TrainingStep, step: int | Tensor, *rest: Any) -> None:
        # A number of the host's: the step is done again to explain it.
        if isinstance(step, int) and step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        accumulate(self, step, *rest)

    accumulate = TrainingStep.accumulate_gradients
    monkeypatch.setattr(TrainingStep, "accumulate_gradients", full)
    # The batch is looked at first: the target is found to be finite here.
    monkeypatch.setattr(trainer_module, "check_finite", lambda *_, **__: None)
    scene = write_scene(tmp_path / "scene")
    config = tiny(max_steps=6, test_every=0)
    result = run_training(str(scene), config, "tiny", tmp_path / "run", device=device.type)
    assert (result.step, result.skips) == (6, 1)
    said = capfd.readouterr().err
    assert "step 2 skipped (1 so far): the loss is nan" in said
    assert "where it arises could not be located: out of memory" in said


def test_the_operation_of_a_skipped_step_is_named(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    encode, calls = ops.frustum_ipe, 0

    @reports_non_finite("frustum_ipe", "features")
    def broken(*arguments: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        features = encode(*arguments, **options).clone()
        # The fine level of the second chunk of a batch: 16 in the step, as many when it is done again.
        if calls % 32 == 4:
            features[1, 3, 0] = math.nan
        return features

    monkeypatch.setattr(ops, "frustum_ipe", broken)
    monkeypatch.setattr(trainer_module, "_SHARE_OF_CHUNK", 1)
    trainer = Trainer(tiny(chunk_rays=4), dataset, device)
    result = trainer.train_step()
    assert result.is_skipped
    assert trainer.explain_skip(result).startswith(
        "frustum_ipe: features is nan at ray 5, sample 3 of the batch, "
    )


def test_the_gradient_of_a_skipped_step_is_named(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    network = ops.MipMLP.forward.__wrapped__  # type: ignore[attr-defined]

    @reports_non_finite("mlp", "rgb", "density")
    def broken(self: ops.MipMLP, *arguments: Any) -> tuple[Tensor, Tensor]:
        rgb, density = network(self, *arguments)
        hit = torch.zeros_like(density)
        hit[2, 6] = math.inf
        density.register_hook(lambda gradient: gradient + hit)
        return rgb, density

    monkeypatch.setattr(ops.MipMLP, "forward", broken)
    trainer = Trainer(tiny(), dataset, device)
    result = trainer.train_step()
    assert result.is_skipped
    assert math.isfinite(result.loss)
    assert trainer.explain_skip(result).startswith(
        "mlp: the gradient of density is inf at ray 2, sample 6 of the batch, "
    )


def test_a_weight_that_is_not_finite_is_found_by_what_it_does(dataset: Dataset, device: torch.device) -> None:
    trainer = Trainer(tiny(), dataset, device)
    with torch.no_grad():
        trainer.parameters[0][0, 0] = math.nan
    result = trainer.train_step()
    assert result.is_skipped
    assert trainer.explain_skip(result).startswith("mlp: rgb is nan at ray 0, sample 0 of the batch, pixel")


@pytest.mark.parametrize(
    ("limits", "fatal", "message"),
    [
        ({"max_skips_in_row": 3}, 9, "3 steps in a row and 3 in all"),
        ({"max_skips": 2}, 8, "2 steps in a row and 2 in all"),
    ],
)
def test_a_diverging_run_ends_with_its_good_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    limits: dict[str, int],
    fatal: int,
    message: str,
    device: torch.device,
) -> None:
    scene = write_scene(tmp_path / "scene")
    poison(monkeypatch, lambda step: step >= 7)
    config, last = (
        tiny(test_every=0, keep_checkpoints=5, deterministic=True, **limits),
        fatal + AHEAD[device.type],
    )
    with pytest.raises(
        InputError,
        match=rf"step {fatal}: the loss is nan, the norm of its gradient nan; {message}.*"
        rf"step_{last:08d}.*; a smaller lr_init, or grad_max_norm, may",
    ):
        run_training(str(scene), config, "tiny", tmp_path / "run", device=device.type)
    said = capfd.readouterr().err
    assert "step 7 skipped (1 so far): the loss is nan" in said
    assert "batch: target is nan at ray 5" in said
    assert "step 8 skipped" not in said  # once for each series
    saved = load_checkpoint(checkpoint_path(tmp_path / "run", last))
    good = load_checkpoint(checkpoint_path(tmp_path / "run", 4))
    assert (saved.info.skips, saved.info.failures, good.info.skips) == (last - 6, last - 6, 0)
    monkeypatch.undo()
    with deterministic():
        trainer = Trainer(config, _loaded(scene), device)
        for _ in range(6):
            trainer.train_step()
    weights = {name: tensor.detach().cpu() for name, tensor in trainer.model.state_dict().items()}
    assert same_tensors(saved.weights(), weights)
    with open(tmp_path / "run" / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # The last rows are of steps from 5 on, of which 5 and 6 were good: their mean, not NaN.
    assert int(rows[-1]["step"]) == last
    assert all(math.isfinite(float(row["loss"])) for row in rows if row["loss"])


def _loaded(scene: Path) -> Dataset:
    from mipnerf_fast.data import load_dataset

    return load_dataset(str(scene))


def test_scattered_skips_do_not_end_a_run(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    poison(monkeypatch, lambda step: step % 2 == 0)
    trainer = Trainer(tiny(max_skips_in_row=2, max_skips=3), dataset, device)
    for _ in range(5 + AHEAD[device.type]):
        trainer.train_step()
    with pytest.raises(DivergedError, match=r"step 6: .* 1 steps in a row and 3 in all"):
        trainer.train_step()


def test_a_run_with_skips_resumes_bit_by_bit(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: torch.device
) -> None:
    poison(monkeypatch, lambda step: (step == 2) | (step == 5))
    config, path = tiny(deterministic=True), tmp_path / "step_00000004.safetensors"
    with deterministic():
        whole = Trainer(config, dataset, device)
        for _ in range(7):
            whole.train_step()
        first = Trainer(config, dataset, device)
        for _ in range(4):
            first.train_step()
        first.save(path, None)
        second = Trainer(config, dataset, device, checkpoint=load_checkpoint(path))
        for _ in range(3):
            second.train_step()
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(second), strict=True))
    assert torch.equal(whole.work.words, second.work.words)


def scaled(trainer: Trainer, scale: float) -> Trainer:
    """The same trainer with a scaled loss, as float16 has it."""
    trainer.work.scales_loss = True
    trainer.work.words[WORDS.index("scale")] = scale
    return trainer


def word(trainer: Trainer, name: str) -> float:
    return float(trainer.work.words[WORDS.index(name)])


def test_a_scaled_loss_gives_the_same_steps(dataset: Dataset, device: torch.device) -> None:
    """A power of two commutes with every rounding, short of the ends of the range."""
    config = tiny(grad_max_norm=0.01, weight_decay_mult=0.1, deterministic=True)
    with deterministic():
        plain = Trainer(config, dataset, device)
        other = scaled(Trainer(config, dataset, device), 2.0**12)
        for _ in range(6):
            a, b = plain.train_step(), other.train_step()
            assert (a.loss, a.norm) == (b.loss, b.norm)
    assert all(torch.equal(a, b) for a, b in zip(state(plain), state(other), strict=True))


def test_the_loss_scale_follows_what_is_finite(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    trainer = scaled(Trainer(tiny(max_skips_in_row=2), dataset, device), 4.0)
    poison(monkeypatch, lambda step: (step == 1) | (step == 2) | (step == 4) | (step == 5))
    for scale, skips, failures in ((2.0, 1, 0), (1.0, 2, 0), (1.0, 2, 0), (1.0, 3, 1)):
        trainer.train_step()
        assert (word(trainer, "scale"), word(trainer, "skips"), word(trainer, "failures")) == (
            scale,
            skips,
            failures,
        )
    # At scale 1 it is not the scale's fault.
    for _ in range(AHEAD[device.type]):
        trainer.train_step()
    with pytest.raises(DivergedError, match="step 5: "):
        trainer.train_step()
    trainer = scaled(Trainer(tiny(), dataset, device), 4.0)
    trainer.work.words[WORDS.index("good")] = 1999
    monkeypatch.undo()
    trainer.train_step()
    assert (word(trainer, "scale"), word(trainer, "good")) == (8.0, 0.0)


class LateReadback(Readback):
    """As of a GPU that is always behind: nothing has arrived before it is waited for.

    On the CPU alone: a GPU is behind as it happens to be.
    """

    def __init__(self, source: Tensor, depth: int) -> None:
        super().__init__(source, 4)

    def receive(self, wait: bool, *rest: Any) -> list[float]:
        return super().receive(wait, *rest) if wait else []


def columns(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    with open(run_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "rays_per_second")} for row in found]


def test_late_numbers_are_reported_at_their_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = write_scene(tmp_path / "scene")
    config = tiny(save_every=8)
    run_training(str(scene), config, "tiny", tmp_path / "prompt", device="cpu")
    monkeypatch.setattr(trainer_module, "Readback", LateReadback)
    run_training(str(scene), config, "tiny", tmp_path / "late", device="cpu")
    assert columns(tmp_path / "late") == columns(tmp_path / "prompt")
    assert [row["step"] for row in columns(tmp_path / "late")] == ["5", "8", "10", "15", "16", "20"]
    a, b = (load_checkpoint(checkpoint_path(tmp_path / name, 20)) for name in ("prompt", "late"))
    assert same_tensors(a.tensors, b.tensors)


def test_the_host_is_at_most_so_far_ahead(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "Readback", LateReadback)
    poison(monkeypatch, lambda step: step >= 3)
    trainer = Trainer(tiny(max_skips_in_row=2), dataset)
    arrived = []
    for _ in range(6):
        trainer.launch_step()
        arrived.append([result.step for result in trainer.results()])
    trainer.launch_step()
    with pytest.raises(DivergedError, match="step 4: the loss is nan"):
        trainer.results()
    # Step 4 ends it; by when that is known in any process, three more may be under way.
    assert trainer.step == 7
    assert arrived == [[], [], [], [1], [2], [3]]
    assert [result.step for result in trainer.unread_results()] == [4, 5, 6, 7]


def test_deterministic_mode_ends_with_its_context() -> None:
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fills  # type: ignore[attr-defined]
