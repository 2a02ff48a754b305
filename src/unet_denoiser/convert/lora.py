"""LoRA files of diffusers and kohya, merged into our weights (Hu et al. 2021, arXiv 2106.09685)."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unet_denoiser.config.paths import local_path
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert.key_maps import LAYOUTS
from unet_denoiser.convert.layout import BlockStructure
from unet_denoiser.convert.state_dict import swap_halves
from unet_denoiser.utils.tensor_files import read_safetensors

_TEXT_ENCODER_PREFIXES = ("text_encoder", "lora_te")
_DOWN_AND_UP = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"))
_DOWN_NAME = re.compile(r"(.+?)[._](?:lora_A|lora_down|lora\.down)(?:\.default)?\.weight")
_DUPLICATE = "another update for the same weight too; give one of them"
_OLD_NAME = re.compile(r"\.processor\.(to_[\w.]+)_lora\.(down|up)\.")


class _LoraFile(NamedTuple):
    """A LoRA of the U-Net: its name in messages, tensors by current names, and peft's `LoraConfig`."""

    name: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]


class _Update(NamedTuple):
    """The change of one weight by a pair of matrices: strength * up @ down."""

    weight: Tensor
    up: Tensor
    down: Tensor
    strength: float
    swapped: bool

    def compute(self) -> Tensor:
        """Return the changed weight."""
        change = self.up.flatten(1).float() @ self.down.flatten(1).float() * self.strength
        change = swap_halves(change, 1) if self.swapped else change
        return self.weight + change.reshape(self.weight.shape).to(self.weight)


@torch.no_grad()
def merge_lora(model: nn.Module, source: str | Path | Mapping[str, Tensor], scale: float = 1.0) -> int:
    """Add a LoRA's updates to a network's weights: W + scale * (alpha / rank) * up @ down.

    Args:
        model: a `UNet`, changed in place.
        source: a .safetensors file or its tensors, with the names of diffusers ("unet.down_blocks...lora_A.weight") or
            of kohya ("lora_unet_..."), in diffusers' or the LDM layout, or under our own names. Tensors for text
            encoders are ignored. Alphas are read from the tensors, from the file's header, where diffusers saves them,
            or from the adapter_config.json beside peft's adapter_model.safetensors.
        scale: strength, finite; 0 changes nothing, and the negative takes a merged LoRA out again.

    Returns:
        The number of weights that were changed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an update for a weight the network does not have, or of another shape, or a damaged file, by name;
            then no weight has been changed.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be a finite number, for example 1.0")
    lora = _read_lora(source)
    updates = _match_updates(lora, model, scale)
    for name, update in updates.items():
        if not update.compute().isfinite().all():
            raise ValueError(f"{lora.name} makes {name} overflow in {update.weight.dtype} at scale={scale}")
    for update in updates.values():
        update.weight.copy_(update.compute())
    return len(updates)


def _match_updates(lora: _LoraFile, model: nn.Module, scale: float) -> dict[str, _Update]:
    """Return the updates by the names of our weights; ValueError unless every tensor of the LoRA belongs to one."""
    config: UNetConfig = model.config  # type: ignore[assignment]
    modules, used = _map_modules(model, config), set()
    updates: dict[str, _Update] = {}
    for down_name in lora.tensors:
        if (match := _DOWN_NAME.fullmatch(down_name)) is None:
            continue
        up_name = next(down_name.replace(down, up) for down, up in _DOWN_AND_UP if down in down_name)
        module = re.sub(r"^(unet[._]|lora_unet_|base_model\.model\.)+", "", match[1])
        name = modules.get(module.replace(".", "_"))
        if up_name not in lora.tensors or name is None:
            raise ValueError(f"{lora.name} has {down_name}, which fits no weight of this network")
        if name in updates:
            raise ValueError(f"{lora.name} has {down_name}, and {_DUPLICATE}")
        weight = model.get_parameter(name)
        down, up = _get_matrices(lora, down_name, up_name, weight)
        strength = scale * _compute_strength(lora, f"{match[1]}.alpha", module, len(down))
        # the file's sinusoids are cosines first, ours are sines
        swapped = name == "time_mlp.1.weight" and config.time_frequencies == "half"
        updates[name] = _Update(weight, up, down, strength, swapped)
        used |= {down_name, up_name, f"{match[1]}.alpha"}
    if unused := [name for name in lora.tensors if name not in used]:
        raise ValueError(f"{lora.name} has {unused[0]}, which is not understood here")
    if not updates:
        raise ValueError(f"{lora.name} has nothing for a U-Net; its names would start with unet. or lora_unet_")
    return updates


def _map_modules(model: nn.Module, config: UNetConfig) -> dict[str, str]:
    """Return our weight for each foreign module's name with underscores, in both layouts; packed ones have none."""
    structure = BlockStructure.from_config(config)
    found = {}
    for name, _ in model.named_parameters():
        if not name.endswith(".weight") or name.startswith(("time_cond", "null_")):
            continue
        found[name.removesuffix(".weight").replace(".", "_")] = name
        for layout in ("diffusers", "compvis"):
            try:
                foreign = LAYOUTS[layout].key_map(name, structure)
            except ValueError:  # the layout has no such layer
                continue
            if foreign.part is None:
                found[foreign.name.removesuffix(".weight").replace(".", "_")] = name
    return found


