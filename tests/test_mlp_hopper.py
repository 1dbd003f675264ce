"""The fused network's kernels for compute capability 9.0a, run on the emulation, against float64.

Each layer is compared by itself: what it should give is computed in float64 from what the kernel itself kept of the
layer before, so that the only differences are those of one sum in float32 and one rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlp_compositing
import numpy as np
import pytest
from cuda_emulation.harness import CHECKS, from_bfloat16, run, to_bfloat16
from mlp_compositing import OPTIONS, make_rays

ROWS = 64  # of a block of the stash
# The largest relative error of rounding to the operand's type, and half its smallest step.
ROUNDING = {"Bfloat16": (2.0**-8, 2.0**-134), "Half": (2.0**-11, 2.0**-25)}


@dataclass(frozen=True)
class Layer:
    """As MlpLayer of csrc/mlp/mlp_plan.h."""

    kind: str  # trunk, density, view, colour
    input: int
    input_columns: int
    feature_columns: int
    outputs: int
    hidden: int


@dataclass(frozen=True)
class Shape:
    width: int = 64
    features: int = 96
    depth: int = 8
    skip_layer: int = 4
    view_width: int = 32
    view_depth: int = 1
    type: str = "Bfloat16"
    rays: int = 3
    samples_per_ray: int = 50
    multiprocessors: int = 2

    @property
    def samples(self) -> int:
        return self.rays * self.samples_per_ray

    @property
    def blocks(self) -> int:
        return -(-self.samples // ROWS)

    def layers(self) -> list[Layer]:
        def skips(before: int) -> int:
            return self.features if before - 1 > 0 and (before - 1) % self.skip_layer == 0 else 0

        w, made = self.width, []
        for i in range(self.depth):
            made.append(Layer("trunk", i - 1, w if i else 0, skips(i) if i else self.features, w, i))
        last, end = self.depth - 1, skips(self.depth)
        made.append(Layer("density", last, w, end, 1, -1))
        if not self.view_depth:
            return [*made, Layer("colour", last, w, end, 3, -1)]
        v = self.view_width
        made.append(Layer("view", last, w, end, v, self.depth))
        for i in range(1, self.view_depth):
            made.append(Layer("view", self.depth + i - 1, v, 0, v, self.depth + i))
        return [*made, Layer("colour", self.depth + self.view_depth - 1, v, 0, 3, -1)]

    @property
    def hidden(self) -> list[Layer]:
        return [layer for layer in self.layers() if layer.hidden >= 0]

    def scalars(self, what: str) -> dict[str, int | str]:
        names = ("features", "depth", "skip_layer", "view_width", "view_depth", "samples_per_ray")
        scalars: dict[str, int | str] = {name: getattr(self, name) for name in names}
        return {**scalars, "multiprocessors": self.multiprocessors, "what": what}


# What the tests of broken kernels put in their place.
PROGRAM: str | Path = "mlp_hopper"
FAULT = 0


def emulate(shape, what, arrays, outputs, seed=0, checks=("memory",), **scalars):
    defines = [f"MIPNERF_WIDTH={shape.width}", f"MIPNERF_TYPE={shape.type}"]
    return run(
        PROGRAM,
        arrays,
        outputs,
        {**shape.scalars(what), "fault": FAULT, **scalars},
        seed,
        checks=checks,
        defines=defines,
    )


def narrow(shape, x):
    return to_bfloat16(x) if shape.type == "Bfloat16" else np.asarray(x, np.float16)


def widen(shape, x):
    return (from_bfloat16(x) if shape.type == "Bfloat16" else x).astype(np.float64)


def stored(shape):
    return np.uint16 if shape.type == "Bfloat16" else np.float16


@functools.cache
def sizes(shape):
    names = ("packed", "activations", "masks", "deltas", "workspace", "elements", "biases")
    y = emulate(shape, "sizes", {}, {"sizes": ((7,), np.int64)}, samples=shape.samples)["sizes"]
    return dict(zip(names, (int(n) for n in y), strict=True))


class Network:
    """Random parameters of a shape, laid out as the gradients are, and random inputs."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.shape = shape
        self.weights: list[np.ndarray] = []
        self.biases: list[np.ndarray] = []
        parts: list[np.ndarray] = []
        for layer in shape.layers():
            k = layer.input_columns + layer.feature_columns
            weight = rng.normal(size=(layer.outputs, k)).astype(np.float32) * np.float32(math.sqrt(2 / k))
            bias = rng.normal(size=layer.outputs).astype(np.float32) * np.float32(0.3)
            self.weights.append(weight)
            self.biases.append(bias)
            for part in (weight.reshape(-1), bias):
                parts += [part, np.zeros(-part.size % 4, np.float32)]
        self.parameters = np.concatenate(parts)
        self.features = narrow(shape, rng.normal(size=(shape.samples, shape.features)).astype(np.float32))
        self.ray_bias = rng.normal(size=(shape.rays, shape.view_width)).astype(np.float32)
        self.grad_rgb = rng.normal(size=(shape.samples, 3)).astype(np.float32)
        self.grad_density = rng.normal(size=shape.samples).astype(np.float32)

    def operand(self, number: int) -> np.ndarray:
        """The weight of a layer, rounded, in float64."""
        return widen(self.shape, narrow(self.shape, self.weights[number]))

    def in_features(self) -> np.ndarray:
        rows = np.zeros((self.shape.blocks * ROWS, self.shape.features))
        rows[: self.shape.samples] = widen(self.shape, self.features)
        return rows


