"""UNet: the specification's network, its layout, every option by its effect, and sizes."""

import dataclasses
import inspect

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from support import specification
from support.networks import CONDITIONS, SMALL, as_multihead, inputs, randomise, relative_error, small
from unet_denoiser import CrossAttention, ResBlock, SelfAttention, SinusoidalPosEmb, UNet, UNetConfig
from unet_denoiser.models.layers.attention import ContextAttention
from unet_denoiser.models.layers.conv import Conv2d
from unet_denoiser.models.layers.embeddings import TimeMLP
from unet_denoiser.models.layers.norm import GroupNorm
from unet_denoiser.models.layers.resampling import Downsample, TransposedUpsample
from unet_denoiser.models.layers.resblock import Block

# ---- the specification ---------------------------------------------------------------------------------------------


def test_the_first_eight_parameters_are_those_of_the_specification():
    def listed(cls):
        parameters = list(inspect.signature(cls).parameters.values())[:8]
        return [(p.name, list(p.default) if isinstance(p.default, tuple) else p.default) for p in parameters]

    assert listed(UNet) == listed(specification.UNet)
    assert listed(UNetConfig) == listed(specification.UNet)


@pytest.mark.parametrize("cls", [ResBlock, SinusoidalPosEmb, SelfAttention, CrossAttention])
def test_layers_take_the_parameters_of_the_specification(cls):
    expected = inspect.signature(getattr(specification, cls.__name__)).parameters
    ours = list(inspect.signature(cls).parameters.values())[: len(expected)]
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in expected.values()]


def test_forward_takes_x_t_context_by_position():
    parameters = list(inspect.signature(UNet.forward).parameters.values())[1:]
    assert [(p.name, p.default) for p in parameters[:3]] == [
        ("x", inspect.Parameter.empty),
        ("t", inspect.Parameter.empty),
        ("context", None),
    ]
    assert {p.kind for p in parameters[3:]} == {inspect.Parameter.KEYWORD_ONLY}


def test_unet_takes_every_option_with_its_default():
    theirs, ours = (inspect.signature(cls).parameters for cls in (UNetConfig, UNet))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


def test_the_default_network_runs():
    model = UNet().eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, 8, 8), torch.tensor([5]), torch.randn(1, 4, 768))
    assert torch.equal(out, torch.zeros(1, 3, 8, 8))  # the last convolution starts at zero


def test_the_default_network_has_only_what_the_specification_names():
    with torch.device("meta"):
        model, peer = UNet(), specification.UNet()
    named = {type(m) for m in peer.modules()} - {specification.UNet, nn.MultiheadAttention}
    ours = {ContextAttention, Conv2d, GroupNorm, ResBlock, SinusoidalPosEmb, SelfAttention, CrossAttention}
    ours = {kind.__name__: kind for kind in ours}
    named = {ours.get(kind.__name__, kind) for kind in named if "NonDynamic" not in kind.__name__}
    assert {type(m) for m in model.modules()} == named | {UNet, TimeMLP, Block, Downsample, TransposedUpsample}
    own = {name: p for name, p in model.named_parameters() if name != "null_context"}
    assert sum(p.numel() for p in own.values()) == sum(p.numel() for p in peer.parameters())


@pytest.mark.parametrize("options", [{}, {"num_res_blocks": 1, "channel_mult": (1, 2, 4), "num_heads": 2}])
def test_equals_the_specification(options):
    model = randomise(UNet(model_channels=32, context_dim=12, **options)).eval()
    peer = specification.UNet(model_channels=32, context_dim=12, **options).eval()
    copied = set()
    for name, theirs in peer.named_modules():
        if isinstance(theirs, nn.MultiheadAttention):
            theirs.load_state_dict(as_multihead(model.get_submodule(name)).state_dict())
            copied |= set(theirs.parameters())
        elif not list(theirs.children()) and not name.endswith("out_proj"):
            ours = model.get_submodule(name.removesuffix(".0") if isinstance(theirs, nn.Conv2d) else name)
            theirs.load_state_dict(getattr(ours, "conv", ours).state_dict())
            copied |= set(theirs.parameters())
    assert copied == set(peer.parameters())
    x, t, context = torch.randn(2, 3, 16, 8), torch.tensor([3.0, 700.5]), torch.randn(2, 5, 12)
    with torch.no_grad():
        assert relative_error(model(x, t, context), peer(x, t, context)) < 3e-6


# ---- layout --------------------------------------------------------------------------------------------------------


