"""Unet and GaussianDiffusion of denoising-diffusion-pytorch, imported where torchvision is not installed too."""

import importlib
import importlib.util
import sys
import types
from typing import Any


def _module() -> Any:
    """The package's main module.

    It also has a trainer, which imports torchvision for its pictures. Network and process use nothing of it, so an
    empty module stands in during the import, and is taken away again before others find it.
    """
    name = "denoising_diffusion_pytorch"
    if importlib.util.find_spec(name) is None:
        raise SystemExit(
            "pip install --no-deps -r benchmarks/requirements.txt  # denoising-diffusion-pytorch is missing"
        )
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module(name)
    stand_in = types.ModuleType("torchvision")
    stand_in.transforms = stand_in.utils = None
    sys.modules["torchvision"] = stand_in
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules["torchvision"]


Unet, GaussianDiffusion = _module().Unet, _module().GaussianDiffusion
