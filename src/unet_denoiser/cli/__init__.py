"""The command line: one file per command."""

from unet_denoiser.cli.app import main as main
