"""The device to run on, and memory of the CPU."""

import ctypes
import sys

import torch

from unet_denoiser.config.base import DeviceName


def resolve_device(name: DeviceName) -> str:
    """Return `name`, and for "auto" the first available of "cuda", "mps" and "cpu"; ValueError if not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, is_here in available.items() if is_here)
    if not available[name]:
        raise ValueError(f"device={name!r} is not available here; give 'auto' or 'cpu'")
    return name


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensor, instead of giving it back to the system each time.

    By default every tensor above 32 MiB is mapped anew, and the system clears its pages: half of the time of an image
    encoder on a CPU. Does nothing where the C library is not glibc. The process may hold a fifth more memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor is the end of the heap given back, up to 2 GiB
