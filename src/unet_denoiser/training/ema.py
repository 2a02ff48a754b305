"""Exponential moving average (EMA) of a network's parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

# submodules that wrappers have
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class EMA:
    """Averages the trained parameters of a model; inside `with ema.swapped():` the model has the averages.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that the random start is soon forgotten. The
    averages are float32 copies, sharded as the parameters are.

    Args:
        model: the module; its parameters that need no gradient are not averaged.
        decay: in [0, 1), otherwise ValueError; 0.9999 averages over about 10,000 updates.

    Raises:
        RuntimeError: in `update` and `swapped`, if the model's parameters are not those of the start, for example
            after `load_state_dict(assign=True)`, after adding a LoRA, or after unfreezing weights.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay={decay} must be in [0, 1), for example 0.999")
        self.decay, self.updates = decay, 0
        self._model, self._is_swapped = model, False
        self._parameters = {inner_name(name): p for name, p in unwrap(model).named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the current parameters; call once after each optimizer step."""
        if self._is_swapped:
            raise RuntimeError("EMA.update() inside `with ema.swapped()`: the model has the averages now")
        self._check_parameters()
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = [_local(average) for average in self._averages.values()]
        current = [_local(p.detach()).to(a) for p, a in zip(self._parameters.values(), averages, strict=True)]
        torch._foreach_lerp_(averages, current, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Give the model the averages; on leaving, its training weights return bit-equal, exceptions included."""
        if self._is_swapped:
            raise RuntimeError("`with ema.swapped()` inside itself")
        self._check_parameters()
        weights = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._is_swapped = True
        try:
            self._set(self._averages)
            yield
        finally:
            self._set(weights)
            self._is_swapped = False

    def _check_parameters(self) -> None:
        """Raise RuntimeError unless the averaged parameters, and no other trained ones, are in the model."""
        now = dict(self._model.named_parameters())
        # FSDP exchanges its shards for whole parameters and back
        replaced = [
            name for name, p in self._parameters.items() if now.get(name) is not p and not isinstance(p, DTensor)
        ]
        new = [name for name, p in now.items() if p.requires_grad and name not in self._parameters]
        for names, what in ((replaced, "replaced"), (new, "added or unfrozen")):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise RuntimeError(
                    f"{names[0]}{more} was {what} after the EMA was made, which averages other weights; "
                    "make a new EMA after such a change"
                )

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        """Copy values into the parameters: in place, since FSDP identifies its shards by their memory."""
        if any(isinstance(p, DTensor) for p in self._parameters.values()):
            from torch.distributed.fsdp import FSDPModule

            for module in self._model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # so that it gathers all weights again: without a backward pass it keeps the old
        for name, p in self._parameters.items():
            p.copy_(values[name])

    def averages(self) -> dict[str, Tensor]:
        """Return the averages by parameter name."""
        return self._averages

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by parameter name, and the number of updates."""
        return {"updates": self.updates, "averages": self._averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`; the decay does not change."""
        averages = {inner_name(name): average for name, average in state["averages"].items()}
        if not set(averages) & set(self._averages):  # of code that kept the names of a DDP
            averages = {name.removeprefix("module."): average for name, average in averages.items()}
        if set(averages) != set(self._averages):
            raise ValueError("the EMA state belongs to another architecture")
        self.updates = state["updates"]
        for name, average in self._averages.items():
            average.copy_(averages[name])


def inner_name(name: str) -> str:
    """Return a parameter's name without what torch.compile, FSDP and checkpoint wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrap(model: nn.Module) -> Any:
    """Return the network inside of torch.compile, DDP and the like."""
    while (name := next((name for name in (*WRAPPERS, "module") if name in model._modules), None)) and (
        name != "module" or isinstance(model, DataParallel | DistributedDataParallel | AveragedModel)
    ):
        model = model.get_submodule(name)
    return model


def _local(t: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor; other tensors as they are."""
    return t.to_local() if isinstance(t, DTensor) else t
