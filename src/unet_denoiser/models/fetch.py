"""Finding the files of a model: in a directory or on the Hugging Face hub."""

from pathlib import Path
from typing import Any

from unet_denoiser.utils.files import read_json

_PIPELINE_NAME = "model_index.json"


def fetch(source: str | Path, name: str, hub: dict[str, Any]) -> Path:
    """Return the local path of a file of a directory or hub repository; FileNotFoundError if it cannot be had."""
    directory = Path(source, hub["subfolder"] or "")
    neither = f"{source} is neither a directory nor a hub repository's name (owner/name)"
    if directory.is_dir():
        if (directory / name).is_file():
            return directory / name
        raise FileNotFoundError(f"{directory} has no {name}; {_say_what_to_give(directory)}")
    if directory.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
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


def _say_what_to_give(directory: Path) -> str:
    """Say which directory to give instead of one without a model: in a pipeline of diffusers, its U-Net's."""
    if not (directory / _PIPELINE_NAME).is_file():
        return "give a directory that save_pretrained wrote"
    parts = read_json(directory / _PIPELINE_NAME).items()
    unets = [name for name, kind in parts if isinstance(kind, list) and "UNet" in str(kind[-1:])]
    if not unets:
        return f"it is a pipeline of diffusers ({_PIPELINE_NAME}) without a U-Net"
    return f"it is a pipeline of diffusers ({_PIPELINE_NAME}): give {directory / unets[0]}, or subfolder={unets[0]!r}"
