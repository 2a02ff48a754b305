"""schedule.json: all that a loop without this package needs of the process."""

from collections.abc import Sequence
from typing import Any

import torch

from unet_denoiser.diffusion.process import Diffusion

SCHEDULE_NAME = "schedule.json"


def describe_schedule(process: Diffusion, steps: Sequence[int], clip_sample: bool = True) -> dict[str, Any]:
    """Return the contents of schedule.json.

    x0 = c_skip x_t + c_out F(c_in x_t, time), for x_t = alpha x0 + sigma noise with alpha^2 + sigma^2 = 1.

    Args:
        steps: the timesteps of a sampling, falling.
        clip_sample: clip each predicted x0 to the data's range, as `sample` does.
    """
    ratios = torch.from_numpy(process.ratios)  # (T,) in float64
    alpha = 1 / (1 + ratios.square()).sqrt()
    sigma = ratios * alpha
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    levels = {
        "time": process.times.double(),
        "alpha": alpha,
        "sigma": sigma,
        "c_in": process.prediction.c_in(alpha, sigma),
        "c_skip": process.prediction.x0(zero, one, alpha, sigma),
        "c_out": process.prediction.x0(one, zero, alpha, sigma),
    }
    data_range = process.data_range if clip_sample else None
    return {
        "path": process.path,
        "prediction_type": process.prediction_type,
        "data_range": None if data_range is None else list(data_range),
        "learns_variance": process.learns_variance,
        "steps": [int(k) for k in steps],
        "levels": {name: value.tolist() for name, value in levels.items()},
    }
