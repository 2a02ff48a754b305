"""The convolutions of a `UNet`: torch's own, or on a CPU faster ways to the same numbers where those pay."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from unet_denoiser.models.layers.winograd import convolve, first_block_only, transform_weight, weight_gradient

_KEPT = 2**30  # bytes of transformed weights that inference keeps
_WORTH = 0.95  # share of the plain convolution's time from which on the filtering is used
_enabled = True
_assumed_device: str | None = None


@contextmanager
def plain_convolutions() -> Iterator[None]:
    """Within it, networks use torch's own convolutions and autograd: the reference for this file and `recompute.py`."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


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


class Conv2d(nn.Conv2d):
    """nn.Conv2d; on a CPU, 3x3 by Winograd's filtering and 1x1 as a matrix product where these are faster."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, training=torch.is_grad_enabled())

    def run(self, x: Tensor, training: bool) -> Tensor:
        """The convolution; `training` says that the weights change after each call, so that nothing is kept of them."""
        if only_plain() or not is_on_cpu(x) or x.ndim != 4:
            return super().forward(x)
        if winograd_pays(self, x, training):
            if torch.compiler.is_compiling() or torch.is_grad_enabled():
                return conv3x3(x, self.weight, self.bias, not training)
            return convolve_3x3(x, self.weight, self.bias, cache=not training)
        if _is_pointwise(self) and is_channels_last(x):
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        if x.shape[0] * x.shape[2] * x.shape[3] <= 256 and self.weight.numel() >= 128 * 128 * 9:
            x = x.contiguous()  # so few pixels cost less than the reordering of so many weights for channels last
        return super().forward(x)


def only_plain() -> bool:
    """Whether torch's own convolutions are asked for, or needed: by exporting, function transforms, forward mode."""
    if not _enabled or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return True
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


CONV: dict[int, Any] = {1: nn.Conv1d, 2: Conv2d, 3: nn.Conv3d}


# ---- Winograd's filtering where it pays ------------------------------------------------------------------------------


def winograd_pays(conv: nn.Conv2d, x: Tensor, training: bool) -> bool:
    """Whether the filtering is faster than torch's convolution.

    Not for strides and other kernels, in other precisions, where its rounding shows, nor on other devices, whose
    libraries have it; else by `winograd_share`.
    """
    if conv.kernel_size != (3, 3) or not conv.stride == conv.padding == conv.dilation == (1, 1):
        return False
    if conv.groups != 1 or conv.padding_mode != "zeros" or not is_on_cpu(x):
        return False
    if torch.is_autocast_enabled("cpu") or not x.dtype == conv.weight.dtype == torch.float32:
        return False
    kept = not training and _may_keep(conv.weight)
    return bool(winograd_share(conv.in_channels, conv.out_channels, x.shape, kept) <= _WORTH)


def winograd_share(in_ch: int, out_ch: int, shape: Sequence[int], kept: bool) -> float:
    """The time of the filtering as a share of torch's convolution, fitted to what `benchmarks/winograd.py` measured.

    A quarter of the multiplications and what comes with them, the transforms of input and output, which count more
    the fewer the channels are, both for whole tiles, and more for partly empty ones, which are few or small; reading
    the transformed weights or making them, which cost as much as the convolution of so many pixels; and the time of
    some twenty calls of torch.

    Args:
        shape: (N, C, H, W) of the input.
        kept: the transformed weights are there.
    """
    images, _, height, width = shape
    pixels, in_tiles = images * height * width, images * 16 * -(-height // 4) * -(-width // 4)
    arithmetic = (in_tiles / pixels) ** 1.5 * (0.28 + 24 / in_ch + 24 / out_ch)
    return arithmetic + (60 if kept else 220) / pixels + 1.2e6 / (pixels * in_ch * out_ch)


class _Transformed(NamedTuple):
    """Transformed weights, and what tells that the weights have changed since."""

    weight: Tensor
    version: int
    sample: Tensor


_transformed: Any = WeakTensorKeyDictionary()


def _may_keep(weight: Tensor) -> bool:
    """Whether the transformed weights, four times as large, still fit into what is kept: 1 GiB in all."""
    if torch.compiler.is_compiling():
        return weight.numel() <= 2**22  # a graph cannot ask what is kept; the operator does, and may transform again
    if weight.is_inference():
        return False
    return (
        weight in _transformed or sum(kept.weight.nbytes for kept in _transformed.values()) + 4 * weight.nbytes <= _KEPT
    )


def _transform(weight: Tensor, pixels: int) -> Tensor:
    """Transformed weights, kept for the next call where making them takes a share of it: few pixels, many weights."""
    if pixels > 4096 or not _may_keep(weight):
        return transform_weight(weight, keep=False)
    kept = _transformed.get(weight)
    # a change through .data leaves the version as it is; but it seldom spares all of 1024 values, of all channels
    step = max(1, weight.numel() // 1024)
    while math.gcd(step, 9 * weight.shape[1]) > 1:
        step += 1
    sample = weight.detach().flatten()[::step].clone()
    if kept is None or kept.version != weight._version or not torch.equal(kept.sample, sample):
        whole = transform_weight(weight.detach()).contiguous()  # worth its time if used again
        kept = _transformed[weight] = _Transformed(whole, weight._version, sample)
    return kept.weight


def convolve_3x3(x: Tensor, weight: Tensor, bias: Tensor | None, *, cache: bool = False) -> Tensor:
    """The filtering of an image (N, C, H, W); `cache` may keep the transformed weights."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    transformed = _transform(weight, pixels) if cache else transform_weight(weight, keep=False)
    return convolve(x.permute(0, 2, 3, 1), transformed, bias).permute(0, 3, 1, 2)


def convolve_3x3_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the input, the weights and the bias, where `needs` says so."""
    grad = grad.permute(0, 2, 3, 1)
    dx = convolve(grad, transform_weight(weight, turned=True, keep=False)).permute(0, 3, 1, 2) if needs[0] else None
    dw = weight_gradient(x.permute(0, 2, 3, 1), grad) if needs[1] else None
    return dx, dw, grad.sum((0, 1, 2)) if needs[2] else None


@torch.library.custom_op("unet_denoiser::conv3x3", mutates_args=())
def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, cache: bool) -> Tensor:
    """Winograd's filtering as one operator, which torch.compile takes as it is."""
    return convolve_3x3(x, weight, bias, cache=cache)


@conv3x3.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, cache: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[3], weight.shape[0]).permute(0, 3, 1, 2)


@torch.library.custom_op("unet_denoiser::conv3x3_backward", mutates_args=())
def conv3x3_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weights and the bias."""
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
    if torch.is_grad_enabled():  # of gradients, too
        sizes = [[1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]]
        dx, dw, db = torch.ops.aten.convolution_backward(grad, *ctx.saved_tensors, [grad.shape[1]], *sizes)
    else:
        dx, dw, db = conv3x3_backward(grad, *ctx.saved_tensors)
    return dx, dw, db if ctx.has_bias else None, None


conv3x3.register_autograd(_backward, setup_context=_save)


def channels_last(x: Tensor) -> Tensor:
    """An image on a CPU in the layout that convolutions and norms there are fastest in, and which they hand on."""
    use = x.ndim == 4 and is_on_cpu(x) and not only_plain()
    return x.contiguous(memory_format=torch.channels_last) if use else x


def is_channels_last(x: Tensor) -> bool:
    """Whether an image lies in memory with its channels last."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
