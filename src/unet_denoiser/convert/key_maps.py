"""The layouts of other code: the name of each of our parameters in each of them.

    compvis     Stable Diffusion, SDXL, LDM, ADM, improved-diffusion: input_blocks, middle_block, output_blocks
    diffusers   UNet2DModel, UNet2DConditionModel: down_blocks, mid_block, up_blocks
    ddpm        the PyTorch port of DDPM: down, mid, up
    edm         EDM's DhariwalUNet: enc, dec

A key map is a function of this name: from the name of one of our parameters to the foreign tensor that holds it.
`LAYOUTS` has each key map with all else in which the files of its layout differ from others.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from unet_denoiser.convert.layout import BlockStructure, ForeignTensor, Layout, ParameterLocation, Shapes, locate

# columns of the tables below, where None stands for a layer that the layout has not, or names by another rule
_COMPVIS, _DIFFUSERS, _DDPM, _EDM = range(4)
_OUTER = {
    "time_mlp.1": ("time_embed.0", "time_embedding.linear_1", "temb.dense.0", "map_layer0"),
    "time_mlp.3": ("time_embed.2", "time_embedding.linear_2", "temb.dense.1", "map_layer1"),
    "time_cond": ("time_embed.cond_proj", "time_embedding.cond_proj", None, "map_augment"),
    "class_embedding": ("label_emb", "class_embedding", None, "map_label"),
    "vector_embedding.0": ("label_emb.0.0", "add_embedding.linear_1", None, None),
    "vector_embedding.2": ("label_emb.0.2", "add_embedding.linear_2", None, None),
    "input_conv": ("input_blocks.0.0", "conv_in", "conv_in", None),
    "output.0": ("out.0", "conv_norm_out", "norm_out", "out_norm"),
    "output.2": ("out.2", "conv_out", "conv_out", "out_conv"),
}
_RES_BLOCK = {
    "norm1": ("in_layers.0", "norm1", "norm1", "norm0"),
    "conv1": ("in_layers.2", "conv1", "conv1", "conv0"),
    "time_mlp": ("emb_layers.1", "time_emb_proj", "temb_proj", "affine"),
    "norm2": ("out_layers.0", "norm2", "norm2", "norm1"),
    "conv2": ("out_layers.3", "conv2", "conv2", "conv1"),
    "skip": ("skip_connection", "conv_shortcut", "nin_shortcut", "skip"),
    "conv": (None, "conv", "conv", None),
}
_ATTENTION = {
    "norm": ("norm", "group_norm", "norm", "norm2"),
    "attn.to_q": (None, "to_q", "q", None),
    "attn.to_k": (None, "to_k", "k", None),
    "attn.to_v": (None, "to_v", "v", None),
    "attn.to_out": ("proj_out", "to_out.0", "proj_out", "proj"),
}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of diffusers, at first


def _rename(leaf: str, table: Mapping[str, tuple[str | None, ...]], layout: int) -> str:
    for ours, names in table.items():
        if (theirs := names[layout]) is not None and leaf.startswith(ours + "."):
            return theirs + leaf[len(ours) :]
    raise ValueError(f"this layout has no place for {leaf!r}")


def _map_transformer(prefix: str, leaf: str) -> ForeignTensor:
    """Map inside a spatial transformer, where all layouts agree."""
    name = leaf.replace(".to_out.", ".to_out.0.").replace(".ff.proj.", ".ff.net.0.proj.")
    return ForeignTensor(f"{prefix}.{name.replace('.ff.out.', '.ff.net.2.')}", 2 if leaf.startswith("proj_") else 0)


def _map_attention(prefix: str, place: ParameterLocation, layout: int, ones: int = 0) -> ForeignTensor:
    """Map plain attention; a layout without names for query, key and value has them in one tensor."""
    stem, _, end = place.leaf.rpartition(".")
    projections = ("attn.to_q", "attn.to_k", "attn.to_v")
    if stem in projections and _ATTENTION[stem][layout] is None:
        return ForeignTensor(f"{prefix}.qkv.{end}", ones, projections.index(stem), place.level)
    return ForeignTensor(f"{prefix}.{_rename(place.leaf, _ATTENTION, layout)}", 0 if stem == "norm" else ones)


def _count(names: Collection[str], pattern: str) -> int:
    """Return 1 + the largest index that a pattern finds at the beginning of names."""
    return max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1) + 1


def compvis(name: str, structure: BlockStructure) -> ForeignTensor:
    """Map to the flat layout of Stable Diffusion and ADM: input_blocks, middle_block, output_blocks."""
    if (place := locate(name, structure)) is None:
        return ForeignTensor(_rename(name, _OUTER, _COMPVIS))
    prefix = {
        "encoder": f"input_blocks.{place.entry + 1}.{place.child}",
        "bottleneck": f"middle_block.{place.child}",
        "decoder": f"output_blocks.{place.entry}.{place.child}",
    }[place.half]
    leaf = place.leaf
    if leaf.startswith("conv."):
        return ForeignTensor(f"{prefix}.{leaf.replace('conv', 'op') if place.kind == 'down' else leaf}")
    if place.kind != "attention":
        return ForeignTensor(f"{prefix}.{_rename(leaf, _RES_BLOCK, _COMPVIS)}")
    if structure.transformer:
        return _map_transformer(prefix, leaf)
    return _map_attention(prefix, place, _COMPVIS, ones=1)


def _count_compvis(names: Collection[str]) -> BlockStructure:
    """Count output blocks; the first one that upsamples is the last of its level."""
    entries = _count(names, r"output_blocks\.(\d+)\.")
    upsampling = re.compile(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.0)\.weight")
    first = min((int(match[1]) for name in names if (match := upsampling.fullmatch(name))), default=entries - 1)
    return BlockStructure(first, entries // (first + 1) if entries else 0)


def diffusers(name: str, structure: BlockStructure) -> ForeignTensor:
    """Map to the nested layout of diffusers: down_blocks, mid_block, up_blocks, from the lowest resolution up."""
    if (place := locate(name, structure)) is None:
        renamed = _rename(name, _OUTER, _DIFFUSERS)
        return ForeignTensor(renamed.replace("add_embedding", "class_embedding") if structure.projection else renamed)
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
        return _map_attention(prefix, place, _DIFFUSERS)
    group = {"res": f"resnets.{block}", "down": "downsamplers.0", "up": "upsamplers.0"}[place.kind]
    return ForeignTensor(f"{parent}.{group}.{_rename(place.leaf, _RES_BLOCK, _DIFFUSERS)}")


def _count_diffusers(names: Collection[str]) -> BlockStructure:
    return BlockStructure(_count(names, r"down_blocks\.0\.resnets\.(\d+)\."), _count(names, r"down_blocks\.(\d+)\."))


def ddpm(name: str, structure: BlockStructure) -> ForeignTensor:
    """Map to the layout of DDPM's PyTorch port: down, mid, up, numbered by resolution level in both halves."""
    if (place := locate(name, structure)) is None:
        return ForeignTensor(_rename(name, _OUTER, _DDPM))
    if place.half == "bottleneck":
        prefix = "mid." + ("block_1", "attn_1", "block_2")[place.child]
    else:
        parent = f"{'down' if place.half == 'encoder' else 'up'}.{place.level}"
        group = {"res": f"block.{place.block}", "attention": f"attn.{place.block}"}
        prefix = f"{parent}.{group.get(place.kind, place.kind + 'sample')}"
    if place.kind == "attention":
        return _map_attention(prefix, place, _DDPM, ones=2)
    return ForeignTensor(f"{prefix}.{_rename(place.leaf, _RES_BLOCK, _DDPM)}")


