"""The fused step, rendering, occupancy update, ray drawing and Adam against their composed references.

Bounds: the fused float32 path may differ from float64 truth by twice what the float32 reference does, plus a floor of
a few units in the last place of the largest value: both round, in different orders.
"""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mipnerf_fast import fast_reference, ops, reference
from mipnerf_fast.config import FastConfig
from mipnerf_fast.counter_rng import FAST_RAYS, OCCUPANCY, counter_uint32
from mipnerf_fast.fast_model import FastModel
from mipnerf_fast.ops.fast_step import (
    FastFields,
    FastGradients,
    MarchRays,
    NetworkGradients,
    PixelSource,
    StepStatistics,
    TableMoments,
)

SMALL = FastConfig(
    levels=3,
    base_resolution=4,
    finest_resolution=40,
    log2_table_size=9,
    occupancy_resolution=32,
    net_width=16,
)
VARIANTS = {
    "gaussian": SMALL,
    "erf": dataclasses.replace(SMALL, attenuation="erf", features=2),
    "aliased": dataclasses.replace(SMALL, attenuation="none", scale_input=False),
    "two colour layers": dataclasses.replace(SMALL, colour_layers=2, net_width=24, levels=2),
}
FLOOR = 16 * 2.0**-23


def _model(config: FastConfig) -> FastModel:
    model = FastModel(config)
    with torch.no_grad():
        model.tables.uniform_(-0.5, 0.5)
        model.density_out[0] += 0.4  # some rays end early, some see the background
    model.scale_range.copy_(torch.tensor([1e-3, 2e-2]))
    model.densities.copy_(torch.rand_like(model.densities))
    model.masks.copy_(reference.pack_masks(reference.occupancy_masks(model.densities, 0.9)))
    return model


def _rays(count: int = 70) -> MarchRays:
    origins = torch.tensor([0.0, 0.0, 4.0]) + 0.1 * torch.randn(count, 3)
    directions = torch.tensor([0.0, 0.0, -1.0]) + 0.25 * torch.randn(count, 3)
    one = torch.ones(count, 1)
    radii = 0.002 + 0.03 * torch.rand(count, 1) ** 3
    return MarchRays(origins, directions, radii, 2 * one, 6 * one, torch.rand(count, 1), torch.rand(count, 3))


def _composed(
    rays: MarchRays, fields: FastFields, dtype: torch.dtype
) -> tuple[reference.PackedComposite, dict[str, Tensor]]:
    """Rendering by the references in a dtype, on the samples that a float32 march finds; and its parameters.

    Beside tables in float16 features are rounded to it in every dtype.
    """
    samples = reference.fast_samples(*rays[:6], fields)
    o, d, radii, near, _, _, background = (field.to(dtype) for field in rays if field is not None)
    t0, t1 = samples.t0.to(dtype), samples.t1.to(dtype)
    means, scales = reference.sample_gaussians(o, d, radii, samples.rays, t0, t1, fields.box_half)
    parameters = {
        name: value.detach().to(dtype, copy=True).requires_grad_()
        for name, value in fields._asdict().items()
        if name in FastGradients._fields and value is not None
    }
    packed = reference.PackedSamples(samples.ray_starts, samples.rays, t0, t1, means, scales)
    in_half = fields.tables.dtype == torch.float16
    result = reference.fast_composite(packed, d, near, background, fields._replace(**parameters), in_half)
    return result, parameters


def _bounded(found: Tensor, rounded: Tensor, truth: Tensor) -> None:
    """The rule at the top of this file."""
    size = truth.abs().max().item()
    allowed = 2 * (rounded.double() - truth).abs().max().item() + FLOOR * max(size, 1e-30)
    assert (found.double() - truth).abs().max().item() <= allowed


