"""The command that converts checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from unet_denoiser.cli.errors import one_line_errors
from unet_denoiser.cli.options import OptionalName, OptionalNumber, OptionalOrder, OptionalPath
from unet_denoiser.config.base import CheckpointFormat, check_choice


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
        options = {"num_heads": num_heads, "head_dim": head_dim, "qkv_order": qkv_order, "variant": variant}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        given |= {"ema": True} if ema else {}
        print(convert_checkpoint(source, target, to, lora=lora, lora_scale=lora_scale, verify=verify, **given))


def convert_checkpoint(
    source: Path,
    target: Path,
    to: CheckpointFormat = "unet-denoiser",
    *,
    lora: Path | None = None,
    lora_scale: float = 1.0,
    verify: bool = False,
    **options: Any,
) -> str:
    """Write `source` to `target` in another format.

    Args:
        source, target: as for the command.
        options: what `UNet.from_pretrained` takes for files that do not tell everything.

    Returns:
        What was done, for the user.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: what is wrong, by name; then nothing has been written.
    """
    from unet_denoiser.convert.checkpoint import export_checkpoint
    from unet_denoiser.convert.lora import merge_lora
    from unet_denoiser.models.unet import UNet
    from unet_denoiser.models.verify import TOLERANCE, compare
    from unet_denoiser.utils.files import read_json, write_atomically

    check_choice("to", to, CheckpointFormat)
    if not math.isfinite(lora_scale):
        raise ValueError(f"lora_scale={lora_scale} must be a finite number, for example 1.0")
    if lora is None and lora_scale != 1:
        raise ValueError(f"lora_scale={lora_scale} needs lora, the file to merge")
    if target.exists():
        raise FileExistsError(f"{target} exists; give a new name")
    if to == "pipeline":
        from unet_denoiser.training.run import Run

        if other := [*options, *["verify"] * verify, *["lora"] * (lora is not None)]:
            raise ValueError(f"to='pipeline' writes a run as it is; leave out {', '.join(other)}")
        write_atomically(target, Run.load(source).save_pipeline)
        return str(target)
    is_run = (source / "model" / "config.json").is_file()
    if not is_run and (source / "config.json").is_file() and "training" in read_json(source / "config.json"):
        raise FileNotFoundError(f"{source} has no model yet: its first checkpoint was not reached")
    is_own = is_run or (source / "model.safetensors").is_file()
    if is_own and options:
        raise ValueError(f"{source} is this library's own, which tells all; leave out {', '.join(options)}")
    model = UNet.from_pretrained(source / "model" if is_run else source, **options)
    done = f"{target}: {sum(p.numel() for p in model.parameters()):,} parameters"
    if verify:
        if is_own:
            raise ValueError(f"verify: {source} is this library's own; there is no other code to compare with")
        peer, error = compare(source, model, **options)
        if not error < TOLERANCE:
            raise ValueError(f"{peer} gives other numbers, {error:.1e} of the largest output apart; nothing written")
        done += f"; {peer} gives the same output, to {error:.1e} of its largest value"
    if lora is not None:
        done += f"; {merge_lora(model, lora, lora_scale)} weights changed by {lora}"
    if to == "unet-denoiser":
        write_atomically(target, model.save_pretrained)
    elif to == "diffusers":
        write_atomically(target, lambda path: export_checkpoint(model.state_dict(), model.config, path, to))
    else:
        export_checkpoint(model.state_dict(), model.config, target, to, qkv_order=options.get("qkv_order"))
    return done
