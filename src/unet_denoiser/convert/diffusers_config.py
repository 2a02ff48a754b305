"""`config.json` of diffusers' UNet2DModel and UNet2DConditionModel, to and from `UNetConfig`."""

from collections.abc import Mapping
from typing import Any

from unet_denoiser.config.unet import UNetConfig

_PLAIN, _CONDITIONAL = "UNet2DModel", "UNet2DConditionModel"
# the values that our network has a counterpart for; most fields switch on something that it lacks
_VALID_VALUES: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    **dict.fromkeys(("center_input_sample", "class_embeddings_concat", "dual_cross_attention"), (None, False)),
    **dict.fromkeys(("time_embedding_act_fn", "timestep_post_act", "num_attention_heads"), (None,)),
    **dict.fromkeys(("encoder_hid_dim", "encoder_hid_dim_type", "cross_attention_norm"), (None,)),
    **dict.fromkeys(("mid_block_scale_factor", "resnet_out_scale_factor"), (1, 1.0)),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), (3,)),
    **dict.fromkeys(("downsample_type", "upsample_type"), (None, "conv", "resnet")),
    "act_fn": ("silu", "swish"),
    "attention_type": (None, "default"),
    "resnet_skip_time_act": (None, False),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "reverse_transformer_layers_per_block": (None,),
    "add_attention": (True,),
    "freq_shift": (0, 1),
    "downsample_padding": (0, 1),
}
# and those that depend on the class
_VALID_OF_CLASS: dict[str, dict[str, tuple[Any, ...]]] = {
    _PLAIN: {"mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn"), "class_embed_type": (None,)},
    _CONDITIONAL: {
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "class_embed_type": (None, "projection"),
        "addition_embed_type": (None, "text_time"),
    },
}
_ATTENDED_DOWN = {_PLAIN: "AttnDownBlock2D", _CONDITIONAL: "CrossAttnDownBlock2D"}
_DOWN_BLOCKS = ("DownBlock2D", "ResnetDownsampleBlock2D")


