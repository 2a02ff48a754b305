"""Paint the lower half of a picture anew, and what may lie to its right, with any trained run.

    python examples/inpainting.py runs/digits picture.png

Leaves inpainting.png and outpainting.png, one picture a seed; what was known is unchanged in them.
"""

import sys

import torch

from unet_denoiser import Run, inpaint, outpaint, save_grid

OPTIONS = {"seeds": range(8), "resample": 4, "sampler": "ddim", "num_inference_steps": 25}


def main(directory: str, file: str) -> None:
    run = Run.load(directory)
    model, picture = run.load_model(), run.read_picture(file)
    mask = torch.zeros(1, 1, *picture.shape[2:], dtype=torch.bool)
    mask[..., picture.shape[2] // 2 :, :] = True  # where to paint
    painted = inpaint(model, run.process, picture, mask, **OPTIONS)
    print(save_grid(painted, "inpainting.png", data_range=run.picture_range))
    margins = (0, picture.shape[3] // 2, 0, 0)  # top, right, bottom, left
    wider = outpaint(model, run.process, picture, margins, **OPTIONS)
    print(save_grid(wider, "outpainting.png", data_range=run.picture_range))


if __name__ == "__main__":
    main(*sys.argv[1:])
