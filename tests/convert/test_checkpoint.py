"""Foreign checkpoints: what is found in a file or folder, recognised once, and asked for where it does not tell."""

from dataclasses import replace

import diffusers
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from support.checkpoints import assert_same_tensors, load_adm, shapes_of
from support.family import FAMILY
from support.networks import randomise
from unet_denoiser import UNet, preset
from unet_denoiser.convert.architecture import describe
from unet_denoiser.convert.checkpoint import ForeignCheckpoint, export_checkpoint, export_state_dict, import_checkpoint
from unet_denoiser.convert.diffusers_config import from_diffusers


@pytest.fixture
def model():
    return randomise(UNet(**FAMILY)).eval()


@pytest.fixture
def adm(model):
    """The state dict in ADM's names."""
    return export_state_dict(model.state_dict(), model.config, "compvis")


@pytest.mark.parametrize("layout", ["compvis", "diffusers", "ddpm"])
def test_an_opened_checkpoint_has_layout_architecture_and_parameters(layout, model, tmp_path):
    format = {"compvis": "adm", "diffusers": "diffusers", "ddpm": "ddpm"}[layout]
    path = tmp_path / ("folder" if layout == "diffusers" else "file.safetensors")
    config = model.config if layout != "ddpm" else replace(model.config, time_frequencies="endpoint")
    export_checkpoint(model.state_dict(), config, path, format)
    checkpoint = ForeignCheckpoint.open(path, **{} if layout == "diffusers" else {"num_heads": 1})
    assert (checkpoint.path, checkpoint.layout) == (path, layout)
    assert checkpoint.config.widths == model.config.widths
    assert_same_tensors(checkpoint.parameters(shapes_of(model.config)), model.state_dict())
    assert_same_tensors(UNet.from_checkpoint(checkpoint).state_dict(), model.state_dict())
    assert (checkpoint.diffusers_config is not None) == (layout == "diffusers")
    assert "tensor(" not in repr(checkpoint)


def test_import_gives_architecture_and_parameters(model, adm, tmp_path):
    torch.save(adm, tmp_path / "m.pt")
    config, parameters = import_checkpoint(tmp_path / "m.pt", shapes_of(model.config), num_heads=1)
    assert config == ForeignCheckpoint.open(tmp_path / "m.pt", num_heads=1).config
    assert_same_tensors(parameters, model.state_dict())


@pytest.mark.parametrize("wrapped", ["plain", "state_dict", "module", "model.diffusion_model", "list"])
def test_the_state_dict_is_found_in_any_wrapping(model, adm, tmp_path, wrapped):
    state = {
        "plain": adm,
        "state_dict": {"state_dict": adm, "epoch": 3},
        "module": {f"module.{name}": p for name, p in adm.items()},
        "model.diffusion_model": {f"model.diffusion_model.{name}": p for name, p in adm.items()}
        | {"first_stage_model.x": torch.zeros(1), "betas": torch.zeros(10)},
        "list": [adm, {"step": 1}],
    }[wrapped]
    assert_same_tensors(load_adm(state, tmp_path).state_dict(), model.state_dict())


def test_ema_takes_the_averaged_weights(model, adm, tmp_path):
    state = {f"model.diffusion_model.{name}": p for name, p in adm.items()}
    state |= {"model_ema." + f"diffusion_model.{name}".replace(".", ""): p + 1 for name, p in adm.items()}
    assert torch.equal(load_adm(state, tmp_path).input_conv.bias, model.input_conv.bias)
    assert torch.equal(load_adm(state, tmp_path, ema=True).input_conv.bias, model.input_conv.bias + 1)
    with pytest.raises(ValueError, match="no averaged weights"):
        load_adm(adm, tmp_path, ema=True)


def test_heads_and_packing_are_asked_for_where_shapes_do_not_tell(adm, tmp_path):
    torch.save(adm, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"number of attention heads.*give num_heads"):
        UNet.from_pretrained(tmp_path / "m.pt")
    with pytest.raises(ValueError, match="qkv_order='legacy' or 'new'"):
        UNet.from_pretrained(tmp_path / "m.pt", num_heads=2)
    legacy = UNet.from_pretrained(tmp_path / "m.pt", num_heads=2, qkv_order="legacy")
    new = UNet.from_pretrained(tmp_path / "m.pt", num_heads=2, qkv_order="new")
    assert not torch.equal(legacy.bottleneck[1].attn.to_q.weight, new.bottleneck[1].attn.to_q.weight)
    assert legacy.bottleneck[1].attn.num_heads == 2


@pytest.mark.parametrize("size", [32, (16, 32)])
def test_another_image_size_keeps_attention_at_its_levels(size, model, adm, tmp_path):
    again = load_adm(adm, tmp_path, image_size=size)
    assert again.config.image_size == size
    assert torch.equal(again.bottleneck[1].attn.to_q.weight, model.bottleneck[1].attn.to_q.weight)
    export_checkpoint(model.state_dict(), replace(model.config, image_size=(8, 4)), tmp_path / "d", "diffusers")
    assert UNet.from_pretrained(tmp_path / "d").config.image_size == (8, 4)


@pytest.mark.parametrize(
    ("options", "description"),
    [
        ({}, "this looks like sd-1.5"),
        ({"in_channels": 6}, "this looks like sd-1.5 with in_channels=6"),
        ({"model_channels": 64, "num_res_blocks": 1, "context_dim": 8, "modulation": "scale_shift"}, "no published"),
    ],
)
def test_a_network_is_described_by_the_nearest_published_one(options, description):
    assert description in describe(replace(preset("sd-1.5"), **options))


def test_only_cross_attention_is_read_from_the_diffusers_config():
    """With a context as wide as a level, shapes do not tell; the bottleneck has self-attention in any case."""
    config = {"_class_name": "UNet2DConditionModel", "only_cross_attention": [True, False], "cross_attention_dim": 32}
    down, up = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
    assert from_diffusers(config)[0]["only_cross_attention"] == (True, False)
    config |= {"down_block_types": down, "up_block_types": up}
    for only in (True, [True, True]):  # the last level has no attention
        assert from_diffusers(config | {"only_cross_attention": only})[0]["only_cross_attention"] == (True, False)
    assert "only_cross_attention" not in from_diffusers(config | {"only_cross_attention": False})[0]


UNET2D = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


@pytest.mark.parametrize(("variant", "sharded"), [(None, False), (None, True), ("fp16", False), ("fp16", True)])
def test_only_the_needed_files_of_a_repository_are_fetched(variant, sharded, tmp_path, monkeypatch):
    """Shards and variants too, from the hub and from a folder alike."""
    peer = randomise(diffusers.UNet2DModel(**UNET2D))
    sizes = {"max_shard_size": "200KB"} if sharded else {}
    peer.save_pretrained(tmp_path / "repo/unet", variant=variant, **sizes)
    fetched = []

    def download(repo_id, name, *, subfolder=None, **hub):
        fetched.append(name)
        if not (file := tmp_path / "repo" / subfolder / name).is_file():
            raise LocalEntryNotFoundError(f"no {name}")
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    model = UNet.from_pretrained("owner/name", subfolder="unet", variant=variant)
    assert_same_tensors(export_state_dict(model.state_dict(), model.config, "diffusers"), peer.state_dict())
    assert {file.name for file in (tmp_path / "repo/unet").iterdir()} <= set(fetched)
    local = UNet.from_pretrained(tmp_path / "repo", subfolder="unet")
    assert torch.equal(local.input_conv.weight, model.input_conv.weight)
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model.int8.safetensors"):
        UNet.from_pretrained(tmp_path / "repo", subfolder="unet", variant="int8")
