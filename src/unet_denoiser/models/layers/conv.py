"""The convolutions of a `UNet`: torch's, or on a CPU Winograd's filtering and matrix products if these are faster."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from unet_denoiser.models.layers import weight_cache
from unet_denoiser.models.layers.winograd import convolve, first_block_only, transform_weight, weight_gradient

_MAX_TIME_RATIO = 0.95  # Winograd's filtering is used up to this ratio of its time to torch's
_MAX_CACHED_PIXELS = 4096  # with more pixels, transforming the weights takes a small share of the convolution's time
_plain = False
_assumed_device: str | None = None


@contextmanager
def plain_convolutions() -> Iterator[None]:
    """Within it, use torch's own convolutions and autograd: the reference for this file and `recompute.py`."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


@contextmanager
def convolutions_as_on(device: str) -> Iterator[None]:
    """Within it, convolve tensors on a CPU as tensors on `device` are convolved: to count memory without storage.

    On a "cpu", one block of tiles stands for all: the others use the same memory.
    """
    global _assumed_device
    before, _assumed_device = _assumed_device, device
    try:
        with first_block_only() if device == "cpu" else nullcontext():
            yield
    finally:
        _assumed_device = before


def is_on_cpu(x: Tensor) -> bool:
    """Return True if x is on a CPU, and no other device is assumed (`convolutions_as_on`)."""
    return x.device.type == "cpu" and _assumed_device in (None, "cpu")


def requires_plain() -> bool:
    """Return True if torch's own convolutions are asked for, or needed: export, function transforms, forward mode."""
    if _plain or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return True
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


class Conv2d(nn.Conv2d):
    """nn.Conv2d; on a CPU, 3x3 by Winograd's filtering and 1x1 as a matrix product where these are faster."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, training=torch.is_grad_enabled())

    def run(self, x: Tensor, training: bool) -> Tensor:
        """Convolve x; in `training` the weights change after each call, so nothing is cached."""
        if requires_plain() or not is_on_cpu(x) or x.ndim != 4:
            return super().forward(x)
        if torch.compiler.is_compiling() and not _has_static_shape(x):
            # each decision by size would be a guard, and each side of it another graph: the operator decides
            if _is_winograd_kind(self, x):
                return conv3x3(x, self.weight, self.bias, not training)
            return super().forward(x)
        if winograd_pays(self, x, training):
            if torch.compiler.is_compiling() or torch.is_grad_enabled():
                return conv3x3(x, self.weight, self.bias, not training)
            return convolve_3x3(x, self.weight, self.bias, cache=not training)
        pointwise = self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1
        if pointwise and is_channels_last(x):
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        if x.shape[0] * x.shape[2] * x.shape[3] <= 256 and self.weight.numel() >= 128 * 128 * 9:
            # channels last would reorder the weights, which takes longer than these few pixels
            return channels_last(super().forward(x.contiguous()))
        return super().forward(x)


CONV: dict[int, Any] = {1: nn.Conv1d, 2: Conv2d, 3: nn.Conv3d}


def channels_last(x: Tensor) -> Tensor:
    """Return an image on a CPU with its channels last: convolutions and norms there are fastest so, and keep it."""
    use = x.ndim == 4 and is_on_cpu(x) and not requires_plain()
    return x.contiguous(memory_format=torch.channels_last) if use else x


def is_channels_last(x: Tensor) -> bool:
    """Return True if x is an image (N, C, H, W) whose channels are last in memory."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def winograd_pays(conv: nn.Conv2d, x: Tensor, training: bool) -> bool:
    """Return True if Winograd's filtering is faster than torch's convolution, by `winograd_time_ratio`.

    Never for strides and other kernels; nor in other precisions, where its rounding matters; nor on other devices,
    whose libraries have it.
    """
    return _is_winograd_kind(conv, x) and _is_winograd_faster(conv.weight, x, cache=not training)


