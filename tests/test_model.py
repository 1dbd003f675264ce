"""The models: parameter counts, shapes, random numbers, ablations, gradients."""

from __future__ import annotations

import pytest
import torch

from mipnerf_fast import (
    MipNerf,
    MipNerfConfig,
    Nerf,
    NerfConfig,
    Rays,
    build_model,
    cameras,
    preset,
    reference,
)
from mipnerf_fast.counter_rng import CounterRandom

TINY = {"num_samples": 6, "net_depth": 5, "net_width": 16, "net_width_condition": 8}


def rays(height: int = 3, width: int = 4) -> Rays:
    c2w = torch.eye(4)[:3]
    c2w[2, 3] = 4.0
    return cameras.pinhole_rays(c2w, height, width, 5.0)


def test_the_paper_has_612740_parameters_and_nerf_twice_595844() -> None:
    model = MipNerf()
    assert sum(p.numel() for p in model.parameters()) == 612_740
    assert [(x.in_features, x.out_features) for x in model.mlp.linears] == [
        (96, 256),
        *[(256, 256)] * 4,
        (352, 256),
        *[(256, 256)] * 2,
        (256, 1),
        (256, 256),
        (283, 128),
        (128, 3),
    ]
    assert sum(p.numel() for p in build_model(preset("nerf").model).parameters()) == 2 * 595_844


def test_weights_are_glorot_uniform_and_biases_zero() -> None:
    torch.manual_seed(0)
    for linear in MipNerf().mlp.linears:
        limit = (6 / (linear.in_features + linear.out_features)) ** 0.5
        assert linear.weight.abs().max() <= limit
        n = linear.weight.numel()
        # The variance of U(-a, a) is a^2/3; its estimate has the relative standard error sqrt(0.8/n).
        assert abs(linear.weight.var().item() / (limit**2 / 3) - 1) <= 5 * (0.8 / n) ** 0.5 + 2 / n
        assert (linear.bias == 0).all()


@pytest.mark.parametrize(
    "config", [MipNerfConfig(**TINY), NerfConfig(num_coarse=5, num_fine=7, net_width=16)]
)
def test_leading_shape_is_kept(config: MipNerfConfig | NerfConfig) -> None:
    model = build_model(config)
    levels = model(rays(), randomized=True)
    assert len(levels) == 2
    for level in levels:
        assert level.rgb.shape == (3, 4, 3)
        assert level.distance.shape == level.acc.shape == (3, 4)
        assert level.weights.shape[:2] == (3, 4)
    single = model(rays().flatten().map(lambda x: x[5]))
    assert single[1].rgb.shape == (3,)


def test_deterministic_without_randomized_and_different_with_it() -> None:
    model = MipNerf(MipNerfConfig(**TINY))
    a, b = model(rays())[1].rgb, model(rays())[1].rgb
    assert torch.equal(a, b)
    g = torch.Generator().manual_seed(0)
    c, d = model(rays(), True, generator=g)[1].rgb, model(rays(), True, generator=g)[1].rgb
    assert not torch.equal(c, d)
    assert torch.equal(model(rays(), True, generator=g.manual_seed(0))[1].rgb, c)


def test_counter_random_does_not_depend_on_chunks() -> None:
    model = MipNerf(MipNerfConfig(**TINY, density_noise=1.0)).double()
    batch = rays().flatten().map(lambda x: x.double())
    rows = torch.arange(12)
    whole = model(batch, True, generator=CounterRandom(3, 7, rows))[1].rgb
    parts = [
        model(batch.map(lambda x, k=k: x[k : k + 4]), True, generator=CounterRandom(3, 7, rows[k : k + 4]))[
            1
        ].rgb
        for k in (0, 4, 8)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-14)
    other = model(batch, True, generator=CounterRandom(3, 8, rows))[1].rgb
    assert not torch.allclose(other, whole)


def test_density_noise_only_when_randomized() -> None:
    noisy, clean = MipNerf(MipNerfConfig(**TINY, density_noise=5.0)), MipNerf(MipNerfConfig(**TINY))
    clean.load_state_dict(noisy.state_dict())
    assert torch.equal(noisy(rays())[1].rgb, clean(rays())[1].rgb)
    generators = [CounterRandom(0, 0, torch.arange(12)) for _ in range(2)]
    a, b = (m(rays(), True, generator=g)[0].rgb for m, g in zip((noisy, clean), generators, strict=True))
    assert not torch.allclose(a, b)


