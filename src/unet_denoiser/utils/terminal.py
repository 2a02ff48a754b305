"""Text for a terminal or a log: streams that take any text, names as one line, commands that can be pasted."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

MAX_NAMED = 5  # names in a message


class _LastingStream:
    """A text stream whose reader may go away, as `head` does: the rest is dropped, and the work goes on."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if self._name == "stdout" and not isinstance(error, BrokenPipeError):  # for example a full disk
                raise OSError(error.errno, error.strerror, "the standard output") from None
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # what is buffered goes there too
            os.close(null)


def prepare_streams() -> None:
    """Let stdout and stderr take any text, and outlast their reader; a closed one becomes the null device."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # the next file to be opened would get this number, and what C code prints
            os.open(os.devnull, os.O_RDWR)
        stream = getattr(sys, name)
        if number == 0:
            continue
        if stream is None:
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # lasts as long as the process
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _LastingStream(stream, name))


def printable(value: object) -> str:
    """Return a text in one line, with control characters, and bytes that are no UTF-8, as backslash escapes."""
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def command(*arguments: object) -> str:
    """Format a call of unet-denoiser as one line that can be pasted into a shell."""
    return " ".join(["unet-denoiser", *map(quote, arguments)])


def quote(argument: object) -> str:
    """Format an argument as a shell takes it, in one line."""
    text = str(argument)
    if text.isprintable():
        return shlex.quote(text)
    escaped = (chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in os.fsencode(text))
    return f"$'{''.join(escaped)}'"


def count_of(count: int, noun: str) -> str:
    """Return "1 file" or "2 files"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def name_some(names: Sequence[str]) -> str:
    """Return the first names and the number of the others."""
    more = [f"and {len(names) - MAX_NAMED:,} more"] if len(names) > MAX_NAMED else []
    return ", ".join([*names[:MAX_NAMED], *more])
