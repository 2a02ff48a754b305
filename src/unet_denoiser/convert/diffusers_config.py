"""`config.json` of diffusers' UNet2DModel and UNet2DConditionModel, to and from `UNetConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unet_denoiser.config.unet import UNetConfig

# the values that our network has a counterpart for; most fields switch on something that it lacks
_VALID_VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("center_input_sample", "class_embeddings_concat", "dual_cross_attention"), (None, False)),
    **dict.fromkeys(("time_embedding_dim", "time_embedding_act_fn", "timestep_post_act", "class_embed_type"), (None,)),
    **dict.fromkeys(("encoder_hid_dim", "encoder_hid_dim_type", "cross_attention_norm"), (None,)),
    **dict.fromkeys(("mid_block_scale_factor", "resnet_out_scale_factor"), (None, 1, 1.0)),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), (None, 3)),
    "act_fn": (None, "silu", "swish"),
    "time_embedding_type": (None, "positional"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": (None, "default"),
    "resnet_skip_time_act": (None, False),
    "reverse_transformer_layers_per_block": (None,),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
    "add_attention": (None, True),
    "freq_shift": (0, 1),
    "downsample_padding": (0, 1),
}
_DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D")
_PLAIN_BLOCKS = ("DownBlock2D", "UpBlock2D")


def from_diffusers(config: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the options that a diffusers configuration tells beyond names and shapes, and True for cosines first.

    Raise ValueError for a field that our network has no counterpart for, by name.
    """
    conditional = config.get("_class_name") == "UNet2DConditionModel"
    _check_fields(config)
    options: dict[str, Any] = {
        "time_frequencies": "endpoint" if config.get("freq_shift", 0) else "half",
        "norm_eps": config.get("norm_eps", 1e-5),
        "norm_groups": config.get("norm_num_groups", 32),
        "dropout": config.get("dropout", 0.0),
        **_read_heads(config, conditional),
    }
    if conditional and (only := _read_only_cross_attention(config)):
        options["only_cross_attention"] = only
    if config.get("downsample_type", "conv") == "conv" and config.get("downsample_padding", 1) == 0:
        options["downsample"] = "conv_asymmetric"
    return options, bool(config.get("flip_sin_to_cos", True))


def _check_fields(config: Mapping[str, Any]) -> None:
    name = config.get("_class_name", "UNet2DModel")
    if name not in ("UNet2DModel", "UNet2DConditionModel"):
        raise ValueError(f"_class_name={name!r} is not UNet2DModel or UNet2DConditionModel")
    defaults = {"mid_block_type": "UNetMidBlock2D", "freq_shift": 0, "downsample_padding": 1}
    for field, valid in _VALID_VALUES.items():
        if config.get(field, defaults.get(field)) not in valid:
            raise ValueError(f"{field}={config[field]!r} has no counterpart here; valid: {', '.join(map(repr, valid))}")
    blocks = config.get("down_block_types", ())
    for block in blocks if isinstance(blocks, list | tuple) else [blocks]:
        if block not in _DOWN_BLOCKS:
            raise ValueError(f"down_block_types has {block!r}, without counterpart; valid: {', '.join(_DOWN_BLOCKS)}")
    groups, others = config.get("norm_num_groups", 32), config.get("attn_norm_num_groups")
    if groups is None or others not in (None, groups):
        raise ValueError(f"norm_num_groups={groups} with attn_norm_num_groups={others}: they must be equal numbers")


def _read_only_cross_attention(config: Mapping[str, Any]) -> Any:
    """Return `only_cross_attention`, which shapes do not tell if the context is as wide as a level."""
    only, middle = config.get("only_cross_attention", False), config.get("mid_block_only_cross_attention")
    levels = list(only) if isinstance(only, list | tuple) else [bool(only)]
    middle = (only if isinstance(only, bool) else False) if middle is None else middle
    if levels[-1] != middle:
        raise ValueError(
            f"mid_block_only_cross_attention={middle} beside only_cross_attention={only} has no counterpart here: the "
            "bottleneck is as the last level"
        )
    return tuple(levels) if len(levels) > 1 and any(levels) else levels[0]


