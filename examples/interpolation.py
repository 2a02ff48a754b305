"""From one seed to another, and from one class to another, with a class-conditional run.

    python examples/interpolation.py runs/digits 3 8

Leaves interpolation.png: the first class between two seeds, one seed between the classes, and both at once.
"""

import sys

import torch

from unet_denoiser import Run, interpolate, save_grid

COUNT, SEEDS = 8, (0, 1)


def main(directory: str, first: str, second: str) -> None:
    run = Run.load(directory)
    model, both = run.load_model(), run.labels(2, [first, second])
    rows = [
        interpolate(model, run.process, seeds=seeds, count=COUNT, class_labels=labels, guidance_scale=2.0)
        for seeds, labels in ((SEEDS, both[:1]), ((SEEDS[0],) * 2, both), (SEEDS, both))
    ]
    print(save_grid(run.decode(torch.cat(rows)), "interpolation.png", columns=COUNT, data_range=run.picture_range))


if __name__ == "__main__":
    main(*sys.argv[1:])