def from_diffusers(config: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the options that a diffusers configuration tells beyond names and shapes, and True for cosines first.

    Raise ValueError for a class, or a field, that our network has no counterpart for, by name.
    """
    name = config.get("_class_name", _PLAIN)
    if name not in _VALID_OF_CLASS:
        raise ValueError(f"_class_name={name!r} is not {_PLAIN} or {_CONDITIONAL}")
    _check_fields(config, name)
    options: dict[str, Any] = {
        "time_frequencies": "endpoint" if config.get("freq_shift", 0) else "half",
        "norm_eps": config.get("norm_eps", 1e-5),
        "norm_groups": config.get("norm_num_groups", 32),
        "dropout": config.get("dropout", 0.0),
        **_read_heads(config, name),
        **_read_blocks(config, name),
    }
    return options, bool(config.get("flip_sin_to_cos", True))


def _check_fields(config: Mapping[str, Any], name: str) -> None:
    valid_values = _VALID_VALUES | _VALID_OF_CLASS[name]
    if config.get("addition_embed_type") is not None:
        valid_values |= {"addition_time_embed_dim": (256,), "class_embed_type": (None,)}
    widths = config.get("block_out_channels")
    if isinstance(widths, list | tuple) and widths and isinstance(widths[0], int):
        valid_values |= {"time_embedding_dim": (None, 4 * widths[0])}
    for field, valid in valid_values.items():
        value = config.get(field, valid[0])
        if not any(type(value) is type(one) and value == one for one in valid):
            raise ValueError(f"{field}={value!r} has no counterpart here; valid: {', '.join(map(repr, valid))}")
    _check_numbers(config, name)
    groups, others = config.get("norm_num_groups", 32), config.get("attn_norm_num_groups")
    if type(groups) is not int or groups < 1 or others not in (None, groups):
        raise ValueError(f"norm_num_groups={groups} with attn_norm_num_groups={others}: they must be equal numbers")
    if name == _PLAIN and others is None and config.get("resnet_time_scale_shift") == "scale_shift":
        raise ValueError(
            "attn_norm_num_groups=None with resnet_time_scale_shift='scale_shift' leaves the bottleneck's attention "
            f"without a norm, which has no counterpart here; valid: {groups}"
        )


def _check_numbers(config: Mapping[str, Any], name: str) -> None:
    fields, equal, optional = ["in_channels", "out_channels"], ["layers_per_block"], ["num_class_embeds"]
    if name == _CONDITIONAL:
        fields.append("transformer_layers_per_block")
        equal.append("cross_attention_dim")
        optional.append("time_cond_proj_dim")
    for field in (*fields, *equal, *optional):
        value = config.get(field, 1)
        entries = list(value) if isinstance(value, list | tuple) else [value]
        if any(type(one) is not int or one < 1 for one in entries) and not (value is None and field in optional):
            raise ValueError(f"{field}={value!r} has no counterpart here; give a number of at least 1")
        if field in equal and any(one != entries[0] for one in entries):
            raise ValueError(f"{field}={value} has no counterpart here; give one number for all levels")


def _read_blocks(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return how the levels downsample and upsample, and where the transformers have no self-attention."""
    options: dict[str, Any] = {}
    attended = _ATTENDED_DOWN[name]
    down = _list_blocks(config, "down_block_types", (*_DOWN_BLOCKS, attended))
    up = _list_blocks(config, "up_block_types", tuple(map(_mirror, (*_DOWN_BLOCKS, attended))))
    mirrored = [_mirror(block) == _mirror(attended) for block in reversed(down)]
    if {"down_block_types", "up_block_types"} <= config.keys() and mirrored != [b == _mirror(attended) for b in up]:
        raise ValueError(f"up_block_types={up} must have attention at the levels where down_block_types={down} have it")
    for half, blocks in (("down", down[:-1]), ("up", up[:-1])):
        kind = config.get(f"{half}sample_type")
        is_resnet = name == _PLAIN and kind == "resnet"
        resblocks = {block.startswith("Resnet") or (block.startswith("Attn") and is_resnet) for block in blocks}
        if len(resblocks) > 1:
            raise ValueError(
                f"{half}_block_types={blocks} with {half}sample_type={kind!r} resample in two ways, which has no "
                "counterpart here; all levels must be alike"
            )
        if True in resblocks:
            options[f"{half}sample"] = "resblock"
    if options.get("downsample") is None and config.get("downsample_padding", 1) == 0:
        options["downsample"] = "conv_asymmetric"
    if name == _CONDITIONAL and (only := _read_only_cross_attention(config, down)):
        options["only_cross_attention"] = only
    return options


def _mirror(block: str) -> str:
    return block.replace("Downsample", "Upsample").replace("Down", "Up")


def _list_blocks(config: Mapping[str, Any], field: str, valid: tuple[str, ...]) -> list[str]:
    """Return the types of blocks by their current names."""
    blocks, names = config.get(field, ()), []
    for block in blocks if isinstance(blocks, list | tuple) else [blocks]:
        names.append(block.removeprefix("UNetRes") if isinstance(block, str) else block)
        if names[-1] not in valid:
            raise ValueError(f"{field} has {block!r}, without counterpart; valid: {', '.join(valid)}")
    return names


def _read_only_cross_attention(config: Mapping[str, Any], down: list[str]) -> tuple[bool, ...]:
    """Return `only_cross_attention`, which shapes do not tell if the context is as wide as a level; () for nowhere.

    The bottleneck, which is as the last level, has self-attention in all networks of this class.
    """
    only = config.get("only_cross_attention", False)
    levels = list(only) if isinstance(only, list | tuple) else [only] * max(1, len(down))
    if not all(isinstance(level, bool) for level in levels) or (down and len(levels) != len(down)):
        raise ValueError(f"only_cross_attention={only!r} must be true or false, or one of them for each level")
    if levels and levels[-1] and (not down or down[-1].startswith("CrossAttn")):
        raise ValueError(
            f"only_cross_attention={only} has no counterpart here: it is true for the last level, but not for the "
            "bottleneck, which is as the last level"
        )
    return (*levels[:-1], False) if any(levels[:-1]) else ()


def _read_heads(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the heads: attention_head_dim is their number in UNet2DConditionModel, their width in UNet2DModel."""
    value = config.get("attention_head_dim", 8)
    entries = value if name == _CONDITIONAL and isinstance(value, list | tuple) else [value]
    if not all(type(entry) is int and entry > 0 for entry in entries) and (name, value) != (_PLAIN, None):
        raise ValueError(f"attention_head_dim={value!r} has no counterpart here; give a number of at least 1")
    if name == _CONDITIONAL:
        return {"num_heads": tuple(value) if isinstance(value, list | tuple) else value, "head_dim": None}
    return {"num_heads": 1, "head_dim": None} if value is None else {"num_heads": None, "head_dim": value}


def has_linear_projections(c: UNetConfig) -> bool:
    """Return True if a published network like this has linear layers, not 1x1 convolutions, around its transformers.

    They came with Stable Diffusion 2, whose networks give a head width, and its upscaler. The numbers are the same.
    """
    return c.head_dim is not None or any(map(c.cross_only, range(len(c.widths))))


def to_diffusers(c: UNetConfig) -> dict[str, Any]:
    """Return the diffusers configuration of the same network; ValueError for an option that it lacks, by name."""
    conditional = c.attention == "transformer"
    _check_options(c, conditional)
    common = {
        "sample_size": c.image_size if isinstance(c.image_size, int) else list(c.image_size),
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "block_out_channels": list(c.widths),
        "layers_per_block": c.num_res_blocks,
        "norm_num_groups": c.norm_groups,
        "norm_eps": c.norm_eps,
        "dropout": c.dropout,
        "freq_shift": 1 if c.time_frequencies == "endpoint" else 0,
        "flip_sin_to_cos": c.cosines_first,
        "resnet_time_scale_shift": "scale_shift" if c.modulation == "scale_shift" else "default",
        "downsample_padding": 0 if c.downsample == "conv_asymmetric" else 1,
        "num_class_embeds": c.num_classes,
    }
    attended = [c.has_attention(level) for level in range(len(c.widths))]
    return common | (_build_conditional(c, attended) if conditional else _build_unconditional(c, attended))


def _check_options(c: UNetConfig, conditional: bool) -> None:
    several, resblock = len(c.widths) > 1, () if conditional else ("resblock",)
    refused = {
        "dims": c.dims != 2,
        "learned_null": c.learned_null and bool(c.num_classes or c.vector_dim or c.context_dim),
        "context_dim": c.context_dim is None if conditional else c.context_dim is not None,
        "downsample": several and c.downsample not in ("conv", "conv_asymmetric", *resblock),
        "upsample": several and c.upsample not in ("nearest", *resblock),
        "stem_channels": c.stem_width != c.widths[0] or c.model_channels != c.widths[0],
        # class_labels carry either classes or the vector
        "vector_dim": c.vector_dim is not None and (not conditional or bool(c.num_classes and c.is_vector_projected)),
        "time_cond_dim": c.time_cond_dim is not None and not conditional,
        "norm_groups": any(width % c.norm_groups for width in c.widths),
        # their bottleneck always has self-attention
        "only_cross_attention": c.cross_only(len(c.widths) - 1),
    }
    for field, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"{field}={getattr(c, field)!r} has no counterpart in diffusers' networks")


def _build_unconditional(c: UNetConfig, attended: list[bool]) -> dict[str, Any]:
    levels, last = range(len(c.widths)), len(c.widths) - 1
    head_dims = {c.widths[level] // c.heads(level) for level in levels if attended[level] or level == last}
    one_head = all(c.heads(level) == 1 for level in levels)
    if len(head_dims) > 1 and not one_head:
        raise ValueError(f"num_heads={c.num_heads} gives heads of {sorted(head_dims)} channels; UNet2DModel: one width")
    down = "ResnetDownsampleBlock2D" if c.downsample == "resblock" else "DownBlock2D"
    up = "ResnetUpsampleBlock2D" if c.upsample == "resblock" else "UpBlock2D"
    return {
        "_class_name": "UNet2DModel",
        "down_block_types": ["AttnDownBlock2D" if has else down for has in attended],
        "up_block_types": ["AttnUpBlock2D" if has else up for has in reversed(attended)],
        "downsample_type": "resnet" if c.downsample == "resblock" else "conv",
        "upsample_type": "resnet" if c.upsample == "resblock" else "conv",
        "attention_head_dim": None if one_head else head_dims.pop(),
        "attn_norm_num_groups": c.norm_groups,
    }


def _build_conditional(c: UNetConfig, attended: list[bool]) -> dict[str, Any]:
    levels, down, up = range(len(c.widths)), "DownBlock2D", "UpBlock2D"
    only = [c.cross_only(level) for level in levels]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": [f"CrossAttn{down}" if has else down for has in attended],
        "up_block_types": [f"CrossAttn{up}" if has else up for has in reversed(attended)],
        "cross_attention_dim": c.context_dim,
        "attention_head_dim": [max(1, c.heads(level)) for level in levels],
        "transformer_layers_per_block": [max(1, c.depth(level)) for level in levels],
        "use_linear_projection": has_linear_projections(c),
        "only_cross_attention": only if any(only) else False,
        "time_cond_proj_dim": c.time_cond_dim,
    }
    if c.vector_dim is not None:
        config["projection_class_embeddings_input_dim"] = c.vector_dim
        sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        config |= {"class_embed_type": "projection"} if c.is_vector_projected else sizes
    return config
