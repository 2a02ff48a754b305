"""One line on the page about an error, a result or progress."""

import sys
import traceback
from collections.abc import Callable, Iterator
from functools import wraps
from html import escape
from typing import Any

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


def refuse_in_one_line(count: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a handler so that an error becomes its first output, and the `count` others stay as they are."""

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(handler)
        def handle(*args: Any) -> Any:
            try:
                return handler(*args)
            except Exception as error:
                return _refuse(error, count)

        return handle

    return decorate


def refuse_while_streaming(count: int) -> Callable[[Callable[..., Iterator[Any]]], Callable[..., Iterator[Any]]]:
    """Do what `refuse_in_one_line` does for a handler that yields."""

    def decorate(handler: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        @wraps(handler)
        def handle(*args: Any) -> Iterator[Any]:
            try:
                yield from handler(*args)
            except Exception as error:
                yield _refuse(error, count)

        return handle

    return decorate


def _refuse(error: Exception, count: int) -> Any:
    import gradio

    line = refusal(describe_error(error))
    return (line, *(gradio.skip() for _ in range(count))) if count else line
