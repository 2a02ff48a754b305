"""Make variations of an image, from close to free, with a trained run.

    python examples/image_to_image.py runs/digits image.png

Writes image_to_image.png, a row for each strength 0.3, 0.6 and 0.9: the image, then three variations.
"""

import sys

import torch

from unet_denoiser import Run, image_to_image, save_grid

STRENGTHS, SEEDS = (0.3, 0.6, 0.9), range(3)


def main(directory: str, file: str) -> None:
    pipeline = Run.load(directory).load_pipeline()
    image = pipeline.read_image(file)
    x = pipeline.encode(image)
    rows = []
    for strength in STRENGTHS:
        variations = image_to_image(pipeline.model, pipeline.process, x, seeds=SEEDS, strength=strength)
        rows += [image, pipeline.decode(variations)]
    print(save_grid(torch.cat(rows), "image_to_image.png", columns=1 + len(SEEDS), data_range=pipeline.image_range))


if __name__ == "__main__":
    main(*sys.argv[1:])
