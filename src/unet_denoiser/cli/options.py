"""The options of the command line, made from the configurations' fields and docstrings."""

from __future__ import annotations

import inspect
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypedDict, get_type_hints

import tyro
from docstring_parser import parse

from unet_denoiser.config.base import QKVOrder
from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.diffusion import DiffusionConfig
from unet_denoiser.config.editing import EditingConfig
from unet_denoiser.config.memory import MemoryConfig
from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.config.training import TrainingConfig
from unet_denoiser.config.unet import UNetConfig


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


def parse_command(
    commands: Mapping[str, Callable[..., None]], description: str, args: Sequence[str] | None
) -> Callable[[], None]:
    """The command that a command line asks for, with its options; a mistake prints one line and exits with code 2."""

    def bound(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
        return wraps(command)(lambda *args, **options: partial(command, *args, **options))

    bounds, said = {name: bound(command) for name, command in commands.items()}, io.StringIO()
    try:
        with redirect_stderr(said):
            call: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(
                bounds, prog="unet-denoiser", description=description, args=args
            )
        return call
    except SystemExit as end:
        if end.code:
            print(f"unet-denoiser: error: {_in_one_line(said.getvalue())}", file=sys.stderr)
        raise


def _in_one_line(box: str) -> str:
    """What tyro says in its box, or between rules where the terminal has no lines to draw one; without the rest."""
    drawn = "╭" in box
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    sections = re.split(r"\n[─-]+\n", "\n".join(lines))
    said = " ".join((sections[0] if drawn else sections[min(1, len(sections) - 1)]).split())
    similar = re.search(r"(?:similar to .*|you meant):\s+(--\S+)", box.replace("│", ""))
    helps = re.findall(r"unet-denoiser(?: \w+)? --help", box)
    hint = f"; {similar[1]} is near" if similar else ""
    return f"{said}{hint} (see {helps[-1] if helps else 'unet-denoiser --help'})"


if TYPE_CHECKING:
    DataOptions: TypeAlias = dict[str, Any]
    TrainingOptions: TypeAlias = dict[str, Any]
    ProcessOptions: TypeAlias = dict[str, Any]
    ModelOptions: TypeAlias = dict[str, Any]
    MemoryOptions: TypeAlias = dict[str, Any]
    SamplingOptions: TypeAlias = dict[str, Any]
    EditingOptions: TypeAlias = dict[str, Any]
else:
    DataOptions = Annotated[options_of(DataConfig, without=("source",)), tyro.conf.OmitArgPrefixes]
    TrainingOptions = Annotated[options_of(TrainingConfig), tyro.conf.OmitArgPrefixes]
    ProcessOptions = options_of(DiffusionConfig)
    ModelOptions = options_of(UNetConfig)
    MemoryOptions = Annotated[options_of(MemoryConfig), tyro.conf.OmitArgPrefixes]
    SamplingOptions = Annotated[options_of(SamplingConfig), tyro.conf.OmitArgPrefixes]
    EditingOptions = Annotated[options_of(EditingConfig), tyro.conf.OmitArgPrefixes]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalSize = Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="INT [INT]", help_behavior_hint="")]
OptionalNumber = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalOrder = Annotated[QKVOrder | None, tyro.conf.arg(help_behavior_hint="")]
OptionalName = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
