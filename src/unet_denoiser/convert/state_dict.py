"""Moving tensors between layouts, strictly: every tensor is used, every parameter is found, or an error names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unet_denoiser.config.base import QKVOrder
from unet_denoiser.convert.key_maps import BlockStructure, ForeignTensor, Layout, layer_name

Packing = Literal[QKVOrder, "edm"]

# parameters that read or add to the sinusoids, and along which axis
_SINUSOIDS = {"time_mlp.1.weight": 1, "time_cond.weight": 0}


class FormatVariant(NamedTuple):
    """What differs between files of one layout.

    heads: number of heads of a level. packing: rows of a packed projection are (head, qkv, channel) in "legacy" files,
    (qkv, head, channel) in "new" ones and (head, channel, qkv) in EDM's. cosines_first: the sinusoids are cosines, then
    sines; ours the other way. linear: 1x1 convolutions around a transformer are linear layers.
    """

    layout: Layout
    skeleton: BlockStructure
    heads: Callable[[int], int]
    packing: Packing = "legacy"
    cosines_first: bool = True
    linear: bool = False

    def source(self, name: str) -> ForeignTensor:
        found = self.layout(name, self.skeleton)
        return found._replace(ones=0) if self.linear and ".proj_" in name else found


def to_internal(
    state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], dialect: FormatVariant
) -> dict[str, Tensor]:
    """Our parameters, of these shapes, from a foreign state dict.

    Raises:
        ValueError: tensors that are missing, left over or of another shape, the first few by name.
    """
    sources = {name: dialect.source(name) for name in shapes}
    used = {source.name for source in sources.values()}
    ours, problems = {}, _lacking({name: source.name for name, source in sources.items()}, state, dialect.skeleton)
    for name, shape in shapes.items():
        source = sources[name]
        if source.name not in state:
            continue
        tensor = state[source.name]
        if source.part is not None:
            if tensor.shape[:1] != (3 * shape[0],):
                problems.append(f"has {source.name} {tuple(tensor.shape)}, not {(3 * shape[0], *shape[1:])}")
                continue
            tensor = _unpack(tensor, dialect.heads(source.level), dialect.packing)[source.part]
        if source.transposed and tensor.ndim == 2:
            tensor = tensor.mT
        while tensor.ndim > len(shape) and tensor.shape[-1] == 1:
            tensor = tensor.squeeze(-1)
        if tuple(tensor.shape) != tuple(shape):
            problems.append(f"has {source.name} {tuple(tensor.shape)}, not {tuple(shape)}")
        elif dialect.cosines_first and name in _SINUSOIDS:
            tensor = swap_halves(tensor, _SINUSOIDS[name])
        ours[name] = tensor
    problems += [f"has {name}, which the network lacks" for name in state if name not in used]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the checkpoint does not fit: it {'; it '.join(problems[:3])}{more}")
    return ours


def _lacking(sources: Mapping[str, str], state: Mapping[str, Tensor], skeleton: BlockStructure) -> list[str]:
    """What is missing: a whole layer by what it is, anything less by name."""
    layers: dict[str, list[str]] = {}
    for name, source in sources.items():
        layers.setdefault(layer_name(name, skeleton), []).append(source)
    problems = []
    for layer, names in layers.items():
        missing = [name for name in names if name not in state]
        if layer and len(missing) == len(names):
            problems.append(f"lacks {layer} ({missing[0]} and {len(missing) - 1} more)")
        else:
            problems += [f"lacks {name}" for name in dict.fromkeys(missing)]
    return problems


def to_foreign(ours: Mapping[str, Tensor], dialect: FormatVariant) -> dict[str, Tensor]:
    """The foreign state dict of our parameters: the inverse of `to_internal`, bit for bit."""
    theirs: dict[str, Tensor] = {}
    packed: dict[str, list[Tensor]] = {}
    for name, tensor in ours.items():
        source = dialect.source(name)
        if dialect.cosines_first and name in _SINUSOIDS:
            tensor = swap_halves(tensor, _SINUSOIDS[name])
        tensor = tensor.reshape(*tensor.shape, *[1] * source.ones)
        if source.part is None:
            theirs[source.name] = tensor.mT if source.transposed else tensor
            continue
        parts = packed.setdefault(source.name, [tensor, tensor, tensor])
        parts[source.part] = tensor
        if source.part == 2:  # query, key and value follow each other
            theirs[source.name] = _pack(packed.pop(source.name), dialect.heads(source.level), dialect.packing)
    return theirs


def swap_halves(weight: Tensor, axis: int) -> Tensor:
    """Exchange the halves of sines and cosines; an odd width has one of padding that stays."""
    half = weight.shape[axis] // 2
    first, second, padding = weight.split([half, half, weight.shape[axis] - 2 * half], axis)
    return torch.cat([second, first, padding], axis)


def _unpack(packed: Tensor, heads: int, order: Packing) -> tuple[Tensor, ...]:
    rest = packed.shape[1:]
    if order == "new":
        return packed.chunk(3)
    if order == "edm":
        return packed.reshape(-1, 3, *rest).unbind(1)
    return tuple(part.reshape(-1, *rest) for part in packed.reshape(heads, 3, -1, *rest).unbind(1))


def _pack(parts: Sequence[Tensor], heads: int, order: Packing) -> Tensor:
    rest = parts[0].shape[1:]
    if order == "new":
        return torch.cat(list(parts))
    if order == "edm":
        return torch.stack(list(parts), dim=1).reshape(-1, *rest)
    return torch.stack([part.reshape(heads, -1, *rest) for part in parts], dim=1).reshape(-1, *rest)
