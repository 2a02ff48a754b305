"""The command that shows a network."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro

from unet_denoiser.cli.errors import one_line_errors
from unet_denoiser.cli.options import MemoryOptions, OptionalPath, show
from unet_denoiser.config.base import DeviceName
from unet_denoiser.config.memory import MemoryConfig
from unet_denoiser.config.paths import is_hub_name, local_path
from unet_denoiser.config.unet import UNetConfig


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
        name: a preset's name, a run directory, a directory or file with a model of any format that convert reads, a
            published pipeline's folder, or the hub name of a pipeline or a shared model.
        diagram: also draw the network into this .svg file.
        memory: show instead the estimated memory and operations of a training step; the options below describe it
            (default: those of the run, if there is one).
        device: the device of the training; "auto" is a GPU if this machine has one.
    """
    if memory:
        return _show_memory(name, step, device)
    with one_line_errors():
        if step:
            raise ValueError(f"{next(iter(step))}: the options of a training step need --memory")
        config, _ = _find_network(name)
        if (folder := _find_pipeline(name)) is not None:
            from unet_denoiser.sampling.pipeline.published import describe

            print(describe(folder) + "\n")
        if diagram is not None:
            if diagram.suffix != ".svg":
                raise ValueError(f"diagram={diagram}: give a name that ends in .svg")
            from unet_denoiser.models.diagram import draw_diagram
            from unet_denoiser.utils.files import write_atomically

            write_atomically(diagram, lambda path: path.write_text(draw_diagram(config), encoding="utf-8"))
    from unet_denoiser.models.summary import format_summary, summarize

    print(format_summary(summarize(config)))
    print("\n" + ", ".join(f"{k}={show(v)}" for k, v in asdict(config).items()))


def _find_network(name: str) -> tuple[UNetConfig, Any]:
    """Return the architecture of a preset, run or model, and the run if it is one."""
    from unet_denoiser.config.presets import PRESETS, preset
    from unet_denoiser.models.conversion import read_architecture
    from unet_denoiser.models.fetch import fetch_model
    from unet_denoiser.training.run import Run

    if name in PRESETS:
        return preset(name), None
    if (run := Run.find(name)) is not None:
        return run.model, run
    if (folder := _find_pipeline(name)) is not None:
        from unet_denoiser.sampling.pipeline.published import open_network

        with open_network(folder / "unet") as network:
            return read_architecture(network), None
    if (path := fetch_model(name)).is_file() or (path / "config.json").is_file():
        return read_architecture(path), None
    raise ValueError(f"{name!r} is neither a run, a model's directory or file nor a preset: {', '.join(PRESETS)}")


def _find_pipeline(name: str) -> Path | None:
    """Return the folder of a published pipeline, here or downloaded from the hub; None for anything else."""
    from unet_denoiser.config.presets import PRESETS
    from unet_denoiser.models.fetch import fetch_pipeline

    is_pipeline = name not in PRESETS and (is_hub_name(name) or Path(name).exists())
    return fetch_pipeline(local_path(name)) if is_pipeline else None


def _show_memory(name: str, options: dict[str, Any], device: DeviceName) -> None:
    with one_line_errors():
        from unet_denoiser.models.memory_estimate import estimate, format_estimate
        from unet_denoiser.utils.device import resolve_device

        config, run = _find_network(name)
        shared = ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "mixed_precision")
        defaults = {} if run is None else {key: getattr(run.training, key) for key in shared}
        step = MemoryConfig(**defaults | options)
        place = resolve_device("auto") if device == "auto" else device
        print(format_estimate(estimate(config, step, place), step, place))
        if run is not None and run.training.lora_rank:
            print("This is for training all weights; a LoRA needs less, by most of the gradients' and optimizer's.")
