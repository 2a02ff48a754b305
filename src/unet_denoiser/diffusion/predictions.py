"""The prediction types of a network, and how each relates to x0, the noise and the score.

With x_t = alpha x0 + sigma eps, every quantity below follows from one row of `PREDICTIONS`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from unet_denoiser.config.base import PredictionType


class Prediction(NamedTuple):
    """One prediction type. alpha and sigma broadcast with x0.

    Args:
        target: (x0, eps, alpha, sigma) -> the output that the network should give.
        x0: (output, x_t, alpha, sigma) -> the x0 that an output stands for.
        error_scale: snr -> squared error of the output per unit of squared error of x0.
        score_scale: (alpha, sigma) -> change of the output per unit of change of the score, -eps / sigma.
    """

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    x0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    error_scale: Callable[[Tensor], Tensor]
    score_scale: Callable[[Tensor, Tensor], Tensor]


PREDICTIONS: dict[PredictionType, Prediction] = {
    "epsilon": Prediction(  # Ho et al. 2020, equations 9 and 14
        target=lambda x0, eps, alpha, sigma: eps,
        x0=lambda output, xt, alpha, sigma: (xt - sigma * output) / alpha,
        error_scale=lambda snr: snr,
        score_scale=lambda alpha, sigma: -sigma,
    ),
    "sample": Prediction(
        target=lambda x0, eps, alpha, sigma: x0,
        x0=lambda output, xt, alpha, sigma: output,
        error_scale=torch.ones_like,
        score_scale=lambda alpha, sigma: sigma**2 / alpha,  # Tweedie's formula
    ),
    "v_prediction": Prediction(  # Salimans and Ho 2022, appendix D
        target=lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
        x0=lambda output, xt, alpha, sigma: alpha * xt - sigma * output,
        error_scale=lambda snr: snr + 1,
        score_scale=lambda alpha, sigma: -sigma / alpha,
    ),
}
