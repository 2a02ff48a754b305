"""Saving and loading a network with its architecture: `config.json` beside `model.safetensors`."""

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unet_denoiser.config.base import check_names
from unet_denoiser.config.paths import local_path
from unet_denoiser.convert.checkpoint import FOREIGN_OPTIONS
from unet_denoiser.convert.checkpoint_files import (
    CONFIG_NAME,
    OWN_CONFIG_KEY,
    find_config,
    find_shards,
    read_own,
    read_recorded_config,
)
from unet_denoiser.models.fetch import fetch
from unet_denoiser.utils.files import read_json, write_json
from unet_denoiser.utils.tensor_files import write_safetensors

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
        directory = local_path(save_directory)
        config = config if isinstance(config, Mapping) else (config or self.config).to_dict()
        state = {name.replace("_orig_mod.", ""): p for name, p in self.state_dict().items()}  # type: ignore[attr-defined]
        self._check_shapes(config, state)
        write_pretrained(directory, config, state)
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
            pretrained_model_name_or_path: a directory that `save_pretrained` wrote, its model.safetensors, or
                "owner/name" on the hub.
            force_download, token, cache_dir, local_files_only, revision: as for `huggingface_hub.hf_hub_download`.
            model_kwargs: subfolder="unet" for the network of a pipeline; torch_dtype for the weights, by default the
                file's; variant="fp16" to choose among diffusers' weights; options of the architecture that change no
                weights, for example dropout=0.0.

        Raises:
            FileNotFoundError: no such directory, or no `config.json` in it.
            ValueError: an unreadable file, an unknown option, or weights that do not fit the architecture exactly.
        """
        hub = {"force_download": force_download, "token": token, "cache_dir": cache_dir, "revision": revision}
        hub |= {"local_files_only": local_files_only, "subfolder": model_kwargs.pop("subfolder", None)}
        source = local_path(pretrained_model_name_or_path)
        # a Path forgets the "./" that tells a directory from the hub's owner/name
        name = pretrained_model_name_or_path if str(pretrained_model_name_or_path).startswith(".") else source
        config_path = find_config(source) if source.is_file() else fetch(name, CONFIG_NAME, hub)
        with _pause_garbage_collection():
            return cls._load(source, config_path, hub, model_kwargs).eval()  # type: ignore[attr-defined]

    @classmethod
    def _load(cls, source: str | Path, config_path: Path | None, hub: dict[str, Any], options: dict[str, Any]) -> Self:
        """Load the network of a directory, repository or file; a file has its architecture in itself or beside it."""
        if unused := [name for name in FOREIGN_OPTIONS if options.pop(name, None)]:
            raise ValueError(f"{source} is this library's own, which tells all; leave out {', '.join(unused)}")
        torch_dtype = options.pop("torch_dtype", None)
        check_names("U-Net option", options, [*cls.config_class().to_dict(), "torch_dtype", "subfolder"])
        path = Path(source)
        files, place = ([path], path) if path.is_file() else (_fetch_weights(source, hub), path / WEIGHTS_NAME)
        tensors, recorded = read_own(files, place, torch_dtype)
        alone = config_path is None or (recorded and path.is_file())
        stated = recorded if alone or config_path is None else read_json(config_path)
        if not stated:
            raise FileNotFoundError(f"{source} has no architecture; give the directory that save_pretrained wrote")
        config = cls.config_class.from_dict(stated | options)
        if recorded and recorded != stated:
            _compare_configs(cls.config_class, config_path, stated, recorded)
        model = cls._build_on_meta(config)
        load_strictly(model, tensors, place)
        return model

    @classmethod
    def _check_shapes(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless a network of this configuration has tensors of these names and shapes."""
        own = cls._build_on_meta(cls.config_class.from_dict(config)).state_dict()  # type: ignore[attr-defined]
        for name in [*own, *(name for name in state if name not in own)]:
            wanted, found = (tuple(s[name].shape) if name in s else "no such tensor" for s in (own, state))
            if wanted != found:
                raise ValueError(
                    f"{name}: the network has {found}, and its config asks for {wanted}; nothing was saved. Where a "
                    "layer was replaced, such as the first one for 8 channels, give "
                    "config=dataclasses.replace(model.config, in_channels=8)"
                )

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


def _fetch_weights(source: str | Path, hub: dict[str, Any]) -> list[Path]:
    """Return the files with the weights of a directory or repository of ours: one, or its shards."""
    try:
        return [fetch(source, WEIGHTS_NAME, hub)]
    except FileNotFoundError:
        try:
            index = fetch(source, f"{WEIGHTS_NAME}.index.json", hub)
        except FileNotFoundError:
            index = None
        if index is None:
            raise
        return find_shards(index, lambda name: fetch(source, name, hub))


def _compare_configs(kind: Any, path: Path | None, stated: dict[str, Any], recorded: dict[str, Any]) -> None:
    """Raise ValueError if config.json is another architecture than that in the header of the weights beside it."""
    given, saved = kind.from_dict(stated).to_dict(), kind.from_dict(recorded).to_dict()
    for name in given:
        if given[name] != saved[name]:
            raise ValueError(
                f"{path} has {name}={given[name]!r}, and the weights beside it were saved with {saved[name]!r}; "
                f"give the {CONFIG_NAME} that belongs to them"
            )


def is_own(source: Path, config_path: Path | None) -> bool:
    """Return True for a model of this library: a file with its architecture, or a config.json like `save_pretrained`'s.

    `config_path` is the config.json of a directory or repository, or that beside a file.
    """
    if source.is_file() and read_recorded_config(source):
        return True
    config = {"_class_name": None} if config_path is None else read_json(config_path)
    return "_class_name" not in config and ("model_channels" in config or not source.is_file())


def write_pretrained(
    directory: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write an architecture and its weights; the weights last, so that a directory that has them is complete.

    The weights' file has the architecture too: it can be loaded alone, and a wrong `config.json` is noticed.
    """
    path, tensors = directory / CONFIG_NAME, {name: tensor.contiguous() for name, tensor in state.items()}
    old_config = read_json(path) if path.is_file() else None
    write_json(path, config)
    try:
        write_safetensors(directory / WEIGHTS_NAME, tensors, {OWN_CONFIG_KEY: json.dumps(config), **(metadata or {})})
    except BaseException:
        if old_config is not None:
            write_json(path, old_config)  # which belongs to the old weights
        raise


@contextmanager
def describe_load_errors(option: str, valid: str) -> Iterator[None]:
    """Turn any error of a library that loads a model into one ValueError, with the option and a valid value."""
    try:
        yield
    except Exception as error:  # OSError, KeyError, SafetensorError, ...: each library has its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{option} cannot be loaded ({reason}); give {valid}") from error
