"""Objectives compared on 8x8 digits: the distance of samples to held-out digits after a short training.

Prints a row for each objective as it is done; docs/reference/objectives.md has the table.
Run: python benchmarks/objectives.py
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
from unet_denoiser.evaluation.metrics import kernel_distance

NUM_SAMPLES = 1000
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


class Judge:
    """Compares images with held-out digits, by the first 20 principal components of the training digits, whitened."""

    def __init__(self) -> None:
        (self.seen, labels), (held_out, _) = digits(), digits(held_out=True)
        flat = self.seen.reshape(len(self.seen), -1)
        self.svc, self.pca = SVC(C=10).fit(flat, labels), PCA(20, whiten=True, random_state=0).fit(flat)
        self.held_out = held_out

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> str:
        """Return kernel distance x 1000, share of images classified as asked, mean distance to the nearest digit."""
        flat, held_out = images.reshape(len(images), -1), self.held_out.reshape(len(self.held_out), -1)
        accuracy = (self.svc.predict(flat) == labels).mean()
        features = [torch.from_numpy(self.pca.transform(x)) for x in (flat, held_out)]
        distance = kernel_distance(*features).value
        nearest = torch.cdist(torch.tensor(flat), torch.tensor(self.seen).flatten(1)).amin(1).mean()
        return f"{1000 * distance:8.1f} | {accuracy:6.1%} | {nearest:5.2f}"


def train(
    prediction: str, schedule: str, weighting: str, options: dict, *, steps: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Train a network, and return samples and their classes."""
    process = Diffusion(**asdict(DiffusionConfig(prediction_type=prediction, beta_schedule=schedule, **options)))
    images, labels = digits()
    data = ArrayDataset(images, labels, [str(i) for i in range(10)])
    small = {"model_channels": 16, "num_res_blocks": 1, "dropout": 0.0}
    config = architecture_for(1, (8, 8), 10, small, network_channels=process.channels(1))
    shared = {"learning_rate": 2e-3, "ema_decay": 0.99, "warmup_steps": 50, "device": "cpu", "seed": seed}
    training = TrainingConfig(steps=steps, batch_size=64, loss_weighting=weighting, **shared)
    torch.manual_seed(seed)
    trainer = Trainer(UNet.from_config(config), process, data, training)
    for _ in trainer.steps():
        pass
    classes = torch.arange(NUM_SAMPLES) % 10
    with trainer.ema.swapped():
        x = sample(trainer.model, process, seeds=range(NUM_SAMPLES), class_labels=classes, batch_size=250)
    return x.numpy(), classes.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="", help="only the objectives whose name contains this")
    args = parser.parse_args()
    judge = Judge()
    images, labels = digits()
    print("objective | seed | KID to held-out digits x 1000 | classified as asked | nearest training digit | seconds")
    print("---|--:|--:|--:|--:|--:")
    indices = np.random.default_rng(0).permutation(len(images))[:NUM_SAMPLES]
    print(f"training digits | | {judge(images[indices], labels[indices])} |", flush=True)
    for seed in args.seeds:
        for name, *objective in GRID + EXTRAS:
            if args.only in name:
                start = time.perf_counter()
                result = judge(*train(*objective, steps=args.steps, seed=seed))
                print(f"{name:45s} | {seed} | {result} | {time.perf_counter() - start:4.0f}", flush=True)


if __name__ == "__main__":
    main()
