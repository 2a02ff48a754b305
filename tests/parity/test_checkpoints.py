"""Checkpoints of other code: the same numbers in our network, the same tensors back, strict refusals.

The oracles are diffusers' and OpenAI's own networks at small width with random non-zero weights.
"""

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from guided_diffusion.unet import SuperResModel, UNetModel
from torch.testing import assert_close

from helpers import randomise, relative_error
from unet_denoiser import UNet, preset
from unet_denoiser.convert import save, write
from unet_denoiser.convert.infer import complete, infer, recognise, skeleton

pytestmark = pytest.mark.filterwarnings("ignore:norm_groups:UserWarning")
LEVELS = {"layers_per_block": 1, "block_out_channels": (32, 64, 64)}
TEXT = {
    "sample_size": 8,
    "cross_attention_dim": 24,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
DEEP = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
}
ADDED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
CONV = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
RESNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attn_norm_num_groups": 32,
    "num_class_embeds": 7,
    "out_channels": 6,
    "attention_head_dim": 16,
}
DDPM = {
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
DIFFUSERS = {
    "ddpm": (diffusers.UNet2DModel, CONV | DDPM),
    "ldm": (diffusers.UNet2DModel, CONV | {"attention_head_dim": 32}),
    "adm": (diffusers.UNet2DModel, RESNET),
    "sd-1": (diffusers.UNet2DConditionModel, TEXT | {"attention_head_dim": 8}),
    "lcm": (diffusers.UNet2DConditionModel, TEXT | {"attention_head_dim": 8, "time_cond_proj_dim": 12}),
    "sd-2": (diffusers.UNet2DConditionModel, TEXT | {"attention_head_dim": [2, 4, 4], "use_linear_projection": True}),
    "x4": (
        diffusers.UNet2DConditionModel,
        TEXT | DEEP | {"only_cross_attention": [True, True, False], "num_class_embeds": 9, "in_channels": 7},
    ),
    "sdxl": (
        diffusers.UNet2DConditionModel,
        TEXT
        | DEEP
        | ADDED
        | {"attention_head_dim": [1, 2, 2], "transformer_layers_per_block": [1, 2, 3]}
        | {"projection_class_embeddings_input_dim": 1536 + 20},
    ),
}


def call(peer, x, t, config):
    """Arguments beyond x and t, for ours and for theirs."""
    ours, theirs = {}, {}
    if config.num_classes:
        ours["class_labels"] = theirs["class_labels"] = torch.arange(len(x)) % config.num_classes
    if config.context_dim:
        ours["context"] = theirs["encoder_hidden_states"] = torch.randn(len(x), 5, config.context_dim)
    if config.time_cond_dim:
        ours["time_cond"] = theirs["timestep_cond"] = torch.randn(len(x), config.time_cond_dim)
    if config.vector_dim:
        text, ids = torch.randn(len(x), config.vector_dim - 1536), torch.randint(0, 999, (len(x), 6)).float()
        theirs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
        ours["vector"] = torch.cat([text, peer.add_time_proj(ids.flatten()).reshape(len(x), -1)], dim=1)
    return ours, theirs


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_folder(name, tmp_path):
    """Loaded from a folder alone: outputs, gradients, and the folder back, bit for bit and opened by diffusers."""
    kind, options = DIFFUSERS[name]
    torch.manual_seed(0)
    peer = randomise(kind(**LEVELS | options)).eval()
    peer.save_pretrained(tmp_path / "theirs")
    model = UNet.from_pretrained(tmp_path / "theirs")
    x, t = torch.randn(2, model.config.in_channels, 12, 20), torch.tensor([5, 900])
    ours, theirs = call(peer, x, t, model.config)
    out, expected = model(x, t, **ours), peer(x, t, **theirs).sample
    assert relative_error(out, expected) < 3e-6
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert relative_error(model.input_conv.weight.grad, peer.conv_in.weight.grad) < 1e-5

    save(model.state_dict(), model.config, tmp_path / "back", "diffusers")
    again = kind.from_pretrained(tmp_path / "back")
    assert again.state_dict().keys() == peer.state_dict().keys()
    assert all(torch.equal(p, peer.state_dict()[key]) for key, p in again.state_dict().items())
    assert torch.equal(again(x, t, **theirs).sample, expected)


@pytest.mark.parametrize(
    ("how", "file"),
    [
        ({"max_shard_size": "200KB"}, "diffusion_pytorch_model.safetensors.index.json"),
        ({"max_shard_size": "200KB", "variant": "fp16"}, "diffusion_pytorch_model.safetensors.index.fp16.json"),
        ({"variant": "fp16"}, "diffusion_pytorch_model.fp16.safetensors"),
        ({"safe_serialization": False}, "diffusion_pytorch_model.bin"),
    ],
)
def test_folders_that_are_sharded_variants_or_pickled(how, file, tmp_path):
    kind, options = DIFFUSERS["sd-1"]
    peer = randomise(kind(**LEVELS | options))
    peer.save_pretrained(tmp_path, **how)
    assert (tmp_path / file).exists()
    model = UNet.from_pretrained(tmp_path)
    back = write(model.state_dict(), model.config, "diffusers")
    assert all(torch.equal(p, peer.state_dict()[key]) for key, p in back.items())
    with pytest.raises(ValueError, match="a folder with one set of weights"):
        UNet.from_pretrained(tmp_path, ema=True)


ADM = {"in_channels": 3, "num_res_blocks": 1, "use_scale_shift_norm": True, "image_size": 32, "model_channels": 32}
GUIDED = {
    "adm": ({"resblock_updown": True, "num_head_channels": 16, "num_classes": 7}, "legacy"),
    "adm-new-order": ({"resblock_updown": True, "num_head_channels": 16, "use_new_attention_order": True}, "new"),
    "iddpm": ({"num_heads": 4}, "legacy"),
    "add": ({"use_scale_shift_norm": False, "num_heads": 2}, "legacy"),
    "adm-512": (
        {"resblock_updown": True, "model_channels": 64, "channel_mult": (0.5, 1, 2), "num_head_channels": 16},
        "legacy",
    ),
}


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_adm_file(name, suffix, tmp_path):
    options, order = GUIDED[name]
    options = ADM | {"out_channels": 6, "attention_resolutions": (2, 4), "channel_mult": (1, 2, 2)} | options
    peer = randomise(UNetModel(**options)).eval()
    path = tmp_path / f"model.{suffix}"
    if suffix == "pt":
        torch.save(peer.state_dict(), path)
    else:
        save_as_safetensors(peer.state_dict(), path)
    heads = (
        {"head_dim": options["num_head_channels"]}
        if "num_head_channels" in options
        else {"num_heads": options["num_heads"]}
    )
    model = UNet.from_pretrained(path, **heads, qkv_order=order)
    x, t = torch.randn(2, 3, 32, 16), torch.tensor([3, 950])
    y = torch.tensor([0, 6]) if model.config.num_classes else None
    with torch.no_grad():
        assert relative_error(model(x, t, class_labels=y), peer(x, t, y)) < 3e-6
    back = write(model.state_dict(), model.config, "compvis", qkv_order=order)
    assert back.keys() == peer.state_dict().keys()
    assert all(torch.equal(p, peer.state_dict()[key]) for key, p in back.items())


def save_as_safetensors(state, path):
    from safetensors.torch import save_file

    save_file({name: p.contiguous() for name, p in state.items()}, path)


def test_the_upsampler_is_a_network_of_doubled_channels(tmp_path):
    options = ADM | {"out_channels": 6, "attention_resolutions": (4,), "channel_mult": (1, 2, 2), "num_heads": 2}
    peer = randomise(SuperResModel(**options)).eval()
    torch.save(peer.state_dict(), tmp_path / "up.pt")
    model = UNet.from_pretrained(tmp_path / "up.pt", num_heads=2, qkv_order="legacy")
    x, low, t = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 16, 16), torch.tensor([9])
    large = torch.nn.functional.interpolate(low, (32, 32), mode="bilinear")
    with torch.no_grad():
        assert relative_error(model(torch.cat([x, large], 1), t), peer(x, t, low_res=low)) < 3e-6


