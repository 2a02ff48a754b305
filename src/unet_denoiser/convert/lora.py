"""LoRA files of diffusers and kohya, merged into our weights (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unet_denoiser.convert.layouts import LAYOUTS, Skeleton
from unet_denoiser.convert.tensors import swap_halves
from unet_denoiser.pretrained import read_safetensors

_TEXT = ("text_encoder", "lora_te")
_PAIRS = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"))
_DOWN = re.compile(r"(.+?)[._](?:lora_A|lora_down|lora\.down)(?:\.default)?\.weight")
_OLD = re.compile(r"\.processor\.(to_\w+)_lora\.(down|up)\.")


class _Update(NamedTuple):
    """What one pair of matrices adds to a weight."""

    weight: Tensor
    up: Tensor
    down: Tensor
    scale: float
    swapped: bool

    def apply(self) -> None:
        change = self.up.flatten(1).float() @ self.down.flatten(1).float() * self.scale
        if self.swapped:
            change = swap_halves(change, 1)
        self.weight.add_(change.reshape(self.weight.shape).to(self.weight))


@torch.no_grad()
def merge_lora(model: nn.Module, source: str | Path | Mapping[str, Tensor], scale: float = 1.0) -> int:
    """Add a LoRA's updates to a network's weights: W + scale * (alpha / rank) * up @ down.

    Args:
        model: a `UNet`, changed in place.
        source: a .safetensors file or its tensors, with the names of diffusers ("unet.down_blocks...lora_A.weight") or
            of kohya ("lora_unet_..."), in diffusers' or the LDM layout, or under our own
            names. What it has for text encoders is left alone. Alphas are read from the tensors or, as diffusers
            saves them, from the file's header.
        scale: strength; 0 changes nothing, and the negative takes a merged LoRA out again.

    Returns:
        The number of weights that were changed.

    Raises:
        ValueError: an update for a weight the network does not have, or of another shape, by name; then no weight has
            been changed.
    """
    header: dict[str, Any] = {}
    if not isinstance(source, Mapping):
        header, source = _header(Path(source)), read_safetensors(Path(source))
    tensors = {_OLD.sub(_modern, name): tensor for name, tensor in source.items() if not name.startswith(_TEXT)}
    modules, updates, used = _modules(model), [], set()
    for name, down in tensors.items():
        if (match := _DOWN.fullmatch(name)) is None:
            continue
        up_name = next(name.replace(pair[0], pair[1]) for pair in _PAIRS if pair[0] in name)
        module = re.sub(r"^(unet[._]|lora_unet_|base_model\.model\.)+", "", match[1])
        if up_name not in tensors or module.replace(".", "_") not in modules:
            raise ValueError(f"the LoRA has {name}, which fits no weight of this network")
        ours = modules[module.replace(".", "_")]
        up, weight = tensors[up_name], model.get_parameter(ours)
        rank, shape = down.shape[0], (up.shape[0], down[0].numel())
        if up[0].numel() != rank or shape != (weight.shape[0], weight[0].numel()):
            raise ValueError(f"the LoRA's {name} makes {shape}, the weight is {tuple(weight.shape)}")
        alpha_name = f"{match[1]}.alpha"
        alpha = float(tensors[alpha_name]) if alpha_name in tensors else _alpha(header, module, rank)
        strength = scale * alpha / (rank**0.5 if header.get("use_rslora") else rank)
        # the file's sinusoids are cosines first, ours are sines
        swapped = ours == "time_mlp.1.weight" and model.config.time_frequencies == "half"  # type: ignore[union-attr]
        updates.append(_Update(weight, up, down, strength, swapped))
        used |= {name, up_name, alpha_name}
    if left := [name for name in tensors if name not in used]:
        raise ValueError(f"the LoRA has {left[0]}, which is not understood here")
    for update in updates:
        update.apply()
    return len(updates)


def _modern(match: re.Match[str]) -> str:
    layer = "to_out.0" if match[1] == "to_out" else match[1]
    return f".{layer}.lora.{match[2]}."


def _header(path: Path) -> dict[str, Any]:
    """What diffusers wrote about the LoRA's scale, without its prefix."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    except (SafetensorError, OSError):
        return {}  # reading the tensors tells what is wrong
    return {name.removeprefix("unet."): value for name, value in json.loads(text).items()}


def _alpha(header: Mapping[str, Any], module: str, rank: int) -> float:
    for pattern, alpha in (header.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(alpha)
    return float(header.get("lora_alpha", rank))


def _modules(model: nn.Module) -> dict[str, str]:
    """Our weight for each foreign module's name with underscores, in both layouts; packed projections have none."""
    config: Any = model.config
    levels = range(len(config.widths))
    attended = tuple(map(config.has_attention, levels))
    bones = Skeleton(config.num_res_blocks, len(levels), attended, config.attention == "transformer")
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
