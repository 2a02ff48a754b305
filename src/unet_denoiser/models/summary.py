"""What a network is made of, measured on the built model: sizes, widths, heads, parameters, FLOPs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.models.input_checks import condition_shapes
from unet_denoiser.models.unet import UNet


class LayerSummary(NamedTuple):
    """A level, or another part of a network.

    size: spatial size, "64x64"; width: channels; attention: "8 heads x 64"; parameters; flops of one forward pass of
    one sample (a multiplication and an addition count as two).
    """

    name: str
    size: str
    width: int
    blocks: int
    attention: str
    parameters: int
    flops: int


def summarize(config: UNetConfig) -> list[LayerSummary]:
    """The parts of a network in the order they run; built without storage, so any size is quick.

    The FLOPs are those of convolutions, linear layers and attention, at `image_size`, with one token of context.
    """
    with torch.device("meta"):
        model = UNet.from_config(config).eval()
        counter = count_flops(model, example_inputs(config, batch=1, context_tokens=1))
    size = config.sizes
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    names = {module: name for name, module in model.named_modules()}

    def part(
        name: str, level: int, width: int, blocks: int, modules: Iterable[nn.Module], attention: bool
    ) -> LayerSummary:
        heads = config.heads(level) if attention else 0
        at = [-(-n // 2**level) for n in size]
        return LayerSummary(
            name,
            "x".join(map(str, at)) if width else "",
            width,
            blocks,
            f"{heads} heads x {width // heads}" if heads else "",
            sum(p.numel() for module in modules for p in module.parameters()),
            sum(flops.get(f"UNet.{names[module]}", 0) for module in modules),
        )

    per_level, last = config.num_res_blocks + 1, len(config.widths) - 1
    top = {name: module for name, module in model.named_children() if module is not None}
    trunk = ("input_conv", "encoder", "bottleneck", "decoder", "output")
    embeddings = [module for name, module in top.items() if name not in trunk]
    parts = [part("time and conditions", 0, 0, 0, embeddings, False)]
    parts.append(part("input", 0, config.stem_width, 0, [model.input_conv], False))
    for level, width in enumerate(config.widths):
        blocks = list(model.encoder)[level * per_level : (level + 1) * per_level]
        parts.append(part(f"encoder {level}", level, width, per_level - 1, blocks, config.has_attention(level)))
    parts.append(part("bottleneck", last, config.widths[last], 2, list(model.bottleneck), True))
    for i, level in enumerate(range(last, -1, -1)):
        blocks = list(model.decoder)[i * per_level : (i + 1) * per_level]
        parts.append(
            part(f"decoder {level}", level, config.widths[level], per_level, blocks, config.has_attention(level))
        )
    parts.append(part("output", 0, config.out_channels, 0, [model.output], False))
    nulls = sum(p.numel() for p in model.parameters(recurse=False))
    return [parts[0]._replace(parameters=parts[0].parameters + nulls), *parts[1:]]


def example_inputs(
    config: UNetConfig, *, batch: int, context_tokens: int, size: tuple[int, ...] | None = None
) -> dict[str, torch.Tensor]:
    """What a network's `forward` takes, all of its conditions included; zeros, on the current default device."""
    inputs = {"x": torch.zeros(batch, config.in_channels, *(size or config.sizes)), "t": torch.zeros(batch)}
    for name in config.conditions:
        shape = [context_tokens if n is None else n for n in condition_shapes(config, batch)[name]]
        inputs[name] = torch.zeros(shape, dtype=torch.long if name == "class_labels" else None)
    return inputs


def count_flops(model: UNet, inputs: dict[str, torch.Tensor]) -> FlopCounterMode:
    """The counter of one forward pass; for a model on the meta device, where attention is made of matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter


def table(parts: list[LayerSummary]) -> str:
    """The parts and their totals as aligned text, a line each."""
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
