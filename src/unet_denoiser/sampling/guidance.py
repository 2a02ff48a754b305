"""Guidance: what a network's outputs with and without its conditions are combined to; one object for all samplers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.config.base import PredictionType
from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.config.unet import CONDITIONS
from unet_denoiser.diffusion.predictions import PREDICTIONS

Conditions = Mapping[str, Tensor | None]
NO_SIGNAL = 2.0**-11  # alpha; below it x_t tells a classifier nothing of x0, and its gradient would be divided by alpha


class Guidance:
    """A function (x_t, t, level) -> output that bends a network's prediction towards its conditions.

    output = reference + guidance_scale * (conditional - reference), in which the reference is the network without its
    conditions (Ho and Salimans 2022, equation 6, with guidance_scale = 1 + w), with others (`negative`), or a weaker
    network with the same ones (`guide`; Karras et al. 2024). This is the same for every `prediction_type`, as outputs
    at one x_t differ by a linear function. At 1 the reference is not computed, at 0 nothing else is; otherwise the
    halves run as one batch, but for `guide`, which is another network.

    Then `guidance_rescale` brings the output's standard deviation over a sample back to the conditional one's (Lin et
    al. 2023, equations 15 and 16, on the network's output, whatever it predicts, as there), and the gradient of a
    classifier is added to the score (Dhariwal and Nichol 2021, equation 14).

    Args:
        network: called as network(x, t, **conditions), with the conditions that are to count dropped by its `drop`
            argument. The tensors of all of a generation's calls are the same objects.
        config: the options of guidance.
        conditions: each (B, ...); None for those that are absent. `concat` counts as one; others than those of
            `CONDITIONS` (`context_mask`) go along with them.
        guided: the conditions that the reference goes without; it keeps the others (default: all).
        negative: conditions (B, ...) that the reference has instead.
        guide: the weaker network, called as `network` is; then the reference has all conditions.
        classifier: (x_t, t, **conditions) -> (B,) log-probability of the conditions, differentiable in x_t.
        classifier_scale: its gradient's factor; 1 samples from the exact posterior of a perfect network and classifier.
        prediction_type: what the network outputs, for a classifier.
        channels: how many of the output's first channels are guided, where the others are no prediction (a learned
            variance); those are the conditional network's. All by default.

    Raises:
        ValueError: options that cannot work together, or a name in `guided` that was not given.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        config: SamplingConfig | None = None,
        conditions: Conditions | None = None,
        *,
        guided: Sequence[str] | None = None,
        negative: Conditions | None = None,
        guide: Callable[..., Tensor] | None = None,
        classifier: Callable[..., Tensor] | None = None,
        classifier_scale: float = 1.0,
        prediction_type: PredictionType = "epsilon",
        channels: int | None = None,
    ) -> None:
        self.config = config or SamplingConfig()
        self.network, self.guide, self.channels = network, guide, channels
        self.classifier, self.classifier_scale, self.prediction_type = classifier, classifier_scale, prediction_type
        self.conditional, others = _given(conditions), _given(negative)
        names = _check(self.config.guidance_scale, self.conditional, guided, others, guide is not None)
        self.both: dict[str, Any] = {}
        self.reference: dict[str, Any] = {}
        if self.config.guidance_scale != 1 and guide is None:
            halves = _halves(self.conditional, others, names)
            if self.config.guidance_scale == 0:
                self.reference = _second_half(halves)
            else:
                self.both = halves

    def __call__(self, x: Tensor, t: Tensor, level: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The guided output.

        Args:
            x: (B, ...) what the network sees of the samples.
            t: (B,) timesteps.
            level: alpha and sigma of x_t, on the CPU; `guidance_interval` and a classifier need it.
        """
        scale = self.config.guidance_scale
        if not self._is_active(level):
            return self.network(x, t, **self.conditional)
        if scale == 1:
            output = self.network(x, t, **self.conditional)
        elif scale == 0:
            output = self.network(x, t, **self.reference) if self.guide is None else self._guide(x, t)
        else:
            output = self._combine(*self._outputs(x, t))
        return output if self.classifier is None else self._classify(output, x, t, level)

    def _is_active(self, level: tuple[Tensor, Tensor] | None) -> bool:
        interval = self.config.guidance_interval
        if interval is None:
            return True
        if level is None:
            raise ValueError(f"guidance_interval={interval} needs the noise level of every call")
        alpha, sigma = map(float, level)
        return interval[0] < sigma / alpha <= interval[1]

    def _guide(self, x: Tensor, t: Tensor) -> Tensor:
        assert self.guide is not None
        return self.guide(x, t, **self.conditional)

    def _outputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The conditional output and the reference."""
        if self.guide is not None:
            return self.network(x, t, **self.conditional), self._guide(x, t)
        conditional, reference = self.network(torch.cat([x, x]), torch.cat([t, t]), **self.both).chunk(2)
        return conditional, reference

    def _combine(self, conditional: Tensor, reference: Tensor) -> Tensor:
        count = conditional.shape[1] if self.channels is None else self.channels
        wanted, other = conditional[:, :count], reference[:, :count]
        guided = other + self.config.guidance_scale * (wanted - other)
        if self.config.guidance_rescale:
            rows = tuple(range(1, guided.ndim))
            factor = wanted.std(rows, keepdim=True) / guided.std(rows, keepdim=True).clamp_min(1e-12)
            guided = guided * (1 + self.config.guidance_rescale * (factor - 1))
        return guided if self.channels is None else torch.cat([guided, conditional[:, count:]], dim=1)

    def _classify(self, output: Tensor, x: Tensor, t: Tensor, level: tuple[Tensor, Tensor] | None) -> Tensor:
        """The output that belongs to the score plus the classifier's gradient."""
        assert self.classifier is not None
        if level is None:
            raise ValueError("classifier needs the noise level of every call")
        alpha, sigma = level
        if float(alpha) < NO_SIGNAL:
            return output
        count = output.shape[1] if self.channels is None else self.channels
        with torch.enable_grad():
            xt = x[:, :count].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.classifier(xt, t, **self.conditional).sum(), xt)
        factor = PREDICTIONS[self.prediction_type].score_scale(alpha, sigma)
        bent = output[:, :count] + self.classifier_scale * factor * gradient
        return bent if self.channels is None else torch.cat([bent, output[:, count:]], dim=1)


