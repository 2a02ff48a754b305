"""The architecture of a checkpoint, from its names and shapes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from unet_denoiser.config import UNetConfig
from unet_denoiser.convert.layouts import LAYOUTS, Skeleton
from unet_denoiser.presets import PRESETS, preset

Shapes = Mapping[str, Sequence[int]]

_SIGNS = {
    "compvis": "input_blocks.0.0.weight",
    "ddpm": "temb.dense.0.weight",
    "diffusers": "time_embedding.linear_1.weight",
}
# what a layout tells without a shape
_MEANT: dict[str, dict[str, Any]] = {
    "compvis": {"time_frequencies": "half"},
    "ddpm": {"downsample": "conv_asymmetric", "norm_eps": 1e-6},
    "diffusers": {},
}
# what neither names nor shapes tell, or what does not change the network
_UNSEEN = ("num_heads", "head_dim", "dropout", "image_size", "attention_resolutions", "norm_groups")


def recognise(names: Collection[str]) -> str:
    """The layout of a checkpoint: "compvis", "diffusers" or "ddpm"; ValueError when it is none of them."""
    for layout, sign in _SIGNS.items():
        if sign in names:
            return layout
    if "time_mlp.1.weight" in names:
        raise ValueError("these are this library's own weights; give the directory that has their config.json too")
    some = ", ".join(sorted(names)[:3]) or "no tensors at all"
    raise ValueError(f"not a U-Net of this family: it has {some}; expected one of {', '.join(_SIGNS.values())}")


def skeleton(layout: str, names: Collection[str]) -> Skeleton:
    """Count the blocks and levels."""
    if layout == "compvis":
        entries = _count(names, r"output_blocks\.(\d+)\.")
        ends = [i for i in range(entries) if _has_upsampling(names, i)]
        blocks = ends[0] if ends else entries - 1
        levels = entries // (blocks + 1) if entries else 0
    elif layout == "diffusers":
        blocks, levels = _count(names, r"down_blocks\.0\.resnets\.(\d+)\."), _count(names, r"down_blocks\.(\d+)\.")
    else:
        blocks, levels = _count(names, r"down\.0\.block\.(\d+)\."), _count(names, r"down\.(\d+)\.")
    if blocks < 1 or levels < 1:
        raise ValueError(f"a {layout} checkpoint without encoder blocks: it is not a whole U-Net")
    bare = Skeleton(blocks, levels, (True,) * levels, any(".transformer_blocks." in name for name in names))
    first = [LAYOUTS[layout](f"encoder.{level * (blocks + 1)}.1.norm.weight", bare).name for level in range(levels)]
    return bare._replace(attended=tuple(name in names for name in first))


def infer(layout: str, shapes: Shapes, bones: Skeleton) -> dict[str, Any]:
    """The options of `UNetConfig` that names and shapes tell; all but the heads, the resolutions' scale and dropout."""
    n, levels = bones.blocks, bones.levels

    def shape(name: str) -> Sequence[int] | None:
        return shapes.get(LAYOUTS[layout](name, bones).name)

    def need(name: str) -> Sequence[int]:
        found = shape(name)
        if found is None:
            raise ValueError(f"the checkpoint lacks {LAYOUTS[layout](name, bones).name}")
        return found

    stem, time = need("input_conv.weight"), need("time_mlp.1.weight")
    width = time[1]
    conv1 = [need(f"encoder.{level * (n + 1)}.0.conv1.weight") for level in range(levels)]
    image_size = max(64, 2 ** (levels + 1))
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
        "modulation": "add" if need("encoder.0.0.time_mlp.weight")[0] == conv1[0][0] else "scale_shift",
        "context_dim": None,
        "upsample": "nearest",
        **_MEANT[layout],
    }
    if levels > 1:
        if shape(f"encoder.{n}.conv.weight") is None:
            options["downsample"] = "resblock" if shape(f"encoder.{n}.conv1.weight") is not None else "avgpool"
        if shape(f"decoder.{n}.{1 + bones.attended[-1]}.conv1.weight") is not None:
            options["upsample"] = "resblock"
    if (classes := _optional(layout, shapes, "class_embedding.weight")) is not None:
        options["num_classes"] = classes[0]
    if (vector := _optional(layout, shapes, "vector_embedding.0.weight")) is not None:
        options["vector_dim"] = vector[1]
    if (cond := _optional(layout, shapes, "time_cond.weight")) is not None:
        options["time_cond_dim"] = cond[1]
    if bones.transformer:
        options |= _transformer_options(shapes, layout, bones, [c[0] for c in conv1])
    return options


def _transformer_options(shapes: Shapes, layout: str, bones: Skeleton, widths: list[int]) -> dict[str, Any]:
    bones = bones._replace(attended=(True,) * bones.levels)  # so that every level can be asked

    def depth(prefix: str) -> int:
        k = 0
        while LAYOUTS[layout](f"{prefix}.transformer_blocks.{k}.norm1.weight", bones).name in shapes:
            k += 1
        return k

    depths = [depth(f"encoder.{level * (bones.blocks + 1)}.1") for level in range(bones.levels)]
    depths[-1] = depth("bottleneck.1")
    base = "bottleneck.1.transformer_blocks.0"
    second = shapes.get(LAYOUTS[layout](f"{base}.attn2.to_k.weight", bones).name)
    options: dict[str, Any] = {"attention": "transformer", "context_dim": None if second is None else second[1]}
    options["transformer_depth"] = depths[-1] if len(set(depths) - {0}) == 1 else tuple(depths)
    crosses = []
    for level, width in enumerate(widths):
        name = f"encoder.{level * (bones.blocks + 1)}.1.transformer_blocks.0.attn1.to_k.weight"
        keys = shapes.get(LAYOUTS[layout](name, bones).name)
        crosses.append(keys is not None and keys[1] != width)
    if any(crosses):
        options["only_cross_attention"] = tuple(crosses)
    return options


def complete(options: dict[str, Any], given: Mapping[str, Any]) -> tuple[UNetConfig, str | None]:
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
        "the file does not tell the number of attention heads, and no known network looks like it; "
        "give num_heads=... or head_dim=..., for example head_dim=64"
    )


def _visible(config: UNetConfig) -> dict[str, Any]:
    """What names and shapes tell of a configuration."""
    levels = range(len(config.widths))
    seen = {name: value for name, value in config.to_dict().items() if name not in _UNSEEN}
    depths = [config.depth(level) for level in levels if config.has_attention(level)]
    seen["transformer_depth"] = [*depths, config.depth(len(config.widths) - 1)]
    return seen | {"attended": [config.has_attention(level) for level in levels]}


def _optional(layout: str, shapes: Shapes, name: str) -> Sequence[int] | None:
    try:
        return shapes.get(LAYOUTS[layout](name, Skeleton(1, 1, (False,))).name)
    except ValueError:  # this layout has no such thing
        return None


def _count(names: Collection[str], pattern: str) -> int:
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    return max(found, default=-1) + 1


def _has_upsampling(names: Collection[str], index: int) -> bool:
    ends = ("conv.weight", "in_layers.0.weight")
    return any(f"output_blocks.{index}.{child}.{end}" in names for child in (1, 2) for end in ends)
