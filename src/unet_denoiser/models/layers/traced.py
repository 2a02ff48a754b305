"""GroupNorm and dropout masks written for the code that torch.compile generates on a CPU.

Its own code for them takes as long as the convolutions in bfloat16: it computes variances by Welford's update, a few
channels at a time, and draws each random number alone.
"""

from typing import Any

import torch
from torch import Tensor, nn


def is_generated(x: Tensor) -> bool:
    """Return True while torch.compile traces a computation of x, for which it generates code for a CPU."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and x.device.type == "cpu"


def group_norm_by_sums(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Compute GroupNorm from sums over the positions of each channel, which vectorise along the channels."""
    return _GroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


class _GroupNorm(torch.autograd.Function):
    """GroupNorm and its gradients: every pass over the pixels is a sum per channel, or of the form x * a + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        wide, positions = _widen(x), tuple(range(2, x.ndim))
        mean = _average_groups(wide.mean(positions), groups)  # (B, C)
        var = _average_groups((wide - _broadcast(mean, x)).square().mean(positions), groups)
        rstd = _store(torch.rsqrt(var + eps))
        scale = rstd * weight
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return (wide * _broadcast(_store(scale), x) + _broadcast(_store(bias - mean * scale), x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        wide, g, positions = _widen(x), _widen(grad), tuple(range(2, x.ndim))
        count = x[0, 0].numel()
        by_x, alone = (g * wide).sum(positions), g.sum(positions)  # (B, C)
        covariance = _average_groups((by_x - alone * mean) * weight, ctx.groups) / count
        slope = -covariance * rstd**3
        shift = -_average_groups(alone * weight, ctx.groups) / count * rstd - slope * mean
        dx = g * _broadcast(_store(rstd * weight), x) + wide * _broadcast(_store(slope), x)
        dx = (dx + _broadcast(_store(shift), x)).to(x.dtype)
        return dx, ((by_x - alone * mean) * rstd).sum(0).to(weight.dtype), alone.sum(0).to(weight.dtype), None, None


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _average_groups(values: Tensor, groups: int) -> Tensor:
    """Replace values (B, C) by the mean of their group."""
    grouped = values.view(len(values), groups, -1)
    # no `reshape` before it is stored: Inductor's loops over a division by 12 channels a group fail
    return _store(grouped.mean(2, keepdim=True).expand_as(grouped), values)


def _store(values: Tensor, like: Tensor | None = None) -> Tensor:
    """Have values (B, C) written to memory: otherwise each position computes them again, and one by one."""
    shape = values.shape if like is None else like.shape
    return values.contiguous().as_strided(shape, (shape[1], 1))


def _broadcast(values: Tensor, x: Tensor) -> Tensor:
    return values.view(*values.shape, *[1] * (x.ndim - 2))


def hashed_mask(like: Tensor, p: float) -> Tensor:
    """Draw the values that dropout keeps, bool (B, C, *spatial): a hash of each position and two random numbers.

    The hash is that of C. Wellons, "Prospecting for hash functions" (2018), which mixes all 32 bits.
    """
    seeds = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=like.device)
    last = torch.arange(like.numel(), dtype=torch.int32, device=like.device)
    h = last.view(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)  # neighbours are channels
    h = _mix(h ^ seeds[0], 16, 0x7FEB352D)
    h = _mix(h ^ seeds[1], 15, 0x846CA68B - 2**32)
    return h ^ ((h >> 16) & 0xFFFF) >= round(p * 2**32) - 2**31


def _mix(h: Tensor, bits: int, factor: int) -> Tensor:
    """Spread bits upwards after folding the upper ones down; int32 wraps around."""
    return (h ^ ((h >> bits) & (2 ** (32 - bits) - 1))) * factor
