"""Entry point of the command; its imports take half a second, in which the user may interrupt it too."""

import os
import sys

from unet_denoiser.utils.terminal import prepare_streams


def main() -> None:
    """Run the command; exit with code 130 if it is interrupted while it is imported."""
    prepare_streams()
    try:
        os.getcwd()
    except OSError as error:  # torch ends the process without it
        print(f"unet-denoiser: error: the working directory cannot be used: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    try:
        from unet_denoiser.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":  # not in data-loading workers, which import this module again
    main()
