"""LoRA files: what they hold, by current names, and what peft's configuration says of it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, NamedTuple

from torch import Tensor

from unet_denoiser.config.paths import local_path
from unet_denoiser.utils.tensor_files import read_safetensors

# the parts of other networks: text encoders, their embeddings, autoencoders
_OTHER_PART = re.compile(
    r"(base_model\.model\.)?(lora_te\d?|te\d?|text_encoders?(_\d)?|text_model|clip_[lgh]|t5(xxl)?|bundle_emb|emb_params"
    r"|cond_stage_model|conditioner|lora_vae|vae|first_stage_model)[._]"
)
_PEFT_PREFIX = "base_model.model."
_PREFIX = re.compile(
    r"(?:(?:lora_unet|lycoris|unet|base_model[._]model|(?:model[._])?diffusion_model|module|model|_orig_mod)[._])+"
)
# one of the two matrices: lora_A, lora_down, lora.down, to_q_lora.down, lora_linear_layer.down, lora_A.default, ...
_MATRIX = re.compile(r"(.+?)[._]lora(?:_(?:linear_|conv_)?layer)?[._](A|B|down|up)(?:\.(?!weight$)[\w-]+)?\.weight")
_ALPHA = re.compile(r"(.+?)(?:[._]lora)?\.alpha")
DUPLICATE = "another update for the same weight too; give one of them"
# what other methods call their tensors
_METHODS = {
    "a LoHa": r"hada_[wt]",
    "a LoKr": r"lokr_[wt]",
    "a DoRA": r"dora_scale|lora_magnitude_vector",
    "a LoCon in Tucker's form": r"lora_mid",
    "a full difference of weights": r"(?<=\.)diff(_b)?$|set_weight$",
    "trained norms": r"(?<=\.)[wb]_norm$",
    "a BOFT": r"boft_",
    "an OFT": r"oft_",
    "an (IA)^3": r"ia3_|on_input$",
    "a GLoRA": r"glora|\.[ab][12]\.weight$",
    "an AdaLoRA": r"lora_E|lora_ranknum",
    "a LoRA of an embedding": r"lora_embedding_[AB]",
    "a LoRA with a bias": r"lora.*\.bias$",
    "a KaSA": r"lora_diag",
    "a VeRA": r"vera_",
    "a FourierFT": r"fourierft_",
    "an HRA": r"hra_u",
}
_ONLY = "only LoRA and LoCon can be merged"

# fields of peft's LoraConfig that change no number, or are used in `compute_strength`
_KNOWN_FIELDS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("qalora_group_size", "megatron_core", "ensure_weight_tying", "bias"),
}
# initial values that leave the base weights as they are
_HARMLESS_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
_CONVERTIBLE_INITS = ("pissa", "corda", "olora", "lora_ga")


class Matrices(NamedTuple):
    """The pair of matrices of a layer, and its alpha, each as (name in the file, tensor) or None."""

    module: str
    down: tuple[str, Tensor] | None = None
    up: tuple[str, Tensor] | None = None
    alpha: tuple[str, Tensor] | None = None


class LoraFile(NamedTuple):
    """A LoRA of a U-Net.

    name: for messages. layers: by the layer's name with underscores, without prefixes. config: peft's `LoraConfig`.
    others: names of tensors for other networks. is_alpha_unknown: it has peft's names, without its configuration.
    """

    name: str
    layers: dict[str, Matrices]
    config: dict[str, Any]
    others: list[str]
    is_alpha_unknown: bool


def read_lora(source: str | Path | Mapping[str, Tensor]) -> LoraFile:
    """Read a LoRA file, or take its tensors; ValueError for any other method than LoRA and LoCon, by its name."""
    file, config = "the LoRA", {}
    if not isinstance(source, Mapping):
        file, path = str(source), local_path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file; give a LoRA's .safetensors")
        source = read_safetensors(path)
        config = _read_config(path, any(name.startswith(_PEFT_PREFIX) for name in source))
    layers: dict[str, Matrices] = {}
    own = {name: tensor for name, tensor in source.items() if not _OTHER_PART.match(name)}
    for name in own:
        for method, pattern in _METHODS.items():
            if re.search(pattern, name):
                raise ValueError(f"{file} is {method} ({name}); {_ONLY}")
    for name, tensor in own.items():
        matrix, alpha = _MATRIX.fullmatch(name), _ALPHA.fullmatch(name)
        if matrix is None and alpha is None:
            raise ValueError(f"{file} has {name}, which is not understood here")
        module = _clean((matrix or alpha)[1])  # type: ignore[index]
        layer = layers.setdefault(module.replace(".", "_"), Matrices(module))
        part = "alpha" if matrix is None else "down" if matrix[2] in ("A", "down") else "up"
        if getattr(layer, part) is not None:
            raise ValueError(f"{file} has {name}, and {DUPLICATE}")
        layers[module.replace(".", "_")] = layer._replace(**{part: (name, tensor)})  # type: ignore[arg-type]
    is_alpha_unknown = not config and any(name.startswith(_PEFT_PREFIX) for name in own)
    return LoraFile(file, layers, config, [name for name in source if name not in own], is_alpha_unknown)


def _clean(module: str) -> str:
    """Return the name of a layer without the prefixes of tools and wrappers."""
    module = re.sub(r"\.(processor|_orig_mod|base_layer)(?=\.|$)", "", module)
    prefix = _PREFIX.match(module)
    return module[prefix.end() :] if prefix else module


def _read_config(path: Path, is_peft: bool) -> dict[str, Any]:
    """Read peft's `LoraConfig`: diffusers saves it in the file's header, with a prefix, peft in a file beside."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata")
    place, beside = f"{path}: lora_adapter_metadata in its header", path.with_name("adapter_config.json")
    if text is None and (is_peft or path.name == "adapter_model.safetensors") and beside.is_file():
        place, text = str(beside), beside.read_text(encoding="utf-8", errors="replace")
    try:
        config = json.loads("{}" if text is None else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{place} is a JSON {type(config).__name__}, not an object")
    # the fields of other networks have their prefix
    config = {name.removeprefix("unet."): value for name, value in config.items()}
    if not (config := {name: value for name, value in config.items() if "." not in name}):
        return {}
    _check_method(config, place)
    config["alpha_pattern"] = config.get("alpha_pattern") or {}
    _check_alphas(config, place)
    return config


def _check_method(config: Mapping[str, Any], place: str) -> None:
    """Raise ValueError for a field that makes the adapter something else than a LoRA of the network as it is."""
    if (kind := config.get("peft_type") or "LORA") != "LORA":
        raise ValueError(f"{place}: peft_type={shorten(kind)} is another method; {_ONLY}")
    init = str(config.get("init_lora_weights", True)).lower()
    if init not in _HARMLESS_INITS:
        way = "only peft can use it"
        if init.startswith(_CONVERTIBLE_INITS):
            way = "save it with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...), as a LoRA"
        raise ValueError(f"{place}: init_lora_weights={init!r} changed the base weights before the training; {way}")
    for field, value in config.items():
        if (field not in _KNOWN_FIELDS and value) or (field == "bias" and value not in (None, False, "none")):
            method = ", a DoRA" if field == "use_dora" else ""
            raise ValueError(f"{place}: {field}={shorten(value)}{method} is more than a LoRA; {_ONLY}")


def _check_alphas(config: Mapping[str, Any], place: str) -> None:
    patterns = config["alpha_pattern"]
    if not isinstance(patterns, dict):
        raise ValueError(f"{place}: alpha_pattern={shorten(patterns)} must be an object of patterns and numbers")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{place}: alpha_pattern has {shorten(pattern)}, no regular expression: {error}") from None
    alphas = {f"alpha_pattern[{shorten(pattern)}]": alpha for pattern, alpha in patterns.items()}
    alphas |= {"lora_alpha": config["lora_alpha"]} if "lora_alpha" in config else {}
    for name, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e9:
            raise ValueError(f"{place}: {name}={shorten(alpha)} must be a number, for example 16")
    if not isinstance(config.get("use_rslora", False), bool):
        raise ValueError(f"{place}: use_rslora={shorten(config['use_rslora'])} must be true or false")
