"""The options of the command line, made from the configurations' fields and docstrings."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypedDict, get_type_hints

import tyro
from docstring_parser import parse

from unet_denoiser.config import UNetConfig
from unet_denoiser.memory_config import MemoryConfig
from unet_denoiser.recipe import DataConfig, DiffusionConfig, TrainingConfig


def options_of(config: type, without: tuple[str, ...] = ()) -> Any:
    """The fields of a configuration class as options that are there only when given, with its docstring's words."""
    words = {p.arg_name: " ".join((p.description or "").split()) for p in parse(config.__doc__ or "").params}
    parameters, hints = inspect.signature(config).parameters, get_type_hints(config)
    options = {
        name: Annotated[
            hints[name], tyro.conf.arg(help=words[name], help_behavior_hint=f"(default: {show(p.default)})")
        ]
        for name, p in parameters.items()
        if name not in without
    }
    return TypedDict(f"{config.__name__}Options", options, total=False)  # type: ignore[operator]


def show(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


if TYPE_CHECKING:
    DataOptions: TypeAlias = dict[str, Any]
    TrainingOptions: TypeAlias = dict[str, Any]
    ProcessOptions: TypeAlias = dict[str, Any]
    ModelOptions: TypeAlias = dict[str, Any]
    MemoryOptions: TypeAlias = dict[str, Any]
else:
    DataOptions = Annotated[options_of(DataConfig, without=("source",)), tyro.conf.OmitArgPrefixes]
    TrainingOptions = Annotated[options_of(TrainingConfig), tyro.conf.OmitArgPrefixes]
    ProcessOptions = options_of(DiffusionConfig)
    ModelOptions = options_of(UNetConfig)
    MemoryOptions = Annotated[options_of(MemoryConfig), tyro.conf.OmitArgPrefixes]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalSize = Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="INT [INT]", help_behavior_hint="")]
OptionalNumber = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalOrder = Annotated[Literal["legacy", "new"] | None, tyro.conf.arg(help_behavior_hint="")]
OptionalName = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
