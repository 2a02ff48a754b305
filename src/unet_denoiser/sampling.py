"""The reverse process: from noise to data, with any sampler, for any network.

Samplers are `diffusers` schedulers. They are all handed the same thing, the velocity that belongs to a predicted and
clipped x0, so what the network predicts and how x0 is clipped is settled once, in `Diffusion`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from unet_denoiser.diffusion import Diffusion, network_input
from unet_denoiser.guidance import classifier_free_guidance
from unet_denoiser.inputs import with_concat
from unet_denoiser.recipe import SamplerName, check_choice
from unet_denoiser.unet import UNet

SAMPLERS: dict[SamplerName, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}


class Step(NamedTuple):
    """One step of the reverse process: its timestep, x after it and the x0 predicted in it, both (B, C, *spatial)."""

    t: int
    x: Tensor
    x0: Tensor


def make_sampler(name: SamplerName, process: Diffusion, num_inference_steps: int) -> Any:
    """A `diffusers` scheduler bound to the process: its schedule, and steps counted back from the last timestep.

    Raises:
        ValueError: an unknown name, or a number of steps the schedule does not have.
    """
    check_choice("sampler", name, SamplerName)
    if not 1 <= num_inference_steps <= process.num_train_timesteps:
        raise ValueError(f"num_inference_steps={num_inference_steps} must be 1 to {process.num_train_timesteps}")
    class_name, options = SAMPLERS[name]
    zero_snr = bool(process.alphas[-1] == 0)
    if zero_snr and name == "heun":
        raise ValueError(
            "sampler='heun' has no finite start for a schedule that ends in pure noise; use 'dpm++' or 'ddim'"
        )
    scheduler = getattr(diffusers, class_name)(
        num_train_timesteps=process.num_train_timesteps,
        trained_betas=process.scheduler.betas.numpy(),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        **({"variance_type": process.variance_type} if name == "ddpm" else {}),
        **({"clip_sample": False} if name in ("ddpm", "ddim", "heun") else {}),
        **({"rescale_betas_zero_snr": True} if zero_snr else {}),
        **options,
    )
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def denoise(
    predict: Callable[[Tensor, Tensor], Tensor],
    process: Diffusion,
    noise: Tensor,
    *,
    sampler: SamplerName = "dpm++",
    num_inference_steps: int = 25,
    clip_sample: bool = True,
    generators: list[torch.Generator] | None = None,
) -> Iterator[Step]:
    """Run the reverse process from pure noise, one step at a time.

    Args:
        predict: (input, t (B,)) -> the network's output; `classifier_free_guidance` makes one. The input is x_t (B, C,
            ...), with self-conditioning followed by the x0 of the step before (zero in the first).
        noise: (B, C, ...) draw from N(0, 1), in float32.
        clip_sample: clip each predicted x0 to the data's range. Without it the first steps, which divide by an alpha
            near zero, can leave the data far behind when the network predicts noise.
        generators: one per sample, for the samplers that draw noise on the way (ddpm).

    Yields:
        A `Step` for every call of the network; the last one's x is the result.
    """
    scheduler = make_sampler(sampler, process, num_inference_steps)
    x = noise * scheduler.init_noise_sigma
    draws = {"generator": generators} if sampler == "ddpm" else {}
    estimate = torch.zeros_like(x) if process.self_conditioning else None
    timesteps = scheduler.timesteps.to(x.device)  # all at once: torch waits for each copy to a GPU
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = _noise_level(scheduler, i)
        xt = scheduler.scale_model_input(x, t)
        with torch.no_grad():
            output = predict(network_input(xt, estimate), timesteps[i].expand(len(xt)))
        prediction, variance = process.split(output, xt)
        x0 = process.predict_x0(prediction, xt, alpha, sigma, clip_sample)
        velocity = alpha * (xt - alpha * x0) / sigma - sigma * x0
        if estimate is not None:
            estimate = process.clip(x0)  # as in training, whatever clip_sample
        if variance is not None and sampler == "ddpm":
            velocity = torch.cat([velocity, variance], dim=1)
        x = scheduler.step(velocity, t, x, return_dict=False, **draws)[0]
        if sampler == "ddpm" and i == len(scheduler.timesteps) - 1:
            x = x0  # diffusers adds noise to the result too, when the last of few steps does not start at t = 0
        yield Step(int(t), x, x0)


def _noise_level(scheduler: Any, i: int) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of the x_t that the network sees in step i, as the scheduler itself counts them."""
    if hasattr(scheduler, "sigmas"):  # sigma / alpha, which grows without bound
        ratio = scheduler.sigmas[i]
        return 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()
    alpha_squared = scheduler.alphas_cumprod[scheduler.timesteps[i]]
    return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()


