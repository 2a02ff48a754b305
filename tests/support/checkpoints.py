"""Small checkpoints of other code, and comparisons of tensors."""

import diffusers
import torch

from unet_denoiser import UNet

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
    "ratio": blocks("A-", attention="Attn") | {"block_out_channels": (88, 120), "attention_head_dim": 8},
    "resnet-up": blocks("A-", attention="Attn") | {"attention_head_dim": 32, "upsample_type": "resnet"},
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
    "sines-first": SD1 | {"flip_sin_to_cos": False},
    "cosines-endpoint": SD1 | {"freq_shift": 1},
    "sd-2": SD2,
    "sd-2-unclip": SD2 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
    "lotus": SD2 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 4, "in_channels": 8},
    "wide-projection": SD2 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 1700},
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


def load_adm(state, tmp_path, **options):
    """The network of a file of ADM's layout; one head, unless the options say otherwise."""
    torch.save(state, tmp_path / "m.pt")
    return UNet.from_pretrained(tmp_path / "m.pt", **{"num_heads": 1} | options)


def shapes_of(config):
    """Names and shapes of our parameters."""
    with torch.device("meta"):
        return {name: p.shape for name, p in UNet.from_config(config).state_dict().items()}


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
