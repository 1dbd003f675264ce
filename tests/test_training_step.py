"""The step as work for the device alone: it asks the host nothing, skips what is not finite, and is read back late."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY, same_tensors, tiny, tiny_dataset, write_scene
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mipnerf_fast import InputError, MipNerfConfig, NerfConfig, TrainConfig, ops
from mipnerf_fast import trainer as trainer_module
from mipnerf_fast.cameras import Rays
from mipnerf_fast.checkpoint import checkpoint_path, load_checkpoint
from mipnerf_fast.data import Dataset, RayBatches
from mipnerf_fast.determinism import deterministic
from mipnerf_fast.flat_parameters import FlatParameters
from mipnerf_fast.ops import mlp_few_samples
from mipnerf_fast.ops.finite import reports_non_finite
from mipnerf_fast.readback import Readback
from mipnerf_fast.trainer import Trainer
from mipnerf_fast.trainer_base import DivergedError
from mipnerf_fast.training import run_training
from mipnerf_fast.training_step import WORDS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """This work is too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
def test_the_step_asks_the_host_nothing(dataset: Dataset, name: str, sizes: str) -> None:
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
    trainer = Trainer(CONFIGS[name], dataset)
    trainer.train_step()
    with HostWork() as watch:
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
    """However many parameters there are: on a GPU each of these takes as long as a small kernel takes to start."""
    # As on a GPU, where no batch is so small that torch's autograd goes back through the network's layers.
    monkeypatch.setattr(mlp_few_samples, "_FEW", 0)
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


def test_parameters_and_gradients_are_views_of_one_tensor_each(dataset: Dataset) -> None:
    trainer = Trainer(tiny(), dataset)
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


def state(trainer: Trainer) -> list[Tensor]:
    """Weights and both moments, as they are now."""
    flat, known = trainer.work.flat, trainer.work.optimizer.state[trainer.work.flat.values]
    return [x.detach().clone() for x in (flat.values, known["exp_avg"], known["exp_avg_sq"], known["step"])]


