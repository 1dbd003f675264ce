"""Reading what scene folders hold, with errors that name the file, the field, what was found and what was expected."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mipnerf_fast.errors import InputError

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
_CHANNELS = {"RGB": 3, "RGBA": 4}
# everything Pillow's decoders are known to raise for damaged files
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    zlib.error,
    struct.error,
    Image.DecompressionBombError,
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {_kind(value)}")
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"the number {value}")


def field(container: dict[str, Any], key: str, where: str) -> Any:
    """container[key]; `where` says in errors what the container is."""
    if key not in container:
        raise InputError(f"{where}: the field '{key}' is missing")
    return container[key]


def list_field(container: dict[str, Any], key: str, where: str) -> list[Any]:
    """A field that must be a list with something in it."""
    value = field(container, key, where)
    if not isinstance(value, list) or not value:
        found = "an empty list" if isinstance(value, list) else _kind(value)
        raise InputError(f"{where}: '{key}' is {found}; expected a list with at least one entry")
    return value


def string(value: object, where: str) -> str:
    """A JSON string that is not empty."""
    if not isinstance(value, str) or not value:
        raise InputError(f"{where} is {_kind(value) if value != '' else 'empty'}; expected a string")
    return value


def number(value: object, where: str, above: float = -math.inf, below: float = math.inf) -> float:
    """A finite JSON number strictly between two bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{where} is {_kind(value)}; expected a number")
    try:
        result = float(value)
    except OverflowError:  # JSON puts no limit on whole numbers
        result = math.inf
    if not math.isfinite(result) or not above < result < below:
        expected = "a finite number"
        if math.isfinite(above) and math.isfinite(below):
            expected = f"a number between {above:.6g} and {below:.6g}"
        elif math.isfinite(above):
            expected = f"a finite number above {above:.6g}"
        raise InputError(f"{where} is {result}; expected {expected}")
    return result


def integer(value: object, where: str, at_least: int) -> int:
    """A whole JSON number (800.0 counts), at least so large."""
    result = number(value, where)
    if result != int(result) or result < at_least:
        raise InputError(f"{where} is {value}; expected a whole number of at least {at_least}")
    return int(result)


def matrix(value: object, rows: int, columns: int, where: str) -> NDArray[np.float64]:
    """A matrix of finite numbers."""
    shape = f"{rows} x {columns}"
    try:
        result = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where} is not a {shape} matrix of numbers") from None
    if result.shape != (rows, columns):
        raise InputError(f"{where} has shape {list(result.shape)}; expected a {shape} matrix")
    if not np.isfinite(result).all():
        raise InputError(f"{where} holds NaN or infinity; expected a {shape} matrix of finite numbers")
    return result


def camera(value: object, where: str) -> NDArray[np.float64]:
    """A camera-to-world matrix: 4 x 4, finite, with an invertible left upper 3 x 3 block."""
    result = matrix(value, 4, 4, where)
    determinant = float(np.linalg.det(result[:3, :3]))
    if abs(determinant) < 1e-6:
        raise InputError(
            f"{where} is singular (the determinant of its 3 x 3 block is {determinant:.3g}); "
            "expected a camera-to-world matrix with a rotation in it"
        )
    return result


def find_image(root: Path, file_path: str, where: str) -> Path:
    """The image a frame names, or one of the same name with another suffix beside it."""
    named = root / file_path
    known = named.suffix.lower() in IMAGE_SUFFIXES
    if known and named.is_file():
        return named
    stem = named.with_suffix("") if known else named
    for suffix in IMAGE_SUFFIXES:
        candidate = stem.with_name(stem.name + suffix)
        if candidate.is_file():
            return candidate
    raise InputError(f"{where} is '{file_path}', but there is no {stem} with {', '.join(IMAGE_SUFFIXES)}")


def image_size(path: Path) -> tuple[int, int, int]:
    """Height, width and channels of an 8-bit RGB or RGBA image, from its header."""
    try:
        with Image.open(path) as image:
            mode, (width, height) = image.mode, image.size
        with path.open("rb") as file:
            head = file.read(26)
    except _DECODE_ERRORS as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from None
    # Pillow cuts 16-bit colour PNGs to 8 bits without a word; byte 24 of a PNG is its bit depth
    deep = head.startswith(b"\x89PNG") and head[24] == 16
    if mode not in _CHANNELS or deep:
        found = f"{mode} with 16 bits a channel" if deep else mode
        raise InputError(f"{path}: image mode is {found}; expected RGB or RGBA with 8 bits a channel")
    return height, width, _CHANNELS[mode]


def read_image(path: Path) -> NDArray[np.uint8]:
    """The pixels of an image that `image_size` accepted: [H, W, 3 or 4]."""
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except _DECODE_ERRORS as error:
        raise InputError(f"{path}: the image is damaged ({error})") from None
