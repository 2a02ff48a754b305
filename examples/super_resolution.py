"""Upscale a small image with any run, or by the factor that a run was trained for.

    python examples/super_resolution.py runs/images small.png 4

Writes super_resolution.png: the image with its pixels as squares, then samples whose averages over them it is.
"""

import sys

import torch

from unet_denoiser import Run, save_grid, upscale


def main(directory: str, file: str, factor: str = "4") -> None:
    pipeline, n = Run.load(directory).load_pipeline(), int(factor)
    small = pipeline.read_image(file, keep_size=True)
    large = upscale(pipeline.model, pipeline.process, small, n, seeds=range(3), num_inference_steps=50)
    squares = small.repeat_interleave(n, 2).repeat_interleave(n, 3)
    print(save_grid(torch.cat([squares, large]), "super_resolution.png", data_range=pipeline.image_range))


if __name__ == "__main__":
    main(*sys.argv[1:])
