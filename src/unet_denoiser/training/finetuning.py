"""Training that starts from a checkpoint: its architecture, its process and the weights that fit."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.unet import UNet


def with_image_size(config: UNetConfig, image_size: tuple[int, ...]) -> UNetConfig:
    """Return the same network for samples of another size: the same resolution levels have attention."""
    levels = range(len(config.widths))
    attended = tuple(-(-max(image_size) // 2**level) for level in levels if config.has_attention(level))
    size = image_size[0] if len(set(image_size)) == 1 else image_size
    moved = replace(config, image_size=size, attention_resolutions=attended)
    same = [moved.has_attention(level) == config.has_attention(level) for level in levels]
    return moved if all(same) else config


def guess_process(config: UNetConfig, told: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the process of a checkpoint without a schedule, as diffusers saves it, and words that say what it is.

    Networks for four channels are taken to be Stable Diffusion's, others DDPM's. `told` is what the file itself tells.
    """
    if "path" in told:
        return Diffusion(**told).to_dict(), f"the file tells {told['path']}"
    is_latent = config.out_channels == 4
    schedule: dict[str, Any] = {"prediction_type": "epsilon", "beta_schedule": "linear"}
    if is_latent:
        schedule |= {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        schedule |= {"clip_sample_range": None}
    process = Diffusion(**schedule | dict(told))
    named = "the file tells" if told else "taken to predict"
    words = f"{named} {process.prediction_type}, along the {schedule['beta_schedule']} schedule"
    words += " with zero terminal SNR" if told.get("rescale_betas_zero_snr") else ""
    if is_latent and config.context_dim == 1024 and not told:
        words += " (Stable Diffusion 2 for 768 pixels predicts v: --process.prediction-type v_prediction)"
    return process.to_dict(), words


class LoadReport(NamedTuple):
    """Which tensors of a checkpoint were loaded, and why others were not; `str()` says it in one line.

    total: number of tensors in the network. widened: those that got additional channels, filled with zeros.
    missed: those that keep their random start. unused: tensors of the checkpoint that the network does not have.
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
    """Copy the weights of `start` that fit into `model`, and report those that do not.

    Additional input and output channels of `model` get zero weights, so that the network first computes what `start`
    does. Every other tensor whose shape differs keeps its random start.
    """
    old, new = start.state_dict(), model.state_dict()
    widened: list[str] = []
    missed: list[str] = []
    for name, p in new.items():
        if name not in old:
            missed.append(f"{name} (not there)")
        elif old[name].shape == p.shape:
            p.copy_(old[name])
        else:
            there, here = ("x".join(map(str, t.shape)) for t in (old[name], p))
            fits = _has_more_channels(name, old[name], p)
            (widened if fits else missed).append(f"{name} ({there} there, {here} here)")
            if fits:
                p.zero_()[tuple(map(slice, old[name].shape))].copy_(old[name])
    return LoadReport(len(new), widened, missed, [name for name in old if name not in new])


def _has_more_channels(name: str, old: Tensor, new: Tensor) -> bool:
    """Return True if only the channels of the network's input or output differ, and `new` has more of them."""
    axis = {"input_conv.weight": 1, "output.2.weight": 0, "output.2.bias": 0}.get(name)
    if axis is None or old.ndim != new.ndim or new.shape[axis] < old.shape[axis]:
        return False
    return all(i == axis or n == m for i, (n, m) in enumerate(zip(new.shape, old.shape, strict=True)))
