"""Invert an image to noise, then regenerate it, and variants of it in other classes.

    python examples/inversion.py runs/digits image.png 4

Writes inversion.png: the image, the regenerated one, one in each other class. Prints how exact the inversion is.
"""

import sys

import torch

from unet_denoiser import Run, invert, regenerate, save_grid


def main(directory: str, file: str, name: str) -> None:
    pipeline = Run.load(directory).load_pipeline()
    model, process, image = pipeline.model, pipeline.process, pipeline.read_image(file)
    label = pipeline.labels(1, [name])
    plain = invert(model, process, image, class_labels=label, iterations=0)
    exact = invert(model, process, image, class_labels=label)
    for method, inversion in (("plain DDIM inversion", plain), ("with fixed-point iterations", exact)):
        again = regenerate(model, process, inversion, class_labels=label)
        print(f"{method}: off by {(again - image).abs().max().item():.5f} at most, of a range of 2")
    names = [name, *[other for other in pipeline.class_names if other != name]]
    repeated = exact._replace(noise=exact.noise.expand(len(names), -1, -1, -1))
    labels = pipeline.labels(len(names), names)
    others = regenerate(model, process, repeated, class_labels=labels, guidance_scale=2.0)
    print(save_grid(torch.cat([image, again, others[1:]]), "inversion.png", data_range=pipeline.image_range))


if __name__ == "__main__":
    main(*sys.argv[1:])
