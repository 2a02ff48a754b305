"""What importing, building and running cost in imports; and the public names."""

import json
import subprocess
import sys

import pytest

import unet_denoiser

HEAVY = ["diffusers", "accelerate", "transformers", "datasets", "huggingface_hub", "PIL", "tyro", "sklearn"]

RUN = """
import torch, unet_denoiser
model = unet_denoiser.UNet(model_channels=8, channel_mult=(1, 2), num_heads=2, context_dim=4, num_classes=3)
model(torch.randn(1, 3, 8, 8), torch.tensor([5]), torch.randn(1, 2, 4)).sum().backward()
"""
SAVE_AND_LOAD = RUN + "model.save_pretrained({directory!r}); unet_denoiser.UNet.from_pretrained({directory!r})"


def modules_after(code):
    """Top-level names and unet_denoiser's submodules that are imported in a fresh interpreter once the code has run."""
    code += "\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = json.loads(done.stdout)
    return {m.split(".")[0] for m in modules}, {m for m in modules if m.startswith("unet_denoiser.")}


def test_importing_costs_nothing():
    everything, own = modules_after("import unet_denoiser")
    assert own == set()
    assert everything & {*HEAVY, "torch", "numpy", "safetensors"} == set()


def test_config_needs_the_standard_library_alone():
    everything, own = modules_after("from unet_denoiser.config import UNetConfig; UNetConfig()")
    assert all(m.split(".")[1] == "config" for m in own)
    assert everything <= set(sys.stdlib_module_names) | {"unet_denoiser"} | modules_after("")[0]


@pytest.mark.parametrize("code", [RUN, SAVE_AND_LOAD], ids=["run", "save and load"])
def test_building_running_and_saving_import_nothing_heavy(code, tmp_path):
    everything, _ = modules_after(code.format(directory=str(tmp_path)) if "{" in code else code)
    assert "torch" in everything
    assert everything & set(HEAVY) == set()


def test_public_names():
    for name in ("UNet", "UNetConfig", "ResBlock", "SinusoidalPosEmb", "SelfAttention", "CrossAttention"):
        assert name in unet_denoiser.__all__
        assert getattr(unet_denoiser, name).__name__ == name
        assert name in dir(unet_denoiser)
    assert all(hasattr(unet_denoiser, name) for name in unet_denoiser.__all__)
    with pytest.raises(AttributeError, match=r"unet_denoiser.*'Unet'"):
        _ = unet_denoiser.Unet
