"""Small scenes and configurations for the tests of training, checkpoints and resuming."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import torch

from mipnerf_fast import MipNerfConfig, TrainConfig
from mipnerf_fast.data import Dataset
from mipnerf_fast.data.procedural import demo_scene
from mipnerf_fast.pictures import write_png
from mipnerf_fast.trainer import Trainer

TINY = TrainConfig(
    model=MipNerfConfig(
        num_samples=8, max_deg_point=6, deg_view=1, net_depth=2, net_width=16, net_width_condition=16
    ),
    batch_size=64,
    max_steps=20,
    lr_init=5e-3,
    lr_final=5e-4,
    lr_delay_steps=5,
    save_every=4,
    keep_checkpoints=2,
    test_every=10,
    print_every=5,
)


def tiny(**changes: object) -> TrainConfig:
    """The tiny configuration with some fields changed."""
    return dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]


def tiny_dataset(split: str = "train", size: int = 12, views: int = 6) -> Dataset:
    """A few small views of the built-in scene."""
    return demo_scene(split, size=size, views=views, supersample=1)


def write_scene(
    folder: Path, splits: tuple[str, ...] = ("train", "test"), size: int = 12, views: int = 4
) -> Path:
    """Write a few small views of the built-in scene as an ordinary Blender scene."""
    for split in splits:
        data = tiny_dataset(split, size, views)
        frames = []
        for name, c2w, image in zip(data.names, data.c2w, data.images, strict=True):
            matrix = [*c2w.tolist(), [0.0, 0.0, 0.0, 1.0]]
            write_png(folder / split / f"{name}.png", image.numpy())
            frames.append({"file_path": f"./{split}/{name}", "transform_matrix": matrix})
        angle = 2 * math.atan(0.5 * size / float(data.focal[0]))
        text = json.dumps({"camera_angle_x": angle, "frames": frames})
        (folder / f"transforms_{split}.json").write_text(text, encoding="utf-8")
    return folder


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def state(trainer: Trainer) -> list[torch.Tensor]:
    """Weights, both moments and the number of Adam's steps, as they are now."""
    flat, known = trainer.work.flat, trainer.work.optimizer.state[trainer.work.flat.values]
    return [x.detach().clone() for x in (flat.values, known["exp_avg"], known["exp_avg_sq"], known["step"])]
