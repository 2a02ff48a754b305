"""Distillation of a diffusion model into one of few steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.config.training import TrainingConfig
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.diffusion.loss import Losses
from unet_denoiser.diffusion.process import Diffusion, accepts_concat
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.guidance import Guidance, embed_guidance_scale
from unet_denoiser.sampling.samplers import select_steps
from unet_denoiser.utils.broadcasting import append_dims

GUIDANCE_DIM = 256  # of the embedding of the guidance scale, as LCM has it
HUBER_WIDTH = 0.03  # of an error in the velocity, below which the loss is quadratic


class _Level(NamedTuple):
    """Noise levels of a batch: t (B,); alpha and sigma (B, 1, ...)."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor


class Distillation:
    """The loss of a network that learns to do several steps of a guided teacher at once.

    The teacher's steps go through N noise levels, which are divided into one segment for each step of the network. x_t
    is at the start of a segment: half of the time noised data, else what the network itself reaches from pure noise,
    as in sampling. From there the teacher goes to the segment's end with the steps of dpm++, the default sampler. The
    network learns the x0 whose single ddim step leads from x_t to the same end.

    Args:
        process: with `distillation`.
        teacher: stays as it is.
        negative: conditions (1, ...) of guidance's reference, for a teacher that cannot go without its context.

    Raises:
        ValueError: guidance that the teacher cannot have.
    """

    def __init__(self, process: Diffusion, teacher: UNet, negative: Conditions | None = None) -> None:
        if process.distillation is None:
            raise ValueError("process has no distillation; give process.distilled(DistillationConfig(...))")
        self.process, self.config, self.negative = process, process.distillation, negative or Conditions()
        self.teacher = teacher.eval().requires_grad_(False)
        self._check_teacher(teacher.config)
        levels = self._select_levels()
        self._timesteps = torch.cat([levels, torch.zeros(1, dtype=torch.long)])  # the last stands for clean data

    def to(self, device: torch.device) -> None:
        """Move the teacher, and what the loss reads in each step."""
        self.teacher.to(device)
        self.negative, self._timesteps = self.negative.to(device), self._timesteps.to(device)

    def __call__(
        self, network: Callable[..., Tensor], x0: Tensor, *, t: Tensor, noise: Tensor, guidance: Tensor, **inputs: Any
    ) -> Losses:
        """Compute the pseudo-Huber loss of the network's prediction, as a velocity; `t` of the losses is the level's.

        It is nearly the absolute error of each value, which leaves details sharper than the squared error does.

        Args:
            network: the one that learns, called as in `training_losses`.
            x0: (B, C, ...) data.
            t: (B,) integers from 0 to T - 1, each as likely, which choose the segments and their kind of x_t.
            noise: like x0.
            guidance: (B,) in [0, 1), the place of the guidance scale in its range.
            inputs: conditions.
        """
        low, high = self.config.guidance_range
        scale = low + (high - low) * guidance
        embedding = {"time_cond": embed_guidance_scale(scale, GUIDANCE_DIM)} if self.config.draws_guidance else {}
        place = t * self.config.num_steps / self.process.num_train_timesteps
        index, own = self.config.num_steps - 1 - place.long(), append_dims(place % 1 >= 0.5, x0.ndim)
        levels = self._segment(index, x0)
        start, end = levels[0], levels[-1]
        network = partial(accepts_concat(network), **inputs, **embedding)
        xt = start.alpha * x0 + start.sigma * noise
        with torch.no_grad():
            xt = torch.where(own, self._reach(network, noise, index), xt)
            target = _ddim_x0(xt, self._follow_teacher(xt, levels, scale, inputs), start, end)
        predicted = self._x0(network(*self._seen(xt, start)), xt, start)
        # the squared error of x0 by (alpha^2 + sigma^2) / sigma^2 is that of the velocity
        weight = 1 + (start.alpha / start.sigma).square()
        error = weight * (predicted - target).square()
        loss = (error + HUBER_WIDTH**2).sqrt() - HUBER_WIDTH  # Song and Dhariwal 2023, section 3.3, of each value
        return Losses(loss.flatten(1).mean(1), error.flatten(1).mean(1), start.t)

    def _check_teacher(self, teacher: UNetConfig) -> None:
        """Raise ValueError for a teacher that cannot be distilled."""
        given = f"guidance_scale={self.config.guidance_scale}"
        concat = self.process.concat_channels(teacher) > 0
        if self.process.self_conditioning:
            raise ValueError("self_conditioning=True cannot be distilled: a step depends on those before it")
        if self.config.guidance_range == (1.0, 1.0):
            return
        if not teacher.conditions and not concat:
            raise ValueError(f"{given} needs conditions, which the teacher was trained without; give 1")
        if not (teacher.learned_null or concat or self.negative.given()):
            raise ValueError(f"{given}: the teacher cannot go without its conditions (learned_null=False); give 1")

    def _select_levels(self) -> Tensor:
        """Return the levels of the teacher's steps, falling; ValueError if those of the network are not among them."""
        steps = SamplingConfig(**self.config.sampling)
        count, teacher_steps = self.config.num_steps, self.config.teacher_steps
        ratios = select_steps(replace(steps, num_inference_steps=teacher_steps), self.process)[1]
        if not np.array_equal(ratios[:: teacher_steps // count], select_steps(steps, self.process)[1]):
            raise ValueError(
                f"teacher_steps={teacher_steps} must be at most {self.process.num_train_timesteps // count} for "
                f"num_steps={count} with timestep_spacing={steps.timestep_spacing!r}"
            )
        return torch.from_numpy(np.searchsorted(self.process.ratios, ratios))

    def _segment(self, index: Tensor, like: Tensor) -> list[_Level]:
        """Return the levels of segments (B,), counted from pure noise, from the start of each to its end."""
        count, segments = self.config.teacher_steps, self.config.num_steps
        first, timesteps, levels = index * (count // segments), self._timesteps, []
        for i in range(count // segments + 1):
            alpha, sigma = self.process.alpha_sigma(timesteps[first + i], like)
            alpha = torch.where(alpha == 0, 1 / self.process.ratios[-1], alpha)  # pure noise, as samplers take it
            clean = append_dims(first + i == count, like.ndim)
            levels.append(_Level(timesteps[first + i], torch.where(clean, 1, alpha), torch.where(clean, 0, sigma)))
        return levels

    def _reach(self, network: Callable[..., Tensor], noise: Tensor, index: Tensor) -> Tensor:
        """Return the x_t at the starts of segments (B,) that the network's own steps lead to from pure noise.

        Noised data alone would teach it nothing about the errors of its steps before, which it then cannot mend. All
        samples go through all calls, since sharded processes must make as many.
        """
        x = self._segment(torch.zeros_like(index), noise)[0].sigma * noise
        for step in range(self.config.num_steps - 1):
            levels = self._segment(torch.full_like(index, step), noise)
            x0 = self._x0(network(*self._seen(x, levels[0])), x, levels[0])
            x = torch.where(append_dims(index > step, x.ndim), _ddim_step(x, x0, levels[0], levels[-1]), x)
        return x

    def _follow_teacher(self, x: Tensor, levels: Sequence[_Level], scale: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Go from level to level with the guided teacher, by dpm++ (Lu et al. 2022, DPM-Solver++(2M))."""
        previous = None  # x0 of the step before, and its length in log(alpha / sigma)
        for level, to in pairwise(levels):
            x0 = self._teacher_x0(x, level, scale, inputs)
            length = (to.alpha / to.sigma).log() - (level.alpha / level.sigma).log()
            change = torch.zeros_like(x0) if previous is None else (x0 - previous[0]) * (length / previous[1] / 2)
            last = to.sigma == 0  # where the length is infinite
            x, previous = _ddim_step(x, x0 + torch.where(last, 0, change), level, to), (x0, length)
        return x

    def _seen(self, x: Tensor, level: _Level) -> tuple[Tensor, Tensor]:
        """Return what a network is fed of x_t and of its time."""
        return self.process.network_input(x, level.alpha, level.sigma), self.process.time(level.t)

    def _x0(self, output: Tensor, x: Tensor, level: _Level, clip: bool = False) -> Tensor:
        """Return the x0 of an output, by default outside of the data's range too: a jump's x0 is none of the data."""
        prediction, _ = self.process.split(output.float(), x)
        return self.process.predict_x0(prediction, x, level.alpha, level.sigma, clip=clip)

    def _teacher_x0(self, x: Tensor, level: _Level, scale: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return the x0 that the guided teacher predicts, as in sampling."""
        teacher = accepts_concat(self.teacher)
        if self.config.guidance_range == (1.0, 1.0):
            return self._x0(teacher(*self._seen(x, level), **inputs), x, level, clip=True)
        keeps = not self.teacher.config.learned_null
        guided = [name for name in inputs if name == "concat"] if keeps else None
        negative = self.negative.expand(len(x))
        both = Guidance(teacher, SamplingConfig(guidance_scale=2.0), inputs, guided=guided, negative=negative)
        conditional, reference = (output.float() for output in both.run_all(*self._seen(x, level)))
        guided_output = reference + append_dims(scale, x.ndim) * (conditional - reference)
        return self._x0(guided_output, x, level, clip=True)


def check_loss(process: Diffusion, config: TrainingConfig, distillation: Distillation | None) -> None:
    """Raise ValueError for another loss than the process's, or options that have no meaning in distillation."""
    if (process.distillation is None) != (distillation is None):
        raise ValueError("a process with distillation needs the loss `distillation`, and only that one")
    if distillation is None:
        return
    for name, valid, reason in (
        ("condition_dropout", 0.0, "a distilled network is never without its conditions"),
        ("loss_weighting", "constant", "distillation weights the error of the velocity alike at all levels"),
    ):
        if getattr(config, name) != valid:
            raise ValueError(f"{name}={getattr(config, name)!r}: {reason}; give {valid!r}")


def _ddim_step(x: Tensor, x0: Tensor, level: _Level, to: _Level) -> Tensor:
    """Go from x_t to another level along a predicted x0 (Song et al. 2020, equation 12, without noise)."""
    return to.alpha * x0 + to.sigma / level.sigma * (x - level.alpha * x0)


def _ddim_x0(x: Tensor, arrival: Tensor, level: _Level, to: _Level) -> Tensor:
    """Return the x0 with which `_ddim_step` arrives there."""
    ratio = to.sigma / level.sigma
    return (arrival - ratio * x) / (to.alpha - ratio * level.alpha)