def read_stash(array, blocks, before, columns):
    """[blocks * 64, columns] of a stash: octets of columns, octets of rows, 8 rows of 8."""
    start = blocks * before * ROWS
    block = array[start : start + blocks * ROWS * columns].reshape(blocks, columns // 8, 8, 8, 8)
    return block.transpose(0, 2, 3, 1, 4).reshape(blocks * ROWS, columns)


def read_mask(words, shape, hidden, columns):
    """[blocks * 64, columns] of booleans; thread 32 w + 4 g + q: rows 16 w + g (+ 8), columns 8 j + 2 q (+ 1)."""
    words = words.reshape(shape.blocks, len(shape.hidden), 128, shape.width // 64)[:, hidden]
    mask = np.zeros((shape.blocks, ROWS, columns), bool)
    thread = np.arange(128)
    for i in range(columns // 2):
        bit = 16 * (i % 32 // 16) + 8 * (i % 2) + 7 - i % 16 // 2
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
        column = 8 * (i // 4) + 2 * (thread % 4) + i % 2
        mask[:, row, column] = words[:, :, i // 32] >> np.uint32(bit) & 1
    return mask.reshape(-1, columns)


def forward(network, keeps=True, seed=0, checks=("memory",)):
    shape = network.shape
    of = sizes(shape)
    outputs = {
        "packed": ((of["packed"],), np.uint8),
        "rgb": ((shape.samples, 3), np.float32),
        "density": ((shape.samples,), np.float32),
    }
    if keeps:
        outputs["activations"] = ((of["activations"] // 2,), stored(shape))
        outputs["masks"] = ((of["masks"] // 4,), np.uint32)
    arrays = {
        "parameters": network.parameters,
        "x": network.features,
        "ray_bias": network.ray_bias if shape.view_depth else None,
    }
    return emulate(shape, "forward", arrays, outputs, seed, checks)


def forward_encoding(network, encoding, options=None, seed=0, checks=CHECKS, **scalars):
    """The forward that computes the features itself, and what they are; with options also composited."""
    shape = network.shape
    outputs = {
        "packed": ((sizes(shape)["packed"],), np.uint8),
        "rgb": ((shape.samples, 3), np.float32),
        "density": ((shape.samples,), np.float32),
        "encoded": (network.features.shape, stored(shape)),
    }
    if options is not None:
        outputs |= mlp_compositing.outputs(shape.rays, shape.samples_per_ray)
        scalars |= mlp_compositing.scalars(options)
    arrays = {"parameters": network.parameters, "ray_bias": network.ray_bias if shape.view_depth else None}
    return emulate(shape, "forward", {**arrays, **encoding}, outputs, seed, checks, **scalars)


def kept_layers(network, y) -> Iterator[tuple[int, Layer, np.ndarray, np.ndarray]]:
    """Each layer with its number, what it read and the bound of a float32 sum's error for each of its outputs."""
    shape = network.shape
    features_k = -(-shape.features // 32) * 32
    features = widen(shape, read_stash(y["activations"], shape.blocks, 0, features_k))
    np.testing.assert_array_equal(features[:, : shape.features], network.in_features())
    assert not features[:, shape.features :].any()
    kept, before = {}, features_k
    for layer in shape.hidden:
        kept[layer.hidden] = widen(shape, read_stash(y["activations"], shape.blocks, before, layer.outputs))
        before += layer.outputs
    for number, layer in enumerate(shape.layers()):
        parts = [kept[layer.input]] if layer.input >= 0 else []
        if layer.feature_columns:
            parts.append(features[:, : shape.features])
        yield number, layer, np.concatenate(parts, 1), kept.get(layer.hidden)


def sums_and_bound(x, weight, bias):
    """x weight^T + bias, and how far a sum of the same float32 terms in any order may be from it."""
    terms = np.abs(x) @ np.abs(weight).T + np.abs(bias)
    return x @ weight.T + bias, (x.shape[1] + 1) * 2.0**-23 * terms


def check_forward(network, y):
    shape = network.shape
    relative, absolute = ROUNDING[shape.type]
    ray = np.minimum(np.arange(shape.blocks * ROWS), shape.samples - 1) // shape.samples_per_ray
    for number, layer, x, kept in kept_layers(network, y):
        bias = network.ray_bias[ray] if layer.kind == "view" and layer.input == shape.depth - 1 else None
        bias = network.biases[number] if bias is None else bias
        wanted, bound = sums_and_bound(x, network.operand(number), bias.astype(np.float64))
        if kept is None:
            got = y["density"][:, None] if layer.kind == "density" else y["rgb"]
            assert (np.abs(got - wanted[: shape.samples]) <= bound[: shape.samples]).all(), layer
            continue
        after = np.maximum(wanted, 0)
        assert (np.abs(kept - after) <= bound + (after + bound) * relative + absolute).all(), layer
        mask = read_mask(y["masks"], shape, layer.hidden, layer.outputs)
        assert ((mask == (wanted > 0)) | (np.abs(wanted) <= bound)).all(), layer


def dgrad(network, kept, wants_features=True, seed=0, checks=("memory",)):
    shape = network.shape
    outputs = {"deltas": ((sizes(shape)["deltas"] // 2,), stored(shape))}
    if wants_features:
        outputs["grad_features"] = ((shape.samples, shape.features), np.float32)
    arrays = {"packed": kept["packed"], "masks": kept["masks"]}
    arrays |= {"grad_rgb": network.grad_rgb, "grad_density": network.grad_density}
    return emulate(shape, "dgrad", arrays, outputs, seed, checks, samples=shape.samples)


def read_deltas(network, y):
    """Of the channels, and of each hidden layer."""
    shape, before, parts = network.shape, 0, []
    for columns in (8, *(layer.outputs for layer in shape.hidden)):
        parts.append(widen(shape, read_stash(y["deltas"], shape.blocks, before, columns)))
        before += columns
    return parts[0], parts[1:]


def check_dgrad(network, kept, y):
    shape = network.shape
    relative, absolute = ROUNDING[shape.type]
    channels, deltas = read_deltas(network, y)
    wanted = np.zeros_like(channels)
    wanted[: shape.samples, :3] = widen(shape, narrow(shape, network.grad_rgb))
    wanted[: shape.samples, 3] = widen(shape, narrow(shape, network.grad_density))
    np.testing.assert_array_equal(channels, wanted)
    layers = shape.layers()

    def delta_of(number):
        layer = layers[number]
        if layer.hidden >= 0:
            return deltas[layer.hidden]
        return channels[:, 3:4] if layer.kind == "density" else channels[:, :3]

    def gradient(columns_of, readers):
        """The sum over the layers that read something of their deltas times its columns, and its error's bound."""
        total, size, terms = 0.0, 0.0, 0
        for number in readers:
            weight = network.operand(number)[:, columns_of(layers[number])]
            total = total + delta_of(number) @ weight
            size = size + np.abs(delta_of(number)) @ np.abs(weight)
            terms += weight.shape[0]
        return total, (terms + len(readers)) * 2.0**-23 * size

    for hidden, layer in enumerate(shape.hidden):
        readers = [i for i, other in enumerate(layers) if other.input == hidden]
        wanted, bound = gradient(lambda reader: slice(0, reader.input_columns), readers)
        wanted = wanted * read_mask(kept["masks"], shape, hidden, layer.outputs)
        error = np.abs(deltas[hidden] - wanted)
        assert (error <= bound + (np.abs(wanted) + bound) * relative + absolute).all(), layer
        assert not deltas[hidden][shape.samples :].any()
    if "grad_features" in y:
        readers = [i for i, layer in enumerate(layers) if layer.feature_columns]
        wanted, bound = gradient(lambda reader: slice(reader.input_columns, None), readers)
        assert (np.abs(y["grad_features"] - wanted[: shape.samples]) <= bound[: shape.samples]).all()


def wgrad(network, kept, deltas, is_deterministic, seed=0, checks=("memory",)):
    shape = network.shape
    outputs = {"gradients": (network.parameters.shape, np.float32)}
    if shape.view_depth:
        outputs["ray_sums"] = (network.ray_bias.shape, np.float32)
    if is_deterministic:
        outputs["workspace"] = ((sizes(shape)["workspace"] // 4,), np.float32)
    arrays = {"activations": kept["activations"], "deltas": deltas["deltas"]}
    return emulate(shape, "wgrad", arrays, outputs, seed, checks, samples=shape.samples)


def check_wgrad(network, kept, deltas, y):
    shape = network.shape
    channels, hidden = read_deltas(network, deltas)
    at, terms = 0, shape.blocks * ROWS + 1
    for _, layer, x, _ in kept_layers(network, kept):
        of_head = channels[:, 3:4] if layer.kind == "density" else channels[:, :3]
        delta = hidden[layer.hidden] if layer.hidden >= 0 else of_head
        products = (delta.T @ x, np.abs(delta).T @ np.abs(x)), (delta.sum(0), np.abs(delta).sum(0))
        for wanted, size in products:
            got = y["gradients"][at : at + wanted.size].reshape(wanted.shape)
            assert (np.abs(got - wanted) <= terms * 2.0**-23 * size).all(), (layer, wanted.shape)
            at += -(-wanted.size // 4) * 4
    if shape.view_depth:
        of_rays = hidden[shape.depth][: shape.samples].reshape(shape.rays, shape.samples_per_ray, -1)
        bound = shape.samples_per_ray * 2.0**-23 * np.abs(of_rays).sum(1)
        assert (np.abs(y["ray_sums"] - of_rays.sum(1)) <= bound).all()


# Six programs, each a width and a type: compiling is what costs. Every depth; view branches of none, 1, 2, 3 and the
# most layers.
SHAPES = [
    Shape(depth=7),
    Shape(features=60, skip_layer=1, view_depth=8, rays=1, samples_per_ray=1),
    Shape(depth=1, view_depth=0, view_width=0, features=30),
    Shape(depth=5, skip_layer=2, view_width=48, view_depth=3, features=128),
    Shape(
        width=128, depth=4, skip_layer=3, view_width=64, features=36, rays=5, samples_per_ray=64, type="Half"
    ),
    Shape(width=128, depth=2, view_width=112, view_depth=2, type="Half", rays=2),
    Shape(width=128, depth=3, skip_layer=2, view_width=0, view_depth=0, type="Half"),
    Shape(width=128, depth=2, skip_layer=1, view_width=64, features=36, rays=2, samples_per_ray=65),
    Shape(depth=6, skip_layer=1, view_width=16, view_depth=2, type="Half", rays=2),
    Shape(width=256, depth=2, skip_layer=1, view_width=128, type="Half", rays=1, samples_per_ray=70),
    Shape(width=256, rays=1, view_width=128, samples_per_ray=128),
    Shape(width=256, depth=3, skip_layer=1, view_width=256, rays=2, samples_per_ray=33),
]
names = [f"{s.width}-{s.type}-{s.depth}-{s.view_width}x{s.view_depth}-{s.samples}" for s in SHAPES]


# One of each width: what their launches leave out does not change the rest.
LEAVING_OUT = [next(shape for shape in SHAPES if shape.width == width) for width in (64, 128, 256)]


def test_depths():
    assert {shape.depth for shape in SHAPES} == set(range(1, 9))
    assert {shape.view_depth for shape in SHAPES} == {0, 1, 2, 3, 8}


def test_every_instance_of_every_kernel_is_run():
    every = {(width, type) for width in (64, 128, 256) for type in ROUNDING}
    for shapes in (SHAPES, COMPOSITED):
        assert {(shape.width, shape.type) for shape in shapes} == every


def checks_of(shape):
    """The race detector sees those of width 64; test_races_at_every_width has the others."""
    return CHECKS if shape.width == 64 else ("memory",)


@functools.cache
def kept_by(shape):
    """A network and what its forward gives, for all that only reads them."""
    network = Network(shape)
    return network, forward(network, checks=checks_of(shape))


@functools.cache
def deltas_by(shape):
    """What its dgrad gives."""
    return dgrad(*kept_by(shape), checks=checks_of(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=names)
def test_forward(shape):
    check_forward(*kept_by(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=names)
def test_backward(shape):
    network, kept = kept_by(shape)
    deltas = deltas_by(shape)
    check_dgrad(network, kept, deltas)
    for is_deterministic in (True, False):
        gradients = wgrad(network, kept, deltas, is_deterministic, checks=checks_of(shape))
        check_wgrad(network, kept, deltas, gradients)


@pytest.mark.parametrize("shape", LEAVING_OUT, ids=lambda s: s.width)
def test_launches_that_leave_something_out(shape):
    """Inference keeps nothing, and the features may want no gradient."""
    network, kept = kept_by(shape)
    plain = forward(network, keeps=False, seed=1)
    for name in ("rgb", "density"):
        np.testing.assert_array_equal(plain[name], kept[name])
    without = dgrad(network, kept, wants_features=False, seed=1)
    np.testing.assert_array_equal(without["deltas"], deltas_by(shape)["deltas"])


@pytest.mark.parametrize(("width", "type"), [(128, "Half"), (256, "Bfloat16")])
def test_races_at_every_width(width, type):
    """The wider ones, which the race detector is slow for, in small."""
    shape = Shape(features=16, width=width, depth=2, skip_layer=1, view_width=16, type=type, rays=2)
    network = Network(shape)
    kept = forward(network, checks=("races",))
    check_forward(network, kept)
    deltas = dgrad(network, kept, checks=("races",))
    check_dgrad(network, kept, deltas)
    check_wgrad(network, kept, deltas, wgrad(network, kept, deltas, True, checks=("races",)))


@pytest.mark.parametrize("shape", SHAPES, ids=names)
def test_every_packed_element_has_one_place(shape):
    elements = sizes(shape)["elements"]
    found = emulate(shape, "places", {}, {"found": np.zeros(elements, np.int32)})["found"]
    np.testing.assert_array_equal(found, 1)


SEEDS = range(20)
SMALL = Shape(
    features=32, depth=2, skip_layer=1, view_width=32, rays=3, samples_per_ray=90, multiprocessors=2
)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_order(seed):
    network = Network(SMALL, seed)
    kept = forward(network, seed=seed)
    check_forward(network, kept)
    deltas = dgrad(network, kept, seed=seed)
    check_dgrad(network, kept, deltas)
    check_wgrad(network, kept, deltas, wgrad(network, kept, deltas, True, seed))


def test_no_samples():
    network = Network(Shape(rays=0))
    kept = forward(network)
    deltas = dgrad(network, kept)
    for is_deterministic in (True, False):
        found = wgrad(network, kept, deltas, is_deterministic)
        # Weights and biases, each at a multiple of 4.
        at = 0
        for tensors in zip(network.weights, network.biases, strict=True):
            for tensor in tensors:
                assert not found["gradients"][at : at + tensor.size].any()
                at += -(-tensor.size // 4) * 4
        assert at == found["gradients"].size and not found["ray_sums"].size


@pytest.mark.parametrize("type", ROUNDING)
@pytest.mark.parametrize("at", [0, 205, 299])
def test_a_nan_feature_passes_every_relu(at, type):
    """And makes its own sample NaN, no other, whose bits stay; the loss sees it, and so do the gradients."""
    shape = Shape(
        features=20,
        depth=3,
        skip_layer=1,
        view_width=32,
        view_depth=2,
        rays=3,
        samples_per_ray=100,
        type=type,
    )
    network = Network(shape)
    clean = forward(network)
    network.features = network.features.copy()
    network.features[at, 3] = narrow(shape, np.full(1, np.nan, np.float32))[0]
    kept = forward(network)
    others = np.arange(shape.samples) != at
    for name in ("rgb", "density"):
        assert np.isnan(kept[name][at]).all(), name
        np.testing.assert_array_equal(kept[name][others], clean[name][others])
    assert read_mask(kept["masks"], shape, 0, shape.width)[at].all()
    gradients = wgrad(network, kept, dgrad(network, kept), True)
    assert not np.isfinite(gradients["gradients"]).all()


@pytest.mark.parametrize(
    ("width", "type"), [(64, "Bfloat16"), (64, "Half"), (128, "Half"), (256, "Bfloat16")]
)
@pytest.mark.parametrize("layer", range(3))
def test_a_nan_weight_reaches_the_outputs(layer, width, type):
    shape = Shape(width=width, features=20, depth=3, view_width=32, type=type, rays=1, samples_per_ray=40)
    network = Network(shape)
    network.parameters = network.parameters.copy()
    before = zip(network.weights[:layer], network.biases[:layer], strict=True)
    at = sum(-(-tensor.size // 4) * 4 for tensors in before for tensor in tensors)
    assert network.parameters[at] == network.weights[layer].flat[0]
    network.parameters[at] = np.nan
    found = forward(network, keeps=False)
    assert np.isnan(found["rgb"]).all() and np.isnan(found["density"]).all()


@pytest.mark.parametrize(
    ("degrees", "min_deg", "cylinder", "integrated"), [(16, 0, 0, 1), (5, 1, 1, 1), (10, 0, 0, 0)]
)
def test_encoding_inside(degrees, min_deg, cylinder, integrated):
    """Bit for bit as with the features that frustum_ipe_math.h gives outside."""
    shape = Shape(features=6 * degrees, depth=3, skip_layer=2, rays=7, samples_per_ray=19)
    network = Network(shape)
    encoding = make_rays(shape.rays, shape.samples_per_ray)
    inside = forward_encoding(network, encoding, min_deg=min_deg, cylinder=cylinder, integrated=integrated)
    network.features = inside["encoded"]
    assert np.abs(widen(shape, network.features)).max() > 0.5
    outside = forward(network)
    check_forward(network, outside)
    for name in ("rgb", "density"):
        np.testing.assert_array_equal(inside[name], outside[name])


# Several rays in a tile, one with room to spare, exactly one, or a part of one; more and fewer tiles than blocks.
COMPOSITED = [
    Shape(features=24, depth=2, rays=rays, samples_per_ray=samples, multiprocessors=2)
    for rays, samples in [(31, 19), (300, 1), (3, 100), (5, 128), (2, 129), (3, 300)]
] + [
    Shape(features=12, depth=2, view_width=0, view_depth=0, rays=7, samples_per_ray=60),
    Shape(features=36, width=128, depth=2, view_width=64, type="Half", rays=3, samples_per_ray=70),
    Shape(features=96, width=256, view_width=128, rays=3, samples_per_ray=128),
    Shape(features=12, depth=2, type="Half", rays=2, samples_per_ray=70),
    Shape(features=12, width=128, depth=2, rays=2, samples_per_ray=70),
    Shape(features=12, width=256, depth=2, type="Half", rays=2, samples_per_ray=70),
]


def check_composited(shape, seed=0, checks=CHECKS):
    network, encoding = Network(shape, seed), make_rays(shape.rays, shape.samples_per_ray)
    options = OPTIONS[shape.rays % 2]
    scalars = {"min_deg": 0, "cylinder": 0, "integrated": 1}
    found = forward_encoding(network, encoding, options, seed, checks, **scalars)
    mlp_compositing.check(found, found["rgb"], found["density"], encoding, options)


@pytest.mark.parametrize("shape", COMPOSITED, ids=lambda s: f"{s.width}-{s.rays}x{s.samples_per_ray}")
def test_compositing_behind(shape):
    check_composited(shape, checks=CHECKS if shape.width == 64 else ("memory",))


# Rays in parts of tiles, and several in one; two rounds and more of the blocks. In the first, faults of the order are
# found for every seed (test_mlp_hopper_faults.py).
PARTS_OF_RAYS = Shape(features=12, depth=1, view_width=32, rays=3, samples_per_ray=150, multiprocessors=2)
WHOLE_RAYS = Shape(features=12, depth=1, view_width=32, rays=19, samples_per_ray=19, multiprocessors=2)


@pytest.mark.parametrize("seed", SEEDS)
def test_compositing_in_every_order(seed):
    check_composited(PARTS_OF_RAYS if seed % 2 else WHOLE_RAYS, seed, ("memory",))
