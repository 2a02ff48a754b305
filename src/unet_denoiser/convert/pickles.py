"""Reading what torch.save wrote without importing or running anything: inert objects stand for unknown classes."""

import mmap
import pickle
import re
import threading
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from unet_denoiser.utils.tensor_files import MAX_TENSORS

_MAX_NAMES = 200
_RUNS_CODE = re.compile(
    r"(os|posix|nt|sys|subprocess|_posixsubprocess|shutil|socket|ctypes|importlib|runpy|pty|pickle|marshal|operator|"
    r"webbrowser|multiprocessing|commands|io|_io)\."
    r"|builtins\.(eval|exec|compile|__import__|open|input|breakpoint)$"
)
_BYTEARRAYS = (b"builtins\nbytearray\n", b"__builtin__\nbytearray\n")  # torch makes them, of any size
_lock = threading.Lock()  # torch keeps the names that it may read per process


class Inert:
    """Stands for an object of a class or function that a file names: takes any arguments and state, keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return an object without contents."""
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _InertMapping(Inert):
    """The same for a subclass of dict, whose items are kept."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


class _InertList(Inert):
    """The same for a subclass of list."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return []


def read_pickle(path: Path) -> Any:
    """Return what torch.save wrote to a file: tensors, mapped from it, containers and numbers.

    Any other object is an `Inert` of its class's name. Nothing is imported, and nothing of the file runs. Raise
    ValueError for a file that is damaged, or that would run a function of the system.
    """
    is_zip = zipfile.is_zipfile(path)
    _check_contents(path, is_zip)
    stand_ins: dict[str, type] = {}
    for _ in range(_MAX_NAMES):
        allowed: list[Any] = [(stand_in, name) for name, stand_in in stand_ins.items()]
        try:
            with _lock, warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
                warnings.simplefilter("ignore")  # of old protocols and storages
                if path.suffix == ".safetensors":  # by which torch would choose another reader
                    with path.open("rb") as file:
                        return torch.load(file, map_location="cpu", weights_only=True)
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:
            name, base = _find_unknown(str(error), path)
            stand_ins[name] = _make_stand_in(name, base)
        except (Exception, RecursionError) as error:  # a damaged pickle raises nearly any error
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{path} is not a readable checkpoint: {reason[:200]}") from None
    raise ValueError(f"{path} is not a readable checkpoint: it names more than {_MAX_NAMES} classes")


def describe_object(value: Any) -> str:
    """Return the class of a value, by the name that a file gave it."""
    cls = type(value)
    return f"{cls.__module__}.{cls.__qualname__}" if isinstance(value, Inert) else cls.__name__


def _find_unknown(message: str, path: Path) -> tuple[str, type]:
    """Return the class that torch stopped at, and how to stand for it; ValueError if it would run code, or is none."""
    if blocked := re.search(r"GLOBAL (\S+) whose module", message):
        raise ValueError(f"{path} holds more than tensors, and opening it would run {blocked[1]}")
    if unknown := re.search(r"GLOBAL (\S+) was not an allowed", message):
        name = unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}"
        if _RUNS_CODE.match(name):
            raise ValueError(f"{path} holds more than tensors, and opening it would run {name}")
        return name, _InertMapping if name == "collections.defaultdict" else Inert
    if found := re.search(r"Can only SETITEMS? for .* got <class '([^']+)'>", message):
        return found[1], _InertMapping
    if found := re.search(r"Can only (?:append to|extend) lists, but got <class '([^']+)'>", message):
        return found[1], _InertList
    raise ValueError(f"{path} is not a readable checkpoint: it holds something else than pickled tensors") from None


def _make_stand_in(name: str, base: type) -> type:
    module, _, qualname = name.rpartition(".")
    return type(qualname, (base,), {"__module__": module})


def _check_contents(path: Path, is_zip: bool) -> None:
    """Raise ValueError for a file that could take more memory than it is large, or that is no file of torch.save."""
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_TENSORS:
                raise ValueError(f"{path} has {len(entries):,} parts; the largest networks have some thousand")
            pickled = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if any(entry.filename.endswith("/constants.pkl") for entry in entries):
                raise ValueError(f"{path} is a TorchScript program; give the weights of its network (state_dict)")
            if not pickled:
                kind = "NumPy archive" if any(e.filename.endswith(".npy") for e in entries) else "zip archive"
                raise ValueError(f"{path} is a {kind}, not a checkpoint")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError(f"{path} is not a readable checkpoint: its parts are compressed")
            if any(name in archive.read(entry) for entry in pickled for name in _BYTEARRAYS):
                raise ValueError(f"{path} is not a readable checkpoint: it holds a bytearray")
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if any(content.find(name) >= 0 for name in _BYTEARRAYS):
            raise ValueError(f"{path} is not a readable checkpoint: it holds a bytearray")
