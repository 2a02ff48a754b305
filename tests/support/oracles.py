"""Perfect networks in closed form: the posterior mean of x0, for Gaussian data and for mixtures of Gaussians."""

import numpy as np
import torch


def alpha_sigma(process, t):
    """Return alpha and sigma (B, 1) of timesteps, also between the trained ones: linear in log(sigma / alpha)."""
    alphas_squared = np.cumprod(1 - process.scheduler.betas.double().numpy()).clip(2.0**-24)
    log_ratios = np.log((1 - alphas_squared) / alphas_squared) / 2
    ratio = torch.from_numpy(np.exp(np.interp(t.double().numpy(), np.arange(len(log_ratios)), log_ratios)))[:, None]
    alpha = 1 / (1 + ratio**2).sqrt()
    return alpha, ratio * alpha


class Mixture:
    """One value per sample from a mixture of Gaussians, as the data of a process."""

    def __init__(self, process, means=(0.3,), stds=(0.5,), weights=None):
        self.process = process
        self.means, self.stds = (torch.tensor(values, dtype=torch.float64) for values in (means, stds))
        self.weights = torch.tensor(weights or [1 / len(means)] * len(means), dtype=torch.float64)

    def log_densities(self, x, t):
        """Return the logarithm of weight times density of x_t for each component: (B, components)."""
        alpha, sigma = alpha_sigma(self.process, t)
        variances = (alpha * self.stds) ** 2 + sigma**2
        return self.weights.log() - 0.5 * (x.double() - alpha * self.means) ** 2 / variances - 0.5 * variances.log()

    def x0(self, x, t):
        """Return the posterior mean of x0: (B, 1)."""
        alpha, sigma = alpha_sigma(self.process, t)
        variances = (alpha * self.stds) ** 2 + sigma**2
        means = self.means + self.stds**2 * alpha * (x.double() - alpha * self.means) / variances
        return (self.log_densities(x, t).softmax(1) * means).sum(1, keepdim=True)

    def output(self, x0, x, t):
        """Return the output of a network of the process that predicts x0."""
        alpha, sigma = alpha_sigma(self.process, t)
        noise = (x - alpha * x0) / sigma
        outputs = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}
        return outputs[self.process.prediction_type].float()

    def __call__(self, x, t):
        return self.output(self.x0(x, t), x, t)


class Gaussian:
    """The perfect network (x_t, t) -> output of a process, for data N(mean, covariance) of `shape`."""

    def __init__(self, process, mean, covariance, shape):
        self.process, self.shape = process, shape
        self.mean, self.covariance = mean.double().flatten(), covariance.double()

    def __call__(self, x, t, **conditions):
        p, n = self.process, self.shape
        alpha, sigma = p.alphas.double()[t.long()][0], p.sigmas.double()[t.long()][0]
        gain = (
            alpha
            * self.covariance
            @ torch.linalg.inv(alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean), dtype=torch.float64))
        )
        y = x.double().flatten(1)
        x0 = self.mean + (y - alpha * self.mean) @ gain.T
        noise = (y - alpha * x0) / sigma
        outputs = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}
        return outputs[p.prediction_type].view(-1, *n).float()


def as_network(model, predict):
    """Replace the forward of a small UNet, to check `sample` and the editing functions against a closed form."""
    model.forward = predict
    return model
