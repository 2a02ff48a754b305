"""Unet and GaussianDiffusion of denoising-diffusion-pytorch, also without torchvision."""

import importlib
import importlib.util
import sys
import types
from typing import Any


def _import() -> Any:
    """Import the package's main module.

    Its trainer imports torchvision, which network and process do not use. Where it is not installed, an empty module
    stands in for it during the import only, so that other packages do not find it.
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


_module = _import()
Unet, GaussianDiffusion = _module.Unet, _module.GaussianDiffusion
