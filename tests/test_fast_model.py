"""The fast model as it is rendered: what is made of its parameters once a picture, in what precision, how wide."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_fast_step import SMALL, _model
from test_proposal import TINY as PROPOSAL
from torch._subclasses.fake_tensor import FakeTensorMode

from mipnerf_fast import FastConfig, InputError, ops, use_backend
from mipnerf_fast.cameras import Rays, pinhole_rays
from mipnerf_fast.fast_model import FastModel
from mipnerf_fast.model import build_model
from mipnerf_fast.ops import keeping_weights
from mipnerf_fast.ops.fast_step import FastFields
from mipnerf_fast.proposal_model import ProposalModel
from mipnerf_fast.rendering import render_image
from mipnerf_fast.training import _device_of_fast_model


def _rays() -> Rays:
    c2w = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4]])
    return pinhole_rays(c2w, 9, 7, 8.0)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[FastFields]:
    """What `FastModel.fields` was asked for."""
    made: list[FastFields] = []
    fields = FastModel.fields

    def counting(self: FastModel) -> FastFields:
        made.append(fields(self))
        return made[-1]

    monkeypatch.setattr(FastModel, "fields", counting)
    return made


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_picture_makes_its_fields_once(backend: str, counted: list[FastFields]) -> None:
    model, rays = _model(SMALL), _rays()
    # The reference's products are summed in another order for another number of rays.
    rounding = 0.0 if backend == "native" else 32 * 2.0**-23
    with use_backend(backend):
        whole = model.render_rays(rays)
        counted.clear()
        first = render_image(model, rays, chunk_rays=32)
        assert len(counted) == 1
        torch.testing.assert_close(first.rgb, whole.rgb, rtol=0, atol=rounding)
        with torch.no_grad():
            model.tables.uniform_(-2, 2)
        model.scale_range.copy_(torch.tensor([1e-3, 4e-3]))
        second = render_image(model, rays, chunk_rays=32)
        assert len(counted) == 2 and counted[1].scale_high == pytest.approx(4e-3)
        assert (first.rgb - second.rgb).abs().max() > 0.01
        torch.testing.assert_close(second.rgb, model.render_rays(rays).rgb, rtol=0, atol=rounding)


def test_tables_are_copied_once_a_picture_and_anew_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where they are read in float16: here by a kernel that stands in for it."""
    model, rays, seen = _model(SMALL), _rays(), []

    def rendered(marched: object, fields: FastFields) -> tuple[torch.Tensor, ...]:
        seen.append(fields.tables)
        return render(marched, fields._replace(tables=fields.tables.float()))  # type: ignore[arg-type]

    render = ops.fast_render
    monkeypatch.setattr(ops, "fast_render", rendered)
    monkeypatch.setattr(FastModel, "rendered_tables", torch.float16)
    first = render_image(model, rays, chunk_rays=10)
    assert len(seen) == 7 and len({id(tables) for tables in seen}) == 1
    assert torch.equal(seen[0], model.tables.detach().half())
    with torch.no_grad():
        model.tables.mul_(-1)
    second = render_image(model, rays, chunk_rays=10)
    assert torch.equal(seen[7], model.tables.detach().half()) and not torch.equal(first.rgb, second.rgb)
    model.render_rays(rays)
    model.render_rays(rays)
    assert seen[14] is not seen[15]  # nothing is kept where nobody says that it may be
    with keeping_weights(model), keeping_weights(model):
        model.render_rays(rays)
    assert model._kept is None


def test_a_backend_has_fields_of_its_own(counted: list[FastFields]) -> None:
    model, rays = _model(SMALL), _rays()
    with keeping_weights(model):
        for backend in ("native", "reference", "native"):
            with use_backend(backend):
                model.render_rays(rays)
    assert len(counted) == 2


def test_the_proposals_range_is_fetched_once_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rays, fetched = build_model(PROPOSAL), _rays(), []
    tolist = torch.Tensor.tolist

    def counting(self: torch.Tensor) -> object:
        if self is model.scale_range:
            fetched.append(self)
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counting)
    whole = model.render_rays(rays)
    assert len(fetched) == 2  # of the proposal and of the final level
    assert torch.equal(render_image(model, rays, chunk_rays=63).rgb, whole.rgb)
    assert len(fetched) == 3
    render_image(model, rays, chunk_rays=10)
    assert len(fetched) == 4


def _on_gpu(config: FastConfig) -> FastModel:
    """A model whose parameters say that they are on a GPU; there is no memory behind them, and nothing in it."""
    with FakeTensorMode(), torch.device("cuda"), pytest.MonkeyPatch.context() as patch:
        for kind in (FastModel, ProposalModel):
            patch.setattr(kind, "reset_parameters", lambda self: None)
        model = build_model(config)
    assert isinstance(model, FastModel) and model.tables.is_cuda
    return model


@pytest.mark.parametrize(
    ("capability", "dtype", "wanted"),
    [
        ((9, 0), "auto", "float32; tables float16, products tf32"),
        ((9, 0), "fp32", "float32; tables float16"),
        ((7, 5), "auto", "float32; tables float16"),
    ],
)
def test_precision_is_the_models(
    capability: tuple[int, int], dtype: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    config = dataclasses.replace(SMALL, mlp_dtype=dtype)  # type: ignore[arg-type]
    model = _on_gpu(config)
    assert model.precision == wanted
    with use_backend("reference"):
        assert model.precision == "float32"
    assert FastModel(config).precision == "float32"
    # With a proposal the operators are those of training, and read the tables as they are.
    proposal = _on_gpu(dataclasses.replace(PROPOSAL, mlp_dtype=dtype))  # type: ignore[arg-type]
    assert proposal.precision == wanted.replace("tables float16, ", "").replace("; tables float16", "")


def test_networks_too_wide_for_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = dataclasses.replace(SMALL, net_width=128)
    model = _on_gpu(wide)
    with pytest.raises(
        InputError, match=r"FastConfig.net_width: is 128, but on cuda the kernels take up to 64"
    ):
        model.check_width()
    with pytest.raises(InputError, match=r"FastConfig.net_width: is 128"):
        model.render_rays(_rays())
    with use_backend("reference"):
        model.check_width()
    _on_gpu(dataclasses.replace(SMALL, net_width=64)).check_width()
    FastModel(dataclasses.replace(SMALL, net_width=256)).check_width()
    # Training is told before anything is loaded; on request of any device it goes to the CPU.
    monkeypatch.setattr("mipnerf_fast.training.kernels_for", lambda device: "")
    with pytest.raises(InputError, match=r"--device: .* on cuda: FastConfig.net_width is 128"):
        _device_of_fast_model("cuda", "auto", wide)
    assert _device_of_fast_model("auto", "auto", wide) == "cpu"
    assert _device_of_fast_model("cuda", "auto", SMALL) == "cuda"
