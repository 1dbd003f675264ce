"""The mma.sync kernels of the fused network, emulated, against float64 with operands rounded as specified.

Every layer is compared on the kernels' own inputs to it (the stash), so that each bound is that of one product: a
sum of K terms in float32, rounded once per step of 16 here, is off by at most (K / 16 + 2) 2^-24 times the sum of
their sizes; the result is then rounded to the operand type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlp_compositing
import numpy as np
import pytest
from cuda_emulation import harness
from cuda_emulation.harness import from_bfloat16, run, to_bfloat16
from mlp_compositing import OPTIONS, make_rays

TILE_ROWS, THREADS = 128, 256
FLOAT = 2.0**-24
# Half of the last place of a number, and half of the smallest one.
ROUNDING = {"bfloat16": (2.0**-8, 2.0**-134), "float16": (2.0**-11, 2.0**-25)}


def program_of(width: int, dtype: str) -> tuple[str, str]:
    """The macros of emulate_mlp.cpp."""
    return f"MIPNERF_WIDTH={width}", f"MIPNERF_TYPE={dict(bfloat16='Bfloat16', float16='Half')[dtype]}"


@dataclass
class Layer:
    """Columns of `input` (a hidden layer, or -1), then those of the features."""

    input: int
    input_columns: int
    feature_columns: int
    outputs: int
    hidden: int = -1
    channel: int = -1
    ray_bias: bool = False
    weight: np.ndarray = field(default_factory=lambda: np.zeros(0))
    bias: np.ndarray | None = None


@dataclass
class Network:
    features: int
    width: int
    depth: int
    skip_layer: int
    view_width: int = 0
    view_depth: int = 0
    dtype: str = "bfloat16"
    layers: list[Layer] = field(default_factory=list)

    def __post_init__(self) -> None:
        def widened(before: int) -> int:
            return self.features if before > 1 and (before - 1) % self.skip_layer == 0 else 0

        for i in range(self.depth):
            if i == 0:
                self.add(-1, 0, self.features, self.width)
            else:
                self.add(i - 1, self.width, widened(i), self.width)
        trunk = self.depth - 1
        self.add(trunk, self.width, widened(self.depth), 1, channel=3)
        last = trunk
        for i in range(self.view_depth):
            columns = (self.width, widened(self.depth)) if i == 0 else (self.view_width, 0)
            self.add(last, *columns, self.view_width, ray_bias=i == 0)
            last = self.hidden - 1
        if self.view_depth:
            self.add(last, self.view_width, 0, 3, channel=0)
        else:
            self.add(trunk, self.width, widened(self.depth), 3, channel=0)

    def add(
        self,
        source: int,
        columns: int,
        feature_columns: int,
        outputs: int,
        channel: int = -1,
        ray_bias: bool = False,
    ) -> None:
        hidden = self.hidden if channel < 0 else -1
        self.layers.append(Layer(source, columns, feature_columns, outputs, hidden, channel, ray_bias))

    @property
    def hidden(self) -> int:
        return sum(layer.hidden >= 0 for layer in self.layers)

    def of_hidden(self, hidden: int) -> Layer:
        return next(layer for layer in self.layers if layer.hidden == hidden)

    def heads_of(self, hidden: int) -> list[Layer]:
        return [layer for layer in self.layers if layer.channel >= 0 and layer.input == hidden]

    def store(self, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float32)
        return to_bfloat16(x) if self.dtype == "bfloat16" else x.astype(np.float16)

    def load(self, x: np.ndarray) -> np.ndarray:
        return (from_bfloat16(x) if self.dtype == "bfloat16" else x).astype(np.float64)

    def rounded(self, x: np.ndarray) -> np.ndarray:
        return self.load(self.store(x))

    @property
    def defines(self) -> tuple[str, str]:
        return program_of(self.width, self.dtype)

    @property
    def stored_type(self) -> type:
        return np.uint16 if self.dtype == "bfloat16" else np.float16


PAPER = Network(96, 256, 8, 4, 128, 1)
# Every depth; view branches of none, 1, 2, 3 and the most layers.
NETWORKS = {
    "one layer": (Network(12, 64, 1, 4), 1, 1),
    "skip everywhere, the most layers": (Network(128, 64, 8, 1, 32, 8), 1, 17),
    "odd features, skip in heads and view": (Network(90, 64, 5, 4, 48, 2), 127, 1),
    "half, three tiles": (Network(6, 64, 6, 2, 64, 3, "float16"), 3, 100),
    "width 128": (Network(96, 128, 4, 2, 64, 1), 43, 3),
    "half, skip in heads, no view": (Network(24, 64, 7, 3, dtype="float16"), 130, 1),
    "half, width 128": (Network(48, 128, 3, 1, 32, 1, "float16"), 5, 27),
    "half, width 256": (Network(24, 256, 2, 1, 128, 2, "float16"), 2, 65),
    "the paper's": (PAPER, 1, 129),
    "narrow view": (Network(48, 256, 2, 1, 16, 1), 11, 3),
    "width 256, no view": (Network(30, 256, 3, 5), 5, 8),
}


# The programs: what is compiled differs by width and type alone.
INSTANCES = {(width, dtype) for width in (64, 128, 256) for dtype in ROUNDING}


def instances_of(networks: Sequence[Network]) -> set[tuple[int, str]]:
    return {(net.width, net.dtype) for net in networks}


@dataclass
class Case:
    net: Network
    rays: int
    samples_per_ray: int
    arrays: dict[str, np.ndarray]
    out: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return self.rays * self.samples_per_ray

    def stash(self, name: str) -> list[np.ndarray]:
        """The matrices of the activations or deltas, one per hidden layer, and what lies behind them."""
        flat, at, matrices = self.net.load(self.out[name]), 0, []
        for h in range(self.net.hidden):
            size = self.samples * self.net.of_hidden(h).outputs
            matrices.append(flat[at : at + size].reshape(self.samples, -1))
            at += size
        return [*matrices, flat[at:].reshape(-1, 8)]

    def masks(self, hidden: int) -> np.ndarray:
        """[samples, outputs] of a hidden layer, from the order in which the threads keep them."""
        width, outputs = self.net.width, self.net.of_hidden(hidden).outputs
        across = blocks = width // 64
        words = self.out["masks"].reshape(-1, self.net.hidden, THREADS, blocks)[:, hidden]
        thread, r, product, i = np.ogrid[:THREADS, :blocks, :8, :4]
        warp, g, q = thread // 32, thread % 32 // 4, thread % 4
        row = warp // across * 16 * blocks + 16 * r + g + i // 2 * 8
        column = 16 * (product // 2 * across + warp % across) + product % 2 * 8 + 2 * q + i % 2
        bits = words[:, :, :, None, None] >> (4 * product + i).astype(np.uint32) & 1
        tiles = np.zeros((len(words), TILE_ROWS, width), bool)
        tiles[:, row, column] = bits
        return tiles.reshape(-1, width)[: self.samples, :outputs]


def make_case(net: Network, rays: int, samples_per_ray: int, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    samples = rays * samples_per_ray
    arrays = {
        "features": net.store(rng.uniform(-1, 1, (samples, net.features))),
        "grad_rgb": rng.normal(size=(samples, 3)).astype(np.float32),
        "grad_density": rng.normal(size=samples).astype(np.float32),
    }
    if net.view_depth:
        arrays["ray_bias"] = rng.normal(size=(rays, net.view_width)).astype(np.float32)
    for i, layer in enumerate(net.layers):
        columns = layer.input_columns + layer.feature_columns
        layer.weight = (rng.normal(size=(layer.outputs, columns)) * np.sqrt(2 / columns)).astype(np.float32)
        arrays[f"weight{i}"] = layer.weight
        if not layer.ray_bias:
            layer.bias = (0.3 * rng.normal(size=layer.outputs)).astype(np.float32)
            arrays[f"bias{i}"] = layer.bias
    return Case(net, rays, samples_per_ray, arrays)


def gradient_offsets(net: Network) -> list[tuple[int, int]]:
    """Where weight and bias of each layer start in the gradients; and the end."""
    offsets, at = [], 0
    for layer in net.layers:
        bias = at + -(-layer.weight.size // 4) * 4
        offsets.append((at, bias))
        at = bias + -(-layer.outputs // 4) * 4
    return [*offsets, (at, at)]


def expected_packed(net: Network) -> bytes:
    """The packed buffer, from its description in csrc/mlp/mlp_schedule.h."""
    weights: list[np.ndarray] = []
    biases: list[np.ndarray] = []

    def add(matrix: np.ndarray, columns: int = 0) -> None:
        """[contraction, columns], padded to blocks of 16 (the heads to one)."""
        rows = -(-matrix.shape[0] // 16) * 16
        columns = columns or -(-matrix.shape[1] // 16) * 16
        padded = np.zeros((rows, columns), np.float32)
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        step, block, lane, i = np.ogrid[: rows // 16, : columns // 16, :32, :8]
        k = 16 * step + 2 * (lane % 4) + i // 2 % 2 * 8 + i % 2
        weights.append(net.store(padded[k, 16 * block + lane // 4 + i // 4 * 8]).reshape(-1))

    def channels(heads: Sequence[Layer], columns: slice) -> np.ndarray:
        matrix = np.zeros((4, heads[0].weight[:, columns].shape[1]), np.float32)
        for head in heads:
            matrix[head.channel : head.channel + head.outputs] = head.weight[:, columns]
        return matrix

    hidden = [net.of_hidden(h) for h in range(net.hidden)]
    for layer in [*hidden, None]:
        source = layer.input if layer else net.hidden - 1
        if layer:
            add(layer.weight[:, : layer.input_columns].T)
            add(layer.weight[:, layer.input_columns :].T)
            if layer.bias is not None:
                biases.append(layer.bias)
        if source >= 0 and (heads := net.heads_of(source)):
            columns = heads[0].input_columns
            add(channels(heads, slice(columns)).T, 16)
            add(channels(heads, slice(columns, None)).T, 16)
            bias = np.zeros(4, np.float32)
            for head in heads:
                bias[head.channel : head.channel + head.outputs] = head.bias
            biases.append(bias)

    def to_features(heads: Sequence[Layer], layer: Layer | None) -> None:
        for first in range(0, net.features, net.width):
            for matrix, columns in [
                (channels(heads, slice(None)) if heads else None, heads[0].input_columns if heads else 0),
                (layer.weight if layer else None, layer.input_columns if layer else 0),
            ]:
                if matrix is not None:
                    add(matrix[:, columns + first : columns + min(first + net.width, net.features)])

    def with_features(source: int) -> list[Layer]:
        return [head for head in net.heads_of(source) if head.feature_columns] if source >= 0 else []

    if with_features(net.hidden - 1):
        to_features(with_features(net.hidden - 1), None)
    add(channels(net.heads_of(net.hidden - 1), slice(hidden[-1].outputs)))
    for layer in reversed(hidden):
        if layer.feature_columns:
            to_features(with_features(layer.input), layer)
        if layer.input >= 0:
            if heads := net.heads_of(layer.input):
                add(channels(heads, slice(layer.input_columns)))
            add(layer.weight[:, : layer.input_columns])
    return b"".join(part.tobytes() for part in weights) + np.concatenate(biases).tobytes()


def run_case(
    case: Case,
    seed: int = 0,
    *,
    splits: int = 1,
    atomic: bool = False,
    grad_features: bool = True,
    backward: bool = True,
    inference: bool = True,
    encoding: dict[str, np.ndarray] | None = None,
    composites: bool = False,
    checks: Sequence[str] = harness.CHECKS,
    program: str | Path = "mlp",
    **scalars: Any,
) -> Case:
    net, samples = case.net, case.samples
    tiles = -(-samples // TILE_ROWS)
    stash = samples * sum(layer.outputs for layer in net.layers if layer.hidden >= 0)
    outputs = {
        "packed": ((len(expected_packed(net)),), np.uint8),
        "rgb": ((samples, 3), np.float32),
        "density": ((samples,), np.float32),
        "activations": ((stash,), net.stored_type),
        "masks": ((tiles * net.hidden * THREADS * (net.width // 64),), np.uint32),
    }
    arrays = dict(case.arrays)
    if inference:
        outputs |= {
            "inference_rgb": ((samples, 3), np.float32),
            "inference_density": ((samples,), np.float32),
        }
    if encoding is not None:
        del arrays["features"]
        arrays |= encoding
        outputs["encoded"] = ((samples, net.features), net.stored_type)
    if composites:
        outputs |= mlp_compositing.outputs(case.rays, case.samples_per_ray)
    if backward:
        size = gradient_offsets(net)[-1][0]
        outputs |= {"deltas": ((stash + samples * 8,), net.stored_type), "gradients": ((size,), np.float32)}
        if grad_features:
            outputs["grad_features"] = ((samples, net.features), np.float32)
        if net.view_depth:
            outputs["ray_sums"] = ((case.rays, net.view_width), np.float32)
        if splits > 1 and not atomic:
            outputs["workspace"] = ((splits * size,), np.float32)
    names = ("features", "depth", "skip_layer", "view_width", "view_depth")
    values = {name: getattr(net, name) for name in names}
    values |= {"samples": samples, "samples_per_ray": case.samples_per_ray, "splits": splits, **scalars}
    case.out = run(program, arrays, outputs, values, seed, checks=checks, defines=net.defines)
    return case


def assert_within(actual: np.ndarray, exact: np.ndarray, bound: np.ndarray, what: str) -> None:
    wrong = ~(np.abs(actual - exact) <= bound)  # NaN is wrong
    assert not wrong.any(), (
        f"{what}: {wrong.sum()} of {wrong.size} wrong, the first at {np.argwhere(wrong)[0]}: "
        f"{actual[wrong][0]} for {exact[wrong][0]}, bound {bound[wrong][0]}"
    )


def check_forward(case: Case) -> None:
    net = case.net
    features = net.load(case.out.get("encoded", case.arrays.get("features")))
    assert case.out["packed"].tobytes() == expected_packed(net)
    activations = case.stash("activations")
    rgb_density = np.concatenate([case.out["rgb"], case.out["density"][:, None]], 1)
    relative, smallest = ROUNDING[net.dtype]
    for number, layer in enumerate(net.layers):
        parts = [activations[layer.input]] if layer.input >= 0 else []
        x = np.concatenate([*parts, features[:, : layer.feature_columns]], 1)
        weight = net.rounded(layer.weight)
        bias = (
            np.repeat(case.arrays["ray_bias"], case.samples_per_ray, 0) if layer.bias is None else layer.bias
        )
        exact = x @ weight.T + bias
        bound = (x.shape[1] / 16 + 2) * FLOAT * (np.abs(x) @ np.abs(weight).T + np.abs(bias))
        if layer.channel >= 0:
            given = rgb_density[:, layer.channel : layer.channel + layer.outputs]
            assert_within(given, exact, bound, f"head {number}")
            continue
        mask = case.masks(layer.hidden)
        assert mask[exact > bound].all() and not mask[exact < -bound].any(), f"masks of layer {number}"
        y = np.maximum(exact, 0)
        assert_within(
            activations[layer.hidden], y, bound + relative * (y + bound) + smallest, f"layer {number}"
        )
        assert ((activations[layer.hidden] > 0) <= mask).all()
    if "inference_rgb" in case.out:
        np.testing.assert_array_equal(case.out["inference_rgb"], case.out["rgb"])
        np.testing.assert_array_equal(case.out["inference_density"], case.out["density"])


def check_backward(case: Case, roundings_of_sums: int) -> None:
    net = case.net
    activations, deltas = case.stash("activations"), case.stash("deltas")
    features = net.load(case.out.get("encoded", case.arrays.get("features")))
    relative, smallest = ROUNDING[net.dtype]
    heads = np.zeros((case.samples, 8))
    for name, columns in (("grad_rgb", slice(0, 3)), ("grad_density", slice(3, 4))):
        if name in case.arrays:
            heads[:, columns] = net.rounded(case.arrays[name]).reshape(case.samples, -1)
    np.testing.assert_array_equal(deltas[-1], heads)

    def delta_of(layer: Layer) -> np.ndarray:
        if layer.channel < 0:
            return deltas[layer.hidden]
        return heads[:, layer.channel : layer.channel + layer.outputs]

    def back(readers: list[tuple[Layer, slice]], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The sum of what the readers send back through these columns, and its bound."""
        exact, sizes, steps = np.zeros(shape), np.zeros(shape), 2.0
        for layer, columns in readers:
            weight = net.rounded(layer.weight)[:, columns]
            exact += delta_of(layer) @ weight
            sizes += np.abs(delta_of(layer)) @ np.abs(weight)
            steps += layer.outputs / 16 + 1
        return exact, steps * FLOAT * sizes

    for hidden in range(net.hidden):
        readers = [(layer, slice(layer.input_columns)) for layer in net.layers if layer.input == hidden]
        exact, bound = back(readers, deltas[hidden].shape)
        exact *= case.masks(hidden)
        bound += relative * (np.abs(exact) + bound) + smallest
        assert_within(deltas[hidden], exact, bound * case.masks(hidden), f"deltas of hidden layer {hidden}")
    if "grad_features" in case.out:
        readers = [(layer, slice(layer.input_columns, None)) for layer in net.layers if layer.feature_columns]
        assert_within(case.out["grad_features"], *back(readers, features.shape), "gradients of the features")

    for number, (layer, (weight_at, bias_at)) in enumerate(
        zip(net.layers, gradient_offsets(net), strict=False)
    ):
        parts = [activations[layer.input]] if layer.input >= 0 else []
        x = np.concatenate([*parts, features[:, : layer.feature_columns]], 1)
        delta = delta_of(layer)
        weight = case.out["gradients"][weight_at : weight_at + layer.weight.size].reshape(layer.weight.shape)
        bound = roundings_of_sums * FLOAT * (np.abs(delta).T @ np.abs(x))
        assert_within(weight, delta.T @ x, bound, f"gradient of weight {number}")
        bias = case.out["gradients"][bias_at : bias_at + layer.outputs]
        bound = roundings_of_sums * FLOAT * np.abs(delta).sum(0)
        assert_within(bias, delta.sum(0), bound, f"gradient of bias {number}")
    if net.view_depth:
        rows = deltas[net.depth].reshape(case.rays, case.samples_per_ray, -1)
        bound = case.samples_per_ray * FLOAT * np.abs(rows).sum(1)
        assert_within(case.out["ray_sums"], rows.sum(1), bound, "sums of the rays")


