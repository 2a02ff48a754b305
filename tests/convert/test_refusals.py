"""Foreign checkpoints that are damaged, mislabelled, malicious or of another family: one clear refusal each."""

import json
import os
import pickle
from dataclasses import replace

import diffusers
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from support.family import FAMILY
from support.networks import randomise
from unet_denoiser import UNet, UNetConfig, preset
from unet_denoiser.convert.architecture import describe
from unet_denoiser.convert.checkpoint import export_checkpoint, export_state_dict, import_checkpoint
from unet_denoiser.convert.diffusers_config import from_diffusers, to_diffusers


def shapes_of(config):
    with torch.device("meta"):
        return {name: p.shape for name, p in UNet.from_config(config).state_dict().items()}


@pytest.fixture
def model():
    return randomise(UNet(**FAMILY)).eval()


@pytest.fixture
def adm(model):
    """The state dict in ADM's names."""
    return export_state_dict(model.state_dict(), model.config, "compvis")


def load(state, tmp_path, **options):
    torch.save(state, tmp_path / "m.pt")
    return UNet.from_pretrained(tmp_path / "m.pt", **{"num_heads": 1} | options)


@pytest.mark.parametrize("wrapped", ["plain", "state_dict", "module", "model.diffusion_model", "list"])
def test_wrappings(model, adm, tmp_path, wrapped):
    state = {
        "plain": adm,
        "state_dict": {"state_dict": adm, "epoch": 3},
        "module": {f"module.{name}": p for name, p in adm.items()},
        "model.diffusion_model": {f"model.diffusion_model.{name}": p for name, p in adm.items()}
        | {"first_stage_model.x": torch.zeros(1), "betas": torch.zeros(10)},
        "list": [adm, {"step": 1}],
    }[wrapped]
    again = load(state, tmp_path)
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in again.state_dict().items())


def test_averaged_weights_on_request(model, adm, tmp_path):
    state = {f"model.diffusion_model.{name}": p for name, p in adm.items()}
    state |= {"model_ema." + f"diffusion_model.{name}".replace(".", ""): p + 1 for name, p in adm.items()}
    assert torch.equal(load(state, tmp_path).input_conv.bias, model.input_conv.bias)
    assert torch.equal(load(state, tmp_path, ema=True).input_conv.bias, model.input_conv.bias + 1)
    with pytest.raises(ValueError, match="no averaged weights"):
        load(adm, tmp_path, ema=True)


