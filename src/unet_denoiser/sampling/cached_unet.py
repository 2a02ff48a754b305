"""Sampling in less time: what a generation's calls of the network share is computed once.

From call to call the deep features of a U-Net change slowly (Ma et al. 2023, DeepCache, arXiv 2312.00858), and nearly
along a line. So most calls can do with a forecast of them, and run the outermost layers alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.input_checks import check_inputs
from unet_denoiser.models.layers.attention import project_context
from unet_denoiser.models.layers.common import full_precision
from unet_denoiser.models.layers.context import Context
from unet_denoiser.models.layers.recompute import has_hooks
from unet_denoiser.models.unet import UNet

DEPTH = 1  # blocks of the decoder that run in every call: with more the error shrinks less than the time grows
WARM_UP = 0.12  # share of the calls, at the start, that are computed: there features do not follow a line yet


def make_cached_unet(
    model: UNet, timesteps: Tensor | None = None, *, reuse: int | None = None, compile: bool = False
) -> Callable[..., Tensor]:
    """The network of one generation as guidance calls it, network(x, t, **inputs) -> float32 output.

    A network with another `forward`, or that is sharded, hooked or compiled by other code, is called as it is.

    Args:
        timesteps, reuse, compile: see `CachedUNet`.

    Raises:
        ValueError: `reuse` or `compile` with such a network.
    """
    own = isinstance(model, UNet) and getattr(model.forward, "__func__", None) is UNet.forward
    apart = own and not (
        isinstance(model.input_conv.weight, DTensor) or has_hooks(model) or model._compiled_call_impl is not None
    )
    if apart:
        return CachedUNet(model, timesteps, reuse=reuse, compile=compile)
    for name, value in (("reuse", reuse), ("compile", compile)):
        if value:
            raise ValueError(
                f"{name}={value} needs a UNet with its own forward, neither sharded nor hooked nor compiled already"
            )
    return lambda x, t, **inputs: model(x.to(model.input_conv.weight.dtype), t, **inputs).float()


class CachedUNet:
    """A network for the calls of one generation; only what they share makes it faster, unless `reuse` is given.

    The embeddings of all timesteps are computed in one batch, keys and values of a context and the conditions'
    embeddings once. Conditions are known by identity: a generation gives the same tensors in all its calls.

    Args:
        model: in evaluation mode.
        timesteps: (calls,) all that it will be called with, in turn; without them they are embedded one by one.
        reuse: compute the deep features in every so many calls, in the first `WARM_UP` of them and in the last one; in
            the others they are forecast from two that were computed that far apart. Calls are counted, whatever their
            timesteps: a sampler that calls twice a step computes them in every (reuse / 2)th step. Other rows than
            before (a guidance interval begins or ends) have them computed. None and 1 compute all, and give the same.
        compile: run the two entry points, with and without deep features, through torch.compile.
    """

    def __init__(
        self, model: UNet, timesteps: Tensor | None = None, *, reuse: int | None = None, compile: bool = False
    ) -> None:
        self.model, self.every = model, reuse or 1
        self.whole: Callable[..., Any] = _compiled(_whole) if compile else _whole
        self.shallow: Callable[..., Any] = _compiled(_shallow) if compile else _shallow
        self.calls, self.call = 0 if timesteps is None else len(timesteps), -1
        self.warm_up = round(WARM_UP * self.calls)
        self.timesteps = None
        if timesteps is not None:
            self.timesteps = timesteps.unique().to(model.input_conv.weight.device)
            with torch.no_grad():
                self.times = model.embed_time(self.timesteps)
        self.known: dict[tuple[Any, ...], _Rows] = {}
        self.rows: _Rows | None = None
        self.features: list[tuple[int, Tensor]] = []  # of the last two calls that computed them, with their numbers

    def __call__(self, x: Tensor, t: Tensor, **inputs: Any) -> Tensor:
        """The output (B, out_channels, *spatial) in float32; arguments as `UNet.forward` has them."""
        self.call += 1
        x = x.to(self.model.dtype)
        rows = self._rows(x, t, inputs)
        with full_precision(x.device.type):
            emb = sum(rows.added, start=self._embed_time(t, inputs.get("time_cond")))
        if rows is not self.rows:
            self.rows, self.features = rows, []
        near = bool(self.features) and self.call - self.features[-1][0] < self.every
        if near and self.warm_up <= self.call != self.calls - 1:
            return self.shallow(self.model, x, emb, rows.context, self._forecast()).float()
        out, deep = self.whole(self.model, x, emb, rows.context)
        if self.every > 1:
            # those of neighbouring calls differ too little to tell where they go
            self.features = [*(self.features[:-1] if near else self.features[-1:]), (self.call, deep)]
        return out.float()

    def _forecast(self) -> Tensor:
        """The deep features of this call, on the line through the two that are kept; the one where it is one."""
        last, deep = self.features[-1]
        if len(self.features) == 1:
            return deep
        before, older = self.features[0]
        return torch.lerp(older, deep, (self.call - before) / (last - before))

    def _embed_time(self, t: Tensor, time_cond: Tensor | None) -> Tensor:
        if self.timesteps is None or time_cond is not None:
            return self.model.embed_time(t, time_cond)
        return self.times[torch.searchsorted(self.timesteps, t.contiguous())]

    def _rows(self, x: Tensor, t: Tensor, inputs: dict[str, Any]) -> _Rows:
        """What the conditions of a call come to, computed when they are seen first."""
        drop: Mapping[str, Tensor] = inputs.get("drop") or {}
        tensors = [(name, value) for given in (inputs, drop) for name, value in given.items() if name != "drop"]
        key = (x.shape, *((name, id(value)) for name, value in tensors))
        if key not in self.known:
            model, given = self.model, Conditions.select(inputs, Conditions.names())
            check_inputs(model.config, model.dtype, x, t, given, drop=drop)
            with full_precision(x.device.type):
                added, context = model.embed_conditions(len(x), given, drop)
            context = None if context is None else project_context(model, context)
            self.known[key] = _Rows(added, context, [value for _, value in tensors])
        return self.known[key]


class _Rows(NamedTuple):
    """What the conditions of a batch's rows come to; `held`, so that no other tensors get their identity."""

    added: list[Tensor]
    context: Context | None
    held: list[Any]


# ---- entry points --------------------------------------------------------------------------------------------------


def _whole(model: UNet, x: Tensor, emb: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
    """Output and deep features."""
    skips = model.encode_shallow(x, emb, context, DEPTH)
    deep = model.deep_features(skips[-1], emb, context, DEPTH)
    return model.decode_shallow(deep, skips, emb, context), deep


def _shallow(model: UNet, x: Tensor, emb: Tensor, context: Context | None, deep: Tensor) -> Tensor:
    """Output with deep features from elsewhere."""
    return model.decode_shallow(deep, model.encode_shallow(x, emb, context, DEPTH), emb, context)


class _Compiled:
    """A function through torch.compile, or as it is, after one line of warning, where that finds no compiler."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain, self.run = plain, torch.compile(plain)

    def __call__(self, *args: Any) -> Any:
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self.run(*args)
        except TorchDynamoException as error:
            if self.run is self.plain:
                raise
            reason = " ".join(str(error).split("\n\n")[0].split())
            warnings.warn(f"compile=True: torch.compile fails here, going on without it: {reason}", stacklevel=2)
            self.run = self.plain
            return self.run(*args)


@cache
def _compiled(function: Callable[..., Any]) -> _Compiled:
    return _Compiled(function)
