"""Which way each layer computes: the one that measures fastest for a device, a precision and a size.

    device, precision       memory format    3x3 convolution               norm, SiLU, dropout      attention
    CPU, float32            channels last    Winograd where it pays        kernels.cpp, recomputed  torch's fused one
    CPU, bfloat16           channels last    torch's                       kernels.cpp, recomputed  products, if few
    CPU, few pixels trained as given         torch's                       torch's, kept            as above
    CPU, compiled           channels last    Winograd where it pays        the compiler's           torch's fused one
    GPU, any                as given         torch's                       torch's, kept            torch's fused one

On a CPU, `prepare_to_sample` stores weights with the channels last too.

The measurements are in docs/results: performance.md for CPUs, gpu.md for a GPU. Each way has the same result up to
rounding, and `plain_convolutions` switches all of them off.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from unet_denoiser.models.layers import weight_cache
from unet_denoiser.models.layers.kernels import load_kernels
from unet_denoiser.models.layers.winograd import first_block_only

_MAX_TIME_RATIO = 0.95  # Winograd's filtering is used up to this ratio of its time to torch's
# recomputing costs a share of a layer's time that falls with its channels: 5 to 7 % of the step in a network of 32 and
# 64, 2 to 4 % in wider ones; for less than half a MiB up to a fifth, by the number of calls
_MIN_RECOMPUTE_CHANNELS, _MIN_RECOMPUTE_NUMEL = 128, 2**17
# of Winograd's filtering, see `winograd_time_ratio`: per channel, per pixel with kept and with new weights;
# with vectors of 512 bits it gains less on torch's convolutions
_WINOGRAD_COSTS = {"AVX512": (38, 110, 300)}.get(torch.backends.cpu.get_cpu_capability(), (24, 60, 220))
_MIN_TRAINED_PIXELS = 256  # of a batch's images, to train with the channels last
_MAX_SCORES = 2**22  # of an attention by products: more leave the cache
_PLAIN = (Tensor, nn.Parameter, FakeTensor)  # not, for example, a part of a sharded tensor
_plain = False
AnyModule = TypeVar("AnyModule", bound=nn.Module)
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


def has_hooks(module: nn.Module) -> bool:
    """Return True if a hook sees the module's calls, or if its `forward` was replaced."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module) or _has_any_global_hook()


def preferred_layout(x: Tensor) -> Tensor:
    """Return a network's input in the layout that all that follows keeps: its channels last on a CPU.

    On few pixels a training step is up to a quarter faster in the layout given, which the weights' gradients have too.
    """
    few = torch.is_grad_enabled() and not torch.compiler.is_compiling() and x.ndim == 4 and not requires_plain()
    return x if few and x[:, 0].numel() <= _MIN_TRAINED_PIXELS else channels_last(x)


def channels_last(x: Tensor) -> Tensor:
    """Return an image on a CPU with its channels last, with which convolutions and norms are fastest there."""
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
    return is_winograd_kind(conv, x) and is_winograd_faster(conv.weight, x, cache=not training)