def poison(monkeypatch: pytest.MonkeyPatch, steps: Callable[[int], bool], value: float = math.nan) -> None:
    """The target of ray 5 of some steps is not finite."""
    draw = RayBatches.draw

    def poisoned(self: RayBatches, seed: int, step: int | Tensor, count: int) -> tuple[Rays, Tensor]:
        rays, target = draw(self, seed, step, count)
        if steps(int(step)) and count > 5:
            target[5, 1] = value
        return rays, target

    monkeypatch.setattr(RayBatches, "draw", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    poison(monkeypatch, lambda step: step == 2, value)
    # Clipped by value, an infinite gradient would be a finite one.
    trainer = Trainer(tiny(grad_max_value=0.1), dataset)
    assert not trainer.train_step().is_skipped
    before = state(trainer)
    result = trainer.train_step()
    assert (result.step, result.is_skipped, result.skips, result.failures_in_row) == (2, True, 1, 1)
    assert not math.isfinite(result.loss)
    assert all(torch.equal(a, b) for a, b in zip(before, state(trainer), strict=True))
    result = trainer.train_step()
    assert (result.step, result.is_skipped, result.skips, result.failures_in_row) == (3, False, 1, 0)
    after = state(trainer)
    assert not torch.equal(after[0], before[0])
    assert float(after[3]) == 2  # of Adam


def test_a_skipped_step_is_explained(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda step: step == 2)
    trainer = Trainer(tiny(chunk_rays=4), dataset)
    good = trainer.train_step()
    before = state(trainer)
    skipped = trainer.train_step()
    image, pixel = (int(x[5]) for x in trainer.batches.choose(TINY.seed, 2, 64))
    place = f"pixel ({pixel % 12}, {pixel // 12}) of image {dataset.names[image]}"
    assert trainer.explain_skip(skipped) == f"batch: target is nan at ray 5, sample 1 of the batch, {place}"
    assert "every operation is finite" in trainer.explain_skip(good)
    assert all(torch.equal(a, b) for a, b in zip(before, state(trainer), strict=True))


def test_the_operation_of_a_skipped_step_is_named(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = ops.frustum_ipe, 0

    @reports_non_finite("frustum_ipe", "features")
    def broken(*arguments: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        features = encode(*arguments, **options).clone()
        if calls % 32 == 4:  # the fine level of the second chunk of a batch
            features[1, 3, 0] = math.nan
        return features

    monkeypatch.setattr(ops, "frustum_ipe", broken)
    trainer = Trainer(tiny(chunk_rays=4), dataset)
    result = trainer.train_step()
    assert result.is_skipped
    assert trainer.explain_skip(result).startswith(
        "frustum_ipe: features is nan at ray 5, sample 3 of the batch, "
    )


def test_the_gradient_of_a_skipped_step_is_named(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    network = ops.MipMLP.forward.__wrapped__  # type: ignore[attr-defined]

    @reports_non_finite("mlp", "rgb", "density")
    def broken(self: ops.MipMLP, *arguments: Any) -> tuple[Tensor, Tensor]:
        rgb, density = network(self, *arguments)
        hit = torch.zeros_like(density)
        hit[2, 6] = math.inf
        density.register_hook(lambda gradient: gradient + hit)
        return rgb, density

    monkeypatch.setattr(ops.MipMLP, "forward", broken)
    trainer = Trainer(tiny(), dataset)
    result = trainer.train_step()
    assert result.is_skipped
    assert math.isfinite(result.loss)
    assert trainer.explain_skip(result).startswith(
        "mlp: the gradient of density is inf at ray 2, sample 6 of the batch, "
    )


def test_a_weight_that_is_not_finite_is_found_by_what_it_does(dataset: Dataset) -> None:
    trainer = Trainer(tiny(), dataset)
    with torch.no_grad():
        trainer.parameters[0][0, 0] = math.nan
    result = trainer.train_step()
    assert result.is_skipped
    assert trainer.explain_skip(result).startswith("mlp: rgb is nan at ray 0, sample 0 of the batch, pixel")


@pytest.mark.parametrize(
    ("limits", "last", "message"),
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
    last: int,
    message: str,
) -> None:
    scene = write_scene(tmp_path / "scene")
    poison(monkeypatch, lambda step: step >= 7)
    config = tiny(test_every=0, keep_checkpoints=5, **limits)
    with pytest.raises(
        InputError,
        match=rf"step {last}: the loss is nan, the norm of its gradient nan; {message}.*"
        rf"step_0000000{last}.*; a smaller lr_init, or grad_max_norm, may",
    ):
        run_training(str(scene), config, "tiny", tmp_path / "run", device="cpu")
    said = capfd.readouterr().err
    assert "step 7 skipped (1 so far): the loss is nan" in said
    assert "batch: target is nan at ray 5" in said
    assert "step 8 skipped" not in said  # once for each series
    saved = load_checkpoint(checkpoint_path(tmp_path / "run", last))
    good = load_checkpoint(checkpoint_path(tmp_path / "run", 4))
    assert (saved.info.skips, saved.info.failures, good.info.skips) == (last - 6, last - 6, 0)
    monkeypatch.undo()
    trainer = Trainer(config, _loaded(scene))
    for _ in range(6):
        trainer.train_step()
    weights = {name: tensor.detach() for name, tensor in trainer.model.state_dict().items()}
    assert same_tensors(saved.weights(), weights)
    with open(tmp_path / "run" / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # Steps 5 to 8 or 9, of which 5 and 6 were good: their mean, not NaN.
    assert int(rows[-1]["step"]) == last
    assert all(math.isfinite(float(row["loss"])) for row in rows if row["loss"])


def _loaded(scene: Path) -> Dataset:
    from mipnerf_fast.data import load_dataset

    return load_dataset(str(scene))


def test_scattered_skips_do_not_end_a_run(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda step: step % 2 == 0)
    trainer = Trainer(tiny(max_skips_in_row=2, max_skips=3), dataset)
    for _ in range(5):
        trainer.train_step()
    with pytest.raises(DivergedError, match="1 steps in a row and 3 in all"):
        trainer.train_step()


def test_a_run_with_skips_resumes_bit_by_bit(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    poison(monkeypatch, lambda step: step in (2, 5))
    whole = Trainer(tiny(), dataset)
    for _ in range(7):
        whole.train_step()
    first = Trainer(tiny(), dataset)
    for _ in range(4):
        first.train_step()
    first.save(tmp_path / "step_00000004.safetensors", None)
    second = Trainer(tiny(), dataset, checkpoint=load_checkpoint(tmp_path / "step_00000004.safetensors"))
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


def test_a_scaled_loss_gives_the_same_steps(dataset: Dataset) -> None:
    """A power of two commutes with every rounding, short of the ends of the range."""
    config = tiny(grad_max_norm=0.01, weight_decay_mult=0.1)
    plain, other = Trainer(config, dataset), scaled(Trainer(config, dataset), 2.0**12)
    for _ in range(4):
        a, b = plain.train_step(), other.train_step()
        assert (a.loss, a.norm) == (b.loss, b.norm)
    assert all(torch.equal(a, b) for a, b in zip(state(plain), state(other), strict=True))


def test_the_loss_scale_follows_what_is_finite(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = scaled(Trainer(tiny(max_skips_in_row=2), dataset), 4.0)
    poison(monkeypatch, lambda step: step in (1, 2, 4, 5))
    for scale, skips, failures in ((2.0, 1, 0), (1.0, 2, 0), (1.0, 2, 0), (1.0, 3, 1)):
        trainer.train_step()
        assert (word(trainer, "scale"), word(trainer, "skips"), word(trainer, "failures")) == (
            scale,
            skips,
            failures,
        )
    # At scale 1 it is not the scale's fault.
    with pytest.raises(DivergedError):
        trainer.train_step()
    trainer = scaled(Trainer(tiny(), dataset), 4.0)
    trainer.work.words[WORDS.index("good")] = 1999
    monkeypatch.undo()
    trainer.train_step()
    assert (word(trainer, "scale"), word(trainer, "good")) == (8.0, 0.0)


class LateReadback(Readback):
    """As of a GPU that is always behind: nothing has arrived before it is waited for."""

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


@pytest.mark.parametrize("model", [NOISY, MipNerfConfig(num_samples=16, net_depth=3, net_width=64)])
def test_captured_and_launched_steps_agree_bit_by_bit(
    dataset: Dataset, device: torch.device, model: MipNerfConfig
) -> None:
    """The default on a GPU replays a graph; on a CPU both launch the same step, and this checks that alone."""

    def train(config: TrainConfig) -> tuple[list[float], list[Tensor]]:
        with deterministic():
            trainer = Trainer(config, dataset, device)
            losses = [trainer.train_step().loss for _ in range(10)]
            return losses, state(trainer)

    config = tiny(model=model, grad_max_norm=0.1, chunk_rays=32, deterministic=True)
    losses, captured = train(config)
    again, launched = train(dataclasses.replace(config, capture=False))
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(captured, launched, strict=True))
    assert len(set(losses)) == 10


def test_deterministic_mode_ends_with_its_context() -> None:
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fills  # type: ignore[attr-defined]
