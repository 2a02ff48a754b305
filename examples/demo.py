"""Train on handwritten digits with the command line, generate new ones, and measure how good they are.

Writes runs/digits/samples.png (one row per class) and runs/digits/report.txt.
"""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.svm import SVC

from unet_denoiser import Run, sample
from unet_denoiser.data.sources.arrays import digits

RUN = Path("runs/digits")
TRAIN = f"train digits --out {RUN} --steps 480 --batch-size 128 --learning-rate 2e-3 --ema-decay 0.99"
SAMPLE = f"sample {RUN} --num-images 100 --guidance-scale 2"
SAMPLES = 500


def command(arguments: str) -> float:
    """Run a command of unet-denoiser; return the seconds it took."""
    print(f"$ unet-denoiser {arguments}", flush=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "unet_denoiser", *arguments.split()], check=True)
    return time.perf_counter() - start


def mean_distance(images: np.ndarray, others: np.ndarray) -> float:
    """Return the mean Euclidean distance from each image to the nearest of the others; pixels in [-1, 1]."""
    return float(torch.cdist(torch.tensor(images).flatten(1), torch.tensor(others).flatten(1)).amin(1).mean())


def main() -> None:
    seconds = {"training": command(TRAIN), "the picture": command(SAMPLE)}
    start = time.perf_counter()
    pipeline = Run.load(RUN).load_pipeline()
    labels = pipeline.labels(SAMPLES)
    options = {"seeds": range(1000, 1000 + SAMPLES), "guidance_scale": 2.0, "class_labels": labels}
    images = sample(pipeline.model, pipeline.process, **options).numpy()
    seconds[f"{SAMPLES} samples"] = time.perf_counter() - start

    (seen, seen_labels), (held_out, held_out_labels) = digits(), digits(held_out=True)
    judge = SVC(C=10).fit(seen.reshape(len(seen), -1), seen_labels)
    asked = judge.predict(images.reshape(SAMPLES, -1)) == labels.numpy()
    real = judge.predict(held_out.reshape(len(held_out), -1)) == held_out_labels
    distances = mean_distance(images, seen), mean_distance(held_out, seen)
    report = f"""
{len(seen)} digits to train on, {len(held_out)} held out; {SAMPLES} samples, guidance 2, 25 steps of dpm++

                                               samples   held-out digits
classified as asked (SVC on the training digits) {asked.mean():6.1%}            {real.mean():6.1%}
mean distance to the nearest training digit      {distances[0]:6.2f}            {distances[1]:6.2f}

""" + "\n".join(f"{value:6.0f} s  {name}" for name, value in seconds.items())
    print(report)
    (RUN / "report.txt").write_text(report.lstrip() + "\n")
    print(f"\npicture: {RUN / 'samples.png'}")


if __name__ == "__main__":
    main()
