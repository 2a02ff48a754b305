"""Finding the files of a model: in a directory or on the Hugging Face hub."""

from pathlib import Path
from typing import Any

from unet_denoiser.config.paths import is_hub_name, local_path
from unet_denoiser.convert.checkpoint_files import CONFIG_NAME
from unet_denoiser.utils.files import read_json

PIPELINE_NAME = "model_index.json"
SHARED_KEY = "_unet_denoiser"  # in the model_index.json of a folder that has a model of ours too, which is read instead
MODEL_FOLDERS = ("vae/*", "vqvae/*", "text_encoder*/*", "tokenizer*/*", "bert/*")  # of what conditions and decodes
MODEL_FILES = ("*.json", "model*.safetensors", *MODEL_FOLDERS)  # of a repository, what sampling needs


def fetch(source: str | Path, name: str, hub: dict[str, Any]) -> Path:
    """Return the local path of a file of a directory or hub repository; FileNotFoundError if it cannot be had."""
    directory = Path(source, hub["subfolder"] or "")
    neither = f"{source} is neither a directory nor a hub repository's name (owner/name)"
    if directory.is_dir():
        if (directory / name).is_file():
            return directory / name
        raise FileNotFoundError(f"{directory} has no {name}; {_say_what_to_give(directory)}")
    if directory.exists() or not is_hub_name(source):
        raise FileNotFoundError(neither)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), name, **hub))
    except HFValidationError:
        raise FileNotFoundError(neither) from None
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        place, reason = f"{source} is no directory here", str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{place}, and {name} cannot be had from the hub: {reason}") from None


def fetch_pipeline(source: str | Path) -> Path | None:
    """Return the local folder of a pipeline of diffusers, a folder or a hub repository; None for anything else.

    It is also None if a model of ours is beside the pipeline, as `share` writes it. Of a repository all files that the
    pipeline's parts need are downloaded. FileNotFoundError if they cannot be had.
    """
    place = Path(source)
    if place.exists() or str(source).startswith((".", "/", "~")):
        index = place / PIPELINE_NAME
        return place if index.is_file() and SHARED_KEY not in read_json(index) else None
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub = {"subfolder": None}
    try:
        if SHARED_KEY in read_json(fetch(source, PIPELINE_NAME, hub)):
            return None
    except FileNotFoundError as error:
        if isinstance(error.__context__, LocalEntryNotFoundError):  # the hub cannot be reached
            raise
        fetch(source, CONFIG_NAME, hub)  # a model's repository; raises where it is none either
        return None
    import diffusers

    try:
        return Path(diffusers.DiffusionPipeline.download(str(source), safety_checker=None, feature_extractor=None))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{source} cannot be had from the hub: {reason}") from None


def fetch_model(source: str | Path) -> Path:
    """Return the local folder of a saved model; of a hub repository, the files that sampling needs are downloaded.

    A path is returned as it is. FileNotFoundError if the files cannot be had.
    """
    place = local_path(source)
    if place.exists() or not is_hub_name(source):
        return place
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(MODEL_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{source} cannot be had from the hub: {reason}") from None


def _say_what_to_give(directory: Path) -> str:
    """Say which directory to give instead of one without a model: in a pipeline of diffusers, its U-Net's."""
    if not (directory / PIPELINE_NAME).is_file():
        return "give a directory that save_pretrained wrote"
    parts = read_json(directory / PIPELINE_NAME).items()
    unets = [name for name, kind in parts if isinstance(kind, list) and "UNet" in str(kind[-1:])]
    if not unets:
        return f"it is a pipeline of diffusers ({PIPELINE_NAME}) without a U-Net"
    return f"it is a pipeline of diffusers ({PIPELINE_NAME}): give {directory / unets[0]}, or subfolder={unets[0]!r}"
