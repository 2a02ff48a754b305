"""What a training step needs: bytes by what they are for, and floating-point operations, without running one.

The network is walked forward and backward on tensors without storage, and every allocation and release is counted: what
is kept is what this code keeps (conv.py), with gradient checkpointing and autocast as they act.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unet_denoiser import conv, unet, winograd
from unet_denoiser.config import UNetConfig
from unet_denoiser.memory_config import MemoryConfig
from unet_denoiser.summary import count_flops, example_inputs
from unet_denoiser.unet import UNet

FLOAT = 4  # bytes: weights, gradients, moments and averages are float32, whatever autocast computes in


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device, and the floating-point operations of a step on all of them together.

    Args:
        parameters, optimizer, ema: this device's share, which is always there.
        gradients: this device's share, which is there from the backward pass to the optimizer's step.
        buffers: what DDP copies gradients into to send them, or the layers that FSDP has whole at a time.
        activations: what the forward pass keeps for the backward one.
        peak: the most of all together at any moment. Less than the sum, as activations go while gradients come; or
            more, by what single operations need for themselves.
        flops: forward and backward pass of the whole batch; a multiplication and an addition count as two.
    """

    parameters: int
    optimizer: int
    ema: int
    gradients: int
    buffers: int
    activations: int
    peak: int
    flops: int


def estimate(config: UNetConfig, memory: MemoryConfig, device: str = "cpu") -> Estimate:
    """Memory and operations of one training step.

    Args:
        device: on a "cpu", the work space of the fast convolutions is counted; that of other devices' libraries is not.

    Raises:
        ValueError: an image size that is not one of the network's.
    """
    size = _size(config, memory)
    keep_gradients = memory.sharding != "fsdp" and memory.gradient_accumulation_steps == 1
    # FSDP gathers the weights in autocast's precision, so that autocast has no copies of them to keep
    dtype = torch.bfloat16 if memory.sharding == "fsdp" and memory.mixed_precision == "bf16" else torch.float32
    with FakeTensorMode(), _convolutions_of(device), _default_dtype(dtype):
        model = UNet.from_config(config).train()
        activations, moving = _walk(model, memory, size, keep_gradients)
    parameters = sum(p.numel() for p in model.parameters())
    fsdp = memory.sharding == "fsdp"
    share = FLOAT * -(-parameters // (memory.num_processes if fsdp else 1))
    buffers = FLOAT * parameters if memory.sharding == "ddp" else 0
    if fsdp:
        blocks = (*model.encoder, *model.bottleneck, *model.decoder)
        largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
        # weights of the block that runs and of the next, gradients of it and of the one before; in autocast's precision
        buffers = 4 * largest * dtype.itemsize
    always = share * (1 + memory.optimizer_states + memory.ema)
    return Estimate(
        parameters=share,
        optimizer=share * memory.optimizer_states,
        ema=share * memory.ema,
        gradients=share,
        buffers=buffers,
        activations=activations,
        peak=always + buffers + moving + (0 if keep_gradients else share),
        flops=_training_flops(config, memory, size),
    )


def _size(config: UNetConfig, memory: MemoryConfig) -> tuple[int, ...] | None:
    size = memory.image_size
    size = size * config.dims if size is not None and len(size) == 1 else size
    if size is not None and len(size) != config.dims:
        raise ValueError(f"image_size={size} must be one number, or {config.dims}")
    return size


def _walk(model: UNet, memory: MemoryConfig, size: tuple[int, ...] | None, keep_gradients: bool) -> tuple[int, int]:
    """Bytes that the forward pass keeps, and the peak of all but the parameters, of one process and one backward pass.

    keep_gradients: else each gradient goes when it is done, as where it is added to one that is there or sent away.
    """
    batch = memory.batch_size // (memory.num_processes * memory.gradient_accumulation_steps)
    bf16 = memory.mixed_precision == "bf16"
    model.gradient_checkpointing = memory.gradient_checkpointing
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    own = {p.untyped_storage()._cdata for p in model.parameters()}
    if not keep_gradients:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(_drop_gradient)
    with _Live(own) as live:
        inputs = example_inputs(model.config, batch=batch, context_tokens=memory.context_tokens, size=size)
        held = [torch.zeros_like(inputs["x"]) for _ in ("clean data", "noise")]
        autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
        with autocast, saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(**inputs)
        kept = sum(storage.nbytes() for address, storage in saved.items() if address not in own)
        saved.clear()
        out.float().square().mean().backward()
        del held, out
    return kept, live.peak


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


@contextmanager
def _convolutions_of(device: str) -> Iterator[None]:
    """The tensors claim to be on a CPU; what conv.py does there only must be as on the device that is meant."""
    if device == "cpu":
        # blocks of tiles follow each other in the same memory: the first, which is the largest, stands for all
        first = winograd._blocks
        with patch.object(winograd, "_blocks", lambda *args: [next(first(*args))]):
            yield
    else:
        with (
            patch.object(conv, "winograd_pays", lambda *args, **kwargs: False),
            patch.object(unet, "channels_last", lambda x: x),
        ):
            yield


def _training_flops(config: UNetConfig, memory: MemoryConfig, size: tuple[int, ...] | None) -> int:
    """The backward pass has two products for each of the forward one's; checkpointing runs that twice."""
    with torch.device("meta"):
        model = UNet.from_config(config).eval()
        inputs = example_inputs(config, batch=1, context_tokens=memory.context_tokens, size=size)
        forward = count_flops(model, inputs).get_total_flops()
    return memory.batch_size * forward * (4 if memory.gradient_checkpointing else 3)


def table(found: Estimate, memory: MemoryConfig, device: str) -> str:
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
    ]
    width = max(len(name) for name, size in rows if size)
    lines = [f"memory of a training step on {where}:"]
    lines += [f"  {name.ljust(width)}  {size / 2**20:10,.1f} MiB" for name, size in rows if size]
    lines.append(f"  {'operations of the whole step'.ljust(width)}  {found.flops / 1e12:10,.2f} TFLOP")
    lines.append("The peak is not the sum: gradients come while activations go.")
    if device != "cpu":
        lines.append("Not in it: what the device's libraries take for themselves, often 1 to 2 GiB.")
    return "\n".join(lines)
