"""The command that converts checkpoints."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from unet_denoiser.cli.errors import one_line_errors
from unet_denoiser.cli.options import OptionalName, OptionalNumber, OptionalOrder, OptionalPath
from unet_denoiser.config.base import CheckpointFormat
from unet_denoiser.utils.terminal import printable


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
    prefix: OptionalName = None,
    lora: OptionalPath = None,
    lora_scale: float = 1.0,
    verify: bool = False,
) -> None:
    """Convert a checkpoint of DDPM, ADM, EDM, LDM, Stable Diffusion or diffusers to this library's format, or back.

    Args:
        source: a run, a model directory, a diffusers folder, or a .safetensors, .ckpt or .pt file; its layout and
            architecture are recognised.
        target: a folder to write for "unet-denoiser", "diffusers" and "pipeline", else a .safetensors file.
        to: the format to write; "pipeline" is a run's network and schedule together, for diffusers' DiffusionPipeline.
        ema: take the averaged weights of a file that has both.
        num_heads: attention heads, if the file does not tell and the network is not a published one.
        head_dim: channels per head, instead of num_heads.
        qkv_order: how an ADM file packs query, key and value, if its network is not a published one ("new" is
            use_new_attention_order).
        variant: the weights to take of a diffusers folder that has several, for example fp16.
        prefix: the network to take of a file that has several, as the error names them.
        lora: a LoRA file (.safetensors of diffusers or kohya) to merge into the weights.
        lora_scale: strength of the LoRA.
        verify: first run the checkpoint in its own code too (diffusers or guided-diffusion) and compare the outputs.
    """
    with one_line_errors():
        given = {
            "num_heads": num_heads,
            "head_dim": head_dim,
            "qkv_order": qkv_order,
            "variant": variant,
            "prefix": prefix,
        }
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        options |= {"ema": True} if ema else {}
        if to == "pipeline":
            others = {"verify": verify, "lora": lora is not None, "lora_scale": lora_scale != 1}
            _write_pipeline(source, target, [*options, *(name for name, is_given in others.items() if is_given)])
            print(printable(target))
            return
        from unet_denoiser.diffusion.process import Diffusion
        from unet_denoiser.models.conversion import convert_checkpoint
        from unet_denoiser.training.run import Run

        model = source if (run := Run.find(source)) is None else run.model_folder
        options["schedulers"] = {"edm": Diffusion(path="edm").to_dict()}  # as all that were published have it
        result = convert_checkpoint(model, target, to, lora=lora, lora_scale=lora_scale, verify=verify, **options)
        done = f"{target}: {result.parameters:,} parameters"
        if result.comparison is not None:
            peer, error = result.comparison
            done += f"; {peer} gives the same output, to {error:.1e} of its largest value"
        if result.merged_weights is not None:
            done += f"; {result.merged_weights} weights changed by {lora}"
        print(printable(done))


def _write_pipeline(run: Path, target: Path, unused: list[str]) -> None:
    """Write a run's network and schedule as a folder that diffusers' DiffusionPipeline opens."""
    from unet_denoiser.training.run import Run
    from unet_denoiser.utils.files import write_atomically

    if unused:
        raise ValueError(f"to='pipeline' writes a run as it is; leave out {', '.join(unused)}")
    if target.exists():
        raise FileExistsError(f"{target} exists; give a new name")
    write_atomically(target, Run.load(run).save_pipeline)
