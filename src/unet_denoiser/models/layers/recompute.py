"""Layers whose input is recomputed in the backward pass instead of kept, from a smaller number of kept tensors."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from unet_denoiser.models.layers.conv import CONV, Conv2d, convolve_3x3_backward
from unet_denoiser.models.layers.rules import has_hooks, recomputing_pays, requires_plain, winograd_pays


def recompute_input(
    input_fn: Callable[..., Tensor], layer: Any, x: Tensor, *more: Tensor | None, norm: nn.Module | None = None
) -> Tensor:
    """Compute layer(input_fn(x, *more)); the backward pass calls `input_fn` again instead of keeping its result.

    Function transforms, and modules that are hooked, wrapped or replaced, take torch's own autograd. So does all that
    `recomputing_pays` excludes.

    Args:
        input_fn: a norm, activation or resampling, which costs little beside the layer.
        layer: a convolution or a linear layer.
        norm: the module that `input_fn` calls, if any.
    """
    modules = [layer] if norm is None else [layer, norm]
    plain = (
        not torch.is_grad_enabled()
        or type(layer) not in (nn.Linear, *CONV.values())
        or not recomputing_pays(x, layer)
        or requires_plain()
        or any(map(has_hooks, modules))
        or getattr(layer, "padding_mode", "zeros") != "zeros"
        or isinstance(getattr(layer, "padding", 0), str)
    )
    if plain:
        return layer(input_fn(x, *more))
    norm = nn.Module() if norm is None else norm
    parameters = list(norm.parameters())
    return _RecomputeInput.apply(input_fn, layer, norm, 1 + len(more), x, *more, *parameters, layer.weight, layer.bias)


class _RecomputeInput(torch.autograd.Function):
    """The autograd step of `recompute_input`.

    Its tensors are `count` inputs of `input_fn`, the parameters of the norm, and the layer's weight and bias.
    """

    @staticmethod
    def forward(ctx: Any, input_fn: Any, layer: Any, norm: nn.Module, count: int, *tensors: Tensor | None) -> Tensor:
        ctx.input_fn, ctx.layer, ctx.norm, ctx.count = input_fn, layer, norm, count
        ctx.names = [name for name, _ in norm.named_parameters()]
        ctx.autocast = _current_autocast(layer.weight.device.type)
        ctx.save_for_backward(*tensors)
        h = input_fn(*tensors[:count])
        # autograd is off in here, but this is training
        return layer.run(h, training=True) if isinstance(layer, Conv2d) else layer(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *others, weight, bias = ctx.saved_tensors
        count = ctx.count
        # with torch.func.functional_call, the norm's parameters differ by then from those of the forward call
        parameters = dict(zip(ctx.names, others[count:], strict=True))
        if torch.is_grad_enabled():  # second derivatives: differentiable operations only
            with _reparametrize_module(ctx.norm, parameters), ctx.autocast():
                call = F.linear if isinstance(ctx.layer, nn.Linear) else ctx.layer._conv_forward
                out = call(ctx.input_fn(*others[:count]), weight, bias)
            return None, None, None, None, *_gradients(out, [*others, weight, bias], grad, create_graph=True)
        inputs = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in others[:count]]
        with torch.enable_grad(), ctx.autocast(), _reparametrize_module(ctx.norm, parameters):
            h = ctx.input_fn(*inputs)
        needs = (True, weight.requires_grad, bias is not None and bias.requires_grad)
        if grad.dtype == torch.float32 and isinstance(ctx.layer, Conv2d) and winograd_pays(ctx.layer, h, training=True):
            dh, dw, db = convolve_3x3_backward(grad, h.detach(), weight, needs)
        else:
            dh, dw, db = _layer_gradients(ctx.layer, grad, h.detach(), weight, needs)
        return None, None, None, None, *_gradients(h, [*inputs, *others[count:]], dh), dw, db


def _current_autocast(device: str) -> Callable[[], Any]:
    """Return the current autocast as a context for the backward pass, which runs outside of it."""
    if not torch.amp.is_autocast_available(device):  # for example "meta"
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled)


def _gradients(out: Tensor, inputs: list[Tensor | None], grad: Any, create_graph: bool = False) -> list[Tensor | None]:
    """Compute the gradient of each input, None for one that requires none."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=create_graph))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _layer_gradients(layer: Any, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> Any:
    """Compute the gradients of input, weight and bias of a linear layer or convolution, each if `needs` says so."""
    x, w = x.to(grad.dtype), weight.to(grad.dtype)  # as autocast had them
    if isinstance(layer, nn.Linear):
        flat = grad.flatten(0, -2)
        dx, dw, db = grad @ w, flat.t() @ x.flatten(0, -2) if needs[1] else None, flat.sum(0) if needs[2] else None
    else:
        options = [layer.stride, layer.padding, layer.dilation, False, [0] * len(layer.stride), layer.groups]
        dx, dw, db = torch.ops.aten.convolution_backward(grad, x, w, [layer.out_channels], *options, needs)
    return dx, None if dw is None else dw.to(weight.dtype), None if db is None else db.to(weight.dtype)
