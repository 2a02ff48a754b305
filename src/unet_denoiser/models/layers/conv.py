"""The convolutions of a `UNet`: torch's, or on a CPU Winograd's filtering and matrix products if these are faster."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_denoiser.models.layers import weight_cache
from unet_denoiser.models.layers.rules import (
    can_keep_transformed,
    channels_last,
    channels_last_costs,
    has_static_shape,
    is_channels_last,
    is_on_cpu,
    is_winograd_faster,
    is_winograd_kind,
    requires_plain,
    winograd_pays,
)
from unet_denoiser.models.layers.winograd import convolve, transform_weight, weight_gradient

_MAX_CACHED_PIXELS = 4096  # with more pixels, transforming the weights takes a small share of the convolution's time


class Conv2d(nn.Conv2d):
    """nn.Conv2d; on a CPU, 3x3 by Winograd's filtering and 1x1 as a matrix product where these are faster."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, training=torch.is_grad_enabled())

    def run(self, x: Tensor, training: bool) -> Tensor:
        """Convolve x; in `training` the weights change after each call, so nothing is cached."""
        if requires_plain() or not is_on_cpu(x) or x.ndim != 4:
            return super().forward(x)
        if torch.compiler.is_compiling() and not has_static_shape(x):
            # each decision by size would be a guard, and each side of it another graph: the operator decides
            if is_winograd_kind(self, x):
                return conv3x3(x, self.weight, self.bias, not training)
            return super().forward(x)
        if winograd_pays(self, x, training):
            if torch.compiler.is_compiling() or torch.is_grad_enabled():
                return conv3x3(x, self.weight, self.bias, not training)
            return convolve_3x3(x, self.weight, self.bias, cache=not training)
        pointwise = self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1
        if pointwise and is_channels_last(x):
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        if is_channels_last(x) and channels_last_costs(self, x):
            return channels_last(super().forward(x.contiguous()))
        return super().forward(x)


CONV: dict[int, Any] = {1: nn.Conv1d, 2: Conv2d, 3: nn.Conv3d}


def _transform_cached(weight: Tensor, pixels: int) -> Tensor:
    """Transform weights, or take them from the cache, which is for few pixels: there it saves a share of the time."""
    if pixels > _MAX_CACHED_PIXELS or not can_keep_transformed(weight):
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
    if is_winograd_faster(weight, x, cache):
        return convolve_3x3(x, weight, bias, cache=cache)
    return F.conv2d(x, weight, bias, padding=1).contiguous(memory_format=torch.channels_last)


@conv3x3.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, cache: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[3], weight.shape[0]).permute(0, 3, 1, 2)


@torch.library.custom_op("unet_denoiser::conv3x3_backward", mutates_args=())
def conv3x3_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of input, weights and bias as one operator."""
    if not is_winograd_faster(weight, x, cache=False):
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
