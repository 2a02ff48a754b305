"""The prediction types of a network, and how each relates to x0, the noise and the score.

With x_t = alpha x0 + sigma eps and alpha^2 + sigma^2 = 1, a network F stands for

    x0 = c_skip x_t + c_out F(c_in x_t, time)

(Karras et al. 2022, equation 7), and every quantity of training and sampling follows from one row of `PREDICTIONS`:

| predicts       | c_in                | c_skip            | c_out              |
|----------------|---------------------|-------------------|--------------------|
| `epsilon`      | 1                   | 1 / alpha         | -sigma / alpha     |
| `sample`       | 1                   | 0                 | 1                  |
| `v_prediction` | 1                   | alpha             | -sigma             |
| `flow`         | 1 / (alpha + sigma) | 1 / (alpha+sigma) | -sigma / (alpha + sigma) |
| `edm`          | 1 / n               | alpha d^2 / n^2   | sigma d / n, with n^2 = sigma^2 + alpha^2 d^2 |

Flow matching's own x_t is x_t / (alpha + sigma), and EDM's is x_t / alpha; c_in x_t is what their networks see.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """One prediction type. alpha and sigma broadcast with x0.

    Target and x0 are written out, because a difference such as x0 - c_skip x_t loses the digits of a small c_out.

    Args:
        target: (x0, eps, alpha, sigma) -> the output that the network should give.
        x0: (output, x_t, alpha, sigma) -> the x0 that an output stands for.
        error_scale: snr -> squared error of the output per unit of squared error of x0, 1 / c_out^2.
        c_in: (alpha, sigma) -> factor of the x_t that the network sees.
    """

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    x0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    error_scale: Callable[[Tensor], Tensor]
    c_in: Callable[[Tensor, Tensor], Tensor] = lambda alpha, sigma: torch.ones_like(alpha)

    def score_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the change of the output per unit of change of the score, which moves x0 by sigma^2 / alpha."""
        c_out = self.x0(torch.ones_like(alpha), torch.zeros_like(alpha), alpha, sigma)
        return sigma**2 / (alpha * c_out)  # Tweedie's formula


def edm_prediction(d: float) -> Prediction:
    """Return the preconditioning of Karras et al. 2022 (table 1) for data of standard deviation d."""

    def n(alpha: Tensor, sigma: Tensor) -> Tensor:
        return (sigma**2 + (alpha * d) ** 2) ** 0.5

    return Prediction(
        target=lambda x0, eps, alpha, sigma: (sigma / d * x0 - alpha * d * eps) / n(alpha, sigma),
        x0=lambda output, xt, alpha, sigma: (
            alpha * d**2 / n(alpha, sigma) ** 2 * xt + sigma * d / n(alpha, sigma) * output
        ),
        error_scale=lambda snr: snr + 1 / d**2,
        c_in=lambda alpha, sigma: 1 / n(alpha, sigma),
    )


PREDICTIONS: dict[str, Prediction] = {
    "epsilon": Prediction(  # Ho et al. 2020, equations 9 and 14
        target=lambda x0, eps, alpha, sigma: eps,
        x0=lambda output, xt, alpha, sigma: (xt - sigma * output) / alpha,
        error_scale=lambda snr: snr,
    ),
    "sample": Prediction(
        target=lambda x0, eps, alpha, sigma: x0,
        x0=lambda output, xt, alpha, sigma: output,
        error_scale=torch.ones_like,
    ),
    "v_prediction": Prediction(  # Salimans and Ho 2022, appendix D
        target=lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
        x0=lambda output, xt, alpha, sigma: alpha * xt - sigma * output,
        error_scale=lambda snr: snr + 1,
    ),
    "flow": Prediction(  # Lipman et al. 2023, equation 23
        target=lambda x0, eps, alpha, sigma: eps - x0,
        x0=lambda output, xt, alpha, sigma: (xt - sigma * output) / (alpha + sigma),
        error_scale=lambda snr: (snr**0.5 + 1) ** 2,
        c_in=lambda alpha, sigma: 1 / (alpha + sigma),
    ),
    "edm": edm_prediction(0.5),
}


def get_prediction(name: str, sigma_data: float) -> Prediction:
    """Return a row of the table, with EDM's for data of standard deviation `sigma_data`; ValueError if unknown."""
    rows = PREDICTIONS | {"edm": edm_prediction(sigma_data)}
    if name not in rows:
        raise ValueError(f"prediction_type={name!r} is not one of {', '.join(map(repr, rows))}")
    return rows[name]