@pytest.mark.parametrize("variant", VARIANTS)
def test_rendering_agrees_with_the_composed_reference(variant: str) -> None:
    model, rays = _model(VARIANTS[variant]), _rays()
    rendered = ops.fast_render(rays, model.fields())
    with torch.no_grad():
        rounded, truth = (_composed(rays, model.fields(), d)[0] for d in (torch.float32, torch.float64))
    assert 0.02 < truth.acc.mean() < 0.98
    for found, a, b in zip(rendered, rounded, truth, strict=False):
        _bounded(found, a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_agree_with_autograd_of_the_composed_reference(variant: str) -> None:
    model, rays = _model(VARIANTS[variant]), _rays()
    fields, target = model.fields(), torch.rand(70, 3)
    gradients = _zeros(fields)
    statistics = ops.fast_train_step(rays, target, 0.1, fields, gradients)
    wanted = {}
    for dtype in (torch.float32, torch.float64):
        result, parameters = _composed(rays, fields, dtype)
        loss = torch.nn.functional.smooth_l1_loss(result.rgb, target.to(dtype), beta=0.1)
        loss.backward()
        wanted[dtype] = {name: parameter.grad for name, parameter in parameters.items()}
    assert statistics.is_finite and 0 < statistics.counted <= statistics.samples
    assert abs(statistics.loss - loss.item()) <= 1e-6 * loss.item()
    square = ((result.rgb - target) ** 2).mean().item()
    assert abs(statistics.squared_error - square) <= 1e-6 * square
    for name, truth in wanted[torch.float64].items():
        found, rounded = getattr(gradients, name), wanted[torch.float32][name]
        assert truth is not None and rounded is not None and truth.abs().max() > 0
        _bounded(found, rounded, truth)


def _zeros(fields: FastFields) -> FastGradients:
    values = (getattr(fields, name) for name in FastGradients._fields)
    return FastGradients(*(None if v is None else torch.zeros_like(v) for v in values))  # type: ignore[arg-type]


def test_gradients_agree_with_finite_differences_of_the_render() -> None:
    model, rays = _model(SMALL), _rays()
    fields, target = model.fields(), torch.rand(70, 3)
    gradients = _zeros(fields)
    ops.fast_train_step(rays, target, 0.1, fields, gradients)
    for name in ("tables", "density_in", "colour_in"):
        parameter, gradient = getattr(fields, name), getattr(gradients, name)
        direction = gradient / gradient.norm()
        before, step, losses = parameter.clone(), 0.02, []
        for sign in (1, -1):
            parameter.copy_(before + sign * step * direction)
            rgb, _, _ = ops.fast_render(rays, fields)
            losses.append(torch.nn.functional.smooth_l1_loss(rgb.double(), target.double(), beta=0.1).item())
        parameter.copy_(before)
        slope = (losses[0] - losses[1]) / (2 * step)
        # The quotient is off by the curvature and by 1e-7 / step of rounding.
        assert math.isclose(slope, gradient.norm().item(), rel_tol=0.05)


def test_the_plain_step_counts_and_adds_alike() -> None:
    """Rays that end early: the fused step marches them on to the end of their round of eight samples."""
    model, rays = _model(SMALL), _rays()
    fields, target = model.fields(), torch.rand(70, 3)
    fields.density_out[0] += 1.0
    gradients, plain = _zeros(fields), _zeros(fields)
    found = ops.fast_train_step(rays, target, 0.1, fields, gradients)
    wanted = fast_reference.fast_train_step(rays, target, 0.1, fields, plain)
    assert (found.samples, found.counted, found.is_finite) == (wanted.samples, wanted.counted, True)
    everything = reference.fast_samples(*rays[:6], fields).rays.shape[0]
    assert found.counted < found.samples < everything
    for mine, other in zip(gradients, plain, strict=True):
        if mine is not None and other is not None:
            # Both round; how far from the truth is tested above.
            assert (mine - other).norm() <= 100 * 2.0**-23 * other.norm()


@pytest.mark.parametrize("count", [1, 15, 16, 17, 131])
def test_rays_marched_side_by_side_find_the_samples_of_each_alone(count: int) -> None:
    """Where next to nothing is absorbed, the fused step's samples are all those of the operator that marches one ray
    after the other, whichever rays share its lanes: some are parallel to an axis, some miss the box or end at once."""
    model, rays = _model(SMALL), _rays(count)
    fields = model.fields()
    fields.density_out.zero_()
    fields.density_out[0] = -1.0  # densities far below 1
    model.densities.copy_(torch.rand_like(model.densities) ** 8)  # large empty cells too
    model.masks.copy_(reference.pack_masks(reference.occupancy_masks(model.densities, 0.6)))
    kind = torch.arange(count) % 7
    rays.directions[kind == 1] = torch.tensor([0.0, 0.0, -1.0])
    rays.directions[kind == 2, 0] = 0.0
    rays.origins[kind == 3] += 9.0  # beside the box
    rays.far[kind == 4] = rays.near[kind == 4]
    rays.directions[kind == 5] *= -1.0  # away from it
    rays.origins[kind == 6] *= 0.1  # from within it, and beginning behind its origin
    rays.near[kind == 6] = -3.0
    target = torch.rand(count, 3)
    marched = ops.march(*rays[:6], fields.masks, fields.occupancy_resolution, fields.box_half)
    found = ops.fast_train_step(rays, target, 0.1, fields, _zeros(fields))
    wanted = marched.rays.shape[0]
    assert (found.samples, found.counted) == (wanted, wanted)
    if count > 7:
        assert wanted > count and not set(range(7)) - set(kind.tolist())
    # The same samples, not as many others: the widths and places decide the colours.
    rgb, distance, acc = ops.fast_render(rays, fields)
    composite, _ = _composed(rays, fields, torch.float64)
    torch.testing.assert_close(rgb.double(), composite.rgb, rtol=0, atol=1e-5)
    # An opacity near zero is 1 minus a rounded number near 1; the distance divides by it.
    torch.testing.assert_close(
        (acc * distance).double(), composite.acc * composite.distance, rtol=0, atol=1e-5
    )


def test_the_result_does_not_depend_on_threads() -> None:
    model, rays = _model(SMALL), _rays(300)
    fields, target = model.fields(), torch.rand(300, 3)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            gradients = _zeros(fields)
            statistics = ops.fast_train_step(rays, target, 0.1, fields, gradients)
            found.append((statistics, gradients))
    finally:
        torch.set_num_threads(threads)
    for statistics, gradients in found[1:]:
        assert statistics == found[0][0]
        for a, b in zip(gradients, found[0][1], strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tables_are_moved_within_the_step_as_behind_it(variant: str) -> None:
    """`fast_train_update` beside `fast_train_step` and `sparse_adam`, bit by bit. With one thread a level is one part,
    with seven it is several."""
    model, rays = _model(VARIANTS[variant]), _rays(300)
    fields, target = model.fields(), torch.rand(300, 3)

    def run(together: bool) -> list[StepStatistics | Tensor | None]:
        tables = fields.tables.clone()
        moments = TableMoments(torch.zeros_like(tables), torch.zeros_like(tables))
        found: list[StepStatistics | Tensor | None] = []
        for step in (1, 2, 3):
            gradients, adam = _zeros(fields), (1e-2, 0.9, 0.99, 1e-15, step)
            of_networks = NetworkGradients(*gradients[1:])
            here = fields._replace(tables=tables)
            if together:
                found.append(ops.fast_train_update(rays, target, 0.1, here, of_networks, moments, *adam))
            else:
                found.append(ops.fast_train_step(rays, target, 0.1, here, gradients))
                ops.sparse_adam(tables, gradients.tables, *moments, *adam)
            found += of_networks
        return [*found, tables, *moments]

    wanted, threads = run(False), torch.get_num_threads()
    first, last = wanted[0], wanted[12]
    assert isinstance(first, StepStatistics) and isinstance(last, StepStatistics) and last.loss < first.loss
    try:
        for count in (1, 7):
            torch.set_num_threads(count)
            for mine, other in zip(run(True), wanted, strict=True):
                same = torch.equal(mine, other) if isinstance(mine, Tensor) else mine == other  # type: ignore[arg-type]
                assert same
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("operators", [ops, fast_reference], ids=["fused", "reference"])
def test_a_step_that_is_not_finite_moves_nothing(operators: ModuleType) -> None:
    model, rays = _model(SMALL), _rays()
    fields = model.fields()
    fields.density_in[0, 0] = math.nan
    moments = TableMoments(*torch.rand(2, *fields.tables.shape))
    before = [value.clone() for value in (fields.tables, *moments)]
    gradients = NetworkGradients(*_zeros(fields)[1:])
    found = operators.fast_train_update(
        rays, torch.rand(70, 3), 0.1, fields, gradients, moments, 1e-2, 0.9, 0.99, 1e-15, 1
    )
    assert not found.is_finite
    assert all(map(torch.equal, (fields.tables, *moments), before))
    assert not any(g is not None and g.any() for g in gradients)


def test_wrong_moments_are_named() -> None:
    model = _model(SMALL)
    fields, good = model.fields(), torch.zeros_like(model.tables)
    gradients = NetworkGradients(*_zeros(fields)[1:])
    for moments, step, message in (
        (TableMoments(good[1:], good), 1, "moment1 must be"),
        (TableMoments(good, good.double()), 1, "moment2 must be"),
        (TableMoments(good, good), 0, "step must be 1 or more"),
    ):
        before = fields.tables.clone()
        with pytest.raises(RuntimeError, match=message):
            ops.fast_train_update(
                _rays(), torch.rand(70, 3), 0.1, fields, gradients, moments, 1e-2, 0.9, 0.99, 1e-15, step
            )
        assert torch.equal(fields.tables, before)


def test_a_gradient_that_is_not_finite_adds_nothing() -> None:
    model, rays = _model(SMALL), _rays()
    fields = model.fields()
    fields.density_in[0, 0] = math.nan
    gradients = _zeros(fields)
    assert not ops.fast_train_step(rays, torch.rand(70, 3), 0.1, fields, gradients).is_finite
    assert not any(g is not None and g.any() for g in gradients)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tables", torch.zeros(7, 4), "tables must be"),
        ("density_out", torch.zeros(16, 8), "density_out must be"),
        ("masks", torch.zeros(3, dtype=torch.int32), "masks must be"),
        ("occupancy_resolution", 33, "occupancy_resolution must be"),
        ("table_size", 100, "table_size must be"),
        ("tf32", True, "tf32 must be false on the CPU"),
    ],
)
def test_wrong_fields_are_named(field: str, value: object, message: str) -> None:
    fields = _model(SMALL).fields()._replace(**{field: value})
    with pytest.raises(RuntimeError, match=message):
        ops.fast_render(_rays(), fields)


