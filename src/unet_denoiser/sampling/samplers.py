"""Samplers by short names: `diffusers` schedulers, bound to the process that a network was trained with.

The steps of one generation are made a schedule of their own, with as many timesteps as steps (respacing, as in Nichol
and Dhariwal 2021, section 4), and a scheduler runs through all of it. So every sampler visits exactly the noise levels
that were chosen, whatever it would make of steps that do not divide the trained ones, and the network sees the timestep
of each. All are handed what belongs to a predicted x0, and take and give x_t in the process's own scale,
x_t = alpha x0 + sigma eps. The last call's x0 is the result, so no noise is left in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unet_denoiser.config.base import PredictionType
from unet_denoiser.config.sampling import SamplerName, SamplingConfig
from unet_denoiser.diffusion.predictions import PREDICTIONS
from unet_denoiser.diffusion.process import Diffusion

LEAST_ALPHA_SQUARED = 2.0**-24  # of pure noise, for schedulers that divide by alpha; diffusers' own choice
LARGEST_RATIO = 80.0  # sigma_max of Karras et al. 2022, table 1
RHO = 7.0  # of their schedule, equation 5

Numbers = NDArray[np.float64]


class Kind(NamedTuple):
    """How a scheduler is used.

    Args:
        scheduler: name of the class in diffusers.
        options: its options.
        stochastic: it draws noise.
        scaled: it steps x_t / alpha instead of x_t.
        calls: how often it calls the network: once a step; at both ends of each ("heun"), or at its start and in its
            middle ("middle"), the last step aside; or once more in the second step ("pndm").
        bounded: its first step multiplies the difference of two x0 by sigma / alpha, which must not be large: it starts
            where that is at most `LARGEST_RATIO`.
        prediction_type: what x0 is handed to it as: the noise where it extrapolates that, else the velocity.
    """

    scheduler: str
    options: Mapping[str, Any] = MappingProxyType({})
    stochastic: bool = False
    scaled: bool = False
    calls: Literal["once", "heun", "middle", "pndm"] = "once"
    bounded: bool = False
    prediction_type: PredictionType = "v_prediction"


def _dpm(steps: str, order: int, algorithm: str = "dpmsolver++") -> Kind:
    options = {"solver_order": order, "algorithm_type": algorithm, "lower_order_final": True}
    return Kind(f"DPMSolver{steps}Scheduler", options, stochastic=algorithm.startswith("sde"))


_PLMS = {"skip_prk_steps": True, "set_alpha_to_one": True}
_MIDDLE: dict[str, Any] = {"scaled": True, "calls": "middle", "bounded": True}
SAMPLERS: dict[SamplerName, Kind] = {
    "ddpm": Kind("DDPMScheduler", {"clip_sample": False}, stochastic=True),
    "ddim": Kind("DDIMScheduler", {"clip_sample": False}),
    "pndm": Kind("PNDMScheduler", _PLMS, calls="pndm", bounded=True, prediction_type="epsilon"),
    "ipndm": Kind("IPNDMScheduler"),
    "dpm++": _dpm("Multistep", 2),
    "dpm++3m": _dpm("Multistep", 3),
    "dpm++2s": _dpm("Singlestep", 2),
    "dpm++3s": _dpm("Singlestep", 3),
    "dpm++sde": _dpm("Multistep", 2, "sde-dpmsolver++"),
    "unipc": Kind("UniPCMultistepScheduler", {"solver_order": 2}),
    "deis": Kind("DEISMultistepScheduler", {"solver_order": 2}),
    "sa": Kind("SASolverScheduler", {"tau_func": lambda t: 1.0}, stochastic=True),
    "euler": Kind("EulerDiscreteScheduler", scaled=True),
    "euler_a": Kind("EulerAncestralDiscreteScheduler", stochastic=True, scaled=True),
    "heun": Kind("HeunDiscreteScheduler", {"clip_sample": False}, scaled=True, calls="heun", bounded=True),
    "kdpm2": Kind("KDPM2DiscreteScheduler", **_MIDDLE),
    "kdpm2_a": Kind("KDPM2AncestralDiscreteScheduler", stochastic=True, **_MIDDLE),
    "lms": Kind("LMSDiscreteScheduler", scaled=True),
}


class NoiseLevel(NamedTuple):
    """alpha and sigma of x_t = alpha x0 + sigma eps: float32 scalars on the CPU."""

    alpha: Tensor
    sigma: Tensor


class Sampler:
    """One run of a `diffusers` scheduler; a new one for each generation.

    Args:
        config: `sampler` and its options.
        process: its schedule is the scheduler's.
        first_step: the step to begin with, 0 to num_inference_steps - 1.

    Raises:
        ValueError: a number of steps that the schedule does not have, or a sampler that cannot run it.
    """

    def __init__(self, config: SamplingConfig, process: Diffusion, first_step: int = 0) -> None:
        self.name, self._kind = config.sampler, SAMPLERS[config.sampler]
        _check(config, process)
        timesteps, ratios = steps_of(config, process)
        if not 0 <= first_step < len(ratios):
            raise ValueError(f"first_step={first_step} must be 0 to {len(ratios) - 1}")
        timesteps, ratios = timesteps[first_step:], ratios[first_step:]
        own_options = {"variance_type": process.variance_type} if self.name == "ddpm" else {}
        self._scheduler = _make_scheduler(self._kind, ratios, own_options)
        self._options = {"eta": config.eta} if config.eta > 0 else {}
        middle = self._scheduler.sigmas_interpol.double().numpy() if self._kind.calls == "middle" else ratios
        t = _at_calls(self._kind, timesteps, timestep_of(process, middle.clip(1e-9)))
        if not np.isfinite(t).all():  # in between, diffusers divides by a difference that can vanish
            raise ValueError(
                f"num_inference_steps={config.num_inference_steps}: sampler={self.name!r} finds no noise levels "
                "between these; give another number, or no sigma_schedule"
            )
        whole = (t == t.round()).all()
        self.timesteps: Tensor = torch.from_numpy(t.astype(np.int64 if whole else np.float32))
        own_ratios = torch.from_numpy(_at_calls(self._kind, _ratios_of(self._scheduler), middle)).float()
        alphas = 1 / (1 + own_ratios.square()).sqrt()
        self._levels = [NoiseLevel(*level) for level in zip(alphas, own_ratios * alphas, strict=True)]
        self._levels.append(NoiseLevel(torch.ones(()), torch.zeros(())))

    def __len__(self) -> int:
        """How often the network is called."""
        return len(self.timesteps)

    def noise_level(self, i: int) -> NoiseLevel:
        """That of x_t in call i, as the scheduler itself counts it; of the result where i is `len`."""
        return self._levels[i]

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
            generators: one per sample, for samplers that draw noise; torch's own without.
        """
        if i == len(self) - 1:
            return x0
        (alpha, sigma), after, scheduler = self.noise_level(i), self.noise_level(i + 1), self._scheduler
        noise = (x - alpha * x0) / sigma
        output = PREDICTIONS[self._kind.prediction_type].target(x0, noise, alpha, sigma)
        if variance is not None and self.name == "ddpm":
            output = torch.cat([output, variance], dim=1)
        draws = {"generator": generators} if self._kind.stochastic or self._options else {}
        if self._kind.scaled:
            scheduler.is_scale_input_called = True  # diffusers warns of a loop that forgets to
            x = x / alpha
        x = scheduler.step(output, scheduler.timesteps[i], x, return_dict=False, **self._options, **draws)[0]
        return x * after.alpha if self._kind.scaled else x


