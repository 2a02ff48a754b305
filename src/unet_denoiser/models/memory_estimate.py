"""Memory and FLOPs of a training step, estimated without running one.

The network runs forward and backward on tensors without storage, and every allocation and release is counted. So the
estimate follows the code: the convolutions of the device, gradient checkpointing, autocast.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unet_denoiser.config.base import per_axis
from unet_denoiser.config.memory import MemoryConfig
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.models.layers.rules import convolutions_as_on
from unet_denoiser.models.summary import count_flops, example_inputs
from unet_denoiser.models.unet import UNet
from unet_denoiser.utils.device import default_precision

# glibc's heap keeps holes between longer-lived tensors: this share of the temporary memory, up to this limit, as large
# blocks seldom lie in the heap. Fitted to the measurements of docs/results/scaling.md; with
# MALLOC_MMAP_THRESHOLD_=65536 in the environment there are none, for twice the time
HEAP_HOLE_RATIO, MAX_HEAP_HOLE_BYTES = 0.9, 370 * 2**20
FLOAT32_BYTES = 4  # of weights, gradients, moments and averages, whatever autocast computes in


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device, and the floating-point operations of a step on all devices together.

    Args:
        parameters, optimizer, ema: this device's share, during all of the training.
        gradients: this device's share, from the backward pass to the optimizer's step.
        buffers: DDP's buckets of gradients, or the layers whose parameters FSDP has gathered.
        activations: what the forward pass keeps for the backward pass.
        peak: the maximum at any moment. Less than the sum, as activations are freed while gradients appear; or more,
            by the temporary memory of single operations.
        resident: on a CPU under Linux, the resident memory of the process, with the holes of its heap; else the peak.
        flops: of forward and backward pass of the whole batch; a multiplication and an addition count as two.
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
    """Estimate memory and operations of one training step.

    Args:
        device: on a "cpu", temporary memory of the convolutions is counted; that of other devices' libraries is not.

    Raises:
        ValueError: an image size with a wrong number of axes.
    """
    size = None if memory.image_size is None else per_axis(memory.image_size, config.dims)
    memory = replace(memory, mixed_precision=memory.mixed_precision or default_precision(device))
    fsdp, half = memory.sharding == "fsdp", memory.mixed_precision != "no"
    keep_gradients = not fsdp and memory.gradient_accumulation_steps == 1  # else each goes once it is added or sent
    counted = _simulate(config, replace(memory, optimizer_states=0, ema=False), keep_gradients, device)
    share = FLOAT32_BYTES * -(-counted.parameters // (memory.num_processes if fsdp else 1))
    buffers = FLOAT32_BYTES * counted.parameters if memory.sharding == "ddp" else 0
    if fsdp:  # weights of a block and the next, gradients of it and the previous one, in autocast's precision
        buffers = 4 * counted.largest_block * (FLOAT32_BYTES // 2 if half else FLOAT32_BYTES)
    temporary = counted.peak + buffers + (0 if keep_gradients else share)
    peak = share * (1 + memory.optimizer_states + memory.ema) + temporary
    holes = min(int(HEAP_HOLE_RATIO * temporary), MAX_HEAP_HOLE_BYTES) if device == "cpu" else 0
    # the backward pass has two matrix products for each one of the forward pass, which checkpointing runs twice
    passes = 4 if memory.gradient_checkpointing else 3
    return MemoryEstimate(
        parameters=share,
        optimizer=share * memory.optimizer_states,
        ema=share * memory.ema,
        gradients=share,
        buffers=buffers,
        activations=counted.kept,
        peak=peak,
        resident=peak + holes,
        flops=memory.batch_size * passes * _forward_flops(config, size, memory.context_tokens),
    )


class _Counts(NamedTuple):
    """Parameters, of all and of the largest block; bytes that the forward pass keeps, and at the peak."""

    parameters: int
    largest_block: int
    kept: int
    peak: int


@lru_cache(maxsize=32)
def _simulate(config: UNetConfig, memory: MemoryConfig, keep_gradients: bool, device: str) -> _Counts:
    """Run one micro-batch on tensors without storage; the bytes of the parameters themselves are left out."""
    size = None if memory.image_size is None else per_axis(memory.image_size, config.dims)
    batch, half = _micro_batch_size(memory), memory.mixed_precision != "no"
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    # FSDP gathers weights in autocast's precision, so autocast keeps no copies
    dtype = torch.bfloat16 if half and memory.sharding == "fsdp" else torch.float32
    with FakeTensorMode(), convolutions_as_on(device), _default_dtype(dtype):
        model = UNet.from_config(config).train()
        model.gradient_checkpointing = memory.gradient_checkpointing
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        if not keep_gradients:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(_drop_gradient)
        with _AllocationCounter(parameters) as counter:
            inputs = example_inputs(config, batch=batch, context_tokens=memory.context_tokens, size=size)
            held = [torch.zeros_like(inputs["x"]) for _ in ("clean data", "noise")]
            autocast = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
            with autocast, saved_tensors_hooks(pack, lambda tensor: tensor):
                out = model(**inputs)
            kept = sum(storage.nbytes() for address, storage in saved.items() if address not in parameters)
            saved.clear()
            out.float().square().mean().backward()
            del held, out
    blocks = (*model.encoder, *model.bottleneck, *model.decoder)
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    return _Counts(sum(p.numel() for p in model.parameters()), largest, kept, counter.peak)


def _micro_batch_size(memory: MemoryConfig) -> int:
    return memory.batch_size // (memory.num_processes * memory.gradient_accumulation_steps)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _AllocationCounter(TorchDispatchMode):
    """Counts the bytes of storages while they exist, except those in `known`."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = set(known)
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (address := tensor.untyped_storage()._cdata) not in self.known:
                size = tensor.untyped_storage().nbytes()
                self.known.add(address)
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(tensor.untyped_storage(), self._discount, address, size)
        return out

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
    """Count the operations of a forward pass of one sample."""
    with torch.device("meta"):
        model = UNet.from_config(config).eval()
        inputs = example_inputs(config, batch=1, context_tokens=context_tokens, size=size)
        return count_flops(model, inputs).get_total_flops()


def format_estimate(found: MemoryEstimate, memory: MemoryConfig, device: str) -> str:
    """Format an estimate as aligned text."""
    where = "each process" if memory.num_processes > 1 else f"the {device}"
    rows = [
        ("parameters (float32)", found.parameters),
        (f"optimizer, {memory.optimizer_states} numbers per parameter", found.optimizer),
        ("averaged weights (EMA)", found.ema),
        ("gradients, after the backward pass", found.gradients),
        ({"ddp": "buckets of DDP", "fsdp": "layers gathered by FSDP"}.get(memory.sharding, ""), found.buffers),
        (f"activations kept for the backward pass, {_micro_batch_size(memory)} images at a time", found.activations),
        ("peak", found.peak),
        ("peak of the process, with the holes of Linux's heap", found.resident * (device == "cpu")),
    ]
    width = max(len(name) for name, size in rows if size)
    lines = [f"memory of a training step on {where}:"]
    lines += [f"  {name.ljust(width)}  {size / 2**20:10,.1f} MiB" for name, size in rows if size]
    lines.append(f"  {'operations of the whole step'.ljust(width)}  {found.flops / 1e12:10,.2f} TFLOP")
    lines.append("The peak is not the sum: activations are freed while gradients appear.")
    if device != "cpu":
        lines.append("Not included: memory of the device's libraries, often 1 to 2 GiB.")
    return "\n".join(lines)
