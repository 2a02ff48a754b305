"""The layouts of other code: the name of each of our parameters in each of them.

    compvis     Stable Diffusion, SDXL, LDM, ADM, improved-diffusion: input_blocks, middle_block, output_blocks
    diffusers   UNet2DModel, UNet2DConditionModel: down_blocks, mid_block, up_blocks
    ddpm        the PyTorch port of DDPM: down, mid, up
    edm         EDM's DhariwalUNet: enc, dec

A key map is a function of this name: from the name of one of our parameters to the foreign tensor that holds it.
Loading asks it for the source of a parameter, saving for the destination. Beside it stands the layout's record, a
`Layout`, with all else in which its files differ from others; `LAYOUTS` has the records by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from unet_denoiser.convert.layout import BlockStructure, ForeignTensor, Layout, ParameterLocation, Shapes, locate


def _rename(leaf: str, table: dict[str, str]) -> str:
    """Replace the longest beginning that the table has."""
    for ours in sorted(table, key=len, reverse=True):
        if leaf == ours or leaf.startswith(ours + "."):
            return table[ours] + leaf[len(ours) :]
    raise ValueError(f"this layout has no place for {leaf!r}")


def _ones(leaf: str, count: int) -> int:
    return count if leaf.endswith("weight") else 0


def _map_transformer(prefix: str, leaf: str) -> ForeignTensor:
    """Map inside a spatial transformer, where all layouts agree."""
    name = leaf.replace(".to_out.", ".to_out.0.")
    name = name.replace(".ff.proj.", ".ff.net.0.proj.").replace(".ff.out.", ".ff.net.2.")
    return ForeignTensor(f"{prefix}.{name}", _ones(leaf, 2) if leaf.startswith("proj_") else 0)


def _map_packed(prefix: str, place: ParameterLocation, projection: str, ones: int) -> ForeignTensor:
    """Map attention that has query, key and value in one tensor."""
    stem, _, end = place.leaf.rpartition(".")
    if stem == "attn.to_out":
        return ForeignTensor(f"{prefix}.{projection}.{end}", _ones(end, ones))
    part = ("attn.to_q", "attn.to_k", "attn.to_v").index(stem)
    return ForeignTensor(f"{prefix}.qkv.{end}", _ones(end, ones), part, place.level)


def _count(names: Collection[str], pattern: str) -> int:
    """Return 1 + the largest index that a pattern finds at the beginning of names."""
    return max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1) + 1


def _count_blocks(level: str, block: str, names: Collection[str]) -> BlockStructure:
    """Count levels, and the blocks of the first one, by a pattern each."""
    return BlockStructure(_count(names, block), _count(names, level))


# ---- Stable Diffusion, SDXL, LDM, ADM, improved-diffusion -----------------------------------------------------------

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


def compvis(name: str, structure: BlockStructure) -> ForeignTensor:
    """Map to the flat layout of Stable Diffusion and ADM: input_blocks, middle_block, output_blocks."""
    place = locate(name, structure)
    if place is None:
        return ForeignTensor(_rename(name, _COMPVIS_TOP))
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
    if structure.transformer:
        return _map_transformer(prefix, leaf)
    if leaf.startswith("norm."):
        return ForeignTensor(f"{prefix}.{leaf}")
    return _map_packed(prefix, place, "proj_out", 1)


def _count_compvis(names: Collection[str]) -> BlockStructure:
    """Count output blocks; the first one that upsamples is the last of its level."""
    entries = _count(names, r"output_blocks\.(\d+)\.")
    upsampling = re.compile(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.0)\.weight")
    first = min((int(match[1]) for name in names if (match := upsampling.fullmatch(name))), default=entries - 1)
    return BlockStructure(first, entries // (first + 1) if entries else 0)


COMPVIS = Layout(
    compvis,
    marker="input_blocks.0.0.weight",
    count_blocks=_count_compvis,
    implied={"time_frequencies": "half"},
    cosines_first=True,
)

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


def diffusers(name: str, structure: BlockStructure) -> ForeignTensor:
    """Map to the nested layout of diffusers: down_blocks, mid_block, up_blocks, from the lowest resolution up."""
    place = locate(name, structure)
    if place is None:
        return ForeignTensor(_rename(name, _DIFFUSERS_TOP))
    parent = {
        "encoder": f"down_blocks.{place.level}",
        "bottleneck": "mid_block",
        "decoder": f"up_blocks.{structure.levels - 1 - place.level}",
    }[place.half]
    block = place.block if place.half != "bottleneck" else place.child // 2
    if place.kind == "attention":
        prefix = f"{parent}.attentions.{block if place.half != 'bottleneck' else 0}"
        if structure.transformer:
            return _map_transformer(prefix, place.leaf)
        return ForeignTensor(f"{prefix}.{_rename(place.leaf, _DIFFUSERS_ATTENTION)}")
    group = {"res": f"resnets.{block}", "down": "downsamplers.0", "up": "upsamplers.0"}[place.kind]
    return ForeignTensor(f"{parent}.{group}.{_rename(place.leaf, _DIFFUSERS_RES)}")


DIFFUSERS = Layout(
    diffusers,
    marker="time_embedding.linear_1.weight",
    count_blocks=partial(_count_blocks, r"down_blocks\.(\d+)\.", r"down_blocks\.0\.resnets\.(\d+)\."),
    implied={"time_frequencies": "half"},  # a folder's config.json tells, and may tell otherwise
    cosines_first=True,
)

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


def ddpm(name: str, structure: BlockStructure) -> ForeignTensor:
    """Map to the layout of DDPM's PyTorch port: down, mid, up, numbered by resolution level in both halves."""
    place = locate(name, structure)
    if place is None:
        return ForeignTensor(_rename(name, _DDPM_TOP))
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


