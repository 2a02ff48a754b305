"""The command line: one file a command."""

from unet_denoiser.cli.app import main as main
