"""Batches on the device of a training; a GPU gets each one while it computes the step before."""

from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor


def to_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yield batches on a device; on a GPU each is copied one step ahead (see `copy_ahead`)."""
    if device.type == "cuda":
        return copy_ahead(batches, device)
    return (send_to_device(batch, device) for batch in batches)


def copy_ahead(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yield batches from pinned memory on a GPU, each copied on a side stream while the batch before it is used.

    This takes the memory of one more batch. The CPU waits for no copy; the stream that uses the batch does.
    """
    side = torch.cuda.Stream(device)

    def copy(batch: Any) -> tuple[Any, torch.cuda.Event]:
        with torch.cuda.stream(side):
            return send_to_device(batch, device, non_blocking=True), side.record_event()

    copies: Iterator[Any] = chain(map(copy, batches), [None])
    for (batch, copied), _ in pairwise(copies):  # the copy of the next batch has begun
        using = torch.cuda.current_stream(device)
        using.wait_event(copied)
        # the memory is the side stream's: without this a later copy could get it while the step still reads it
        recursively_apply(_keep_for, batch, using)
        yield batch


def _keep_for(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    tensor.record_stream(stream)
    return tensor
