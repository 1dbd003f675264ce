"""Configurations: the official defaults, presets, round trips and refusals."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from mipnerf_fast import InputError, MipNerfConfig, NerfConfig, TrainConfig, preset
from mipnerf_fast.config import (
    NOT_OF_FAST_MODEL,
    PRESET_NOTES,
    PRESETS,
    FastConfig,
    check_options,
    from_dict,
    to_dict,
)


def test_defaults_are_the_papers() -> None:
    config = TrainConfig()
    assert (config.batch_size, config.max_steps, config.coarse_loss_mult) == (4096, 1_000_000, 0.1)
    assert (config.lr_init, config.lr_final, config.lr_delay_steps, config.lr_delay_mult) == (
        5e-4,
        5e-6,
        2500,
        0.01,
    )
    assert (config.grad_max_value, config.grad_max_norm, config.weight_decay_mult) == (0, 0, 0)
    assert preset("paper") == config


def test_presets_differ_from_the_paper_in_what_they_name() -> None:
    paper = to_dict(preset("paper"))
    changes = {
        name: {k for k, v in to_dict(preset(name)).items() if k != "model" and v != paper[k]}
        | {k for k, v in to_dict(preset(name))["model"].items() if v != paper["model"].get(k)}
        for name in PRESETS
    }
    assert changes["paper-single-scale"] == {"batching"}
    assert changes["no-ipe"] == {"disable_integration"}
    assert changes["no-area-loss"] == {"disable_multiscale_loss"}
    assert changes["no-misc"] == {"density_activation", "density_bias", "rgb_padding"}
    assert changes["separate-mlps"] == {"separate_mlps"}
    nerf = preset("nerf")
    assert isinstance(nerf.model, NerfConfig) and nerf.coarse_loss_mult == 1 and nerf.disable_multiscale_loss
    assert set(PRESET_NOTES) == set(PRESETS)


@pytest.mark.parametrize("name", list(PRESETS))
def test_round_trip_through_json(name: str) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(preset(name))))) == preset(name)


def test_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(InputError, match="'papper', expected one of paper, paper-single-scale, nerf"):
        preset("papper")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": 0}, "max_steps: must be at least 1, got 0"),
        ({"batch_size": -3}, "batch_size: must be at least 1, got -3"),
        ({"lr_init": 0.0}, "lr_init: must be positive"),
        ({"lr_final": float("nan")}, "lr_final: must be positive"),
        ({"loss": "huber"}, "loss: expected one of mse, smooth_l1, charbonnier, got 'huber'"),
        ({"batching": "rays"}, "batching: expected one of"),
        ({"seed": 2**63}, "seed: must be below"),
    ],
)
def test_bad_values_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TrainConfig(), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"max_deg_point": 0}, "max_deg_point: must exceed min_deg_point = 0, got 0"),
        ({"ray_shape": "box"}, "ray_shape"),
        ({"stop_level_grad": False}, "stop_level_grad"),
        ({"density_activation": "exp"}, "density_activation"),
    ],
)
def test_bad_models_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MipNerfConfig(**change)  # type: ignore[arg-type]


def test_bad_dictionaries_are_named() -> None:
    good = to_dict(TrainConfig())
    with pytest.raises(InputError, match=r"run/config\.json: unknown field 'batchsize'"):
        from_dict({**good, "batchsize": 3}, "run/config.json")
    with pytest.raises(InputError, match="missing field 'loss'"):
        from_dict({k: v for k, v in good.items() if k != "loss"})
    with pytest.raises(InputError, match="batch_size: expected int, found '4096'"):
        from_dict({**good, "batch_size": "4096"})
    with pytest.raises(
        InputError, match=r"model\.kind: expected one of mipnerf, nerf, fast, found 'gaussians'"
    ):
        from_dict({**good, "model": {"kind": "gaussians"}})
    with pytest.raises(InputError, match="model: expected an object, found NoneType"):
        from_dict({k: v for k, v in good.items() if k != "model"})


_OF_THE_EXACT_MODEL = {
    "batching": "single_image",
    "grad_max_value": 0.1,
    "grad_max_norm": 1.0,
    "weight_decay_mult": 1e-4,
    "coarse_loss_mult": 0.5,
    "loss": "mse",
    "disable_multiscale_loss": False,
    "chunk_rays": 64,
}


@pytest.mark.parametrize("name", list(NOT_OF_FAST_MODEL))
def test_options_of_the_exact_model_alone_are_refused(name: str) -> None:
    value = _OF_THE_EXACT_MODEL[name]
    config = dataclasses.replace(preset("fast"), **{name: value})  # type: ignore[arg-type]
    # Made and read it is: runs from before may hold it.
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    default = re.escape(repr(getattr(preset("fast"), name)))
    with pytest.raises(
        InputError, match=rf"^TrainConfig\.{name}: is {re.escape(repr(value))}, .*; leave it at {default}$"
    ):
        check_options(config)
    check_options(dataclasses.replace(preset("paper"), **{name: value}))  # type: ignore[arg-type]


def test_every_other_option_is_the_fast_models_too() -> None:
    check_options(preset("fast"))
    assert set(_OF_THE_EXACT_MODEL) == set(NOT_OF_FAST_MODEL)
    changed = dict(loss_beta=0.5, lr_init=1e-3, max_skips=7, max_skips_in_row=3, capture=False, seed=5)
    check_options(dataclasses.replace(preset("fast"), **changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [MipNerfConfig(), FastConfig()])
def test_files_from_before_a_field_still_load(model: MipNerfConfig | FastConfig) -> None:
    config = TrainConfig(model=model)
    values = to_dict(config)
    for name in ("capture", "deterministic", "max_skips_in_row", "max_skips"):
        del values[name]
    added = ("mlp_backend", "mlp_dtype", "mlp_deterministic", "sampling", "proposal_samples")
    values["model"] = {name: value for name, value in values["model"].items() if name not in added}
    if isinstance(model, FastConfig):
        del values["model"]["num_samples"], values["model"]["lindisp"]
    assert from_dict(values) == config
    # What was there from the beginning has to be there.
    values["model"].pop("ray_shape" if isinstance(model, MipNerfConfig) else "levels")
    with pytest.raises(InputError, match="missing field"):
        from_dict(values)