DDPM = Layout(
    ddpm,
    marker="temb.dense.0.weight",
    count_blocks=partial(_count_blocks, r"down\.(\d+)\.", r"down\.0\.block\.(\d+)\."),
    implied={"downsample": "conv_asymmetric", "norm_eps": 1e-6},
)

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


def edm(name: str, structure: BlockStructure) -> ForeignTensor:
    """Map to the layout of EDM: enc and dec by resolution; a residual block holds its attention too."""

    def at(level: int) -> str:
        size = structure.resolution >> level
        return f"{size}x{size}"

    place = locate(name, structure)
    if name.startswith("input_conv"):
        return ForeignTensor(f"enc.{at(0)}_conv.{name.partition('.')[2]}")
    if place is None:
        return ForeignTensor(_rename(name, _EDM_TOP), transposed=name == "class_embedding.weight")
    # resampling is the first block of the level it leads to
    level = place.level + {"down": 1, "up": -1}.get(place.kind, 0)
    block = f"in{place.child // 2}" if place.half == "bottleneck" else f"block{place.block}"
    entry = place.kind if place.kind in ("down", "up") else block
    prefix = f"{'enc' if place.half == 'encoder' else 'dec'}.{at(level)}_{entry}"
    if place.kind != "attention":
        return ForeignTensor(f"{prefix}.{_rename(place.leaf, _EDM_RES)}")
    if place.leaf.startswith("norm."):
        return ForeignTensor(f"{prefix}.norm2.{place.leaf.partition('.')[2]}")
    return _map_packed(prefix, place, "proj", 2)


def _count_edm(names: Collection[str]) -> BlockStructure:
    resolutions = {int(match[1]) for name in names if (match := re.match(r"enc\.(\d+)x\d+_", name))}
    largest = max(resolutions, default=0)
    blocks = _count(names, rf"enc\.{largest}x{largest}_block(\d+)\.")
    return BlockStructure(blocks, len(resolutions), resolution=largest)


def _infer_edm(options: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Infer norm_groups: EDM's norms have at least four channels a group, ours the same number of groups everywhere."""
    if options["modulation"] == "add":
        raise ValueError("EDM's SongUNet (DDPM++, NCSN++) scales its skips and has no counterpart here")
    widths = {shape[0] for name, shape in shapes.items() if re.search(r"norm\d?\.weight$", name)}
    groups = {min(32, width // 4) for width in widths}
    if len(groups) > 1:
        raise ValueError(f"norms of {sorted(groups)} groups have no counterpart here; a network 128 wide has 32 in all")
    return {"norm_groups": groups.pop()}


EDM = Layout(
    edm,
    marker="map_layer0.weight",
    count_blocks=_count_edm,
    implied={"time_frequencies": "half", "num_heads": None, "head_dim": 64},
    infer_more=_infer_edm,
    cosines_first=True,
    packing="edm",
)

LAYOUTS = {"compvis": COMPVIS, "ddpm": DDPM, "diffusers": DIFFUSERS, "edm": EDM}
