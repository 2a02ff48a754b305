"""Opening checkpoints of any tool: safetensors and pickles without code, in folders or single files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from torch import Tensor

from unet_denoiser.convert.dtypes import unify_dtypes
from unet_denoiser.convert.find_network import Place, find_network
from unet_denoiser.convert.key_maps import LAYOUTS, OLD_ATTENTION
from unet_denoiser.convert.pickles import read_pickle
from unet_denoiser.utils.files import read_json, write_json
from unet_denoiser.utils.tensor_files import (
    read_safetensors,
    read_safetensors_metadata,
    recognize_file,
    write_safetensors,
)

CONFIG_NAME, OWN_CONFIG_KEY = "config.json", "unet_denoiser_config"
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
# the names that diffusers, transformers and accelerate give to weights
_STEMS = {_DIFFUSERS_WEIGHTS: ("safetensors", "bin"), "model": ("safetensors",), "pytorch_model": ("bin",)}


def find_config(path: Path) -> Path | None:
    """Return the config.json of a folder, or the one beside a file that has a name which such folders give."""
    if not path.is_dir() and not path.name.startswith(tuple(_STEMS)):
        return None
    file = (path if path.is_dir() else path.parent) / CONFIG_NAME
    return file if file.is_file() else None


def read_state(
    path: Path, *, ema: bool = False, variant: str | None = None, prefix: str | None = None, torch_dtype: Any = None
) -> dict[str, Tensor]:
    """Read the U-Net's tensors of a checkpoint, a folder or a file, in one dtype."""
    files = [path]
    if path.is_dir():
        if ema:
            raise ValueError(f"ema=True: {path} is a folder with one set of weights")
        files = find_weights(lambda name: _find_inside(path, name), variant)
    elif variant is not None:
        raise ValueError(f"variant={variant!r}: {path} is a single file")
    elif not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    tensors = {_rename_old_attention(n): t for n, t in _find(_read(files), path, ema, prefix).tensors.items()}
    # EDM keeps its resampling kernel, the mean of four pixels, as a buffer; ours is a function
    kept = {n: t for n, t in tensors.items() if not (n.endswith(".resample_filter") and bool((t == 0.25).all()))}
    return unify_dtypes(kept, path, torch_dtype)


def read_own(files: list[Path], source: object, torch_dtype: Any = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights of this library, and the architecture that a .safetensors file has in its header, or {}."""
    content = _read(files)
    try:
        tensors = find_network(content).tensors
    except ValueError:  # one that is damaged, of which the network's own check says more
        tensors = content
    recorded = {} if len(files) > 1 else read_recorded_config(files[0])
    return unify_dtypes(tensors, source, torch_dtype), recorded


def read_recorded_config(path: Path) -> dict[str, Any]:
    """Return the architecture in the header of a .safetensors file of this library; {} for any other file."""
    if recognize_file(path).container != "safetensors":
        return {}
    text = read_safetensors_metadata(path).get(OWN_CONFIG_KEY, "{}")
    try:
        return dict(json.loads(text))
    except ValueError:
        raise ValueError(f"{path} is damaged: the architecture in its header is not valid JSON") from None


def read_process(path: Path) -> dict[str, Any]:
    """Return what a file tells about its diffusion process, as options of `DiffusionConfig`; {} if nothing.

    Files of Stable Diffusion may have empty tensors named v_pred and ztsnr, or say it in the header (modelspec). EDM's
    networks are known by their names; its published ones all have its default options.
    """
    place = _find(_read([path]), path)
    if LAYOUTS["edm"].marker in place.tensors:
        return {"path": "edm"}
    is_safetensors = recognize_file(path).container == "safetensors"
    stated = read_safetensors_metadata(path).get("modelspec.prediction_type", "") if is_safetensors else ""
    if "v_pred" in place.marks or stated.lower() in ("v", "v_prediction", "v-prediction", "vpred"):
        return {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in place.marks}
    return {"prediction_type": "epsilon"} if stated.lower() in ("epsilon", "eps") else {}


def save_state(state: Mapping[str, Tensor], path: Path, config: Mapping[str, Any] | None = None) -> None:
    """Write a single .safetensors file or, with diffusers' configuration, a folder; each file whole or not at all.

    They get no digest: other tools change tensors and keep the metadata.
    """
    if config is not None:
        write_json(path / CONFIG_NAME, config)
        path = path / f"{_DIFFUSERS_WEIGHTS}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {name: tensor.contiguous() for name, tensor in state.items()}, digest=False)


def find_weights(find: Callable[[str], Path], variant: str | None = None) -> list[Path]:
    """Find the files with the weights of a diffusers folder or repository: one, or its shards.

    Args:
        find: returns the local path of a file of this name; FileNotFoundError if there is none.
        variant: for example "fp16"; by default the plain weights, or half-precision ones if there are no others.
    """
    missing = []
    endings = [f".{variant}"] if variant else ["", ".fp16", ".bf16"]
    for stem, ending, kind in ((s, e, k) for s, kinds in _STEMS.items() for e in endings for k in kinds):
        for name in (f"{stem}.{kind}.index{ending}.json", f"{stem}{ending}.{kind}"):
            try:
                file = find(name)
            except FileNotFoundError as error:
                missing.append(error)
                continue
            return [file] if file.suffix != ".json" else find_shards(file, find)
    raise missing[1]


def find_shards(index: Path, find: Callable[[str], Path]) -> list[Path]:
    """Find the files that an index of shards names."""
    weight_map = read_json(index).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index} has weight_map={shorten(weight_map)}; it must give a file beside it for each tensor")
    shards = []
    for name in sorted(names):
        try:
            shards.append(find(name))
        except FileNotFoundError:
            raise FileNotFoundError(f"{index} names {name}, which is not there: the download is incomplete") from None
    return shards


def _find_inside(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}")
    return folder / name


def _read(files: list[Path]) -> Any:
    """Return the contents of one file, or of all shards together."""
    contents = [_read_file(file) for file in files]
    if len(contents) == 1:
        return contents[0]
    for file, content in zip(files, contents, strict=True):
        if not isinstance(content, Mapping):
            raise ValueError(f"{file} holds a {type(content).__name__}, not a state dict")
    return {name: tensor for content in contents for name, tensor in content.items()}


def _read_file(path: Path) -> Any:
    """Return what a file holds, by its contents, not its name."""
    kind = recognize_file(path)
    if kind.container == "pickle":
        return read_pickle(path)
    if kind.container == "safetensors" or path.suffix == ".safetensors":
        return read_safetensors(path)
    raise ValueError(f"{path} is not a readable checkpoint: it is {kind.words}")


def _find(content: Any, path: Path, ema: bool = False, prefix: str | None = None) -> Place:
    try:
        return find_network(content, ema=ema, prefix=prefix)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _rename_old_attention(name: str) -> str:
    """Replace the names that diffusers' attention had at first, as diffusers does on loading."""
    stem, _, end = name.rpartition(".")
    parent, _, leaf = stem.rpartition(".")
    return f"{parent}.{OLD_ATTENTION[leaf]}.{end}" if leaf in OLD_ATTENTION and "attentions." in name else name
