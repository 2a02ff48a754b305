"""What imports cost, that each sub-package imports alone, and the public names."""

import json
import os
import pkgutil
import subprocess
import sys

import pytest

import unet_denoiser

HEAVY = [
    "openvino",
    "nncf",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "diffusers",
    "accelerate",
    "transformers",
    "datasets",
    "huggingface_hub",
    "PIL",
    "tyro",
    "sklearn",
]

PUBLIC_NAMES = {
    "app": "",
    "cli": "main",
    "config": "UNetConfig DiffusionConfig TrainingConfig DataConfig SamplingConfig EditingConfig MemoryConfig preset "
    "DistillationConfig ExportConfig "
    "list_presets",
    "convert": "import_checkpoint export_state_dict export_checkpoint merge_lora",
    "data": "load_data make_loader ImageDataset ArrayDataset ImageFolder",
    "diffusion": "Diffusion training_losses Losses LossWeighting",
    "export": "ExportReport ExportRequest export_network",
    "evaluation": "evaluate load_extractor frechet_distance kernel_distance",
    "models": "UNet ResBlock SinusoidalPosEmb SelfAttention CrossAttention",
    "sampling": "sample sample_steps denoise Sampler Guidance Start TrajectoryRecorder image_to_image inpaint outpaint "
    "upscale interpolate invert regenerate",
    "training": "Trainer TrainingStep Distillation EMA Run load_trainer train",
    "utils": "",
}
FROM_DEEPER = {
    "save_grid",
    "summarize",
    "DiffusersUNet",
    "Pipeline",
    "export_pipeline",
}  # public, but in no sub-package's __init__

RUN = """
import torch, unet_denoiser
model = unet_denoiser.UNet(model_channels=8, channel_mult=(1, 2), num_heads=2, context_dim=4, num_classes=3)
model(torch.randn(1, 3, 8, 8), torch.tensor([5]), torch.randn(1, 2, 4)).sum().backward()
"""
SAVE_AND_LOAD = RUN + "model.save_pretrained({directory!r}); unet_denoiser.UNet.from_pretrained({directory!r})"
# each in a process of its own, which begins where torch is imported already
EXPORTS = """
import importlib, json, os, sys
from types import ModuleType
import torch
for name in sys.argv[1:]:
    if os.fork() == 0:
        package = importlib.import_module(f"unet_denoiser.{name}")
        names = [n for n in dir(package) if not n.startswith("_") and not isinstance(getattr(package, n), ModuleType)]
        print(json.dumps([name, sorted(names)]), flush=True)
        os._exit(0)
    os.wait()
"""


def run_code(code, value):
    """Run code in a fresh interpreter, and return the value of an expression after it."""
    code += f"\nimport sys, json; print(json.dumps({value}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def modules_after(code):
    """Return the top-level modules, and unet_denoiser's own, that are imported after the code."""
    modules = run_code(code, "sorted(sys.modules)")
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


def test_every_sub_package_is_in_the_table():
    found = {module.name for module in pkgutil.iter_modules(unet_denoiser.__path__) if module.ispkg}
    assert found == set(PUBLIC_NAMES)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not copied here")
def test_each_sub_package_imports_alone_and_exports_its_names():
    done = subprocess.run([sys.executable, "-c", EXPORTS, *PUBLIC_NAMES], capture_output=True, text=True, check=True)
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert found == {package: sorted(names.split()) for package, names in PUBLIC_NAMES.items()}, done.stderr


def test_the_package_exports_the_names_of_all_sub_packages():
    names = {name for package, names in PUBLIC_NAMES.items() if package != "cli" for name in names.split()}
    assert set(unet_denoiser.__all__) == names | FROM_DEEPER | {"__version__"}
    for package in set(PUBLIC_NAMES) - {"app", "cli", "utils"}:
        assert set(unet_denoiser._EXPORTS[package]) == set(PUBLIC_NAMES[package].split())


def test_public_names():
    for name in ("UNet", "UNetConfig", "ResBlock", "SinusoidalPosEmb", "SelfAttention", "CrossAttention"):
        assert name in unet_denoiser.__all__
        assert getattr(unet_denoiser, name).__name__ == name
        assert name in dir(unet_denoiser)
    assert all(hasattr(unet_denoiser, name) for name in unet_denoiser.__all__)
    with pytest.raises(AttributeError, match=r"unet_denoiser.*'Unet'"):
        _ = unet_denoiser.Unet


@pytest.mark.parametrize(("old", "new"), unet_denoiser._RENAMED.items())
def test_old_names_still_import(old, new):
    assert getattr(unet_denoiser, old) is getattr(unet_denoiser, new)
