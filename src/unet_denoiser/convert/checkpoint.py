"""Read a checkpoint of any layout, and write one: pure functions between state dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from unet_denoiser.config.base import ForeignFormat, QKVOrder, check_choice
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert.architecture import (
    describe,
    detect_layout,
    detect_structure,
    fill_from_preset,
    infer_options,
    published_order,
)
from unet_denoiser.convert.checkpoint_files import read_state, save_state
from unet_denoiser.convert.diffusers_config import from_diffusers, has_linear_projections, to_diffusers
from unet_denoiser.convert.key_maps import LAYOUTS, BlockStructure, block_structure
from unet_denoiser.convert.state_dict import FormatVariant, Packing, to_foreign, to_internal

ShapesOf = Callable[[UNetConfig], Mapping[str, Sequence[int]]]


def import_checkpoint(
    path: Path,
    shapes_of: ShapesOf,
    *,
    ema: bool = False,
    variant: str | None = None,
    qkv_order: QKVOrder | None = None,
    **options: Any,
) -> tuple[UNetConfig, dict[str, Tensor]]:
    """The architecture and parameters of a foreign checkpoint.

    Args:
        path: a diffusers folder, or a .safetensors, .ckpt, .pt, .pth or .bin file.
        shapes_of: the names and shapes of our parameters for an architecture.
        ema: take the averaged weights of a file that has both.
        variant: the weights to take of a folder that has several, for example "fp16".
        qkv_order: how ADM files pack their attention, if the network is none of the known ones.
        options: fields of `UNetConfig` that names and shapes do not tell: `num_heads` or `head_dim`, `image_size`, ...

    Raises:
        FileNotFoundError, ValueError: what is wrong, by name.
    """
    state, foreign = read_state(path, ema, variant)
    layout = detect_layout(state)
    bones = detect_structure(layout, state)
    seen = infer_options(layout, {name: tuple(t.shape) for name, t in state.items()}, bones)
    known, cosines_first = None, layout in ("compvis", "edm")
    options = _placed(options.get("image_size", (foreign or {}).get("sample_size")), bones) | options
    if foreign is not None:
        told, cosines_first = from_diffusers(foreign)
        config = _by_head_width(UNetConfig(**seen | told | options))
    elif layout == "edm":
        config = UNetConfig(**seen | options)
    else:
        if layout == "diffusers":
            seen["time_frequencies"], cosines_first = "half", True
        config, known = fill_from_preset(seen, options)
    packed = layout != "edm" and any(".qkv." in name for name in state)
    many_heads = any(config.heads(level) > 1 for level in range(bones.levels))
    if packed and many_heads and qkv_order is None and known is None:
        raise ValueError("the file does not tell how it packs query, key and value; give qkv_order='legacy' or 'new'")
    if qkv_order is not None and not packed:
        raise ValueError(f"qkv_order={qkv_order!r}: this file does not leave the order open; leave it out")
    packing: Packing = "edm" if layout == "edm" else qkv_order or published_order(config)
    dialect = FormatVariant(LAYOUTS[layout], bones, config.heads, packing, cosines_first)
    try:
        return config, to_internal(state, shapes_of(config), dialect)
    except ValueError as error:
        raise ValueError(f"{describe(config)}, but {error}") from None


def export_state_dict(
    state: Mapping[str, Tensor], config: UNetConfig, layout: str, *, qkv_order: QKVOrder | None = None
) -> dict[str, Tensor]:
    """Our parameters under the names of a layout: "compvis" (ADM, LDM, Stable Diffusion), "diffusers", "ddpm" or "edm".

    Args:
        qkv_order: of packed attention (default: that of the published network, "legacy" for most).

    Raises:
        ValueError: a network that the layout cannot hold, by the parameter it has no place for.
    """
    # DDPM's spacing comes with DDPM's order in every layout
    cosines_first = config.time_frequencies == "half"
    linear = has_linear_projections(config)
    packing: Packing = "edm" if layout == "edm" else qkv_order or published_order(config)
    return to_foreign(
        state, FormatVariant(LAYOUTS[layout], block_structure(config), config.heads, packing, cosines_first, linear)
    )


def export_checkpoint(
    state: Mapping[str, Tensor],
    config: UNetConfig,
    path: Path,
    to: ForeignFormat,
    *,
    qkv_order: QKVOrder | None = None,
) -> None:
    """Write our parameters as other tools read them.

    Args:
        to: "diffusers" (a folder), or a .safetensors file: "adm" (ADM, improved-diffusion), "ldm" (the same names below
            model.diffusion_model: LDM, Stable Diffusion) or "ddpm" (the PyTorch port of DDPM).

    Raises:
        ValueError: a network that the format cannot hold, by name.
    """
    check_choice("to", to, ForeignFormat)
    if to == "diffusers":
        foreign = to_diffusers(config)
        save_state(export_state_dict(state, config, "diffusers"), path, foreign)
        return
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the format {to!r} is one file; give a name that ends in .safetensors")
    theirs = export_state_dict(state, config, "ddpm" if to == "ddpm" else "compvis", qkv_order=qkv_order)
    save_state({f"model.diffusion_model.{n}" if to == "ldm" else n: t for n, t in theirs.items()}, path)


def _by_head_width(config: UNetConfig) -> UNetConfig:
    """Heads that differ by level but have one width are given by it, as in our presets."""
    widths = {width // config.heads(level) for level, width in enumerate(config.widths)}
    one_width = isinstance(config.num_heads, tuple) and len(widths) == 1
    return replace(config, num_heads=None, head_dim=widths.pop()) if one_width else config


def _placed(size: Any, bones: BlockStructure) -> dict[str, Any]:
    """The options that have attention where the file has it, in a network for images of this size."""
    sizes = [size] if isinstance(size, int) else size
    if not isinstance(sizes, list | tuple) or not sizes or not all(type(n) is int and n > 0 for n in sizes):
        return {}  # not told, or for `UNetConfig` to refuse
    resolutions = [-(-max(sizes) // 2**level) for level in range(bones.levels)]
    attended = tuple(r for r, has in zip(resolutions, bones.attended, strict=True) if has)
    # two levels of one resolution cannot differ in attention; then the size says less than the layout
    agrees = tuple(r in attended for r in resolutions) == bones.attended
    return {"image_size": size, "attention_resolutions": attended} if agrees else {}