def test_layers_of_encoder_bottleneck_and_decoder():
    """Encoder block j of level i is entry i(n+1)+j, decoder (L-1-i)(n+1)+j; L = 3 levels, n = 2 blocks here."""
    options = {"channel_mult": (1, 2, 3), "num_res_blocks": 2, "attention_resolutions": (4,), "num_heads": 1}
    model = small(**options)

    def describe(entry):
        layers = list(entry) if isinstance(entry, Block) else [entry]
        return [
            f"Res {m.conv1.in_channels} {m.conv1.out_channels}" if isinstance(m, ResBlock) else type(m).__name__
            for m in layers
        ]

    assert [describe(entry) for entry in model.encoder] == [
        ["Res 8 8"],
        ["Res 8 8"],
        ["Downsample"],
        ["Res 8 16", "SelfAttention"],
        ["Res 16 16", "SelfAttention"],
        ["Downsample"],
        ["Res 16 24"],
        ["Res 24 24"],
    ]
    assert [describe(entry) for entry in model.bottleneck] == [["Res 24 24"], ["SelfAttention"], ["Res 24 24"]]
    assert [describe(entry) for entry in model.decoder] == [
        ["Res 48 24"],
        ["Res 48 24"],
        ["Res 40 24", "TransposedUpsample"],
        ["Res 40 16", "SelfAttention"],
        ["Res 32 16", "SelfAttention"],
        ["Res 24 16", "SelfAttention", "TransposedUpsample"],
        ["Res 24 8"],
        ["Res 16 8"],
        ["Res 16 8"],
    ]


@pytest.mark.parametrize(("levels", "blocks"), [(1, 1), (2, 3), (4, 2)])
def test_lengths_of_encoder_and_decoder(levels, blocks):
    model = small(channel_mult=(1,) * levels, num_res_blocks=blocks, attention_resolutions=())
    assert len(model.encoder) == levels * (blocks + 1) - 1
    assert len(model.decoder) == levels * (blocks + 1) == len(model.config.skip_levels)


def test_submodules_are_declared_in_the_order_they_run():
    model, ran = small(**CONDITIONS, modulation="scale_shift"), []
    leaves = [(name, m) for name, m in model.named_modules() if list(m.parameters(recurse=False)) and name]
    for name, module in leaves:
        module.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    model(**inputs(model.config))
    outer = list(dict.fromkeys(name.split(".")[0] for name in ran))
    assert outer == list(dict.fromkeys(name.split(".")[0] for name, _ in leaves))
    assert set(ran) == {name for name, _ in leaves}


# ---- every option by its effect ------------------------------------------------------------------------------------

TRANSFORMER = {"attention": "transformer"}
TWO_LEVELS = {"attention_resolutions": (8, 4)}  # attention at both levels
PARAMETERS, RESULT = "parameters", "result"
CHANGES = [  # field, another value of it, what that changes, options around it
    ("in_channels", 4, PARAMETERS, {}),
    ("model_channels", 12, PARAMETERS, {}),
    ("out_channels", 6, PARAMETERS, {}),
    ("num_res_blocks", 2, PARAMETERS, {}),
    ("attention_resolutions", (8,), PARAMETERS, {}),
    ("channel_mult", (1, 3), PARAMETERS, {}),
    ("num_heads", 4, RESULT, {}),
    ("num_heads", (1, 2), RESULT, TWO_LEVELS),
    ("context_dim", 7, PARAMETERS, {}),
    ("image_size", 4, PARAMETERS, {}),
    ("image_size", (3, 4), PARAMETERS, {}),
    ("dims", 1, PARAMETERS, {}),
    ("dims", 3, PARAMETERS, {}),
    ("head_dim", 4, RESULT, {"num_heads": None, "head_dim": 8}),
    ("head_dim", (8, 4), RESULT, {"num_heads": None, "head_dim": 4} | TWO_LEVELS),
    ("num_classes", 7, PARAMETERS, {}),
    ("vector_dim", 4, PARAMETERS, {}),
    ("time_cond_dim", 4, PARAMETERS, {}),
    ("learned_null", False, PARAMETERS, {}),
    ("attention", "transformer", PARAMETERS, {}),
    ("transformer_depth", 2, PARAMETERS, TRANSFORMER),
    ("transformer_depth", (2, 1), PARAMETERS, TRANSFORMER | TWO_LEVELS),
    ("only_cross_attention", True, PARAMETERS, TRANSFORMER),
    ("only_cross_attention", (False, True), PARAMETERS, TRANSFORMER),
    ("modulation", "scale_shift", PARAMETERS, {}),
    ("stem_channels", 4, PARAMETERS, {}),
    ("downsample", "conv_asymmetric", RESULT, {}),
    ("downsample", "avgpool", PARAMETERS, {}),
    ("downsample", "resblock", PARAMETERS, {}),
    ("upsample", "nearest", PARAMETERS, {}),
    ("upsample", "resblock", PARAMETERS, {}),
    ("norm_groups", 2, RESULT, {}),
    ("norm_groups", 2, RESULT, TRANSFORMER),
    ("norm_eps", 0.1, RESULT, {}),
    ("dropout", 0.5, RESULT, {}),
    ("time_frequencies", "half", RESULT, {}),
]


def test_every_option_is_tested():
    fields = {f.name for f in dataclasses.fields(UNetConfig)}
    assert {change[0] for change in CHANGES} == fields - {"conventions"}  # on which no output depends


