"""Opening foreign checkpoints: safetensors and pickles without code, in folders or single files."""

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.convert.key_maps import OLD_ATTENTION
from unet_denoiser.utils.files import read_json, write_json
from unet_denoiser.utils.tensor_files import read_safetensors, write_safetensors

_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
_LDM_PREFIX = "model.diffusion_model."


def read_state(path: Path, ema: bool, variant: str | None) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read the U-Net's tensors of a checkpoint and, from a folder, diffusers' configuration."""
    if path.is_dir():
        if ema:
            raise ValueError(f"ema=True: {path} is a folder with one set of weights")
        config = read_json(_find_inside(path, "config.json"))
        files = find_weights(lambda name: _find_inside(path, name), variant)
        state = {name: tensor for file in files for name, tensor in _read_tensors(file).items()}
        return {_rename_old_attention(name): tensor for name, tensor in state.items()}, config
    if variant is not None:
        raise ValueError(f"variant={variant!r}: {path} is a single file")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return _select_unet(_read_tensors(path), ema), None


def save_state(state: Mapping[str, Tensor], path: Path, config: Mapping[str, Any] | None = None) -> None:
    """Write a single .safetensors file or, with diffusers' configuration, a folder; each file whole or not at all."""
    if config is not None:
        write_json(path / "config.json", config)
        path = path / f"{_DIFFUSERS_WEIGHTS}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {name: tensor.contiguous() for name, tensor in state.items()})


def find_weights(find: Callable[[str], Path], variant: str | None = None) -> list[Path]:
    """Find the files with the weights of a diffusers folder or repository: one, or its shards.

    Args:
        find: returns the local path of a file of this name; FileNotFoundError if there is none.
        variant: for example "fp16"; by default the plain weights, or half-precision ones if there are no others.
    """
    missing = []
    for ending in [f".{variant}"] if variant else ["", ".fp16", ".bf16"]:
        for kind in ("safetensors", "bin"):
            for name in (f"{_DIFFUSERS_WEIGHTS}.{kind}.index{ending}.json", f"{_DIFFUSERS_WEIGHTS}{ending}.{kind}"):
                try:
                    file = find(name)
                except FileNotFoundError as error:
                    missing.append(error)
                    continue
                return [file] if file.suffix != ".json" else [find(shard) for shard in _list_shards(file)]
    raise missing[1]


def _list_shards(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index} has weight_map={shorten(weight_map)}; it must give a file beside it for each tensor")
    return sorted(names)


def _find_inside(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}")
    return folder / name


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path} holds more than tensors, and opening it would run {code[1]}") from None
        raise ValueError(f"{path} is not a readable checkpoint: it holds something else than pickled tensors") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from None
    if isinstance(content, list | tuple) and content:  # the DDPM port saves [model, optimizer, ...]
        content = content[0]
    for key in ("state_dict", "model", "ema"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _select_unet(state: dict[str, Tensor], ema: bool) -> dict[str, Tensor]:
    """Return the U-Net of a file that may hold more: text encoder, autoencoder, averaged weights."""
    for wrapper in ("module.", "model."):  # DistributedDataParallel, EDM's preconditioning
        if not any(name.startswith(_LDM_PREFIX) for name in state) and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    # EDM keeps its resampling kernel, the mean of four pixels, as a buffer; ours is a function
    state = {n: t for n, t in state.items() if not (n.endswith(".resample_filter") and bool((t == 0.25).all()))}
    unet = {name[len(_LDM_PREFIX) :]: tensor for name, tensor in state.items() if name.startswith(_LDM_PREFIX)}
    if not ema:
        return unet or state
    if not unet:
        raise ValueError("ema=True: the file has no averaged weights beside the others")
    averages = {name: "model_ema." + f"diffusion_model.{name}".replace(".", "") for name in unet}
    if missing := [name for name in averages.values() if name not in state]:
        raise ValueError(f"ema=True: the file lacks {missing[0]}")
    return {name: state[average] for name, average in averages.items()}


def _rename_old_attention(name: str) -> str:
    """Replace the names that diffusers' attention had at first, as diffusers does on loading."""
    stem, _, end = name.rpartition(".")
    parent, _, leaf = stem.rpartition(".")
    return f"{parent}.{OLD_ATTENTION[leaf]}.{end}" if leaf in OLD_ATTENTION and ".attentions." in name else name
