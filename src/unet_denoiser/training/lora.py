"""LoRA: low-rank updates of the attention's projections, trained instead of all weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert.key_maps import LAYOUTS
from unet_denoiser.convert.layout import BlockStructure
from unet_denoiser.models.unet import UNet
from unet_denoiser.utils.tensor_files import write_safetensors

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def add_lora(model: UNet, rank: int) -> None:
    """Freeze the network and add a trainable LoRA to its attention's projections (Hu et al. 2021, arXiv 2106.09685).

    ImportError if peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise ImportError(f"lora_rank={rank} needs peft: pip install peft") from None
    model.requires_grad_(False)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out"])
    peft.inject_adapter_in_model(config, model)


def merge_lora_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add a LoRA to the weights that it belongs to, W + B A, and return them under the network's own names."""
    plain = {name.replace(".base_layer.", "."): t for name, t in weights.items() if ".lora_" not in name}
    for name, down in weights.items():
        if name.endswith(_A):
            target = name.replace(_A, ".weight")
            update = weights[name.replace(_A, _B)].float() @ down.float()
            plain[target] = plain[target] + update.to(plain[target])
    return plain


def save_lora(weights: Mapping[str, Tensor], config: UNetConfig, path: Path) -> None:
    """Write a LoRA with diffusers' names, or with ours if diffusers has no such network; `merge_lora` reads both."""
    modules = [name.removesuffix(_A) for name in weights if name.endswith(_A)]
    names = {name: name for name in modules}
    if config.attention == "transformer" or config.context_dim is None:
        structure, layout = BlockStructure.from_config(config), LAYOUTS["diffusers"]
        keys = {name: layout.key_map(f"{name}.weight", structure).name for name in modules}
        names = {name: f"unet.{key.removesuffix('.weight')}" for name, key in keys.items()}
    file = {f"{names[name]}.lora_A.weight": weights[name + _A].contiguous() for name in modules}
    file |= {f"{names[name]}.lora_B.weight": weights[name + _B].contiguous() for name in modules}
    write_safetensors(path, file)
