"""The commands that look at networks and convert them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro

from unet_denoiser.config import UNetConfig
from unet_denoiser.endings import one_line_errors
from unet_denoiser.memory_config import MemoryConfig
from unet_denoiser.options import (
    MemoryOptions,
    OptionalName,
    OptionalNumber,
    OptionalOrder,
    OptionalPath,
    show,
)
from unet_denoiser.recipe import CheckpointFormat, DeviceName


def info(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME_OR_RUN")],
    *,
    diagram: OptionalPath = None,
    memory: bool = False,
    step: MemoryOptions = {},  # noqa: B006
    device: DeviceName = "auto",
) -> None:
    """Show a network: its levels with sizes, widths, heads, parameters and FLOPs; with --memory, what training needs.

    Args:
        name: a preset's name, a run directory, or a directory with a saved model.
        diagram: also draw the network into this .svg file.
        memory: estimate the memory and the operations of a training step instead; the options below describe it, and
            a run has its own defaults for them.
        device: what it would be trained on; "auto" is a GPU where there is one here.
    """
    if memory:
        return _show_memory(name, step, device)
    with one_line_errors():
        if step:
            raise ValueError(f"{next(iter(step))}: the options of a training step need --memory")
        config, _ = _network(name)
        if diagram is not None:
            if diagram.suffix != ".svg":
                raise ValueError(f"diagram={diagram}: give a name that ends in .svg")
            from unet_denoiser.diagram import diagram as draw
            from unet_denoiser.files import write_atomically

            write_atomically(diagram, lambda path: path.write_text(draw(config), encoding="utf-8"))
    from unet_denoiser.summary import summarize, table

    print(table(summarize(config)))
    print("\n" + ", ".join(f"{k}={show(v)}" for k, v in asdict(config).items()))


def _network(name: str) -> tuple[UNetConfig, Any]:
    """The architecture that a name means, and the run it is of, if any."""
    from unet_denoiser.files import read_json
    from unet_denoiser.presets import PRESETS, preset
    from unet_denoiser.run import Run

    if name in PRESETS:
        return preset(name), None
    if (Path(name) / "model").is_dir() or (Path(name) / "metrics.jsonl").exists():
        run = Run.load(name)
        return run.model, run
    if (Path(name) / "config.json").is_file():
        return UNetConfig.from_dict(read_json(Path(name) / "config.json")), None
    raise ValueError(f"{name!r} is neither a run or model directory nor a preset: {', '.join(PRESETS)}")


def _show_memory(name: str, options: dict[str, Any], device: DeviceName) -> None:
    with one_line_errors():
        from unet_denoiser.distribution import resolve_device
        from unet_denoiser.memory import estimate, table

        config, run = _network(name)
        shared = ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "mixed_precision")
        given = {} if run is None else {key: getattr(run.training, key) for key in shared}
        about = MemoryConfig(**given | options)
        place = resolve_device("auto") if device == "auto" else device
        print(table(estimate(config, about, place), about, place))
        if run is not None and run.training.lora_rank:
            print("This is for training all weights; a LoRA needs less, by most of the gradients' and optimizer's.")


def convert(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")],
    *,
    to: CheckpointFormat = "unet-denoiser",
    ema: bool = False,
    num_heads: OptionalNumber = None,
    head_dim: OptionalNumber = None,
    qkv_order: OptionalOrder = None,
    variant: OptionalName = None,
    lora: OptionalPath = None,
    lora_scale: float = 1.0,
    verify: bool = False,
) -> None:
    """Convert a checkpoint of DDPM, ADM, EDM, LDM, Stable Diffusion or diffusers to this library's format, or back.

    Args:
        source: a run, a model directory, a diffusers folder, or a .safetensors, .ckpt or .pt file; its layout and
            architecture are recognised.
        target: what to write: a folder for "unet-denoiser", "diffusers" and "pipeline", else a .safetensors file.
        to: the format to write; "pipeline" is a run's network and schedule together, for diffusers' DiffusionPipeline.
        ema: take the averaged weights of a file that has both.
        num_heads: attention heads, where the file does not tell and the network is none of the known ones.
        head_dim: channels per head instead.
        qkv_order: how an ADM file packs its attention, likewise ("new" is use_new_attention_order).
        variant: the weights to take of a diffusers folder that has several, for example fp16.
        lora: a LoRA file (.safetensors of diffusers or kohya) to merge into the weights.
        lora_scale: strength of the LoRA.
        verify: first run the checkpoint in its own code too (diffusers or guided-diffusion) and compare the outputs.
    """
    with one_line_errors():
        from unet_denoiser.conversion import convert_checkpoint

        options = {"num_heads": num_heads, "head_dim": head_dim, "qkv_order": qkv_order, "variant": variant}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        given |= {"ema": True} if ema else {}
        print(convert_checkpoint(source, target, to, lora=lora, lora_scale=lora_scale, verify=verify, **given))