def checks_of(net: Network) -> Sequence[str]:
    """The race detector sees every width, and both types at one: threads do the same with either."""
    return harness.CHECKS if net.dtype == "bfloat16" or net.width == 64 else ["memory"]


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_and_backward(name: str) -> None:
    net, rays, samples_per_ray = NETWORKS[name]
    case = run_case(make_case(net, rays, samples_per_ray), checks=checks_of(net))
    check_forward(case)
    check_backward(case, case.samples // 16 + 2)


def test_depths() -> None:
    networks = [net for net, *_ in NETWORKS.values()]
    assert {net.depth for net in networks} == set(range(1, 9))
    assert {net.view_depth for net in networks} == {0, 1, 2, 3, 8}


def test_every_instance_of_every_kernel_is_run() -> None:
    for networks in ([net for net, *_ in NETWORKS.values()], SPLIT, [*COMPOSITED.values()]):
        assert instances_of(networks) == INSTANCES


@pytest.mark.parametrize("splits", [1, 3])
def test_no_samples(splits: int) -> None:
    case = run_case(make_case(Network(20, 64, 2, 1, 32, 2), 0, 5), splits=splits)
    assert case.out["packed"].tobytes() == expected_packed(case.net)
    for layer, (weight, bias) in zip(case.net.layers, gradient_offsets(case.net), strict=False):
        assert not case.out["gradients"][weight : weight + layer.weight.size].any()
        assert not case.out["gradients"][bias : bias + layer.outputs].any()


@pytest.mark.parametrize("given", ["rgb", "density"])
def test_a_missing_gradient_is_zero(given: str) -> None:
    case = make_case(Network(12, 64, 2, 4, 16, 1), 3, 3)
    del case.arrays["grad_density" if given == "rgb" else "grad_rgb"]
    check_backward(run_case(case, inference=False, checks=["memory"]), 3)


def test_without_gradients_of_the_features() -> None:
    case = make_case(Network(128, 64, 3, 1, 32, 1), 2, 9)
    check_backward(run_case(case, grad_features=False, inference=False), 4)


@pytest.mark.parametrize("atomic", [False, True])
def test_split_sums(atomic: bool) -> None:
    """Five ranges of samples, one of them empty and the last cut short."""
    case = make_case(Network(20, 64, 2, 1, 32, 2), 1, 125)
    found = []
    for seed in range(2):
        check_backward(
            run_case(case, seed, splits=5, atomic=atomic, inference=False, checks=harness.CHECKS[seed:]),
            125 // 16 + 2 + 5,
        )
        found.append(case.out["gradients"].copy())
    if not atomic:  # in a fixed order
        ends = [
            (weight, weight + layer.weight.size)
            for layer, (weight, _) in zip(case.net.layers, gradient_offsets(case.net), strict=False)
        ]
        for begin, end in ends:
            np.testing.assert_array_equal(found[0][begin:end], found[1][begin:end])


SPLIT = [Network(20, width, 2, 1, 32, 2, dtype) for width, dtype in sorted(INSTANCES)]


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("net", SPLIT, ids=lambda net: f"{net.width}-{net.dtype}")
def test_split_sums_of_every_instance(net: Network, atomic: bool) -> None:
    case = make_case(net, 1, 50)
    run_case(case, splits=3, atomic=atomic, inference=False, checks=["memory"])
    check_backward(case, 50 // 16 + 2 + 3)


def test_as_many_ranges_as_the_extension_takes() -> None:
    """For a tile of samples one, in its order."""
    case = make_case(Network(20, 64, 2, 1, 32, 2), 1, 50)
    alone = run_case(case, splits=1, inference=False, checks=["memory"]).out["gradients"].copy()
    case = run_case(case, splits=0, inference=False, checks=["memory"])
    check_backward(case, 50 // 16 + 2)
    for layer, (weight, _) in zip(case.net.layers, gradient_offsets(case.net), strict=False):
        np.testing.assert_array_equal(
            case.out["gradients"][weight : weight + layer.weight.size],
            alone[weight : weight + layer.weight.size],
        )


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("at", [0, 205, 299])
def test_a_nan_feature_passes_every_relu(at: int, dtype: str) -> None:
    """And makes its own sample NaN, no other, whose bits stay; the loss sees it, and so do the gradients."""
    net = Network(20, 64, 3, 1, 32, 2, dtype)
    case = make_case(net, 3, 100)
    clean = run_case(case, checks=["memory"]).out
    features = case.arrays["features"].copy()
    features[at, 3] = net.store(np.full(1, np.nan))[0]
    case.arrays["features"] = features
    out = run_case(case, checks=["memory"]).out
    others = np.arange(300) != at
    for name in ("rgb", "density", "inference_rgb", "inference_density"):
        assert np.isnan(out[name][at]).all(), name
        np.testing.assert_array_equal(out[name][others], clean[name][others])
    assert case.masks(0)[at].all() and not np.isfinite(out["gradients"]).all()


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("net", SPLIT, ids=lambda net: f"{net.width}-{net.dtype}")
def test_a_nan_weight_reaches_the_outputs(net: Network, layer: int) -> None:
    case = make_case(replace(net, depth=3, layers=[]), 1, 40)
    case.arrays[f"weight{layer}"] = case.arrays[f"weight{layer}"].copy()
    case.arrays[f"weight{layer}"][5, 7] = np.nan
    out = run_case(case, checks=["memory"], backward=False).out
    for name in ("rgb", "density", "inference_rgb", "inference_density"):
        assert np.isnan(out[name]).all(), name


@pytest.mark.parametrize(
    ("degrees", "min_deg", "cylinder", "integrated"), [(16, 0, 0, 1), (5, 1, 1, 1), (3, 0, 0, 0)]
)
def test_encoding_inside(degrees: int, min_deg: int, cylinder: int, integrated: int) -> None:
    """The features computed by the forward are, bit for bit, those that frustum_ipe_math.h gives outside."""
    rays, samples_per_ray = 7, 19
    case = make_case(Network(6 * degrees, 64, 2, 1, 32, 1), rays, samples_per_ray)
    run_case(
        case,
        backward=False,
        encoding=make_rays(rays, samples_per_ray),
        min_deg=min_deg,
        cylinder=cylinder,
        integrated=integrated,
    )
    assert np.abs(case.net.load(case.out["encoded"])).max() > 0.5
    check_forward(case)


# A tile holds several rays, one with room to spare, exactly one, or a part of one.
COMPOSITES = [(11, 19), (300, 1), (3, 100), (3, 128), (2, 129), (2, 300)]


def composite_case(net: Network, rays: int, samples_per_ray: int, seed: int = 0, **options: Any) -> None:
    """Raw numbers as given without compositing, pixels as the reference makes of them."""
    case, given = make_case(net, rays, samples_per_ray, seed), make_rays(rays, samples_per_ray)
    settings = OPTIONS[rays % 2]
    numbers = {"min_deg": 0, "cylinder": 0, "integrated": 1, **mlp_compositing.scalars(settings)}
    run_case(case, seed, backward=False, encoding=given, composites=True, **{**numbers, **options})
    check_forward(case)
    mlp_compositing.check(case.out, case.out["rgb"], case.out["density"], given, settings)


@pytest.mark.parametrize(("rays", "samples_per_ray"), COMPOSITES)
def test_compositing_behind(rays: int, samples_per_ray: int) -> None:
    composite_case(Network(24, 64, 2, 1, 32, 1), rays, samples_per_ray)


COMPOSITED = {
    "paper": PAPER,
    "no view": Network(12, 64, 2, 4),
    "skip": Network(12, 128, 5, 4, 48, 2),
    "half": Network(12, 64, 2, 4, 16, 1, "float16"),
    "half, width 128": Network(12, 128, 2, 1, 32, 1, "float16"),
    "half, width 256": Network(12, 256, 2, 4, 64, 1, "float16"),
}


@pytest.mark.parametrize("net", COMPOSITED.values(), ids=COMPOSITED)
def test_compositing_behind_other_networks(net: Network) -> None:
    composite_case(net, 2, 70, checks=["memory"])


def test_a_nan_weight_reaches_the_pixels() -> None:
    case, given = make_case(Network(24, 64, 2, 1, 32, 1), 3, 60), make_rays(3, 60)
    case.arrays["weight1"][5, 7] = np.nan
    numbers = {"min_deg": 0, "cylinder": 0, "integrated": 1, **mlp_compositing.scalars(OPTIONS[1])}
    run_case(case, backward=False, encoding=given, composites=True, checks=["memory"], **numbers)
    assert np.isnan(case.out["density"]).all() and np.isnan(case.out["rgb"]).all()
    assert np.isnan(case.out["pixels"]).all()
