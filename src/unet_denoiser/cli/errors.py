"""Errors of a command as one line and an exit code, without a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from unet_denoiser.utils.terminal import command, printable


@contextmanager
def one_line_errors(
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, ImportError, OverflowError, Warning),
) -> Iterator[None]:
    """Print errors that the user can fix as one line and exit with code 2; let others pass."""
    try:
        yield
    except kinds as error:
        _exit(f"error: {error}", 2)
    except MemoryError as error:
        _exit(f"error: out of memory: {error}", 2)
    except RuntimeError as error:
        if "memory" not in str(error) or "alloc" not in str(error):
            raise
        advice = "a smaller batch_size, image_size or network, or gradient_accumulation_steps in training needs less"
        _exit(f"error: out of memory; {advice}", 2)
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
            _exit(f"{path}: {stop}; to go on: {command('train', '--resume', path)}", 128 + stop.number)
        except NonFiniteError as error:
            _exit(f"error: {error}; {path} has the last good checkpoint", 1)


def one_line_warning(message: Warning | str, *where: Any, **more: Any) -> str:
    """Format a warning as `warnings.formatwarning` does, in one line and without the place in our code."""
    return f"unet-denoiser: warning: {_one_line(message)}\n"


def _exit(message: str, code: int) -> NoReturn:
    print(f"unet-denoiser: {_one_line(message)}", file=sys.stderr)
    raise SystemExit(code) from None


def _one_line(message: object) -> str:
    return printable(" ".join(str(message).split()))
