"""Options of the command line, from the fields and docstrings of the configurations."""

import inspect
import io
import re
import sys
import warnings
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
from unet_denoiser.config.distillation import DistillationConfig
from unet_denoiser.config.editing import EditingConfig
from unet_denoiser.config.export import ExportConfig
from unet_denoiser.config.memory import MemoryConfig
from unet_denoiser.config.paths import local_path
from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.config.training import TrainingConfig
from unet_denoiser.config.unet import UNetConfig

LISTS = ("--class", "--class-names", "--vector-columns")  # options of names: those of a repeated one are joined
APPENDED = ("--caption",)  # tyro joins these; each takes one value


def make_options(config: type, without: tuple[str, ...] = ()) -> Any:
    """Return a configuration's fields as a TypedDict for tyro, which has a key only for each option that was given."""
    help_texts = {p.arg_name: " ".join((p.description or "").split()) for p in parse(config.__doc__ or "").params}
    parameters, hints = inspect.signature(config).parameters, get_type_hints(config)
    options = {
        name: Annotated[
            hints[name],
            tyro.conf.arg(help=help_texts.get(name, ""), help_behavior_hint=f"(default: {show(p.default)})"),
        ]
        for name, p in parameters.items()
        if name not in without
    }
    return TypedDict(f"{config.__name__}Options", options, total=False)  # type: ignore[operator]


def show(value: object) -> str:
    """Format a value as it is typed on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse_command(
    commands: Mapping[str, Callable[..., None]], description: str, args: Sequence[str] | None
) -> Callable[[], None]:
    """Return a command bound to its arguments; a mistake prints one line and exits with code 2."""

    def bind_later(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
        return wraps(command)(lambda *args, **options: partial(command, *args, **options))

    parsers, errors = {name: bind_later(command) for name, command in commands.items()}, io.StringIO()
    args = merge_repeated(sys.argv[1:] if args is None else args)
    try:
        options: dict[str, Any] = {"prog": "unet-denoiser", "description": description, "args": args}
        with redirect_stderr(errors), _paths():
            call: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(parsers, **options)
        return call
    except SystemExit as end:
        if end.code:
            print(f"unet-denoiser: error: {_shorten(errors.getvalue())}", file=sys.stderr)
        raise


def merge_repeated(args: Sequence[str]) -> list[str]:
    """Join the values of each option of LISTS, and warn of others that are given twice: the last one counts."""
    end = args.index("--") if "--" in args else len(args)
    parts: list[list[str]] = [[]]  # the first without an option, each other an option with its values
    for arg in args[:end]:
        parts += [[]] if re.match(r"--[A-Za-z]", arg) else []
        parts[-1].append(arg)
    merged: dict[str, list[str]] = {"": parts[0]}
    for i, part in enumerate(parts[1:]):
        option, given, value = part[0].partition("=")
        option = option.replace("_", "-")
        key = re.sub(r"^(--|.*\.)no-", r"\1", option)  # a flag and its opposite are one option
        values = [value, *part[1:]] if given else part[1:]
        if key in merged and option in LISTS:
            merged[key] += values
            continue
        if key in merged:
            if option not in APPENDED and part != merged[key]:
                both = f"{' '.join(merged[key])} and {' '.join(part)}"
                warnings.warn(f"{key} was given twice, as {both}; the last one counts", stacklevel=2)
            key = f"{key} {i}"
        merged[key] = part
    return [arg for part in merged.values() for arg in part] + list(args[end:])


def _paths() -> tyro.constructors.ConstructorRegistry:
    """Let tyro read a Path as `local_path` does."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def path_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
        if info.type is not Path:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda values: local_path(values[0]),
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _shorten(text: str) -> str:
    """Reduce tyro's error message to one line; it stands in a box, or between rules if the terminal has no box."""
    boxed = "╭" in text
    lines = [line.strip("│ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    sections = re.split(r"\n[─-]+\n", "\n".join(lines))
    message = " ".join((sections[0] if boxed else sections[min(1, len(sections) - 1)]).split())
    message = re.sub(r"no type matching .* could be instantiated from .*- <class '[\w.]+'>: ", "", message)
    similar = re.search(r"(?:similar to .*|you meant):\s+(--\S+)", text.replace("│", ""))
    helps = re.findall(r"unet-denoiser(?: \w+)? --help", text)
    hint = f"; {similar[1]} is near" if similar else ""
    return f"{message}{hint} (see {helps[-1] if helps else 'unet-denoiser --help'})"


if TYPE_CHECKING:
    DataOptions: TypeAlias = dict[str, Any]
    TrainingOptions: TypeAlias = dict[str, Any]
    ProcessOptions: TypeAlias = dict[str, Any]
    ModelOptions: TypeAlias = dict[str, Any]
    MemoryOptions: TypeAlias = dict[str, Any]
    SamplingOptions: TypeAlias = dict[str, Any]
    EditingOptions: TypeAlias = dict[str, Any]
    DistillationOptions: TypeAlias = dict[str, Any]
    ExportOptions: TypeAlias = dict[str, Any]
else:
    DataOptions = Annotated[make_options(DataConfig, without=("source",)), tyro.conf.OmitArgPrefixes]
    TrainingOptions = Annotated[make_options(TrainingConfig), tyro.conf.OmitArgPrefixes]
    ProcessOptions = make_options(DiffusionConfig)
    ModelOptions = make_options(UNetConfig, without=("conventions",))
    MemoryOptions = Annotated[make_options(MemoryConfig), tyro.conf.OmitArgPrefixes]
    SamplingOptions = Annotated[make_options(SamplingConfig), tyro.conf.OmitArgPrefixes]
    EditingOptions = Annotated[make_options(EditingConfig), tyro.conf.OmitArgPrefixes]
    DistillationOptions = Annotated[make_options(DistillationConfig), tyro.conf.OmitArgPrefixes]
    ExportOptions = Annotated[make_options(ExportConfig), tyro.conf.OmitArgPrefixes]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalSize = Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="INT [INT]", help_behavior_hint="")]
OptionalNumber = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalOrder = Annotated[QKVOrder | None, tyro.conf.arg(help_behavior_hint="")]
OptionalName = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
