"""How the noise levels are weighted in a loss, and what the loss is at each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from unet_denoiser.config.base import PredictionType
from unet_denoiser.config.training import TrainingConfig


def loss_weights(prediction_type: PredictionType, snr: Tensor, config: TrainingConfig) -> Tensor:
    """The weight of the squared error of what the network predicts, at each signal-to-noise ratio.

    Each weighting is one function of the ratio for the error of x0, so it means the same whatever is predicted: the
    error of the noise is snr times that of x0, and the error of v is snr + 1 times that of x0. "constant" and
    "learned" weigh what the network predicts, all levels alike.

    Args:
        snr: alpha^2 / sigma^2.
        config: `loss_weighting` with its gamma.

    Raises:
        ValueError: a weighting without bound for what is predicted.
    """
    weighting = config.loss_weighting
    of_x0: dict[str, Callable[[Tensor], Tensor]] = {
        "min_snr": lambda snr: snr.clamp(max=config.min_snr_gamma),
        "p2": lambda snr: snr / (1 + snr) ** config.p2_gamma,
        "truncated_snr": lambda snr: snr.clamp(min=1.0),
    }
    if weighting not in of_x0:
        return torch.ones_like(snr)
    if weighting == "truncated_snr" and prediction_type == "epsilon":
        raise ValueError(
            "loss_weighting='truncated_snr' with prediction_type='epsilon': the error of x0 has no bound where "
            "the noise is predicted; use 'v_prediction' or 'sample', or another weighting"
        )
    errors = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return of_x0[weighting](snr) / errors[prediction_type]


class LossWeighting:
    """Turns the errors of a batch into what is minimised; has parameters of its own for "learned".

    Args:
        prediction_type: of the process.
        snr: (T,) of the process's timesteps.
        config: `loss_weighting` with its gamma.
        device: where the errors will be.

    Raises:
        ValueError: a weighting without bound for what is predicted.
    """

    def __init__(
        self, prediction_type: PredictionType, snr: Tensor, config: TrainingConfig, device: torch.device | str = "cpu"
    ) -> None:
        self.weights = loss_weights(prediction_type, snr, config).to(device)
        self.uncertainty = Uncertainty(snr).to(device) if config.loss_weighting == "learned" else None
        if self.uncertainty is not None:
            # of its own, so that how the network's is sharded does not matter to it
            self.optimizer = torch.optim.Adam(self.uncertainty.parameters(), lr=1e-3)

    def __call__(self, error: Tensor, t: Tensor) -> Tensor:
        """(B,) what is minimised, for errors (B,) at timesteps (B,)."""
        weighted = self.weights[t] * error
        if self.uncertainty is None:
            return weighted
        u = self.uncertainty(t)
        return weighted * (-u).exp() + u

    def step(self, mean: Callable[[Tensor], Tensor] = lambda gradient: gradient) -> None:
        """Learn from the gradients of the last backward pass; call where the network's optimizer steps.

        Args:
            mean: the mean of a tensor over all processes.
        """
        if self.uncertainty is not None:
            for p in self.uncertainty.parameters():
                p.grad = None if p.grad is None else mean(p.grad)
            self.optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients; call where the network's optimizer forgets its own."""
        if self.uncertainty is not None:
            self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """What is learned, by name, for a checkpoint; none where nothing is."""
        if self.uncertainty is None:
            return {}
        weight = self.uncertainty.weight
        return {"weight": weight.detach()} | self._moments()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    def _moments(self) -> dict[str, Tensor]:
        """Adam's, there from the start, so that their names do not depend on how far training is."""
        assert self.uncertainty is not None
        weight = self.uncertainty.weight
        state = self.optimizer.state[weight]
        if not state:
            zeros = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            state |= {"step": torch.tensor(0.0)} | zeros
        return dict(state)


class Uncertainty(nn.Module):
    """u(t), the logarithm of a timestep's usual loss: a linear function of Fourier features of the noise level.

    It is learned with the network by minimising loss / exp(u) + u (Karras et al. 2024, arXiv 2312.02696, equations
    14, 15 and 21); 0 at the start. The noise level is log(sigma / alpha) / 4, kept where schedules lie so that pure
    noise has one too.

    Args:
        snr: (T,) of the process's timesteps.
        num_features: how many cosines.
    """

    features: Tensor

    def __init__(self, snr: Tensor, num_features: int = 128) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        frequencies = torch.randn(num_features, generator=generator)
        phases = torch.rand(num_features, generator=generator)
        level = -snr.clamp(1e-8, 1e8).log() / 8
        angles = 2 * math.pi * (level[:, None] * frequencies + phases)
        self.register_buffer("features", math.sqrt(2) * angles.cos(), persistent=False)
        self.weight = nn.Parameter(torch.zeros(num_features))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) for timesteps (B,)."""
        return self.features[t] @ self.weight
