"""Enlarge a small picture four times a side with any run trained on pictures, or by the factor a run was trained for.

    python examples/super_resolution.py runs/pictures small.png 4

Leaves super_resolution.png: the picture as large squares, then samples whose averages over the squares it is.
"""

import sys

import torch

from unet_denoiser import Run, save_grid, upscale


def main(directory: str, file: str, factor: str = "4") -> None:
    run, times = Run.load(directory), int(factor)
    small = run.read_picture(file, as_it_is=True)
    large = upscale(run.load_model(), run.process, small, times, seeds=range(3), num_inference_steps=50)
    squares = small.repeat_interleave(times, 2).repeat_interleave(times, 3)
    print(save_grid(torch.cat([squares, large]), "super_resolution.png", data_range=run.picture_range))


if __name__ == "__main__":
    main(*sys.argv[1:])
