"""Paths as people type them."""

import os
import re
from pathlib import Path


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return a path, "~" and "~name" replaced by home directories; ValueError for text that names no file here."""
    text = os.fspath(path)
    if not text:
        raise ValueError("an empty path names no file; '.' is the working directory")
    if re.match(r"(?!hf:)[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise ValueError(f"{text} is a URL; give a path on this machine")
    if os.name == "posix" and re.match(r"[A-Za-z]:\\", text):
        raise ValueError(f"{text} is a path of Windows; give one of this machine")
    return Path(expand_home(text))


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """Return True for the form of a hub repository's name, owner/name; a folder may have it too."""
    text = os.fspath(name)
    return text.count("/") == 1 and not text.startswith((".", "/", "~"))


def expand_home(text: str) -> str:
    """Replace a leading "~" or "~name", also after "hf:", by a home directory; ValueError if there is none for "~"."""
    if text.startswith("hf:"):
        return "hf:" + expand_home(text.removeprefix("hf:"))
    expanded = os.path.expanduser(text)
    if re.match(r"~(/|\\|$)", text) and not os.path.isabs(expanded):
        raise ValueError(f"{text}: no home directory is known, as HOME is not set; give the whole path")
    return expanded
