"""The architecture of a checkpoint, from the names and shapes of its tensors."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from unet_denoiser.config.base import QKVOrder
from unet_denoiser.config.presets import PRESETS, preset
from unet_denoiser.config.unet import Convention, UNetConfig
from unet_denoiser.convert.key_maps import LAYOUTS
from unet_denoiser.convert.layout import BlockStructure, Layout, Shapes, describe_layer

# options that names and shapes do not tell, or that change no parameter
_UNSEEN_OPTIONS = ("num_heads", "head_dim", "dropout", "image_size", "attention_resolutions", "norm_groups")
# how to give, without config.json, what it tells
_UNTOLD_WAYS = {
    "time_frequencies": "time_frequencies ('half' for flip_sin_to_cos=true, freq_shift=0; 'endpoint' for false, 1)",
    "downsample": "downsample ('conv' for downsample_padding=1; 'conv_asymmetric' for 0)",
}
# conditions beside the context: the parameter and the axis that tell their width
_CONDITION_SHAPES = {
    "num_classes": ("class_embedding.weight", 0),
    "vector_dim": ("vector_embedding.0.weight", 1),
    "time_cond_dim": ("time_cond.weight", 1),
}


def detect_layout(names: Collection[str]) -> str:
    """Return the layout of a checkpoint, a key of `LAYOUTS`; ValueError for tensors of no known layout."""
    for name, layout in LAYOUTS.items():
        if layout.marker in names:
            return name
    if "time_mlp.1.weight" in names:
        raise ValueError("these are this library's own weights; give the directory that has their config.json too")
    some = ", ".join(sorted(names)[:3]) or "no tensors at all"
    markers = ", ".join(layout.marker for layout in LAYOUTS.values())
    raise ValueError(f"not a U-Net of this family: it has {some}; expected one of {markers}")


def detect_structure(layout: str, names: Collection[str]) -> BlockStructure:
    """Count blocks and levels, and find the levels with attention; ValueError for a U-Net that is not complete."""
    counted = LAYOUTS[layout].count_blocks(names)
    if counted.blocks < 1 or counted.levels < 1:
        raise ValueError(f"a {layout} checkpoint without encoder blocks: it is not a whole U-Net")
    if counted.blocks * counted.levels > 1000:
        raise ValueError(f"a {layout} checkpoint of {counted.levels} levels with {counted.blocks} blocks is no U-Net")
    transformer = any(".transformer_blocks." in name for name in names)
    projection = any(name.startswith("class_embedding.linear_1.") for name in names)
    counted = counted._replace(transformer=transformer, projection=projection)
    everywhere = counted._replace(attended=(True,) * counted.levels)

    def has_attention(level: int) -> bool:
        first = level * (counted.blocks + 1)
        norms = (f"encoder.{entry}.1.norm.weight" for entry in range(first, first + counted.blocks))
        return any(LAYOUTS[layout].key_map(norm, everywhere).name in names for norm in norms)

    return everywhere._replace(attended=tuple(map(has_attention, range(counted.levels))))


class _TensorShapes(NamedTuple):
    """The shapes of a checkpoint's tensors, to be asked for by our parameters' names."""

    layout: Layout
    structure: BlockStructure
    shapes: Shapes

    def find(self, name: str) -> Sequence[int] | None:
        """Return a shape, with its axes in our order; None if the file or its layout has no such tensor."""
        try:
            foreign = self.layout.key_map(name, self.structure)
        except ValueError:
            return None
        shape = self.shapes.get(foreign.name)
        return shape[::-1] if shape is not None and foreign.transposed else shape

    def require(self, name: str, ndim: int | None = None) -> Sequence[int]:
        """Return a shape of `ndim` axes, or of a convolution's; ValueError for any other."""
        found, foreign = self.find(name), self.layout.key_map(name, self.structure).name
        if found is None:
            raise ValueError(f"the checkpoint lacks {foreign}")
        if 0 in found or (not 3 <= len(found) <= 5 if ndim is None else len(found) != ndim):
            raise ValueError(f"the checkpoint's {foreign} has the shape {tuple(found)}, which no U-Net has")
        return found


