"""The libraries of the extra `export`, imported when they are first used."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any


def is_installed(name: str) -> bool:
    """Return True if a library can be imported; it is not."""
    return find_spec(name) is not None


def require(name: str, purpose: str = "") -> Any:
    """Import a library; ImportError with the command that installs it, if it is missing."""
    if not is_installed(name):
        needs = f"{purpose} needs {name}" if purpose else f"{name} is not installed"
        raise ImportError(f"{needs}: pip install 'unet-denoiser[export]'")
    return import_module(name)
