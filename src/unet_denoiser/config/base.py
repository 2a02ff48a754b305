"""Shared by the configurations: names that options may have, checks, sizes."""

import inspect
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Concatenate, Literal, ParamSpec, Union, get_args, get_origin, get_type_hints

P = ParamSpec("P")

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
PathName = Literal["vp", "flow", "edm"]
DensityName = Literal["uniform", "logit_normal", "log_normal"]
VarianceType = Literal["fixed_small", "fixed_large", "learned_range"]
LossWeightingName = Literal["constant", "min_snr", "p2", "truncated_snr", "learned"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
MixedPrecision = Literal["no", "bf16", "fp16"]
TrackerName = Literal["tensorboard", "wandb"]
ForeignFormat = Literal["diffusers", "ldm", "adm", "ddpm"]
CheckpointFormat = Literal["unet-denoiser", "pipeline", ForeignFormat]
QKVOrder = Literal["legacy", "new"]
ExportFormat = Literal["onnx", "openvino", "torch"]
ExportPrecision = Literal["float32", "bfloat16", "float16", "int8"]
BackendName = Literal["torch", "openvino", "onnxruntime", "auto"]
BackendPrecision = Literal["float32", "bfloat16", "int8"]


def signature_of(cls: Callable[P, Any]) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Give an `__init__(self, *args, **kwargs)` the parameters of `cls`, for help(), editors and type checkers."""

    def decorate(init: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        parameters = inspect.signature(cls).parameters.values()
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        init.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
        return init

    return decorate


def as_plain(value: Any) -> Any:
    """Turn arrays and tensors, scalars too, into Python's values; leave others as they are."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "ndim") else value


def check_types(config: Any) -> None:
    """Check each field of a dataclass by its annotation, and put numbers, tuples and paths into their plain form.

    Whole floats stand for ints, lists and arrays for tuples, scalars of numpy and torch for Python's, strings for
    paths. Strings never stand for numbers, nor numbers for True and False.

    Raises:
        TypeError, ValueError: a value of another kind, with the field's name and what would be valid.
    """
    cls: Any = type(config)
    for name, hints in _field_types(cls).items():
        value = getattr(config, name)
        plain = as_plain(value)
        converted = next((c for c in (_convert(plain, hint) for hint in hints) if c is not _INVALID), _INVALID)
        if converted is _INVALID:
            valid = " or ".join(map(_describe, hints))
            if get_origin(hints[0]) is Literal:
                raise ValueError(f"{name}={value!r} is not one of {valid}")
            raise TypeError(f"{name}={value!r} must be {valid}")
        if converted is not value:
            object.__setattr__(config, name, converted)


_INVALID: Any = object()


@cache
def _field_types(config_class: Any) -> dict[str, tuple[Any, ...]]:
    """Return the types that each field of a dataclass may have."""
    hints = get_type_hints(config_class)
    return {
        field.name: get_args(hint) if get_origin(hint := hints[field.name]) in (Union, UnionType) else (hint,)
        for field in fields(config_class)
    }


def _convert(value: Any, hint: Any) -> Any:
    """Return the value in the form of one type, `_INVALID` if it is none of it."""
    if hint is NoneType:
        return value if value is None else _INVALID
    if get_origin(hint) is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in get_args(hint))
        return value if fits else _INVALID
    if get_origin(hint) is tuple:
        return _convert_tuple(value, get_args(hint))
    if hint is Path:
        return Path(value) if isinstance(value, str | os.PathLike) else _INVALID
    if hint is str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        return value if isinstance(value, str) else _INVALID
    if isinstance(value, bool) or hint is bool:
        return value if isinstance(value, bool) and hint is bool else _INVALID
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int if hint is int else int | float) else _INVALID


def _convert_tuple(value: Any, entries: tuple[Any, ...]) -> Any:
    """Return a list, range or tuple as a tuple whose values are of the types `entries`."""
    if not isinstance(value, list | tuple | range):
        return _INVALID
    hints = entries[:1] * len(value) if entries[-1] is Ellipsis else entries
    if len(hints) != len(value):
        return _INVALID
    converted = tuple(_convert(as_plain(item), hint) for item, hint in zip(value, hints, strict=True))
    return _INVALID if _INVALID in converted else converted


def _describe(hint: Any) -> str:
    """Name a type in words."""
    if get_origin(hint) is Literal:
        return ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        entries = get_args(hint)
        kind = {int: "whole numbers", float: "numbers", str: "strings", bool: "True and False"}[entries[0]]
        return f"a tuple of {kind}" if entries[-1] is Ellipsis else f"a tuple of {len(entries)} {kind}"
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", Path: "a path"}
    return "None" if hint is NoneType else names[hint]


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise ValueError unless `value` is one of the values of the Literal `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, get_args(choices)))}")


def check_names(kind: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise ValueError for a name that is not known, with those that are like it, or all."""
    for name in given:
        if name not in known:
            near = get_close_matches(name, known)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the options are {', '.join(sorted(known))}"
            raise ValueError(f"unknown {kind} {name!r}; {hint}")


def check_minimum(config: object, minimum: int, *names: str) -> None:
    """Raise ValueError if one of these fields of `config` is below `minimum`; None is accepted."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}")


def per_axis(size: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Return `image_size` as one int per axis; one number stands for all axes.

    Raises:
        ValueError: another number of values, or one below 1 or no whole number.
    """
    given = as_plain(size)
    sizes = _convert_tuple([given] if isinstance(given, int | float) else given, (int, ...))
    sizes = sizes * axes if sizes is not _INVALID and len(sizes) == 1 else sizes
    if sizes is _INVALID or len(sizes) != axes or min(sizes) < 1:
        raise ValueError(f"image_size={size} must be a positive int, or {axes} of them")
    return sizes


def halve(size: int, times: int = 1) -> int:
    """Halve a size `times` times, rounding up as every downsampling does."""
    return (size + 2**times - 1) // 2**times