def sample(
    model: UNet,
    process: Diffusion,
    *,
    seeds: Sequence[int],
    image_size: int | Sequence[int] | None = None,
    batch_size: int = 64,
    sampler: SamplerName = "dpm++",
    num_inference_steps: int = 25,
    guidance_scale: float = 1.0,
    guided: Sequence[str] | None = None,
    clip_sample: bool = True,
    on_step: Callable[[Step], object] | None = None,
    **conditions: Tensor | None,
) -> Tensor:
    """Generate one sample per seed; sample i depends on seed i and its conditions alone, not on the batch.

    Args:
        model: runs in evaluation mode and is left in the mode it was in.
        seeds: any integers that torch.Generator takes; noise is drawn on the CPU in float32.
        image_size: size of the samples, one int or one per axis (default: that of `concat`, else the
            configuration's).
        batch_size: samples per call of the network.
        guidance_scale, guided: see `classifier_free_guidance`; 1 is off.
        on_step: called after every step of every batch, for progress bars and previews.
        conditions: `class_labels`, `vector`, `context`, `context_mask`, each with one row per seed, or None;
            and `concat` (B, C2, *spatial) for a network that was trained with it.

    Returns:
        (len(seeds), C, *spatial) float32 on the model's device.

    Raises:
        ValueError: conditions that do not match the seeds, or options that cannot work; before any sampling.
    """
    given = {name: value for name, value in conditions.items() if value is not None}
    sizes = _check_request(model, seeds, image_size, batch_size, given)
    channels = _check_channels(model, process, _concat_channels(given))
    make_sampler(sampler, process, num_inference_steps)
    device, samples = model.input_conv.weight.device, []

    def network(x: Tensor, t: Tensor, **inputs: Any) -> Tensor:
        return model(x.to(model.dtype), t, **inputs).float()

    with _evaluating(model):
        for start in range(0, len(seeds), batch_size):
            rows = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
            noise = torch.stack([torch.randn(channels, *sizes, generator=g) for g in generators])
            inputs = {
                name: value[rows].to(device, model.dtype if value.is_floating_point() else None)
                for name, value in given.items()
            }
            steps = denoise(
                classifier_free_guidance(
                    with_concat(network), guidance_scale, guided, guided_channels=channels, **inputs
                ),
                process,
                noise.to(device),
                sampler=sampler,
                num_inference_steps=num_inference_steps,
                clip_sample=clip_sample,
                generators=generators,
            )
            for step in steps:
                if on_step is not None:
                    on_step(step)
            samples.append(step.x)
    return torch.cat(samples)


def _check_request(
    model: UNet,
    seeds: Sequence[int],
    image_size: int | Sequence[int] | None,
    batch_size: int,
    conditions: dict[str, Tensor],
) -> tuple[int, ...]:
    """The size of the samples, one int per axis, after everything that was asked for has been checked."""
    config = model.config
    concat = conditions.get("concat")
    natural = config.image_size if concat is None else tuple(concat.shape[2:])
    sizes = natural if image_size is None else image_size
    sizes = (sizes,) * config.dims if isinstance(sizes, int) else tuple(sizes)
    if len(sizes) != config.dims or min(sizes) < 1:
        raise ValueError(f"image_size={image_size} must be a positive int, or {config.dims} of them")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not len(seeds):
        raise ValueError("seeds is empty; give one per sample")
    for name, value in conditions.items():
        if len(value) != len(seeds):
            raise ValueError(f"{name} has {len(value)} rows for {len(seeds)} seeds; give one row per seed")
    if concat is not None and tuple(concat.shape[2:]) != sizes:
        raise ValueError(f"concat has size {tuple(concat.shape[2:])}; the samples have {sizes}")
    return sizes


def _check_channels(model: UNet, process: Diffusion, concat: int) -> int:
    """The channels of the samples; ValueError for a network of another process, or another number to concatenate."""
    c = model.config
    count = c.out_channels // (2 if process.learns_variance else 1)
    needed = c.in_channels - process.channels(count)["in_channels"]
    if 0 <= needed != concat:
        perhaps = ", or for self_conditioning=True" if needed == count and not process.self_conditioning else ""
        raise ValueError(f"concat has {concat} channels; this network was built for {needed}{perhaps}")
    return process.check_channels(c, concat_channels=concat)


def _concat_channels(conditions: dict[str, Tensor]) -> int:
    return conditions["concat"].shape[1] if "concat" in conditions else 0


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
