"""Checkpoints: weights and optimiser in one safetensors file, the rest as JSON in its header; nothing is executed.

`checkpoints/step_00001000.safetensors` holds `model.<parameter>`, `adam.exp_avg.<parameter>` and
`adam.exp_avg_sq.<parameter>`. Random numbers are counter-based, so the step number is all the rest of the state.
"""

from __future__ import annotations

import json
import math
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from .config import TrainConfig, from_dict, to_dict
from .durable_files import write_durably
from .errors import InputError
from .model import Model, build_model
from .run_folder import RunConfig

FOLDER = "checkpoints"
FORMAT = "mipnerf_fast checkpoint"
FORMAT_VERSION = 1
_KEY = "mipnerf_fast"
# Of Adam's state, beside the step.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself.

    step: optimiser steps done.
    seconds: spent on training alone, over all resumed parts.
    config: of the run.
    chunk_rays: rays per pass that the run settled on.
    test_psnr: over the fixed sample of test pixels (see `training`), dB, or None where there is no test split.
    package, revision, torch: versions it was written with.
    skips, failures: steps skipped because of values that are not finite, and those among them that no loss scale
        explains. loss_scale, good_steps: of float16, and steps since the scale changed.
    """

    step: int
    seconds: float
    config: TrainConfig
    chunk_rays: int
    test_psnr: float | None
    package: str
    revision: str
    torch: str
    skips: int = 0
    failures: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk, complete and consistent with its own configuration."""

    path: Path
    info: CheckpointInfo
    tensors: dict[str, Tensor]

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters by name."""
        return _under("model", self.tensors)

    def moments(self, name: str) -> dict[str, Tensor]:
        """One of Adam's moments, "exp_avg" or "exp_avg_sq", by parameter name."""
        return _under(f"adam.{name}", self.tensors)

    def build_model(self, device: torch.device | str = "cpu") -> Model:
        """The model with these weights."""
        model = build_model(self.info.config.model)
        model.load_state_dict(self.weights())
        return model.to(device)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix += "."
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / FOLDER / f"step_{step:08d}.safetensors"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run folder by their names, oldest first, whether good or not."""
    paths = (run_dir / FOLDER).glob("step_*.safetensors")
    return sorted(
        (path for path in paths if _step_of(path) is not None), key=lambda path: _step_of(path) or 0
    )


def _step_of(path: Path) -> int | None:
    digits = path.stem.removeprefix("step_")
    return int(digits) if digits.isdecimal() else None


def checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 of all tensors' bytes in the order of their names."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy().data, crc)
    return crc


def save_checkpoint(
    path: Path, info: CheckpointInfo, model: nn.Module, moments: dict[str, dict[str, Tensor]]
) -> None:
    """Write a checkpoint that is there in full or not at all.

    Args:
        path: of the file; its folder must exist.
        info: goes into the header as JSON.
        model: whose parameters are saved.
        moments: of Adam, {"exp_avg": {parameter name: tensor}, "exp_avg_sq": ...}.
    """
    named = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for moment in MOMENTS:
        named |= {f"adam.{moment}.{name}": tensor for name, tensor in moments[moment].items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": info.step,
        "seconds": info.seconds,
        "config": to_dict(info.config),
        "chunk_rays": info.chunk_rays,
        "test_psnr": info.test_psnr,
        "package": info.package,
        "revision": info.revision,
        "torch": info.torch,
        "skips": info.skips,
        "failures": info.failures,
        "loss_scale": info.loss_scale,
        "good_steps": info.good_steps,
        "crc32": checksum(tensors),
    }
    write_durably(path, to_safetensors(tensors, {_KEY: json.dumps(header)}))


def read_info(path: Path) -> CheckpointInfo:
    """What a checkpoint says about itself, from its header alone.

    Errors: InputError where the file is truncated, or no checkpoint of this package.
    """
    return _parse_info(path, _read_header(path))


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except (SafetensorError, OSError) as error:
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "not a file"
        raise InputError(f"{path}: truncated or not a safetensors file ({size}; {error})") from None
    try:
        header = json.loads(metadata.get(_KEY, "null"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: header {_KEY!r} is not JSON ({error})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = ", ".join(sorted(metadata)) or "none"
        raise InputError(
            f"{path}: a safetensors file of something else: no header {_KEY!r} with format {FORMAT!r} "
            f"(headers found: {found})"
        )
    if header.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version: found {header.get('format_version')!r}, expected {FORMAT_VERSION}"
        )
    return header


def _parse_info(path: Path, header: dict[str, Any]) -> CheckpointInfo:
    def take(name: str, *kinds: type) -> Any:
        value = header.get(name)
        if type(value) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise InputError(f"{path}: header field {name!r}: expected {wanted}, found {value!r}")
        return value

    # Checkpoints from before these fields have none to tell.
    header = {"skips": 0, "failures": 0, "loss_scale": 1.0, "good_steps": 0} | header
    return CheckpointInfo(
        step=take("step", int),
        seconds=float(take("seconds", float, int)),
        config=from_dict(header.get("config", {}), f"{path}: config"),
        chunk_rays=take("chunk_rays", int),
        test_psnr=take("test_psnr", float, type(None)),
        package=take("package", str),
        revision=take("revision", str),
        torch=take("torch", str),
        skips=take("skips", int),
        failures=take("failures", int),
        loss_scale=take("loss_scale", float),
        good_steps=take("good_steps", int),
    )


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and hold it against its own configuration and checksum.

    Errors: InputError saying what is wrong: truncated, damaged, of something else, or the tensor that is missing,
    too many or of another shape, or a weight that is not finite.
    """
    header = _read_header(path)
    info = _parse_info(path, header)
    try:
        tensors = parse_safetensors(path.read_bytes())
    except SafetensorError as error:
        raise InputError(f"{path}: truncated or damaged ({error})") from None
    _check_tensors(path, tensors, info.config)
    found = checksum(tensors)
    if found != header.get("crc32"):
        raise InputError(
            f"{path}: damaged: crc32 of the tensors is {found}, the header says {header.get('crc32')}"
        )
    return Checkpoint(path, info, tensors)