def is_winograd_kind(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return True if a convolution of x is one that Winograd's filtering computes, whatever its size."""
    if conv.kernel_size != (3, 3) or not conv.stride == conv.padding == conv.dilation == (1, 1):
        return False
    if _least_time_ratio(conv.in_channels, conv.out_channels) > _MAX_TIME_RATIO:
        return False
    if conv.groups != 1 or conv.padding_mode != "zeros" or not is_on_cpu(x):
        return False
    return not torch.is_autocast_enabled("cpu") and x.dtype == conv.weight.dtype == torch.float32


def is_winograd_faster(weight: Tensor, x: Tensor, cache: bool) -> bool:
    """Return True if Winograd's filtering of x is faster than torch's convolution, and as precise."""
    if not torch.compiler.is_compiling() and not products_are_float32():
        return False
    out_ch, in_ch = weight.shape[:2]
    return bool(winograd_time_ratio(in_ch, out_ch, x.shape, cache and can_keep_transformed(weight)) <= _MAX_TIME_RATIO)


def products_are_float32() -> bool:
    """Return True if a CPU multiplies float32 matrices in float32, not by bfloat16 or TF32 units.

    With bfloat16 units, Winograd's filtering has an error of 7e-2 where a plain convolution has 8e-3.
    """
    mkldnn = getattr(torch.backends.mkldnn, "matmul", None)  # torch >= 2.9
    if mkldnn is None:
        return torch.get_float32_matmul_precision() != "medium"
    return mkldnn.fp32_precision in ("none", "ieee")


def channels_last_costs(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return True for few pixels and many weights: reordering these takes longer than the rest of the convolution."""
    few = x.shape[0] * x.shape[2] * x.shape[3] <= 256 and conv.weight.numel() >= 128 * 128 * 9
    return few and not is_channels_last(conv.weight)


def prepare_to_sample(model: AnyModule) -> AnyModule:
    """Put the channels of convolutions' weights last on a CPU, so that calls need not reorder them; return the network.

    Values stay the same. It is for networks that are loaded to sample from: gradients, optimizers and other libraries'
    files expect contiguous weights.
    """
    for weight in model.parameters():
        if weight.ndim == 4 and is_on_cpu(weight):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return model


def has_static_shape(x: Tensor) -> bool:
    """Return True if the compiler knows each axis of x as a number; asking adds no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads sympy

    return all(statically_known_true(n < 2**48) for n in x.shape)


def winograd_time_ratio(in_ch: int, out_ch: int, shape: Sequence[int], cached: bool) -> float:
    """Estimate the time of Winograd's filtering over that of torch's convolution.

    Fitted to measurements of `benchmarks/winograd.py` and of whole networks, where its share is smaller than alone,
    on a processor with AVX2 and on one with AVX-512. The first term is a quarter of the multiplications, and the
    transforms of input and output, which weigh more with few channels; both count whole tiles, and partly empty tiles
    cost more. The second is reading the transformed weights, or making them. The third is some twenty calls of torch.

    Args:
        shape: (N, C, H, W) of the input.
        cached: the transformed weights are cached.
    """
    images, _, height, width = shape
    pixels, in_tiles = images * height * width, images * 16 * -(-height // 4) * -(-width // 4)
    _, kept, anew = _WINOGRAD_COSTS
    arithmetic = (in_tiles / pixels) ** 1.5 * _least_time_ratio(in_ch, out_ch)
    return arithmetic + (kept if cached else anew) / pixels + 1.2e6 / (pixels * in_ch * out_ch)


def _least_time_ratio(in_ch: int, out_ch: int) -> float:
    """Return the time ratio of many pixels in whole tiles."""
    return 0.28 + _WINOGRAD_COSTS[0] * (1 / in_ch + 1 / out_ch)


def can_keep_transformed(weight: Tensor) -> bool:
    """Return True if the transformed weights, which are four times as large, are in the cache or fit into it."""
    if torch.compiler.is_compiling():
        return weight.numel() <= 2**22  # a graph cannot ask the cache; the operator does, and may transform again
    return weight_cache.can_keep(weight, 4 * weight.nbytes)


def recomputing_pays(x: Tensor, layer: nn.Module) -> bool:
    """Return True if what is computed from x before a layer costs little to compute twice, for what it saves.

    A GPU steps 1.25 to 1.6 times as fast without recomputing (docs/results/gpu.md).
    """
    if torch.compiler.is_compiling() or not is_on_cpu(x) or x.numel() < _MIN_RECOMPUTE_NUMEL:
        return False
    weight = layer.weight
    return isinstance(weight, Tensor) and len(weight) >= _MIN_RECOMPUTE_CHANNELS


def has_norm_kernel(norm: nn.GroupNorm, x: Tensor, modulation: tuple[Tensor | None, ...]) -> bool:
    """Return True if kernels.cpp computes a norm of x: on a CPU, channels last, in float32 or bfloat16."""
    weight, bias = norm.weight, norm.bias
    return (
        not torch.compiler.is_compiling()
        and not requires_plain()
        and load_kernels() is not None
        and (x.dtype is torch.float32 or x.dtype is torch.bfloat16)
        and is_channels_last(x)
        and is_on_cpu(x)
        and x.numel() > 0
        and (type(x) in _PLAIN and type(weight) in _PLAIN and type(bias) in _PLAIN)
        and (weight.dtype is torch.float32 or weight.dtype is x.dtype)
        and all(t is None or (t.dtype is x.dtype and t.stride(1) == 1) for t in modulation)
        and not has_hooks(norm)
    )


def products_pay(q: Tensor, k: Tensor) -> bool:
    """Return True if two products and a softmax are faster than torch's fused attention: bfloat16 on a CPU.

    The fused one of torch 2.13 takes 1.3 to 2 times as long there, its backward pass 2 to 5 times, until the scores no
    longer fit the cache (docs/results/performance.md).
    """
    if q.dtype is not torch.bfloat16 or torch.compiler.is_compiling() or not is_on_cpu(q) or requires_plain():
        return False
    return q.shape[:-1].numel() * k.shape[-2] <= _MAX_SCORES
