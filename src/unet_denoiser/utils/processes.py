"""A file that says which process works somewhere, for others that look. Standard library and psutil."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from unet_denoiser.utils.files import read_json, write_json

CLOCK_SLACK = 2.0  # seconds: the system tells the start of a process in coarse steps


class Worker(NamedTuple):
    """A process that lives, since when its file says so (seconds since 1970), and what else the file says."""

    pid: int
    since: float
    about: dict[str, Any]


def announce(path: Path, pid: int | None = None, **about: Any) -> None:
    """Write a file that says that a process (default: this one) works there."""
    write_json(path, {"pid": os.getpid() if pid is None else pid, **about})


@contextmanager
def announced(path: Path, **about: Any) -> Iterator[None]:
    """Let a file say that this process works there, as long as the block runs."""
    announce(path, **about)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def find_worker(path: Path) -> Worker | None:
    """Return the living process that a file names; None without a file, or if the process has ended.

    A process that began after the file was written has only inherited the number.
    """
    import psutil

    try:
        since, about = path.stat().st_mtime, read_json(path)
        pid = int(about.pop("pid"))
        process = psutil.Process(pid)
        lives = process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= since + CLOCK_SLACK
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None
    return Worker(pid, since, about) if lives else None
