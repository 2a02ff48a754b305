"""UNetConfig: valid and invalid options, messages, derived values."""

import dataclasses
import json
import warnings

import pytest
import torch

from support.networks import relative_error, small
from unet_denoiser import UNet, UNetConfig

VALID = {"model_channels": 16, "channel_mult": (1, 2, 3), "num_heads": 4, "image_size": 32}

# (options, exception, what its message holds: the field, the value, and something valid)
REFUSED = [
    ({"in_channels": 0}, ValueError, ["in_channels=0", "at least 1"]),
    ({"in_channels": 3.0}, TypeError, ["in_channels=3.0", "int of at least 1"]),
    ({"in_channels": True}, TypeError, ["in_channels=True", "int of at least 1"]),
    ({"time_cond_dim": 0}, ValueError, ["time_cond_dim=0", "at least 1 or None"]),
    ({"stem_channels": 0}, ValueError, ["stem_channels=0", "at least 1 or None"]),
    ({"only_cross_attention": 1}, TypeError, ["only_cross_attention=1", "True or False"]),
    ({"only_cross_attention": True}, ValueError, ["only_cross_attention=True", "attention='transformer'"]),
    ({"only_cross_attention": (True, False)}, ValueError, ["only_cross_attention=(True, False)", "there are 3 levels"]),
    ({"out_channels": -3}, ValueError, ["out_channels=-3", "at least 1"]),
    ({"out_channels": "3"}, TypeError, ["out_channels='3'", "int of at least 1"]),
    ({"model_channels": 1}, ValueError, ["model_channels=1", "at least 2"]),
    ({"model_channels": None}, TypeError, ["model_channels=None", "int of at least 2"]),
    ({"num_res_blocks": 0}, ValueError, ["num_res_blocks=0", "at least 1"]),
    ({"num_res_blocks": (1, 2, 2)}, TypeError, ["num_res_blocks=(1, 2, 2)", "int of at least 1"]),
    ({"attention_resolutions": 16}, TypeError, ["attention_resolutions=16", "tuple or list", "(1, 2)"]),
    ({"attention_resolutions": (0,)}, ValueError, ["attention_resolutions=0", "at least 1"]),
    ({"attention_resolutions": (16.0,)}, TypeError, ["attention_resolutions=16.0", "int of at least 1"]),
    ({"channel_mult": 2}, TypeError, ["channel_mult=2", "tuple or list", "(1, 2)"]),
    ({"channel_mult": ()}, ValueError, ["channel_mult=()", "(1, 2, 4, 8)"]),
    ({"channel_mult": (1, 0, 2)}, ValueError, ["channel_mult=(1, 0, 2)", "whole number", "(1, 2, 4, 8)"]),
    ({"channel_mult": (1, -1, 2)}, ValueError, ["channel_mult=(1, -1, 2)", "whole number", "(1, 2, 4, 8)"]),
    ({"channel_mult": (1, 1.3, 2)}, ValueError, ["channel_mult=(1, 1.3, 2)", "1.3", "model_channels=16"]),
    ({"channel_mult": (1, "2", 2)}, ValueError, ["channel_mult=(1, '2', 2)", "'2'", "(1, 2, 4, 8)"]),
    ({"channel_mult": (1, float("nan"), 2)}, ValueError, ["channel_mult=(1, nan, 2)", "(1, 2, 4, 8)"]),
    ({"channel_mult": (1, float("inf"), 2)}, ValueError, ["channel_mult=(1, inf, 2)", "(1, 2, 4, 8)"]),
    ({"num_heads": 5}, ValueError, ["num_heads=5", "level 1's 32 channels", "1, 2, 4, 8, 16, 32"]),
    ({"num_heads": 0}, ValueError, ["num_heads=0", "at least 1"]),
    ({"num_heads": 2.0}, TypeError, ["num_heads=2.0", "int of at least 1"]),
    ({"num_heads": (1, 2)}, ValueError, ["num_heads=(1, 2)", "2 entries", "3 levels", "one int or one each"]),
    ({"num_heads": (1, 3, 4), "attention_resolutions": (16,)}, ValueError, ["num_heads=3", "32 channels", "level 1"]),
    ({"num_heads": (1, None, 4)}, TypeError, ["num_heads=None", "int of at least 1"]),
    ({"head_dim": 8}, ValueError, ["num_heads=4", "head_dim=8", "exactly one", "num_heads=None and head_dim=64"]),
    ({"num_heads": None}, ValueError, ["num_heads=None", "head_dim=None", "exactly one", "num_heads=8"]),
    ({"num_heads": None, "head_dim": 32}, ValueError, ["head_dim=32", "48 channels", "16, 24, 48"]),
    ({"num_heads": None, "head_dim": (8, 8)}, ValueError, ["head_dim=(8, 8)", "2 entries", "3 levels"]),
    ({"context_dim": 0}, ValueError, ["context_dim=0", "at least 1 or None"]),
    ({"context_dim": 768.0}, TypeError, ["context_dim=768.0", "int of at least 1 or None"]),
    ({"image_size": 0}, ValueError, ["image_size=0", "at least 1"]),
    ({"image_size": 32.0}, TypeError, ["image_size=32.0", "int of at least 1"]),
    ({"image_size": (32, 32, 32)}, ValueError, ["image_size=(32, 32, 32)", "3 axes", "dims=2", "one int"]),
    ({"image_size": (32, 0)}, ValueError, ["image_size=0", "at least 1"]),
    ({"dims": 4}, ValueError, ["dims=4", "1, 2, 3"]),
    ({"dims": True}, ValueError, ["dims=True", "1, 2, 3"]),
    ({"dims": 2.0}, ValueError, ["dims=2.0", "1, 2, 3"]),
    ({"num_classes": 0}, ValueError, ["num_classes=0", "at least 1 or None"]),
    ({"num_classes": "10"}, TypeError, ["num_classes='10'", "int of at least 1 or None"]),
    ({"vector_dim": -1}, ValueError, ["vector_dim=-1", "at least 1 or None"]),
    ({"vector_dim": False}, TypeError, ["vector_dim=False", "int of at least 1 or None"]),
    ({"learned_null": None}, TypeError, ["learned_null=None", "True or False"]),
    ({"learned_null": 1}, TypeError, ["learned_null=1", "True or False"]),
    ({"attention": "linear"}, ValueError, ["attention='linear'", "'plain', 'transformer'"]),
    ({"transformer_depth": 2}, ValueError, ["transformer_depth=2", "attention='transformer'", "leave it at 1"]),
    ({"attention": "transformer", "transformer_depth": 0}, ValueError, ["transformer_depth=0", "level", ">= 1"]),
    ({"attention": "transformer", "transformer_depth": (1, 0, 1)}, ValueError, ["=(1, 0, 1)", "level 1", ">= 1"]),
    ({"attention": "transformer", "transformer_depth": (1, 1)}, ValueError, ["transformer_depth=(1, 1)", "3 levels"]),
    ({"attention": "transformer", "transformer_depth": 1.0}, TypeError, ["transformer_depth=1.0", "int of at least 0"]),
    ({"modulation": "film"}, ValueError, ["modulation='film'", "'add', 'scale_shift'"]),
    ({"downsample": "max"}, ValueError, ["downsample='max'", "'conv_asymmetric'", "'avgpool'", "'resblock'"]),
    ({"upsample": "bilinear"}, ValueError, ["upsample='bilinear'", "'conv_transpose', 'nearest', 'resblock'"]),
    ({"norm_groups": 0}, ValueError, ["norm_groups=0", "at least 1"]),
    ({"norm_groups": None}, TypeError, ["norm_groups=None", "int of at least 1"]),
    ({"norm_eps": 0}, ValueError, ["norm_eps=0", "1e-5"]),
    ({"norm_eps": float("nan")}, ValueError, ["norm_eps=nan", "1e-5"]),
    ({"norm_eps": "1e-5"}, ValueError, ["norm_eps='1e-5'", "1e-5"]),
    ({"dropout": 1.0}, ValueError, ["dropout=1.0", "[0, 1)", "0.1"]),
    ({"dropout": -0.1}, ValueError, ["dropout=-0.1", "[0, 1)", "0.1"]),
    ({"dropout": float("nan")}, ValueError, ["dropout=nan", "[0, 1)", "0.1"]),
    ({"dropout": True}, ValueError, ["dropout=True", "[0, 1)", "0.1"]),
    ({"time_frequencies": "full"}, ValueError, ["time_frequencies='full'", "'endpoint', 'half'"]),
    ({"conventions": ("other",)}, ValueError, ["conventions=('other',)", "sines_first, cosines_first"]),
    ({"conventions": "projection"}, TypeError, ["conventions='projection'", "tuple"]),
]


