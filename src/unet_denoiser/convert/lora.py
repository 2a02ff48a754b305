"""LoRA files of diffusers and kohya, merged into our weights (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unet_denoiser.convert.key_maps import LAYOUTS, block_structure
from unet_denoiser.convert.state_dict import swap_halves
from unet_denoiser.utils.tensor_files import read_safetensors

_TEXT = ("text_encoder", "lora_te")
_PAIRS = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"))
_DOWN = re.compile(r"(.+?)[._](?:lora_A|lora_down|lora\.down)(?:\.default)?\.weight")
_OLD = re.compile(r"\.processor\.(to_\w+)_lora\.(down|up)\.")


class _Lora(NamedTuple):
    """A LoRA's tensors of the U-Net by modern names, what its header says of their scale, and its name in messages."""

    place: str
    tensors: dict[str, Tensor]
    header: dict[str, Any]


class _Update(NamedTuple):
    """What one pair of matrices adds to a weight."""

    weight: Tensor
    up: Tensor
    down: Tensor
    strength: float
    swapped: bool

    def merged(self) -> Tensor:
        change = self.up.flatten(1).float() @ self.down.flatten(1).float() * self.strength
        if self.swapped:
            change = swap_halves(change, 1)
        return self.weight + change.reshape(self.weight.shape).to(self.weight)


@torch.no_grad()
def merge_lora(model: nn.Module, source: str | Path | Mapping[str, Tensor], scale: float = 1.0) -> int:
    """Add a LoRA's updates to a network's weights: W + scale * (alpha / rank) * up @ down.

    Args:
        model: a `UNet`, changed in place.
        source: a .safetensors file or its tensors, with the names of diffusers ("unet.down_blocks...lora_A.weight") or
            of kohya ("lora_unet_..."), in diffusers' or the LDM layout, or under our own names. What it
            has for text encoders is left alone.
            Alphas are read from the tensors, from the file's header, as diffusers saves them, or from the
            adapter_config.json beside peft's adapter_model.safetensors.
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
    lora = _read(source)
    modules, used = _modules(model), set()
    updates: dict[str, _Update] = {}
    for name in lora.tensors:
        if (match := _DOWN.fullmatch(name)) is None:
            continue
        up_name = next(name.replace(pair[0], pair[1]) for pair in _PAIRS if pair[0] in name)
        module = re.sub(r"^(unet[._]|lora_unet_|base_model\.model\.)+", "", match[1])
        ours = modules.get(module.replace(".", "_"))
        if up_name not in lora.tensors or ours is None:
            raise ValueError(f"{lora.place} has {name}, which fits no weight of this network")
        if ours in updates:
            raise ValueError(f"{lora.place} has {name}, but another update for the same weight too; give one of them")
        weight = model.get_parameter(ours)
        down, up = _matrices(lora, name, up_name, weight)
        strength = scale * _strength(lora, f"{match[1]}.alpha", module, len(down))
        # the file's sinusoids are cosines first, ours are sines
        swapped = ours == "time_mlp.1.weight" and model.config.time_frequencies == "half"  # type: ignore[union-attr]
        updates[ours] = _Update(weight, up, down, strength, swapped)
        used |= {name, up_name, f"{match[1]}.alpha"}
    if left := [name for name in lora.tensors if name not in used]:
        raise ValueError(f"{lora.place} has {left[0]}, which is not understood here")
    if not updates:
        raise ValueError(f"{lora.place} has nothing for a U-Net; its names would start with unet. or lora_unet_")
    for ours, update in updates.items():
        if not update.merged().isfinite().all():
            raise ValueError(f"{lora.place} makes {ours} overflow in {update.weight.dtype} at scale={scale}")
    for update in updates.values():
        update.weight.copy_(update.merged())
    return len(updates)


def _read(source: str | Path | Mapping[str, Tensor]) -> _Lora:
    place, header = "the LoRA", {}
    if not isinstance(source, Mapping):
        place, path = str(source), Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file; give a LoRA's .safetensors")
        source, header = read_safetensors(path), _header(path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in source.items():
        if name.startswith(_TEXT):
            continue
        modern = _OLD.sub(_modern, name)
        if modern in tensors:
            raise ValueError(f"{place} has {name}, but another update for the same weight too; give one of them")
        tensors[modern] = tensor
    return _Lora(place, tensors, header)


def _modern(match: re.Match[str]) -> str:
    layer = "to_out.0" if match[1] == "to_out" else match[1]
    return f".{layer}.lora.{match[2]}."


def _matrices(lora: _Lora, name: str, up_name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(rank, in, *kernel) and (out, rank, 1...), which make an update of the weight; ValueError for any other."""
    down, up = lora.tensors[name], lora.tensors[up_name]
    out, inner = weight.shape[0], _core(weight.shape[1:])
    rank = down.shape[0] if down.ndim > 1 else 0
    fits = rank > 0 and up.ndim > 1 and _core(down.shape[1:]) == inner
    if not fits or up.shape[0] != out or _core(up.shape[1:]) != _core((rank,)):
        valid = f"(rank, {', '.join(map(str, weight.shape[1:]))}) and ({out}, rank)"
        raise ValueError(
            f"{lora.place}: {name} is {tuple(down.shape)} and {up_name} is {tuple(up.shape)}; "
            f"for a weight of {tuple(weight.shape)} they must be {valid}"
        )
    for key, tensor in ((name, down), (up_name, up)):
        if not tensor.is_floating_point():
            raise ValueError(f"{lora.place}: {key} has dtype {tensor.dtype}; it must be floating point")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{lora.place}: {key} has values that are not finite; the file is damaged")
    return down, up


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without trailing ones: 1x1 convolutions and linear layers stand for each other."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(shape)


