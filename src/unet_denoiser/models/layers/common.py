"""Helpers that several layers share."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from unet_denoiser.models.layers.conv import CONV
from unet_denoiser.models.layers.rules import has_hooks

Size = Sequence[int] | None
Emb = Tensor | None


def add_inplace(x: Tensor, y: Tensor, source: nn.Module) -> Tensor:
    """Add y to the output x of `source`, which nothing else needs: in place if that is safe."""
    return x.add_(y) if may_overwrite_output(source) and x.dtype == y.dtype else x + y


def may_overwrite_output(source: nn.Module) -> bool:
    """Return True if the module allocates its output, and neither autograd nor a hook keeps it."""
    allocates = isinstance(source, (nn.GroupNorm, *CONV.values()))
    return allocates and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or has_hooks(source))


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Switch autocast off, which would compute the embeddings' matrix products in half precision."""
    # the compiler of torch 2.11 stops at the first of these two questions
    is_known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    used = is_known and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if used else nullcontext()


def compute_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype that a module computes in: that of its first parameter that is no storage format.

    Quantised layers store integers, or no parameter at all; others store 8-bit floats and convert them in each call.
    """
    dtypes = (p.dtype for p in module.parameters())
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), default)


def input_dtype(network: nn.Module, first: nn.Module) -> torch.dtype:
    """Return the dtype of the input of a network whose first layer is `first`."""
    hooks = getattr(network, "_diffusers_hook", None)  # apply_layerwise_casting may store all weights in 8 bits
    casting = hooks and hooks.get_hook("layerwise_casting")
    return compute_dtype(first, casting.compute_dtype if casting else compute_dtype(network, torch.float32))


def input_device(network: nn.Module, first: nn.Module) -> torch.device:
    """Return the device of the input of a network whose first layer is `first`; accelerate may offload the weights."""
    weight = next(network.parameters())
    hook = getattr(first, "_hf_hook", None) if weight.is_meta else None
    return torch.device(getattr(hook, "execution_device", None) or weight.device)


def join_graph(x: Tensor, parameters: Iterable[Tensor | None]) -> Tensor:
    """Return x, with parameters that it does not depend on in its graph: their gradient is zero instead of None.

    DistributedDataParallel waits for a gradient of each parameter. A sum with 0 * p would carry NaN over to x.
    """
    for p in parameters if torch.is_grad_enabled() else ():
        if p is not None and p.requires_grad and p.device == x.device:
            x = torch.where(torch.zeros((), dtype=torch.bool, device=x.device), p.flatten()[0], x)
    return x


def zero_init(module: nn.Module) -> nn.Module:
    """Zero the parameters, so that the residual branch that the module ends is zero at first (DDPM, ADM)."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module
