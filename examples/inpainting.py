"""Fill in the lower half of an image, and extend it to the right, with any trained run.

    python examples/inpainting.py runs/digits image.png

Writes inpainting.png and outpainting.png, one image per seed; the known pixels are unchanged.
"""

import sys

import torch

from unet_denoiser import Run, inpaint, outpaint, save_grid

OPTIONS = {"seeds": range(8), "resample": 4, "sampler": "ddim", "num_inference_steps": 25}


def main(directory: str, file: str) -> None:
    pipeline = Run.load(directory).load_pipeline()
    model, process, image = pipeline.model, pipeline.process, pipeline.read_image(file)
    mask = torch.zeros(1, 1, *image.shape[2:], dtype=torch.bool)
    mask[..., image.shape[2] // 2 :, :] = True  # what to fill in
    painted = inpaint(model, process, image, mask, **OPTIONS)
    print(save_grid(painted, "inpainting.png", data_range=pipeline.image_range))
    margins = (0, image.shape[3] // 2, 0, 0)  # top, right, bottom, left
    wider = outpaint(model, process, image, margins, **OPTIONS)
    print(save_grid(wider, "outpainting.png", data_range=pipeline.image_range))


if __name__ == "__main__":
    main(*sys.argv[1:])
