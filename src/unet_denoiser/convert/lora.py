"""LoRA files of diffusers and kohya, merged into our weights (Hu et al. 2021, arXiv 2106.09685)."""

import math
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert.key_maps import LAYOUTS, OLD_ATTENTION
from unet_denoiser.convert.layout import BlockStructure
from unet_denoiser.convert.lora_files import DUPLICATE, LoraFile, Matrices, read_lora
from unet_denoiser.convert.state_dict import SINUSOIDS, swap_halves

_PEFT_ALPHA = 8  # peft's default
_PLAIN_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _Update(NamedTuple):
    """The change of one weight by a pair of matrices: strength * up @ down, with two halves of an axis exchanged."""

    weight: Tensor
    up: Tensor
    down: Tensor
    strength: float
    swapped_axis: int | None

    def compute(self) -> Tensor:
        """Return the changed weight."""
        change = self.up.flatten(1).float() @ self.down.flatten(1).float() * self.strength
        change = change if self.swapped_axis is None else swap_halves(change, self.swapped_axis)
        return self.weight + change.reshape(self.weight.shape).to(self.weight)


class _Target(NamedTuple):
    """One of our weights by its name in some layout; `packed` if that tensor holds query, key and value."""

    name: str
    is_foreign: bool
    packed: bool = False


@torch.no_grad()
def merge_lora(model: nn.Module, source: str | Path | Mapping[str, Tensor], scale: float = 1.0) -> int:
    """Add a LoRA's updates to a network's weights: W + scale * (alpha / rank) * up @ down.

    Args:
        model: a `UNet`, changed in place; also one inside a wrapper, such as torch.compile's or `DiffusersUNet`.
        source: a .safetensors file or its tensors, with the names of diffusers ("unet.down_blocks...lora_A.weight") or
            of kohya ("lora_unet_..."), in diffusers' or the LDM layout, or under our own names. Tensors for text
            encoders are left alone, with a warning that counts them. Alphas are read from the tensors, from the file's
            header, where diffusers saves them, or from the adapter_config.json beside peft's file.
        scale: strength, finite; 0 changes nothing, and the negative takes a merged LoRA out again.

    Returns:
        The number of weights that were changed.

    Raises:
        FileNotFoundError: no such file.
        TypeError: an object that is no network.
        ValueError: an update for a weight the network does not have, or of another shape, another method than LoRA and
            LoCon, one that changed the base weights too, or a damaged file, by name; then no weight has been changed.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be a finite number, for example 1.0")
    network = _find_network(model)
    lora = read_lora(source)
    updates = _match_updates(lora, network, scale)
    for name, update in updates.items():
        if not update.compute().isfinite().all():
            raise ValueError(f"{lora.name} makes {name} overflow in {update.weight.dtype} at scale={scale}")
    for update in updates.values():
        update.weight.copy_(update.compute())
    if lora.others:
        count = f"{len(lora.others)} tensors of text encoders and other networks ({lora.others[0]}, ...)"
        warnings.warn(f"{lora.name}: {count} are left alone", stacklevel=3)
    if lora.is_alpha_unknown:
        warnings.warn(f"{lora.name}: no adapter_config.json tells alpha; it is taken to be the rank", stacklevel=3)
    return len(updates)


def _find_network(model: nn.Module) -> nn.Module:
    """Return the network inside of wrappers; TypeError if there is none, or more than one."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [module for module in modules if isinstance(vars(module).get("config"), UNetConfig)]
    if len(found) == 1:
        return found[0]
    kind = type(model).__name__
    if found:
        raise TypeError(f"model is a {kind} with {len(found)} U-Nets; give the one to change")
    inside = [name for name in ("unet", "model") if isinstance(getattr(model, name, None), nn.Module)]
    hint = f", for example its .{inside[0]}" if inside else ""
    raise TypeError(f"model is a {kind}; merge_lora needs a UNet of this library{hint}")


