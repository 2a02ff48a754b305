"""Variations of a picture, from close to free: a trained run, a picture file, three strengths.

    python examples/image_to_image.py runs/digits picture.png

Leaves image_to_image.png: the picture, then three variations a row at strength 0.3, 0.6 and 0.9.
"""

import sys

import torch

from unet_denoiser import Run, image_to_image, save_grid

STRENGTHS, SEEDS = (0.3, 0.6, 0.9), range(3)


def main(directory: str, file: str) -> None:
    run = Run.load(directory)
    model, picture = run.load_model(), run.read_picture(file)
    rows = []
    for strength in STRENGTHS:
        made = image_to_image(model, run.process, run.encode(picture), seeds=SEEDS, strength=strength)
        rows += [picture, run.decode(made)]
    print(save_grid(torch.cat(rows), "image_to_image.png", columns=1 + len(SEEDS), data_range=run.picture_range))


if __name__ == "__main__":
    main(*sys.argv[1:])
