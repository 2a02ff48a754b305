"""GroupNorm (Wu and He 2018, arXiv 1803.08494), alone or with what follows it: modulation, SiLU, dropout."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from unet_denoiser.models.layers.common import may_overwrite_output
from unet_denoiser.models.layers.kernels import PROBLEM, require_kernels
from unet_denoiser.models.layers.rules import has_norm_kernel
from unet_denoiser.models.layers.traced import group_norm_by_sums, is_generated
from unet_denoiser.utils.broadcasting import append_dims

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_MIN_NUMEL_FOR_THREADS = 2**11  # few, since torch's next operation would find the values in one core's cache


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm that also accepts a single value per group (one sample of one position)."""

    def forward(self, x: Tensor) -> Tensor:
        if has_norm_kernel(self, x, ()):
            return _fused(self, x, Modulation(), Activation(used=False))
        if is_generated(x) and x.ndim > 2:
            return group_norm_by_sums(x, self)
        trained = torch.is_grad_enabled() and (self.weight.requires_grad or self.bias.requires_grad)
        last = _CHANNELS_LAST.get(x.ndim)
        if trained and not x.requires_grad and x.device.type == "cpu" and last and x.is_contiguous(memory_format=last):
            # torch 2.13 crashes if weight or bias, but not the input, need a gradient while the channels are last
            out = torch.group_norm(x.contiguous(), self.num_groups, self.weight, self.bias, self.eps)
            return out.contiguous(memory_format=last)
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def group_norm(channels: int, groups: int = 32, eps: float = 1e-5) -> GroupNorm:
    """Return a GroupNorm with the largest number of groups that divides `channels` and is at most `groups`.

    Outputs of trained networks depend on this rule; a test pins it.
    """
    return GroupNorm(max(g for g in range(1, min(groups, channels) + 1) if channels % g == 0), channels, eps=eps)


class Modulation(NamedTuple):
    """The embedding (N, C) of a residual block, added before its norm (`pre`) or as scale and shift after it."""

    pre: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    @classmethod
    def of(cls, first: Tensor, second: Tensor | None = None) -> Self:
        """Return the modulation by one tensor, `pre`, or by two, scale and shift."""
        return cls(first) if second is None else cls(None, first, second)


class Activation(NamedTuple):
    """SiLU, if `used`, then dropout: `keep` (bool, of the input's shape) has the values to keep, times `keep_scale`."""

    used: bool = True
    keep: Tensor | None = None
    keep_scale: float = 1.0


_NO_MODULATION, _SILU = Modulation(), Activation()


def norm_act(
    norm: nn.GroupNorm, x: Tensor, modulation: Modulation = _NO_MODULATION, activation: Activation = _SILU
) -> Tensor:
    """Compute norm, modulation and activation: in one step on a CPU, where kernels.cpp can be compiled."""
    if type(norm) is GroupNorm and has_norm_kernel(norm, x, modulation):
        return _fused(norm, x, modulation, activation)
    return _separate(norm, x, modulation, activation, inplace=may_overwrite_output(norm))


def _separate(
    norm: Callable[[Tensor], Tensor], x: Tensor, modulation: Modulation, activation: Activation, inplace: bool = False
) -> Tensor:
    """Compute norm, modulation and activation by torch's operations."""
    pre, scale, shift = (None if t is None else append_dims(t, x.ndim) for t in modulation)
    h = norm(x if pre is None else x + pre)
    if scale is not None and shift is not None:
        h = torch.addcmul(shift, h, 1 + scale)
    h = F.silu(h, inplace=inplace) if activation.used else h
    return h if activation.keep is None else torch.where(activation.keep, h, 0.0).mul_(activation.keep_scale)


def _fused(norm: nn.GroupNorm, x: Tensor, modulation: Modulation, activation: Activation) -> Tensor:
    if activation.keep is not None:
        activation = activation._replace(keep=activation.keep.contiguous(memory_format=torch.channels_last))
    call = _Call(norm.num_groups, norm.eps, activation)
    if torch.is_grad_enabled():
        return _FusedNorm.apply(call, x, norm.weight, norm.bias, *modulation)
    return call.forward(x, norm.weight, norm.bias, *modulation)[0]


class _Call(NamedTuple):
    """A call of kernels.cpp."""

    groups: int
    eps: float
    activation: Activation

    def forward(self, x: Tensor, *vectors: Any) -> tuple[Tensor, Tensor]:
        """Return the output, and mean and inverse standard deviation (2, N, groups)."""
        y, statistics = torch.empty_like(x), x.new_empty((2, len(x), self.groups), dtype=torch.float32)
        self._call("norm_forward", x, vectors, y, statistics)
        return y, statistics

    def backward(self, x: Tensor, dy: Tensor, statistics: Tensor, *vectors: Any) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and, in (2 + 2 N, C), of weight, bias, and pre or scale and shift."""
        dx, gradients = torch.empty_like(x), x.new_empty((2 + 2 * len(x), x.shape[1]), dtype=torch.float32)
        dy = dy.contiguous(memory_format=torch.channels_last)
        self._call("norm_backward", x, vectors, dy, statistics, dx, gradients)
        return dx, gradients

    def _call(self, function: str, x: Tensor, vectors: tuple[Any, ...], *more: Tensor) -> None:
        if type(x) is not FakeTensor:  # which has a size, to count memory, but no values
            pointers = [t.data_ptr() for t in (x, *more)]
            getattr(require_kernels(), function)(self._pose(x, vectors), *pointers)

    def _pose(self, x: Tensor, vectors: tuple[Any, ...]) -> bytes:
        samples, channels, height, width = x.shape
        weight, bias, pre, scale, shift = vectors
        first = pre if scale is None else scale
        threads = torch.get_num_threads() if x.numel() >= _MIN_NUMEL_FOR_THREADS else 1
        sizes = (samples, height * width, channels, self.groups, threads, 0 if first is None else first.stride(0))
        used, keep, keep_scale = self.activation
        flags = (x.dtype is torch.bfloat16, weight.dtype is torch.bfloat16, used)
        pointers = [0 if t is None else t.data_ptr() for t in (weight, bias, pre, scale, shift, keep)]
        return PROBLEM.pack(*sizes, *flags, self.eps, keep_scale, *pointers)


class _FusedNorm(torch.autograd.Function):
    """The autograd step of `norm_act` by kernels.cpp: it keeps x and two numbers per group."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *vectors: Tensor | None) -> Tensor:
        y, statistics = call.forward(x, *vectors)
        ctx.call = call
        ctx.save_for_backward(x, statistics, *vectors)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, statistics, weight, bias, *modulation = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives: differentiable operations only
            groups, eps, activation = ctx.call
            norm = lambda x: torch.group_norm(x, groups, weight, bias, eps)  # noqa: E731
            inputs = (x, weight, bias, *modulation)
            y = _separate(norm, x, Modulation(*modulation), activation)
            wanted = [t for t in inputs if t is not None and t.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return None, *(next(found) if t is not None and t.requires_grad else None for t in inputs)
        dx, gradients = ctx.call.backward(x, dy, statistics, weight, bias, *modulation)
        dweight, dbias = gradients[0].to(weight.dtype), gradients[1].to(weight.dtype)
        pre, scale, _ = modulation
        if pre is None and scale is None:
            return None, dx, dweight, dbias, None, None, None
        first, second = gradients[2:].to(x.dtype).split(len(x))
        return (
            (None, dx, dweight, dbias, first, None, None)
            if scale is None
            else (None, dx, dweight, dbias, None, first, second)
        )
