"""Checkpoints: what comes back, what is kept, and what is refused and why."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import TINY, same_tensors, tiny, tiny_dataset, write_scene

from mipnerf_fast import InputError, MipNerfConfig, checkpoint, durable_files
from mipnerf_fast.checkpoint import (
    best_checkpoint,
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model,
    prune_checkpoints,
    read_info,
)
from mipnerf_fast.data import Dataset
from mipnerf_fast.trainer import Trainer
from mipnerf_fast.training import run_training


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def save_steps(run_dir: Path, dataset: Dataset, psnrs: dict[int, float | None]) -> Trainer:
    """Checkpoints of some steps with made-up test PSNRs."""
    trainer = Trainer(TINY, dataset)
    for step, psnr in psnrs.items():
        while trainer.step < step:
            trainer.train_step()
        trainer.save(checkpoint_path(run_dir, step), psnr)
    return trainer


def edit(path: Path, **changes: object) -> None:
    """Write a checkpoint again with some fields of its header changed."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["mipnerf_fast"]) | changes
    save_file(load_file(path), path, {"mipnerf_fast": json.dumps(header)})


def edit_tensors(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Write a checkpoint again with some tensors changed, added or (None) removed; the header is as it was."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata)


def test_everything_comes_back(run_dir: Path, dataset: Dataset) -> None:
    trainer = save_steps(run_dir, dataset, {3: 12.5})
    loaded = load_checkpoint(checkpoint_path(run_dir, 3))
    assert same_tensors(loaded.weights(), trainer.model.state_dict())
    for name, parameter in trainer.model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(loaded.moments(moment)[name], trainer.moments()[moment][name])
            assert loaded.moments(moment)[name].shape == parameter.shape
    info = loaded.info
    assert (info.step, info.test_psnr, info.config, info.chunk_rays) == (3, 12.5, TINY, 64)
    assert info.seconds == trainer.seconds > 0
    assert info.torch == torch.__version__
    assert info == read_info(loaded.path)
    assert loaded.path.name == "step_00000003.safetensors"


def test_it_is_plain_safetensors(run_dir: Path, dataset: Dataset) -> None:
    save_steps(run_dir, dataset, {1: None})
    raw = checkpoint_path(run_dir, 1).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert json.loads(header["__metadata__"]["mipnerf_fast"])["step"] == 1
    assert {name.split(".")[0] for name in header} == {"__metadata__", "model", "adam"}


@pytest.mark.parametrize("size", [0, 5, 100, -1000, -1])
def test_a_truncated_file_is_refused(run_dir: Path, dataset: Dataset, size: int) -> None:
    save_steps(run_dir, dataset, {1: None})
    path = checkpoint_path(run_dir, 1)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"step_00000001\.safetensors: truncated"):
        load_checkpoint(path)


def test_a_flipped_bit_is_noticed(run_dir: Path, dataset: Dataset) -> None:
    save_steps(run_dir, dataset, {1: None})
    path = checkpoint_path(run_dir, 1)
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"step_00000001\.safetensors: damaged: crc32"):
        load_checkpoint(path)


def test_other_files_are_refused(run_dir: Path, dataset: Dataset) -> None:
    path = checkpoint_path(run_dir, 1)
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(path)
    save_file({"weight": torch.zeros(3)}, path, {"made_by": "somebody"})
    with pytest.raises(InputError, match=r"something else.*headers found: made_by"):
        load_checkpoint(path)
    path.write_bytes(b"PK\x03\x04 a zip file with a pickle in it, as torch.save writes")
    with pytest.raises(InputError, match="truncated or not a safetensors file"):
        load_checkpoint(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="not a file"):
        load_checkpoint(path)


def test_a_mismatch_says_which_tensor_or_field(run_dir: Path, dataset: Dataset) -> None:
    path = checkpoint_path(run_dir, 1)
    weight = "model.mlps.0.linears.0.weight"

    def refused(pattern: str) -> None:
        with pytest.raises(InputError, match=pattern):
            load_checkpoint(path)
        save_steps(run_dir, dataset, {1: None})

    save_steps(run_dir, dataset, {1: None})
    edit_tensors(path, {weight: torch.zeros(16, 30)})
    refused(rf"tensor '{weight}': found \[16, 30\] float32, expected \[16, 36\] float32")
    edit_tensors(path, {weight: torch.zeros(16, 36, dtype=torch.float64)})
    refused(rf"tensor '{weight}': found \[16, 36\] float64, expected \[16, 36\] float32")
    edit_tensors(path, {weight: None})
    refused(rf"tensor '{weight}' is missing, expected \[16, 36\] float32")
    edit_tensors(path, {"model.extra": torch.zeros(2)})
    refused(r"tensor 'model.extra' \[2\] float32 is no part of the configured model")
    edit_tensors(path, {weight: torch.full((16, 36), float("nan"))})
    refused(rf"tensor '{weight}': found a value that is not finite")
    edit(path, format_version=99)
    refused("format_version: found 99, expected 1")
    edit(path, step="ten")
    refused("header field 'step': expected int, found 'ten'")
    edit(path, config={"model": {"kind": "voxels"}})
    refused("config: model.kind: expected one of mipnerf, nerf, fast, found 'voxels'")