def _check(config: SamplingConfig, process: Diffusion) -> None:
    """ValueError for a sampler that cannot run the process's schedule, with the reason and another that can."""
    if config.sampler == "lms" and find_spec("scipy") is None:
        raise ValueError("sampler='lms' needs SciPy (pip install scipy); 'dpm++' does without")
    if process.alphas[-1] > 0:
        return
    if SAMPLERS[config.sampler].bounded:
        raise ValueError(
            f"sampler={config.sampler!r} has no finite start for a schedule that ends in pure noise "
            "(rescale_betas_zero_snr); use 'dpm++' or 'ddim'"
        )
    if config.sigma_schedule is not None:
        raise ValueError(
            f"sigma_schedule={config.sigma_schedule!r} has no finite start for a schedule that ends in pure noise "
            "(rescale_betas_zero_snr); leave it out"
        )
    if config.timestep_spacing == "leading":
        raise ValueError(
            "timestep_spacing='leading' leaves out the last timestep, which alone is pure noise in this process "
            "(rescale_betas_zero_snr); use 'trailing'"
        )


# ---- which noise levels ----------------------------------------------------------------------------------------------


def trained_ratios(process: Diffusion) -> Numbers:
    """(T,) sigma / alpha of every timestep, rising; that of `LEAST_ALPHA_SQUARED` for pure noise."""
    alphas_squared = np.cumprod(1 - process.scheduler.betas.double().numpy())
    alphas_squared[alphas_squared <= 0] = LEAST_ALPHA_SQUARED  # a cosine schedule's last is lower, and not pure noise
    return np.sqrt((1 - alphas_squared) / alphas_squared)