def change(name, value=None):
    """A state dict with one tensor removed, or replaced."""

    def edit(state):
        rest = {k: v for k, v in state.items() if k != name}
        return rest if value is None else rest | {name: value}

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("middle_block.1.norm.weight"), r"it lacks middle_block\.1\.norm\.weight"),
        (change("extra", torch.zeros(2)), "it has extra, which the network lacks"),
        (change("out.2.bias", torch.zeros(5)), r"it has out\.2\.bias \(5,\), not \(3,\)"),
        (change("middle_block.1.qkv.weight", torch.zeros(7, 16, 1)), r"qkv\.weight \(7, 16, 1\), not \(48, 16\)"),
        (change("input_blocks.0.0.weight"), "not a U-Net of this family"),
        (change("time_embed.0.weight"), r"the checkpoint lacks time_embed\.0\.weight"),
        (lambda state: {}, "no tensors at all"),
        (lambda state: {"conv1.weight": torch.zeros(3)}, r"not a U-Net of this family: it has conv1\.weight"),
        (lambda state: {k: v for k, v in state.items() if "output_blocks" not in k}, "not a whole U-Net"),
    ],
)
def test_refuses_state_dicts(adm, tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        load(edit(adm), tmp_path)


def test_asks_for_what_the_file_does_not_tell(adm, tmp_path):
    torch.save(adm, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"number of attention heads.*give num_heads"):
        UNet.from_pretrained(tmp_path / "m.pt")
    with pytest.raises(ValueError, match="qkv_order='legacy' or 'new'"):
        UNet.from_pretrained(tmp_path / "m.pt", num_heads=2)
    legacy = UNet.from_pretrained(tmp_path / "m.pt", num_heads=2, qkv_order="legacy")
    new = UNet.from_pretrained(tmp_path / "m.pt", num_heads=2, qkv_order="new")
    assert not torch.equal(legacy.bottleneck[1].attn.to_q.weight, new.bottleneck[1].attn.to_q.weight)
    assert legacy.bottleneck[1].attn.num_heads == 2


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_refuses_files(adm, tmp_path):
    with (tmp_path / "evil.pt").open("wb") as file:
        pickle.dump({"model": Malicious(tmp_path / "owned")}, file)
    torch.save({"model": Malicious(tmp_path / "owned")}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(ValueError, match=rf"{name} (holds .* would run posix\.mkdir|is not a readable)"):
            UNet.from_pretrained(tmp_path / name)
    assert not (tmp_path / "owned").exists()
    torch.save(adm, tmp_path / "cut.pt")
    content = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    save_file({name: p.contiguous() for name, p in adm.items()}, tmp_path / "cut.safetensors")
    content = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.ckpt").write_text("version https://git-lfs")
    for name in ("cut.pt", "cut.safetensors", "text.ckpt"):
        with pytest.raises(ValueError, match=f"{name} (is not a readable|holds more)"):
            UNet.from_pretrained(tmp_path / name)
    (tmp_path / "json.pt").write_text("{}")
    with pytest.raises(ValueError, match="it holds something else than pickled tensors"):
        UNet.from_pretrained(tmp_path / "json.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="not a state dict"):
        UNet.from_pretrained(tmp_path / "tensor.pt")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "UNet3DConditionModel"}, "_class_name='UNet3DConditionModel' is not"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier' has no counterpart"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"down_block_types": ["SkipDownBlock2D"]}, "down_block_types has 'SkipDownBlock2D'"),
        ({"freq_shift": 2}, "freq_shift=2"),
        ({"down_block_types": 3}, "down_block_types has 3"),
        ({"downsample_padding": "x"}, "downsample_padding='x'"),
        ({"mid_block_scale_factor": 1.41}, r"mid_block_scale_factor=1\.41"),
        ({"_class_name": "UNet2DConditionModel", "mid_block_type": None}, "mid_block_type=None"),
    ],
)
def test_refuses_diffusers_networks_it_cannot_be(config, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": 1}, "dims=1"),
        ({"upsample": "conv_transpose"}, "upsample='conv_transpose'"),
        ({"downsample": "avgpool"}, "downsample='avgpool'"),
        ({"context_dim": 6}, "context_dim=6"),
        ({"num_classes": 3, "learned_null": True}, "learned_null=True"),
        ({"num_heads": 2, "attention_resolutions": (8, 4)}, "num_heads=2 gives heads of"),
        ({"stem_channels": 4}, "stem_channels=4"),
    ],
)
def test_refuses_what_diffusers_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        to_diffusers(UNetConfig(**FAMILY | options))


def test_refuses_parameters_without_a_place(tmp_path):
    model = UNet(**FAMILY | {"context_dim": 6})
    with pytest.raises(ValueError, match="no place for"):
        export_checkpoint(model.state_dict(), model.config, tmp_path / "m.safetensors", "ddpm")
    with pytest.raises(ValueError, match=r"give a name that ends in \.safetensors"):
        export_checkpoint(model.state_dict(), model.config, tmp_path / "m", "adm")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 3, "b": "../x"}}])
