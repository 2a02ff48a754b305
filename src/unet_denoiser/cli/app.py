"""The command `unet-denoiser`: parsing and printing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence

from unet_denoiser.cli.convert import convert
from unet_denoiser.cli.doctor import doctor
from unet_denoiser.cli.errors import one_line_warning
from unet_denoiser.cli.evaluate import evaluate
from unet_denoiser.cli.info import info
from unet_denoiser.cli.options import parse_command
from unet_denoiser.cli.sample import sample
from unet_denoiser.cli.train import train

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "doctor": doctor,
    "info": info,
    "convert": convert,
}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # torch's threads on a CPU wait for each other in a busy loop. On cores that something else uses too, a small
        # network's training step then took 5.5 s instead of 0.6 s with this limit; on free cores it is the same
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    before, warnings.formatwarning = warnings.formatwarning, one_line_warning
    what = "Train a diffusion model on your images, sample from it, look at networks and convert them."
    try:
        parse_command(COMMANDS, what, args)()
    finally:
        warnings.formatwarning = before