@pytest.mark.parametrize(("options", "error", "parts"), REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_invalid_options_are_refused_with_a_valid_value(options, error, parts):
    with pytest.raises(error) as caught:
        UNetConfig(**VALID | options)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message


def test_every_field_has_a_refused_value():
    refused = {name for options, _, _ in REFUSED for name in options}
    assert refused == {f.name for f in dataclasses.fields(UNetConfig)}


def test_every_default_is_the_documented_one():
    config = UNetConfig(3, 128, 3, 2, [16, 8], [1, 2, 4, 8], 8, 768)  # the specification's, by position
    assert config == UNetConfig()
    expected = {
        "image_size": 64,
        "dims": 2,
        "head_dim": None,
        "num_classes": None,
        "vector_dim": None,
        "time_cond_dim": None,
        "learned_null": True,
        "attention": "plain",
        "transformer_depth": 1,
        "only_cross_attention": False,
        "modulation": "add",
        "stem_channels": None,
        "downsample": "conv",
        "upsample": "conv_transpose",
        "norm_groups": 32,
        "norm_eps": 1e-5,
        "dropout": 0.1,
        "time_frequencies": "endpoint",
        "conventions": (),
    }
    assert dict(list(dataclasses.asdict(config).items())[8:]) == expected
    with pytest.raises(TypeError):
        UNetConfig(3, 128, 3, 2, (16, 8), (1, 2, 4, 8), 8, 768, 64)  # the rest is by keyword only


def test_is_frozen_and_hashable():
    config = UNetConfig(channel_mult=[1, 2, 4, 8], attention_resolutions=[16, 8])
    assert hash(config) == hash(UNetConfig())
    assert config.channel_mult == (1, 2, 4, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dropout = 0.5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_size": [32, 28], "num_heads": [1, 2, 3], "num_classes": 10, "vector_dim": 2, "context_dim": None},
        {"attention": "transformer", "transformer_depth": [0, 2, 1], "attention_resolutions": [16], "dropout": 0},
        {"num_heads": None, "head_dim": [4, 8, 16], "channel_mult": [1, 1.5, 2.0], "dims": 3, "norm_eps": 1e-6},
    ],
)
def test_json_round_trip(options):
    config = UNetConfig(**VALID | options)
    stored = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert UNetConfig.from_dict(stored) == config
    assert set(stored) == {f.name for f in dataclasses.fields(UNetConfig)}