def test_the_previous_good_one_is_used(run_dir: Path, dataset: Dataset) -> None:
    save_steps(run_dir, dataset, {1: None, 2: None, 3: None})
    for step in (2, 3):
        path = checkpoint_path(run_dir, step)
        path.write_bytes(path.read_bytes()[: -100 * step])
    with pytest.warns(UserWarning, match=r"truncated.*using step_00000001") as found:
        assert latest_checkpoint(run_dir).info.step == 1
    for warning, broken in zip(found, ("step_00000003", "step_00000002"), strict=True):
        assert broken in str(warning.message)
    checkpoint_path(run_dir, 1).write_bytes(b"")
    with pytest.raises(
        InputError, match=r"no good checkpoint: .*step_00000003.*step_00000002.*step_00000001"
    ):
        latest_checkpoint(run_dir)


def test_a_folder_without_checkpoints_is_refused(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step_notes.safetensors").write_text("no checkpoint by its name")
    with pytest.raises(InputError, match="no checkpoint"):
        latest_checkpoint(run_dir)


def test_the_last_and_the_best_stay(run_dir: Path, dataset: Dataset) -> None:
    save_steps(run_dir, dataset, {1: 10.0, 2: 14.0, 3: 12.0, 4: None, 5: 13.0})
    assert best_checkpoint(run_dir).info.step == 2
    prune_checkpoints(run_dir, 2)
    assert [read_info(path).step for path in list_checkpoints(run_dir)] == [2, 4, 5]
    prune_checkpoints(run_dir, 2)
    assert [read_info(path).step for path in list_checkpoints(run_dir)] == [2, 4, 5]
    assert latest_checkpoint(run_dir).info.step == 5


def test_without_test_views_the_latest_is_the_best(run_dir: Path, dataset: Dataset) -> None:
    save_steps(run_dir, dataset, {1: None, 2: None, 3: None})
    assert best_checkpoint(run_dir).info.step == 3
    prune_checkpoints(run_dir, 1)
    assert [read_info(path).step for path in list_checkpoints(run_dir)] == [3]


def test_steps_are_ordered_as_numbers(run_dir: Path, dataset: Dataset) -> None:
    save_steps(run_dir, dataset, {1: None})
    first = checkpoint_path(run_dir, 1)
    for step in (99_999_999, 100_000_000):
        checkpoint_path(run_dir, step).write_bytes(first.read_bytes())
    assert [path.name for path in list_checkpoints(run_dir)][-1] == "step_100000000.safetensors"


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_a_failed_write_leaves_the_old_file(
    run_dir: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    trainer = save_steps(run_dir, dataset, {1: 10.0})
    path = checkpoint_path(run_dir, 1)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable_files.os, {"write": "fsync", "replace": "replace"}[moment], full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save(path, 11.0)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_model_is_loaded_for_the_other_verbs(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene")
    run_training(str(scene), tiny(max_steps=8), "tiny", tmp_path / "run", device="cpu", background="black")
    model, run, info = load_model(tmp_path / "run")
    assert (info.step, info.config) == (8, tiny(max_steps=8))
    assert (run["data"], run["background"], run["downscale"]) == (str(scene), "black", 1)
    assert run["train"]["max_steps"] == 8
    assert same_tensors(model.state_dict(), latest_checkpoint(tmp_path / "run").weights())
    best, _, info = load_model(tmp_path / "run", which="best")
    assert same_tensors(best.state_dict(), best_checkpoint(tmp_path / "run").weights())
    with pytest.raises(ValueError, match='which must be "latest" or "best"'):
        load_model(tmp_path / "run", which="first")


def test_a_broken_run_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run folder: it has no config\.json"):
        load_model(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not valid JSON"):
        load_model(tmp_path)
    path.write_text("[]")
    with pytest.raises(InputError, match=r"config\.json: expected an object, found list"):
        load_model(tmp_path)
    path.write_text('{"preset": 3}')
    with pytest.raises(InputError, match=r"config\.json: preset: expected str, found 3"):
        load_model(tmp_path)
    path.write_text('{"preset": "small"}')
    with pytest.raises(InputError, match=r"config\.json: missing field 'data'"):
        load_model(tmp_path)


def test_shapes_are_checked_without_memory_for_the_model(run_dir: Path, dataset: Dataset) -> None:
    save_steps(run_dir, dataset, {1: None})
    path = checkpoint_path(run_dir, 1)
    # A header that promises a model of 2^40 weights must not make the reader allocate it.
    config = json.loads(json.dumps(checkpoint.to_dict(tiny(model=MipNerfConfig(net_width=2**20)))))
    edit(path, config=config)
    with pytest.raises(InputError, match=r"expected \[1048576\] float32"):
        load_checkpoint(path)


def test_good_checkpoints_give_no_warning(run_dir: Path, dataset: Dataset) -> None:
    save_steps(run_dir, dataset, {1: None, 2: 10.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latest_checkpoint(run_dir)
        best_checkpoint(run_dir)