# ---- the scale of an update ------------------------------------------------------------------------------------------


def _strength(lora: _Lora, alpha_name: str, module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) where the header says rank-stabilised (Kalajdzievski 2023)."""
    if alpha_name in lora.tensors:
        tensor = lora.tensors[alpha_name]
        if tensor.numel() != 1 or tensor.is_complex() or not math.isfinite(tensor.item()):
            raise ValueError(f"{lora.place}: {alpha_name} must be one finite number, and is {_shown(tensor)}")
        alpha = float(tensor)
    else:
        alpha = _header_alpha(lora.header, module, rank)
    return alpha / (rank**0.5 if lora.header.get("use_rslora") else rank)


def _header_alpha(header: Mapping[str, Any], module: str, rank: int) -> float:
    for pattern, alpha in header.get("alpha_pattern", {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(alpha)
    return float(header.get("lora_alpha", rank))


def _header(path: Path) -> dict[str, Any]:
    """peft's `LoraConfig` of a file, checked: diffusers has it in the header, with a prefix, peft in a file beside."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata")
    place, beside = f"{path}: lora_adapter_metadata in its header", path.with_name("adapter_config.json")
    if text is None and path.name == "adapter_model.safetensors" and beside.is_file():
        place, text = str(beside), beside.read_text(encoding="utf-8", errors="replace")
    try:
        header = json.loads("{}" if text is None else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{place} is a JSON {type(header).__name__}, not an object")
    header = {name.removeprefix("unet."): value for name, value in header.items()}
    patterns = header["alpha_pattern"] = header.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{place}: alpha_pattern={shorten(patterns)} must be an object of patterns and numbers")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{place}: alpha_pattern has {shorten(pattern)}, no regular expression: {error}") from None
    alphas = {f"alpha_pattern[{shorten(pattern)}]": alpha for pattern, alpha in patterns.items()}
    alphas |= {"lora_alpha": header["lora_alpha"]} if "lora_alpha" in header else {}
    for name, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e9:
            raise ValueError(f"{place}: {name}={shorten(alpha)} must be a number, for example 16")
    if not isinstance(header.get("use_rslora", False), bool):
        raise ValueError(f"{place}: use_rslora={shorten(header['use_rslora'])} must be true or false")
    return header


def _shown(tensor: Tensor) -> str:
    return str(tensor.item()) if tensor.numel() == 1 else f"a tensor of {tuple(tensor.shape)}"


def _modules(model: nn.Module) -> dict[str, str]:
    """Our weight for each foreign module's name with underscores, in both layouts; packed projections have none."""
    bones = block_structure(model.config)  # type: ignore[arg-type]
    found = {}
    for ours, _ in model.named_parameters():
        if not ours.endswith(".weight") or ours.startswith(("time_cond", "null_")):
            continue
        found[ours.removesuffix(".weight").replace(".", "_")] = ours
        for layout in ("diffusers", "compvis"):
            try:
                source = LAYOUTS[layout](ours, bones)
            except ValueError:  # a layer that the layout has not
                continue
            if source.part is None:
                found[source.name.removesuffix(".weight").replace(".", "_")] = ours
    return found
