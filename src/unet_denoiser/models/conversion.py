"""Convert a checkpoint of any format into any other: the work of the `convert` command."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from unet_denoiser.config.base import ForeignFormat, check_choice
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert.checkpoint import ForeignCheckpoint, export_checkpoint
from unet_denoiser.convert.checkpoint_files import find_config, read_recorded_config
from unet_denoiser.convert.lora import merge_lora
from unet_denoiser.models.pretrained import is_own
from unet_denoiser.models.unet import UNet
from unet_denoiser.models.verify import MAX_RELATIVE_ERROR, Comparison, compare
from unet_denoiser.utils.files import read_json, write_atomically, write_json

NetworkFormat = Literal["unet-denoiser", ForeignFormat]


class Conversion(NamedTuple):
    """Number of parameters, comparison with the checkpoint's own code, number of weights that a LoRA changed."""

    parameters: int
    comparison: Comparison | None
    merged_weights: int | None


def convert_checkpoint(
    source: Path,
    target: Path,
    to: NetworkFormat = "unet-denoiser",
    *,
    lora: Path | None = None,
    lora_scale: float = 1.0,
    verify: bool = False,
    schedulers: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    **options: Any,
) -> Conversion:
    """Write the network of `source` to `target` in another format.

    Args:
        source: anything that `UNet.from_pretrained` loads.
        target: a folder for "unet-denoiser" and "diffusers", else a .safetensors file; it must not exist.
        lora, lora_scale: a LoRA file to merge into the weights, and its strength.
        verify: first compare the outputs with those of the checkpoint's own code.
        schedulers: contents of the `scheduler_config.json` that a network of this library gets, by the layout of
            `source`, for layouts that tell the process.
        options: as for `ForeignCheckpoint.open`.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: a wrong argument or file, by name; then nothing is written.
    """
    check_choice("to", to, NetworkFormat)
    if not math.isfinite(lora_scale):
        raise ValueError(f"lora_scale={lora_scale} must be a finite number, for example 1.0")
    if lora is None and lora_scale != 1:
        raise ValueError(f"lora_scale={lora_scale} needs lora, the file to merge")
    if target.exists():
        raise FileExistsError(f"{target} exists; give a new name")
    own, untold = is_own(source, find_config(source)), options.keys() - {"torch_dtype"}
    if own and untold:
        raise ValueError(f"{source} is this library's own, which tells all; leave out {', '.join(sorted(untold))}")
    if own and verify:
        raise ValueError(f"verify: {source} is this library's own; there is no other code to compare with")
    if own or not source.exists():  # of which `from_pretrained` says more
        model, layout, comparison = UNet.from_pretrained(source, **options), "", None
    else:
        model, layout, comparison = _load_foreign(source, options, verify)
    merged_weights = None if lora is None else merge_lora(model, lora, lora_scale)
    if to == "unet-denoiser":
        write_atomically(target, partial(_save, model, schedulers.get(layout)))
    elif to == "diffusers":
        write_atomically(target, lambda path: export_checkpoint(model.state_dict(), model.config, path, to))
    else:
        export_checkpoint(model.state_dict(), model.config, target, to, qkv_order=options.get("qkv_order"))
    return Conversion(sum(p.numel() for p in model.parameters()), comparison, merged_weights)


def _save(model: UNet, scheduler: Mapping[str, Any] | None, folder: Path) -> None:
    model.save_pretrained(folder)
    if scheduler is not None:
        write_json(folder / "scheduler_config.json", scheduler)


def read_architecture(source: Path) -> UNetConfig:
    """Read the architecture of a local directory or file that `UNet.from_pretrained` loads; errors as there."""
    config_path = find_config(source)
    if not is_own(source, config_path):
        return ForeignCheckpoint.open(source).config
    recorded = read_recorded_config(source) if source.is_file() else {}
    return UNetConfig.from_dict(recorded or read_json(config_path or source))


def _load_foreign(source: Path, options: dict[str, Any], verify: bool) -> tuple[UNet, str, Comparison | None]:
    """Load a checkpoint, which is read once, and its layout; to verify, compare it with its own code.

    ValueError if the outputs differ.
    """
    checkpoint = ForeignCheckpoint.open(source, **options)
    model = UNet.from_checkpoint(checkpoint)
    if not verify:
        return model, checkpoint.layout, None
    comparison = compare(checkpoint, model)
    if not comparison.error < MAX_RELATIVE_ERROR:
        difference = f"{comparison.error:.1e} of the largest output apart"
        raise ValueError(f"{comparison.peer} gives other numbers, {difference}; nothing written")
    return model, checkpoint.layout, comparison
