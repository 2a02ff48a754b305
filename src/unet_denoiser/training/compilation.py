"""torch.compile for training: the repeated blocks of a network share their compiled code (regional compilation)."""

import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from unet_denoiser.models.layers.attention import ContextAttention, SelfAttention, SpatialTransformer
from unet_denoiser.models.layers.context import Context
from unet_denoiser.models.layers.resblock import ResBlock
from unet_denoiser.models.layers.rules import channels_last

REPEATED = (ResBlock, SelfAttention, ContextAttention, SpatialTransformer)


def compile_blocks(network: nn.Module) -> None:
    """Run the repeated blocks of a network through torch.compile while it trains; in place, names stay as they are.

    Blocks of the same class with parameters of the same shapes share their code, also with those of other networks; it
    is compiled when the first of them runs, for any batch and image size. In evaluation, and while one of its modules
    has a forward hook, which compiled code would not call, a block runs as it is. So do all of them, after one warning,
    where torch has no compiler.
    """
    from torch._dynamo import config  # takes a second
    from torch._dynamo.exc import TorchDynamoException

    usable = True

    def run(module: nn.Module, inner: list[nn.Module], compiled: Callable[..., Tensor], *args: Any) -> Tensor:
        nonlocal usable
        if usable and module.training and not any(m._forward_hooks for m in inner):
            given = (channels_last(args[0]), *args[1:])  # another layout would be another graph
            _mark_sizes(given)
            try:
                with config.patch(optimize_ddp=False):  # else DDP would cut the graph of a block into several
                    return compiled(module, *given)
            except TorchDynamoException as error:
                usable = False
                reason = " ".join(str(error).split("\n\n")[0].split())
                warnings.warn(f"compile=True: torch.compile fails here, going on without it: {reason}", stacklevel=2)
        return type(module).forward(module, *args)

    for module in network.modules():
        if isinstance(module, REPEATED):
            parameters = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters())
            kind: Any = type(module)
            compiled = _compile(kind, parameters)
            # `forward` and not the call, so that hooks of the block itself (FSDP's) run around the compiled code
            module.forward = partial(run, module, list(module.modules())[1:], compiled)  # type: ignore[method-assign]


@cache
def _compile(kind: Any, parameters: tuple[Any, ...]) -> Callable[..., Tensor]:
    """Return the compiled forward of all modules of a class whose parameters are alike."""
    plain = kind.forward
    # torch counts and looks up the graphs of a code object, so each kind gets a copy of its own
    copy = FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__)
    return torch.compile(copy)


def _mark_sizes(args: Iterable[Any]) -> None:
    """Let the compiler know that batch, image size and number of tokens vary, so that it compiles for all of them."""
    for value in args:
        if isinstance(value, Context):
            for t in (value.tokens, value.mask):
                _mark(t, (0, 1))
        elif isinstance(value, Tensor):
            _mark(value, (0, *range(2, value.ndim)))


def _mark(t: Tensor | None, axes: tuple[int, ...]) -> None:
    if t is not None:
        torch._dynamo.maybe_mark_dynamic(t, list(axes))
