"""How samples are made, as data: every option once, checked when it is built. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from unet_denoiser.recipe import check_choice

SamplerName = Literal["ddpm", "ddim", "dpm++", "unipc", "euler", "heun"]


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are made.

    Args:
        sampler: the sampler; ddpm wants hundreds of steps, the others tens.
        num_inference_steps: steps of the reverse process: more is slower and more exact.
        guidance_scale: how strongly to follow class, caption, numbers and picture; 1 is off, 2 to 5 are usual.
        clip_sample: clip each predicted clean image to the data's range. Without it the first steps, which divide by
            an alpha near zero, can leave the data far behind when the network predicts noise.

    Raises:
        ValueError: an option that cannot work, with its name, its value and a valid one.
    """

    sampler: SamplerName = "dpm++"
    num_inference_steps: int = 25
    guidance_scale: float = 1.0
    clip_sample: bool = True

    def __post_init__(self) -> None:
        check_choice("sampler", self.sampler, SamplerName)
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={self.num_inference_steps} must be at least 1, for example 25")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale} must be a finite number; 1 is off")
