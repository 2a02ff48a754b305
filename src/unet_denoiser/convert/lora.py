"""LoRA files of diffusers and kohya, merged into our weights (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unet_denoiser.convert.layouts import LAYOUTS, Skeleton
from unet_denoiser.pretrained import read_safetensors

_TEXT = ("text_encoder", "lora_te")
_PAIRS = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"))
_DOWN = re.compile(r"(.+?)[._](?:lora_A|lora_down|lora\.down)(?:\.default)?\.weight")


@torch.no_grad()
def merge_lora(model: nn.Module, source: str | Path | Mapping[str, Tensor], scale: float = 1.0) -> int:
    """Add a LoRA's updates to a network's weights: W + scale * (alpha / rank) * up @ down.

    Args:
        model: a `UNet`, changed in place.
        source: a .safetensors file or its tensors, with the names of diffusers ("unet.down_blocks...lora_A.weight") or
            of kohya ("lora_unet_..."), in diffusers' or the LDM layout. What it has for text encoders is left alone.
        scale: strength; 0 changes nothing, and the negative takes a merged LoRA out again.

    Returns:
        The number of weights that were changed.

    Raises:
        ValueError: an update for a weight the network does not have, or of another shape, by name.
    """
    tensors = source if isinstance(source, Mapping) else read_safetensors(Path(source))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_TEXT)}
    modules, changed, used = _modules(model), 0, set()
    for name, down in tensors.items():
        if (match := _DOWN.fullmatch(name)) is None:
            continue
        up_name = next(name.replace(pair[0], pair[1]) for pair in _PAIRS if pair[0] in name)
        key = re.sub(r"^(unet[._]|lora_unet_|base_model\.model\.)+", "", match[1]).replace(".", "_")
        if up_name not in tensors or key not in modules:
            raise ValueError(f"the LoRA has {name}, which fits no weight of this network")
        alpha_name, up, weight = f"{match[1]}.alpha", tensors[up_name], model.get_parameter(modules[key])
        rank = down.shape[0]
        alpha = float(tensors[alpha_name]) if alpha_name in tensors else rank
        update = up.flatten(1).float() @ down.flatten(1).float() * (scale * alpha / rank)
        if update.numel() != weight.numel():
            raise ValueError(f"the LoRA's {name} makes {tuple(update.shape)}, the weight is {tuple(weight.shape)}")
        weight.add_(update.reshape(weight.shape).to(weight))
        changed += 1
        used |= {name, up_name, alpha_name}
    if left := [name for name in tensors if name not in used]:
        raise ValueError(f"the LoRA has {left[0]}, which is not understood here")
    return changed


def _modules(model: nn.Module) -> dict[str, str]:
    """Our weight for each foreign module's name with underscores, in both layouts; packed projections have none."""
    config: Any = model.config
    levels = range(len(config.widths))
    attended = tuple(map(config.has_attention, levels))
    bones = Skeleton(config.num_res_blocks, len(levels), attended, config.attention == "transformer")
    found = {}
    for ours, _ in model.named_parameters():
        if not ours.endswith(".weight") or ours.startswith(("time_", "null_")):
            continue
        for layout in ("diffusers", "compvis"):
            source = LAYOUTS[layout](ours, bones)
            if source.part is None:
                found[source.name.removesuffix(".weight").replace(".", "_")] = ours
    return found
