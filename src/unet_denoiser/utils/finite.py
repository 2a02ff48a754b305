"""NaN and infinity: detect them, and find the module or parameter where they begin."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_SUMMED_IN = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # dtypes whose sums overflow


class NonFiniteError(ArithmeticError):
    """Losses, gradients or weights are NaN or infinite, and training cannot go on."""


def is_finite(t: Tensor) -> bool:
    """Return True if no value is NaN or infinite; of a sharded tensor, none of this process's shard.

    A finite sum says so twenty times as quickly as a test of each value. Tensors without storage count as finite.
    """
    local = t.to_local() if isinstance(t, DTensor) else t
    if local.is_meta or (local.is_floating_point() and bool(local.sum(dtype=_SUMMED_IN.get(local.dtype)).isfinite())):
        return True
    return bool(local.isfinite().all())


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError naming the first tensor that holds NaN or infinity."""
    for name, t in tensors.items():
        if t.is_floating_point() and not is_finite(t):
            raise NonFiniteError(f"{name} is not finite; nothing was saved, and the previous checkpoint is unchanged")


@torch.no_grad()
def first_nonfinite_module(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Run `forward` and describe the first module of `model` whose output is not finite; None if all are finite."""
    found: list[str] = []

    def check(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not is_finite(output):
            inputs = "finite" if all(is_finite(a) for a in args if isinstance(a, Tensor)) else "infinite or NaN"
            found.append(f"the output of {name or 'the network'} ({type(module).__name__}) from {inputs} inputs")

    handles = [module.register_forward_hook(partial(check, name)) for name, module in model.named_modules()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def first_nonfinite_gradient(model: nn.Module) -> str | None:
    """Describe the deepest parameter with a gradient that is not finite, which is computed first; None if all are."""
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not is_finite(p.grad)]
    return f"the gradient of {bad[-1]}" if bad else None
