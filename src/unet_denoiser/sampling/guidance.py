"""Guidance: combines a network's outputs with and without its conditions; one object for all samplers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.config.unet import CONDITIONS
from unet_denoiser.diffusion.predictions import get_prediction
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.layers.embeddings import SinusoidalPosEmb

GUIDABLE = (*CONDITIONS, "concat")  # conditions that the reference can go without
MIN_CLASSIFIER_ALPHA = 2.0**-11  # below it x_t tells nothing of x0, and the gradient would be divided by alpha


class Guidance:
    """A function (x_t, t, (alpha, sigma)) -> output that strengthens the conditions in a network's prediction.

    output = reference + guidance_scale * (conditional - reference)

    The reference is the network without its conditions (classifier-free guidance, Ho and Salimans 2022, equation 6,
    with guidance_scale = 1 + w), with other ones (`negative`), or a weaker network with the same ones (`guide`:
    autoguidance, Karras et al. 2024). The formula holds for every `prediction_type`, since at one x_t they are linear
    functions of each other. Scale 1 computes no reference and scale 0 nothing else; otherwise both halves run as one
    batch, unless there is a `guide`.

    With `image_guidance_scale` the image of `concat` has a weight of its own, for which the network runs a third time,
    with the image alone (Brooks et al. 2023, InstructPix2Pix, equation 3):

    output = reference + image_guidance_scale * (image - reference) + guidance_scale * (conditional - image)

    `guidance_rescale` then brings the standard deviation of each output back towards the conditional one's (Lin et al.
    2023, equations 15 and 16), and the gradient of a classifier is added to the score (Dhariwal and Nichol 2021,
    equation 14).

    Args:
        network: called as network(x, t, **conditions), with the conditions to leave out in its `drop` argument. All
            calls of a generation receive the same tensors.
        config: the options of guidance.
        conditions: conditions (B, ...) by name.
        guided: names of the conditions that the reference goes without; it keeps the others (default: all).
        negative: conditions (B, ...) that the reference has instead, such as a negative prompt.
        guide: the weaker network, called as `network` is; the reference then has all conditions.
        classifier: (x_t, t, **conditions) -> (B,) log-probability of the conditions, differentiable in x_t; t is what
            the network is fed.
        classifier_scale: factor of its gradient; 1 samples from the posterior of a perfect network and classifier.
        prediction_type, sigma_data: of the process; only a classifier needs them.
        channels: the number of guided channels, where the last ones are a learned variance; those stay the conditional
            network's (default: all are guided).

    Raises:
        ValueError: options that cannot work together, or a name in `guided` that was not given.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        config: SamplingConfig | None = None,
        conditions: Conditions | Mapping[str, Tensor | None] | None = None,
        *,
        guided: Sequence[str] | None = None,
        negative: Conditions | Mapping[str, Tensor | None] | None = None,
        guide: Callable[..., Tensor] | None = None,
        classifier: Callable[..., Tensor] | None = None,
        classifier_scale: float = 1.0,
        prediction_type: str = "epsilon",
        sigma_data: float = 1.0,
        channels: int | None = None,
    ) -> None:
        self.config = config or SamplingConfig()
        self.network, self.reference_network, self.channels = network, guide or network, channels
        self.classifier, self.classifier_scale = classifier, classifier_scale
        self.prediction = get_prediction(prediction_type, sigma_data)
        given, others = as_conditions("conditions", conditions), as_conditions("negative", negative)
        names = _select_guided(self.config, given, guided, others, has_guide=guide is not None)
        # keyword arguments of the networks, made once: a network recognises them by identity
        self.conditional: dict[str, Any] = given.given()
        self.reference, self.both = self.conditional, {}
        if self._is_guided and guide is None:
            self.both = _stack_halves(given, others, names)
            self.reference = _second_half(self.both)
            if self.config.image_guidance_scale is not None:
                image = _stack_halves(given, others, [name for name in names if name != "concat"])
                self.both = _append(image, self.reference)

    def __call__(self, x: Tensor, t: Tensor, alpha_sigma: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the guided output for the network's input x (B, C, ...) and timesteps t (B,).

        `guidance_interval` and a classifier need alpha and sigma of x_t: scalars on the CPU.
        """
        scale, is_active = self.config.guidance_scale, self._is_active(alpha_sigma)
        if not self._is_guided or not is_active:
            output = self.network(x, t, **self.conditional)
        elif scale == 0 and self.config.image_guidance_scale is None:
            output = self.reference_network(x, t, **self.reference)
        else:
            output = self._combine(*self.run_all(x, t))
        if self.classifier is None or not is_active:
            return output
        return self._add_classifier_gradient(output, x, t, alpha_sigma)

    @property
    def _is_guided(self) -> bool:
        return self.config.guidance_scale != 1 or self.config.image_guidance_scale not in (None, 1)

    def _is_active(self, alpha_sigma: tuple[Tensor, Tensor] | None) -> bool:
        """Return True inside `guidance_interval` (Kynkaanniemi et al. 2024, equation 5)."""
        interval = self.config.guidance_interval
        if interval is None:
            return True
        if alpha_sigma is None:
            raise ValueError(f"guidance_interval={interval} needs alpha and sigma in every call")
        alpha, sigma = map(float, alpha_sigma)
        return interval[0] < sigma / alpha <= interval[1]

    def run_all(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Return the conditional output, with `image_guidance_scale` that of the image alone, and the reference."""
        if not self.both:  # autoguidance
            return self.network(x, t, **self.conditional), self.reference_network(x, t, **self.reference)
        parts = 2 if self.config.image_guidance_scale is None else 3
        return self.network(torch.cat([x] * parts), torch.cat([t] * parts), **self.both).chunk(parts)

    def _combine(self, conditional: Tensor, *others: Tensor) -> Tensor:
        """Combine outputs (B, C, ...): the conditional one, and those of `run_all` that it is led away from."""
        wanted, (base, *rest) = conditional[:, : self.channels], (other[:, : self.channels] for other in others)
        guided = base + self.config.guidance_scale * (wanted - base)  # Ho and Salimans 2022, equation 6
        if rest and (image_scale := self.config.image_guidance_scale) is not None:
            # Brooks et al. 2023, equation 3; base has the image alone
            guided = guided + (image_scale - 1) * (base - rest[0])
        if phi := self.config.guidance_rescale:  # Lin et al. 2023, equations 15 and 16
            axes = tuple(range(1, guided.ndim))
            factor = wanted.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp_min(1e-12)
            guided = guided * (1 + phi * (factor - 1))
        return guided if self.channels is None else torch.cat([guided, conditional[:, self.channels :]], dim=1)

    def _add_classifier_gradient(
        self, output: Tensor, x: Tensor, t: Tensor, alpha_sigma: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Return the output whose score has the classifier's gradient added."""
        assert self.classifier is not None
        if alpha_sigma is None:
            raise ValueError("classifier needs alpha and sigma in every call")
        alpha, sigma = alpha_sigma
        if float(alpha) < MIN_CLASSIFIER_ALPHA:
            return output
        count = output.shape[1] if self.channels is None else self.channels
        with torch.enable_grad():
            xt = (x[:, :count] / self.prediction.c_in(alpha, sigma)).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.classifier(xt, t, **self.conditional).sum(), xt)
        factor = self.prediction.score_scale(alpha, sigma)
        guided = output[:, :count] + self.classifier_scale * factor * gradient  # Dhariwal and Nichol 2021, equation 14
        return guided if self.channels is None else torch.cat([guided, output[:, count:]], dim=1)


def embed_guidance_scale(scale: Tensor, dim: int) -> Tensor:
    """Embed guidance scales (B,) as (B, dim), the `time_cond` of networks that have guidance built in.

    Source: Meng et al. 2023, arXiv 2210.03142; in the form of Luo et al. 2023 (LCM), sinusoids of 1000 (scale - 1).
    """
    return SinusoidalPosEmb(dim)(1000 * (scale - 1))


def as_conditions(name: str, given: Conditions | Mapping[str, Any] | None) -> Conditions:
    """Return conditions as a record of tensors; lists and arrays become tensors.

    Raises:
        ValueError, TypeError: a condition that does not exist, or that is no numbers, with the argument's name.
    """
    if isinstance(given, Conditions):
        return given
    if unknown := [key for key in given or {} if key not in Conditions.names()]:
        raise ValueError(f"{name} has {unknown[0]!r}; conditions are {', '.join(Conditions.names())}")
    return Conditions(**{key: _as_tensor(key, value) for key, value in (given or {}).items()})


def _as_tensor(name: str, value: Any) -> Tensor | None:
    """Turn the value of a condition into a tensor; TypeError for one that is no numbers."""
    if value is None or isinstance(value, Tensor):
        return value
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        hint = "; a Pipeline turns names into labels: pipeline.labels(count, names)" * (name == "class_labels")
        raise TypeError(f"{name}={value!r} must be a tensor, or numbers{hint}") from None
    if name == "class_labels":
        return tensor if tensor.ndim else tensor.reshape(1)
    if not tensor.ndim:
        raise ValueError(f"{name}={value!r} must have one sample per seed")
    return tensor.bool() if name == "context_mask" else tensor.float()


def _select_guided(
    config: SamplingConfig, given: Conditions, guided: Sequence[str] | None, negative: Conditions, *, has_guide: bool
) -> list[str]:
    """Return the names of the conditions that the reference goes without, or has others of."""
    scale, image_scale = config.guidance_scale, config.image_guidance_scale
    names, has_negative = [name for name in GUIDABLE if name in given.given()], bool(negative.given())
    if unknown := [name for name in guided or () if name not in names]:
        raise ValueError(f"guided={unknown[0]!r} is not one of the conditions given: {', '.join(names) or 'none'}")
    if negative.time_cond is not None:
        raise ValueError(f"negative has 'time_cond'; conditions are {', '.join(GUIDABLE)}")
    if negative.context_mask is not None and negative.context is None:
        raise ValueError("negative has a context_mask without a context")
    if has_guide and (guided or has_negative):
        both = "guided" if guided else "negative"
        raise ValueError(f"guide and {both} both say what the reference of guidance is; give one")
    names = names if guided is None else list(guided)
    if image_scale is not None and (has_guide or "concat" not in names):
        raise ValueError(f"image_guidance_scale={image_scale} needs the image of concat, and no guide; leave it out")
    if scale != 1 and not names and not has_negative and not has_guide:
        raise ValueError(
            f"guidance_scale={scale} needs a condition ({', '.join(CONDITIONS)}), or a guide; without one give 1"
        )
    return names


def _stack_halves(given: Conditions, negative: Conditions, guided: Sequence[str]) -> dict[str, Any]:
    """Return the network's keyword arguments for both halves in one batch: (2B, ...), the reference second.

    The reference has the negative conditions, and drops the other `guided` ones. The first half drops a condition
    that only the reference has.
    """
    conditional, reference = given, replace(given, **negative.given())
    if negative.context is not None:
        lengths = [half.context.shape[1] for half in (given, negative) if half.context is not None]
        reference = _pad_context(replace(reference, context_mask=negative.context_mask), max(lengths))
        conditional = given if given.context is None else _pad_context(given, max(lengths))
    first, second, replaced = conditional.given(), reference.given(), negative.given()
    tensor = next(iter(second.values()))
    keep, drop = (torch.full((len(tensor),), value, device=tensor.device) for value in (False, True))  # (B,)
    dropped = {
        name: torch.cat([keep if name in first else drop, keep if name in replaced else drop])
        for name in second
        if name != "context_mask" and (name not in first or (name in guided and name not in replaced))
    }
    both = {name: torch.cat([first.get(name, value), value]) for name, value in second.items()}
    return both | ({"drop": dropped} if dropped else {})


def _append(both: Mapping[str, Any], third: Mapping[str, Any]) -> dict[str, Any]:
    """Append a third part (B, ...) to the keyword arguments of two halves (2B, ...)."""
    joined = {name: torch.cat([value, third[name]]) for name, value in both.items() if name != "drop"}
    tensor, drops = next(iter(joined.values())), [(2, both.get("drop", {})), (1, third.get("drop", {}))]
    keep = torch.zeros(len(tensor) // 3, dtype=torch.bool, device=tensor.device)
    names = [name for _, drop in drops for name in drop]
    drop = {name: torch.cat([part.get(name, keep.repeat(count)) for count, part in drops]) for name in names}
    return joined | ({"drop": drop} if drop else {})


def _pad_context(half: Conditions, length: int) -> Conditions:
    """Pad a context to `length` tokens and mask the padding; without a mask, all its tokens count."""
    context, mask = half.context, half.context_mask
    assert context is not None
    mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device) if mask is None else mask
    missing = length - context.shape[1]
    return replace(half, context=F.pad(context, (0, 0, 0, missing)), context_mask=F.pad(mask, (0, missing)))


def _second_half(both: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of the reference alone."""
    return {name: _second_half(x) if isinstance(x, Mapping) else x.chunk(2)[1] for name, x in both.items()}
