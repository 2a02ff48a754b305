"""Training on several processes: Accelerate, and tensors that are sharded among processes (FSDP)."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from unet_denoiser.config.training import TrainingConfig
from unet_denoiser.utils.device import allow_tf32, default_precision, has_bfloat16, resolve_device


def with_precision(config: TrainingConfig) -> TrainingConfig:
    """Return the configuration with the precision that its device has by default, if none was chosen."""
    precision = config.mixed_precision or default_precision(resolve_device(config.device))
    return replace(config, mixed_precision=precision)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Create Accelerate's engine: for one process, or with `accelerate launch` for several, by DDP or FSDP2.

    The configuration has a precision, as from `with_precision`. ValueError if device or precision is not available, or
    the batch cannot be divided among the processes.
    """
    device = resolve_device(config.device)
    _check_precision(config.mixed_precision, device)
    allow_tf32(device)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", config.mixed_precision):
        raise ValueError(
            f"mixed_precision={config.mixed_precision!r}, but accelerate launch was told {launched!r}: "
            f"give --mixed-precision {launched} to train"
        )
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.mixed_precision:
        AcceleratorState._reset_state()  # left by another training in this process
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=config.mixed_precision)
    _configure_sharding(accelerator)
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size={config.batch_size} cannot be divided among {accelerator.num_processes} processes in "
            f"{config.gradient_accumulation_steps} equal parts; give a multiple of {parts}"
        )
    return accelerator


def _check_precision(precision: str | None, device: str) -> None:
    if precision == "fp16" and device != "cuda":
        raise ValueError(f"mixed_precision='fp16' needs a CUDA GPU, and this is {device}; give 'bf16' or 'no'")
    if precision == "bf16" and (device == "mps" or (device == "cuda" and not has_bfloat16())):
        raise ValueError(f"mixed_precision='bf16' is not supported by this {device} device; give 'no'")


def _configure_sharding(accelerator: Accelerator) -> None:
    """Check that FSDP is version 2, and set its default policy for wrapping modules."""
    if not is_sharded(accelerator):
        requested = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if requested and accelerator.num_processes > 1:
            raise ValueError("Accelerate shards on GPUs only; without --use_fsdp every process has the whole network")
        return
    plugin: Any = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version={plugin.fsdp_version} is not supported; give --fsdp_version 2")
    if plugin.auto_wrap_policy is None:
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        plugin.auto_wrap_policy = transformer_auto_wrap_policy  # wraps the modules that the network lists as blocks


def is_sharded(accelerator: Accelerator) -> bool:
    """Return True if each process keeps only its shard of every weight (FSDP)."""
    return str(accelerator.distributed_type).endswith("FSDP")


def gather_full(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copy full tensors to the CPU. Every process must call it; one that does not `keep` them gets an empty dict."""
    copies = {}
    for name, t in tensors.items():
        full = t.full_tensor() if isinstance(t, DTensor) else t
        if keep:
            copies[name] = full.detach().to("cpu", copy=True).contiguous()
    return copies


def shard_like(t: Tensor, like: Tensor) -> Tensor:
    """Move a full tensor to the device of `like`; return this process's shard of it if `like` is sharded."""
    t = t.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)
    return t
