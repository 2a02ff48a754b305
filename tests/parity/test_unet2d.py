"""The whole network against diffusers' UNet2DModel and UNet2DConditionModel, with the same random weights."""

import re

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from support.networks import inputs, randomise, relative_error
from unet_denoiser import UNet
from unet_denoiser.convert import export_checkpoint

COMMON = {"model_channels": 16, "channel_mult": (1, 2, 3), "num_res_blocks": 2, "image_size": 16, "norm_groups": 4}
COMMON |= {"attention_resolutions": (8,), "num_heads": None, "head_dim": 8, "context_dim": None, "dropout": 0.0}
THEIRS = {"block_out_channels": (16, 32, 48), "layers_per_block": 2, "norm_num_groups": 4, "attention_head_dim": 8}


def to_diffusers(name, transformer):
    """The name that diffusers gives to one of our parameters; 3 levels of n = 2 blocks, attention at level 1 alone."""
    n, last = 2, 2

    def place(match):
        part, (level, j) = match["part"], divmod(int(match["index"]), n + 1)
        if part == "encoder" and j == n:
            return f"down_blocks.{level}.downsamplers.0.{match['rest']}"
        child, leaf = match["rest"].split(".", 1)
        block = f"{'down' if part == 'encoder' else 'up'}_blocks.{level}"
        if part == "decoder" and j == n and level < last and child == ("2" if level == 1 else "1"):
            return f"{block}.upsamplers.0.{leaf}"
        return f"{block}.{'resnets' if child == '0' else 'attentions'}.{j}.{leaf}"

    name = re.sub(r"(?P<part>encoder|decoder)\.(?P<index>\d+)\.(?P<rest>.*)", place, name)
    renames = {
        r"^time_mlp\.1": "time_embedding.linear_1",
        r"^time_mlp\.3": "time_embedding.linear_2",
        r"^input_conv": "conv_in",
        r"^bottleneck\.0": "mid_block.resnets.0",
        r"^bottleneck\.1": "mid_block.attentions.0",
        r"^bottleneck\.2": "mid_block.resnets.1",
        r"^output\.0": "conv_norm_out",
        r"^output\.2": "conv_out",
        r"\.time_mlp\.": ".time_emb_proj.",
        r"\.skip\.": ".conv_shortcut.",
        r"(attentions\.\d+)\.norm\.": r"\1.norm." if transformer else r"\1.group_norm.",
        r"(attentions\.\d+)\.attn\.": r"\1.",
        r"to_out\.": "to_out.0.",
        r"\.ff\.proj\.": ".ff.net.0.proj.",
        r"\.ff\.out\.": ".ff.net.2.",
    }
    for old, new in renames.items():
        name = re.sub(old, new, name)
    return name


CASES = {
    "ddpm": (
        {"norm_eps": 1e-6, "downsample": "conv_asymmetric", "upsample": "nearest"},
        {"norm_eps": 1e-6, "downsample_padding": 0, "freq_shift": 1, "flip_sin_to_cos": False},
    ),
    "ldm": (
        {"upsample": "nearest", "time_frequencies": "half", "num_classes": 7},
        {"flip_sin_to_cos": False, "num_class_embeds": 7},
    ),
    "adm": (
        {"modulation": "scale_shift", "downsample": "resblock", "upsample": "resblock", "time_frequencies": "half"},
        {
            "resnet_time_scale_shift": "scale_shift",
            "flip_sin_to_cos": False,
            "attn_norm_num_groups": 4,
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
            "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "downsample_type": "resnet",
            "upsample_type": "resnet",
        },
    ),
    "text": (
        {"attention": "transformer", "transformer_depth": 2, "context_dim": 12, "time_frequencies": "half"}
        | {"upsample": "nearest", "num_heads": 4, "head_dim": None, "learned_null": False},
        {"flip_sin_to_cos": False, "cross_attention_dim": 12, "transformer_layers_per_block": 2}
        | {"in_channels": 3, "out_channels": 3, "attention_head_dim": 4, "use_linear_projection": True}
        | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")}
        | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")},
    ),
}
BLOCKS = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}


def pair(case):
    """Our network and theirs, with the same weights; and their names for our parameters."""
    ours, theirs = CASES[case]
    model = randomise(UNet(**COMMON | ours)).eval()
    peer = (UNet2DConditionModel if case == "text" else UNet2DModel)(**THEIRS | BLOCKS | theirs).eval()
    names = {name: to_diffusers(name, case == "text") for name, _ in model.named_parameters() if "null" not in name}
    peer.load_state_dict({names[name]: p for name, p in model.state_dict().items() if name in names})
    return model, peer, names


def call(case, model, peer, args):
    theirs = {"class_labels": args.get("class_labels")}
    if case == "text":
        theirs["encoder_hidden_states"] = args["context"]
    return model(**args), peer(args["x"], args["t"], return_dict=False, **theirs)[0]


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_diffusers(case):
    model, peer, names = pair(case)
    args = inputs(model.config, size=(16, 24))
    out, expected = call(case, model, peer, args)
    assert relative_error(out, expected) < 2e-6
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    theirs = dict(peer.named_parameters())
    scale = max(p.grad.abs().max() for p in theirs.values())
    for name, p in model.named_parameters():
        if name in names:
            torch.testing.assert_close(p.grad, theirs[names[name]].grad, rtol=1e-4, atol=3e-6 * scale)


def test_odd_sizes_equal_the_conditional_model():
    model, peer, _ = pair("text")
    for size in [(15, 9), (7, 10), (1, 5), (3, 2)]:
        out, expected = call("text", model, peer, inputs(model.config, size=size))
        assert relative_error(out, expected) < 2e-6


@pytest.mark.parametrize("widths", [(32, 64), (32, 32, 64)])
def test_heads_wider_than_levels_without_attention(widths, tmp_path):
    """Their number there would be zero; no layer asks for it."""
    plain = ["DownBlock2D"] * (len(widths) - 1), ["UpBlock2D"] * (len(widths) - 1)
    options = {"block_out_channels": widths, "attention_head_dim": 64, "sample_size": 16, "layers_per_block": 1}
    blocks = {"down_block_types": (*plain[0], "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", *plain[1])}
    peer = randomise(UNet2DModel(**options, **blocks)).eval()
    peer.save_pretrained(tmp_path / "theirs")
    model = UNet.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    export_checkpoint(model.state_dict(), model.config, tmp_path / "exported", "diffusers")
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([10, 700])
    with torch.no_grad():
        expected = peer(x, t).sample
        assert relative_error(UNet.from_pretrained(tmp_path / "ours")(x, t), expected) < 1e-5
        assert relative_error(UNet2DModel.from_pretrained(tmp_path / "exported")(x, t).sample, expected) < 1e-5