def test_from_dict_takes_defaults_and_refuses_unknown_options():
    assert UNetConfig.from_dict({"model_channels": 32}) == UNetConfig(model_channels=32)
    with pytest.raises(ValueError, match=r"unknown.*'width'.*model_channels"):
        UNetConfig.from_dict({"model_channels": 32, "width": 3})


def test_widths():
    config = UNetConfig(**VALID | {"channel_mult": (1, 1.5, 0.25)})
    assert config.widths == (16, 24, 4)
    assert all(type(width) is int for width in config.widths)
    assert UNetConfig(**VALID).time_dim == 64


@pytest.mark.parametrize(
    ("image_size", "dims", "expected"),
    [
        (64, 2, (64, 32, 16, 8)),
        (28, 2, (28, 14, 7, 4)),  # halves round up, as the network's downsampling does
        (33, 1, (33, 17, 9, 5)),
        ((24, 40), 2, (40, 20, 10, 5)),  # the longest axis counts
        ((7, 5, 3), 3, (7, 4, 2, 1)),
        (1, 2, (1, 1, 1, 1)),
    ],
)
def test_resolutions(image_size, dims, expected):
    config = UNetConfig(image_size=image_size, dims=dims, attention_resolutions=())
    assert config.resolutions == expected


@pytest.mark.parametrize(
    ("image_size", "resolutions", "levels"),
    [(64, (16, 8), {2, 3}), (28, (7,), {2}), (28, (14, 4), {1, 3}), ((20, 36), (9, 36), {0, 2}), (32, (), set())],
)
def test_attention_is_placed_by_resolution(image_size, resolutions, levels):
    config = UNetConfig(image_size=image_size, attention_resolutions=resolutions)
    assert {level for level in range(4) if config.has_attention(level)} == levels


