"""The U-Net of one generation: computes once what its network calls share, and forecasts deep features (DeepCache).

From call to call the deep features of a U-Net change slowly (Ma et al. 2023, DeepCache, arXiv 2312.00858), and nearly
linearly. So most calls can run the outermost layers alone, with a forecast of the deep features.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from threading import current_thread, main_thread
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from unet_denoiser.export.engines import Engines
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.input_checks import check_inputs
from unet_denoiser.models.layers.attention import project_context
from unet_denoiser.models.layers.common import full_precision
from unet_denoiser.models.layers.context import Context
from unet_denoiser.models.layers.rules import has_hooks
from unet_denoiser.models.unet import UNet

_Entry = Callable[..., tuple[Tensor, ...]]
SHALLOW_BLOCKS = 1  # decoder blocks that run in every call: with more the error shrinks less than the time grows
WARM_UP_FRACTION = 0.12  # of the calls, at the start, compute everything: features do not follow a line there yet


def make_cached_unet(
    model: UNet,
    timesteps: Tensor | None = None,
    *,
    reuse: int | None = None,
    compile: bool = False,
    engines: Engines | None = None,
) -> Callable[..., Tensor]:
    """Return the network of one generation as guidance calls it, network(x, t, **inputs) -> float32 output.

    A network with another `forward`, or one that is sharded, hooked or compiled by other code, is called as it is:
    ValueError for `reuse`, `compile` or `engines` with it. The arguments are those of `CachedUNet`.
    """
    has_own_forward = isinstance(model, UNet) and getattr(model.forward, "__func__", None) is UNet.forward
    if has_own_forward and not (
        isinstance(next(model.parameters()), DTensor) or has_hooks(model) or model._compiled_call_impl is not None
    ):
        return CachedUNet(model, timesteps, reuse=reuse, compile=compile, engines=engines)
    backend = None if engines is None else engines.name
    for name, value in (("reuse", reuse), ("compile", compile), ("backend", backend)):
        if value:
            raise ValueError(
                f"{name}={value} needs a UNet with its own forward, neither sharded nor hooked nor compiled already"
            )
    return lambda x, t, **inputs: model(x.to(model.dtype), t, **inputs).float()


class _Embedded(NamedTuple):
    """The embedded conditions of a batch. `tensors` keeps the originals alive, so that no other one gets their id."""

    added: list[Tensor]
    context: Context | None
    tensors: list[Any]


class CachedUNet:
    """A U-Net for the calls of one generation; it is exact unless `reuse` is given.

    It embeds all timesteps in one batch, and computes the embeddings of conditions and a context's keys and values
    once. It recognises conditions by identity: a generation passes the same tensors in all calls.

    Args:
        model: in evaluation mode.
        timesteps: (calls,) of all calls, in turn; without them each call embeds its own.
        reuse: compute the deep features in every `reuse`-th call, in the first calls (`WARM_UP_FRACTION`) and in the
            last one; other calls forecast them from the last two computed so far apart. It counts network calls, so a
            sampler with two calls per step computes them in every (reuse / 2)-th step. A call with another batch (a
            guidance interval begins or ends) computes them too. None and 1 compute them always.
        compile: run both entry points, with and without deep features, through torch.compile; on a GPU as CUDA graphs.
        engines: run both in these engines instead.
    """

    def __init__(
        self,
        model: UNet,
        timesteps: Tensor | None = None,
        *,
        reuse: int | None = None,
        compile: bool = False,
        engines: Engines | None = None,
    ) -> None:
        self.model, self.reuse = model, reuse or 1
        self.run_full: Callable[..., Any] = _run_full
        self.run_shallow: Callable[..., Any] = _run_shallow
        if compile:
            # torch keeps the graphs of each thread apart, and some of its versions fail outside of the main thread
            graphs = model.device.type == "cuda" and current_thread() is main_thread()
            self.run_full, self.run_shallow = _compile(_run_full, graphs), _compile(_run_shallow, graphs)
        self.engines = engines
        if engines is not None:
            self.run_full, self.run_shallow = self._run_full_engine, self._run_shallow_engine
        self.num_calls, self.call = 0 if timesteps is None else len(timesteps), -1
        self.warm_up = round(WARM_UP_FRACTION * self.num_calls)
        self.timesteps = None if timesteps is None else timesteps.unique().to(model.device)
        if self.timesteps is not None:
            with torch.no_grad():
                self.time_embeddings = model.embed_time(self.timesteps)  # (distinct timesteps, time_dim)
        self.embedded: dict[tuple[Any, ...], _Embedded] = {}
        self.current: _Embedded | None = None
        self.features: list[tuple[int, Tensor]] = []  # (call, deep features) of the last two calls that computed them

    def __call__(self, x: Tensor, t: Tensor, **inputs: Any) -> Tensor:
        """Return the output (B, out_channels, *spatial) in float32; arguments as for `UNet.forward`."""
        self.call += 1
        x = x.to(self.model.dtype)
        conditions = self._embed_conditions(x, t, inputs)
        with full_precision(x.device.type):
            emb = sum(conditions.added, start=self._embed_time(t, inputs.get("time_cond")))  # (B, time_dim)
        if conditions is not self.current:
            self.current, self.features = conditions, []
        is_near = bool(self.features) and self.call - self.features[-1][0] < self.reuse
        if is_near and self.warm_up <= self.call != self.num_calls - 1:
            (out,) = self.run_shallow(self.model, x, emb, conditions.context, self._forecast())
            return out.float()
        out, deep = self.run_full(self.model, x, emb, conditions.context)
        if self.reuse > 1:
            # features of neighbouring calls differ too little to tell where they go
            self.features = [*(self.features[:-1] if is_near else self.features[-1:]), (self.call, deep)]
        return out.float()

    def _run_full_engine(
        self, model: UNet, x: Tensor, emb: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor | None]:
        assert self.engines is not None
        inputs = _engine_inputs(x, emb, context)
        if self.reuse > 1:
            out, deep = self.engines("full_deep", inputs)
            return out, deep
        return self.engines("full", inputs)[0], None

    def _run_shallow_engine(
        self, model: UNet, x: Tensor, emb: Tensor, context: Context | None, deep: Tensor
    ) -> tuple[Tensor]:
        assert self.engines is not None
        return (self.engines("shallow", _engine_inputs(x, emb, context) | {"deep": deep})[0],)

    def _forecast(self) -> Tensor:
        """Extrapolate the deep features of this call linearly from the two that are kept, or return the only one."""
        last, deep = self.features[-1]
        if len(self.features) == 1:
            return deep
        before, older = self.features[0]
        return torch.lerp(older, deep, (self.call - before) / (last - before))

    def _embed_time(self, t: Tensor, time_cond: Tensor | None) -> Tensor:
        if self.timesteps is None or time_cond is not None:
            return self.model.embed_time(t, time_cond)
        return self.time_embeddings[torch.searchsorted(self.timesteps, t.contiguous())]

    def _embed_conditions(self, x: Tensor, t: Tensor, inputs: dict[str, Any]) -> _Embedded:
        """Return the embeddings of a call's conditions, computed when their tensors come for the first time."""
        drop: Mapping[str, Tensor] = inputs.get("drop") or {}
        tensors = [(name, value) for given in (inputs, drop) for name, value in given.items() if name != "drop"]
        key = (x.shape, *((name, id(value)) for name, value in tensors))
        if key not in self.embedded:
            model, given = self.model, Conditions.select(inputs, Conditions.names())
            check_inputs(model.config, model.dtype, x, t, given, drop=drop)
            with full_precision(x.device.type):
                added, context = model.embed_conditions(len(x), given, drop)
            if context is not None and self.engines is None:  # engines compute keys and values inside
                context = project_context(model, context)
            self.embedded[key] = _Embedded(added, context, [value for _, value in tensors])
        return self.embedded[key]