# ---- the conditions of the two halves --------------------------------------------------------------------------------


def _given(conditions: Conditions | None) -> dict[str, Any]:
    return {name: value for name, value in (conditions or {}).items() if value is not None}


def _check(
    scale: float, given: Conditions, guided: Sequence[str] | None, negative: Conditions, has_guide: bool
) -> list[str]:
    """The conditions that the reference goes without, or has others of."""
    names = [name for name in (*CONDITIONS, "concat") if name in given]
    if unknown := [name for name in guided or () if name not in names]:
        raise ValueError(f"guided={unknown[0]!r} is not one of the conditions given: {', '.join(names) or 'none'}")
    if unknown := [name for name in negative if name not in (*CONDITIONS, "context_mask", "concat")]:
        raise ValueError(f"negative has {unknown[0]!r}; conditions are {', '.join((*CONDITIONS, 'concat'))}")
    if "context_mask" in negative and "context" not in negative:
        raise ValueError("negative has a context_mask without a context")
    if has_guide and (guided or negative):
        both = "guided" if guided else "negative"
        raise ValueError(f"guide and {both} both say what guidance leads away from; give one of them")
    names = names if guided is None else list(guided)
    if scale != 1 and not names and not negative and not has_guide:
        raise ValueError(
            f"guidance_scale={scale} needs a condition ({', '.join(CONDITIONS)}), or a guide; without one give 1"
        )
    return names


def _halves(given: dict[str, Any], negative: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The conditions twice, the second time with the negative ones, or dropped."""
    first, second = given | {}, given | negative
    if "context" in negative:
        for half in (first, second):
            if "context" in half and "context_mask" not in (negative if half is second else given):
                half["context_mask"] = torch.ones(half["context"].shape[:2], dtype=torch.bool, device=_device(half))
        if "context" in given:
            length = max(len(half["context"][0]) for half in (first, second))
            first, second = (_with_length(half, length) for half in (first, second))
    rows = len(next(iter(second.values())))
    yes, no = (torch.full((rows,), value, device=_device(second)) for value in (True, False))
    both = {name: torch.cat([first.get(name, second[name]), second[name]]) for name in second}
    dropped = {
        name: torch.cat([no if name in given else yes, no if name in negative else yes])
        for name in second
        if name != "context_mask" and (name not in given or (name in names and name not in negative))
    }
    return both | ({"drop": dropped} if dropped else {})


def _with_length(half: dict[str, Any], length: int) -> dict[str, Any]:
    """A half with its context padded to a number of tokens, which the mask leaves out."""
    missing = length - half["context"].shape[1]
    context, mask = F.pad(half["context"], (0, 0, 0, missing)), F.pad(half["context_mask"], (0, missing))
    return half | {"context": context, "context_mask": mask}


def _second_half(both: Mapping[str, Any]) -> dict[str, Any]:
    drop = {name: mask.chunk(2)[1] for name, mask in both.get("drop", {}).items()}
    halves = {name: value.chunk(2)[1] for name, value in both.items() if name != "drop"}
    return halves | ({"drop": drop} if drop else {})


def _device(half: Mapping[str, Tensor]) -> torch.device:
    return next(iter(half.values())).device
