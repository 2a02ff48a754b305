"""Errors of a command as one line and an exit code, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


@contextmanager
def one_line_errors(
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, ImportError),
) -> Iterator[None]:
    """Print errors that the user can fix as one line and exit with code 2; let others pass."""
    try:
        yield
    except kinds as error:
        _exit(f"error: {error}", 2)
    except RuntimeError as error:
        if "memory" not in str(error) or "alloc" not in str(error):
            raise
        _exit(
            "error: out of memory; a smaller batch_size or image_size, gradient_accumulation_steps in training, or a "
            "smaller network needs less",
            2,
        )
    except KeyboardInterrupt as error:
        print(file=sys.stderr)
        _exit(str(error) or "interrupted", 130)


@contextmanager
def one_line_training_errors(path: Path) -> Iterator[None]:
    """Print why a training ended before its last step as one line: a signal, NaN, or what `one_line_errors` prints."""
    from unet_denoiser.utils.finite import NonFiniteError
    from unet_denoiser.utils.signals import TrainingInterrupted

    with one_line_errors():
        try:
            yield
        except TrainingInterrupted as stop:
            _exit(f"{path}: {stop}; to go on: unet-denoiser train --resume {path}", 128 + stop.number)
        except NonFiniteError as error:
            _exit(f"error: {error}; {path} has the last good checkpoint", 1)


def one_line_warning(message: Warning | str, *where: Any, **more: Any) -> str:
    """Format a warning as `warnings.formatwarning` does, in one line and without the place in our code."""
    return f"unet-denoiser: warning: {' '.join(str(message).split())}\n"


def _exit(message: str, code: int) -> NoReturn:
    print(f"unet-denoiser: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code) from None
