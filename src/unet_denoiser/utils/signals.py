"""SIGTERM and SIGINT as a wish to stop: the step is finished and a checkpoint written first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class TrainingInterrupted(Exception):  # noqa: N818  # not an error: what was asked for has been done
    """Training was asked to stop by a signal, and has.

    Args:
        number: the signal's.
        step: the step of the checkpoint that was written.
    """

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}, with a checkpoint")


@contextmanager
def watch_signals(on_first: Callable[[int], None]) -> Iterator[None]:
    """Within it, the first SIGTERM or SIGINT calls `on_first(number)`; the second ends the process at once.

    Does nothing outside the main thread, where Python cannot handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    count = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            os._exit(128 + number)
        on_first(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
