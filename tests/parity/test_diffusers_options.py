"""Every field of diffusers' configurations, with many values: the same numbers, or a refusal that names the field."""

import inspect
import json

import diffusers
import pytest
import torch

from support.networks import randomise, relative_error
from unet_denoiser import DiffusersUNet, UNet
from unet_denoiser.convert.diffusers_config import from_diffusers

SIZES = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
BASES = {
    "UNet2DModel": SIZES
    | {"down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D")},
    "UNet2DConditionModel": SIZES
    | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 16}
    | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4},
}
ANY = (None, 0, 2, 64, 1.0, True, "other", [], [2, 1], [True, False], [True, True])
NAMES = {
    "act_fn": ("silu", "swish", "gelu", "mish", "relu"),
    "time_embedding_type": ("positional", "fourier", "learned"),
    "resnet_time_scale_shift": ("default", "scale_shift", "spatial", "ada_group"),
    "class_embed_type": ("timestep", "identity", "projection", "simple_projection"),
    "addition_embed_type": ("text", "text_time", "text_image", "image"),
    "encoder_hid_dim_type": ("text_proj", "image_proj"),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "attention_type": ("default", "gated"),
    "cross_attention_norm": ("layer_norm", "group_norm"),
    "time_embedding_act_fn": ("silu",),
    "timestep_post_act": ("silu",),
    "down_block_types": (
        ["DownBlock2D", "DownBlock2D"],
        ["UNetResAttnDownBlock2D", "UNetResDownBlock2D"],
        ["AttnDownBlock2D", "AttnDownBlock2D"],
        ["ResnetDownsampleBlock2D", "DownBlock2D"],
        ["KDownBlock2D", "DownBlock2D"],
        ["SimpleCrossAttnDownBlock2D", "DownBlock2D"],
        ["SkipDownBlock2D", "DownBlock2D"],
        ["DownBlock2D"],
    ),
    "up_block_types": (
        ["UpBlock2D", "UpBlock2D"],
        ["UNetResUpBlock2D", "UNetResAttnUpBlock2D"],
        ["AttnUpBlock2D", "UpBlock2D"],
        ["ResnetUpsampleBlock2D", "AttnUpBlock2D"],
        ["UpBlock2D"],
    ),
    "block_out_channels": ([16, 48], [32, 16], [16, 20], [16]),
    "time_embedding_dim": (32, 64),
    "projection_class_embeddings_input_dim": (10,),
    "cross_attention_dim": ([16, 16], [16, 24]),
}
# fields that another field needs, in both libraries
COMPANIONS = {
    "projection": {"projection_class_embeddings_input_dim": 10},
    "text_time": {"projection_class_embeddings_input_dim": 6 * 256 + 20, "addition_time_embed_dim": 256},
}
NAMED = [(kind, field) for kind in BASES for field in inspect.signature(getattr(diffusers, kind)).parameters]
FIELDS = [(kind, field) for kind, field in NAMED if field != "self"]


def draw_inputs(model):
    """Arguments beyond x and t, for ours and for theirs."""
    config, draw, ours, theirs = model.config, torch.Generator().manual_seed(1), {}, {}
    if config.context_dim:
        ours["context"] = theirs["encoder_hidden_states"] = torch.randn(2, 5, config.context_dim, generator=draw)
    if config.num_classes:
        ours["class_labels"] = theirs["class_labels"] = torch.zeros(2, dtype=torch.long)
    if config.time_cond_dim:
        ours["time_cond"] = theirs["timestep_cond"] = torch.randn(2, config.time_cond_dim, generator=draw)
    if config.vector_dim and config.is_vector_projected:
        ours["vector"] = theirs["class_labels"] = torch.randn(2, config.vector_dim, generator=draw)
    elif config.vector_dim:
        text, sizes = torch.randn(2, config.vector_dim - 1536, generator=draw), torch.full((2, 6), 512.0)
        theirs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": sizes}
    return ours, theirs


def check_numbers(peer, folder):
    """Compare our network, and its adapter, with diffusers' own; both of the same folder."""
    peer.save_pretrained(folder)
    model = UNet.from_pretrained(folder)
    x, t = torch.randn(2, model.config.in_channels, 8, 8), torch.tensor([3, 700])
    ours, theirs = draw_inputs(model)
    with torch.no_grad():
        expected = peer(x, t, **theirs).sample
        assert relative_error(DiffusersUNet(model)(x, t, **theirs).sample, expected) < 1e-5
        if "added_cond_kwargs" not in theirs:
            assert relative_error(model(x, t, **ours), expected) < 1e-5


def find_refusal(function, *args):
    """The message of the ValueError that a call ends in, if any."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("kind", "field"), FIELDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_field_gives_the_same_numbers_or_is_refused_by_its_name(kind, field, tmp_path):
    build, base = getattr(diffusers, kind), BASES[kind]
    default = randomise(build(**base)).eval()
    for index, value in enumerate((*ANY, *NAMES.get(field, ()))):
        options = base | {field: value} | (COMPANIONS.get(value, {}) if isinstance(value, str) else {})
        stated = json.loads(default.to_json_string()) | options
        if (message := find_refusal(from_diffusers, stated)) is not None:
            assert field in message, value
            continue
        folder = tmp_path / str(index)
        try:
            peer = randomise(build(**options)).eval()
        except Exception:  # diffusers has no such network: nor can it be the one of these weights
            default.save_pretrained(folder)
            (folder / "config.json").write_text(json.dumps(stated))
            with pytest.raises((ValueError, TypeError), match=field):
                UNet.from_pretrained(folder)
            continue
        if (message := find_refusal(check_numbers, peer, folder)) is not None:
            assert field in message, value