def infer_options(layout: str, shapes: Shapes, structure: BlockStructure) -> dict[str, Any]:
    """Return the options of `UNetConfig` that names and shapes tell.

    Heads, dropout and groups are left open. The image size is one that puts attention where the checkpoint has it.
    """
    tensors = _TensorShapes(LAYOUTS[layout], structure, shapes)
    image_size = structure.resolution or max(64, 2 ** (structure.levels + 1))
    attended = tuple(image_size // 2**level for level, has in enumerate(structure.attended) if has)
    options = _infer_channels(tensors) | {"image_size": image_size, "attention_resolutions": attended}
    options |= {"learned_null": False, "context_dim": None, **tensors.layout.implied, **_infer_resampling(tensors)}
    for option, (name, axis) in _CONDITION_SHAPES.items():
        if tensors.find(name) is not None:
            options[option] = tensors.require(name, 2)[axis]
    if structure.transformer:
        options |= _infer_transformer(tensors)
    return options | tensors.layout.infer_more(options, shapes)


def _infer_channels(tensors: _TensorShapes) -> dict[str, Any]:
    stem, widths = tensors.require("input_conv.weight"), _get_widths(tensors)
    width = tensors.require("time_mlp.1.weight", 2)[1]
    modulation = tensors.require("encoder.0.0.time_mlp.weight", 2)
    return {
        "in_channels": stem[1],
        "model_channels": width,
        "out_channels": tensors.require("output.2.weight")[0],
        "num_res_blocks": tensors.structure.blocks,
        "channel_mult": tuple(channels / width for channels in widths),
        "stem_channels": None if stem[0] == width else stem[0],
        "dims": len(stem) - 2,
        "modulation": "add" if modulation[0] == widths[0] else "scale_shift",
    }


def _get_widths(tensors: _TensorShapes) -> list[int]:
    blocks, levels = tensors.structure.blocks, tensors.structure.levels
    return [tensors.require(f"encoder.{level * (blocks + 1)}.0.conv1.weight")[0] for level in range(levels)]


def _infer_resampling(tensors: _TensorShapes) -> dict[str, Any]:
    structure, blocks = tensors.structure, tensors.structure.blocks
    options: dict[str, Any] = {"upsample": "nearest"}
    if structure.levels == 1:
        return options
    downs = [f"encoder.{level * (blocks + 1) + blocks}" for level in range(structure.levels - 1)]
    if not any(tensors.find(f"{down}.conv.weight") for down in downs):
        has_blocks = any(tensors.find(f"{down}.conv1.weight") for down in downs)
        options["downsample"] = "resblock" if has_blocks else "avgpool"
    if tensors.find(f"decoder.{blocks}.{1 + structure.attended[-1]}.conv1.weight") is not None:
        options["upsample"] = "resblock"
    return options


def _infer_transformer(tensors: _TensorShapes) -> dict[str, Any]:
    blocks, levels = tensors.structure.blocks, tensors.structure.levels
    # so that every level can be asked
    everywhere = tensors._replace(structure=tensors.structure._replace(attended=(True,) * levels))

    firsts = [f"encoder.{level * (blocks + 1)}.1" for level in range(levels)]
    depths = [_count_depth(everywhere, first) for first in firsts]
    depths[-1] = _count_depth(everywhere, "bottleneck.1") or max(depths)
    keys = (shape for name, shape in tensors.shapes.items() if name.endswith(".transformer_blocks.0.attn2.to_k.weight"))
    options: dict[str, Any] = {"attention": "transformer", "context_dim": next(keys, (0, None))[1]}
    options["transformer_depth"] = depths[-1] if len(set(depths) - {0}) == 1 else tuple(depths)
    cross_only = []
    for first, width in zip(firsts, _get_widths(tensors), strict=True):
        key = everywhere.find(f"{first}.transformer_blocks.0.attn1.to_k.weight")
        cross_only.append(key is not None and key[1] != width)
    if any(cross_only):
        options["only_cross_attention"] = tuple(cross_only)
    return options


def _count_depth(tensors: _TensorShapes, prefix: str) -> int:
    depth = 0
    while tensors.find(f"{prefix}.transformer_blocks.{depth}.norm1.weight") is not None:
        depth += 1
    return depth


def list_untold(layout: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the options beside the heads that files of a layout leave open.

    The other layouts are each written by one code base, which has one way; diffusers says its own in config.json.
    """
    if layout != "diffusers":
        return ()
    widths = [round(mult * options["model_channels"]) for mult in options["channel_mult"]]
    resampled = ("downsample",) if len(widths) > 1 and options.get("downsample", "conv") == "conv" else ()
    # a key of the context's width may also be one of the features
    crossed = ("only_cross_attention",) if options.get("context_dim") in widths else ()
    return ("time_frequencies", "norm_eps", "norm_groups", *resampled, *crossed)


def fill_from_preset(
    options: dict[str, Any], given: Mapping[str, Any], untold: Collection[str] = ()
) -> tuple[UNetConfig, str | None]:
    """Add the options that shapes do not tell: from `given`, else from the preset that equals the rest.

    Return the configuration, and the preset's name if one was needed. Raise ValueError if the number of heads, or one
    of the options `untold` (as `list_untold` gives them), is not given, and no preset equals the rest.
    """
    has_heads = "num_heads" in given or "head_dim" in given
    heads = {"num_heads": given.get("num_heads"), "head_dim": given.get("head_dim")} if has_heads else {}
    if has_heads and all(name in given for name in untold):
        return UNetConfig(**options | heads | dict(given)), None
    probe = UNetConfig(**options | {"num_heads": 1})
    for name in PRESETS:
        known = preset(name)
        if _get_visible(known, untold) == _get_visible(probe, untold):
            unseen = {field: getattr(known, field) for field in (*_UNSEEN_OPTIONS, *untold)}
            return UNetConfig(**options | unseen | heads | dict(given)), name
    if untold:
        ways = ", ".join(_UNTOLD_WAYS.get(name, name) for name in untold)
        raise ValueError(
            f"no known network has these shapes ({describe(probe)}), and no config.json tells what they do not (it is "
            "read beside a file named diffusion_pytorch_model*, model* or pytorch_model*); give the folder that has "
            f"it, or all of num_heads or head_dim, {ways}"
        )
    raise ValueError(
        "the file does not tell the number of attention heads, and no known network has its shapes "
        f"({describe(probe)}); give num_heads=... or head_dim=..., for example head_dim=64"
    )


def check_complete(layout: str, shapes: Shapes, structure: BlockStructure, options: Mapping[str, Any]) -> None:
    """Raise ValueError for a U-Net without one of the blocks of this family, or with more or fewer transformers in it.

    Distilled networks leave out the bottleneck, or have other depths in the decoder than in the encoder.
    """
    tensors, count, levels = _TensorShapes(LAYOUTS[layout], structure, shapes), structure.blocks, structure.levels
    places = [("bottleneck.0", "bottleneck.1", levels - 1), ("bottleneck.2", "bottleneck.1", levels - 1)]
    for half, blocks in (("encoder", count), ("decoder", count + 1)):
        for level in range(levels):
            first = (level if half == "encoder" else levels - 1 - level) * (count + 1)
            places += [(f"{half}.{first + j}.0", f"{half}.{first + j}.1", level) for j in range(blocks)]
    depth = options.get("transformer_depth", 1)
    for block, attention, level in places:
        names = [f"{block}.conv1.weight"]
        if structure.attended[level] or block.startswith("bottleneck"):
            names.append(f"{attention}.norm.weight")
        for name in names:
            words = f"{describe_layer(name, structure)} ({tensors.layout.key_map(name, structure).name})"
            if tensors.find(name) is None:
                raise ValueError(f"this network lacks {words}, and so has no counterpart here") from None
            expected, found = depth[level] if isinstance(depth, tuple) else depth, _count_depth(tensors, attention)
            if structure.transformer and name.startswith(attention) and found != expected:
                reason = f"has {found} transformer blocks, and others of its level {expected}"
                raise ValueError(f"{words} {reason}: this network has no counterpart here") from None


def published_order(config: UNetConfig) -> QKVOrder:
    """Return how the published file of an architecture packs query, key, value (ADM's use_new_attention_order)."""
    new = ("adm-64-cond", "edm-imagenet64-cond")  # the second as OpenAI's consistency models have it
    return "new" if any(_get_visible(preset(name)) == _get_visible(config) for name in new) else "legacy"


def note_conventions(config: UNetConfig, structure: BlockStructure, cosines_first: bool) -> UNetConfig:
    """Keep what a checkpoint has in another way than others of this architecture, though no output depends on it."""
    notes: list[Convention] = []
    if config.cosines_first != cosines_first:
        notes.append("cosines_first" if cosines_first else "sines_first")
    if config.vector_dim is not None and config.is_vector_projected != structure.projection:
        notes.append("projection" if structure.projection else "text_time")
    return replace(config, conventions=tuple(notes)) if notes else config


def describe(config: UNetConfig) -> str:
    """Name the preset that is nearest to an architecture, and the options in which they differ."""
    seen = _get_visible(config)
    differences = {
        name: [field for field, value in _get_visible(preset(name)).items() if seen[field] != value] for name in PRESETS
    }
    name, different = min(differences.items(), key=lambda item: len(item[1]))
    if len(different) > 3:
        return "this looks like no published network"
    options = ", ".join(f"{field}={seen[field]}" for field in different)
    return f"this looks like {name} with {options}" if options else f"this looks like {name}"


def _get_visible(config: UNetConfig, untold: Collection[str] = ()) -> dict[str, Any]:
    """Return the part of a configuration that names and shapes tell."""
    levels = range(len(config.widths))
    unseen = (*_UNSEEN_OPTIONS, *untold, "conventions")
    visible = {name: value for name, value in config.to_dict().items() if name not in unseen}
    depths = [config.depth(level) for level in levels if config.has_attention(level)]
    visible["transformer_depth"] = [*depths, config.depth(len(config.widths) - 1)]
    visible["only_cross_attention"] = [config.cross_only(level) for level in levels if config.has_attention(level)]
    return visible | {"attended": [config.has_attention(level) for level in levels]}
