"""Foreign checkpoints that are damaged, mislabelled, malicious or of another family: one clear refusal each."""

import json
import os
import pickle
import re

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from support.checkpoints import load_adm, shapes_of
from support.family import FAMILY
from support.networks import randomise
from unet_denoiser import UNet, UNetConfig, preset
from unet_denoiser.convert.checkpoint import ForeignCheckpoint, export_checkpoint, export_state_dict
from unet_denoiser.convert.diffusers_config import from_diffusers, to_diffusers
from unet_denoiser.convert.key_maps import LAYOUTS
from unet_denoiser.convert.layout import BlockStructure


@pytest.fixture
def model():
    return randomise(UNet(**FAMILY)).eval()


@pytest.fixture
def adm(model):
    """The state dict in ADM's names."""
    return export_state_dict(model.state_dict(), model.config, "compvis")


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
def test_a_damaged_state_dict_is_refused_by_its_tensor(adm, tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        load_adm(edit(adm), tmp_path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_its_code_not_run(tmp_path):
    with (tmp_path / "evil.pt").open("wb") as file:
        pickle.dump({"model": Malicious(tmp_path / "owned")}, file)
    torch.save({"model": Malicious(tmp_path / "owned")}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(ValueError, match=rf"{name} (holds .* would run posix\.mkdir|is not a readable)"):
            UNet.from_pretrained(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_a_file_cut_in_half_is_refused_by_name(adm, tmp_path):
    torch.save(adm, tmp_path / "cut.pt")
    save_file({name: p.contiguous() for name, p in adm.items()}, tmp_path / "cut.safetensors")
    for name in ("cut.pt", "cut.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=f"{name} is not a readable"):
            UNet.from_pretrained(tmp_path / name)


def test_a_file_of_something_else_is_refused_by_name(tmp_path):
    (tmp_path / "text.ckpt").write_text("version https://git-lfs")
    (tmp_path / "json.pt").write_text("{}")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    messages = {
        "text.ckpt": r"text.ckpt is not a readable checkpoint: it is a pointer of git-lfs",
        "json.pt": r"json.pt is not a readable checkpoint: it is a JSON text",
        "tensor.pt": r"tensor.pt: it holds a Tensor, not a state dict",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            UNet.from_pretrained(tmp_path / name)


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
        ({"attn_norm_num_groups": 16, "norm_num_groups": 4}, "norm_num_groups=4 with attn_norm_num_groups=16"),
        ({"norm_num_groups": None}, "norm_num_groups=None"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None with resnet_time_scale_shift"),
        (
            {"_class_name": "UNet2DConditionModel", "mid_block_type": "UNetMidBlock2D"},
            "mid_block_type='UNetMidBlock2D'",
        ),
        ({"attention_head_dim": 0}, "attention_head_dim=0"),
        ({"addition_embed_type": "text_time", "addition_time_embed_dim": 128}, "addition_time_embed_dim=128"),
        (
            {"_class_name": "UNet2DConditionModel", "only_cross_attention": [False, True]},
            r"only_cross_attention=\[False, True\] has no counterpart here: it is true for the last level",
        ),
    ],
)
def test_a_diffusers_config_without_a_counterpart_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers(config)


TRANSFORMER = {"attention": "transformer", "context_dim": 6}
CLASSES = [*dir(diffusers), "FlaxUNet2DConditionModel", "WuerstchenPrior", "CLIPTextModel"]
CLASSES = [n for n in CLASSES if re.search("Model|UNet|Adapter|Autoencoder|VAE|Prior", n)]


@pytest.mark.parametrize("name", [n for n in CLASSES if n not in ("UNet2DModel", "UNet2DConditionModel")])
def test_every_other_class_is_refused_by_its_name(name):
    with pytest.raises(ValueError, match=f"_class_name='{name}' is not UNet2DModel or UNet2DConditionModel"):
        from_diffusers({"_class_name": name, "act_fn": "gelu", "down_block_types": ["Other"]})


WEIGHTS_OF = {
    "in_channels": 8,
    "out_channels": 7,
    "block_out_channels": [8, 32],
    "layers_per_block": 3,
    "num_class_embeds": 5,
    "resnet_time_scale_shift": "scale_shift",
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
}


@pytest.mark.parametrize("field", WEIGHTS_OF)
def test_a_diffusers_config_of_other_weights_is_refused_by_its_field(field, model, tmp_path):
    export_checkpoint(model.state_dict(), model.config, tmp_path / "d", "diffusers")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    edited = config | {field: WEIGHTS_OF[field]}
    if field == "down_block_types":
        edited["up_block_types"] = ["UpBlock2D", "UpBlock2D"]
    (tmp_path / "d" / "config.json").write_text(json.dumps(edited))
    with pytest.raises(ValueError, match=f"{field}=.* in config.json, but the weights have"):
        UNet.from_pretrained(tmp_path / "d")


def test_a_configuration_of_another_library_is_named():
    for options in ({"_class_name": "ControlNetModel"}, {"architectures": ["CLIPTextModel"], "hidden_size": 3}):
        name = options.get("_class_name") or "CLIPTextModel"
        with pytest.raises(ValueError, match=f"this is the configuration of .*{name}.*, not of this library's U-Net"):
            UNetConfig.from_dict(options)


DISTILLED = {
    "mid_block.": "this network lacks bottleneck block 0",
    "mid_block.attentions": "this network lacks the attention of the bottleneck",
    "up_blocks.1.attentions.0": "this network lacks the attention of decoder block 2",
    "up_blocks.0.attentions.1.transformer_blocks.1": "decoder block 1 .* has 1 transformer blocks",
    "mid_block.attentions.0.transformer_blocks.1": "has 2 transformer blocks, and others of its level 1",
}


@pytest.mark.parametrize("missing", DISTILLED)
@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
def test_a_file_of_a_distilled_network_is_refused_before_heads_are_asked_for(layout, missing, tmp_path):
    """SSD-1B, Vega, KOALA, small Stable Diffusion and SDXS, each by what it leaves out."""
    options = {"attention": "transformer", "context_dim": 6, "transformer_depth": 2, "attention_resolutions": (8, 4)}
    config = UNetConfig(**FAMILY | options)
    structure = BlockStructure.from_config(config)
    whole = randomise(UNet.from_config(config)).state_dict()
    kept = {n: t for n, t in whole.items() if not LAYOUTS["diffusers"].key_map(n, structure).name.startswith(missing)}
    torch.save(export_state_dict(kept, config, layout), tmp_path / "m.pt")
    with pytest.raises(ValueError, match=DISTILLED[missing]):
        UNet.from_pretrained(tmp_path / "m.pt")


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
        (TRANSFORMER | {"upsample": "resblock"}, "upsample='resblock'"),
        (TRANSFORMER | {"upsample": "resblock", "downsample": "resblock"}, "downsample='resblock'"),
        (TRANSFORMER | {"only_cross_attention": True}, "only_cross_attention=True"),
        (TRANSFORMER | {"only_cross_attention": (False, True)}, r"only_cross_attention=\(False, True\)"),
        (TRANSFORMER | {"vector_dim": 4, "num_classes": 3}, "vector_dim=4"),
        ({"vector_dim": 2000}, "vector_dim=2000"),
    ],
)
def test_a_network_without_a_diffusers_counterpart_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        to_diffusers(UNetConfig(**FAMILY | options))


def test_a_network_that_the_format_cannot_hold_is_not_written(tmp_path):
    model = UNet(**FAMILY | {"context_dim": 6})
    with pytest.raises(ValueError, match="no place for"):
        export_checkpoint(model.state_dict(), model.config, tmp_path / "m.safetensors", "ddpm")
    with pytest.raises(ValueError, match=r"give a name that ends in \.safetensors"):
        export_checkpoint(model.state_dict(), model.config, tmp_path / "m", "adm")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 3, "b": "../x"}}])
