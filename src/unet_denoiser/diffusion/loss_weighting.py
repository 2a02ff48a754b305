"""Loss weightings: the weight of each noise level in the loss, fixed or learned."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from unet_denoiser.config.training import TrainingConfig
from unet_denoiser.diffusion.predictions import PREDICTIONS, Prediction


def loss_weights(prediction: Prediction, snr: Tensor, config: TrainingConfig) -> Tensor:
    """Return the weight of the prediction's squared error at each signal-to-noise ratio.

    "min_snr", "p2" and "truncated_snr" are defined as a weight of the error of x0, so they mean the same for every
    prediction type. "constant" and "learned" weight the prediction's own error by 1.

    Args:
        snr: (T,) alpha^2 / sigma^2.
        config: `loss_weighting` and its gamma.

    Raises:
        ValueError: a weighting that is unbounded for this prediction type.
    """
    weighting = config.loss_weighting
    x0_weights: dict[str, Callable[[Tensor], Tensor]] = {
        "min_snr": lambda snr: snr.clamp(max=config.min_snr_gamma),  # Hang et al. 2023, section 3.4
        "p2": lambda snr: snr / (1 + snr) ** config.p2_gamma,  # Choi et al. 2022, equation 8
        "truncated_snr": lambda snr: snr.clamp(min=1.0),  # Salimans and Ho 2022, section 4
    }
    if weighting not in x0_weights:
        return torch.ones_like(snr)
    if weighting == "truncated_snr" and not prediction.error_scale(torch.zeros(())):
        name = next(name for name, row in PREDICTIONS.items() if row == prediction)
        raise ValueError(
            f"loss_weighting='truncated_snr' with prediction_type={name!r}: the error of x0 has no bound where "
            "the noise is predicted; use 'v_prediction' or 'sample', or another weighting"
        )
    return x0_weights[weighting](snr) / prediction.error_scale(snr)


class LossWeighting:
    """Turns the errors of a batch into the loss; "learned" has parameters that it trains itself.

    Args:
        prediction, snr: of the process; snr (T,).
        config: `loss_weighting` and its gamma.
        device: the device of the errors.

    Raises:
        ValueError: a weighting that is unbounded for this prediction type.
    """

    def __init__(
        self, prediction: Prediction, snr: Tensor, config: TrainingConfig, device: torch.device | str = "cpu"
    ) -> None:
        self.weights = loss_weights(prediction, snr, config).to(device)
        self.uncertainty = Uncertainty(snr).to(device) if config.loss_weighting == "learned" else None
        if self.uncertainty is not None:
            # apart from the network's optimizer, so that it does not matter how that one is sharded
            self.optimizer = torch.optim.Adam(self.uncertainty.parameters(), lr=1e-3)

    def __call__(self, error: Tensor, t: Tensor) -> Tensor:
        """Return the losses (B,) for errors (B,) at timesteps (B,)."""
        weighted = self.weights[t] * error
        if self.uncertainty is None:
            return weighted
        u = self.uncertainty(t)
        return weighted * (-u).exp() + u  # Karras et al. 2024, equation 15

    def step(self, mean: Callable[[Tensor], Tensor] = lambda gradient: gradient) -> None:
        """Update the parameters with the network's optimizer step; `mean` averages a gradient over all processes."""
        if self.uncertainty is not None:
            for p in self.uncertainty.parameters():
                p.grad = None if p.grad is None else mean(p.grad)
            self.optimizer.step()

    def zero_grad(self) -> None:
        """Reset the gradients; call it with the network's optimizer."""
        if self.uncertainty is not None:
            self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Return the learned parameters and Adam's moments by name, for a checkpoint; empty if nothing is learned."""
        if self.uncertainty is None:
            return {}
        weight = self.uncertainty.weight
        state = self.optimizer.state[weight]
        if not state:  # before Adam's first step, so that a checkpoint always has the same names
            state |= {"step": torch.tensor(0.0)} | {n: torch.zeros_like(weight) for n in ("exp_avg", "exp_avg_sq")}
        return {"weight": weight.detach(), **state}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that `tensors` returned."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])


class Uncertainty(nn.Module):
    """u(t), the logarithm of a timestep's typical loss: linear in Fourier features of the noise level.

    It is learned with the network by minimising loss / exp(u) + u (Karras et al. 2024, arXiv 2312.02696, equations
    14, 15 and 21), and is 0 at the start. Its input is log(sigma / alpha) / 4 (c_noise of Karras et al. 2022, table
    1), clamped so that pure noise has a finite one. snr is (T,), of the process's timesteps.
    """

    features: Tensor

    def __init__(self, snr: Tensor, num_features: int = 128) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        frequencies = torch.randn(num_features, generator=generator)
        phases = torch.rand(num_features, generator=generator)
        level = -snr.clamp(1e-8, 1e8).log() / 8  # log(sigma / alpha) / 4
        angles = 2 * math.pi * (level[:, None] * frequencies + phases)  # (T, num_features)
        self.register_buffer("features", math.sqrt(2) * angles.cos(), persistent=False)
        self.weight = nn.Parameter(torch.zeros(num_features))

    def forward(self, t: Tensor) -> Tensor:
        """Return u (B,) for timesteps (B,)."""
        return self.features[t] @ self.weight
