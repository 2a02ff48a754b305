"""Handlers of the page's events: an error becomes one line, and the rest of the page stays as it is."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import gradio as gr

from unet_denoiser.app.messages import describe_error, refusal


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
    line = refusal(describe_error(error))
    return (line, *(gr.skip() for _ in range(count))) if count else line
