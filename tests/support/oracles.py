"""Perfect networks in closed form: the posterior mean of x0 for data from a mixture of Gaussians, one value each."""

import numpy as np
import torch


def noise_level(process, t):
    """alpha and sigma (B, 1) of timesteps, also of those between the trained ones: linear in log(sigma / alpha)."""
    alphas_squared = np.cumprod(1 - process.scheduler.betas.double().numpy()).clip(2.0**-24)
    log_ratios = np.log((1 - alphas_squared) / alphas_squared) / 2
    ratio = torch.from_numpy(np.exp(np.interp(t.double().numpy(), np.arange(len(log_ratios)), log_ratios)))[:, None]
    alpha = 1 / (1 + ratio**2).sqrt()
    return alpha, ratio * alpha


class Mixture:
    """Components `means`, `stds`, `weights`, as the data of a process."""

    def __init__(self, process, means=(0.3,), stds=(0.5,), weights=None):
        self.process = process
        self.means, self.stds = (torch.tensor(values, dtype=torch.float64) for values in (means, stds))
        self.weights = torch.tensor(weights or [1 / len(means)] * len(means), dtype=torch.float64)

    def log_densities(self, x, t):
        """(B, components) log of weight times density of x_t."""
        alpha, sigma = noise_level(self.process, t)
        variances = (alpha * self.stds) ** 2 + sigma**2
        return self.weights.log() - 0.5 * (x.double() - alpha * self.means) ** 2 / variances - 0.5 * variances.log()

    def x0(self, x, t):
        """(B, 1) posterior mean."""
        alpha, sigma = noise_level(self.process, t)
        variances = (alpha * self.stds) ** 2 + sigma**2
        means = self.means + self.stds**2 * alpha * (x.double() - alpha * self.means) / variances
        return (self.log_densities(x, t).softmax(1) * means).sum(1, keepdim=True)

    def output(self, x0, x, t):
        """What a network of the process outputs when it thinks of x0."""
        alpha, sigma = noise_level(self.process, t)
        noise = (x - alpha * x0) / sigma
        outputs = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}
        return outputs[self.process.prediction_type].float()

    def __call__(self, x, t):
        return self.output(self.x0(x, t), x, t)
