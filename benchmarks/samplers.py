"""Errors of every sampler with a perfect network: the table of docs/reference/samplers.md.

For data from a mixture of Gaussians the perfect network has a closed form, so all errors of the samples are the
sampler's. Run: python benchmarks/samplers.py
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.oracles import Mixture
from unet_denoiser import Diffusion, Sampler, SamplingConfig, denoise
from unet_denoiser.sampling.samplers import SAMPLERS

NUM_SAMPLES = 4000
MEANS, STDS, WEIGHTS = (-0.6, 0.6), (0.1, 0.2), (0.3, 0.7)


def measure_order(name: str) -> str:
    """Measure the order of convergence: log2 of the error with 40 steps over that with 80, before the last step."""
    process, m, s = Diffusion(beta_schedule="scaled_linear", clip_sample_range=None), 0.3, 0.5
    z, errors = torch.linspace(-2, 2, 41)[:, None], []
    for count in (40, 80):
        config = SamplingConfig(name, count, sigma_schedule="exponential")
        sampler = Sampler(config, process)
        (a0, s0), (a1, s1) = sampler.alpha_sigma(0), sampler.alpha_sigma(len(sampler) - 1)
        exact = a1 * m + (z - a0 * m) * ((a1 * s) ** 2 + s1**2).sqrt() / ((a0 * s) ** 2 + s0**2).sqrt()
        errors.append((list(denoise(Mixture(process), process, z, config))[-2].x - exact).abs().max())
    return f"{(errors[0] / errors[1]).log2():.1f}"


def measure_distance(name: str, count: int, **options: str) -> str:
    """Measure the Wasserstein-1 distance between samples and the mixture's quantiles, on the default process."""
    process = Diffusion(clip_sample_range=None)
    shares = (torch.arange(NUM_SAMPLES, dtype=torch.float64) + 0.5) / NUM_SAMPLES
    grid = torch.linspace(-2, 2, 400_001, dtype=torch.float64)
    below = sum(w * torch.special.ndtr((grid - m) / s) for m, s, w in zip(MEANS, STDS, WEIGHTS, strict=True))
    quantiles = grid[torch.searchsorted(below, shares)]
    torch.manual_seed(0)
    z = torch.special.ndtri(shares).float()[torch.randperm(NUM_SAMPLES), None]
    predict = Mixture(process, MEANS, STDS, WEIGHTS)
    *_, last = denoise(predict, process, z, sampler=name, num_inference_steps=count, **options)
    return f"{(last.x.flatten().double().sort().values - quantiles).abs().mean():.4f}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| sampler | order | calls at 25 steps | 10 steps | 25 | 50 | 25, karras |\n|---|---|---|---|---|---|---|")
    for name, kind in SAMPLERS.items():
        calls = len(Sampler(SamplingConfig(name), Diffusion()))
        distances = [measure_distance(name, n) for n in (10, 25, 50)]
        distances.append(measure_distance(name, 25, sigma_schedule="karras"))
        first = "stochastic" if kind.stochastic else measure_order(name)
        print("| " + " | ".join([f"`{name}`", first, str(calls), *distances]) + " |", flush=True)


if __name__ == "__main__":
    main()
