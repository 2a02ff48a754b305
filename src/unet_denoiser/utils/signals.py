"""SIGTERM and SIGINT as a request to stop: training finishes the step and writes a checkpoint first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class TrainingInterrupted(Exception):  # noqa: N818  # not an error: training stopped as requested
    """Training stopped because of signal `number`, after writing a checkpoint at `step`."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}, with a checkpoint")


@contextmanager
def watch_signals(on_first: Callable[[int], None]) -> Iterator[None]:
    """Call `on_first(number)` at the first SIGTERM or SIGINT inside the block; the second one exits at once.

    Outside the main thread it does nothing, since Python handles signals there only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        on_first(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