def test_an_unknown_attenuation_is_named_by_every_operator() -> None:
    model, rays = _model(SMALL), _rays()
    fields = model.fields()._replace(attenuation="sinc")
    for run in (
        lambda: ops.fast_render(rays, fields),
        lambda: ops.fast_train_step(rays, torch.rand(70, 3), 0.1, fields, _zeros(fields)),
        lambda: ops.occupancy_update(model.densities, 0.01, 0, 0, 16, 0.5, 1.0, fields),
    ):
        with pytest.raises(ValueError, match=r"attenuation must be .*, got 'sinc'"):
            run()


def test_fixed_point_is_of_gpus() -> None:
    fields = _model(SMALL).fields()
    flat = (*fields[:9], 1, *fields[10:])
    sums = torch.zeros_like(fields.tables, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="table_sums must be none on the CPU"):
        torch.ops.mipnerf_fast.fast_train_step(*_rays(), torch.rand(70, 3), 0.1, *flat, *_zeros(fields), sums)


def test_wrong_rays_are_named() -> None:
    rays = _rays()._replace(radii=torch.ones(69, 1))
    with pytest.raises(RuntimeError, match="radii must be"):
        ops.fast_render(rays, _model(SMALL).fields())


def test_no_rays_are_no_error() -> None:
    model, rays = _model(SMALL), _rays()
    none = MarchRays(*(None if field is None else field[:0] for field in rays))  # type: ignore[arg-type]
    assert ops.fast_render(none, model.fields())[0].shape == (0, 3)


