"""The command's entry: what comes before its parser takes half a second, in which it may be interrupted too."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command; 130 where it is interrupted before it has begun."""
    try:
        from unet_denoiser.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":  # not in data-loading workers, which import this module again
    main()