def _match_updates(lora: LoraFile, model: nn.Module, scale: float) -> dict[str, _Update]:
    """Return the updates by the names of our weights; ValueError unless every tensor of the LoRA belongs to one."""
    config: UNetConfig = model.config  # type: ignore[assignment]
    weights = {_clean_name(name): weight for name, weight in model.named_parameters()}
    targets, updates = _map_modules(weights, config), {}
    for module, layer in lora.layers.items():
        given = next(part[0] for part in (layer.down, layer.up, layer.alpha) if part is not None)
        target = targets.get(module)
        if target is None or layer.down is None or layer.up is None:
            raise ValueError(f"{lora.name} has {given}, which fits no weight of this network")
        if target.packed:
            raise ValueError(
                f"{lora.name} has {given}, for query, key and value in one; the network does not keep in which order "
                "the checkpoint packed them, so give a LoRA of to_q, to_k and to_v"
            )
        if target.name in updates:
            raise ValueError(f"{lora.name} has {given}, and {DUPLICATE}")
        weight = weights[target.name]
        _check_weight(target.name, weight)
        down, up = _get_matrices(lora, layer, weight)
        strength = scale * _compute_strength(lora, layer, len(down))
        # our sinusoids are sines first; under our own names the file's are too
        is_swapped = target.is_foreign and config.cosines_first
        updates[target.name] = _Update(weight, up, down, strength, SINUSOIDS.get(target.name) if is_swapped else None)
    if not updates:
        raise ValueError(f"{lora.name} has nothing for a U-Net; its names would start with unet. or lora_unet_")
    return updates


def _clean_name(name: str) -> str:
    """Return a parameter's name without what compiled layers and peft's own layers put into it."""
    return name.replace("_orig_mod.", "").replace(".base_layer.", ".")


def _map_modules(names: Collection[str], config: UNetConfig) -> dict[str, _Target]:
    """Return our weight for each module's name with underscores: under our names and those of two layouts."""
    structure, found = BlockStructure.from_config(config), {}
    for name in names:
        if not name.endswith(".weight") or ".lora_" in name:
            continue
        found[name.removesuffix(".weight").replace(".", "_")] = _Target(name, is_foreign=False)
        for layout in ("diffusers", "compvis"):
            try:
                foreign = LAYOUTS[layout].key_map(name, structure)
            except ValueError:  # the layout has no such layer
                continue
            module = foreign.name.removesuffix(".weight")
            for alias in (module, *_list_old_names(module, structure)):
                found[alias.replace(".", "_")] = _Target(name, True, foreign.part is not None)
    return found


def _list_old_names(module: str, structure: BlockStructure) -> list[str]:
    """Return the names that files of older versions of diffusers have for a module."""
    names = [module.removesuffix(".0")] if module.endswith(".to_out.0") else []
    if not structure.transformer:
        names += [module.removesuffix(new) + old for old, new in OLD_ATTENTION.items() if module.endswith(f".{new}")]
    return names


def _get_matrices(lora: LoraFile, layer: Matrices, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return down (rank, in, *kernel) and up (out, rank, 1...); ValueError if they make no update of the weight."""
    (down_name, down), (up_name, up) = layer.down, layer.up  # type: ignore[misc]
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


def _check_weight(name: str, weight: Tensor) -> None:
    """Raise ValueError for a weight that is no plain tensor of numbers, as in quantised and sharded networks."""
    if type(weight.data) is not Tensor or weight.is_meta or weight.dtype not in _PLAIN_DTYPES:
        kind = type(weight.data).__name__ if type(weight.data) is not Tensor else f"a tensor of {weight.dtype}"
        kind = "without storage" if weight.is_meta else kind
        raise ValueError(f"{name} is {kind}: merge the LoRA before the network is quantised, cast or sharded")


def _strip_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without trailing ones: 1x1 convolutions and linear layers stand for each other."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(shape)


def _compute_strength(lora: LoraFile, layer: Matrices, rank: int) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) of a rank-stabilised LoRA (Kalajdzievski 2023)."""
    if layer.alpha is not None:
        name, tensor = layer.alpha
        if tensor.numel() != 1 or tensor.is_complex() or not math.isfinite(tensor.item()):
            shown = str(tensor.item()) if tensor.numel() == 1 else f"a tensor of {tuple(tensor.shape)}"
            raise ValueError(f"{lora.name}: {name} must be one finite number, and is {shown}")
        alpha = float(tensor)
    else:
        patterns = lora.config.get("alpha_pattern", {}).items()
        found = (value for pattern, value in patterns if re.fullmatch(rf"(.*\.)?({pattern})", layer.module))
        alpha = float(next(found, lora.config.get("lora_alpha", _PEFT_ALPHA if lora.config else rank)))
    return alpha / (rank**0.5 if lora.config.get("use_rslora") else rank)
