"""The multi-scale benchmark: bit-exact levels, the round trip through `convert`, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scenes import CAMERA_ANGLE_X, edit_json, random_pixels, write_blender

from mipnerf_fast import InputError
from mipnerf_fast.data import frames as frames_module
from mipnerf_fast.data import load_dataset, multiscale
from mipnerf_fast.data.pyramid import pyramid

OFFICIAL = Path(__file__).parent / "data" / "official_mipnerf.npz"


def test_pyramid_is_the_official_one_to_the_bit() -> None:
    with np.load(OFFICIAL) as official:
        levels = list(pyramid(official["pyramid_d0"], first=0, levels=4))
        for j, level in enumerate(levels):
            np.testing.assert_array_equal(level, official[f"pyramid_d{j}"])
        image = official["pyramid_d0"].astype(np.float32) / np.float32(255)
        for j in (1, 2, 3):
            image = multiscale.downsample2(image)
            assert image.dtype == np.float32
            np.testing.assert_array_equal(
                (image * np.float32(255)).astype(np.uint8), official[f"pyramid_d{j}"]
            )


@pytest.mark.parametrize("shape", [(2, 2, 4), (16, 24, 4), (34, 70, 3), (400, 400, 4)])
def test_downsample2_is_numpys_mean_to_the_bit(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    h, w, c = shape
    want = image.reshape(h // 2, 2, w // 2, 2, c).mean(axis=(1, 3))
    np.testing.assert_array_equal(multiscale.downsample2(image), want)


def test_downsample2_refuses_odd_sizes() -> None:
    with pytest.raises(ValueError, match=r"downsample2: expected .* even H and W, got \[3, 4, 4\]"):
        multiscale.downsample2(np.zeros((3, 4, 4), np.float32))


def test_eight_bit_values_survive_level_zero() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(8, 8, 4)
    np.testing.assert_array_equal(next(pyramid(pixels, 0, 1)), pixels)


def test_convert_and_load_give_the_levels(tmp_path: Path) -> None:
    written = write_blender(tmp_path / "scene")
    out = multiscale.convert(tmp_path / "scene", tmp_path / "multi", progress=False)
    for split, images in written.items():
        dataset = load_dataset(out, split=split)
        assert len(dataset) == 4 * len(images)
        assert dataset.names[:5] == ["000_d0", "000_d1", "000_d2", "000_d3", "001_d0"][: len(dataset)]
        focal = 12 / math.tan(0.5 * CAMERA_ANGLE_X)
        source = load_dataset(tmp_path / "scene", split=split)
        for i, pixels in enumerate(images):
            for j, level in enumerate(pyramid(pixels, 0, 4)):
                k = 4 * i + j
                np.testing.assert_array_equal(dataset.images[k].numpy(), level)
                assert float(dataset.focal[k]) == focal / 2**j
                assert (int(dataset.height[k]), int(dataset.width[k])) == (16 >> j, 24 >> j)
                assert int(dataset.scale[k]) == 2**j
                assert float(dataset.lossmult[k]) == 4**j
                assert (float(dataset.near[k]), float(dataset.far[k])) == (2.0, 6.0)
                np.testing.assert_array_equal(dataset.c2w[k].numpy(), source.c2w[i].numpy())
                assert bool((dataset.rays(k).lossmult == 4**j).all())


def test_metadata_is_laid_out_as_the_official_script_does(tmp_path: Path) -> None:
    write_blender(tmp_path / "scene")
    out = multiscale.convert(tmp_path / "scene", tmp_path / "multi", levels=2, progress=False)
    metadata = json.loads((out / "metadata.json").read_text())
    assert list(metadata) == ["train", "test"]
    train = metadata["train"]
    keys = "file_path cam2world width height focal label near far lossmult pix2cam"
    assert list(train) == keys.split()
    assert train["file_path"] == [f"images_train/{i:03d}_d{j}.png" for i in range(3) for j in range(2)]
    assert train["label"] == [0, 1] * 3
    assert train["lossmult"] == [1.0, 4.0] * 3
    f = train["focal"][1]
    assert train["pix2cam"][1] == [[1 / f, 0, -6 / f], [0, -1 / f, 4 / f], [0, 0, -1]]
    assert np.array(train["cam2world"]).shape == (6, 4, 4)
    files = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert files == sorted([*train["file_path"], *metadata["test"]["file_path"], "metadata.json"])


def test_downscale_comes_first_and_unrounded(tmp_path: Path) -> None:
    written = write_blender(tmp_path / "scene")
    out = multiscale.convert(tmp_path / "scene", tmp_path / "multi", downscale=2, levels=3, progress=False)
    dataset = load_dataset(out)
    for i, pixels in enumerate(written["train"]):
        for j, level in enumerate(pyramid(pixels, 1, 3)):
            np.testing.assert_array_equal(dataset.images[3 * i + j].numpy(), level)
            assert int(dataset.scale[3 * i + j]) == 2**j


def test_one_level_is_an_ordinary_scene_equal_to_downscale_on_load(tmp_path: Path) -> None:
    write_blender(tmp_path / "scene", sizes={"train": [(8, 12), (4, 8)], "val": [(4, 4)]})
    out = multiscale.convert(tmp_path / "scene", tmp_path / "small", downscale=4, levels=1, progress=False)
    assert sorted(p.name for p in out.iterdir()) == [
        "train",
        "transforms_train.json",
        "transforms_val.json",
        "val",
    ]
    for split in ("train", "val"):
        small = load_dataset(out, split=split)
        want = load_dataset(tmp_path / "scene", split=split, downscale=4)
        assert small.names == want.names
        np.testing.assert_array_equal(small.pixels.numpy(), want.pixels.numpy())
        np.testing.assert_array_equal(small.c2w.numpy(), want.c2w.numpy())
        # the focal length goes through an angle and back: a few roundings in float64
        np.testing.assert_allclose(small.focal.numpy(), want.focal.numpy(), rtol=16 * 2.0**-52)


def test_images_of_one_name_in_two_folders_do_not_collide(tmp_path: Path) -> None:
    written = write_blender(tmp_path / "scene", sizes={"train": [(4, 4), (4, 4)]})
    (tmp_path / "scene" / "other").mkdir()
    (tmp_path / "scene" / "train" / "r_1.png").rename(tmp_path / "scene" / "other" / "r_0.png")
    path = tmp_path / "scene" / "transforms_train.json"
    path.write_text(path.read_text().replace("./train/r_1", "./other/r_0"))
    assert load_dataset(tmp_path / "scene").names == ["000_r_0", "001_r_0"]
    out = multiscale.convert(tmp_path / "scene", tmp_path / "copy", levels=1, progress=False)
    for image, pixels in zip(load_dataset(out).images, written["train"], strict=True):
        np.testing.assert_array_equal(image.numpy(), pixels)


def test_rgb_is_averaged_as_it_is(tmp_path: Path) -> None:
    written = write_blender(tmp_path / "scene", channels=3)
    out = multiscale.convert(tmp_path / "scene", tmp_path / "multi", levels=2, progress=False)
    dataset = load_dataset(out)
    assert dataset.pixels.shape[1] == 3
    for j, level in enumerate(pyramid(written["train"][0], 0, 2)):
        np.testing.assert_array_equal(dataset.images[j].numpy(), level)


def test_downscale_of_a_multiscale_scene_applies_to_each_image(tmp_path: Path) -> None:
    write_blender(tmp_path / "scene")
    out = multiscale.convert(tmp_path / "scene", tmp_path / "multi", levels=2, progress=False)
    full, small = load_dataset(out), load_dataset(out, downscale=4)
    assert small.scale.tolist() == full.scale.tolist() == [1, 2] * 3
    for a, b in zip(full.images, small.images, strict=True):
        np.testing.assert_array_equal(b.numpy(), next(pyramid(a.numpy(), 2, 1)))


def test_progress_is_told_in_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_blender(tmp_path / "scene")
    multiscale.convert(tmp_path / "scene", tmp_path / "multi", levels=2)
    assert "converting: 4 images" in capsys.readouterr().err


# ---- what is refused -------------------------------------------------------------------------------------------


def _only_the_scene_is_left(tmp_path: Path) -> bool:
    return sorted(p.name for p in tmp_path.iterdir()) == ["scene"]


def test_sizes_that_do_not_halve_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_blender(tmp_path / "scene", sizes={"train": [(16, 16)], "test": [(16, 20)]})
    with pytest.raises(
        InputError, match=r"transforms_test\.json.*20 x 16 pixels cannot be halved 3 times.*divisible by 8"
    ):
        multiscale.convert(tmp_path / "scene", tmp_path / "multi")
    with pytest.raises(InputError, match="cannot be halved 3 times"):
        multiscale.convert(tmp_path / "scene", tmp_path / "multi", downscale=4, levels=2)
    assert _only_the_scene_is_left(tmp_path)
    multiscale.convert(tmp_path / "scene", tmp_path / "multi", downscale=2, levels=2, progress=False)


@pytest.mark.parametrize("arguments", [{"downscale": 3}, {"downscale": 0}, {"levels": 0}, {"levels": -1}])
def test_bad_numbers_are_refused(tmp_path: Path, arguments: dict[str, int]) -> None:
    write_blender(tmp_path / "scene")
    with pytest.raises(
        InputError, match=f"{next(iter(arguments))} is {next(iter(arguments.values()))}; expected"
    ):
        multiscale.convert(tmp_path / "scene", tmp_path / "multi", **arguments)
    assert _only_the_scene_is_left(tmp_path)


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    write_blender(tmp_path / "scene")
    (tmp_path / "multi").mkdir()
    multiscale.convert(tmp_path / "scene", tmp_path / "multi", progress=False)
    before = (tmp_path / "multi" / "metadata.json").read_bytes()
    with pytest.raises(InputError, match="multi exists and is not empty"):
        multiscale.convert(tmp_path / "scene", tmp_path / "multi", downscale=2, levels=1)
    assert (tmp_path / "multi" / "metadata.json").read_bytes() == before
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="file exists and is a file"):
        multiscale.convert(tmp_path / "scene", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_bad_sources_are_refused(tmp_path: Path) -> None:
    write_blender(tmp_path / "scene")
    with pytest.raises(InputError, match="nowhere is no folder"):
        multiscale.convert(tmp_path / "nowhere", tmp_path / "multi")
    with pytest.raises(InputError, match=r"train has no transforms_train\.json"):
        multiscale.convert(tmp_path / "scene" / "train", tmp_path / "multi")
    assert _only_the_scene_is_left(tmp_path)
    multiscale.convert(tmp_path / "scene", tmp_path / "multi", progress=False)
    with pytest.raises(InputError, match="multi is a multi-scale scene already"):
        multiscale.convert(tmp_path / "multi", tmp_path / "again")


def test_a_damaged_image_leaves_nothing_behind(tmp_path: Path) -> None:
    write_blender(tmp_path / "scene")
    file = tmp_path / "scene" / "train" / "r_2.png"
    file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(InputError, match=r"r_2\.png: the image is damaged"):
        multiscale.convert(tmp_path / "scene", tmp_path / "multi", progress=False)
    assert _only_the_scene_is_left(tmp_path)


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_blender(tmp_path / "scene")
    real, seen = frames_module.as_completed, []

    def interrupted(futures: list[Any]) -> Any:
        for future in real(futures):
            yield future
            seen.extend(p for p in tmp_path.iterdir() if ".partial-" in p.name)
            raise KeyboardInterrupt

    monkeypatch.setattr(frames_module, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        multiscale.convert(tmp_path / "scene", tmp_path / "multi", progress=False)
    assert seen, "the interrupt came before the partial folder was made"
    assert _only_the_scene_is_left(tmp_path)


def _edit(key: str, index: int | None, to: Any) -> Callable[[dict[str, Any]], None]:
    """Replace a column of the training split, or one of its entries; None removes it."""

    def edit(metadata: dict[str, Any]) -> None:
        column = metadata["train"]
        if index is not None:
            column[key][index] = to
        elif to is None:
            del column[key]
        else:
            column[key] = to

    return edit


BAD_METADATA: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("no split", lambda m: m.pop("train"), r"no split 'train'; the splits here are test"),
    ("split no object", lambda m: m.update(train=[]), r"'train' is not an object"),
    ("no focal", _edit("focal", None, None), r"train: the field 'focal' is missing"),
    ("no pix2cam", _edit("pix2cam", None, None), r"train: the field 'pix2cam' is missing"),
    ("empty", _edit("file_path", None, []), r"'file_path' is an empty list"),
    ("short column", _edit("near", None, [2.0]), r"train\.near has 1 entries; expected 6"),
    ("zero focal", _edit("focal", 1, 0.0), r"entry 1\.focal is 0\.0; expected a finite number above 0"),
    ("NaN focal", _edit("focal", 1, math.nan), r"entry 1\.focal is nan"),
    ("far before near", _edit("far", 1, 1.0), r"entry 1\.far is 1\.0; expected a finite number above 2"),
    ("negative weight", _edit("lossmult", 1, -4.0), r"entry 1\.lossmult is -4\.0"),
    (
        "half a label",
        _edit("label", 1, 0.5),
        r"entry 1\.label is 0\.5; expected a whole number of at least 0",
    ),
    ("zero camera", _edit("cam2world", 1, [[0.0] * 4] * 4), r"entry 1\.cam2world is singular"),
    ("NaN camera", _edit("cam2world", 1, [[math.nan] * 4] * 4), r"entry 1\.cam2world holds NaN"),
    ("other width", _edit("width", 1, 14), r"entry 1\.pix2cam is not that of a pinhole"),
    (
        "shifted centre",
        _edit("pix2cam", 1, [[0.06, 0, -1], [0, -0.06, 0], [0, 0, -1]]),
        r"entry 1\.pix2cam is not",
    ),
    ("no image", _edit("file_path", 1, "images_train/x.png"), r"entry 1\.file_path is 'images_train/x\.png'"),
    (
        "other image",
        _edit("file_path", 1, "images_train/000_d0.png"),
        r"entry 1: width x height is 12 x 8, but .* is 24 x 16",
    ),
]


@pytest.mark.parametrize(("edit", "message"), [c[1:] for c in BAD_METADATA], ids=[c[0] for c in BAD_METADATA])
def test_bad_metadata_is_refused_by_name(
    tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    write_blender(tmp_path / "scene")
    out = multiscale.convert(tmp_path / "scene", tmp_path / "multi", levels=2, progress=False)
    load_dataset(out)
    metadata = json.loads((out / "metadata.json").read_text())
    edit(metadata)
    edit_json(out / "metadata.json", metadata)
    with pytest.raises(InputError, match=message) as raised:
        load_dataset(out)
    assert "metadata.json" in str(raised.value)


def test_broken_metadata_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"train": ')
    with pytest.raises(InputError, match=r"metadata\.json: not valid JSON"):
        load_dataset(tmp_path)


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    write_blender(tmp_path / "scene")
    out = multiscale.convert(tmp_path / "scene", tmp_path / "multi", levels=2, progress=False)
    Image.fromarray(random_pixels(8, 8, 4, 0)).save(out / "images_train" / "001_d1.png")
    with pytest.raises(InputError, match=r"entry 3: width x height is 12 x 8, but .*001_d1\.png is 8 x 8"):
        load_dataset(out)
