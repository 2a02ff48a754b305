"""Objectives compared on 8x8 digits: how near the samples are to held-out digits after a short training.

Prints a row for each objective as it is done; docs/reference/objectives.md has the table and what is made of it.
"""

import argparse
import time
from dataclasses import asdict

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from unet_denoiser import ArrayDataset, Diffusion, DiffusionConfig, Trainer, TrainingConfig, UNet, sample
from unet_denoiser.config.defaults import architecture_for
from unet_denoiser.data.sources.arrays import digits

SAMPLES = 1000
GRID = [
    (f"{prediction} {schedule} {weighting}", prediction, schedule, weighting, {})
    for weighting in ("constant", "min_snr", "learned")
    for prediction in ("epsilon", "v_prediction", "sample")
    for schedule in ("linear", "squaredcos_cap_v2")
]
EXTRAS = [
    ("v_prediction squaredcos_cap_v2 p2", "v_prediction", "squaredcos_cap_v2", "p2", {}),
    ("v_prediction squaredcos_cap_v2 truncated_snr", "v_prediction", "squaredcos_cap_v2", "truncated_snr", {}),
    ("v, cosine, self_conditioning", "v_prediction", "squaredcos_cap_v2", "constant", {"self_conditioning": True}),
    ("v, cosine, learned_range", "v_prediction", "squaredcos_cap_v2", "constant", {"variance_type": "learned_range"}),
    ("v, cosine, zero SNR", "v_prediction", "squaredcos_cap_v2", "constant", {"rescale_betas_zero_snr": True}),
    ("v, cosine, zero SNR, min_snr", "v_prediction", "squaredcos_cap_v2", "min_snr", {"rescale_betas_zero_snr": True}),
    ("v, linear, zero SNR", "v_prediction", "linear", "constant", {"rescale_betas_zero_snr": True}),
]


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD with the cubic kernel of KID (Binkowski et al. 2018, equation 4), features (n, d)."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_others(k: np.ndarray) -> float:
        return float((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)))

    return mean_of_others(kernel(x, x)) + mean_of_others(kernel(y, y)) - 2 * float(kernel(x, y).mean())


class Judge:
    """Compares images with held-out digits, in the 20 main components of the training digits, each of variance 1."""

    def __init__(self) -> None:
        (self.seen, labels), (held_out, _) = digits(), digits(held_out=True)
        flat = self.seen.reshape(len(self.seen), -1)
        self.svc, self.pca = SVC(C=10).fit(flat, labels), PCA(20, whiten=True, random_state=0).fit(flat)
        self.held_out = held_out

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> str:
        flat, true = images.reshape(len(images), -1), self.held_out.reshape(len(self.held_out), -1)
        asked = (self.svc.predict(flat) == labels).mean()
        distance = kernel_distance(self.pca.transform(flat), self.pca.transform(true))
        nearest = torch.cdist(torch.tensor(flat), torch.tensor(self.seen).flatten(1)).amin(1).mean()
        return f"{1000 * distance:8.1f} | {asked:6.1%} | {nearest:5.2f}"


def train(prediction: str, schedule: str, weighting: str, options: dict, steps: int, seed: int) -> tuple:
    process = Diffusion(**asdict(DiffusionConfig(prediction_type=prediction, beta_schedule=schedule, **options)))
    images, labels = digits()
    data = ArrayDataset(images, labels, [str(i) for i in range(10)])
    small = {"model_channels": 16, "num_res_blocks": 1, "dropout": 0.0}
    config = architecture_for(1, (8, 8), 10, small, network_channels=process.channels(1))
    chosen = {"learning_rate": 2e-3, "ema_decay": 0.99, "warmup_steps": 50, "device": "cpu", "seed": seed}
    training = TrainingConfig(steps=steps, batch_size=64, loss_weighting=weighting, **chosen)
    torch.manual_seed(seed)
    trainer = Trainer(UNet.from_config(config), process, data, training)
    for _ in trainer.steps():
        pass
    asked = torch.arange(SAMPLES) % 10
    with trainer.ema.swapped():
        x = sample(trainer.model, process, seeds=range(SAMPLES), class_labels=asked, batch_size=250)
    return x.numpy(), asked.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="", help="objectives whose name has this in it")
    args = parser.parse_args()
    judge = Judge()
    images, labels = digits()
    print("objective | seed | KID to held-out digits x 1000 | classified as asked | nearest training digit | seconds")
    print("---|--:|--:|--:|--:|--:")
    rows = np.random.default_rng(0).permutation(len(images))[:SAMPLES]
    print(f"training digits | | {judge(images[rows], labels[rows])} |", flush=True)
    for seed in args.seeds:
        for name, *objective in GRID + EXTRAS:
            if args.only in name:
                start = time.perf_counter()
                result = judge(*train(*objective, args.steps, seed))
                print(f"{name:45s} | {seed} | {result} | {time.perf_counter() - start:4.0f}", flush=True)


if __name__ == "__main__":
    main()
