"""Draw docs/images/tiles.png: samples on their way from noise to image, one row a class, then more samples of it.

The run is the class-conditional network that docs/guide/train.md trains on 32x32 game tiles.
Run: python docs/images/tiles.py RUN
"""

import sys
from pathlib import Path

import torch

from unet_denoiser import Run, sample_steps, save_grid

SHOWN_STEPS = (0, 12, 20, 27, 33, 38, 43, 49)  # of 50
NUM_SAMPLES = 8  # a class


def main() -> None:
    pipeline = Run.load(sys.argv[1]).load_pipeline()
    classes = len(pipeline.class_names or [])
    labels = torch.arange(classes).repeat_interleave(NUM_SAMPLES)
    options = {
        "class_labels": labels,
        "sampler": "ddim",
        "num_inference_steps": 50,
        "guidance_scale": 2.0,
        "batch_size": len(labels),
    }
    steps = list(
        sample_steps(pipeline.model, pipeline.process, seeds=range(len(labels)), class_labels=labels, **options)
    )
    ways = torch.stack([steps[i].x[::NUM_SAMPLES] for i in SHOWN_STEPS], dim=1)  # (classes, steps, C, H, W)
    samples = steps[-1].x.view(classes, NUM_SAMPLES, *ways.shape[2:])[:, 1:]
    rows = torch.cat([ways, samples], dim=1)
    large = rows.flatten(0, 1).repeat_interleave(2, -1).repeat_interleave(2, -2)
    save_grid(large.clamp(-1, 1), Path(__file__).with_suffix(".png"), rows.shape[1], (-1.0, 1.0))


if __name__ == "__main__":
    main()
