"""The functions of kernels.cpp, compiled when they are first needed and kept on disk.

They need a C++ compiler with OpenMP. Without one, or with one that fails, the layers compute by torch's own operations.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from unet_denoiser.utils.cache import cache_directory

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
# with them, clamps are single instructions; what NaN and infinity become does not depend on them in this code
_MATH_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffinite-math-only")


# kernels.cpp's struct Problem: nine integers, two floating-point numbers, six pointers, zero for what is not given
PROBLEM = struct.Struct("9q2d6Q")


@cache
def load_kernels() -> ctypes.CDLL | None:
    """Return the compiled library, or None if there is no compiler or it fails; it is kept in `cache_directory`."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None or not _SOURCE.is_file():
        return None
    path = cache_directory() / f"kernels-{_fingerprint(compiler)}.so"
    try:
        if not path.is_file():
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:  # other processes may compile too
                built = Path(scratch, "kernels.so")
                command = [*shlex.split(compiler), *_FLAGS, *_MATH_FLAGS, str(_SOURCE), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                os.replace(built, path)
        library = ctypes.CDLL(str(path))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    for function, pointers in ((library.norm_forward, 3), (library.norm_backward, 5)):
        function.argtypes, function.restype = [ctypes.c_char_p, *[ctypes.c_void_p] * pointers], None
    library.digest.argtypes, library.digest.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p], None
    return library


def require_kernels() -> ctypes.CDLL:
    """Return the compiled library, which the caller knows to be there."""
    library = load_kernels()
    assert library is not None
    return library


def _fingerprint(compiler: str) -> str:
    """Return a digest of all that the compiled code depends on: a home directory may serve different machines."""
    parts = (_SOURCE.read_text(), compiler, *_FLAGS, *_MATH_FLAGS, platform.platform(), _read_processor())
    return hashlib.sha256("\n".join([*parts, torch.__version__]).encode()).hexdigest()[:16]


def _read_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()
