"""The Unet class of denoising-diffusion-pytorch, imported where torchvision is not installed too."""

import importlib
import importlib.util
import sys
import types
from typing import Any


def _unet_class() -> Any:
    """denoising_diffusion_pytorch.Unet.

    The class stands in one module with a trainer, which imports torchvision for its pictures. The network uses nothing
    of it, so an empty module stands in during the import, and is taken away again before others find it.
    """
    if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
        raise SystemExit(
            "pip install --no-deps -r benchmarks/requirements.txt  # denoising-diffusion-pytorch is missing"
        )
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("denoising_diffusion_pytorch").Unet
    stand_in = types.ModuleType("torchvision")
    stand_in.transforms = stand_in.utils = None
    sys.modules["torchvision"] = stand_in
    try:
        return importlib.import_module("denoising_diffusion_pytorch").Unet
    finally:
        del sys.modules["torchvision"]


Unet = _unet_class()