def _is_winograd_kind(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return True if a convolution of x is one that Winograd's filtering computes, whatever its size."""
    if conv.kernel_size != (3, 3) or not conv.stride == conv.padding == conv.dilation == (1, 1):
        return False
    if _least_time_ratio(conv.in_channels, conv.out_channels) > _MAX_TIME_RATIO:
        return False
    if conv.groups != 1 or conv.padding_mode != "zeros" or not is_on_cpu(x):
        return False
    return not torch.is_autocast_enabled("cpu") and x.dtype == conv.weight.dtype == torch.float32


def _is_winograd_faster(weight: Tensor, x: Tensor, cache: bool) -> bool:
    out_ch, in_ch = weight.shape[:2]
    return bool(winograd_time_ratio(in_ch, out_ch, x.shape, cache and _fits_cache(weight)) <= _MAX_TIME_RATIO)


def _has_static_shape(x: Tensor) -> bool:
    """Return True if the compiler knows each axis of x as a number; asking adds no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads sympy

    return all(statically_known_true(n < 2**48) for n in x.shape)


def winograd_time_ratio(in_ch: int, out_ch: int, shape: Sequence[int], cached: bool) -> float:
    """Estimate the time of Winograd's filtering over that of torch's convolution.

    Fitted to measurements of `benchmarks/winograd.py`. The first term is a quarter of the multiplications, and the
    transforms of input and output, which weigh more with few channels; both count whole tiles, and partly empty tiles
    cost more. The second is reading the transformed weights, or making them. The third is some twenty calls of torch.

    Args:
        shape: (N, C, H, W) of the input.
        cached: the transformed weights are cached.
    """
    images, _, height, width = shape
    pixels, in_tiles = images * height * width, images * 16 * -(-height // 4) * -(-width // 4)
    arithmetic = (in_tiles / pixels) ** 1.5 * _least_time_ratio(in_ch, out_ch)
    return arithmetic + (60 if cached else 220) / pixels + 1.2e6 / (pixels * in_ch * out_ch)


def _least_time_ratio(in_ch: int, out_ch: int) -> float:
    """Return the time ratio of many pixels in whole tiles."""
    return 0.28 + 24 / in_ch + 24 / out_ch


def _fits_cache(weight: Tensor) -> bool:
    """Return True if the transformed weights, which are four times as large, are in the cache or fit into it."""
    if torch.compiler.is_compiling():
        return weight.numel() <= 2**22  # a graph cannot ask the cache; the operator does, and may transform again
    return weight_cache.can_keep(weight, 4 * weight.nbytes)


def _transform_cached(weight: Tensor, pixels: int) -> Tensor:
    """Transform weights, or take them from the cache, which is for few pixels: there it saves a share of the time."""
    if pixels > _MAX_CACHED_PIXELS or not _fits_cache(weight):
        return transform_weight(weight, scratch=True)
    return weight_cache.keep(weight, _transform)


def _transform(weight: Tensor) -> Tensor:
    return transform_weight(weight).contiguous()


def convolve_3x3(x: Tensor, weight: Tensor, bias: Tensor | None, *, cache: bool = False) -> Tensor:
    """Convolve images (N, C, H, W) by Winograd's filtering; `cache` may keep the transformed weights."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    transformed = _transform_cached(weight, pixels) if cache else transform_weight(weight, scratch=True)
    return convolve(x.permute(0, 2, 3, 1), transformed, bias).permute(0, 3, 1, 2)


def convolve_3x3_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of input, weights and bias, each if `needs` says so."""
    grad = grad.permute(0, 2, 3, 1)  # (N, H, W, K)
    dx = convolve(grad, transform_weight(weight, rotated=True, scratch=True)).permute(0, 3, 1, 2) if needs[0] else None
    dw = weight_gradient(x.permute(0, 2, 3, 1), grad) if needs[1] else None
    return dx, dw, grad.sum((0, 1, 2)) if needs[2] else None


@torch.library.custom_op("unet_denoiser::conv3x3", mutates_args=())
def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, cache: bool) -> Tensor:
    """Convolve as one operator, which torch.compile does not look into; for any size, by what is faster for it."""
    if _is_winograd_faster(weight, x, cache):
        return convolve_3x3(x, weight, bias, cache=cache)
    return F.conv2d(x, weight, bias, padding=1).contiguous(memory_format=torch.channels_last)


@conv3x3.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, cache: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[3], weight.shape[0]).permute(0, 3, 1, 2)


@torch.library.custom_op("unet_denoiser::conv3x3_backward", mutates_args=())
def conv3x3_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of input, weights and bias as one operator."""
    if not _is_winograd_faster(weight, x, cache=False):
        options = [[1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]]
        dx, dw, db = torch.ops.aten.convolution_backward(grad, x, weight, [len(weight)], *options)
        return dx.contiguous(memory_format=torch.channels_last), dw.contiguous(), db
    return convolve_3x3_backward(grad, x, weight, (True, True, True))  # type: ignore[return-value]


@conv3x3_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape[0], x.shape[2], x.shape[3], x.shape[1]).permute(0, 3, 1, 2)
    return dx, weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # second derivatives need torch's own operator
        options = [[1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]]
        dx, dw, db = torch.ops.aten.convolution_backward(grad, *ctx.saved_tensors, [grad.shape[1]], *options)
    else:
        dx, dw, db = conv3x3_backward(grad, *ctx.saved_tensors)
    return dx, dw, db if ctx.has_bias else None, None


conv3x3.register_autograd(_backward, setup_context=_save)
