"""SIGTERM and SIGINT as a request to stop: training finishes the step and writes a checkpoint first."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT)
REPEAT_SECONDS = 0.25  # `timeout` sends its signal to the process, and then to the group that the process is in


class TrainingInterrupted(Exception):  # noqa: N818  # not an error: training stopped as requested
    """Training stopped because of signal `number`, after writing a checkpoint at `step`."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}, with a checkpoint")


@contextmanager
def watch_signals(on_first: Callable[[int], None]) -> Iterator[None]:
    """Call `on_first(number)` at the first SIGTERM or SIGINT inside the block; a later one exits at once.

    Outside the main thread it does nothing, since Python handles signals there only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not received:
            received.append(now)
            on_first(number)
        elif now - received[0] > REPEAT_SECONDS:
            os._exit(128 + number)

    previous = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def block_signals() -> Iterator[None]:
    """Hold SIGTERM and SIGINT back until the block ends; processes started inside it keep them blocked."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