# ------------------------------------------------------------------------------------------- the occupancy grid


def test_masks_agree_with_their_reference() -> None:
    model = _model(SMALL)
    densities = torch.rand(32, 32, 32) ** 8
    for highest in (0.05, 10.0):
        share, threshold = ops.occupancy_masks(densities, highest, model.masks)
        wanted = reference.occupancy_threshold(densities.double(), highest)
        assert math.isclose(threshold, wanted.item(), rel_tol=1e-5)
        masks = reference.occupancy_masks(densities, threshold)
        assert torch.equal(model.masks, reference.pack_masks(masks))
        assert share == masks[0][0].double().mean().item()


def test_an_update_visits_the_cells_drawn() -> None:
    model = _model(SMALL)
    before, fields = model.densities.clone(), model.fields()
    occupied = (before.reshape(-1) > 0.9).nonzero()[:, 0]
    seed, step, stride, decay, scale = 7, 48, 16, 0.5, 0.01
    densities = model.densities.clone()
    ops.occupancy_update(densities, scale, seed, step, stride, decay, 0.9, fields)
    wanted = before.double().reshape(-1)
    visits = 32**3 // stride
    for part, candidates in ((0, torch.arange(32**3)), (1, occupied)):
        every = math.ceil(len(candidates) / visits)
        strata = math.ceil(len(candidates) / every)
        words = _occupancy_words(seed, step, part, strata)
        index = torch.arange(strata) * every + (words[:, 0] * every >> 32)
        inside = index < len(candidates)
        cells = candidates[index[inside]]
        offset = (words[inside, 1:] >> 8).double() * 2.0**-24
        x = torch.stack([cells % 32, cells // 32 % 32, cells // 1024], -1)
        points = (x + offset) / 32
        none = torch.zeros(1, 3, dtype=torch.float64)
        query = reference.fast_query(
            points,
            torch.full((len(points),), scale, dtype=torch.float64),
            none,
            torch.zeros(len(points), dtype=torch.int64),
            _double(fields),
        )
        wanted[cells] = torch.maximum(wanted[cells] * decay, query.density)
    torch.testing.assert_close(densities.double().reshape(-1), wanted, rtol=2e-5, atol=1e-7)


def _occupancy_words(seed: int, step: int, part: int, strata: int) -> Tensor:
    words = counter_uint32(seed, step, OCCUPANCY, torch.arange(strata), 4 * (part + 1))
    return words[:, 4 * part :]


def _double(fields: FastFields) -> FastFields:
    return fields._replace(
        **{n: v.double() for n, v in fields._asdict().items() if n in FastGradients._fields and v is not None}
    )


# ---------------------------------------------------------------------------------------------- drawing, Adam


def _source(channels: int = 4) -> PixelSource:
    heights, widths = torch.tensor([6, 3, 6, 3]), torch.tensor([8, 4, 8, 4])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (heights * widths).cumsum(0)])
    return PixelSource(
        torch.randint(256, (int(offsets[-1]), channels), dtype=torch.uint8),
        offsets,
        heights,
        widths,
        torch.randn(4, 3, 4),
        torch.tensor([10.0, 5.0, 10.0, 5.0]),
        torch.full((4,), 2.0),
        torch.full((4,), 6.0),
        torch.tensor([0, 2, 1, 3]),
        torch.tensor([2, 4]),
        torch.tensor([0.6, 1.0]),
    )


