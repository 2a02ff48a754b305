"""Names and shapes of the real checkpoints of Stable Diffusion 1 and SDXL, as sd-mecha lists them."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from unet_denoiser import UNet, preset
from unet_denoiser.convert.checkpoint import export_state_dict

# found, not imported: its own dependencies are not installed (see the Makefile)
LISTS = Path(find_spec("sd_mecha").origin).parent / "extensions" / "builtin" / "model_configs"


@pytest.mark.parametrize(
    ("file", "name", "layout", "prefix", "count"),
    [
        ("sd1-ldm", "sd-1.5", "compvis", "model.diffusion_model.", 686),
        ("sdxl-sgm", "sdxl-base", "compvis", "model.diffusion_model.", 1680),
        ("sdxl-diffusers_unet_only", "sdxl-base", "diffusers", "", 1680),
    ],
)
def test_presets_have_the_keys_of_the_real_checkpoints(file, name, layout, prefix, count):
    components = yaml.safe_load((LISTS / f"{file}.yaml").read_text())["components"]
    part = next(key for key in components if "diffuser" in key or "unet" in key)
    real = {key: tuple(entry["shape"]) for key, entry in components[part].items() if key.startswith(prefix)}
    with torch.device("meta"):
        ours = export_state_dict(UNet.from_preset(name).state_dict(), preset(name), layout)
    assert {prefix + key: tuple(p.shape) for key, p in ours.items()} == real
    assert len(real) == count
