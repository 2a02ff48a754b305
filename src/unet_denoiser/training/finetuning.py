"""Training that starts from a checkpoint: its architecture, as many of its weights as fit, LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert.key_maps import LAYOUTS
from unet_denoiser.convert.layout import BlockStructure
from unet_denoiser.models.unet import UNet
from unet_denoiser.utils.files import read_json
from unet_denoiser.utils.tensor_files import write_safetensors

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out")


def read_initial_checkpoint(source: Path) -> tuple[UNet, dict[str, Any] | None]:
    """A checkpoint's network, and the process it was trained with where that is saved beside it.

    Args:
        source: a run, or anything that `UNet.from_pretrained` loads.
    """
    is_run = (source / "model" / "config.json").is_file()
    places = [source / "model" if is_run else source, source.parent / "scheduler"]
    files = [place / "scheduler_config.json" for place in places]
    process = next((read_json(file) for file in files if file.is_file()), None)
    return UNet.from_pretrained(places[0]), process


def with_image_size(config: UNetConfig, image_size: tuple[int, ...]) -> UNetConfig:
    """The same network for samples of another size: attention stays at the levels that have it."""
    levels = range(len(config.widths))
    attended = tuple(-(-max(image_size) // 2**level) for level in levels if config.has_attention(level))
    size = image_size[0] if len(set(image_size)) == 1 else image_size
    moved = replace(config, image_size=size, attention_resolutions=attended)
    same = [moved.has_attention(level) == config.has_attention(level) for level in levels]
    return moved if all(same) else config


class LoadReport(NamedTuple):
    """What became of a checkpoint's tensors, each with the reason; as text, one line for the user.

    total: tensors of the network. missed: those of them that are as they were drawn. unused: the checkpoint's others.
    """

    total: int
    widened: list[str]
    missed: list[str]
    unused: list[str]

    def __str__(self) -> str:
        text = f"loaded {self.total - len(self.missed)} of {self.total} tensors"
        parts = (("widened with zeros", self.widened), ("not loaded", self.missed), ("not used", self.unused))
        return text + "".join(f"; {words}: {', '.join(names)}" for words, names in parts if names)


@torch.no_grad()
def load_matching(model: UNet, start: UNet) -> LoadReport:
    """Give `model` the weights of `start` that fit, and say exactly which do not.

    Input channels that `start` has not are appended with zero weights, so that the network first does what it did;
    output channels likewise. Everything else of another shape stays as it is.
    """
    old, new = start.state_dict(), model.state_dict()
    widened, missed = [], []
    for name, p in new.items():
        if name not in old:
            missed.append(f"{name} (not there)")
        elif old[name].shape == p.shape:
            p.copy_(old[name])
        elif _is_wider(name, old[name], p):
            p.zero_()
            p[tuple(map(slice, old[name].shape))].copy_(old[name])
            widened.append(f"{name} ({_shape(old[name])} there, {_shape(p)} here)")
        else:
            missed.append(f"{name} ({_shape(old[name])} there, {_shape(p)} here)")
    return LoadReport(len(new), widened, missed, [name for name in old if name not in new])


def _is_wider(name: str, old: Tensor, new: Tensor) -> bool:
    """Whether a convolution at the network's ends has channels in addition to those of the checkpoint."""
    axis = {"input_conv.weight": 1, "output.2.weight": 0, "output.2.bias": 0}.get(name)
    if axis is None or old.ndim != new.ndim or new.shape[axis] < old.shape[axis]:
        return False
    return all(i == axis or n == m for i, (n, m) in enumerate(zip(new.shape, old.shape, strict=True)))


def _shape(t: Tensor) -> str:
    return "x".join(map(str, t.shape))


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def add_lora(model: UNet, rank: int) -> None:
    """Freeze the network and add a trainable LoRA to its attention's projections (Hu et al. 2021, arXiv 2106.09685).

    Raises:
        ImportError: peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise ImportError(f"lora_rank={rank} needs peft: pip install peft") from None
    model.requires_grad_(False)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS))
    peft.inject_adapter_in_model(config, model)


def merge_lora_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a network with a LoRA under the network's own names, the LoRA added: W + B A."""
    plain = {name.replace(".base_layer.", "."): t for name, t in weights.items() if ".lora_" not in name}
    for name, down in weights.items():
        if name.endswith(_A):
            target = name.replace(_A, ".weight")
            update = weights[name.replace(_A, _B)].float() @ down.float()
            plain[target] = plain[target] + update.to(plain[target])
    return plain


def save_lora(weights: Mapping[str, Tensor], config: UNetConfig, path: Path) -> None:
    """Write a LoRA as diffusers reads it, and `merge_lora`; under our own names where diffusers has no such network."""
    structure = BlockStructure.from_config(config)
    modules = [name.removesuffix(_A) for name in weights if name.endswith(_A)]
    names = {name: name for name in modules}
    if config.attention == "transformer" or config.context_dim is None:
        foreign = {name: LAYOUTS["diffusers"].key_map(f"{name}.weight", structure).name for name in modules}
        names = {name: f"unet.{there.removesuffix('.weight')}" for name, there in foreign.items()}
    file = {f"{names[name]}.lora_A.weight": weights[name + _A].contiguous() for name in modules}
    file |= {f"{names[name]}.lora_B.weight": weights[name + _B].contiguous() for name in modules}
    write_safetensors(path, file)
