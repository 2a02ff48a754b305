"""Samplers by short names: `diffusers` schedulers on the noise levels of the process that a network was trained with.

The chosen steps become a new schedule (respacing, Nichol and Dhariwal 2021, section 4), and a scheduler runs
through all of it. So every sampler visits exactly the chosen noise levels, and the network sees the timestep of each.
Every sampler receives the predicted x0 (as a velocity or as noise) and both takes and returns x_t in the
variance-preserving scale, x_t = alpha x0 + sigma eps. The result is the x0 of the last network call, without noise.
A "ratio" is sigma / alpha, the noise level in the units of Karras et al. 2022.
"""

from collections.abc import Mapping
from copy import deepcopy
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unet_denoiser.config.sampling import SamplerName, SamplingConfig, TimestepSpacing
from unet_denoiser.diffusion.predictions import PREDICTIONS
from unet_denoiser.diffusion.process import Diffusion

MAX_RATIO = 80.0  # sigma_max of Karras et al. 2022, table 1
RHO = 7.0  # of their schedule, equation 5
MEMORYLESS: tuple[SamplerName, ...] = ("ddim", "ddpm", "euler", "euler_a")  # a step depends on x_t alone

Numbers = NDArray[np.float64]
Generators = list[torch.Generator] | None  # one per sample; None is torch's global generator


class SamplerSpec(NamedTuple):
    """A `diffusers` scheduler and how `Sampler` runs it.

    Args:
        scheduler, options: name of the class in diffusers, and its options.
        stochastic: it draws noise.
        variance_exploding: it steps x_t / alpha instead of x_t.
        calls: its network calls: one per step; at both ends of each step but the last ("heun"); at the start and in
            the middle of each step but the last ("middle"); or one per step and a second one in step 2 ("pndm").
        needs_finite_start: its first step multiplies a difference of two x0 by sigma / alpha, so it starts where that
            ratio is at most `MAX_RATIO`.
        prediction_type: the form in which it receives x0: a velocity, or the noise if it extrapolates its input.
    """

    scheduler: str
    options: Mapping[str, Any] = MappingProxyType({})
    stochastic: bool = False
    variance_exploding: bool = False
    calls: Literal["once", "heun", "middle", "pndm"] = "once"
    needs_finite_start: bool = False
    prediction_type: str = "v_prediction"


def _dpm(steps: str, order: int, algorithm: str = "dpmsolver++") -> SamplerSpec:
    options = {"solver_order": order, "algorithm_type": algorithm, "lower_order_final": True}
    return SamplerSpec(f"DPMSolver{steps}Scheduler", options, stochastic=algorithm.startswith("sde"))


_PLMS: dict[str, Any] = {"options": {"skip_prk_steps": True, "set_alpha_to_one": True}, "prediction_type": "epsilon"}
_HEUN: dict[str, Any] = {"variance_exploding": True, "calls": "heun", "needs_finite_start": True}
_KDPM2: dict[str, Any] = _HEUN | {"calls": "middle"}
SAMPLERS: dict[SamplerName, SamplerSpec] = {
    "ddpm": SamplerSpec("DDPMScheduler", {"clip_sample": False}, stochastic=True),
    "ddim": SamplerSpec("DDIMScheduler", {"clip_sample": False}),
    "pndm": SamplerSpec("PNDMScheduler", calls="pndm", needs_finite_start=True, **_PLMS),
    "ipndm": SamplerSpec("IPNDMScheduler"),
    "dpm++": _dpm("Multistep", 2),
    "dpm++3m": _dpm("Multistep", 3),
    "dpm++2s": _dpm("Singlestep", 2),
    "dpm++3s": _dpm("Singlestep", 3),
    "dpm++sde": _dpm("Multistep", 2, "sde-dpmsolver++"),
    "unipc": SamplerSpec("UniPCMultistepScheduler", {"solver_order": 2}),
    "deis": SamplerSpec("DEISMultistepScheduler", {"solver_order": 2}),
    "sa": SamplerSpec("SASolverScheduler", {"tau_func": lambda t: 1.0}, stochastic=True),
    "euler": SamplerSpec("EulerDiscreteScheduler", variance_exploding=True),
    "euler_a": SamplerSpec("EulerAncestralDiscreteScheduler", stochastic=True, variance_exploding=True),
    "heun": SamplerSpec("HeunDiscreteScheduler", {"clip_sample": False}, **_HEUN),
    "kdpm2": SamplerSpec("KDPM2DiscreteScheduler", **_KDPM2),
    "kdpm2_a": SamplerSpec("KDPM2AncestralDiscreteScheduler", stochastic=True, **_KDPM2),
    "lms": SamplerSpec("LMSDiscreteScheduler", variance_exploding=True),
}


