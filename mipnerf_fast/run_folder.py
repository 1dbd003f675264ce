"""The folder of a run: config.json, metrics.csv, and what may go into which folder."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import NOT_OF_FAST_MODEL, TrainConfig, from_dict, to_dict
from .data import Dataset
from .durable_files import write_durably
from .errors import InputError

CONFIG = "config.json"
METRICS = "metrics.csv"
COLUMNS = (
    "step",
    "seconds",
    "loss",
    "psnr",
    "lr",
    "rays_per_second",
    "test_psnr",
    "test_view",
    "test_view_psnr",
)
# What a resumed run may change: how long it goes on, where it runs, and how often it reports.
_MAY_CHANGE = (
    "max_steps",
    "save_every",
    "keep_checkpoints",
    "test_every",
    "print_every",
    "chunk_rays",
    "capture",
    "deterministic",
    "max_skips_in_row",
    "max_skips",
)


@dataclass(frozen=True)
class RunConfig:
    """What config.json of a run folder says.

    preset: the configuration's origin. data: as given on the command line. downscale, background: of the data.
    dataset: `fingerprint` of the training split. train: the whole configuration. max_minutes: or None. device:
    "cpu" or "cuda". backend: as asked for. torch, package, revision: versions that the run began (or was last
    resumed) with.
    """

    preset: str
    data: str
    downscale: int
    background: str
    dataset: dict[str, int]
    train: TrainConfig
    max_minutes: float | None
    device: str
    backend: str
    torch: str
    package: str
    revision: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"train": to_dict(self.train)}

    def write(self, run_dir: Path) -> None:
        """Write config.json."""
        write_durably(run_dir / CONFIG, (json.dumps(self.to_dict(), indent=2) + "\n").encode())

    @staticmethod
    def read(run_dir: Path) -> RunConfig:
        """Read config.json.

        Errors: InputError naming the file and the field that is missing, unknown or of the wrong type.
        """
        path = run_dir / CONFIG
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{run_dir}: no run folder: it has no {CONFIG}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"{path}: expected an object, found {type(values).__name__}")
        for name, kinds in _KINDS.items():
            if name not in values:
                raise InputError(f"{path}: missing field {name!r}")
            if type(values[name]) not in kinds:
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise InputError(f"{path}: {name}: expected {wanted}, found {values[name]!r}")
        unknown = values.keys() - _KINDS.keys()
        if unknown:
            raise InputError(f"{path}: unknown field {sorted(unknown)[0]!r}")
        return RunConfig(**(values | {"train": from_dict(values["train"], f"{path}: train")}))


_KINDS: dict[str, tuple[type, ...]] = {
    "preset": (str,),
    "data": (str,),
    "downscale": (int,),
    "background": (str,),
    "dataset": (dict,),
    "train": (dict,),
    "max_minutes": (float, int, type(None)),
    "device": (str,),
    "backend": (str,),
    "torch": (str,),
    "package": (str,),
    "revision": (str,),
}


def fingerprint(dataset: Dataset) -> dict[str, int]:
    """What tells one training set from another: the number of images and pixels, and a CRC-32 of pixels and poses."""
    crc = zlib.crc32(dataset.pixels.contiguous().numpy().data)
    crc = zlib.crc32(dataset.c2w.contiguous().view(torch.uint8).numpy().data, crc)
    return {"images": len(dataset), "pixels": dataset.pixels.shape[0], "crc32": crc}


def check_writable(run_dir: Path) -> None:
    """Refuse a run folder that cannot be made or written to, without writing anything.

    Errors: InputError naming the folder, or the parent that is in the way.
    """
    existing = run_dir
    while not existing.exists() and existing.parent != existing:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"--run-dir: {existing} is a file, expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        what = "is" if existing == run_dir else f"cannot be made: {existing} is"
        raise InputError(f"--run-dir: {run_dir} {what} not writable")


def check_resumable(run_dir: Path) -> RunConfig:
    """The configuration of the run to resume.

    Errors: InputError where there is none.
    """
    if not (run_dir / CONFIG).is_file():
        what = "has no config.json" if run_dir.is_dir() else "does not exist"
        raise InputError(f"--resume: {run_dir} {what}: there is no run to resume")
    return RunConfig.read(run_dir)


def _config_differences(was: dict[str, Any], now: dict[str, Any], where: str) -> list[str]:
    """What a resumed run may not change, as sentences."""
    models = was["model"], now["model"]
    free = {
        "model",
        *_MAY_CHANGE,
        *(NOT_OF_FAST_MODEL if models[0]["kind"] == models[1]["kind"] == "fast" else ()),
    }
    pairs = [(name, was[name], now[name]) for name in was if name not in free]
    names = dict.fromkeys([*models[0], *models[1]])
    if "tcnn" not in (models[0].get("mlp_backend"), models[1].get("mlp_backend")):
        # All others compute the same function of the same weights.
        names.pop("mlp_backend", None)
    for name in ("mlp_dtype", "mlp_deterministic"):
        names.pop(name, None)
    pairs += [(f"model.{name}", models[0].get(name), models[1].get(name)) for name in names]
    return [f"{name}: {a!r} in {where}, {b!r} now" for name, a, b in pairs if a != b]


def check_same_config(old: TrainConfig, new: TrainConfig, where: str) -> None:
    """Refuse to go on with another configuration than that found in `where`.

    Errors: InputError listing every field that differs but may not, with both values.
    """
    differing = _config_differences(to_dict(old), to_dict(new), where)
    if differing:
        raise InputError(f"--resume: a different run: {'; '.join(differing)}")


def check_same_run(old: RunConfig, new: RunConfig, steps_done: int) -> None:
    """Refuse to resume a run as a different one.

    Errors: InputError listing every field that differs but may not, with both values.
    """
    where = "the run folder"
    differing = _config_differences(to_dict(old.train), to_dict(new.train), where)
    for name in ("downscale", "background", "dataset"):
        if getattr(old, name) != getattr(new, name):
            differing.append(f"{name}: {getattr(old, name)!r} in {where}, {getattr(new, name)!r} now")
    if differing:
        raise InputError(f"--resume: a different run: {'; '.join(differing)}")
    if new.train.max_steps < steps_done:
        raise InputError(
            f"--max-steps: {new.train.max_steps} is less than the {steps_done} steps that the run has done"
        )


class MetricsFile:
    """metrics.csv of a run: one row per report, kept up to the step that the run continues from.

    Args:
        run_dir: of the run.
        step: rows after this one are dropped; 0: start afresh. They belong to steps that will be done again.

    Errors: InputError where the file holds something else.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        path = run_dir / METRICS
        rows = [row for row in _read_rows(path) if int(row["step"]) <= step] if step and path.exists() else []
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_durably(path, text.getvalue().encode())
        # Line buffered: a row is on its way to disk as soon as it is complete.
        self._file = open(path, "a", encoding="utf-8", newline="", buffering=1)  # noqa: SIM115 (kept open)
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; columns that it lacks or that are None stay empty."""
        self._writer.writerow(row)

    def sync(self) -> None:
        """Put all rows on disk: before a checkpoint that builds on them."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _read_rows(path: Path) -> list[dict[str, str]]:
    """The complete rows; a kill may have cut the last one short."""
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(complete))
    if complete and tuple(reader.fieldnames or ()) != COLUMNS:
        raise InputError(
            f"{path}: expected the columns {','.join(COLUMNS)}, found {complete.splitlines()[0]!r}"
        )
    rows = list(reader)
    for row in rows:
        if None in row or None in row.values() or not row["step"].isdecimal():
            raise InputError(f"{path}: broken row: {row!r}")
    return rows


def read_metrics(run_dir: Path) -> dict[str, list[float]]:
    """The columns of metrics.csv as numbers, NaN where a cell is empty; `test_view` as its text is left out.

    Errors: InputError where the file is missing or holds something else.
    """
    path = run_dir / METRICS
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    rows = _read_rows(path)
    names = [name for name in COLUMNS if name != "test_view"]
    try:
        return {name: [float(row[name]) if row[name] else float("nan") for row in rows] for name in names}
    except ValueError as error:
        raise InputError(f"{path}: expected numbers ({error})") from None
