"""Train on handwritten digits with the command line, generate new ones, measure them; then do it in four steps.

Writes runs/digits/samples.png (one row per class), runs/digits-4/samples.png and runs/digits/report.txt.
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

RUN, FEW = Path("runs/digits"), Path("runs/digits-4")
TRAIN = f"train digits --out {RUN} --steps 480 --batch-size 128 --learning-rate 2e-3 --ema-decay 0.99"
SAMPLE = f"sample {RUN} --num-images 100 --guidance-scale 2"
DISTILL = f"distill {RUN} --out {FEW} --num-steps 4 --guidance-scale 2 --teacher-steps 8 --batch-size 64"
SAMPLE_FEW = f"sample {FEW} --num-images 100"
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


def generate(run: Path, labels: torch.Tensor, **options: float) -> tuple[np.ndarray, float]:
    """Sample images of these classes from a run; return them and the seconds it took."""
    start = time.perf_counter()
    pipeline = Run.load(run).load_pipeline()
    seeds = range(1000, 1000 + len(labels))
    images = sample(pipeline.model, pipeline.process, seeds=seeds, class_labels=labels, **options)
    return images.numpy(), time.perf_counter() - start


def main() -> None:
    seconds = {"training": command(TRAIN), "the picture": command(SAMPLE)}
    labels = Run.load(RUN).load_pipeline().labels(SAMPLES)
    images, seconds[f"{SAMPLES} samples"] = generate(RUN, labels, guidance_scale=2.0)
    seconds["distilling"] = command(DISTILL)
    command(SAMPLE_FEW)
    few, seconds[f"{SAMPLES} samples in 4 steps"] = generate(FEW, labels)

    (seen, seen_labels), (held_out, held_out_labels) = digits(), digits(held_out=True)
    judge = SVC(C=10).fit(seen.reshape(len(seen), -1), seen_labels)
    asked = [judge.predict(x.reshape(SAMPLES, -1)) == labels.numpy() for x in (images, few)]
    asked.append(judge.predict(held_out.reshape(len(held_out), -1)) == held_out_labels)
    distances = [mean_distance(x, seen) for x in (images, few, held_out)]
    report = f"""
{len(seen)} digits to train on, {len(held_out)} held out; {SAMPLES} samples, guidance 2
of the network in 25 steps of dpm++, and of its student in 4 steps without guidance

                                                 25 steps  4 steps  held-out digits
classified as asked (SVC on the training digits) {"".join(f"{x.mean():8.1%} " for x in asked)}
mean distance to the nearest training digit      {"".join(f"{x:8.2f} " for x in distances)}

""" + "\n".join(f"{value:6.0f} s  {name}" for name, value in seconds.items())
    print(report)
    (RUN / "report.txt").write_text(report.lstrip() + "\n")
    print(f"\npicture: {RUN / 'samples.png'}; in 4 steps: {FEW / 'samples.png'}")


if __name__ == "__main__":
    main()