def test_background() -> None:
    model = MipNerf(MipNerfConfig(**TINY))
    white, black = model(rays(), white_background=True)[1], model(rays(), white_background=False)[1]
    torch.testing.assert_close(white.rgb - black.rgb, (1 - black.acc)[..., None].expand(3, 4, 3))


def test_fine_level_is_built_on_the_coarse_weights() -> None:
    model = MipNerf(MipNerfConfig(**TINY, num_levels=3)).double()
    batch = rays().flatten().map(lambda x: x.double())
    levels = model(batch)
    assert len(levels) == 3
    t_vals = reference.sample_t_vals(batch.near, batch.far, 6)
    for level in levels:
        features = reference.frustum_ipe(t_vals, batch.origins, batch.directions, batch.radii)
        rgb, density = model.mlp(features, reference.pos_enc(batch.viewdirs, 0, 4))
        want = reference.composite(
            torch.sigmoid(rgb) * 1.002 - 0.001,
            torch.nn.functional.softplus(density - 1),
            t_vals,
            batch.directions,
        )
        torch.testing.assert_close(level.rgb, want.rgb, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(level.distance, want.distance, rtol=1e-10, atol=1e-12)
        t_vals = reference.resample(t_vals, want.weights)


def test_ablations_change_what_they_name() -> None:
    torch.manual_seed(0)
    separate = MipNerf(MipNerfConfig(**TINY, separate_mlps=True))
    assert len(separate.mlps) == 2 and separate.mlp is separate.mlps[0]
    assert not any(name.startswith("mlp.") for name, _ in separate.named_parameters())
    coarse, _ = separate(rays())
    coarse.rgb.sum().backward()
    assert separate.mlps[1].linears[0].weight.grad is None
    base = MipNerf(MipNerfConfig(**TINY))
    no_ipe = MipNerf(MipNerfConfig(**TINY, disable_integration=True))
    no_ipe.load_state_dict(base.state_dict())
    wide = rays()._replace(radii=torch.full((3, 4, 1), 0.5))
    assert torch.equal(no_ipe(wide)[0].rgb, no_ipe(rays())[0].rgb)
    assert not torch.allclose(base(wide)[0].rgb, base(rays())[0].rgb)
    no_views = MipNerf(MipNerfConfig(**TINY, use_viewdirs=False))
    assert len(no_views.mlp.linears) == 5 + 2
    turned = rays()._replace(viewdirs=-rays().viewdirs)
    assert torch.equal(no_views(turned)[1].rgb, no_views(rays())[1].rgb)


def test_nerf_uses_the_union_of_points_and_a_last_interval_without_end() -> None:
    model = Nerf(NerfConfig(num_coarse=5, num_fine=7, net_width=16, net_depth=2))
    coarse, fine = model(rays())
    assert coarse.weights.shape[-1] == 5 and fine.weights.shape[-1] == 12
    for parameter in model.mlps[1].linears[2].parameters():
        torch.nn.init.constant_(parameter, 0.01)  # a small positive raw density is opaque at the end
    _, fine = model(rays())
    torch.testing.assert_close(fine.acc, torch.ones_like(fine.acc))


def test_query_agrees_with_a_thin_ray() -> None:
    model = MipNerf(MipNerfConfig(**TINY)).double()
    point, view = torch.tensor([[0.1, 0.2, 0.3]]).double(), torch.tensor([[0.0, 0.0, -1.0]]).double()
    rgb, density = model.query(point, view, 0.1)
    features = reference.integrated_pos_enc(point[:, None], torch.full((1, 1, 3), 0.01).double(), 0, 16)
    raw_rgb, raw_density = model.mlp(features, reference.pos_enc(view, 0, 4))
    torch.testing.assert_close(density[0], torch.nn.functional.softplus(raw_density[0, 0, 0] - 1))
    torch.testing.assert_close(rgb[0], torch.sigmoid(raw_rgb[0, 0]) * 1.002 - 0.001)


def test_rays_can_be_differentiated() -> None:
    model = MipNerf(MipNerfConfig(**TINY)).double()
    c2w = torch.eye(4, dtype=torch.float64)[:3].requires_grad_()
    model(cameras.pinhole_rays(c2w, 3, 4, 5.0))[0].rgb.sum().backward()
    assert c2w.grad is not None and c2w.grad.isfinite().all() and (c2w.grad != 0).any()