@pytest.mark.parametrize("image_size", [48, (16, 48)])
def test_warns_when_attention_matches_no_level(image_size):
    with pytest.warns(UserWarning, match=r"attention_resolutions=\(16, 8\).*\(48, 24, 12, 6\)") as caught:
        UNet(image_size=image_size, model_channels=8)
    assert caught[0].filename == __file__  # it points at the caller


@pytest.mark.parametrize("options", [{}, {"attention_resolutions": ()}, {"image_size": 128}])
def test_no_warning_for_valid_options(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UNetConfig(**options)


def test_heads_per_level():
    by_number = UNetConfig(**VALID | {"num_heads": (1, 2, 3)})
    assert [by_number.heads(level) for level in range(3)] == [1, 2, 3]
    by_width = UNetConfig(**VALID | {"num_heads": None, "head_dim": 8})
    assert [by_width.heads(level) for level in range(3)] == [2, 4, 6]
    by_widths = UNetConfig(**VALID | {"num_heads": None, "head_dim": (16, 8, 6)})
    assert [by_widths.heads(level) for level in range(3)] == [1, 4, 8]


def test_heads_are_checked_only_at_levels_with_attention():
    UNetConfig(**VALID | {"num_heads": 3, "attention_resolutions": ()})  # 16 and 32 channels: no attention there


def test_skip_levels_of_stable_diffusion():
    """The twelve residuals of Stable Diffusion's control networks (Zhang et al. 2023, figure 3)."""
    config = UNetConfig(model_channels=320, channel_mult=(1, 2, 4, 4))
    assert config.skip_levels == (
        *[(0, 320)] * 3,
        (1, 320),
        *[(1, 640)] * 2,
        (2, 640),
        *[(2, 1280)] * 2,
        *[(3, 1280)] * 3,
    )


def test_warns_of_one_channel_per_norm_group():
    """With one channel per group, GroupNorm removes what is added to whole channels: the output ignores t."""
    with pytest.warns(UserWarning, match=r"norm_groups=32 leaves one channel per group .* give norm_groups=4"):
        unresponsive = small(model_channels=16, channel_mult=(1, 1), norm_groups=32)
    x = torch.randn(1, 3, 8, 8)

    def change(model):
        return relative_error(model(x, torch.tensor([900])), model(x, torch.tensor([10])))

    assert change(unresponsive) < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert change(small(model_channels=16, channel_mult=(1, 1), norm_groups=4)) > 1e-2
        UNetConfig(
            model_channels=16, channel_mult=(1, 1), num_heads=1, modulation="scale_shift", attention_resolutions=()
        )
        UNetConfig()


@pytest.mark.parametrize("widths", [(88, 120), (56, 232), (352, 480), (49, 147, 343), (3, 7)])
def test_widths_of_any_ratio_are_exact(widths):
    mults = tuple(width / widths[0] for width in widths)
    options = {"num_heads": 1, "attention_resolutions": (), "modulation": "scale_shift"}
    assert UNetConfig(model_channels=widths[0], channel_mult=mults, **options).widths == widths