def timestep_of(process: Diffusion, ratios: Numbers) -> Numbers:
    """The timesteps, also between the trained ones, at which sigma / alpha has these values: linear in its log."""
    return np.interp(np.log(ratios), np.log(trained_ratios(process)), np.arange(process.num_train_timesteps))


def steps_of(config: SamplingConfig, process: Diffusion) -> tuple[Numbers, Numbers]:
    """Timestep and sigma / alpha of every step, falling: by `sigma_schedule`, else by `timestep_spacing`.

    Raises:
        ValueError: a number of steps that the process does not have.
    """
    trained, count = trained_ratios(process), config.num_inference_steps
    if config.sigma_schedule is not None:
        high, low = min(trained[-1], LARGEST_RATIO), trained[0]
        if config.sigma_schedule == "karras":
            ratios = np.linspace(high ** (1 / RHO), low ** (1 / RHO), count) ** RHO
        else:
            ratios = np.geomspace(high, low, count)
        return timestep_of(process, ratios), ratios
    total = len(trained)
    if SAMPLERS[config.sampler].bounded:
        total = int((trained <= LARGEST_RATIO).sum())
    if count > total:
        raise ValueError(f"num_inference_steps={count} must be 1 to {total} for sampler={config.sampler!r}")
    if config.timestep_spacing == "trailing":
        timesteps = np.round(total - np.arange(count) * total / count) - 1
    elif config.timestep_spacing == "linspace":
        timesteps = np.round(np.linspace(total - 1, 0, count))
    else:
        timesteps = np.arange(count - 1.0, -1, -1) * (total // count)
    return timesteps, trained[timesteps.astype(np.int64)]


# ---- the scheduler ---------------------------------------------------------------------------------------------------


def _make_scheduler(kind: Kind, ratios: Numbers, own_options: Mapping[str, Any]) -> Any:
    """A scheduler whose steps have these sigma / alpha: all the timesteps of a schedule made of them."""
    count, alphas_squared = len(ratios), 1 / (1 + ratios[::-1] ** 2)
    if kind.scheduler == "IPNDMScheduler":  # its schedule is fixed, and lies open; its betas are sigmas
        scheduler: Any = diffusers.IPNDMScheduler(count)
        scheduler.set_timesteps(count)
        scheduler.alphas = torch.from_numpy(np.append(alphas_squared[::-1] ** 0.5, 1)).float()
        scheduler.betas = torch.from_numpy(np.append((1 - alphas_squared[::-1]) ** 0.5, 0)).float()
    else:
        single = "Singlestep" in kind.scheduler  # has a spacing of its own, which leaves out timesteps
        scheduler = getattr(diffusers, kind.scheduler)(
            num_train_timesteps=count,
            trained_betas=1 - alphas_squared / np.append(1, alphas_squared[:-1]),
            prediction_type=kind.prediction_type,
            **({} if single else {"timestep_spacing": "trailing"}),
            **kind.options,
            **own_options,
        )
        # of a beta near 1, float32 leaves 1 - beta no digits
        scheduler.alphas_cumprod = torch.from_numpy(alphas_squared).to(scheduler.alphas_cumprod.dtype)
        scheduler.set_timesteps(
            **({"timesteps": list(range(count))[::-1]} if single else {"num_inference_steps": count})
        )
    if hasattr(scheduler, "set_begin_index"):  # else they look for the timestep, which some have twice
        scheduler.set_begin_index(0)
    return scheduler


def _ratios_of(scheduler: Any) -> Numbers:
    """sigma / alpha of every step, falling, as the scheduler counts it in its float32."""
    if hasattr(scheduler, "alphas_cumprod"):
        squared = scheduler.alphas_cumprod.flip(0)
        return ((1 - squared) / squared).sqrt().double().numpy()
    return (scheduler.betas / scheduler.alphas)[:-1].double().numpy()


def _at_calls(kind: Kind, of_steps: Numbers, of_middles: Numbers) -> Numbers:
    """For every call of the network, the value of its step, or that in the middle of it (as the scheduler has them)."""
    count = len(of_steps)
    if kind.calls == "once":
        return of_steps
    if kind.calls == "pndm":
        return of_steps[[0, *range(1, min(count, 2)), *range(1, count)]]
    calls = np.arange(2 * count - 1)
    if kind.calls == "heun":
        return of_steps[(calls + 1) // 2]
    shift = 0 if kind.stochastic else 1  # the ancestral one keeps a middle with its step, the other with the next
    return np.where(calls % 2 == 0, of_steps[calls // 2], of_middles[calls - 1 + shift])
