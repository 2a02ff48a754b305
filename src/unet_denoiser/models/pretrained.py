"""Saving and loading a network with its architecture: `config.json` beside `model.safetensors`.

The two methods have the signatures of huggingface_hub's ModelHubMixin. That class itself is not the base: importing
it takes longer than importing this package may.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unet_denoiser.utils.files import read_json, write_atomically
from unet_denoiser.utils.tensor_files import read_safetensors, write_safetensors

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


class Pretrained:
    """Mixin for a torch module that is built from a `config`: saves, loads and shares it.

    The class sets `config_class`, whose `from_dict` and `to_dict` are the config's JSON form.
    """

    config_class: Any
    config: Any

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """A network of this architecture, randomly initialised."""
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
            save_directory: made if it does not exist.
            config: a configuration or its `to_dict()`, saved instead of the network's own.
            repo_id, push_to_hub: also upload the directory to this repository (default: the directory's name);
                remaining arguments go to huggingface_hub's `upload_folder`.
            model_card_kwargs: not supported; here for the signature.

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
        """The network of a directory or hub repository, in evaluation mode, with its architecture read from there.

        The weights are never held twice: the network is built without storage and takes the file's tensors as its own.

        Args:
            pretrained_model_name_or_path: a directory that `save_pretrained` wrote, or "owner/name" on the hub.
            force_download, token, cache_dir, local_files_only, revision: as for `huggingface_hub.hf_hub_download`.
            model_kwargs: subfolder="unet" for a network that is a part of a pipeline, variant="fp16" for a choice of
                diffusers' weights, or options to change that do not change the weights, for example dropout=0.0.

        Raises:
            FileNotFoundError: no such directory, or no `config.json` in it.
            ValueError: an unreadable file, an unknown option, or weights that do not fit the architecture exactly.
        """
        hub = {
            "force_download": force_download,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "revision": revision,
            "subfolder": model_kwargs.pop("subfolder", None),
        }
        source = Path(pretrained_model_name_or_path)
        config_path = None if source.is_file() else fetch(pretrained_model_name_or_path, CONFIG_NAME, hub)
        with _without_collection():
            model, state = cls._read(pretrained_model_name_or_path, config_path, hub, model_kwargs)
            load_strictly(model, state, source if config_path is None else source / WEIGHTS_NAME)
        return model.eval()  # type: ignore[attr-defined]

    @classmethod
    def _read(
        cls, source: str | Path, config_path: Path | None, hub: dict[str, Any], options: dict[str, Any]
    ) -> tuple[Self, dict[str, Tensor]]:
        """An empty network and the parameters of a directory or repository; `config_path` is None for a single file."""
        if config_path is None:
            raise FileNotFoundError(f"{source} is a file; give the directory that save_pretrained wrote")
        config = cls.config_class.from_dict(read_json(config_path) | options)
        return cls._empty(config), read_safetensors(fetch(source, WEIGHTS_NAME, hub))

    @classmethod
    def _empty(cls, config: Any) -> Self:
        """A network without storage, and so without the time that its initialisation would take."""
        with _Empty():
            return cls.from_config(config)


@contextmanager
def _without_collection() -> Iterator[None]:
    """No search for unused objects while thousands are made and none is dropped: it took half of a load's time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Empty(TorchFunctionMode):
    """New tensors on the meta device, and nothing of torch.nn.init: half the time of `with torch.device("meta")`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty or func is torch.zeros:
            kwargs["device"] = "meta"
        elif getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_strictly(model: Any, state: Mapping[str, Tensor], source: object) -> None:
    """Let the model take these tensors as its own; a name or shape that does not fit raises a short ValueError."""
    own = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found = {name: tuple(p.shape) for name, p in state.items()}
    problems = [f"lacks {name} {own[name]}" for name in own if name not in found]
    problems += [f"has {name} {found[name]}, which the network lacks" for name in found if name not in own]
    problems += [
        f"has {name} {found[name]}, not {own[name]}" for name in own if found.get(name, own[name]) != own[name]
    ]
    if problems:
        more = f"; and {len(problems) - 3} more differences" if len(problems) > 3 else ""
        raise ValueError(f"{source} does not fit its architecture: it {'; it '.join(problems[:3])}{more}")
    modules = dict(model.named_modules())
    for name, tensor in state.items():
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, nn.Parameter(tensor))


def write_pretrained(directory: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write an architecture and its weights; the weights last, so that what has weights is complete."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / CONFIG_NAME, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    write_safetensors(directory / WEIGHTS_NAME, {name: tensor.contiguous() for name, tensor in state.items()})


def fetch(source: str | Path, name: str, hub: dict[str, Any]) -> Path:
    """The local path of a file of a directory or, where there is no such directory, of a hub repository."""
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
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{source} is no directory here, and {name} cannot be had from the hub: {reason}"
        ) from None
