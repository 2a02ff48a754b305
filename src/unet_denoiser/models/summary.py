"""Summary of a network, measured on the built model: sizes, widths, heads, parameters, FLOPs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from unet_denoiser.config.base import halve
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.models.input_checks import condition_shapes
from unet_denoiser.models.unet import UNet


class LayerSummary(NamedTuple):
    """One resolution level, or another part of a network.

    Args:
        size: spatial size, for example "64x64".
        width: channels.
        blocks: number of residual blocks.
        attention: for example "8 heads x 64".
        flops: of one forward pass of one sample; a multiplication and an addition count as two.
    """

    name: str
    size: str
    width: int
    blocks: int
    attention: str
    parameters: int
    flops: int


def summarize(config: UNetConfig) -> list[LayerSummary]:
    """Summarize the parts of a network in the order in which they run; it is built without storage.

    The FLOPs are those of convolutions, linear layers and attention, at `image_size`, with one token of context.
    """
    with torch.device("meta"):
        model = UNet.from_config(config).eval()
        counter = count_flops(model, example_inputs(config, batch=1, context_tokens=1))
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    names = {module: name for name, module in model.named_modules()}

    def describe(
        name: str, modules: Iterable[Any], level: int = 0, *, width: int = 0, blocks: int = 0, attends: bool = False
    ) -> LayerSummary:
        modules, heads = list(modules), config.heads(level) if attends else 0
        return LayerSummary(
            name,
            size="x".join(str(halve(n, level)) for n in config.sizes) if width else "",
            width=width,
            blocks=blocks,
            attention=f"{heads} heads x {width // heads}" if heads else "",
            parameters=sum(p.numel() for module in modules for p in module.parameters()),
            flops=sum(flops.get(f"UNet.{names[module]}", 0) for module in modules),
        )

    encoder, decoder, n = list(model.encoder), list(model.decoder), config.num_res_blocks + 1
    last, trunk = len(config.widths) - 1, ("input_conv", "encoder", "bottleneck", "decoder", "output")
    embeddings = describe("time and conditions", [m for name, m in model.named_children() if name not in trunk])
    nulls = sum(p.numel() for p in model.parameters(recurse=False))
    parts = [embeddings._replace(parameters=embeddings.parameters + nulls)]
    parts.append(describe("input", [model.input_conv], width=config.stem_width))
    for level, width in enumerate(config.widths):
        modules, attends = encoder[level * n : (level + 1) * n], config.has_attention(level)
        parts.append(describe(f"encoder {level}", modules, level, width=width, blocks=n - 1, attends=attends))
    parts.append(describe("bottleneck", model.bottleneck, last, width=config.widths[last], blocks=2, attends=True))
    for level, width in reversed(list(enumerate(config.widths))):
        modules, attends = decoder[(last - level) * n : (last - level + 1) * n], config.has_attention(level)
        parts.append(describe(f"decoder {level}", modules, level, width=width, blocks=n, attends=attends))
    return [*parts, describe("output", [model.output], width=config.out_channels)]


def example_inputs(
    config: UNetConfig, *, batch: int, context_tokens: int, size: tuple[int, ...] | None = None
) -> dict[str, torch.Tensor]:
    """Return zeros for the arguments of a network's `forward`, all conditions included, on the default device."""
    inputs = {"x": torch.zeros(batch, config.in_channels, *(size or config.sizes)), "t": torch.zeros(batch)}
    for name in config.conditions:
        shape = [context_tokens if n is None else n for n in condition_shapes(config, batch)[name]]
        inputs[name] = torch.zeros(shape, dtype=torch.long if name == "class_labels" else None)
    return inputs


def count_flops(model: UNet, inputs: dict[str, torch.Tensor]) -> FlopCounterMode:
    """Count the FLOPs of one forward pass on the meta device, where attention is made of matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter


def format_summary(parts: list[LayerSummary]) -> str:
    """Format the parts and their totals as an aligned table."""
    rows = [("", "size", "width", "blocks", "attention", "parameters", "MFLOP")]
    total = LayerSummary("total", "", 0, 0, "", sum(p.parameters for p in parts), sum(p.flops for p in parts))
    for p in [*parts, total]:
        numbers = f"{p.parameters:,}", f"{p.flops / 1e6:,.1f}"
        rows.append((p.name, p.size, str(p.width or ""), str(p.blocks or ""), p.attention, *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [cell.ljust(w) if i in (0, 4) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in aligned)
