"""The check of an exported file: its outputs beside those of the network, at several noise levels and sizes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.config.base import ExportPrecision
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.export.network import InputSpec

Array = np.ndarray[Any, Any]
# of the root mean square of the output's error, relative to that of the output, at each noise level and size
BOUNDS: dict[ExportPrecision, float] = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01, "int8": 0.2}
NUM_LEVELS = 5
_LEAST_OUTPUT = 1e-3  # a network that was hardly trained puts out next to nothing


class CheckedCase(NamedTuple):
    """One call of the check: its timestep, batch and size, and the relative error of its output."""

    timestep: int
    batch: int
    size: tuple[int, ...]
    error: float


def check_levels(process: Diffusion) -> list[int]:
    """Return the timesteps that are checked: evenly from the least noise to pure noise."""
    return sorted({int(k) for k in np.linspace(0, process.num_train_timesteps - 1, NUM_LEVELS).round()})


def draw_inputs(
    specs: Mapping[str, InputSpec],
    process: Diffusion,
    k: int,
    axes: Mapping[str, int],
    *,
    generator: torch.Generator,
    samples: Tensor | None = None,
) -> dict[str, Tensor]:
    """Draw the inputs of a call at timestep k from random data, none of them zero.

    Args:
        axes: the length of each axis that may have any: "batch", "height" and so on.
        generator: on the CPU.
        samples: data (N, C, *spatial) to use instead; they are resized.
    """
    drawn: dict[str, Tensor] = {}
    for name, spec in specs.items():
        shape = [axes[n] if isinstance(n, str) else n for n in spec.shape]
        if name == "t":
            drawn[name] = process.times[k].float().expand(shape).clone()
        elif spec.dtype == torch.int64:
            drawn[name] = torch.randint(0, spec.classes, shape, generator=generator)
        elif spec.dtype == torch.bool:
            drawn[name] = torch.rand(shape, generator=generator) < 0.5
        else:
            drawn[name] = torch.randn(shape, generator=generator)
    if "context_mask" in drawn:
        drawn["context_mask"][:, 0] = True
    data = drawn["x"] if process.data_range is None else process.clip(drawn["x"] * process.data_range[1] / 2)
    if samples is not None:
        chosen = samples[torch.randint(0, len(samples), (len(data),), generator=generator)]
        data = F.interpolate(chosen.float(), size=data.shape[2:])
    timestep, noise = torch.full((len(data),), k), torch.randn(data.shape, generator=generator)
    (alpha, sigma), noisy = process.alpha_sigma(timestep, data), process.add_noise(data, noise, timestep)
    drawn["x"] = process.network_input(noisy, alpha, sigma)
    if "x0_estimate" in drawn:
        drawn["x0_estimate"] = data + 0.1 * drawn["x0_estimate"]
    return drawn


def compare(
    network: Callable[[Mapping[str, Array]], list[Array]],
    original: Callable[[Mapping[str, Tensor]], Tensor],
    draw: Callable[[int, Mapping[str, int], torch.Generator], dict[str, Tensor]],
    levels: Sequence[int],
    cases: Sequence[Mapping[str, int]],
) -> list[CheckedCase]:
    """Call an exported network and its original with the same inputs, at all levels and sizes; return the errors.

    Args:
        network: called with arrays by name.
        original: in float32, called with tensors by name.
        draw: (timestep, lengths of the free axes, generator) -> inputs.
        levels: the timesteps.
        cases: the lengths of the free axes of each case.
    """
    generator, checked = torch.Generator().manual_seed(0), []
    for axes in cases:
        for k in levels:
            inputs = draw(k, axes, generator)
            with torch.no_grad():
                wanted = original(inputs).cpu()
            found = torch.from_numpy(network({name: value.numpy() for name, value in inputs.items()})[0])
            scale = wanted.square().mean().sqrt().clamp_min(_LEAST_OUTPUT)
            error = ((found.float() - wanted).square().mean().sqrt() / scale).item()
            checked.append(CheckedCase(k, len(inputs["x"]), tuple(inputs["x"].shape[2:]), error))
    return checked


def require_precise(checked: Sequence[CheckedCase], precision: ExportPrecision) -> float:
    """Return the largest error; ValueError if it exceeds the bound of the precision, or is no number."""
    worst = max(checked, key=lambda case: np.inf if np.isnan(case.error) else case.error)
    if not worst.error <= BOUNDS[precision]:
        size = "x".join(map(str, worst.size))
        raise ValueError(
            f"precision={precision!r}: the exported network's output differs from the network's by "
            f"{worst.error:.1e} of it, at timestep {worst.timestep} and size {size}; at most "
            f"{BOUNDS[precision]:g} is accepted"
        )
    return worst.error
