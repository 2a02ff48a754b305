"""Weights without their folder: what shapes do not tell is read beside them, taken from a known network, or asked."""

import json
import warnings
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import DIFFUSERS
from support.networks import randomise
from unet_denoiser import UNet, preset
from unet_denoiser.convert import checkpoint as checkpoints
from unet_denoiser.convert.checkpoint import ForeignCheckpoint, export_checkpoint, export_state_dict
from unet_denoiser.models.verify import compare

ALL = {"head_dim": 8, "time_frequencies": "endpoint", "norm_eps": 1e-6, "norm_groups": 4, "downsample": "conv"}


@pytest.fixture
def folder(tmp_path):
    """A diffusers folder whose conventions are no defaults."""
    kind, options = DIFFUSERS["ldm-vq4"]
    conventions = {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "attention_head_dim": 8}
    randomise(kind(**options | conventions)).save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def rename(folder, name):
    return (folder / "diffusion_pytorch_model.safetensors").rename(folder / name)


def check(model, folder):
    peer = diffusers.UNet2DModel.from_config(json.loads((folder / "config.json").read_text()))
    file = next(folder.glob("*.safetensors"), None)
    peer.load_state_dict(load_file(file) if file else torch.load(next(folder.glob("*.bin"))))
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([7])
    with torch.no_grad():
        expected = peer.eval()(x, t).sample
        assert (model(x, t) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.non_ema.safetensors",
        "model.safetensors",
        "model-00001-of-00001.safetensors",
    ],
)
def test_config_json_beside_a_file_is_read(name, folder):
    check(UNet.from_pretrained(rename(folder, name)), folder)


def test_the_folder_of_accelerate_is_read(folder):
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    for source in (folder, folder / "pytorch_model.bin"):
        check(UNet.from_pretrained(source), folder)
    save_file(state, folder / "model.safetensors")
    check(UNet.from_pretrained(folder), folder)


def test_a_diffusers_file_alone_asks_for_all_that_is_untold(folder, tmp_path):
    file = rename(folder, "../alone.safetensors")
    for given in ({}, {"head_dim": 8}, {name: ALL[name] for name in list(ALL)[1:]}, {**ALL, "head_dim": None}):
        options = {name: value for name, value in given.items() if value is not None}
        with pytest.raises(
            ValueError, match=r"no config\.json tells.*head_dim, time_frequencies .*norm_eps, norm_groups"
        ):
            UNet.from_pretrained(file, **options)
    checkpoint = ForeignCheckpoint.open(file, **ALL)
    save_file(checkpoint.tensors, folder / "diffusion_pytorch_model.safetensors")
    model = UNet.from_checkpoint(checkpoint)
    check(model, folder)
    with pytest.raises(ValueError, match=r"verify: .* has no config\.json beside it"):
        compare(checkpoint, model)


@pytest.mark.parametrize("change", [{"block_out_channels": [32, 32]}, {"in_channels": 4}, {"layers_per_block": 3}])
def test_a_config_of_other_weights_is_refused(change, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    for source in (folder, folder / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(ValueError, match=f"{next(iter(change))}=.* in config.json, but the weights have"):
            UNet.from_pretrained(source)


@pytest.mark.parametrize(
    "name", ["ddpm-cifar10", "ddpm-celeba64", "ddpm-256", "sd-1.5", "sd-2", "sdxl-base", "adm-256"]
)
@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
def test_a_known_network_tells_the_rest(name, layout, monkeypatch):
    """On the meta device, so without the memory of its weights."""
    config = preset(name)
    with torch.device("meta"):
        state = export_state_dict(UNet.from_config(config).state_dict(), config, layout)
    monkeypatch.setattr(checkpoints, "read_state", lambda *args, **options: state)
    if layout == "compvis":
        if name.startswith("ddpm"):
            return  # no file of DDPM has such names
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ForeignCheckpoint.open("x.pt").config == config
        return
    with pytest.warns(UserWarning, match=f"its shapes are those of {name}, from which the rest is taken: heads, time_"):
        found = ForeignCheckpoint.open("x.pt")
    assert found.config == config
    assert found.kind.cosines_first == (config.time_frequencies == "half")
    with pytest.warns(UserWarning, match="from which"):
        given = ForeignCheckpoint.open("x.pt", num_heads=2, norm_eps=0.5)
    assert given.config == replace(config, num_heads=2, head_dim=None, norm_eps=0.5)


def test_a_replaced_layer_is_not_written_under_the_old_configuration(folder, tmp_path):
    model = UNet.from_pretrained(folder)
    model.input_conv = torch.nn.Conv2d(7, 32, 3, padding=1)
    for to, target in (("diffusers", "d"), ("ldm", "m.safetensors")):
        with pytest.raises(ValueError, match=r"in_channels=3; .* dataclasses.replace\(model.config, in_channels=7\)"):
            export_checkpoint(model.state_dict(), model.config, tmp_path / target, to)
        assert not (tmp_path / target).exists()
    export_checkpoint(model.state_dict(), replace(model.config, in_channels=7), tmp_path / "d", "diffusers")
    assert UNet.from_pretrained(tmp_path / "d").config.in_channels == 7