def _engine_inputs(x: Tensor, emb: Tensor, context: Context | None) -> dict[str, Tensor]:
    """Return the inputs of a step in an engine."""
    if context is None:
        return {"x": x, "emb": emb}
    tokens, mask = context.tokens, context.mask
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
    return {"x": x, "emb": emb, "tokens": tokens, "mask": mask}


def _run_full(model: UNet, x: Tensor, emb: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
    """Return output and deep features."""
    skips = model.encode_shallow(x, emb, context, SHALLOW_BLOCKS)
    deep = model.deep_features(skips[-1], emb, context, SHALLOW_BLOCKS)
    return model.decode_shallow(deep, skips, emb, context), deep


def _run_shallow(model: UNet, x: Tensor, emb: Tensor, context: Context | None, deep: Tensor) -> tuple[Tensor]:
    """Return the output for given deep features."""
    return (model.decode_shallow(deep, model.encode_shallow(x, emb, context, SHALLOW_BLOCKS), emb, context),)


@cache
def _compile(plain: _Entry, graphs: bool) -> _Entry:
    """Run a function through torch.compile; without a compiler, warn once, in one line, and run it uncompiled.

    Args:
        graphs: replay its kernels as CUDA graphs, so that a small batch does not wait for the CPU to launch them.
    """
    from torch._dynamo.exc import TorchDynamoException

    run: _Entry = torch.compile(plain, mode="reduce-overhead" if graphs else None)

    def call(*args: Any) -> tuple[Tensor, ...]:
        nonlocal run
        try:
            out = run(*args)
            return tuple(t.clone() for t in out) if graphs else out  # the next replay writes to the same memory
        except TorchDynamoException as error:
            if run is plain:
                raise
            reason = " ".join(str(error).split("\n\n")[0].split())
            warnings.warn(f"compile=True: torch.compile fails here, going on without it: {reason}", stacklevel=2)
            run = plain
            return run(*args)

    return call
