"""The convolutions of a `UNet`: torch's own, or faster and leaner ways to the same numbers where those pay.

Two things, each beside its plain version: 3x3 convolutions by Winograd's filtering, and `recomputed`, which does not
keep a convolution's input for the backward pass but computes it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils.weak import WeakTensorKeyDictionary

from unet_denoiser.winograd import convolve, transform_weight, weight_gradient

_KEPT = 2**30  # bytes of transformed weights that inference keeps
_enabled = True


@contextmanager
def plain_convolutions() -> Iterator[None]:
    """Within it, networks use torch's own convolutions and autograd: the reference for all that is in this file."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


class Conv2d(nn.Conv2d):
    """nn.Conv2d; on a CPU, 3x3 by Winograd's filtering and 1x1 as a matrix product where these are faster."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, training=torch.is_grad_enabled())

    def run(self, x: Tensor, training: bool) -> Tensor:
        """The convolution; `training` says that the weights change after each call, so that nothing is kept of them."""
        if _only_plain() or x.device.type != "cpu" or x.ndim != 4:
            return super().forward(x)
        if winograd_pays(self, x, training):
            if torch.compiler.is_compiling() or torch.is_grad_enabled():
                return conv3x3(x, self.weight, self.bias, not training)
            return _convolve(x, self.weight, self.bias, cache=not training)
        if _is_pointwise(self) and is_channels_last(x):
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        if x.shape[0] * x.shape[2] * x.shape[3] <= 256:
            x = x.contiguous()  # so few pixels cost less than the weights' reordering for channels last
        return super().forward(x)


def _only_plain() -> bool:
    """Whether torch's own convolutions are asked for, or needed: by torch.export and by function transforms."""
    if not _enabled or torch.compiler.is_exporting():
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


CONV: dict[int, Any] = {1: nn.Conv1d, 2: Conv2d, 3: nn.Conv3d}


# ---- Winograd's filtering where it pays ------------------------------------------------------------------------------


def winograd_pays(conv: nn.Conv2d, x: Tensor, training: bool) -> bool:
    """Whether the filtering is faster than torch's convolution, by what `benchmarks/winograd.py` measured.

    Not with few channels (the transforms cost more than is saved), few pixels (transforming the weights costs as much
    as the convolution of 400 pixels does, unless they are kept) or half of the last tiles empty; not in other
    precisions, where its rounding shows, nor on other devices, whose libraries have it.
    """
    if conv.kernel_size != (3, 3) or not conv.stride == conv.padding == conv.dilation == (1, 1):
        return False
    if conv.groups != 1 or conv.padding_mode != "zeros":
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or conv.weight.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled("cpu") or min(conv.in_channels, conv.out_channels) < 64:
        return False
    rows, columns = -(-x.shape[2] // 4), -(-x.shape[3] // 4)
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    enough = pixels >= (128 if not training and _may_keep(conv.weight) else 1024)
    return bool(enough and 16 * rows * columns <= 1.3 * x.shape[2] * x.shape[3])


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
        return transform_weight(weight)
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


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *, cache: bool = False) -> Tensor:
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    transformed = _transform(weight, pixels) if cache else transform_weight(weight)
    return convolve(x.permute(0, 2, 3, 1), transformed, bias).permute(0, 3, 1, 2)


def _convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    grad = grad.permute(0, 2, 3, 1)
    dx = convolve(grad, transform_weight(weight, turned=True)).permute(0, 3, 1, 2) if needs[0] else None
    dw = weight_gradient(x.permute(0, 2, 3, 1), grad) if needs[1] else None
    return dx, dw, grad.sum((0, 1, 2)) if needs[2] else None


@torch.library.custom_op("unet_denoiser::conv3x3", mutates_args=())
def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, cache: bool) -> Tensor:
    """Winograd's filtering as one operator, which torch.compile takes as it is."""
    return _convolve(x, weight, bias, cache=cache)


@conv3x3.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, cache: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[3], weight.shape[0]).permute(0, 3, 1, 2)


@torch.library.custom_op("unet_denoiser::conv3x3_backward", mutates_args=())
def conv3x3_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weights and the bias."""
    return _convolve_backward(grad, x, weight, (True, True, True))  # type: ignore[return-value]


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
    use = x.ndim == 4 and x.device.type == "cpu" and not _only_plain()
    return x.contiguous(memory_format=torch.channels_last) if use else x


def is_channels_last(x: Tensor) -> bool:
    """Whether an image lies in memory with its channels last."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


