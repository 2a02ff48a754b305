"""Moving tensors between layouts, strictly: every tensor is used, every parameter is found, or an error names it."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unet_denoiser.convert.layout import BlockStructure, ForeignTensor, Layout, Packing, Shapes, describe_layer

# parameters that read or add to the sinusoids, and along which axis
SINUSOIDS = {"time_mlp.1.weight": 1, "time_cond.weight": 0}


class FormatVariant(NamedTuple):
    """One kind of files among those of a layout.

    heads: number of heads of a level. packing: the first axis of a packed projection is (head, qkv, channel) in
    "legacy" files, (qkv, head, channel) in "new" ones and (head, channel, qkv) in EDM's. cosines_first: the sinusoids
    are cosines, then sines; ours are sines, then cosines. linear: transformers stand between linear layers, not 1x1
    convolutions.
    """

    layout: Layout
    structure: BlockStructure
    heads: Callable[[int], int]
    packing: Packing = "legacy"
    cosines_first: bool = True
    linear: bool = False

    def locate(self, name: str) -> ForeignTensor:
        """Return the foreign tensor that holds one of our parameters."""
        found = self.layout.key_map(name, self.structure)
        return found._replace(ones=0) if self.linear and ".proj_" in name else found


def to_internal(state: Mapping[str, Tensor], shapes: Shapes, variant: FormatVariant) -> dict[str, Tensor]:
    """Return our parameters, of these names and shapes, from a foreign state dict; ValueError unless all fit."""
    sources = {name: variant.locate(name) for name in shapes}
    ours: dict[str, Tensor] = {}
    problems = _list_missing({name: source.name for name, source in sources.items()}, state, variant.structure)
    for name, shape in shapes.items():
        source = sources[name]
        if source.name not in state:
            continue
        tensor = state[source.name]
        if source.part is not None:
            if tensor.shape[:1] != (3 * shape[0],):
                problems.append(f"has {source.name} {tuple(tensor.shape)}, not {(3 * shape[0], *shape[1:])}")
                continue
            tensor = _unpack(tensor, variant.heads(source.level), variant.packing)[source.part]
        if source.transposed and tensor.ndim == 2:
            tensor = tensor.mT
        while tensor.ndim > len(shape) and tensor.shape[-1] == 1:
            tensor = tensor.squeeze(-1)
        if tuple(tensor.shape) != tuple(shape):
            problems.append(f"has {source.name} {tuple(tensor.shape)}, not {tuple(shape)}")
        elif variant.cosines_first and name in SINUSOIDS:
            tensor = swap_halves(tensor, SINUSOIDS[name])
        ours[name] = tensor
    left_over = state.keys() - {source.name for source in sources.values()}
    problems += [f"has {name}, which the network lacks" for name in state if name in left_over]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the checkpoint does not fit: it {'; it '.join(problems[:3])}{more}")
    return ours


def _list_missing(sources: Mapping[str, str], state: Mapping[str, Tensor], structure: BlockStructure) -> list[str]:
    """List the tensors that are missing: a layer without any of its own in words, the others by name."""
    layers: dict[str, list[str]] = {}
    for name, source in sources.items():
        layers.setdefault(describe_layer(name, structure), []).append(source)
    problems = []
    for layer, names in layers.items():
        missing = [name for name in names if name not in state]
        if layer and len(missing) == len(names):
            problems.append(f"lacks {layer} ({missing[0]} and {len(missing) - 1} more)")
        else:
            problems += [f"lacks {name}" for name in dict.fromkeys(missing)]
    return problems


def to_foreign(ours: Mapping[str, Tensor], variant: FormatVariant) -> dict[str, Tensor]:
    """Return the foreign state dict of our parameters: the inverse of `to_internal`, bit for bit."""
    theirs: dict[str, Tensor] = {}
    packed: dict[str, list[Tensor]] = {}
    for name, tensor in ours.items():
        target = variant.locate(name)
        if variant.cosines_first and name in SINUSOIDS:
            tensor = swap_halves(tensor, SINUSOIDS[name])
        if name.endswith("weight"):
            tensor = tensor.reshape(*tensor.shape, *[1] * target.ones)
        if target.part is None:
            theirs[target.name] = tensor.mT if target.transposed else tensor
            continue
        parts = packed.setdefault(target.name, [tensor, tensor, tensor])
        parts[target.part] = tensor
        if target.part == 2:  # query, key and value follow each other
            theirs[target.name] = _pack(packed.pop(target.name), variant.heads(target.level), variant.packing)
    return theirs


def swap_halves(weight: Tensor, axis: int) -> Tensor:
    """Exchange the halves of sines and cosines; an odd width has one column of padding, which stays."""
    half = weight.shape[axis] // 2
    first, second, padding = weight.split([half, half, weight.shape[axis] - 2 * half], axis)
    return torch.cat([second, first, padding], axis)


def _unpack(packed: Tensor, heads: int, order: Packing) -> tuple[Tensor, ...]:
    if order == "new":
        return packed.chunk(3)
    rest = packed.shape[1:]
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
