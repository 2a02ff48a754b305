"""A trained network as diffusers holds it: a pipeline, or a network with a scheduler and the loop that samples."""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert.checkpoint import export_checkpoint
from unet_denoiser.convert.diffusers_config import to_diffusers
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.fetch import PIPELINE_NAME
from unet_denoiser.sampling.pipeline.pipeline import Pipeline
from unet_denoiser.sampling.pipeline.published import IGNORED
from unet_denoiser.sampling.samplers import Sampler
from unet_denoiser.utils.files import read_json, write_json

STEPS, STEPS_OF_DDPM = 50, 250  # in the code of a card; ddpm needs more
EXAMPLE_CAPTION = "a red fox"
_SCHEDULERS = {"flow": "FlowMatchEulerDiscreteScheduler", "edm": "EDMEulerScheduler"}
_PREDICTIONS = {
    "vp": ("epsilon", "v_prediction", "sample"),
    "flow": ("flow",),
    "edm": ("edm", "v_prediction"),
}


class DiffusersCopy(NamedTuple):
    """The part of a pipeline that diffusers holds.

    Args:
        write: writes it into a folder: `model_index.json` if it is a pipeline, and a folder for each part.
        code: (name) -> lines of Python that sample from the folder or hub repository of this name.
        kind: the class of the pipeline; None for a network and a scheduler alone.
        note: what a reader must know of it beside the code.
    """

    write: Callable[[Path], None]
    code: Callable[[str], str]
    kind: str | None
    note: str | None = None


def make_copy(pipeline: Pipeline, guidance_scale: float = 1.0) -> DiffusersCopy:
    """Return what diffusers holds of a run's pipeline; ValueError for what has no counterpart there, by its name.

    Args:
        guidance_scale: of the code that samples a network with classes and a learned null.
    """
    config, state = _check_held(pipeline), pipeline.model.state_dict()
    if config.context_dim is not None:
        return _copy_text_pipeline(pipeline)
    needs_loop = pipeline.process.path == "edm" or _has_own_timesteps(pipeline.process)
    if config.num_classes is not None or pipeline.data.vae is not None or needs_loop:
        return _copy_network(pipeline, config, state, guidance_scale)
    return _copy_pixel_pipeline(pipeline, config, state)


def _check_held(pipeline: Pipeline) -> UNetConfig:
    """Return the architecture of the network in diffusers; ValueError for what has no counterpart."""
    process, config, distilled = pipeline.process, pipeline.model.config, pipeline.process.distillation
    if process.self_conditioning:
        raise ValueError("self_conditioning=True: none of its pipelines feeds the network its last estimate")
    if process.prediction_type not in _PREDICTIONS[process.path]:
        raise ValueError(f"prediction_type={process.prediction_type!r}: it has none with path={process.path!r}")
    if distilled is not None and (process.path != "vp" or distilled.draws_guidance):
        raise ValueError(f"{distilled.describe()}, which none of its samplers takes with path={process.path!r}")
    if pipeline.data.concat is not None:
        raise ValueError(f"concat={public_name(pipeline.data.concat)!r}: none of its pipelines prepares such an image")
    if config.vector_dim is not None:
        raise ValueError(f"vector_dim={config.vector_dim}: none of its pipelines takes such numbers")
    if config.num_classes is not None and config.context_dim is None and config.learned_null:
        config = replace(config, num_classes=config.num_classes + 1, learned_null=False)
    try:
        to_diffusers(config)
    except ValueError as error:
        reason = str(error).replace(" has no counterpart in diffusers' networks", ": its networks have no such option")
        raise ValueError(reason) from None
    return config


def public_name(value: str) -> str:
    """Return a folder's name without the path to it, and a name on the hub as it is."""
    return Path(value).name if Path(value).is_absolute() else value