# ---- a convolution that does not keep its input ----------------------------------------------------------------------


def recomputed(
    cheap: Callable[..., Tensor], conv: Any, *inputs: Tensor | None, norm: nn.Module | None = None
) -> Tensor:
    """conv(cheap(*inputs)), where the backward pass computes `cheap` again instead of keeping its result.

    Args:
        cheap: a norm, an activation, a resampling: what costs little beside the convolution.
        conv: a convolution.
        norm: the module that `cheap` calls, if any.

    Function transforms, and modules that something else has wrapped, hooked or replaced, take the plain way, torch's
    own autograd.
    """
    modules = [conv] if norm is None else [conv, norm]
    plain = (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or _only_plain()
        or any(map(watched, modules))
        or type(conv) not in CONV.values()
        or conv.padding_mode != "zeros"
        or isinstance(conv.padding, str)
    )
    if plain:
        return conv(cheap(*inputs))
    norm = nn.Module() if norm is None else norm
    parameters = list(norm.parameters())
    return _Recomputed.apply(cheap, conv, norm, len(inputs), *inputs, *parameters, conv.weight, conv.bias)


def watched(module: nn.Module) -> bool:
    """Whether something hooks the module's calls, or has put its own `forward` into it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module) or _has_any_global_hook()


class _Recomputed(torch.autograd.Function):
    """The autograd step of `recomputed`: inputs of `cheap`, parameters of its norm, weight and bias."""

    @staticmethod
    def forward(ctx: Any, cheap: Any, conv: Any, norm: nn.Module, count: int, *tensors: Tensor | None) -> Tensor:
        ctx.cheap, ctx.conv, ctx.norm, ctx.count = cheap, conv, norm, count
        ctx.names = [name for name, _ in norm.named_parameters()]
        device = conv.weight.device.type
        ctx.autocast = {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}
        ctx.save_for_backward(*tensors)
        h = cheap(*tensors[:count])
        # autograd is off in here, but this is training
        return conv.run(h, training=True) if isinstance(conv, Conv2d) else conv(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *others, weight, bias = ctx.saved_tensors
        device, count = weight.device.type, ctx.count
        # the norm's parameters now may not be those of the forward call (torch.func.functional_call)
        lent = dict(zip(ctx.names, others[count:], strict=True))
        if torch.is_grad_enabled():  # gradients of gradients: plainly, so that autograd sees all of it
            with _reparametrize_module(ctx.norm, lent), torch.autocast(device, **ctx.autocast):
                out = ctx.conv._conv_forward(ctx.cheap(*others[:count]), weight, bias)
            return None, None, None, None, *_gradients(out, [*others, weight, bias], grad, create_graph=True)
        inputs = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in others[:count]]
        with torch.enable_grad(), torch.autocast(device, **ctx.autocast), _reparametrize_module(ctx.norm, lent):
            h = ctx.cheap(*inputs)
        needs = (True, weight.requires_grad, bias is not None and bias.requires_grad)
        if winograd_pays(ctx.conv, h, training=True) and grad.dtype == torch.float32:
            dh, dw, db = _convolve_backward(grad, h.detach(), weight, needs)
        else:
            dh, dw, db = _plain_backward(ctx.conv, grad, h.detach(), weight, needs)
        return None, None, None, None, *_gradients(h, [*inputs, *others[count:]], dh), dw, db


def _gradients(out: Tensor, inputs: list[Tensor | None], grad: Any, create_graph: bool = False) -> list[Tensor | None]:
    """One for each input, None for those that want none."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=create_graph))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _plain_backward(conv: Any, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> Any:
    x, w = x.to(grad.dtype), weight.to(grad.dtype)  # as autocast had them
    sizes = [conv.stride, conv.padding, conv.dilation, False, [0] * len(conv.stride), conv.groups]
    dx, dw, db = torch.ops.aten.convolution_backward(grad, x, w, [conv.out_channels], *sizes, needs)
    return dx, None if dw is None else dw.to(weight.dtype), None if db is None else db.to(weight.dtype)
