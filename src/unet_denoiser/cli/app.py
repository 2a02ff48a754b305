"""The command `unet-denoiser` and its sub-commands."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence

from unet_denoiser.cli.convert import convert
from unet_denoiser.cli.distill import distill
from unet_denoiser.cli.doctor import doctor
from unet_denoiser.cli.errors import one_line_errors, one_line_warning
from unet_denoiser.cli.evaluate import evaluate
from unet_denoiser.cli.export import export
from unet_denoiser.cli.info import info
from unet_denoiser.cli.options import parse_command
from unet_denoiser.cli.page import app
from unet_denoiser.cli.sample import sample
from unet_denoiser.cli.share import share
from unet_denoiser.cli.train import train
from unet_denoiser.utils.cache import provide_caches

COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (train, distill, sample, evaluate, doctor, info, convert, export, share, app)
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command with these arguments (default: those of the process)."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # torch's CPU threads wait for each other in a busy loop. On cores that are also used by something else, a
        # training step of a small network takes 5.5 s without this limit and 0.6 s with it; on free cores no difference
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    before, warnings.formatwarning = warnings.formatwarning, one_line_warning
    description = "Train a diffusion model on your images, sample from it, look at networks and convert them."
    try:
        with one_line_errors():
            run = parse_command(COMMANDS, description, args)
            provide_caches()
            run()
            sys.stdout.flush()  # a full disk is found here, and not when Python has no way left to say so
    finally:
        warnings.formatwarning = before
