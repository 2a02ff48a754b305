"""How samples are made, as data: every option once, checked when it is built. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from unet_denoiser.recipe import check_choice

SamplerName = Literal[
    "ddpm", "ddim", "pndm", "ipndm", "dpm++", "dpm++3m", "dpm++2s", "dpm++3s", "dpm++sde", "unipc", "deis", "sa", "euler",
    "euler_a", "heun", "kdpm2", "kdpm2_a", "lms",
]  # fmt: skip
TimestepSpacing = Literal["trailing", "leading", "linspace"]
SigmaSchedule = Literal["karras", "exponential"]


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are made.

    Args:
        sampler: the sampler (docs/sampling.md has a table); ddpm wants hundreds of steps, the others tens.
        num_inference_steps: steps of the reverse process: more is slower and more exact.
        eta: share of the noise of ddpm that ddim draws: 0 is deterministic, 1 is ddpm's (Song et al. 2021, equation
            16); only with ddim.
        timestep_spacing: "trailing" counts back from the last timestep, which is pure noise; "linspace" visits the
            first and the last; "leading" leaves out the last ones (Lin et al. 2023, table 2).
        sigma_schedule: choose the noise levels by sigma / alpha instead of by timesteps: "karras" (Karras et al. 2022,
            equation 5, with rho = 7) or "exponential" (evenly in its logarithm), from at most 80 down.
        guidance_scale: how strongly to follow class, caption, numbers and picture; 1 is off, 2 to 5 are usual.
        clip_sample: clip each predicted clean image to the data's range. Without it the first steps, which divide by
            an alpha near zero, can leave the data far behind when the network predicts noise.

    Raises:
        ValueError: an option that cannot work, with its name, its value and a valid one.
    """

    sampler: SamplerName = "dpm++"
    num_inference_steps: int = 25
    eta: float = 0.0
    timestep_spacing: TimestepSpacing = "trailing"
    sigma_schedule: SigmaSchedule | None = None
    guidance_scale: float = 1.0
    clip_sample: bool = True

    def __post_init__(self) -> None:
        check_choice("sampler", self.sampler, SamplerName)
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={self.num_inference_steps} must be at least 1, for example 25")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must be 0 (deterministic) to 1 (as random as ddpm)")
        if self.eta > 0 and self.sampler != "ddim":
            raise ValueError(f"eta={self.eta}: sampler={self.sampler!r} has none; use 'ddim', or leave it out")
        check_choice("timestep_spacing", self.timestep_spacing, TimestepSpacing)
        if self.sigma_schedule is not None:
            check_choice("sigma_schedule", self.sigma_schedule, SigmaSchedule)
            if self.timestep_spacing != "trailing":
                raise ValueError(
                    f"timestep_spacing={self.timestep_spacing!r} has no say with sigma_schedule="
                    f"{self.sigma_schedule!r}, which chooses the noise levels; leave out one of them"
                )
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale} must be a finite number; 1 is off")
