"""The Blender loader: what it reads, and by what name it refuses what it cannot."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import CAMERA_ANGLE_X, edit_json, random_pixels, write_blender

from mipnerf_fast import InputError, cameras
from mipnerf_fast.data import load_dataset
from mipnerf_fast.data.multiscale import downsample2


def test_pixels_and_cameras_arrive(tmp_path: Path) -> None:
    written = write_blender(tmp_path)
    dataset = load_dataset(tmp_path)
    frames = json.loads((tmp_path / "transforms_train.json").read_text())["frames"]
    assert len(dataset) == 3
    assert dataset.names == ["r_0", "r_1", "r_2"]
    assert (dataset.split, dataset.background, dataset.white_background) == ("train", "white", True)
    for i, (image, pixels) in enumerate(zip(dataset.images, written["train"], strict=True)):
        np.testing.assert_array_equal(image.numpy(), pixels)
        np.testing.assert_array_equal(dataset.c2w[i].numpy(), np.float32(frames[i]["transform_matrix"])[:3])
    assert dataset.height.tolist() == [16] * 3
    assert dataset.width.tolist() == [24] * 3
    assert dataset.focal.tolist() == [12 / math.tan(0.5 * CAMERA_ANGLE_X)] * 3
    assert dataset.near.tolist() == [2.0] * 3
    assert dataset.far.tolist() == [6.0] * 3
    assert dataset.lossmult.tolist() == [1.0] * 3
    assert dataset.scale.tolist() == [1] * 3


def test_images_are_views_of_one_buffer(tmp_path: Path) -> None:
    write_blender(tmp_path)
    dataset = load_dataset(tmp_path)
    assert dataset.pixels.dtype == torch.uint8
    start = dataset.pixels.untyped_storage().data_ptr()
    assert all(image.untyped_storage().data_ptr() == start for image in dataset.images)
    dataset.pixels.fill_(7)
    assert all(bool((image == 7).all()) for image in dataset.images)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize("named_suffix", ["", ".png", ".jpg"])
def test_lossless_formats_are_found_whatever_suffix_is_named(
    tmp_path: Path, suffix: str, named_suffix: str
) -> None:
    written = write_blender(tmp_path, suffix=suffix, named_suffix=named_suffix)
    for image, pixels in zip(load_dataset(tmp_path).images, written["train"], strict=True):
        np.testing.assert_array_equal(image.numpy(), pixels)


def test_jpeg_is_read_as_rgb(tmp_path: Path) -> None:
    write_blender(tmp_path, channels=3, suffix=".jpg")
    dataset = load_dataset(tmp_path)
    expected = np.asarray(Image.open(tmp_path / "train" / "r_1.jpg"))
    np.testing.assert_array_equal(dataset.images[1].numpy(), expected)


def test_a_dot_in_a_name_is_no_suffix(tmp_path: Path) -> None:
    written = write_blender(tmp_path, sizes={"train": [(4, 4)]})
    (tmp_path / "train" / "r_0.png").rename(tmp_path / "train" / "r_0.001.png")
    path = tmp_path / "transforms_train.json"
    path.write_text(path.read_text().replace("r_0", "r_0.001"))
    np.testing.assert_array_equal(load_dataset(tmp_path).images[0].numpy(), written["train"][0])


@pytest.mark.parametrize(("background", "value"), [("white", 1.0), ("black", 0.0)])
def test_target_composites_straight_alpha(tmp_path: Path, background: str, value: float) -> None:
    written = write_blender(tmp_path)["train"][1].astype(np.float64) / 255
    dataset = load_dataset(tmp_path, background=background)
    expected = written[..., :3] * written[..., 3:] + (1 - written[..., 3:]) * value
    # four roundings of numbers of at most 1
    np.testing.assert_allclose(dataset.target(1).numpy(), expected, rtol=0, atol=4 * 2.0**-24)


def test_rgb_stays_as_it_is_over_either_background(tmp_path: Path) -> None:
    written = write_blender(tmp_path, channels=3)["train"][0]
    for background in ("white", "black"):
        target = load_dataset(tmp_path, background=background).target(0)
        np.testing.assert_array_equal(target.numpy(), np.float32(written) / np.float32(255))


def test_every_frame_may_have_its_own_size_and_angle(tmp_path: Path) -> None:
    written = write_blender(tmp_path, sizes={"train": [(8, 6), (4, 10), (2, 2)]})
    path = tmp_path / "transforms_train.json"
    scene = json.loads(path.read_text())
    scene["frames"][1] |= {"camera_angle_x": 0.3, "w": 10, "h": 4}
    edit_json(path, scene)
    dataset = load_dataset(tmp_path)
    for image, pixels in zip(dataset.images, written["train"], strict=True):
        np.testing.assert_array_equal(image.numpy(), pixels)
    angles = [CAMERA_ANGLE_X, 0.3, CAMERA_ANGLE_X]
    widths = [6, 10, 2]
    assert dataset.focal.tolist() == [
        0.5 * w / math.tan(0.5 * a) for w, a in zip(widths, angles, strict=True)
    ]
    assert dataset.offsets.tolist() == [0, 48, 88, 92]


def test_downscale_is_the_repeated_mean_cut_to_eight_bits_once(tmp_path: Path) -> None:
    written = write_blender(tmp_path)
    dataset = load_dataset(tmp_path, downscale=4)
    for image, pixels in zip(dataset.images, written["train"], strict=True):
        small = downsample2(downsample2(pixels.astype(np.float32) / np.float32(255)))
        np.testing.assert_array_equal(image.numpy(), (small * np.float32(255)).astype(np.uint8))
    assert dataset.focal.tolist() == [12 / math.tan(0.5 * CAMERA_ANGLE_X) / 4] * 3
    assert (dataset.height.tolist(), dataset.width.tolist()) == ([4] * 3, [6] * 3)
    assert dataset.scale.tolist() == [4] * 3


def test_rays_are_those_of_the_camera(tmp_path: Path) -> None:
    write_blender(tmp_path)
    dataset = load_dataset(tmp_path)
    rays = dataset.rays(2)
    want = cameras.pinhole_rays(dataset.c2w[2], 16, 24, float(dataset.focal[2]), 2.0, 6.0)
    assert rays.batch_shape == (16, 24)
    for got, expected in zip(rays, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


# ---- what is refused -------------------------------------------------------------------------------------------


def _set(*path: Any, to: Any) -> Callable[[Path], None]:
    """An edit of transforms_train.json: the entry at a path of keys becomes `to`, or goes when `to` is `del`."""

    def edit(root: Path) -> None:
        file = root / "transforms_train.json"
        scene = json.loads(file.read_text())
        container = scene
        for key in path[:-1]:
            container = container[key]
        if to is _GONE:
            del container[path[-1]]
        else:
            container[path[-1]] = to
        edit_json(file, scene)

    return edit


_GONE = object()


def _text(text: str) -> Callable[[Path], None]:
    return lambda root: (root / "transforms_train.json").write_text(text) and None


def _image(mode: str) -> Callable[[Path], None]:
    return lambda root: Image.new(mode, (24, 16)).save(root / "train" / "r_1.png")


def _cut(root: Path) -> None:
    file = root / "train" / "r_1.png"
    file.write_bytes(file.read_bytes()[:400])


def _sixteen_bit_rgb(root: Path) -> None:
    """Change the bit depth in the header: Pillow itself writes no such file."""
    file = root / "train" / "r_1.png"
    data = bytearray(file.read_bytes())
    data[24] = 16
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    file.write_bytes(data)


_NAN_CAMERA = [[math.nan] * 4] * 4
_ZERO_CAMERA = [[0.0] * 4] * 4
_FLAT_CAMERA = [[1.0, 0, 0, 4], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]

BAD_SCENES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("broken JSON", _text('{"frames": ['), r"transforms_train\.json: not valid JSON"),
    ("a list", _text("[]"), r"transforms_train\.json: expected a JSON object, found a list"),
    ("no frames", _set("frames", to=_GONE), r"transforms_train\.json: the field 'frames' is missing"),
    ("empty frames", _set("frames", to=[]), r"'frames' is an empty list"),
    ("frames no list", _set("frames", to=3), r"'frames' is the number 3"),
    ("frame no object", _set("frames", 1, to="r_1"), r"frames\[1\] is not an object"),
    ("no angle", _set("camera_angle_x", to=_GONE), r"the field 'camera_angle_x' is missing"),
    (
        "zero angle",
        _set("camera_angle_x", to=0.0),
        r"'camera_angle_x' is 0\.0; expected a number between 0 and 3\.14159",
    ),
    ("angle of pi", _set("camera_angle_x", to=math.pi), r"'camera_angle_x' is 3\.14.*between 0 and"),
    ("endless angle", _set("camera_angle_x", to=10**400), r"'camera_angle_x' is inf"),
    ("NaN angle", _set("camera_angle_x", to=math.nan), r"'camera_angle_x' is nan"),
    (
        "angle no number",
        _set("camera_angle_x", to="wide"),
        r"'camera_angle_x' is a string; expected a number",
    ),
    (
        "no matrix",
        _set("frames", 1, "transform_matrix", to=_GONE),
        r"frames\[1\]: the field 'transform_matrix'",
    ),
    (
        "NaN camera",
        _set("frames", 1, "transform_matrix", to=_NAN_CAMERA),
        r"frames\[1\]\.transform_matrix holds NaN",
    ),
    ("zero camera", _set("frames", 1, "transform_matrix", to=_ZERO_CAMERA), r"frames\[1\].* is singular"),
    ("flat camera", _set("frames", 1, "transform_matrix", to=_FLAT_CAMERA), r"frames\[1\].* is singular"),
    (
        "3 x 3 camera",
        _set("frames", 1, "transform_matrix", to=[[1.0] * 3] * 3),
        r"shape \[3, 3\]; expected a 4 x 4",
    ),
    (
        "ragged camera",
        _set("frames", 1, "transform_matrix", to=[[1.0], []]),
        r"not a 4 x 4 matrix of numbers",
    ),
    (
        "no file_path",
        _set("frames", 1, "file_path", to=_GONE),
        r"frames\[1\]: the field 'file_path' is missing",
    ),
    ("file_path no string", _set("frames", 1, "file_path", to=7), r"frames\[1\]\.file_path is the number 7"),
    (
        "no such image",
        _set("frames", 1, "file_path", to="./train/r_9"),
        r"frames\[1\]\.file_path is './train/r_9'.*no .*r_9",
    ),
    ("other width", _set("frames", 1, "w", to=25), r"frames\[1\]: 'w' is 25, but .*r_1\.png is 24 x 16"),
    ("other height", _set("h", to=20), r"frames\[0\]: 'h' is 20"),
    (
        "no image at all",
        lambda root: (root / "train" / "r_1.png").write_bytes(b"not a picture"),
        r"r_1\.png: cannot be read",
    ),
    ("cut image", _cut, r"r_1\.png: the image is damaged"),
    ("grey image", _image("L"), r"r_1\.png: image mode is L; expected RGB or RGBA"),
    ("grey with alpha", _image("LA"), r"r_1\.png: image mode is LA"),
    ("16-bit grey", _image("I;16"), r"r_1\.png: image mode is I;16"),
    ("16-bit colour", _sixteen_bit_rgb, r"r_1\.png: image mode is .*16 bits a channel"),
    ("palette", _image("P"), r"r_1\.png: image mode is P"),
    ("RGB among RGBA", _image("RGB"), r"r_1\.png.*has 3 channels, but that of .*r_0\.png\) has 4"),
]


@pytest.mark.parametrize(("damage", "message"), [c[1:] for c in BAD_SCENES], ids=[c[0] for c in BAD_SCENES])
def test_bad_scene_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    write_blender(tmp_path)
    load_dataset(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        load_dataset(tmp_path)
    assert "transforms_train.json" in str(raised.value) or "r_1.png" in str(raised.value)


@pytest.mark.parametrize("downscale", [0, -2, 3, 6, 2.0, True])
def test_downscale_must_be_a_power_of_two(tmp_path: Path, downscale: Any) -> None:
    write_blender(tmp_path)
    with pytest.raises(InputError, match=r"downscale is .*expected a power of two"):
        load_dataset(tmp_path, downscale=downscale)


def test_downscale_must_divide_every_size(tmp_path: Path) -> None:
    write_blender(tmp_path, sizes={"train": [(16, 16), (16, 12)]})
    assert load_dataset(tmp_path, downscale=4).width.tolist() == [4, 3]
    with pytest.raises(
        InputError, match=r"frames\[1\] \(r_1\.png\): 12 x 16 pixels cannot be made 8 times smaller"
    ):
        load_dataset(tmp_path, downscale=8)


def test_arguments_and_folders_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist; expected a scene folder"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"neither metadata\.json .* nor transforms_train\.json"):
        load_dataset(tmp_path)
    write_blender(tmp_path)
    with pytest.raises(InputError, match=r"transforms_test\.json is a file"):
        load_dataset(tmp_path / "transforms_test.json")
    with pytest.raises(InputError, match=r"no transforms_val\.json; the splits here are train, test"):
        load_dataset(tmp_path, split="val")
    with pytest.raises(InputError, match="split is 'training'; expected one of train, val, test"):
        load_dataset(tmp_path, split="training")
    with pytest.raises(InputError, match="background is 'grey'; expected one of white, black"):
        load_dataset(tmp_path, background="grey")


def test_random_pixels_differ() -> None:
    """The other tests tell images apart by their noise."""
    assert not np.array_equal(random_pixels(4, 4, 4, seed=1), random_pixels(4, 4, 4, seed=2))
