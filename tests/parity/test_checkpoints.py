"""Checkpoints of other code: the same numbers in our network, the same tensors back, strict refusals.

The oracles are diffusers' own networks at small width with random non-zero weights; ADM's are in test_adm_files.py.
"""

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file

from support.checkpoints import CONDITIONAL, DIFFUSERS, assert_equal_gradients, assert_same_tensors, blocks
from support.networks import randomise, relative_error
from unet_denoiser import UNet, preset
from unet_denoiser.convert.architecture import detect_layout, detect_structure, fill_from_preset, infer_options
from unet_denoiser.convert.checkpoint import ForeignCheckpoint, export_checkpoint, export_state_dict
from unet_denoiser.models.verify import compare

WEIGHTS = "diffusion_pytorch_model.safetensors"


def call(peer, x, config):
    """Arguments beyond x and t, for ours and for theirs."""
    ours, theirs = {}, {}
    if config.num_classes:
        ours["class_labels"] = theirs["class_labels"] = torch.arange(len(x)) % config.num_classes
    if config.context_dim:
        ours["context"] = theirs["encoder_hidden_states"] = torch.randn(len(x), 5, config.context_dim)
    if config.time_cond_dim:
        ours["time_cond"] = theirs["timestep_cond"] = torch.randn(len(x), config.time_cond_dim)
    if config.vector_dim and config.is_vector_projected:
        ours["vector"] = theirs["class_labels"] = torch.randn(len(x), config.vector_dim)
    elif config.vector_dim:
        text, ids = torch.randn(len(x), 1280), torch.randint(0, 999, (len(x), config.vector_dim // 256 - 5)).float()
        theirs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
        ours["vector"] = torch.cat([text, peer.add_time_proj(ids.flatten()).reshape(len(x), -1)], dim=1)
    return ours, theirs


@pytest.mark.parametrize("name", DIFFUSERS)
def test_a_diffusers_folder_gives_its_output_and_gradients_and_comes_back(name, tmp_path):
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
    gradients = export_state_dict({name: p.grad for name, p in model.named_parameters()}, model.config, "diffusers")
    assert_equal_gradients(
        gradients | {"x": x.grad}, {name: p.grad for name, p in peer.named_parameters()} | {"x": same.grad}
    )

    export_checkpoint(model.state_dict(), model.config, tmp_path / "back", "diffusers")
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
def test_a_folder_of_shards_variants_or_pickles_is_loaded(how, file, tmp_path):
    kind, options = DIFFUSERS["sd-1"]
    peer = randomise(kind(**options))
    peer.save_pretrained(tmp_path, **how)
    assert (tmp_path / file).exists()
    model = UNet.from_pretrained(tmp_path)
    assert_same_tensors(export_state_dict(model.state_dict(), model.config, "diffusers"), peer.state_dict())
    with pytest.raises(ValueError, match="a folder with one set of weights"):
        UNet.from_pretrained(tmp_path, ema=True)


@pytest.mark.parametrize("name", ["ldm-cin256", "sd-1", "sd-2", "sd-2-unclip", "lotus", "x4", "sdxl", "sdxl-refiner"])
def test_an_ldm_file_is_what_diffusers_converter_reads(name, tmp_path):
    """Our names in the LDM layout are what diffusers' own converter reads, and a single file comes back to us."""
    kind, options = DIFFUSERS[name]
    peer = randomise(kind(**options)).eval()
    peer.save_pretrained(tmp_path / "theirs")
    model = UNet.from_pretrained(tmp_path / "theirs")
    export_checkpoint(model.state_dict(), model.config, tmp_path / "model.safetensors", "ldm")
    theirs = convert_ldm_unet_checkpoint(load_file(tmp_path / "model.safetensors"), options)
    assert_same_tensors(theirs, peer.state_dict())

    export_checkpoint(model.state_dict(), model.config, tmp_path / "bare.safetensors", "adm")
    untold = {"num_heads": model.config.num_heads, "head_dim": model.config.head_dim, "norm_groups": 4}
    t, x = torch.tensor([7]), torch.randn(1, model.config.in_channels, 8, 8)
    conditions, _ = call(peer, x, model.config)
    for file in ("model", "bare"):
        again = UNet.from_pretrained(tmp_path / f"{file}.safetensors", **untold)
        assert_same_tensors(again.state_dict(), model.state_dict())
        with torch.no_grad():
            assert relative_error(again(x, t, **conditions), model(x, t, **conditions)) < 2e-6


def test_a_latent_consistency_model_goes_through_the_ldm_layout(tmp_path):
    """ComfyUI's name for the projection of the guidance scale, which diffusers' converter does not know."""
    kind, options = DIFFUSERS["lcm"]
    randomise(kind(**options)).save_pretrained(tmp_path / "theirs")
    model = UNet.from_pretrained(tmp_path / "theirs")
    export_checkpoint(model.state_dict(), model.config, tmp_path / "m.safetensors", "ldm")
    file, folder = load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "theirs" / WEIGHTS)
    found = file["model.diffusion_model.time_embed.cond_proj.weight"]
    assert torch.equal(found, folder["time_embedding.cond_proj.weight"])
    again = UNet.from_pretrained(tmp_path / "m.safetensors", num_heads=8, norm_groups=4)
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert compare(ForeignCheckpoint.open(tmp_path / "m.safetensors", num_heads=8, norm_groups=4), again).error < 1e-5


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
def test_presets_have_the_published_names_and_shapes(name):
    """Every tensor of the published networks, by name and shape, in diffusers' and the LDM layout."""
    count, options = PUBLISHED[name]
    with torch.device("meta"):
        ours = UNet.from_preset(name).state_dict()
        theirs = diffusers.UNet2DConditionModel(**options).state_dict()
    found = export_state_dict(ours, preset(name), "diffusers")
    assert {key: p.shape for key, p in found.items()} == {key: p.shape for key, p in theirs.items()}
    assert len(found) == count
    assert len(export_state_dict(ours, preset(name), "compvis")) == count


RECOGNISED = ["adm-64-cond", "ddpm-cifar10", "sd-1.5", "sd-x4-upscaler", "sdxl-base", "ldm-churches", "adm-512-cond"]


@pytest.mark.parametrize("name", RECOGNISED)
def test_a_published_network_is_recognised_without_options(name, tmp_path):
    """Names and shapes of a published file are enough: heads and order come from the preset it equals."""
    layout = "ddpm" if name.startswith("ddpm") else "compvis"
    with torch.device("meta"):
        theirs = export_state_dict(UNet.from_preset(name).state_dict(), preset(name), layout)
    shapes = {key: tuple(p.shape) for key, p in theirs.items()}
    assert detect_layout(shapes) == layout
    structure = detect_structure(layout, shapes)
    config, known = fill_from_preset(infer_options(layout, shapes, structure), {})
    levels = range(len(config.widths))
    assert known == name
    assert [config.heads(i) for i in levels] == [preset(name).heads(i) for i in levels]
    with torch.device("meta"):
        assert UNet.from_config(config).state_dict().keys() == UNet.from_preset(name).state_dict().keys()
