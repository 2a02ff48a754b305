"""A picture as noise, made again from it, and made again as other classes.

    python examples/inversion.py runs/digits picture.png 4

Leaves inversion.png: the picture, made again as its own class, then as each other; prints how exactly it came back.
"""

import sys

import torch

from unet_denoiser import Run, invert, regenerate, save_grid


def main(directory: str, file: str, name: str) -> None:
    run = Run.load(directory)
    model, picture = run.load_model(), run.read_picture(file)
    own = run.labels(1, [name])
    plain = invert(model, run.process, picture, class_labels=own, iterations=0)
    exact = invert(model, run.process, picture, class_labels=own)
    for label, inversion in (("plain DDIM inversion", plain), ("with fixed-point iterations", exact)):
        again = regenerate(model, run.process, inversion, class_labels=own)
        print(f"{label}: off by {(again - picture).abs().max().item():.5f} at most, of a range of 2")
    names = [name, *[other for other in run.class_names if other != name]]
    many = exact._replace(noise=exact.noise.expand(len(names), -1, -1, -1))
    swapped = regenerate(model, run.process, many, class_labels=run.labels(len(names), names), guidance_scale=2.0)
    print(save_grid(torch.cat([picture, again, swapped[1:]]), "inversion.png", data_range=run.picture_range))


if __name__ == "__main__":
    main(*sys.argv[1:])
