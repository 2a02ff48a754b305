"""The options of a process as the configuration of a diffusers scheduler, which `scheduler_config.json` holds."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from inspect import signature
from typing import Any

import diffusers

from unet_denoiser.config.base import PathName
from unet_denoiser.config.diffusion import PATH_OPTIONS, DiffusionConfig
from unet_denoiser.diffusion.paths import PATHS

Options = dict[str, Any]  # of `DiffusionConfig` and of the scheduler; `clip_sample` is False for unbounded data
_REFUSED = {
    "thresholding": "cuts off a share of the values of x0",
    "use_dynamic_shifting": "moves the noise levels with the size of the image",
    "invert_sigmas": "runs time backwards",
}


def to_options(config: DiffusionConfig) -> Options:
    """Return the options of a process, without those of other paths."""
    others = {name for path, names in PATH_OPTIONS.items() if path != config.path for name in names}
    clip = {"clip_sample": config.clip_sample_range is not None, "clip_sample_range": config.clip_sample_range or 1.0}
    return {name: value for name, value in asdict(config).items() if name not in others} | clip


def _defaults(path: PathName) -> Options:
    """Return the options of a file that says nothing."""
    return to_options(DiffusionConfig(path=path, clip_sample_range=None))


def make_scheduler(options: Options) -> Any:
    """Make the scheduler that holds these options; those that its class does not have are kept in the file as well."""
    row, defaults = PATHS[options["path"]], _defaults(options["path"])
    scheduler_class = getattr(diffusers, row.schedulers[0])
    parameters, keeps_others = signature(scheduler_class).parameters, bool(scheduler_class._compatibles)
    options = options | {"prediction_type": row.stored.get(options["prediction_type"], options["prediction_type"])}
    theirs = {k: v for k, v in options.items() if k in parameters or (keeps_others and k not in defaults)}
    scheduler = scheduler_class.from_config(theirs)
    ours = {k: v for k, v in options.items() if k not in parameters and k in defaults and v != defaults[k]}
    scheduler.register_to_config(**ours)
    return scheduler


def read_options(config: Mapping[str, Any]) -> Options:
    """Read the options from the configuration of any diffusers scheduler with levels from betas or of another path.

    ValueError for another scheduler, for an option without a counterpart, and for a key that no scheduler has: its
    value would be lost.
    """
    name, keys = config.get("_class_name", "DDPMScheduler"), {key for key in config if not key.startswith("_")}
    path: PathName = next((path for path, row in PATHS.items() if name in row.schedulers), "vp")
    classes = (getattr(diffusers, str(n), diffusers.DDPMScheduler) for n in (PATHS[path].schedulers[0], name))
    written, found = (signature(scheduler).parameters for scheduler in classes)
    is_other = "snr_shift_scale" in found or "sigma_data" in config  # betas that are shifted, or EDM's network
    if path == "vp" and (is_other or not {"beta_schedule", "kwargs"} & set(found)):
        known = ", ".join(PATHS["flow"].schedulers + PATHS["edm"].schedulers)
        raise ValueError(
            f"_class_name={name!r} is no scheduler of DDPM's family, whose noise levels come from betas, nor {known}"
        )
    defaults = _defaults(path)
    keys -= {*defaults, "distillation"}  # ours
    keys -= {"predict_epsilon", "tensor_format"}  # names of diffusers' first versions
    if keys - set(found):  # only then, since looking at all schedulers takes a second
        every = (getattr(diffusers, other) for other in dir(diffusers) if other.endswith("Scheduler"))
        if unknown := sorted(keys.difference(*(signature(scheduler).parameters for scheduler in every))):
            raise ValueError(f"{unknown[0]}={config[unknown[0]]!r} is an option of no scheduler; correct its name")
    for option in _REFUSED:
        if config.get(option):
            raise ValueError(f"{option}={config[option]}, which {_REFUSED[option]}, has no counterpart here")
    if config.get("timestep_type") == "continuous":
        raise ValueError("timestep_type='continuous' is EDM's time; write it as _class_name='EDMEulerScheduler'")
    options = defaults | {key: p[key].default for p in (written, found) for key in PATH_OPTIONS[path] if key in p}
    options |= {"clip_sample": found["clip_sample"].default} if "clip_sample" in found else {}
    options |= config
    if "prediction_type" in written:
        first_name = "sample" if config.get("predict_epsilon") is False else "epsilon"  # as the option was at first
        stored = config.get("prediction_type", first_name)
        options["prediction_type"] = {v: k for k, v in PATHS[path].stored.items()}.get(stored, stored)
    # the same variance by another computation; other samplers' files have none
    variances = {"fixed_small_log": "fixed_small", None: "fixed_small"}
    return options | {"variance_type": variances.get(options["variance_type"], options["variance_type"])}


def change_options(options: Options, given: Mapping[str, Any]) -> Options:
    """Change options of `DiffusionConfig`, and check all; ValueError or TypeError if one cannot work."""
    changes: Options = dict(given)
    path: PathName = changes["path"] if "path" in changes else options["path"]
    if path != options["path"]:  # it has its own levels and prediction type
        kept = ("num_train_timesteps", "variance_type", "self_conditioning", "clip_sample", "clip_sample_range")
        options = _defaults(path) | {name: options[name] for name in kept}
    if any(name.startswith("density") for name in changes):
        options = options | dict.fromkeys(["density", "density_mean", "density_std", "density_table"])
    if "clip_sample_range" in changes:  # diffusers has two options for it
        clip = changes["clip_sample_range"]
        changes |= {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    options = options | changes
    checked = {field.name for field in fields(DiffusionConfig)} & (_defaults(path).keys() | changes.keys())
    config = asdict(DiffusionConfig(**{name: options[name] for name in checked}))
    return options | {name: config[name] for name in _defaults(path) if name in config}