def test_an_index_without_files_is_refused(index, model, tmp_path):
    export_checkpoint(model.state_dict(), model.config, tmp_path / "d", "diffusers")
    (tmp_path / "d" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json has weight_map=.*; it must give a file beside it"):
        UNet.from_pretrained(tmp_path / "d")


@pytest.mark.parametrize("size", [32, (16, 32)])
def test_attention_stays_where_the_file_has_it(size, model, adm, tmp_path):
    again = load(adm, tmp_path, image_size=size)
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
def test_describes_a_network_by_the_nearest_published_one(options, description):
    assert description in describe(replace(preset("sd-1.5"), **options))


@pytest.mark.parametrize(
    ("prefix", "layer"),
    [
        ("input_blocks.8.1.", "it lacks the attention of encoder block 7 (input_blocks.8.1.norm.weight and 25 more)"),
        ("input_blocks.3.", "it lacks the downsampling of encoder block 2 (input_blocks.3.0.op.weight and 1 more)"),
        ("middle_block.1.", "it lacks the attention of the bottleneck (middle_block.1.norm.weight and 25 more)"),
    ],
)
def test_names_the_layer_that_a_published_file_lacks(prefix, layer, monkeypatch):
    """Stable Diffusion without one layer; on the meta device, so without its 3.4 GB."""
    with torch.device("meta"):
        whole = export_state_dict(UNet.from_preset("sd-1.5").state_dict(), preset("sd-1.5"), "compvis")
    state = {name: tensor for name, tensor in whole.items() if not name.startswith(prefix)}
    monkeypatch.setattr("unet_denoiser.convert.checkpoint.read_state", lambda *args: (state, None))
    with pytest.raises(ValueError, match=r"^this looks like sd-1.5.*, but the checkpoint does not fit: ") as caught:
        import_checkpoint("sd.safetensors", shapes_of(preset("sd-1.5")))
    assert layer in str(caught.value)


def test_an_order_that_is_not_open_is_refused(model, tmp_path):
    export_checkpoint(model.state_dict(), model.config, tmp_path / "d.safetensors", "ddpm")
    with pytest.raises(ValueError, match="qkv_order='new': this file does not leave the order open"):
        UNet.from_pretrained(tmp_path / "d.safetensors", num_heads=1, qkv_order="new")


UNET2D = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


@pytest.mark.parametrize(("variant", "sharded"), [(None, False), (None, True), ("fp16", False), ("fp16", True)])
def test_a_part_of_a_repository(variant, sharded, tmp_path, monkeypatch):
    """Only the files that are needed are fetched, shards and variants too, from the hub and from a folder alike."""
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
    back = export_state_dict(model.state_dict(), model.config, "diffusers")
    assert all(torch.equal(tensor, peer.state_dict()[name]) for name, tensor in back.items())
    assert {file.name for file in (tmp_path / "repo/unet").iterdir()} <= set(fetched)
    local = UNet.from_pretrained(tmp_path / "repo", subfolder="unet")
    assert torch.equal(local.input_conv.weight, model.input_conv.weight)
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model.int8.safetensors"):
        UNet.from_pretrained(tmp_path / "repo", subfolder="unet", variant="int8")


@pytest.mark.parametrize("layout", ["compvis", "diffusers", "ddpm"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (1, 1), (2, 0, 3, 3), (1, 2, 3, 4, 5, 6)])
def test_any_tensor_of_any_shape_is_one_clear_refusal(layout, shape, model, monkeypatch):
    whole = export_state_dict(model.state_dict(), model.config, layout)
    for name in list(whole)[::13]:  # all of them were tried once, in two minutes
        if whole[name].shape != shape:
            state = whole | {name: torch.zeros(shape)}
            monkeypatch.setattr("unet_denoiser.convert.checkpoint.read_state", lambda *args, state=state: (state, None))
            with pytest.raises((ValueError, TypeError)) as caught:
                import_checkpoint("m.pt", shapes_of(model.config), num_heads=1)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_norm_num_groups": 16, "norm_num_groups": 4}, "norm_num_groups=4 with attn_norm_num_groups=16"),
        ({"norm_num_groups": None}, "norm_num_groups=None"),
        (
            {"_class_name": "UNet2DConditionModel", "only_cross_attention": [False, True]},
            r"mid_block_only_cross_attention=False beside only_cross_attention=\[False, True\]",
        ),
    ],
)
def test_diffusers_options_without_a_counterpart(options, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers(options)


def test_cross_attention_alone_is_read_where_shapes_cannot_tell():
    """With a context as wide as a level."""
    config = {"_class_name": "UNet2DConditionModel", "only_cross_attention": [True, False], "cross_attention_dim": 32}
    assert from_diffusers(config)[0]["only_cross_attention"] == (True, False)
    assert from_diffusers(config | {"only_cross_attention": True})[0]["only_cross_attention"] is True
    assert "only_cross_attention" not in from_diffusers(config | {"only_cross_attention": False})[0]
