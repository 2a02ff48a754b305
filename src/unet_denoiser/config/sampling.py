"""The options of the reverse process."""

import math
from dataclasses import dataclass
from typing import Literal

from unet_denoiser.config.base import BackendName, BackendPrecision, check_minimum, check_types

SamplerName = Literal[
    "ddpm", "ddim", "pndm", "ipndm", "dpm++", "dpm++3m", "dpm++2s", "dpm++3s", "dpm++sde", "unipc", "deis", "sa",
    "euler", "euler_a", "heun", "kdpm2", "kdpm2_a", "lms",
]  # fmt: skip
TimestepSpacing = Literal["trailing", "leading", "linspace", "quadratic"]
SigmaSchedule = Literal["karras", "exponential"]


@dataclass(frozen=True)
class SamplingConfig:
    """The reverse process: sampler, noise levels, guidance.

    Args:
        sampler: the sampler (docs/reference/samplers.md has a table); ddpm needs hundreds of steps, the others tens.
        num_inference_steps: steps of the reverse process: more are slower and more exact.
        eta: noise of ddim relative to ddpm: 0 is deterministic, 1 is ddpm's (Song et al. 2021, equation 16); only with
            ddim.
        timestep_spacing: "trailing" counts back from the last timestep, which is pure noise; "linspace" includes the
            first and the last; "leading" omits the last ones (Lin et al. 2023, table 2); "quadratic" is trailing with
            shorter steps at low noise (Song et al. 2020, DDIM, appendix D.2).
        sigma_schedule: space the noise levels by sigma / alpha instead of by timesteps: "karras" (Karras et al. 2022,
            equation 5, with rho = 7) or "exponential" (evenly in the logarithm), starting from at most 80.
        guidance_scale: weight of classifier-free guidance by class, caption, numbers and image; 1 is off, 2 to 5 are
            usual.
        guidance_interval: guide only where sigma / alpha (sigma in the units of Karras et al. 2022) is above the first
            number and at most the second; elsewhere half of the computation is saved (Kynkaanniemi et al. 2024,
            equation 5).
        guidance_rescale: 0 to 1: how far to rescale guided outputs to the standard deviation of unguided ones, against
            overexposed images (Lin et al. 2023, section 3.4, who use 0.7).
        dynamic_threshold: instead of clipping predicted x0, scale each by this percentile of its absolute values where
            that exceeds the data range, for example 0.995 (Saharia et al. 2022, section 2.3); for pixels.
        clip_sample: clip each predicted x0 to the data range. Without it a network that predicts noise can diverge in
            the first steps, which divide by an alpha near zero.
        reuse: compute the deep layers in every so many network calls only and forecast their features in the others
            (after DeepCache, Ma et al. 2023): with 50 steps, 5 takes some 0.35 of the time; fewer steps need less.
        compile: run the network through torch.compile. The first call takes half a minute to several minutes (32 s for
            1.2M parameters on one core), again for each batch size; it pays for thousands of images. On a GPU its
            kernels are replayed as CUDA graphs.
        image_guidance_scale: weight of guidance by an image of --concat-image alone, where guidance_scale is the weight
            of all else; 1.5 is usual (Brooks et al. 2023, equation 3; default: guidance_scale, for both together).
        backend: run the network on a CPU by "openvino" or "onnxruntime" (pip install 'unet-denoiser[export]') instead
            of "torch": converted once, compiled once per size, kept on disk; "auto" takes OpenVINO where it is
            installed and the request is long enough to pay for compiling.
        backend_precision: of "openvino": "float32"; "bfloat16", for processors that have units for it; or "int8",
            quantised by ranges that are measured on samples of the network's own.

    Raises:
        ValueError: an option that cannot work, with its name, its value and a valid one.
    """

    sampler: SamplerName = "dpm++"
    num_inference_steps: int = 25
    eta: float = 0.0
    timestep_spacing: TimestepSpacing = "trailing"
    sigma_schedule: SigmaSchedule | None = None
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    dynamic_threshold: float | None = None
    clip_sample: bool = True
    reuse: int | None = None
    compile: bool = False
    image_guidance_scale: float | None = None
    backend: BackendName = "torch"
    backend_precision: BackendPrecision = "float32"

    def __post_init__(self) -> None:
        check_types(self)
        check_minimum(self, 1, "num_inference_steps", "reuse")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must be 0 (deterministic) to 1 (as random as ddpm)")
        if self.eta > 0 and self.sampler != "ddim":
            raise ValueError(f"eta={self.eta}: sampler={self.sampler!r} does not take it; use 'ddim', or leave it out")
        if self.sigma_schedule is not None and self.timestep_spacing != "trailing":
            raise ValueError(
                f"timestep_spacing={self.timestep_spacing!r} has no effect with sigma_schedule="
                f"{self.sigma_schedule!r}; leave out one of them"
            )
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale} must be a finite number; 1 is off")
        if self.image_guidance_scale is not None and not math.isfinite(self.image_guidance_scale):
            raise ValueError(
                f"image_guidance_scale={self.image_guidance_scale} must be a finite number, for example 1.5"
            )
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError(
                f"guidance_interval={self.guidance_interval} must be two numbers, 0 <= low < high, in units of sigma / "
                "alpha, for example (0.3, 3)"
            )
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale={self.guidance_rescale} must be 0 (off) to 1, for example 0.7")
        if self.guidance_rescale and self.guidance_scale == 0:
            raise ValueError(
                f"guidance_rescale={self.guidance_rescale}: guidance_scale=0 computes no conditional output to rescale "
                "by; leave it out"
            )
        if self.compile and self.backend != "torch":
            raise ValueError(
                f"compile=True compiles for torch, not for backend={self.backend!r}; leave out one of them"
            )
        if self.backend_precision != "float32" and self.backend != "openvino":
            raise ValueError(
                f"backend_precision={self.backend_precision!r} needs backend='openvino', not {self.backend!r}"
            )
        if self.dynamic_threshold is not None:
            if not 0 < self.dynamic_threshold <= 1:
                raise ValueError(f"dynamic_threshold={self.dynamic_threshold} must be above 0 to 1, for example 0.995")
            if not self.clip_sample:
                raise ValueError(
                    f"dynamic_threshold={self.dynamic_threshold} clips x0, but clip_sample=False; leave out one"
                )
