"""From one seed to another, and from one class to another, with a class-conditional run.

    python examples/interpolation.py runs/digits 3 8

Writes interpolation.png, three rows: between two seeds, between the classes, and between both.
"""

import sys

import torch

from unet_denoiser import Run, interpolate, save_grid

COUNT, SEEDS = 8, (0, 1)


def main(directory: str, first: str, second: str) -> None:
    pipeline = Run.load(directory).load_pipeline()
    model, process, both = pipeline.model, pipeline.process, pipeline.labels(2, [first, second])
    rows = [
        interpolate(model, process, seeds=seeds, count=COUNT, class_labels=labels, guidance_scale=2.0)
        for seeds, labels in ((SEEDS, both[:1]), ((SEEDS[0],) * 2, both), (SEEDS, both))
    ]
    images = pipeline.decode(torch.cat(rows))
    print(save_grid(images, "interpolation.png", columns=COUNT, data_range=pipeline.image_range))


if __name__ == "__main__":
    main(*sys.argv[1:])
