"""What a training step needs: bytes by what they are for, and floating-point operations, without running one.

The network is walked forward and backward on tensors without storage, and every allocation and release is counted: what
is kept is what this code keeps (conv.py), with gradient checkpointing and autocast as they act.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unet_denoiser.config.memory import MemoryConfig
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.models.layers.conv import convolutions_as_on
from unet_denoiser.models.summary import count_flops, example_inputs
from unet_denoiser.models.unet import UNet

# glibc's heap keeps holes between longer-lived tensors: this share of what comes and goes, at most so many bytes, as
# large blocks seldom lie in it. Fitted to the measurements of docs/results/scaling.md; with
# MALLOC_MMAP_THRESHOLD_=65536 in the environment there are none, for twice the time
HOLES, MOST_HOLES = 0.9, 370 * 2**20
FLOAT = 4  # bytes: weights, gradients, moments and averages are float32, whatever autocast computes in


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device, and the floating-point operations of a step on all of them together.

    Args:
        parameters, optimizer, ema: this device's share, which is always there.
        gradients: this device's share, which is there from the backward pass to the optimizer's step.
        buffers: what DDP copies gradients into to send them, or the layers that FSDP has whole at a time.
        activations: what the forward pass keeps for the backward one.
        peak: the most of all together at any moment. Less than the sum, as activations go while gradients come; or
            more, by what single operations need for themselves.
        resident: on a CPU under Linux, the process's memory at the peak, which is more: see `HOLES`. Else the peak.
        flops: forward and backward pass of the whole batch; a multiplication and an addition count as two.
    """

    parameters: int
    optimizer: int
    ema: int
    gradients: int
    buffers: int
    activations: int
    peak: int
    resident: int
    flops: int