class Sampler:
    """A `diffusers` scheduler on the noise levels of one process; it serves all batches of a generation in turn.

    Args:
        config: `sampler` and its options.
        process: the process that the network was trained with.
        first_step: the step to begin with, 0 to num_inference_steps - 1.

    Attributes:
        timesteps: (len,) timestep of every network call, on the CPU.

    Raises:
        ValueError: a number of steps that the schedule does not have, or a sampler that cannot run the schedule.
    """

    def __init__(self, config: SamplingConfig, process: Diffusion, first_step: int = 0) -> None:
        self.config, self.process, self._spec = config, process, SAMPLERS[config.sampler]
        _check(config, process)
        timesteps, ratios = select_steps(config, process)
        if not 0 <= first_step < len(ratios):
            raise ValueError(f"first_step={first_step} must be 0 to {len(ratios) - 1}")
        timesteps, ratios = timesteps[first_step:], ratios[first_step:]
        variance = {"variance_type": process.variance_type} if config.sampler == "ddpm" else {}
        self._initial = self._scheduler = _make_scheduler(self._spec, ratios, variance)
        self._next_call = -1  # so that the first step copies the scheduler
        self._options: dict[str, Any] = {"eta": config.eta} if config.eta > 0 else {}
        between = self._initial.sigmas_interpol.double().numpy() if self._spec.calls == "middle" else ratios
        t = _expand_to_calls(self._spec, timesteps, interpolate_times(process, between.clip(1e-9)))
        if not np.isfinite(t).all():  # between two steps, diffusers divides by a difference that can vanish
            raise ValueError(
                f"num_inference_steps={config.num_inference_steps}: sampler={config.sampler!r} finds no noise levels "
                "between these; give another number, or no sigma_schedule"
            )
        self.timesteps = torch.from_numpy(t.astype(np.int64 if (t == t.round()).all() else np.float32))
        self._device_timesteps = self.timesteps
        call_ratios = torch.from_numpy(_expand_to_calls(self._spec, _read_ratios(self._initial), between)).float()
        alphas = 1 / (1 + call_ratios.square()).sqrt()
        self._alphas_sigmas = [*zip(alphas, call_ratios * alphas, strict=True), (torch.ones(()), torch.zeros(()))]
        if config.sampler == "ddim" and process.step_rules.ends_noisy:
            self._alphas_sigmas[-1] = (process.alphas[0], process.sigmas[0])

    def __len__(self) -> int:
        """Return the number of network calls."""
        return len(self.timesteps)

    def alpha_sigma(self, i: int) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) of x_t at network call i, float32 scalars on the CPU; at i == len(self), of the end."""
        return self._alphas_sigmas[i]

    def expand_timestep(self, i: int, x: Tensor) -> Tensor:
        """Return the timestep of network call i for each sample of x: (B,), on its device."""
        self._device_timesteps = self._device_timesteps.to(x.device)  # all at once: torch waits for each copy to a GPU
        return self._device_timesteps[i].expand(len(x))

    def step(
        self, i: int, x: Tensor, x0: Tensor, variance: Tensor | None = None, generators: Generators = None
    ) -> Tensor:
        """Return x_t of network call i + 1 from x_t and the predicted x0 of call i.

        Calls come in turn; call 0 begins anew. The `MEMORYLESS` samplers take any call at any time.

        Args:
            x, x0, variance: (B, C, *spatial); only ddpm uses a learned variance.
            generators: for samplers that draw noise.
        """
        (alpha, sigma), (alpha_after, sigma_after) = self.alpha_sigma(i), self.alpha_sigma(i + 1)
        if i == len(self) - 1 and sigma_after == 0:
            return x0
        noise = (x - alpha * x0) / sigma  # DDPM, equation 4
        if i == len(self) - 1:
            return alpha_after * x0 + sigma_after * noise
        if i != self._next_call:
            self._restart(i)
        self._next_call = i + 1
        output = PREDICTIONS[self._spec.prediction_type].target(x0, noise, alpha, sigma)
        if variance is not None and self.config.sampler == "ddpm":
            output = torch.cat([output, variance], dim=1)
        noisy = self._spec.stochastic or self._options
        options = self._options | ({"generator": generators} if noisy else {})
        x = x / alpha if self._spec.variance_exploding else x
        x = self._scheduler.step(output, self._scheduler.timesteps[i], x, return_dict=False, **options)[0]
        return x * alpha_after if self._spec.variance_exploding else x

    def _restart(self, i: int) -> None:
        """Forget the steps so far and go on with call i."""
        self._scheduler, self._next_call = deepcopy(self._initial), i  # 0.2 ms; it holds no past steps
        if hasattr(self._scheduler, "set_begin_index"):  # else it looks up the timestep, which may occur twice
            self._scheduler.set_begin_index(i)


def _check(config: SamplingConfig, process: Diffusion) -> None:
    """Raise ValueError for options that cannot run on the process, with the reason and a way out."""
    if process.distillation is not None:
        process.distillation.check_sampling(config)
    if config.dynamic_threshold is not None and process.data_range is None:
        raise ValueError(
            f"dynamic_threshold={config.dynamic_threshold} needs data of a known range, and this process has none "
            "(clip_sample_range=None, as latents); leave it out"
        )
    if config.sampler == "lms" and find_spec("scipy") is None:
        raise ValueError("sampler='lms' needs SciPy (pip install scipy); 'dpm++' does without")
    if process.alphas[-1] > 0:
        return
    zero_snr = "a schedule that ends in pure noise" + " (rescale_betas_zero_snr)" * (process.path == "vp")
    if config.timestep_spacing == "leading":
        raise ValueError(f"timestep_spacing='leading' leaves out the last timestep of {zero_snr}; use 'trailing'")
    if process.path == "flow":  # at MAX_RATIO hardly any signal is left, and the network has learned that level too
        return
    if SAMPLERS[config.sampler].needs_finite_start:
        raise ValueError(f"sampler={config.sampler!r} has no finite start for {zero_snr}; use 'dpm++' or 'ddim'")
    if config.sigma_schedule is not None:
        raise ValueError(f"sigma_schedule={config.sigma_schedule!r} has no finite start for {zero_snr}; leave it out")


def interpolate_times(process: Diffusion, ratios: Numbers) -> Numbers:
    """Return what the network is fed at these sigma / alpha, also between the trained ones: linear in its logarithm."""
    return np.interp(np.log(ratios), np.log(process.ratios), process.times.double().numpy())


def select_steps(config: SamplingConfig, process: Diffusion) -> tuple[Numbers, Numbers]:
    """Return what the network is fed, and sigma / alpha, of every step, falling; ValueError for too many steps."""
    trained, count = process.ratios, config.num_inference_steps
    if config.sigma_schedule is not None:
        high, low = min(trained[-1], MAX_RATIO), trained[0]
        if config.sigma_schedule == "karras":
            ratios = np.linspace(high ** (1 / RHO), low ** (1 / RHO), count) ** RHO  # Karras et al. 2022, equation 5
        else:
            ratios = np.geomspace(high, low, count)
        return interpolate_times(process, ratios), ratios
    needs_finite_start = SAMPLERS[config.sampler].needs_finite_start
    total = int((trained <= MAX_RATIO).sum()) if needs_finite_start else len(trained)
    if count > total:
        raise ValueError(f"num_inference_steps={count} must be 1 to {total} for sampler={config.sampler!r}")
    indices = _space_timesteps(config.timestep_spacing, count, total, process.step_rules.steps_offset)
    return process.times.double().numpy()[indices], trained[indices]


def _space_timesteps(spacing: TimestepSpacing, count: int, total: int, offset: int) -> NDArray[np.int64]:
    """Return (count,) different timesteps of 0 to total - 1, falling; the offset is of "leading"."""
    if spacing == "trailing":  # Lin et al. 2023, table 2
        timesteps = np.round(total - np.arange(count) * total / count) - 1
    elif spacing == "linspace":
        timesteps = np.round(np.linspace(total - 1, 0, count))
    elif spacing == "leading":
        timesteps = (np.arange(count - 1.0, -1, -1) * (total // count) + offset).clip(max=total - 1)
    else:
        steps = np.arange(count, 0.0, -1)  # as many timesteps, at least, are left for the steps to come
        timesteps = np.maximum(np.round(total * (steps / count) ** 2), steps) - 1
    return timesteps.astype(np.int64)


def _make_scheduler(spec: SamplerSpec, ratios: Numbers, more_options: Mapping[str, Any]) -> Any:
    """Make a scheduler whose steps have these sigma / alpha: all timesteps of a schedule made of them."""
    count, alphas_squared = len(ratios), 1 / (1 + ratios[::-1] ** 2)
    if spec.scheduler == "IPNDMScheduler":  # its schedule is fixed but public; its betas are sigmas
        scheduler: Any = diffusers.IPNDMScheduler(count)
        scheduler.set_timesteps(count)
        scheduler.alphas = torch.from_numpy(np.append(alphas_squared[::-1] ** 0.5, 1)).float()
        scheduler.betas = torch.from_numpy(np.append((1 - alphas_squared[::-1]) ** 0.5, 0)).float()
        return scheduler
    single = "Singlestep" in spec.scheduler  # has another spacing, which leaves out timesteps
    scheduler = getattr(diffusers, spec.scheduler)(
        num_train_timesteps=count,
        trained_betas=1 - alphas_squared / np.append(1, alphas_squared[:-1]),
        prediction_type=spec.prediction_type,
        **({} if single else {"timestep_spacing": "trailing"}),
        **spec.options,
        **more_options,
    )
    # of a beta near 1, float32 leaves 1 - beta no digits
    scheduler.alphas_cumprod = torch.from_numpy(alphas_squared).to(scheduler.alphas_cumprod.dtype)
    scheduler.set_timesteps(**({"timesteps": list(range(count))[::-1]} if single else {"num_inference_steps": count}))
    if spec.variance_exploding:
        scheduler.is_scale_input_called = True  # diffusers warns of a loop that does not call scale_model_input
    return scheduler


def _read_ratios(scheduler: Any) -> Numbers:
    """Return sigma / alpha of every step, falling, in the scheduler's float32."""
    if hasattr(scheduler, "alphas_cumprod"):
        squared = scheduler.alphas_cumprod.flip(0)
        return ((1 - squared) / squared).sqrt().double().numpy()
    return (scheduler.betas / scheduler.alphas)[:-1].double().numpy()


def _expand_to_calls(spec: SamplerSpec, steps: Numbers, between: Numbers) -> Numbers:
    """Return one value per network call, from `steps` or from `between` two steps, in the scheduler's order."""
    count = len(steps)
    if spec.calls == "once":
        return steps
    if spec.calls == "pndm":
        return steps[[0, *range(1, min(count, 2)), *range(1, count)]]
    calls = np.arange(2 * count - 1)
    if spec.calls == "heun":
        return steps[(calls + 1) // 2]
    shift = 0 if spec.stochastic else 1  # kdpm2_a stores a middle with its step, kdpm2 with the next one
    return np.where(calls % 2 == 0, steps[calls // 2], between[calls - 1 + shift])