def test_a_shard_index_without_files_is_refused(index, model, tmp_path):
    export_checkpoint(model.state_dict(), model.config, tmp_path / "d", "diffusers")
    (tmp_path / "d" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json has weight_map=.*; it must give a file beside it"):
        UNet.from_pretrained(tmp_path / "d")


@pytest.mark.parametrize(
    ("prefix", "layer"),
    [
        ("input_blocks.8.1.", "it lacks the attention of encoder block 7 (input_blocks.8.1.norm.weight and 25 more)"),
        ("input_blocks.3.", "it lacks the downsampling of encoder block 2 (input_blocks.3.0.op.weight and 1 more)"),
        ("middle_block.1.", "it lacks the attention of the bottleneck (middle_block.1.norm.weight and 25 more)"),
    ],
)
def test_a_missing_layer_is_named(prefix, layer, monkeypatch):
    """Stable Diffusion without one layer; on the meta device, so without its 3.4 GB."""
    with torch.device("meta"):
        whole = export_state_dict(UNet.from_preset("sd-1.5").state_dict(), preset("sd-1.5"), "compvis")
    state = {name: tensor for name, tensor in whole.items() if not name.startswith(prefix)}
    monkeypatch.setattr("unet_denoiser.convert.checkpoint.read_state", lambda *args, **options: state)
    with pytest.raises(ValueError, match=r"^this looks like sd-1.5.*, but the checkpoint does not fit: ") as caught:
        ForeignCheckpoint.open("sd.safetensors").parameters(shapes_of(preset("sd-1.5")))
    assert layer in str(caught.value)


def test_qkv_order_is_refused_where_nothing_is_packed(model, tmp_path):
    export_checkpoint(model.state_dict(), model.config, tmp_path / "d.safetensors", "ddpm")
    with pytest.raises(ValueError, match="qkv_order='new': this file does not leave the order open"):
        UNet.from_pretrained(tmp_path / "d.safetensors", num_heads=1, qkv_order="new")


@pytest.mark.parametrize("layout", ["compvis", "diffusers", "ddpm"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (1, 1), (2, 0, 3, 3), (1, 2, 3, 4, 5, 6)])
def test_a_tensor_of_any_wrong_shape_is_refused_in_one_line(layout, shape, model, monkeypatch):
    whole = export_state_dict(model.state_dict(), model.config, layout)
    for name in list(whole)[::13]:  # all of them were tried once, in two minutes
        if whole[name].shape != shape:
            state = whole | {name: torch.zeros(shape)}
            monkeypatch.setattr(
                "unet_denoiser.convert.checkpoint.read_state", lambda *args, state=state, **options: state
            )
            with pytest.raises((ValueError, TypeError)) as caught:  # noqa: PT012
                checkpoint = ForeignCheckpoint.open("m.pt", num_heads=1)
                checkpoint.parameters(shapes_of(checkpoint.config))
            assert "\n" not in str(caught.value)
