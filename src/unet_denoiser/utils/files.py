"""Files that are written whole or not at all. Standard library only."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; ValueError naming the file if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: Any, *, indent: int | None = 2, ensure_ascii: bool = False) -> None:
    """Write a JSON value, whole or not at all; bytes of a name that are no UTF-8 become JSON's escapes."""
    text = json.dumps(value, indent=indent, ensure_ascii=ensure_ascii) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file or folder, then rename it to `path`: readers see the old or the new, whole.

    The folder around it is made if it is missing. A folder replaces another folder only if that is empty. The contents
    are synced to the disk before the rename, so that a power failure does not leave an empty file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # for example when the disk is full
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # no error for a file, which `unlink` deletes
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise OSError naming the folder, or its first existing parent, if no file can be made in it."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    try:
        TemporaryFile(dir=existing).close()
    except OSError as error:
        raise OSError(f"{existing}: no file can be made in it: {error.strerror}") from None


def sync(path: Path) -> None:
    """Sync a file's contents, or a folder's entries, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of killed `write_atomically` calls, in a folder and its sub-folders."""
    for path in list(folder.rglob(".*.tmp")):
        if path.name.removesuffix(".tmp").rpartition(".")[2].isdecimal():  # the process id of `write_atomically`
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