def _check_tensors(path: Path, tensors: dict[str, Tensor], config: TrainConfig) -> None:
    with torch.device("meta"):
        model = build_model(config.model)
    wanted = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for moment in MOMENTS:
        wanted |= {f"adam.{moment}.{name}": tensor for name, tensor in model.named_parameters()}
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors:
            raise InputError(f"{path}: tensor {name!r} is missing, expected {_describe(wanted[name])}")
        if name not in wanted:
            raise InputError(
                f"{path}: tensor {name!r} {_describe(tensors[name])} is no part of the configured model"
            )
        if _describe(tensors[name]) != _describe(wanted[name]):
            raise InputError(
                f"{path}: tensor {name!r}: found {_describe(tensors[name])}, expected {_describe(wanted[name])}"
            )
        if name.startswith("model.") and not bool(torch.isfinite(tensors[name]).all()):
            raise InputError(f"{path}: tensor {name!r}: found a value that is not finite")


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def check_fresh(run_dir: Path) -> None:
    """Refuse to start a new run over one that has checkpoints.

    Errors: InputError naming the folder and the checkpoint.
    """
    found = list_checkpoints(run_dir)
    if found:
        raise InputError(
            f"--run-dir: {run_dir} already holds a run with checkpoints (the last is {found[-1].name}); "
            "add --resume to continue it, or name another folder"
        )


def latest_checkpoint(run_dir: Path) -> Checkpoint:
    """The newest good checkpoint of a run folder.

    A newer one that cannot be used is passed over with a warning that says what is wrong with it.

    Errors: InputError where there is none, or none that is good.
    """
    found = list_checkpoints(run_dir)
    if not found:
        raise InputError(f"{run_dir / FOLDER}: no checkpoint (expected step_*.safetensors)")
    reasons = []
    for path in reversed(found):
        try:
            checkpoint = load_checkpoint(path)
        except InputError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            warnings.warn(f"{reason}; using {path.name} instead", stacklevel=2)
        return checkpoint
    raise InputError(f"{run_dir / FOLDER}: no good checkpoint: {'; '.join(reasons)}")


def best_checkpoint(run_dir: Path) -> Checkpoint:
    """The checkpoint with the highest test PSNR in its header; the latest one where none has any.

    Errors: InputError as `latest_checkpoint`.
    """
    path = _best_path(list_checkpoints(run_dir))
    if path is not None:
        try:
            return load_checkpoint(path)
        except InputError as error:
            warnings.warn(f"{error}; using the latest instead", stacklevel=2)
    return latest_checkpoint(run_dir)


def load_model(
    run_dir: Path, device: torch.device | str = "cpu", which: str = "latest"
) -> tuple[Model, dict[str, Any], CheckpointInfo]:
    """The trained model of a run folder.

    Args:
        run_dir: of the run.
        device: to put the model on.
        which: "latest" or "best".

    Returns:
        The model, what config.json says (`RunConfig.to_dict`), and what the checkpoint says about itself.

    Errors: InputError where the folder is no run folder or holds no good checkpoint.
    """
    if which not in ("latest", "best"):
        raise ValueError(f'load_model: which must be "latest" or "best", got {which!r}')
    run = RunConfig.read(run_dir)
    checkpoint = latest_checkpoint(run_dir) if which == "latest" else best_checkpoint(run_dir)
    return checkpoint.build_model(device), run.to_dict(), checkpoint.info


def _best_path(paths: list[Path]) -> Path | None:
    best, best_psnr = None, -math.inf
    for path in paths:
        try:
            psnr = read_info(path).test_psnr
        except InputError:
            continue
        if psnr is not None and psnr > best_psnr:
            best, best_psnr = path, psnr
    return best


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Remove all checkpoints but the last `keep` and the best."""
    paths = list_checkpoints(run_dir)
    best = _best_path(paths)
    for path in paths[:-keep]:
        if path != best:
            path.unlink(missing_ok=True)