def _read_heads(config: Mapping[str, Any], conditional: bool) -> dict[str, Any]:
    """Return the heads: attention_head_dim is their number in UNet2DConditionModel, their width in UNet2DModel."""
    value = config.get("attention_head_dim", 8)
    if conditional:
        value = config.get("num_attention_heads") or value
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
        "flip_sin_to_cos": c.time_frequencies == "half",
        "resnet_time_scale_shift": "scale_shift" if c.modulation == "scale_shift" else "default",
        "downsample_padding": 0 if c.downsample == "conv_asymmetric" else 1,
        "num_class_embeds": c.num_classes,
    }
    attended = [c.has_attention(level) for level in range(len(c.widths))]
    return common | (_build_conditional(c, attended) if conditional else _build_unconditional(c, attended))


def _check_options(c: UNetConfig, conditional: bool) -> None:
    refused = {
        "dims": c.dims != 2,
        "learned_null": c.learned_null and bool(c.num_classes or c.vector_dim or c.context_dim),
        "context_dim": c.context_dim is None if conditional else c.context_dim is not None,
        "upsample": c.upsample == "conv_transpose" and len(c.widths) > 1,
        "downsample": c.downsample == "avgpool" or (c.downsample == "resblock") != (c.upsample == "resblock"),
        "stem_channels": c.stem_width != c.widths[0] or c.model_channels != c.widths[0],
        "vector_dim": c.vector_dim is not None,
        "time_cond_dim": c.time_cond_dim is not None and not conditional,
        "norm_groups": any(width % c.norm_groups for width in c.widths),
    }
    if conditional:
        refused["vector_dim"] = c.vector_dim is not None and c.vector_dim < 1536
        refused["downsample"] = c.downsample not in ("conv", "conv_asymmetric")
    for field, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"{field}={getattr(c, field)!r} has no counterpart in diffusers' networks")


def _build_unconditional(c: UNetConfig, attended: list[bool]) -> dict[str, Any]:
    levels, last = range(len(c.widths)), len(c.widths) - 1
    head_dims = {c.widths[level] // c.heads(level) for level in levels if attended[level] or level == last}
    one_head = all(c.heads(level) == 1 for level in levels)
    if len(head_dims) > 1 and not one_head:
        raise ValueError(f"num_heads={c.num_heads} gives heads of {sorted(head_dims)} channels; UNet2DModel: one width")
    kind = "resnet" if c.downsample == "resblock" else "conv"
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if kind == "resnet" else _PLAIN_BLOCKS
    return {
        "_class_name": "UNet2DModel",
        "down_block_types": ["AttnDownBlock2D" if has else down for has in attended],
        "up_block_types": ["AttnUpBlock2D" if has else up for has in reversed(attended)],
        "downsample_type": kind,
        "upsample_type": kind,
        "attention_head_dim": None if one_head else head_dims.pop(),
        "attn_norm_num_groups": c.norm_groups,
    }


def _build_conditional(c: UNetConfig, attended: list[bool]) -> dict[str, Any]:
    levels, (down, up) = range(len(c.widths)), _PLAIN_BLOCKS
    only = [c.cross_only(level) for level in levels]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": [f"CrossAttn{down}" if has else down for has in attended],
        "up_block_types": [f"CrossAttn{up}" if has else up for has in reversed(attended)],
        "cross_attention_dim": c.context_dim,
        "attention_head_dim": [c.heads(level) for level in levels],
        "transformer_layers_per_block": [max(1, c.depth(level)) for level in levels],
        "use_linear_projection": has_linear_projections(c),
        "only_cross_attention": only if any(only) else False,
        "time_cond_proj_dim": c.time_cond_dim,
    }
    if c.vector_dim is not None:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        config["projection_class_embeddings_input_dim"] = c.vector_dim
    return config
