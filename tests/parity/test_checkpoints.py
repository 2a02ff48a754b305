"""Checkpoints of other code: the same numbers in our network, the same tensors back, strict refusals.

The oracles are diffusers' own networks at small width with random non-zero weights; ADM's are in test_adm_files.py.
"""

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file

from helpers import randomise, relative_error
from unet_denoiser import UNet, preset
from unet_denoiser.convert.architecture import complete, infer, recognise, skeleton
from unet_denoiser.convert.checkpoint import save, write

# 8 channels or more per group, as in the published networks: with one, the time embedding would have no effect
LEVELS = {"layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 4}
THREE = {"block_out_channels": (32, 64, 64)}


def blocks(kinds, down="DownBlock2D", up="UpBlock2D", attention="CrossAttn"):
    """Block types of the levels, from the finest on; "A" has attention."""
    return {
        "down_block_types": tuple(f"{attention}DownBlock2D" if kind == "A" else down for kind in kinds),
        "up_block_types": tuple(f"{attention}UpBlock2D" if kind == "A" else up for kind in reversed(kinds)),
    }


DDPM = {
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
ADM = {
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attn_norm_num_groups": 4,
    "num_class_embeds": 7,
    "out_channels": 6,
    "attention_head_dim": 16,
}
PLAIN = {
    "ddpm": blocks("A-", attention="Attn") | DDPM | {"layers_per_block": 2},
    "ldm-vq4": blocks("AA", attention="Attn") | {"attention_head_dim": 32},
    "ldm-super-resolution": THREE | blocks("--A", attention="Attn") | {"attention_head_dim": 32, "in_channels": 6},
    "adm": blocks("A-", "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", "Attn") | ADM,
}
TEXT = {"sample_size": 8, "cross_attention_dim": 24}
SD1 = TEXT | blocks("A-") | {"attention_head_dim": 8}
SD2 = TEXT | blocks("A-") | {"attention_head_dim": [2, 4], "use_linear_projection": True}
SDXL = TEXT | {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256}
SDXL |= THREE | {"attention_head_dim": [1, 2, 2]}
SDXL_BASE = SDXL | blocks("-AA") | {"transformer_layers_per_block": [1, 1, 2]}
SDXL_BASE |= {"projection_class_embeddings_input_dim": 1280 + 6 * 256}
CONDITIONAL = {
    "ldm-cin256": TEXT | blocks("-A") | {"attention_head_dim": 1, "in_channels": 3, "out_channels": 3},
    "sd-1": SD1,
    "sd-1-inpainting": SD1 | {"in_channels": 9},
    "instruct-pix2pix": SD1 | {"in_channels": 8},
    "lcm": SD1 | THREE | blocks("AA-") | {"time_cond_proj_dim": 12},
    "sd-2": SD2,
    "sd-2-inpainting": SD2 | {"in_channels": 9},
    "sd-2-depth": SD2 | {"in_channels": 5},
    "x4": SD2
    | blocks("AA")
    | {"attention_head_dim": 8, "only_cross_attention": [True, False], "num_class_embeds": 9, "in_channels": 7},
    "sdxl": SDXL_BASE,
    "sdxl-inpainting": SDXL_BASE
    | LEVELS
    | blocks("AA")
    | {"attention_head_dim": [1, 2], "transformer_layers_per_block": [1, 2], "in_channels": 9},
    "sdxl-refiner": SDXL
    | blocks("-A-")
    | {"transformer_layers_per_block": 2, "projection_class_embeddings_input_dim": 1280 + 5 * 256},
}
DIFFUSERS = {name: (diffusers.UNet2DModel, LEVELS | options) for name, options in PLAIN.items()}
DIFFUSERS |= {name: (diffusers.UNet2DConditionModel, LEVELS | options) for name, options in CONDITIONAL.items()}


def call(peer, x, config):
    """Arguments beyond x and t, for ours and for theirs."""
    ours, theirs = {}, {}
    if config.num_classes:
        ours["class_labels"] = theirs["class_labels"] = torch.arange(len(x)) % config.num_classes
    if config.context_dim:
        ours["context"] = theirs["encoder_hidden_states"] = torch.randn(len(x), 5, config.context_dim)
    if config.time_cond_dim:
        ours["time_cond"] = theirs["timestep_cond"] = torch.randn(len(x), config.time_cond_dim)
    if config.vector_dim:
        text, ids = torch.randn(len(x), 1280), torch.randint(0, 999, (len(x), config.vector_dim // 256 - 5)).float()
        theirs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
        ours["vector"] = torch.cat([text, peer.add_time_proj(ids.flatten()).reshape(len(x), -1)], dim=1)
    return ours, theirs


def assert_same_tensors(found, expected):
    """Names and values, bit for bit."""
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def assert_equal_gradients(ours, theirs):
    """By the peer's names: 2e-6 of the largest entry of all, and 2e-5 of the largest of each tensor.

    Where a tensor has less than a hundredth of the largest of all, that counts instead: biases before a norm and biases
    of keys have an exact gradient of zero, and only rounding is left of it.
    """
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        difference = (ours[name] - gradient).abs().max()
        assert difference < 2e-6 * largest, name
        assert difference < 2e-5 * max(gradient.abs().max(), largest / 100), name


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_folder(name, tmp_path):
    """Loaded from a folder alone: output, all gradients, and the folder back, bit for bit and opened by diffusers."""
    kind, options = DIFFUSERS[name]
    peer = randomise(kind(**options)).eval()
    peer.save_pretrained(tmp_path / "theirs")
    model = UNet.from_pretrained(tmp_path / "theirs")
    t, x = torch.tensor([5, 900]), torch.randn(2, model.config.in_channels, 12, 20, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    ours, theirs = call(peer, x, model.config)
    out, expected = model(x, t, **ours), peer(same, t, **theirs).sample
    assert relative_error(out, expected) < 2e-6
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = write({name: p.grad for name, p in model.named_parameters()}, model.config, "diffusers")
    assert_equal_gradients(
        gradients | {"x": x.grad}, {name: p.grad for name, p in peer.named_parameters()} | {"x": same.grad}
    )

    save(model.state_dict(), model.config, tmp_path / "back", "diffusers")
    again = kind.from_pretrained(tmp_path / "back")
    assert_same_tensors(again.state_dict(), peer.state_dict())
    assert torch.equal(again(same, t, **theirs).sample, expected)


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
    peer = randomise(kind(**options))
    peer.save_pretrained(tmp_path, **how)
    assert (tmp_path / file).exists()
    model = UNet.from_pretrained(tmp_path)
    assert_same_tensors(write(model.state_dict(), model.config, "diffusers"), peer.state_dict())
    with pytest.raises(ValueError, match="a folder with one set of weights"):
        UNet.from_pretrained(tmp_path, ema=True)


@pytest.mark.parametrize("name", ["ldm-cin256", "sd-1", "sd-2", "x4", "sdxl", "sdxl-refiner"])
def test_ldm_file(name, tmp_path):
    """Our names in the LDM layout are what diffusers' own converter reads, and a single file comes back to us."""
    kind, options = DIFFUSERS[name]
    peer = randomise(kind(**options)).eval()
    peer.save_pretrained(tmp_path / "theirs")
    model = UNet.from_pretrained(tmp_path / "theirs")
    save(model.state_dict(), model.config, tmp_path / "model.safetensors", "ldm")
    theirs = convert_ldm_unet_checkpoint(load_file(tmp_path / "model.safetensors"), options)
    assert_same_tensors(theirs, peer.state_dict())

    save(model.state_dict(), model.config, tmp_path / "bare.safetensors", "adm")
    untold = {"num_heads": model.config.num_heads, "head_dim": model.config.head_dim, "norm_groups": 4}
    t, x = torch.tensor([7]), torch.randn(1, model.config.in_channels, 8, 8)
    conditions, _ = call(peer, x, model.config)
    for file in ("model", "bare"):
        again = UNet.from_pretrained(tmp_path / f"{file}.safetensors", **untold)
        assert_same_tensors(again.state_dict(), model.state_dict())
        with torch.no_grad():
            assert relative_error(again(x, t, **conditions), model(x, t, **conditions)) < 2e-6


PUBLISHED = {
    "sd-1.5": (686, {"cross_attention_dim": 768, "attention_head_dim": 8}),
    "sd-2": (686, {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}),
    "sd-x4-upscaler": (
        687,
        blocks("-AAA")
        | {"block_out_channels": (256, 512, 512, 1024), "cross_attention_dim": 1024, "use_linear_projection": True}
        | {"only_cross_attention": [True, True, True, False], "num_class_embeds": 1000, "in_channels": 7},
    ),
    "sdxl-base": (
        1680,
        CONDITIONAL["sdxl"]
        | {"block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048}
        | {"transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20]},
    ),
    "sdxl-refiner": (
        1220,
        CONDITIONAL["sdxl-refiner"]
        | blocks("-AA-")
        | {"block_out_channels": (384, 768, 1536, 1536), "cross_attention_dim": 1280}
        | {"transformer_layers_per_block": 4, "attention_head_dim": [6, 12, 24, 24]},
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
