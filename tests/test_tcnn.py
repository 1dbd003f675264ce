"""The adapter of tiny-cuda-nn against a stand-in with its documented interface; the real one has not been run."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mipnerf_fast import MipNerf, MipNerfConfig, use_backend
from mipnerf_fast.ops import MipMLP, MlpShape

SHAPE = MlpShape(24, 9, 3, 32, 2, 16, 3)


class Network(nn.Module):
    """tinycudann.Network as its documentation has it: one flat float32 `params`, fp16 outputs, no biases; inputs are
    padded with ones to whole multiples of 16 columns."""

    def __init__(
        self, n_input_dims: int, n_output_dims: int, network_config: dict[str, Any], seed: int = 1337
    ) -> None:
        super().__init__()
        assert network_config.keys() == {
            "otype",
            "activation",
            "output_activation",
            "n_neurons",
            "n_hidden_layers",
        }
        assert network_config["otype"] == "FullyFusedMLP" and network_config["n_neurons"] in (16, 32, 64, 128)
        assert network_config["activation"] == "ReLU" and network_config["output_activation"] == "None"
        width, layers = network_config["n_neurons"], network_config["n_hidden_layers"]
        assert layers >= 1
        self.n_input_dims, self.n_output_dims, self.seed = n_input_dims, n_output_dims, seed
        self.padded = -(-n_input_dims // 16) * 16
        widths = [self.padded, *[width] * layers, -(-n_output_dims // 16) * 16]
        self.shapes = list(zip(widths[1:], widths[:-1], strict=True))
        generator = torch.Generator().manual_seed(seed)
        flat = [
            (torch.rand(o * i, generator=generator) - 0.5) * (24 / (i + o)) ** 0.5 for o, i in self.shapes
        ]
        self.params = nn.Parameter(torch.cat(flat))

    def forward(self, x: Tensor) -> Tensor:
        assert (
            x.dim() == 2 and x.shape[1] == self.n_input_dims and x.shape[0] > 0 and x.dtype == torch.float32
        )
        x = torch.nn.functional.pad(x, (0, self.padded - self.n_input_dims), value=1.0).half()
        start = 0
        for number, (o, i) in enumerate(self.shapes):
            weight = self.params[start : start + o * i].view(o, i).half()
            start += o * i
            x = x @ weight.T
            x = torch.relu(x) if number < len(self.shapes) - 1 else x
        return x[:, : self.n_output_dims]


@pytest.fixture
def tinycudann(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tinycudann")
    module.Network = Network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tinycudann", module)


@pytest.mark.usefixtures("tinycudann")
@pytest.mark.parametrize("views", [True, False])
def test_networks_outputs_and_gradients(views: bool) -> None:
    shape = SHAPE if views else SHAPE._replace(view_features=None)
    mlp = MipMLP(*shape, backend="tcnn")
    names = [name for name, _ in mlp.named_parameters()]
    assert names == ["tcnn.trunk.params", *(["tcnn.colour.params"] if views else [])]
    assert len(mlp.linears) == 0
    features = torch.rand(5, 7, 24, requires_grad=True)
    viewdirs_enc = torch.rand(5, 9, requires_grad=True) if views else None
    rgb, density = mlp(features, viewdirs_enc)
    assert rgb.shape == (5, 7, 3) and density.shape == (5, 7, 1)
    assert rgb.dtype == density.dtype == torch.float32
    leaves = [x for x in (features, viewdirs_enc, *mlp.parameters()) if x is not None]
    grads = torch.autograd.grad(rgb.sum() + density.sum(), leaves)
    assert all(float(grad.abs().max()) > 0 for grad in grads)
    # Samples of a ray share its direction; each row is computed for itself.
    alone = mlp(features[2:3, 4:5], None if viewdirs_enc is None else viewdirs_enc[2:3])
    torch.testing.assert_close(alone[0][0, 0], rgb[2, 4], rtol=2**-8, atol=2**-10)


@pytest.mark.usefixtures("tinycudann")
def test_named_as_another_architecture() -> None:
    mlp = MipMLP(*SHAPE, backend="tcnn")
    assert mlp.implementation[:2] == ("tcnn", torch.float16)
    assert "another architecture than mip-NeRF's" in mlp.implementation.why
    assert mlp.feature_dtype is None
    with (
        use_backend("reference"),
        pytest.raises(RuntimeError, match="set to reference, and there is none of tiny-cuda-nn's"),
    ):
        mlp(torch.rand(1, 2, 24), torch.rand(1, 9))
    with pytest.raises(RuntimeError, match="Missing key"):
        MipMLP(*SHAPE).load_state_dict(mlp.state_dict())


@pytest.mark.usefixtures("tinycudann")
def test_in_a_model_seeded_and_empty() -> None:
    config = MipNerfConfig(
        num_samples=4, net_depth=2, net_width=32, net_width_condition=16, skip_layer=2, mlp_backend="tcnn"
    )
    torch.manual_seed(5)
    first = MipNerf(config)
    torch.manual_seed(5)
    second, third = MipNerf(config), MipNerf(config)
    assert torch.equal(first.mlp.tcnn.trunk.params, second.mlp.tcnn.trunk.params)  # type: ignore[union-attr]
    assert not torch.equal(second.mlp.tcnn.trunk.params, third.mlp.tcnn.trunk.params)  # type: ignore[union-attr]
    rgb, density = first.mlp(torch.rand(0, 4, 96), torch.rand(0, 27))
    assert rgb.shape == (0, 4, 3) and density.shape == (0, 4, 1)


@pytest.mark.usefixtures("tinycudann")
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"net_width": 256}, {}, "net_width to be 16, 32, 64 or 128, got 256"),
        ({"net_width_condition": 48}, {}, "net_width_condition to be 16, 32, 64 or 128, got 48"),
        ({"skip_layer": 2}, {}, r"skip_layer of at least net_depth = 3 \(it has no skips\), got 2"),
        ({"net_depth_condition": 0}, {}, "net_depth_condition of at least 1, got 0"),
        ({}, {"compute_dtype": "bf16"}, 'compute_dtype "auto" or "fp16", got \'bf16\''),
    ],
)
def test_what_it_cannot_express_is_refused(
    change: dict[str, int], options: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=f'the backend "tcnn" .*another architecture.* wants {message}'):
        MipMLP(*SHAPE._replace(**change), backend="tcnn", **options)  # type: ignore[arg-type]


def test_missing_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tinycudann", None)
    with pytest.raises(RuntimeError, match=r"tiny-cuda-nn, which (is not installed|cannot be imported)"):
        MipMLP(*SHAPE, backend="tcnn")
    monkeypatch.delitem(sys.modules, "tinycudann")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(
        RuntimeError, match=r"not installed; .*pip install --no-build-isolation .*tiny-cuda-nn"
    ):
        MipMLP(*SHAPE, backend="tcnn")


def test_where_it_finds_no_gpu_its_reason_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "tinycudann.py").write_text("raise EnvironmentError('Unknown compute capability.')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tinycudann", raising=False)
    with pytest.raises(RuntimeError, match=r"cannot be imported: Unknown compute capability\."):
        MipMLP(*SHAPE, backend="tcnn")