def _count_ddpm(names: Collection[str]) -> BlockStructure:
    return BlockStructure(_count(names, r"down\.0\.block\.(\d+)\."), _count(names, r"down\.(\d+)\."))


def edm(name: str, structure: BlockStructure) -> ForeignTensor:
    """Map to the layout of EDM: enc and dec by resolution; a residual block holds its attention too."""

    def at(level: int) -> str:
        size = structure.resolution >> level
        return f"{size}x{size}"

    if name.startswith("input_conv"):
        return ForeignTensor(f"enc.{at(0)}_conv.{name.partition('.')[2]}")
    if (place := locate(name, structure)) is None:
        return ForeignTensor(_rename(name, _OUTER, _EDM), transposed=name == "class_embedding.weight")
    # resampling is the first block of the level it leads to
    level = place.level + {"down": 1, "up": -1}.get(place.kind, 0)
    block = f"in{place.child // 2}" if place.half == "bottleneck" else f"block{place.block}"
    entry = place.kind if place.kind in ("down", "up") else block
    prefix = f"{'enc' if place.half == 'encoder' else 'dec'}.{at(level)}_{entry}"
    if place.kind != "attention":
        return ForeignTensor(f"{prefix}.{_rename(place.leaf, _RES_BLOCK, _EDM)}")
    return _map_attention(prefix, place, _EDM, ones=2)


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


_HALF = {"time_frequencies": "half"}  # a diffusers folder's config.json may tell otherwise
LAYOUTS = {
    "compvis": Layout(compvis, "input_blocks.0.0.weight", _count_compvis, _HALF, cosines_first=True),
    "ddpm": Layout(ddpm, "temb.dense.0.weight", _count_ddpm, {"downsample": "conv_asymmetric", "norm_eps": 1e-6}),
    "diffusers": Layout(diffusers, "time_embedding.linear_1.weight", _count_diffusers, _HALF, cosines_first=True),
    "edm": Layout(
        edm,
        marker="map_layer0.weight",
        count_blocks=_count_edm,
        implied={**_HALF, "num_heads": None, "head_dim": 64},
        infer_more=_infer_edm,
        cosines_first=True,
        packing="edm",
    ),
}
