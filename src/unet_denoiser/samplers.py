"""Samplers by short names: `diffusers` schedulers, bound to the process that a network was trained with.

All are handed the same thing, the velocity that belongs to a predicted x0, and all take and give x_t in the process's
own scale, x_t = alpha x0 + sigma eps. So the loop knows no scheduler's habits.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from unet_denoiser.diffusion import Diffusion
from unet_denoiser.recipe_sampling import SamplerName, SamplingConfig


class _Scheduler(NamedTuple):
    """A scheduler's class and options; scaled: it steps x_t / alpha instead of x_t."""

    name: str
    options: Mapping[str, Any] = MappingProxyType({})
    scaled: bool = False


SAMPLERS: dict[SamplerName, _Scheduler] = {
    "ddpm": _Scheduler("DDPMScheduler", {"clip_sample": False}),
    "ddim": _Scheduler("DDIMScheduler", {"clip_sample": False}),
    "dpm++": _Scheduler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": _Scheduler("UniPCMultistepScheduler", {"solver_order": 2}),
    "euler": _Scheduler("EulerDiscreteScheduler", scaled=True),
    "heun": _Scheduler("HeunDiscreteScheduler", {"clip_sample": False}, scaled=True),
}


class NoiseLevel(NamedTuple):
    """alpha and sigma of x_t = alpha x0 + sigma eps: float32 scalars on the CPU."""

    alpha: Tensor
    sigma: Tensor


class Sampler:
    """One run of a `diffusers` scheduler; for each generation a new one.

    Args:
        config: `sampler` and its options.
        process: its schedule is the scheduler's; steps are counted back from its last timestep.
        first_step: the step to begin with, 0 to num_inference_steps - 1.

    Raises:
        ValueError: a number of steps that the schedule does not have, or a sampler that cannot run it.
    """

    def __init__(self, config: SamplingConfig, process: Diffusion, first_step: int = 0) -> None:
        if config.num_inference_steps > process.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps={config.num_inference_steps} must be 1 to {process.num_train_timesteps}"
            )
        zero_snr = bool(process.alphas[-1] == 0)
        if zero_snr and config.sampler == "heun":
            raise ValueError(
                "sampler='heun' has no finite start for a schedule that ends in pure noise; use 'dpm++' or 'ddim'"
            )
        self.name = config.sampler
        self._kind = SAMPLERS[config.sampler]
        self._scheduler = getattr(diffusers, self._kind.name)(
            num_train_timesteps=process.num_train_timesteps,
            trained_betas=process.scheduler.betas.numpy(),
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            **({"variance_type": process.variance_type} if self.name == "ddpm" else {}),
            **({"rescale_betas_zero_snr": True} if zero_snr else {}),
            **self._kind.options,
        )
        self._scheduler.set_timesteps(config.num_inference_steps)
        if not 0 <= first_step < config.num_inference_steps:
            raise ValueError(f"first_step={first_step} must be 0 to {config.num_inference_steps - 1}")
        self.first = first_step * (2 if self.name == "heun" else 1)  # the first call of the network
        if hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(self.first)

    @property
    def timesteps(self) -> Tensor:
        """(calls,) what the network sees in each of its calls; some samplers call it twice a step."""
        return self._scheduler.timesteps

    def __len__(self) -> int:
        """How often the network is called, from step 0 on."""
        return len(self.timesteps)

    def noise_level(self, i: int) -> NoiseLevel:
        """That of x_t in call i, as the scheduler itself counts it; of the result where i is `len`."""
        if i >= len(self):
            return NoiseLevel(torch.ones(()), torch.zeros(()))
        if hasattr(self._scheduler, "sigmas"):  # sigma / alpha, which grows without bound
            ratio = self._scheduler.sigmas[i]
            return NoiseLevel(1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt())
        alpha_squared = self._scheduler.alphas_cumprod[self.timesteps[i]]
        return NoiseLevel(alpha_squared.sqrt(), (1 - alpha_squared).sqrt())

    def step(
        self,
        i: int,
        x: Tensor,
        x0: Tensor,
        variance: Tensor | None = None,
        generators: list[torch.Generator] | None = None,
    ) -> Tensor:
        """x_t of call i + 1 from that of call i and the x0 predicted in it; every call in turn.

        Args:
            variance: the network's second half, for a learned variance; only ddpm has a use for it.
            generators: one per sample, for samplers that draw noise (ddpm).
        """
        if self.name == "ddpm" and i == len(self) - 1:
            return x0  # diffusers adds noise to the result too, when the last of few steps does not start at t = 0
        (alpha, sigma), after = self.noise_level(i), self.noise_level(i + 1)
        velocity = alpha * (x - alpha * x0) / sigma - sigma * x0
        if variance is not None and self.name == "ddpm":
            velocity = torch.cat([velocity, variance], dim=1)
        draws = {"generator": generators} if self.name == "ddpm" else {}
        scheduler, t = self._scheduler, self.timesteps[i]
        if self._kind.scaled:
            x = x / alpha
            scheduler.is_scale_input_called = True  # diffusers warns of a loop that forgets to
        x = scheduler.step(velocity, t, x, return_dict=False, **draws)[0]
        return x * after.alpha if self._kind.scaled else x
