"""Numbers that are not finite: where they begin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class NonFiniteError(ArithmeticError):  # as in isfinite
    """Training cannot go on: losses, gradients or weights are NaN or infinite."""


def is_finite(t: Tensor) -> bool:
    """Whether all values are."""
    local = t.to_local() if isinstance(t, DTensor) else t
    return bool(torch.isfinite(local).all())


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """NotFinite, naming the first tensor that holds NaN or infinity."""
    for name, t in tensors.items():
        if t.is_floating_point() and not is_finite(t):
            raise NonFiniteError(f"{name} is not finite; nothing has been saved, the checkpoint before is as it was")


@torch.no_grad()
def first_nonfinite_module(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Run `forward` and say which module of `model` was the first to return something not finite from finite inputs."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not is_finite(output):
                whose = "finite" if all(is_finite(a) for a in args if isinstance(a, Tensor)) else "infinite or NaN"
                found.append(f"the output of {name or 'the network'} ({type(module).__name__}) from {whose} inputs")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def first_nonfinite_gradient(model: nn.Module) -> str | None:
    """The parameter with a gradient that is not finite which the backward pass came to first (the deepest)."""
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not is_finite(p.grad)]
    return f"the gradient of {bad[-1]}" if bad else None