def test_drawn_rays_are_those_of_the_counters() -> None:
    from mipnerf_fast.cameras import pixel_rays

    source, seed, step, count = _source(), 11, 5, 500
    rays, target = ops.draw_rays(source, seed, step, count, True, 1.0)
    words = counter_uint32(seed, step, FAST_RAYS, torch.arange(count), 8)
    uniform = (words >> 8).float() * 2.0**-24
    group = (uniform[:, 0] >= source.group_shares[0]).long()
    image = source.order[2 * group + (words[:, 1] * 2 >> 32)]
    pixel = words[:, 2] * (source.heights * source.widths)[image] >> 32
    width = source.widths[image]
    wanted = pixel_rays(
        source.c2w[image],
        source.heights[image],
        width,
        source.focals[image],
        pixel % width,
        pixel // width,
        source.nears[image],
        source.fars[image],
        torch.ones(count),
    )
    for name in ("origins", "directions", "radii", "near", "far"):
        torch.testing.assert_close(getattr(rays, name), getattr(wanted, name), rtol=1e-5, atol=1e-6)
    assert rays.phase is not None and torch.equal(rays.phase[:, 0], uniform[:, 3])
    assert torch.equal(rays.background, uniform[:, 4:7])
    colour = source.pixels[source.offsets[image] + pixel].float() / 255
    over = colour[:, :3] * colour[:, 3:] + (1 - colour[:, 3:]) * rays.background
    torch.testing.assert_close(target, over, rtol=1e-6, atol=1e-6)
    assert 0.3 < group.float().mean() < 0.5  # the coarser scale has the share 0.4


def test_images_without_alpha_keep_their_colours() -> None:
    source = _source(channels=3)
    rays, target = ops.draw_rays(source, 1, 1, 64, False, 0.0)
    assert not rays.background.any()
    colours = {tuple(c) for c in source.pixels.tolist()}
    assert {tuple(c) for c in (target * 255).round().int().tolist()} <= colours


@pytest.mark.parametrize("size", [1, 16, 4099, 40003])
def test_adam_agrees_with_its_reference_and_spares_the_untouched(size: int) -> None:
    values, moment1 = torch.randn(size), torch.randn(size) * 0.1
    moment2, gradient = torch.rand(size) * 0.01, torch.randn(size)
    gradient[torch.rand(size) < 0.6] = 0
    gradient[: size // 2] = 0
    given = [t.double() for t in (values, gradient, moment1, moment2)]
    wanted = reference.sparse_adam(*given, 1e-2, 0.9, 0.99, 1e-15, 7)
    untouched = gradient == 0
    spared = values[untouched].clone()
    ops.sparse_adam(values, gradient, moment1, moment2, 1e-2, 0.9, 0.99, 1e-15, 7)
    for found, truth in zip((values, moment1, moment2), wanted, strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-7)
    assert torch.equal(values[untouched], spared) and not gradient.any()