@pytest.mark.parametrize("name", ["sd-1", "sdxl", "sd-2"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_ldm_file(name, prefix, tmp_path):
    """Our names in the LDM layout are what diffusers' own converter reads, and a single file comes back to us."""
    kind, options = DIFFUSERS[name]
    peer = randomise(kind(**LEVELS | options)).eval()
    peer.save_pretrained(tmp_path / "theirs")
    model = UNet.from_pretrained(tmp_path / "theirs")
    path = tmp_path / "model.safetensors"
    save(model.state_dict(), model.config, path, "ldm" if prefix else "adm")
    with_prefix = {
        f"model.diffusion_model.{n}": p for n, p in write(model.state_dict(), model.config, "compvis").items()
    }
    extra = {"layers_per_block": 1, "class_embed_type": None, "addition_embed_type": options.get("addition_embed_type")}
    theirs = convert_ldm_unet_checkpoint(with_prefix, dict(peer.config) | extra)
    assert theirs.keys() == peer.state_dict().keys()
    assert all(torch.equal(p, peer.state_dict()[key]) for key, p in theirs.items())
    heads = {"num_heads": 8} if name == "sd-1" else {"head_dim": 32 if name == "sdxl" else 16}
    again = UNet.from_pretrained(path, **heads)
    assert all(torch.equal(p, model.state_dict()[key]) for key, p in again.state_dict().items())
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 3, 24)
    vector = torch.randn(1, model.config.vector_dim) if model.config.vector_dim else None
    with torch.no_grad():
        assert_close(again(x, t, context, vector=vector), model(x, t, context, vector=vector))


PUBLISHED = {
    "sd-1.5": (686, {"cross_attention_dim": 768, "attention_head_dim": 8}),
    "sd-2": (686, {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}),
    "sdxl-base": (
        1680,
        {
            **DEEP,
            **ADDED,
            "block_out_channels": (320, 640, 1280),
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes(name):
    """Every tensor of the published networks, by name and shape, in diffusers' and the LDM layout."""
    count, options = PUBLISHED[name]
    with torch.device("meta"):
        ours = UNet.from_preset(name).state_dict()
        theirs = diffusers.UNet2DConditionModel(**options).state_dict()
    found = write(ours, preset(name), "diffusers")
    assert {key: p.shape for key, p in found.items()} == {key: p.shape for key, p in theirs.items()}
    assert len(found) == count
    assert len(write(ours, preset(name), "compvis")) == count


@pytest.mark.parametrize("name", ["adm-64-cond", "ddpm-cifar10", "sd-1.5", "sdxl-base", "ldm-churches", "adm-512-cond"])
def test_known_networks_need_no_options(name, tmp_path):
    """Names and shapes of a published file are enough: heads and order come from the preset it equals."""
    layout = "ddpm" if name.startswith("ddpm") else "compvis"
    with torch.device("meta"):
        theirs = write(UNet.from_preset(name).state_dict(), preset(name), layout)
    shapes = {key: tuple(p.shape) for key, p in theirs.items()}
    assert recognise(shapes) == layout
    bones = skeleton(layout, shapes)
    config, known = complete(infer(layout, shapes, bones), {})
    levels = range(len(config.widths))
    assert known == name
    assert [config.heads(i) for i in levels] == [preset(name).heads(i) for i in levels]
    with torch.device("meta"):
        assert UNet.from_config(config).state_dict().keys() == UNet.from_preset(name).state_dict().keys()
