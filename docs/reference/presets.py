"""Writes docs/reference/presets.md: the options that make each published network, read from the presets."""

from dataclasses import asdict
from pathlib import Path

import torch

from unet_denoiser import UNet, UNetConfig, list_presets, preset

FAMILIES = {
    "DDPM (Ho et al. 2020)": "ddpm",
    "Improved DDPM (Nichol and Dhariwal 2021)": "iddpm",
    "ADM (Dhariwal and Nichol 2021)": "adm",
    "EDM (Karras et al. 2022)": "edm",
    "Latent diffusion (Rombach et al. 2022)": "ldm",
    "Stable Diffusion 1 and 2": ("sd-1", "instruct", "lcm", "sd-2", "sd-x4"),
    "SDXL (Podell et al. 2023)": "sdxl",
}
HEAD = """# Presets

A preset is the architecture of a published network. `UNet.from_preset(NAME)` builds it with random weights,
`unet-denoiser train DATA --preset NAME` trains one, and `unet-denoiser info NAME` shows its levels. `specification` is
the network of the [specification](../development/specification.md): all options at their defaults.

The tables list the options of `UNetConfig` that are not at their defaults.

`python docs/reference/presets.py` writes this page; a test keeps it in step with the presets.
"""


def options(name: str) -> dict[str, object]:
    """Return the fields of a preset that are not at their defaults."""
    default = asdict(UNetConfig())
    return {field: value for field, value in asdict(preset(name)).items() if value != default[field]}


def table(names: list[str]) -> str:
    """Return the options that all networks of a family share, and a row with the others for each network."""
    own = {name: options(name) for name in names}
    first = own[names[0]]
    shared = {f: v for f, v in first.items() if all(f in o and o[f] == v for o in own.values())}
    lines = ["Shared options: " + ", ".join(f"`{f}={v!r}`" for f, v in shared.items()) + ".", ""]
    lines += ["| name | parameters | other options |", "|---|---|---|"]
    for name in names:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in UNet.from_preset(name).parameters())
        rest = ", ".join(f"`{f}={v!r}`" for f, v in own[name].items() if f not in shared)
        lines.append(f"| {name} | {parameters:,} | {rest} |")
    return "\n".join(lines)


def page() -> str:
    """Return the whole document."""
    parts = [HEAD]
    for title, prefix in FAMILIES.items():
        parts.append(f"## {title}\n\n{table([name for name in list_presets() if name.startswith(prefix)])}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
