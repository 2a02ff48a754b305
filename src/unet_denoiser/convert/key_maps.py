"""Where each of our parameters is in the published layouts: rename tables and index arithmetic.

A layout is a function from the name of one of our parameters to the foreign tensor that holds it. It works both ways:
loading asks it for the source of each parameter, saving for the destination.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from unet_denoiser.config.unet import UNetConfig


class BlockStructure(NamedTuple):
    """What the index arithmetic needs: residual blocks per level, levels, which have attention, and its kind.

    resolution: of the first level, for the layout that has it in its names.
    """

    blocks: int
    levels: int
    attended: tuple[bool, ...]
    transformer: bool = False
    resolution: int = 0


def block_structure(config: UNetConfig) -> BlockStructure:
    """The skeleton of an architecture."""
    levels = len(config.widths)
    attended = tuple(map(config.has_attention, range(levels)))
    return BlockStructure(
        config.num_res_blocks, levels, attended, config.attention == "transformer", config.resolutions[0]
    )


class ForeignTensor(NamedTuple):
    """A foreign tensor, and how it differs from our parameter.

    ones: trailing dimensions of length one that it has and ours has not (a 1x1 convolution for a linear layer).
    part: 0, 1, 2 when it holds query, key and value packed, and ours is one of them; with the level, for the heads.
    transposed: it is a matrix on one-hot labels, and ours the table of its columns.
    """

    name: str
    ones: int = 0
    part: int | None = None
    level: int = 0
    transposed: bool = False


class ParameterLocation(NamedTuple):
    """Where a parameter is: half, entry, child of that, block of a level, what is left of its name, kind of layer."""

    half: str
    entry: int
    level: int
    block: int
    child: int
    leaf: str
    kind: str  # "res", "attention", "down" or "up"


Layout = Callable[[str, BlockStructure], ForeignTensor]


def locate(name: str, skeleton: BlockStructure) -> ParameterLocation:
    """Take a name like "decoder.5.1.attn.to_q.weight" apart."""
    half, first, rest = name.split(".", 2)
    n, last = skeleton.blocks, skeleton.levels - 1
    index = int(first)
    if half == "bottleneck":
        return ParameterLocation(half, index, last, 0, index, rest, "attention" if index == 1 else "res")
    level, block = divmod(index, n + 1)
    if half == "encoder" and block == n:
        return ParameterLocation(half, index, level, block, 0, rest, "down")
    child, leaf = rest.split(".", 1)
    level = level if half == "encoder" else last - level
    kind = "res" if child == "0" else "attention" if child == "1" and skeleton.attended[level] else "up"
    return ParameterLocation(half, index, level, block, int(child), leaf, kind)


def layer_name(name: str, skeleton: BlockStructure) -> str:
    """What a reader calls the layer of a parameter: "the attention of encoder block 5"; "" outside the blocks."""
    if not name.startswith(("encoder", "bottleneck", "decoder")):
        return ""
    place = locate(name, skeleton)
    if place.half == "bottleneck":
        return "the attention of the bottleneck" if place.kind == "attention" else f"bottleneck block {place.child}"
    kinds = {"res": "residual block", "attention": "attention", "down": "downsampling", "up": "upsampling"}
    return f"the {kinds[place.kind]} of {place.half} block {place.entry}"


def _rename(leaf: str, table: dict[str, str]) -> str:
    """Replace the longest beginning that the table has."""
    for ours in sorted(table, key=len, reverse=True):
        if leaf == ours or leaf.startswith(ours + "."):
            return table[ours] + leaf[len(ours) :]
    raise ValueError(f"this layout has no place for {leaf!r}")


def _transformer(leaf: str) -> str:
    """Inside a spatial transformer all layouts agree."""
    return (
        leaf.replace(".to_out.", ".to_out.0.").replace(".ff.proj.", ".ff.net.0.proj.").replace(".ff.out.", ".ff.net.2.")
    )


def _ones(leaf: str, count: int) -> int:
    return count if leaf.endswith("weight") else 0


def _packed(prefix: str, place: ParameterLocation, projection: str, ones: int) -> ForeignTensor:
    """Attention with query, key and value in one tensor."""
    stem, _, end = place.leaf.rpartition(".")
    if stem == "attn.to_out":
        return ForeignTensor(f"{prefix}.{projection}.{end}", _ones(end, ones))
    part = ("attn.to_q", "attn.to_k", "attn.to_v").index(stem)
    return ForeignTensor(f"{prefix}.qkv.{end}", _ones(end, ones), part, place.level)


# ---- ADM, improved-diffusion, LDM, Stable Diffusion ------------------------------------------------------------------

_COMPVIS_TOP = {
    "time_mlp.1": "time_embed.0",
    "time_mlp.3": "time_embed.2",
    "class_embedding": "label_emb",
    "vector_embedding": "label_emb.0",
    "input_conv": "input_blocks.0.0",
    "output": "out",
}
_COMPVIS_RES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_mlp": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}


def compvis(name: str, skeleton: BlockStructure) -> ForeignTensor:
    """The flat layout: input_blocks, middle_block, output_blocks."""
    if not name.startswith(("encoder", "bottleneck", "decoder")):
        return ForeignTensor(_rename(name, _COMPVIS_TOP))
    place = locate(name, skeleton)
    prefix = {
        "encoder": f"input_blocks.{place.entry + 1}.{place.child}",
        "bottleneck": f"middle_block.{place.child}",
        "decoder": f"output_blocks.{place.entry}.{place.child}",
    }[place.half]
    leaf = place.leaf
    if leaf.startswith("conv."):
        return ForeignTensor(f"{prefix}.{leaf.replace('conv', 'op') if place.kind == 'down' else leaf}")
    if place.kind != "attention":
        return ForeignTensor(f"{prefix}.{_rename(leaf, _COMPVIS_RES)}")
    if skeleton.transformer:
        return ForeignTensor(f"{prefix}.{_transformer(leaf)}", _ones(leaf, 2) if leaf.startswith("proj_") else 0)
    if leaf.startswith("norm."):
        return ForeignTensor(f"{prefix}.{leaf}")
    return _packed(prefix, place, "proj_out", 1)


# ---- diffusers -------------------------------------------------------------------------------------------------------

_DIFFUSERS_TOP = {
    "time_mlp.1": "time_embedding.linear_1",
    "time_mlp.3": "time_embedding.linear_2",
    "time_cond": "time_embedding.cond_proj",
    "class_embedding": "class_embedding",
    "vector_embedding.0": "add_embedding.linear_1",
    "vector_embedding.2": "add_embedding.linear_2",
    "input_conv": "conv_in",
    "output.0": "conv_norm_out",
    "output.2": "conv_out",
}
_DIFFUSERS_RES = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time_mlp": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
    "conv": "conv",
}
_DIFFUSERS_ATTENTION = {
    "norm": "group_norm",
    "attn.to_q": "to_q",
    "attn.to_k": "to_k",
    "attn.to_v": "to_v",
    "attn.to_out": "to_out.0",
}


def diffusers(name: str, skeleton: BlockStructure) -> ForeignTensor:
    """The nested layout: down_blocks, mid_block, up_blocks, from the lowest resolution up."""
    if not name.startswith(("encoder", "bottleneck", "decoder")):
        return ForeignTensor(_rename(name, _DIFFUSERS_TOP))
    place = locate(name, skeleton)
    parent = {
        "encoder": f"down_blocks.{place.level}",
        "bottleneck": "mid_block",
        "decoder": f"up_blocks.{skeleton.levels - 1 - place.level}",
    }[place.half]
    block = place.block if place.half != "bottleneck" else place.child // 2
    if place.kind == "attention":
        prefix = f"{parent}.attentions.{block if place.half != 'bottleneck' else 0}"
        if skeleton.transformer:
            ones = _ones(place.leaf, 2) if place.leaf.startswith("proj_") else 0
            return ForeignTensor(f"{prefix}.{_transformer(place.leaf)}", ones)
        return ForeignTensor(f"{prefix}.{_rename(place.leaf, _DIFFUSERS_ATTENTION)}")
    group = {"res": f"resnets.{block}", "down": "downsamplers.0", "up": "upsamplers.0"}[place.kind]
    return ForeignTensor(f"{parent}.{group}.{_rename(place.leaf, _DIFFUSERS_RES)}")


# ---- the PyTorch port of DDPM ----------------------------------------------------------------------------------------

_DDPM_TOP = {
    "time_mlp.1": "temb.dense.0",
    "time_mlp.3": "temb.dense.1",
    "input_conv": "conv_in",
    "output.0": "norm_out",
    "output.2": "conv_out",
}
_DDPM_RES = _DIFFUSERS_RES | {"time_mlp": "temb_proj", "skip": "nin_shortcut"}
_DDPM_ATTENTION = {
    "norm": "norm",
    "attn.to_q": "q",
    "attn.to_k": "k",
    "attn.to_v": "v",
    "attn.to_out": "proj_out",
}


def ddpm(name: str, skeleton: BlockStructure) -> ForeignTensor:
    """The layout by level: down, mid, up, numbered by resolution in both halves."""
    if not name.startswith(("encoder", "bottleneck", "decoder")):
        return ForeignTensor(_rename(name, _DDPM_TOP))
    place = locate(name, skeleton)
    if place.half == "bottleneck":
        prefix = "mid." + ("block_1", "attn_1", "block_2")[place.child]
    else:
        parent = f"{'down' if place.half == 'encoder' else 'up'}.{place.level}"
        group = {"res": f"block.{place.block}", "attention": f"attn.{place.block}"}
        prefix = f"{parent}.{group.get(place.kind, place.kind + 'sample')}"
    if place.kind == "attention":
        ones = 0 if place.leaf.startswith("norm") else _ones(place.leaf, 2)
        return ForeignTensor(f"{prefix}.{_rename(place.leaf, _DDPM_ATTENTION)}", ones)
    return ForeignTensor(f"{prefix}.{_rename(place.leaf, _DDPM_RES)}")


# ---- EDM's DhariwalUNet ----------------------------------------------------------------------------------------------

_EDM_TOP = {
    "time_mlp.1": "map_layer0",
    "time_mlp.3": "map_layer1",
    "time_cond": "map_augment",
    "class_embedding": "map_label",
    "output.0": "out_norm",
    "output.2": "out_conv",
}
_EDM_RES = {
    "norm1": "norm0",
    "conv1": "conv0",
    "time_mlp": "affine",
    "norm2": "norm1",
    "conv2": "conv1",
    "skip": "skip",
}


def edm(name: str, skeleton: BlockStructure) -> ForeignTensor:
    """The layout by resolution: enc and dec, where a residual block holds its attention too."""
    if name.startswith("input_conv"):
        return ForeignTensor(f"enc.{_square(skeleton.resolution)}_conv.{name.partition('.')[2]}")
    if not name.startswith(("encoder", "bottleneck", "decoder")):
        return ForeignTensor(_rename(name, _EDM_TOP), transposed=name == "class_embedding.weight")
    place = locate(name, skeleton)
    # resampling is the first block of the level it leads to
    level = place.level + {"down": 1, "up": -1}.get(place.kind, 0)
    block = f"in{place.child // 2}" if place.half == "bottleneck" else f"block{place.block}"
    entry = place.kind if place.kind in ("down", "up") else block
    prefix = f"{'enc' if place.half == 'encoder' else 'dec'}.{_square(skeleton.resolution >> level)}_{entry}"
    if place.kind != "attention":
        return ForeignTensor(f"{prefix}.{_rename(place.leaf, _EDM_RES)}")
    if place.leaf.startswith("norm."):
        return ForeignTensor(f"{prefix}.norm2.{place.leaf.partition('.')[2]}")
    return _packed(prefix, place, "proj", 2)


def _square(resolution: int) -> str:
    return f"{resolution}x{resolution}"


LAYOUTS: dict[str, Layout] = {"compvis": compvis, "diffusers": diffusers, "ddpm": ddpm, "edm": edm}
