"""The device to run on, and memory of the CPU."""

import ctypes
import sys

import torch

from unet_denoiser.config.base import DeviceName, MixedPrecision


def resolve_device(name: DeviceName) -> str:
    """Return `name`, and for "auto" the first available of "cuda", "mps" and "cpu"; ValueError if not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, is_here in available.items() if is_here)
    if not available[name]:
        raise ValueError(f"device={name!r} is not available here; give 'auto' or 'cpu'")
    return name


def has_bfloat16() -> bool:
    """Return True if the GPU of this machine computes in bfloat16 itself: from compute capability 8 on."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def default_precision(device: str) -> MixedPrecision:
    """Return the precision of a training for which none was chosen: "bf16" on a GPU that computes in it, else "no".

    A GPU that this machine does not have, as in an estimate for another one, is taken to compute in it.
    """
    return "bf16" if device == "cuda" and (not torch.cuda.is_available() or has_bfloat16()) else "no"


def allow_tf32(device: str) -> None:
    """Let a GPU compute float32 matrix products in TF32 from now on, unless this process has chosen a precision.

    That is torch's own default for convolutions. Products on a CPU stay as they are, so this is not
    `torch.set_float32_matmul_precision`. `torch.backends.cuda.matmul.allow_tf32 = False` before is a choice, which
    torch tells from its default since 2.9.
    """
    matmul = torch.backends.cuda.matmul
    if device == "cuda" and getattr(matmul, "fp32_precision", "none") == "none":
        # after fp32_precision = "tf32", the newer name, torch.compile of torch 2.9 to 2.13 raises as it reads the older
        matmul.allow_tf32 = True


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensor, instead of giving it back to the system each time.

    By default every tensor above 32 MiB is mapped anew, and the system clears its pages: half of the time of an image
    encoder on a CPU. Does nothing where the C library is not glibc. The process may hold a fifth more memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor is the end of the heap given back, up to 2 GiB
