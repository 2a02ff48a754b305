"""The parts of a checkpoint layout, and the place of a parameter among the blocks of a U-Net."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from unet_denoiser.config.base import QKVOrder
from unet_denoiser.config.unet import UNetConfig

Shapes = Mapping[str, Sequence[int]]
Packing = Literal[QKVOrder, "edm"]


class BlockStructure(NamedTuple):
    """The numbers from which the names of parameters are computed.

    blocks: residual blocks per level. levels: resolution levels. attended: for each level, True if it has attention.
    transformer: attention is a spatial transformer. resolution: that of the first level, which EDM's names contain.
    projection: the vector is diffusers' class_embed_type "projection".
    """

    blocks: int
    levels: int
    attended: tuple[bool, ...] = ()
    transformer: bool = False
    resolution: int = 0
    projection: bool = False

    @classmethod
    def from_config(cls, config: UNetConfig) -> Self:
        """Return the structure of an architecture."""
        attended = tuple(map(config.has_attention, range(len(config.widths))))
        transformer = config.attention == "transformer"
        counted = (config.num_res_blocks, len(attended), attended)
        return cls(*counted, transformer, config.resolutions[0], config.is_vector_projected)


class ParameterLocation(NamedTuple):
    """The place of a parameter, for example "decoder.5.1.attn.to_q.weight".

    half: "encoder", "bottleneck" or "decoder". entry: index in its list (5). level: resolution level. block: index in
    the level. child: index in the entry (1). leaf: the rest of the name. kind: "res", "attention", "down" or "up".
    """

    half: str
    entry: int
    level: int
    block: int
    child: int
    leaf: str
    kind: str


def locate(name: str, structure: BlockStructure) -> ParameterLocation | None:
    """Take the name of one of our parameters apart; None for one outside encoder, bottleneck and decoder."""
    if not name.startswith(("encoder", "bottleneck", "decoder")):
        return None
    half, first, rest = name.split(".", 2)
    n, last, index = structure.blocks, structure.levels - 1, int(first)
    if half == "bottleneck":
        return ParameterLocation(half, index, last, 0, index, rest, "attention" if index == 1 else "res")
    level, block = divmod(index, n + 1)
    if half == "encoder" and block == n:
        return ParameterLocation(half, index, level, block, 0, rest, "down")
    child, leaf = rest.split(".", 1)
    level = level if half == "encoder" else last - level
    kind = "res" if child == "0" else "attention" if child == "1" and structure.attended[level] else "up"
    return ParameterLocation(half, index, level, block, int(child), leaf, kind)


def describe_layer(name: str, structure: BlockStructure) -> str:
    """Return a parameter's layer in words, for example "the attention of encoder block 5"; "" outside the blocks."""
    if (place := locate(name, structure)) is None:
        return ""
    if place.half == "bottleneck":
        return "the attention of the bottleneck" if place.kind == "attention" else f"bottleneck block {place.child}"
    kinds = {"res": "residual block", "attention": "attention", "down": "downsampling", "up": "upsampling"}
    return f"the {kinds[place.kind]} of {place.half} block {place.entry}"


class ForeignTensor(NamedTuple):
    """A foreign tensor, and how it differs from our parameter.

    ones: trailing dimensions of length one that a weight has beyond ours (a 1x1 convolution for a linear layer).
    part: 0, 1, 2 if it packs query, key and value, and ours is one of them; `level` then tells the number of heads.
    transposed: it is a matrix on one-hot labels, and ours the table of its columns.
    """

    name: str
    ones: int = 0
    part: int | None = None
    level: int = 0
    transposed: bool = False


class Layout(NamedTuple):
    """A key map, and all else in which the files of its layout differ from others.

    key_map: the foreign tensor of one of our parameters; ValueError if there is none. marker: a tensor that all files
    of this layout have, and no others. count_blocks: blocks and levels by the names of a file's tensors, attention left
    open. implied: options of `UNetConfig` that no shape tells. infer_more: from (options, shapes) to further options,
    by a rule of this layout alone. cosines_first: as in `FormatVariant`. packing: likewise; None if files differ in it.
    """

    key_map: Callable[[str, BlockStructure], ForeignTensor]
    marker: str
    count_blocks: Callable[[Collection[str]], BlockStructure]
    implied: Mapping[str, Any]
    infer_more: Callable[[Mapping[str, Any], Shapes], dict[str, Any]] = lambda options, shapes: {}
    cosines_first: bool = False
    packing: Packing | None = None