@pytest.mark.parametrize(("field", "value", "effect", "around"), CHANGES)
def test_every_option_has_an_effect(field, value, effect, around):
    before = small(**CONDITIONS | around).train()  # training mode: dropout acts
    after = small(**CONDITIONS | around | {field: value}).train()
    shapes = [{name: p.shape for name, p in model.state_dict().items()} for model in (before, after)]
    assert (shapes[0] != shapes[1]) == (effect == PARAMETERS)
    args = inputs(after.config)

    def run(model):
        torch.manual_seed(0)  # of the dropout
        return model(**args)

    assert run(after).shape == (2, after.config.out_channels, *args["x"].shape[2:])
    if effect == RESULT:
        after.load_state_dict(before.state_dict())
        assert relative_error(run(after), run(before)) > 1e-3


def modules_of(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


@pytest.mark.parametrize("attention", ["plain", "transformer"])
@pytest.mark.parametrize("how", ["num_heads", "head_dim"])
def test_heads_and_depth_reach_every_level(attention, how):
    """Levels of 8, 16 and 24 channels with 1, 2 and 3 heads; the bottleneck has the last level's."""
    heads = {"num_heads": (1, 2, 3)} if how == "num_heads" else {"num_heads": None, "head_dim": 8}
    depth = {"transformer_depth": (1, 2, 3)} if attention == "transformer" else {}
    options = {"attention_resolutions": (8, 4, 2), "channel_mult": (1, 2, 3), "attention": attention}
    model = small(**CONDITIONS | options | heads | depth)
    places = [(a, level) for level in range(3) for a in (model.encoder[2 * level], model.decoder[4 - 2 * level])]
    for place, level in [*places, (model.bottleneck, 2)]:
        cores = modules_of(place, CrossAttention)
        assert {core.num_heads for core in cores} == {level + 1}
        assert len(cores) == 2 * (level + 1 if depth else 1)


def test_norm_options_reach_every_group_norm():
    for options in ({}, {"downsample": "resblock", "upsample": "resblock"}):
        model = small(**CONDITIONS | options, norm_groups=4, norm_eps=0.01)
        assert {(m.num_groups, m.eps) for m in modules_of(model, nn.GroupNorm)} == {(4, 0.01)}
    model = small(**CONDITIONS | TRANSFORMER, norm_groups=4, norm_eps=0.01)  # the transformers' own stays 1e-6
    assert {(m.num_groups, m.eps) for m in modules_of(model, nn.GroupNorm)} == {(4, 0.01), (4, 1e-6)}


# ---- sizes ---------------------------------------------------------------------------------------------------------

DOWN, UP = ["conv", "conv_asymmetric", "avgpool", "resblock"], ["conv_transpose", "nearest", "resblock"]


@pytest.mark.parametrize("downsample", DOWN)
@pytest.mark.parametrize("upsample", UP)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_forward_at_any_size(dims, downsample, upsample):
    model = small(dims=dims, downsample=downsample, upsample=upsample, channel_mult=(1, 1, 2), out_channels=2)
    for n in range(1, 10):
        size = (n, 10 - n, (2 * n) % 9 + 1)[:dims]
        with torch.no_grad():
            out = model(**inputs(model.config, size=size))
        assert out.shape == (2, 2, *size)
        assert out.isfinite().all()


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize(
    ("downsample", "upsample"), [("conv", "conv_transpose"), ("avgpool", "nearest"), ("resblock", "resblock")]
)
@pytest.mark.parametrize("size", [(8, 6), (5, 7)])
def test_one_axis_of_length_one_equals_one_axis_less(dims, downsample, upsample, size):
    """A signal is an image of height 1, an image a volume of depth 1, where only one row of each kernel acts."""
    options = CONDITIONS | {"downsample": downsample, "upsample": upsample}
    flat, deep = small(**options, dims=dims), small(**options, dims=dims + 1)
    state = deep.state_dict()
    for name, p in flat.state_dict().items():
        if p.ndim > 2:  # a kernel: 3 rows padded by 1, or 4 rows padded by 1 and transposed; 1 row in a shortcut
            state[name].zero_()[:, :, min(1, state[name].shape[2] - 1)] = p
        else:
            state[name].copy_(p)
    args = inputs(flat.config, size=size[:dims])
    assert_close(deep(**args | {"x": args["x"].unsqueeze(2)}).squeeze(2), flat(**args))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_sample_of_one_position_with_one_channel_per_group(dims):
    """torch.nn.GroupNorm refuses this, even in evaluation mode."""
    model = small(dims=dims, norm_groups=32, num_classes=3)
    args = inputs(model.config, batch=1, size=(1,) * dims)
    assert_close(model(**args), model(**{name: torch.cat([v, v]) for name, v in args.items()})[:1])


def test_input_size_may_differ_from_image_size():
    model, other = small(image_size=8), small(image_size=(7, 8))
    args = inputs(model.config, size=(5, 11))
    assert torch.equal(model(**args), other(**args))


# ---- start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, TRANSFORMER, {"modulation": "scale_shift", "upsample": "resblock"}])
def test_a_new_network_predicts_zero_and_its_last_convolution_learns(options):
    model = UNet(**SMALL | CONDITIONS | options)
    out = model(**inputs(model.config))
    assert torch.equal(out, torch.zeros_like(out))
    (out - 1).square().sum().backward()
    assert model.output[2].weight.grad.abs().max() > 0