def _read_lora(source: str | Path | Mapping[str, Tensor]) -> _LoraFile:
    file, config = "the LoRA", {}
    if not isinstance(source, Mapping):
        file, path = str(source), local_path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file; give a LoRA's .safetensors")
        source, config = read_safetensors(path), _read_lora_config(path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in source.items():
        if name.startswith(_TEXT_ENCODER_PREFIXES):
            continue
        current_name = _OLD_NAME.sub(r".\1.lora.\2.", name.replace(".to_out_lora.", ".to_out.0_lora."))
        if current_name in tensors:
            raise ValueError(f"{file} has {name}, and {_DUPLICATE}")
        tensors[current_name] = tensor
    return _LoraFile(file, tensors, config)


def _get_matrices(lora: _LoraFile, down_name: str, up_name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return down (rank, in, *kernel) and up (out, rank, 1...); ValueError if they make no update of the weight."""
    down, up = lora.tensors[down_name], lora.tensors[up_name]
    out, rank = weight.shape[0], down.shape[0] if down.ndim > 1 else 0
    fits = rank > 0 and up.ndim > 1 and _strip_ones(down.shape[1:]) == _strip_ones(weight.shape[1:])
    if not fits or up.shape[0] != out or _strip_ones(up.shape[1:]) != _strip_ones((rank,)):
        valid = f"(rank, {', '.join(map(str, weight.shape[1:]))}) and ({out}, rank)"
        raise ValueError(
            f"{lora.name}: {down_name} is {tuple(down.shape)} and {up_name} is {tuple(up.shape)}; "
            f"for a weight of {tuple(weight.shape)} they must be {valid}"
        )
    for name, tensor in ((down_name, down), (up_name, up)):
        if not tensor.is_floating_point():
            raise ValueError(f"{lora.name}: {name} has dtype {tensor.dtype}; it must be floating point")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{lora.name}: {name} has values that are not finite; the file is damaged")
    return down, up


def _strip_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without trailing ones: 1x1 convolutions and linear layers stand for each other."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(shape)


def _compute_strength(lora: _LoraFile, alpha_name: str, module: str, rank: int) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) of a rank-stabilised LoRA (Kalajdzievski 2023)."""
    if (tensor := lora.tensors.get(alpha_name)) is not None:
        if tensor.numel() != 1 or tensor.is_complex() or not math.isfinite(tensor.item()):
            shown = str(tensor.item()) if tensor.numel() == 1 else f"a tensor of {tuple(tensor.shape)}"
            raise ValueError(f"{lora.name}: {alpha_name} must be one finite number, and is {shown}")
        alpha = float(tensor)
    else:
        patterns = lora.config.get("alpha_pattern", {}).items()
        found = (value for pattern, value in patterns if re.fullmatch(rf"(.*\.)?({pattern})", module))
        alpha = float(next(found, lora.config.get("lora_alpha", rank)))
    return alpha / (rank**0.5 if lora.config.get("use_rslora") else rank)


def _read_lora_config(path: Path) -> dict[str, Any]:
    """Read peft's `LoraConfig`: diffusers saves it in the file's header, with a prefix, peft in a file beside."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata")
    place, beside = f"{path}: lora_adapter_metadata in its header", path.with_name("adapter_config.json")
    if text is None and path.name == "adapter_model.safetensors" and beside.is_file():
        place, text = str(beside), beside.read_text(encoding="utf-8", errors="replace")
    try:
        config = json.loads("{}" if text is None else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{place} is a JSON {type(config).__name__}, not an object")
    config = {name.removeprefix("unet."): value for name, value in config.items()}
    config["alpha_pattern"] = config.get("alpha_pattern") or {}
    _check_lora_config(config, place)
    return config


def _check_lora_config(config: Mapping[str, Any], place: str) -> None:
    patterns = config["alpha_pattern"]
    if not isinstance(patterns, dict):
        raise ValueError(f"{place}: alpha_pattern={shorten(patterns)} must be an object of patterns and numbers")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{place}: alpha_pattern has {shorten(pattern)}, no regular expression: {error}") from None
    alphas = {f"alpha_pattern[{shorten(pattern)}]": alpha for pattern, alpha in patterns.items()}
    alphas |= {"lora_alpha": config["lora_alpha"]} if "lora_alpha" in config else {}
    for name, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e9:
            raise ValueError(f"{place}: {name}={shorten(alpha)} must be a number, for example 16")
    if not isinstance(config.get("use_rslora", False), bool):
        raise ValueError(f"{place}: use_rslora={shorten(config['use_rslora'])} must be true or false")
