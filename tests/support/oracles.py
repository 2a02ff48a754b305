"""Perfect networks in closed form: the posterior mean of x0, for Gaussian data and for mixtures of Gaussians."""

import numpy as np
import torch


def alpha_sigma(process, time):
    """Return alpha and sigma (B, 1) of what a network is fed: of times between the trained ones, as between theirs."""
    if process.path == "vp":  # linear in log(sigma / alpha)
        alphas_squared = np.cumprod(1 - process.scheduler.betas.double().numpy()).clip(2.0**-24)
        log_ratios = np.log((1 - alphas_squared) / alphas_squared) / 2
        ratio = torch.from_numpy(np.exp(np.interp(time.double().numpy(), np.arange(len(log_ratios)), log_ratios)))
    elif process.path == "flow":
        t = time.double() / process.num_train_timesteps
        ratio = t / (1 - t).clamp(min=2.0**-24)
    else:
        ratio = (4 * time.double()).exp()
    alpha = (1 / (1 + ratio**2).sqrt())[:, None]
    return alpha, ratio[:, None] * alpha


def preconditioning(process, alpha, sigma):
    """Return c_in, c_skip and c_out for x_t in the variance-preserving scale, from the formulas of each paper's own."""
    kind, d, s = process.prediction_type, process.sigma_data, sigma / alpha
    if kind == "flow":  # x_t / (alpha + sigma) is (1 - t) x0 + t eps
        t, scale = sigma / (alpha + sigma), 1 / (alpha + sigma)
        return scale, scale, -t
    if kind == "edm":  # x_t / alpha is x0 + s eps
        norm = (s**2 + d**2).sqrt()
        return 1 / norm / alpha, d**2 / norm**2 / alpha, s * d / norm
    ones = torch.ones_like(alpha)
    return {
        "epsilon": (ones, 1 / alpha, -sigma / alpha),
        "sample": (ones, 0 * ones, ones),
        "v_prediction": (ones, alpha, -sigma),
    }[kind]


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
        _, c_skip, c_out = preconditioning(self.process, *alpha_sigma(self.process, t))
        return ((x0 - c_skip * x) / c_out).float()

    def __call__(self, seen, t):
        c_in, _, _ = preconditioning(self.process, *alpha_sigma(self.process, t))
        x = seen.double() / c_in
        return self.output(self.x0(x, t), x, t)


class Gaussian:
    """The perfect network (x_t, t) -> output of a process, for data N(mean, covariance) of `shape`."""

    def __init__(self, process, mean, covariance, shape):
        self.process, self.shape = process, shape
        self.mean, self.covariance = mean.double().flatten(), covariance.double()

    def __call__(self, x, t, **conditions):
        alpha, sigma = (value[0] for value in alpha_sigma(self.process, t))
        c_in, c_skip, c_out = preconditioning(self.process, alpha, sigma)
        eye = torch.eye(len(self.mean), dtype=torch.float64)
        gain = alpha * self.covariance @ torch.linalg.inv(alpha**2 * self.covariance + sigma**2 * eye)
        y = x.double().flatten(1) / c_in
        x0 = self.mean + (y - alpha * self.mean) @ gain.T
        return ((x0 - c_skip * y) / c_out).view(-1, *self.shape).float()


def as_network(model, predict):
    """Replace the forward of a small UNet, to check `sample` and the editing functions against a closed form."""
    model.forward = predict
    return model
