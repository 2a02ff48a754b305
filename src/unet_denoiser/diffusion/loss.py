"""The training loss: squared error of the prediction, and the variational bound of a learned variance."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unet_denoiser.diffusion.process import Diffusion, accepts_concat
from unet_denoiser.utils.broadcasting import append_dims

VLB_WEIGHT = 0.001  # lambda of Nichol and Dhariwal 2021, equation 16


class Losses(NamedTuple):
    """The losses of a batch, one value per sample: (B,) each, in float32.

    Args:
        loss: the quantity to minimise.
        error: mean squared error of the network's prediction, without any weight.
        t: the timesteps, integers.
    """

    loss: Tensor
    error: Tensor
    t: Tensor


def training_losses(
    process: Diffusion,
    network: Callable[..., Tensor],
    x0: Tensor,
    *,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    weighting: Callable[[Tensor, Tensor], Tensor] | None = None,
    self_condition: Tensor | None = None,
    **inputs: Any,
) -> Losses:
    """Compute the weighted squared error of the prediction, plus the bound of a learned variance.

    The squared error is L_simple (DDPM, equation 14). The bound trains the variance alone (Nichol and Dhariwal 2021,
    equation 16: L_simple + 0.001 L_vlb; in their units, T times the bits per dimension of the timestep).

    Args:
        network: called through `accepts_concat` as network(input, time, **inputs), with what `Diffusion.network_input`
            and `Diffusion.time` make of x_t and t.
        x0: (B, C, ...) data.
        t: (B,) timesteps (default: drawn from the process's density).
        noise: like x0 (default: drawn from N(0, 1); see `draw_noise`).
        weighting: (error (B,), t (B,)) -> (B,) loss; see `LossWeighting`.
        self_condition: (B,) bool, for self-conditioning: the samples whose network sees an estimate of x0 (default:
            drawn with probability 1/2, as in Chen et al. 2022, Analog Bits).

    Raises:
        ValueError: the network's output does not have the channels that the process needs.
    """
    t = process.timestep(torch.randint(process.num_train_timesteps, (len(x0),), device=x0.device)) if t is None else t
    noise = draw_noise(x0) if noise is None else noise
    network, xt, estimate = accepts_concat(network), process.add_noise(x0, noise, t), None
    if process.self_conditioning:
        seeing = torch.rand(len(x0), device=x0.device) < 0.5 if self_condition is None else self_condition
        estimate = _estimate_x0(process, network, xt, t, seeing=seeing, inputs=inputs)
    alpha_sigma = process.alpha_sigma(t, xt)
    output = network(process.network_input(xt, *alpha_sigma, estimate), process.time(t), **inputs).float()
    prediction, variance = process.split(output, x0)
    error = (prediction - process.target(x0, noise, t).float()).square().flatten(1).mean(1)  # (B,)
    loss = error if weighting is None else weighting(error, t)
    if variance is not None:
        predicted_x0 = process.predict_x0(prediction.detach(), xt, *alpha_sigma, clip=False)
        bound = process.bound(x0.float(), xt.float(), t, predicted_x0, variance, data_range=process.data_range)
        loss = loss + VLB_WEIGHT * process.num_train_timesteps * bound
    return Losses(loss, error, t)


def draw_noise(x0: Tensor, offset: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """Draw noise for x0 (B, C, ...): N(0, 1), plus `offset` times one more draw per sample and channel.

    The offset lets a network make very dark and very bright images (Guttenberg 2023, "Diffusion with offset noise").
    """
    kind: dict[str, Any] = {"dtype": x0.dtype, "device": x0.device, "generator": generator}
    noise = torch.randn(x0.shape, **kind)
    return noise + offset * torch.randn(*x0.shape[:2], *[1] * (x0.ndim - 2), **kind) if offset else noise


def _estimate_x0(
    process: Diffusion, network: Callable[..., Tensor], xt: Tensor, t: Tensor, *, seeing: Tensor, inputs: dict[str, Any]
) -> Tensor:
    """Predict x0 without an estimate and without gradients where `seeing` (B,) is True; zero elsewhere."""
    indices = seeing.nonzero()[:, 0]
    if not len(indices):  # the processes of a sharded training must all run the network equally often
        indices = torch.zeros(1, dtype=torch.long, device=xt.device)
    some_xt, some_t, some_inputs = (_select_samples(value, indices) for value in (xt, t, inputs))
    with torch.no_grad():
        alpha_sigma = process.alpha_sigma(some_t, some_xt)
        seen = process.network_input(some_xt, *alpha_sigma, torch.zeros_like(some_xt))
        prediction, _ = process.split(network(seen, process.time(some_t), **some_inputs).float(), some_xt)
        x0 = process.predict_x0(prediction, some_xt, *alpha_sigma)
    estimate = torch.zeros_like(xt).index_copy(0, indices, x0.to(xt))
    return torch.where(append_dims(seeing, xt.ndim), estimate, 0)


def _select_samples(inputs: Any, indices: Tensor) -> Any:
    """Take some samples of a network's inputs: tensors, None, and dicts of them."""
    if isinstance(inputs, Mapping):
        return {name: _select_samples(value, indices) for name, value in inputs.items()}
    return None if inputs is None else inputs[indices]
