"""The options of the memory estimate."""

from dataclasses import dataclass
from typing import Literal

from unet_denoiser.config.base import MixedPrecision, check_minimum, check_types

Sharding = Literal["none", "ddp", "fsdp"]


@dataclass(frozen=True)
class MemoryConfig:
    """The training step whose memory is estimated.

    Args:
        batch_size: images per optimizer step, over all processes.
        gradient_accumulation_steps: micro-batches that each process splits its share of the batch into.
        image_size: one number, or height and width (default: the network's).
        context_tokens: tokens of the context, for a network with cross-attention.
        mixed_precision: "no" (float32), "bf16" or "fp16" (autocast: the weights stay float32) (default: that of a
            training on the device).
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        sharding: "none" (one process), "ddp" (a copy on each GPU) or "fsdp" (FSDP2: a share on each GPU).
        num_processes: GPUs, over all machines.
        optimizer_states: numbers that the optimizer keeps per parameter: 2 for AdamW, 0 for plain SGD.
        ema: keep averaged weights (an exponential moving average).

    Raises:
        ValueError: an option that cannot work, with its name, its value and a valid one.
    """

    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    image_size: tuple[int, ...] | None = None
    context_tokens: int = 77
    mixed_precision: MixedPrecision | None = None
    gradient_checkpointing: bool = False
    sharding: Sharding = "none"
    num_processes: int = 1
    optimizer_states: int = 2
    ema: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        check_minimum(self, 1, "batch_size", "gradient_accumulation_steps", "context_tokens", "num_processes")
        check_minimum(self, 0, "optimizer_states")
        if self.image_size is not None and min(self.image_size, default=0) < 1:
            raise ValueError(f"image_size={self.image_size} must be a positive int, or one per axis")
        if (self.sharding == "none") != (self.num_processes == 1):
            raise ValueError(
                f"sharding={self.sharding!r} with num_processes={self.num_processes}: one process needs 'none', "
                "several need 'ddp' or 'fsdp'"
            )
        parts = self.num_processes * self.gradient_accumulation_steps
        if self.batch_size % parts:
            raise ValueError(f"batch_size={self.batch_size} does not divide into {parts} parts; give a multiple")
