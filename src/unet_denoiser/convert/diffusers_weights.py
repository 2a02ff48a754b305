"""A diffusers configuration beside weights that are not its own."""

from collections.abc import Mapping, Sequence
from typing import Any

from unet_denoiser.convert.layout import BlockStructure

_ATTENDED, _NOT_ATTENDED = "attention", "no attention"


def check_weights(config: Mapping[str, Any], options: Mapping[str, Any], structure: BlockStructure) -> None:
    """Raise ValueError, by the field, if a diffusers configuration is not that of its weights.

    `options` and `structure` are what the names and shapes of the weights tell.
    """
    attended = structure.attended
    widths = [round(mult * options["model_channels"]) for mult in options["channel_mult"]]
    everywhere, used = [True] * len(widths), [*attended[:-1], True]  # the bottleneck has attention as the last level
    seen: dict[str, tuple[Any, list[bool]]] = {
        "block_out_channels": (widths, everywhere),
        "down_block_types": ([_ATTENDED if has else _NOT_ATTENDED for has in attended], everywhere),
        "in_channels": (options["in_channels"], everywhere),
        "out_channels": (options["out_channels"], everywhere),
        "layers_per_block": (options["num_res_blocks"], everywhere),
        "time_cond_proj_dim": (options.get("time_cond_dim"), everywhere),
        "resnet_time_scale_shift": ("default" if options["modulation"] == "add" else "scale_shift", everywhere),
    }
    if config.get("class_embed_type") is None:
        seen["num_class_embeds"] = (options.get("num_classes"), everywhere)
    seen["class_embed_type"] = ("projection" if structure.projection else None, everywhere)
    if (vector_dim := options.get("vector_dim")) is not None:
        seen["projection_class_embeddings_input_dim"] = (vector_dim, everywhere)
    seen["addition_embed_type"] = ("text_time" if vector_dim and not structure.projection else None, everywhere)
    if options.get("attention") == "transformer":
        seen["cross_attention_dim"] = (options["context_dim"], used)
        seen["transformer_layers_per_block"] = (options["transformer_depth"], used)
    for field, (found, where) in seen.items():
        stated = config.get(field, found)
        if field == "down_block_types":
            stated = [_ATTENDED if "Attn" in str(block) else _NOT_ATTENDED for block in config.get(field, ())] or found
        if not _agree(stated, found, where):
            raise ValueError(f"{field}={config[field]!r} in config.json, but the weights have {found}")
    groups, head_dim = config.get("norm_num_groups", 32), config.get("attention_head_dim", 8)
    if any(width % groups for width in widths):
        raise ValueError(f"norm_num_groups={groups} does not divide block_out_channels={widths}")
    heads = [entry or 1 for entry in _per_level(head_dim, len(widths))]
    if not _agree([0] * len(heads), [width % entry for width, entry in zip(widths, heads, strict=False)], used):
        raise ValueError(f"attention_head_dim={head_dim} does not divide block_out_channels={widths}")


def _per_level(value: Any, levels: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * levels


def _agree(stated: Any, found: Any, levels: Sequence[bool]) -> bool:
    """Return True if two values, or one for each level, are the same at these levels."""
    first, second = _per_level(stated, len(levels)), _per_level(found, len(levels))
    pairs = zip(first, second, levels, strict=True) if len(first) == len(second) == len(levels) else [(0, 1, True)]
    return all(type(one) is type(other) and one == other for one, other, is_used in pairs if is_used)
