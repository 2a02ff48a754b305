"""Saving and loading a network with its architecture: `config.json` beside `model.safetensors`."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unet_denoiser.utils.files import read_json, write_json
from unet_denoiser.utils.tensor_files import read_safetensors, write_safetensors

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


class Pretrained:
    """Saves, loads and shares a torch module that is built from a `config`: a mixin.

    The class sets `config_class`, whose `from_dict` and `to_dict` are the config's JSON form. The methods have the
    signatures of huggingface_hub's ModelHubMixin, which is not the base since importing it takes too long.
    """

    config_class: Any
    config: Any

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Build a network of this architecture with random weights."""
        return cls(**{name: getattr(config, name) for name in config.to_dict()})

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write `config.json` and `model.safetensors`; each appears whole or not at all.

        Args:
            save_directory: created if it does not exist.
            config: a configuration or its `to_dict()`, saved instead of the network's own.
            repo_id, push_to_hub: also upload the directory to this repository (default: the directory's name);
                remaining arguments go to huggingface_hub's `upload_folder`.
            model_card_kwargs: not supported; part of the signature only.

        Returns:
            The commit's URL after an upload, otherwise None.
        """
        if model_card_kwargs is not None:
            raise ValueError("model_card_kwargs is not supported: write a README.md into the directory instead")
        directory = Path(save_directory)
        config = config if isinstance(config, Mapping) else (config or self.config).to_dict()
        write_pretrained(directory, config, self.state_dict())  # type: ignore[attr-defined]
        if not push_to_hub:
            return None
        from huggingface_hub import HfApi

        api = HfApi(token=push_to_hub_kwargs.pop("token", None))
        repo_id = api.create_repo(repo_id or directory.name, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo_id, folder_path=directory, **push_to_hub_kwargs))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **model_kwargs: Any,
    ) -> Self:
        """Load the network of a directory or hub repository, in evaluation mode.

        The weights are never held twice: the network is built without storage and takes the file's tensors as its own.

        Args:
            pretrained_model_name_or_path: a directory that `save_pretrained` wrote, or "owner/name" on the hub.
            force_download, token, cache_dir, local_files_only, revision: as for `huggingface_hub.hf_hub_download`.
            model_kwargs: subfolder="unet" for the network of a pipeline; variant="fp16" to choose among diffusers'
                weights; options of the architecture that change no weights, for example dropout=0.0.

        Raises:
            FileNotFoundError: no such directory, or no `config.json` in it.
            ValueError: an unreadable file, an unknown option, or weights that do not fit the architecture exactly.
        """
        hub = {"force_download": force_download, "token": token, "cache_dir": cache_dir, "revision": revision}
        hub |= {"local_files_only": local_files_only, "subfolder": model_kwargs.pop("subfolder", None)}
        source = Path(pretrained_model_name_or_path)
        config_path = None if source.is_file() else fetch(pretrained_model_name_or_path, CONFIG_NAME, hub)
        with _pause_garbage_collection():
            return cls._load(pretrained_model_name_or_path, config_path, hub, model_kwargs).eval()  # type: ignore[attr-defined]

    @classmethod
    def _load(cls, source: str | Path, config_path: Path | None, hub: dict[str, Any], options: dict[str, Any]) -> Self:
        """Load the network of a directory or repository; `config_path` is None for a single file."""
        if config_path is None:
            raise FileNotFoundError(f"{source} is a file; give the directory that save_pretrained wrote")
        model = cls._build_on_meta(cls.config_class.from_dict(read_json(config_path) | options))
        load_strictly(model, read_safetensors(fetch(source, WEIGHTS_NAME, hub)), Path(source) / WEIGHTS_NAME)
        return model

    @classmethod
    def _build_on_meta(cls, config: Any) -> Self:
        """Build a network on the meta device: without storage, and without the time of its initialisation."""
        with _MetaInitialization():
            return cls.from_config(config)


@contextmanager
def _pause_garbage_collection() -> Iterator[None]:
    """Pause Python's search for unused objects: thousands are made and none is dropped, half of a load's time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _MetaInitialization(TorchFunctionMode):
    """Makes tensors on the meta device and skips torch.nn.init: half the time of `with torch.device("meta")`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty or func is torch.zeros:
            kwargs["device"] = "meta"
        elif getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_strictly(model: Any, state: Mapping[str, Tensor], source: object) -> None:
    """Let the model take these tensors as its own; ValueError for a name or shape that does not fit."""
    own = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found = {name: tuple(p.shape) for name, p in state.items()}
    problems = [f"lacks {name} {own[name]}" for name in own if name not in found]
    problems += [f"has {name} {found[name]}, which the network lacks" for name in found if name not in own]
    problems += [
        f"has {name} {found[name]}, not {own[name]}" for name in own.keys() & found if found[name] != own[name]
    ]
    if problems:
        more = f"; and {len(problems) - 3} more differences" if len(problems) > 3 else ""
        raise ValueError(f"{source} does not fit its architecture: it {'; it '.join(problems[:3])}{more}")
    modules = dict(model.named_modules())
    for name, tensor in state.items():
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, nn.Parameter(tensor))


def write_pretrained(
    directory: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write an architecture and its weights; the weights last, so that a directory that has them is complete."""
    write_json(directory / CONFIG_NAME, config)
    write_safetensors(directory / WEIGHTS_NAME, {name: tensor.contiguous() for name, tensor in state.items()}, metadata)


def fetch(source: str | Path, name: str, hub: dict[str, Any]) -> Path:
    """Return the local path of a file of a directory or hub repository; FileNotFoundError if it cannot be had."""
    directory = Path(source, hub["subfolder"] or "")
    neither = f"{source} is neither a directory nor a hub repository's name (owner/name)"
    if directory.is_dir():
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}; give a directory that save_pretrained wrote")
        return directory / name
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


@contextmanager
def describe_load_errors(option: str, valid: str) -> Iterator[None]:
    """Turn any error of a library that loads a model into one ValueError, with the option and a valid value."""
    try:
        yield
    except Exception as error:  # OSError, KeyError, SafetensorError, ...: each library has its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{option} cannot be loaded ({reason}); give {valid}") from error
