"""The architecture of a checkpoint, from its names and shapes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from unet_denoiser.config.base import QKVOrder
from unet_denoiser.config.presets import PRESETS, preset
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert.key_maps import LAYOUTS, BlockStructure

Shapes = Mapping[str, Sequence[int]]

_SIGNS = {
    "compvis": "input_blocks.0.0.weight",
    "ddpm": "temb.dense.0.weight",
    "diffusers": "time_embedding.linear_1.weight",
    "edm": "map_layer0.weight",
}
# what a layout tells without a shape
_MEANT: dict[str, dict[str, Any]] = {
    "compvis": {"time_frequencies": "half"},
    "ddpm": {"downsample": "conv_asymmetric", "norm_eps": 1e-6},
    "diffusers": {},
    "edm": {"time_frequencies": "half", "num_heads": None, "head_dim": 64},
}
# what neither names nor shapes tell, or what does not change the network
_UNSEEN = ("num_heads", "head_dim", "dropout", "image_size", "attention_resolutions", "norm_groups")


def detect_layout(names: Collection[str]) -> str:
    """The layout of a checkpoint, a key of `LAYOUTS`; ValueError when it is none of them."""
    for layout, sign in _SIGNS.items():
        if sign in names:
            return layout
    if "time_mlp.1.weight" in names:
        raise ValueError("these are this library's own weights; give the directory that has their config.json too")
    some = ", ".join(sorted(names)[:3]) or "no tensors at all"
    raise ValueError(f"not a U-Net of this family: it has {some}; expected one of {', '.join(_SIGNS.values())}")


def detect_structure(layout: str, names: Collection[str]) -> BlockStructure:
    """Count the blocks and levels."""
    resolution = 0
    if layout == "compvis":
        entries = _count(names, r"output_blocks\.(\d+)\.")
        ends = [i for i in range(entries) if _has_upsampling(names, i)]
        blocks = ends[0] if ends else entries - 1
        levels = entries // (blocks + 1) if entries else 0
    elif layout == "diffusers":
        blocks, levels = _count(names, r"down_blocks\.0\.resnets\.(\d+)\."), _count(names, r"down_blocks\.(\d+)\.")
    elif layout == "edm":
        resolutions = {int(match[1]) for name in names if (match := re.match(r"enc\.(\d+)x\d+_", name))}
        resolution, levels = max(resolutions, default=0), len(resolutions)
        blocks = _count(names, rf"enc\.{resolution}x{resolution}_block(\d+)\.")
    else:
        blocks, levels = _count(names, r"down\.0\.block\.(\d+)\."), _count(names, r"down\.(\d+)\.")
    if blocks < 1 or levels < 1:
        raise ValueError(f"a {layout} checkpoint without encoder blocks: it is not a whole U-Net")
    transformer = any(".transformer_blocks." in name for name in names)
    bare = BlockStructure(blocks, levels, (True,) * levels, transformer, resolution)

    def attended(level: int) -> bool:
        entries = range(level * (blocks + 1), level * (blocks + 1) + blocks)
        return any(LAYOUTS[layout](f"encoder.{entry}.1.norm.weight", bare).name in names for entry in entries)

    return bare._replace(attended=tuple(map(attended, range(levels))))


def infer_options(layout: str, shapes: Shapes, bones: BlockStructure) -> dict[str, Any]:
    """The options of `UNetConfig` that names and shapes tell; all but the heads, the resolutions' scale and dropout."""
    n, levels = bones.blocks, bones.levels

    def shape(name: str) -> Sequence[int] | None:
        try:
            return shapes.get(LAYOUTS[layout](name, bones).name)
        except ValueError:  # this layout has no such thing
            return None

    def need(name: str, ndim: int | None = None) -> Sequence[int]:
        found, foreign = shape(name), LAYOUTS[layout](name, bones).name
        if found is None:
            raise ValueError(f"the checkpoint lacks {foreign}")
        if 0 in found or (not 3 <= len(found) <= 5 if ndim is None else len(found) != ndim):
            raise ValueError(f"the checkpoint's {foreign} has the shape {tuple(found)}, which no U-Net has")
        return found

    stem, time = need("input_conv.weight"), need("time_mlp.1.weight", 2)
    width = time[1]
    conv1 = [need(f"encoder.{level * (n + 1)}.0.conv1.weight") for level in range(levels)]
    image_size = bones.resolution or max(64, 2 ** (levels + 1))
    options: dict[str, Any] = {
        "in_channels": stem[1],
        "model_channels": width,
        "out_channels": need("output.2.weight")[0],
        "num_res_blocks": n,
        "channel_mult": tuple(c[0] / width for c in conv1),
        "stem_channels": None if stem[0] == width else stem[0],
        "dims": len(stem) - 2,
        "image_size": image_size,
        "attention_resolutions": tuple(image_size // 2**level for level in range(levels) if bones.attended[level]),
        "learned_null": False,
        "modulation": "add" if need("encoder.0.0.time_mlp.weight", 2)[0] == conv1[0][0] else "scale_shift",
        "context_dim": None,
        "upsample": "nearest",
        **_MEANT[layout],
    }
    if levels > 1:
        downs = [f"encoder.{level * (n + 1) + n}" for level in range(levels - 1)]
        if not any(shape(f"{down}.conv.weight") for down in downs):
            options["downsample"] = "resblock" if any(shape(f"{down}.conv1.weight") for down in downs) else "avgpool"
        if shape(f"decoder.{n}.{1 + bones.attended[-1]}.conv1.weight") is not None:
            options["upsample"] = "resblock"
    if (classes := shape("class_embedding.weight")) is not None:
        options["num_classes"] = classes[layout == "edm"]  # a matrix on one-hot labels there
    if (vector := shape("vector_embedding.0.weight")) is not None:
        options["vector_dim"] = vector[1]
    if (cond := shape("time_cond.weight")) is not None:
        options["time_cond_dim"] = cond[1]
    if bones.transformer:
        options |= _transformer_options(shapes, layout, bones, [c[0] for c in conv1])
    if layout == "edm":
        if options["modulation"] == "add":
            raise ValueError("EDM's SongUNet (DDPM++, NCSN++) scales its skips and has no counterpart here")
        options["norm_groups"] = _edm_groups(shapes)
    return options


def _edm_groups(shapes: Shapes) -> int:
    """EDM's norms have at least four channels a group; one `norm_groups` must give the same groups everywhere."""
    widths = {shape[0] for name, shape in shapes.items() if re.search(r"norm\d?\.weight$", name)}
    groups = {min(32, width // 4) for width in widths}
    if len(groups) > 1:
        raise ValueError(f"norms of {sorted(groups)} groups have no counterpart here; a network 128 wide has 32 in all")
    return groups.pop()


def _transformer_options(shapes: Shapes, layout: str, bones: BlockStructure, widths: list[int]) -> dict[str, Any]:
    bones = bones._replace(attended=(True,) * bones.levels)  # so that every level can be asked

    def depth(prefix: str) -> int:
        k = 0
        while LAYOUTS[layout](f"{prefix}.transformer_blocks.{k}.norm1.weight", bones).name in shapes:
            k += 1
        return k

    depths = [depth(f"encoder.{level * (bones.blocks + 1)}.1") for level in range(bones.levels)]
    depths[-1] = depth("bottleneck.1") or max(depths)
    seconds = (shape for name, shape in shapes.items() if name.endswith(".transformer_blocks.0.attn2.to_k.weight"))
    options: dict[str, Any] = {"attention": "transformer", "context_dim": next(seconds, (0, None))[1]}
    options["transformer_depth"] = depths[-1] if len(set(depths) - {0}) == 1 else tuple(depths)
    crosses = []
    for level, width in enumerate(widths):
        name = f"encoder.{level * (bones.blocks + 1)}.1.transformer_blocks.0.attn1.to_k.weight"
        keys = shapes.get(LAYOUTS[layout](name, bones).name)
        crosses.append(keys is not None and keys[1] != width)
    if any(crosses):
        options["only_cross_attention"] = tuple(crosses)
    return options


def fill_from_preset(options: dict[str, Any], given: Mapping[str, Any]) -> tuple[UNetConfig, str | None]:
    """Add what shapes cannot tell: from `given`, else from the preset that has everything else in common.

    Returns:
        The configuration, and the preset's name if one was needed.

    Raises:
        ValueError: the number of heads is neither given nor that of a known network.
    """
    if "num_heads" in given or "head_dim" in given:
        heads = {"num_heads": given.get("num_heads"), "head_dim": given.get("head_dim")}
        return UNetConfig(**options | heads | dict(given)), None
    probe = UNetConfig(**options | {"num_heads": 1})
    for name in PRESETS:
        known = preset(name)
        if _visible(known) == _visible(probe):
            own = {field: getattr(known, field) for field in _UNSEEN}
            return UNetConfig(**options | own | dict(given)), name
    raise ValueError(
        "the file does not tell the number of attention heads, and no known network has its shapes "
        f"({describe(probe)}); give num_heads=... or head_dim=..., for example head_dim=64"
    )


def published_order(config: UNetConfig) -> QKVOrder:
    """How the published file of an architecture packs query, key and value (ADM's use_new_attention_order)."""
    new = ("adm-64-cond", "edm-imagenet64-cond")  # the second as OpenAI's consistency models have it
    return "new" if any(_visible(preset(name)) == _visible(config) for name in new) else "legacy"


def describe(config: UNetConfig) -> str:
    """The known network that is nearest to an architecture, and where they differ."""
    own = _visible(config)
    differences = {
        name: [field for field, value in _visible(preset(name)).items() if own[field] != value] for name in PRESETS
    }
    name = min(differences, key=lambda name: len(differences[name]))
    if not differences[name]:
        return f"this looks like {name}"
    if len(differences[name]) > 3:
        return "this looks like no published network"
    return f"this looks like {name} with {', '.join(f'{field}={own[field]}' for field in differences[name])}"


def _visible(config: UNetConfig) -> dict[str, Any]:
    """What names and shapes tell of a configuration."""
    levels = range(len(config.widths))
    seen = {name: value for name, value in config.to_dict().items() if name not in _UNSEEN}
    depths = [config.depth(level) for level in levels if config.has_attention(level)]
    seen["transformer_depth"] = [*depths, config.depth(len(config.widths) - 1)]
    return seen | {"attended": [config.has_attention(level) for level in levels]}


def _count(names: Collection[str], pattern: str) -> int:
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    return max(found, default=-1) + 1


def _has_upsampling(names: Collection[str], index: int) -> bool:
    ends = ("conv.weight", "in_layers.0.weight")
    return any(f"output_blocks.{index}.{child}.{end}" in names for child in (1, 2) for end in ends)