def estimate(config: UNetConfig, memory: MemoryConfig, device: str = "cpu") -> MemoryEstimate:
    """Memory and operations of one training step.

    Args:
        device: on a "cpu", the work space of the fast convolutions is counted; that of other devices' libraries is not.

    Raises:
        ValueError: an image size that is not one of the network's.
    """
    size, fsdp, half = _size(config, memory), memory.sharding == "fsdp", memory.mixed_precision != "no"
    keep_gradients = not fsdp and memory.gradient_accumulation_steps == 1
    batch = memory.batch_size // (memory.num_processes * memory.gradient_accumulation_steps)
    tokens, checkpointing = memory.context_tokens, memory.gradient_checkpointing
    step = _Step(config, batch, size, tokens, checkpointing, half, half and fsdp, keep_gradients, device)
    walk = _walk(step)
    share = FLOAT * -(-walk.parameters // (memory.num_processes if fsdp else 1))
    buffers = FLOAT * walk.parameters if memory.sharding == "ddp" else 0
    if fsdp:
        # weights of the block that runs and of the next, gradients of it and of the one before; in autocast's precision
        buffers = 4 * walk.largest_block * (FLOAT // 2 if half else FLOAT)
    moving = walk.peak + buffers + (0 if keep_gradients else share)
    always = share * (1 + memory.optimizer_states + memory.ema)
    return MemoryEstimate(
        parameters=share,
        optimizer=share * memory.optimizer_states,
        ema=share * memory.ema,
        gradients=share,
        buffers=buffers,
        activations=walk.kept,
        peak=always + moving,
        resident=always + moving + (min(int(HOLES * moving), MOST_HOLES) if device == "cpu" else 0),
        # the backward pass has two products for each of the forward one's; checkpointing runs that twice
        flops=memory.batch_size * _forward_flops(config, size, tokens) * (4 if checkpointing else 3),
    )


def _size(config: UNetConfig, memory: MemoryConfig) -> tuple[int, ...] | None:
    size = memory.image_size
    size = size * config.dims if size is not None and len(size) == 1 else size
    if size is not None and len(size) != config.dims:
        raise ValueError(f"image_size={size} must be one number, or {config.dims}")
    return size


class _Step(NamedTuple):
    """What one process does between two releases of its activations.

    half_weights: they are in autocast's precision, as FSDP gathers them, so that autocast has no copies to keep.
    keep_gradients: else each goes when it is done, as where it is added to one that is there, or sent away.
    """

    config: UNetConfig
    batch: int
    size: tuple[int, ...] | None
    context_tokens: int
    checkpointing: bool
    half: bool
    half_weights: bool
    keep_gradients: bool
    device: str


class _Walk(NamedTuple):
    """Numbers of parameters, of all and of the largest block; bytes kept by the forward pass, and at the peak."""

    parameters: int
    largest_block: int
    kept: int
    peak: int


@lru_cache(maxsize=32)
def _walk(step: _Step) -> _Walk:
    """Both passes of a network without storage; the parameters' own bytes are left out."""
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    dtype = torch.bfloat16 if step.half_weights else torch.float32
    with FakeTensorMode(), convolutions_as_on(step.device), _default_dtype(dtype):
        model = UNet.from_config(step.config).train()
        model.gradient_checkpointing = step.checkpointing
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        if not step.keep_gradients:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(_drop_gradient)
        with _Live(own) as live:
            given = example_inputs(step.config, batch=step.batch, context_tokens=step.context_tokens, size=step.size)
            held = [torch.zeros_like(given["x"]) for _ in ("clean data", "noise")]
            autocast = torch.autocast("cpu", torch.bfloat16) if step.half else nullcontext()
            with autocast, saved_tensors_hooks(pack, lambda tensor: tensor):
                out = model(**given)
            kept = sum(storage.nbytes() for address, storage in saved.items() if address not in own)
            saved.clear()
            out.float().square().mean().backward()
            del held, out
    blocks = (*model.encoder, *model.bottleneck, *model.decoder)
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    return _Walk(sum(p.numel() for p in model.parameters()), largest, kept, live.peak)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Live(TorchDispatchMode):
    """Counts the bytes of storages while they exist; `known` are those not to count."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = set(known)
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (address := tensor.untyped_storage()._cdata) not in self.known:
                self._count(address, tensor.untyped_storage().nbytes())
                weakref.finalize(tensor.untyped_storage(), self._discount, address, tensor.untyped_storage().nbytes())
        return out

    def _count(self, address: int, size: int) -> None:
        self.known.add(address)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _discount(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.bytes -= size


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@lru_cache(maxsize=32)
def _forward_flops(config: UNetConfig, size: tuple[int, ...] | None, context_tokens: int) -> int:
    """Of one sample."""
    with torch.device("meta"):
        model = UNet.from_config(config).eval()
        given = example_inputs(config, batch=1, context_tokens=context_tokens, size=size)
        return count_flops(model, given).get_total_flops()


def table(found: MemoryEstimate, memory: MemoryConfig, device: str) -> str:
    """An estimate as aligned text."""
    where = "each process" if memory.num_processes > 1 else f"the {device}"
    batch = memory.batch_size // (memory.num_processes * memory.gradient_accumulation_steps)
    rows = [
        ("parameters (float32)", found.parameters),
        (f"optimizer, {memory.optimizer_states} numbers a parameter", found.optimizer),
        ("averaged weights", found.ema),
        ("gradients, after the backward pass", found.gradients),
        ({"ddp": "buckets of DDP", "fsdp": "layers gathered by FSDP"}.get(memory.sharding, ""), found.buffers),
        (f"activations kept for the backward pass, {batch} images at a time", found.activations),
        ("peak", found.peak),
        ("the same in the process's size, with the holes of Linux's heap", found.resident * (device == "cpu")),
    ]
    width = max(len(name) for name, size in rows if size)
    lines = [f"memory of a training step on {where}:"]
    lines += [f"  {name.ljust(width)}  {size / 2**20:10,.1f} MiB" for name, size in rows if size]
    lines.append(f"  {'operations of the whole step'.ljust(width)}  {found.flops / 1e12:10,.2f} TFLOP")
    lines.append("The peak is not the sum: gradients come while activations go.")
    if device != "cpu":
        lines.append("Not in it: what the device's libraries take for themselves, often 1 to 2 GiB.")
    return "\n".join(lines)
