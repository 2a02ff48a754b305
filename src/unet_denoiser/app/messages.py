"""One line on the page about an error, a result or progress."""

import sys
import traceback
from html import escape

EXPECTED = (ValueError, TypeError, OSError, ImportError, OverflowError)


def note(text: str) -> str:
    """Return a line of HTML that informs."""
    return f'<div class="ud-note">{escape(text)}</div>' if text else ""


def refusal(text: str) -> str:
    """Return a line of HTML about what was wrong."""
    return f'<div class="ud-error" role="alert">{escape(text)}</div>'


def describe_error(error: BaseException) -> str:
    """Return an error as one line; what is not the user's mistake goes to the terminal with its traceback."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "alloc" in text):
        return "out of memory; fewer images, or a smaller image or network, need less"
    if isinstance(error, EXPECTED):
        return text
    traceback.print_exception(error, file=sys.stderr)
    return f"an error of the program, {type(error).__name__}: {text[:200]}; the terminal shows where"
