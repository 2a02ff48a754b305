"""Worker processes that load data: what signals, a lost parent and full memory do to them."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_start_method, parent_process, resource_tracker
from typing import Any

from torch.utils.data import DataLoader

from unet_denoiser.utils.signals import STOPPING, block_signals


class SafeLoader(DataLoader[Any]):
    """A DataLoader whose workers outlive signals to the process group, and do not outlive their parent.

    Ctrl-C in a terminal, `timeout` and job schedulers signal all processes of a group. The workers go on loading, so
    that the main process can finish its step, however long that takes. They end when the loader closes them, or when
    the parent is gone. Errors in a worker are raised in one line.
    """

    def __iter__(self) -> Iterator[Any]:
        if not self.num_workers:
            yield from super().__iter__()
            return
        with describe_worker_errors():
            iterator = self._start_workers()
            try:
                yield from iterator
            finally:
                iterator._shutdown_workers()  # a traceback may keep the iterator, and so the workers

    def _start_workers(self) -> Any:
        """Start the workers with signals blocked: none ends a worker before it ignores them."""
        if getattr(self.multiprocessing_context, "_name", get_start_method()) != "fork":
            resource_tracker.ensure_running()  # starting it later would unblock the signals
        with block_signals():
            iterator: Any = super().__iter__()
        for worker in iterator._workers:  # torch and Python end workers by SIGTERM, which these ignore
            worker._popen.terminate = worker._popen.kill
        return iterator


def ignore_signals(worker: int) -> None:
    """Let a worker ignore signals and end with its parent. For `worker_init_fn` of a DataLoader."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)


@contextmanager
def describe_worker_errors() -> Iterator[None]:
    """Raise errors that a worker sends in one line, and OSError if a worker died or shared memory is full.

    torch notices that a worker died by a signal, so it raises that anywhere in the main process.
    """
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        text, kind = str(error), type(error).__name__
        if "shared memory" in text or "Bus error" in text:
            raise OSError(
                "the shared memory in /dev/shm is full, through which workers pass batches; give --num-workers 0, or "
                "more of it: docker run --shm-size 8g"
            ) from None
        if "DataLoader worker (pid" in text:
            reason = " ".join(text.split())
            raise OSError(f"{reason}; if memory is short, a smaller num_workers needs less") from None
        if "in DataLoader worker process" in text and not isinstance(error, RuntimeError):
            raise type(error)(text.rpartition(f"{kind}: ")[2].strip()) from None  # what follows the worker's traceback
        raise
