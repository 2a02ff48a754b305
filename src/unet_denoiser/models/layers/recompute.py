"""Layers that do not keep their input for the backward pass, but compute it again from what is before it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.stateless import _reparametrize_module

from unet_denoiser.models.layers.conv import CONV, Conv2d, convolve_3x3_backward, only_plain, winograd_pays

_SMALL = 2**17  # values of x: computing fewer again costs up to a fifth of the step, by its calls, and saves little


def recomputed(
    cheap: Callable[..., Tensor], layer: Any, x: Tensor, *more: Tensor | None, norm: nn.Module | None = None
) -> Tensor:
    """layer(cheap(x, *more)), where the backward pass computes `cheap` again instead of keeping its result.

    Args:
        cheap: a norm, an activation, a resampling: what costs little beside the layer.
        layer: a convolution or a linear layer.
        norm: the module that `cheap` calls, if any.

    What is small, function transforms, and modules that something else has wrapped, hooked or replaced, take the plain
    way, torch's own autograd.
    """
    modules = [layer] if norm is None else [layer, norm]
    plain = (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or only_plain()
        or x.numel() < _SMALL
        or any(map(watched, modules))
        or type(layer) not in (nn.Linear, *CONV.values())
        or getattr(layer, "padding_mode", "zeros") != "zeros"
        or isinstance(getattr(layer, "padding", 0), str)
    )
    if plain:
        return layer(cheap(x, *more))
    norm = nn.Module() if norm is None else norm
    parameters = list(norm.parameters())
    return _Recomputed.apply(cheap, layer, norm, 1 + len(more), x, *more, *parameters, layer.weight, layer.bias)


def watched(module: nn.Module) -> bool:
    """Whether something hooks the module's calls, or has put its own `forward` into it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module) or _has_any_global_hook()


class _Recomputed(torch.autograd.Function):
    """The autograd step of `recomputed`: inputs of `cheap`, parameters of its norm, weight and bias."""

    @staticmethod
    def forward(ctx: Any, cheap: Any, layer: Any, norm: nn.Module, count: int, *tensors: Tensor | None) -> Tensor:
        ctx.cheap, ctx.layer, ctx.norm, ctx.count = cheap, layer, norm, count
        ctx.names = [name for name, _ in norm.named_parameters()]
        ctx.autocast = _autocast_now(layer.weight.device.type)
        ctx.save_for_backward(*tensors)
        h = cheap(*tensors[:count])
        # autograd is off in here, but this is training
        return layer.run(h, training=True) if isinstance(layer, Conv2d) else layer(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *others, weight, bias = ctx.saved_tensors
        count = ctx.count
        # the norm's parameters now may not be those of the forward call (torch.func.functional_call)
        lent = dict(zip(ctx.names, others[count:], strict=True))
        if torch.is_grad_enabled():  # gradients of gradients: plainly, so that autograd sees all of it
            with _reparametrize_module(ctx.norm, lent), ctx.autocast():
                call = F.linear if isinstance(ctx.layer, nn.Linear) else ctx.layer._conv_forward
                out = call(ctx.cheap(*others[:count]), weight, bias)
            return None, None, None, None, *_gradients(out, [*others, weight, bias], grad, create_graph=True)
        inputs = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in others[:count]]
        with torch.enable_grad(), ctx.autocast(), _reparametrize_module(ctx.norm, lent):
            h = ctx.cheap(*inputs)
        needs = (True, weight.requires_grad, bias is not None and bias.requires_grad)
        if grad.dtype == torch.float32 and isinstance(ctx.layer, Conv2d) and winograd_pays(ctx.layer, h, training=True):
            dh, dw, db = convolve_3x3_backward(grad, h.detach(), weight, needs)
        else:
            dh, dw, db = _plain_backward(ctx.layer, grad, h.detach(), weight, needs)
        return None, None, None, None, *_gradients(h, [*inputs, *others[count:]], dh), dw, db


def _autocast_now(device: str) -> Callable[[], Any]:
    """The autocast that is on, as a context for the backward pass, where it is not."""
    if not torch.amp.is_autocast_available(device):  # of the meta device, for one
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled)


def _gradients(out: Tensor, inputs: list[Tensor | None], grad: Any, create_graph: bool = False) -> list[Tensor | None]:
    """One for each input, None for those that want none."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=create_graph))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _plain_backward(layer: Any, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> Any:
    x, w = x.to(grad.dtype), weight.to(grad.dtype)  # as autocast had them
    if isinstance(layer, nn.Linear):
        rows = grad.flatten(0, -2)
        dx, dw, db = grad @ w, rows.t() @ x.flatten(0, -2) if needs[1] else None, rows.sum(0) if needs[2] else None
    else:
        sizes = [layer.stride, layer.padding, layer.dilation, False, [0] * len(layer.stride), layer.groups]
        dx, dw, db = torch.ops.aten.convolution_backward(grad, x, w, [layer.out_channels], *sizes, needs)
    return dx, None if dw is None else dw.to(weight.dtype), None if db is None else db.to(weight.dtype)