def _write_network(pipeline: Pipeline, config: UNetConfig, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the network; a learned null becomes the class after the last one, as diffusers has no other place."""
    if pipeline.model.config.learned_null and config.num_classes is not None:
        weights = torch.cat([state["class_embedding.weight"], state["null_class"][None]])
        state = {name: p for name, p in state.items() if name != "null_class"} | {"class_embedding.weight": weights}
    export_checkpoint(dict(state), config, folder / "unet", "diffusers")


def _make_scheduler(pipeline: Pipeline) -> Any:
    """Return the scheduler of the copy, with the options of its class alone."""
    import diffusers

    process = pipeline.process
    name = _SCHEDULERS.get(process.path, "DDPMScheduler" if process.learns_variance else "DDIMScheduler")
    if _has_own_timesteps(process):  # which DDIMScheduler does not take; that of DPM-Solver++ is ddim at order 1
        name = "DPMSolverMultistepScheduler"
    kind = getattr(diffusers, name)
    known = signature(kind).parameters
    options = {key: value for key, value in process.scheduler.config.items() if key in known}
    if _has_own_timesteps(process):
        options |= {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
    elif process.distillation is not None:  # the x0 of a step that skips several is none of the data's
        options["clip_sample"] = False
    return kind(**options)


def _has_own_timesteps(process: Diffusion) -> bool:
    """Return True for a distilled network whose timesteps no spacing of diffusers has."""
    return process.distillation is not None and process.distillation.timestep_spacing == "quadratic"


def _copy_pixel_pipeline(pipeline: Pipeline, config: UNetConfig, state: Mapping[str, Tensor]) -> DiffusersCopy:
    """Return the pipeline of a network that is given nothing beside x_t and t."""
    import diffusers

    process = pipeline.process
    is_ddim = process.path == "vp" and not process.learns_variance
    kind = "DDIMPipeline" if is_ddim else "DDPMPipeline"

    def write(folder: Path) -> None:
        _write_network(pipeline, config, state, folder)
        unet = diffusers.UNet2DModel.from_pretrained(folder / "unet")
        made: Any = getattr(diffusers, kind)(unet, _make_scheduler(pipeline))
        made.save_pretrained(folder)

    def code(name: str) -> str:
        return (
            f"from diffusers import {kind}\n\n"
            f"pipeline = {kind}.from_pretrained({quote(name)})\n"
            f"images = pipeline(batch_size=4, {_steps(pipeline)}).images\n"
            'images[0].save("image.png")'
        )

    return DiffusersCopy(write, code, kind)


def _steps(pipeline: Pipeline) -> str:
    """Return the argument that sets the steps: of a scheduler's set_timesteps, and of a pipeline."""
    process = pipeline.process
    if _has_own_timesteps(process):
        return f"timesteps={Sampler(pipeline.sampling_config(), process).timesteps.tolist()}"
    if process.distillation is not None:
        return f"num_inference_steps={process.distillation.num_steps}"
    most = STEPS_OF_DDPM if process.learns_variance else STEPS
    return f"num_inference_steps={min(most, process.num_train_timesteps)}"


def _copy_network(
    pipeline: Pipeline, config: UNetConfig, state: Mapping[str, Tensor], guidance_scale: float
) -> DiffusersCopy:
    """Return network, scheduler and autoencoder of a network that no pipeline of diffusers runs, with its loop."""
    scheduler = _make_scheduler(pipeline)

    def write(folder: Path) -> None:
        _write_network(pipeline, config, state, folder)
        scheduler.save_pretrained(folder / "scheduler")

    def code(name: str) -> str:
        return "\n".join(_loop(pipeline, config, name, type(scheduler).__name__, guidance_scale))

    if config.num_classes is None or not pipeline.model.config.learned_null:
        return DiffusersCopy(write, code, None)
    note = f"Class {config.num_classes - 1} stands for no class, which guidance leads away from."
    return DiffusersCopy(write, code, None, note)


def _loop(pipeline: Pipeline, config: UNetConfig, name: str, scheduler: str, guidance_scale: float) -> list[str]:
    """Return lines of Python that sample as `unet-denoiser sample --sampler ddim` (euler for flow and EDM)."""
    count, process, null = 4, pipeline.process, config.num_classes
    vae = None if pipeline.data.vae is None else pipeline.autoencoder
    size = (count, process.data_channels(config), *config.sizes)
    names = ["UNet2DModel", scheduler, *([] if vae is None else [type(vae.model).__name__])]
    labels = "" if null is None else ", class_labels=labels"
    start = " * scheduler.init_noise_sigma" if process.path == "edm" else ""
    lines = [
        "import torch",
        f"from diffusers import {', '.join(sorted(names))}",
        "from diffusers.image_processor import VaeImageProcessor",
        "",
        f'unet = UNet2DModel.from_pretrained({quote(name)}, subfolder="unet")',
        f'scheduler = {scheduler}.from_pretrained({quote(name)}, subfolder="scheduler")',
        f"scheduler.set_timesteps({_steps(pipeline)})",
    ]
    if null is not None:
        classes = pipeline.class_names or []
        shown = [i % len(classes) for i in range(count)] if classes else [0] * count
        lines.append(f"labels = torch.tensor({shown})  # of {', '.join(classes[:count])}")
    lines += [
        f"x = torch.randn({size}){start}",
        "with torch.no_grad():",
        "    for t in scheduler.timesteps:",
    ]
    seen = "x"
    if process.path == "edm":
        lines.append("        scaled = scheduler.scale_model_input(x, t)")
        seen = "scaled"
    lines.append(f"        output = unet({seen}, t{labels}).sample")
    if guidance_scale != 1 and pipeline.model.config.learned_null and null is not None:
        nothing = f"torch.full_like(labels, {null - 1})"
        lines.append(f"        nothing = unet({seen}, t, class_labels={nothing}).sample  # the learned null")
        lines.append(f"        output = nothing + {guidance_scale:g} * (output - nothing)")
    exact = ", use_clipped_model_output=True" if scheduler == "DDIMScheduler" else ""
    lines.append(f"        x = scheduler.step(output, t, x{exact}).prev_sample")
    if vae is not None:
        lines += [
            f"    vae = {type(vae.model).__name__}.from_pretrained({_vae_name(pipeline, name)})",
            f"    x = vae.decode({_unscale(vae)}).sample",
        ]
    return [*lines, 'VaeImageProcessor().postprocess(x)[0].save("image.png")']


def _vae_name(pipeline: Pipeline, name: str) -> str:
    """Return the arguments that load the autoencoder: from the copy, or from where the run has it on the hub."""
    assert pipeline.data.vae is not None
    return f'{quote(name)}, subfolder="vae"' if Path(pipeline.data.vae).exists() else quote(pipeline.data.vae)


def _unscale(vae: Any) -> str:
    """Return the expression of latents before shift and scale, from samples x."""
    scale, shift = vae.scale.flatten().tolist(), vae.shift.flatten().tolist()

    def number(values: list[float]) -> str:
        if len(set(values)) == 1:
            return f"{values[0]:.7g}"
        return f"torch.tensor({[float(f'{value:.7g}') for value in values]}).view(1, -1, 1, 1)"

    divided = "x" if set(scale) == {1.0} else f"x / {number(scale)}"
    return divided if set(shift) == {0.0} else f"{divided} + {number(shift)}"


def _copy_text_pipeline(pipeline: Pipeline) -> DiffusersCopy:
    """Return the pipeline that a run was fine-tuned from, with the run's network and schedule."""
    source = Path(pipeline.data.text_encoder or "")
    index = read_json(source / PIPELINE_NAME) if (source / PIPELINE_NAME).is_file() else {}
    if not index or pipeline.data.vae != pipeline.data.text_encoder:
        raise ValueError("captions: none of its pipelines has this text encoder and this autoencoder")
    kind = str(index["_class_name"]).replace("Img2Img", "").replace("Inpaint", "")  # all have the same parts
    config, state, scheduler = pipeline.model.config, pipeline.model.state_dict(), _make_scheduler(pipeline)
    guidance = "" if pipeline.process.distillation is None else ", guidance_scale=1"
    kept = [name for name, value in index.items() if isinstance(value, list) and value[-1] and name not in IGNORED]

    def write(folder: Path) -> None:
        for part in kept:
            if part not in ("unet", "scheduler"):
                copy_folder(source / part, folder / part)
        _write_network(pipeline, config, state, folder)
        scheduler.save_pretrained(folder / "scheduler")
        parts: dict[str, Any] = {name: [None, None] for name in IGNORED if name in index}
        parts |= {"unet": ["diffusers", to_diffusers(config)["_class_name"]]}
        parts |= {"scheduler": ["diffusers", type(scheduler).__name__]}
        write_json(folder / PIPELINE_NAME, index | parts | {"_class_name": kind, "requires_safety_checker": False})

    def code(name: str) -> str:
        return (
            f"from diffusers import {kind}\n\n"
            f"pipeline = {kind}.from_pretrained({quote(name)})\n"
            f'images = pipeline("{EXAMPLE_CAPTION}", {_steps(pipeline)}{guidance}).images\n'
            'images[0].save("image.png")'
        )

    return DiffusersCopy(write, code, kind)


def copy_folder(source: Path, target: Path, without: Collection[str] = ()) -> None:
    """Copy a folder of a published model: weights, words and options, and of links the files they point to.

    Args:
        without: names of its folders that are left out.
    """
    has_safe = any(source.rglob("*.safetensors"))
    kept = (".json", ".txt", ".model", ".safetensors", *(() if has_safe else (".bin",)))
    shutil.copytree(
        source,
        target,
        ignore=lambda folder, names: [
            name for name in names if name in without or not (name.endswith(kept) or Path(folder, name).is_dir())
        ],
    )


def quote(name: str) -> str:
    """Return a text as Python code in double quotes."""
    return json.dumps(name, ensure_ascii=False)
