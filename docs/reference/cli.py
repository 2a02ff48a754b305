"""Writes docs/reference/cli.md: each sub-command of `unet-denoiser` and its options, read from the command itself."""

import inspect
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

import tyro
from docstring_parser import parse

from unet_denoiser.cli.app import COMMANDS
from unet_denoiser.cli.options import show

HEAD = """# Command line

`unet-denoiser COMMAND --help` prints the same options. `python docs/reference/cli.py` writes this page; a test keeps it
in step with the command.

- A switch `--name` is turned off with `--no-name`.
- `--name INT ...` takes several values, as in `--image-size 32 48`.
- An empty default means that the option is not set.
- `UNET_DENOISER_CACHE` names the directory for scans, encoded captions, latents, features and compiled CPU kernels. The
  default is `~/.cache/unet-denoiser`.

| exit code | meaning |
|---|---|
| 0 | The command has done its work. |
| 1 | Training has stopped, because its losses or gradients were not finite. |
| 2 | An option or a file is wrong, or the memory is too small. One line says what to change. |
| 130, 143 | SIGINT (Ctrl-C) or SIGTERM has stopped the command. |

| command | what it does |
|---|---|
"""
METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
CODE = re.compile(r'"([^" ]+)"|(?<![`\w])(--[a-z][\w.*-]*[\w*])')  # values in quotes, and options


def page() -> str:
    """Return the whole document."""
    parts, first_use = [HEAD], {}
    for name, command in COMMANDS.items():
        doc, (rows, groups) = parse(inspect.getdoc(command) or ""), options(command)
        short, long = code(doc.short_description or ""), code(doc.long_description or "")
        parts[0] += f"| [`{name}`](#{name}) | {short} |\n"
        parts += [f"## {name}", f"`{usage(name, rows)}`", short, long, table(rows)]
        for prefix, group in groups:
            title = group.__name__.removesuffix("Options")
            if title in first_use:
                parts.append(f"Also the options of [`{title}`](#{first_use[title]}-{title.lower()}), above.")
                continue
            first_use[title] = name
            hints = get_type_hints(group, include_extras=True)
            parts += [f"### {name}: {title}", table([row(prefix + field, hint) for field, hint in hints.items()])]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def options(command: Any) -> tuple[list[tuple[str, ...]], list[tuple[str, Any]]]:
    """Return the rows of a command's own options, and its groups of options from configurations, by prefix."""
    words = {p.arg_name: p.description or "" for p in parse(inspect.getdoc(command) or "").params}
    hints, rows, groups = get_type_hints(command, include_extras=True), [], []
    for name, parameter in inspect.signature(command).parameters.items():
        group = get_args(hints[name])[0] if get_args(hints[name]) else hints[name]
        if is_typeddict(group):
            groups.append(("" if tyro.conf.OmitArgPrefixes in markers(hints[name]) else f"{name}.", group))
        else:
            rows.append(row(name, hints[name], words[name], parameter.default))
    return rows, groups


def markers(hint: Any) -> tuple[Any, ...]:
    """Return what `Annotated` adds to a type."""
    return getattr(hint, "__metadata__", ())


def row(name: str, hint: Any, meaning: str = "", default: Any = None) -> tuple[str, ...]:
    """Return an option's cells: as it is typed, its default, its meaning."""
    told: dict[str, str] = {}
    for marker in markers(hint):
        told |= {key: value for key, value in getattr(marker, "__dict__", {}).items() if value}
    meaning = " ".join((meaning or told.get("help", "")).split())
    given = re.search(r"\(default: ((?:[^()]|\([^()]*\))*)\)", f"{meaning} {told.get('help_behavior_hint', '')}")
    shown = given[1] if given else "required" if default is inspect.Parameter.empty else show(default)
    meaning = meaning.replace(f" {given[0]}", "") if given else meaning
    shown = {"None": "", "()": "", "True": "on", "False": "off"}.get(shown, shown)
    kind = get_args(hint)[0] if markers(hint) else hint
    value = told.get("metavar") or metavar(kind)
    is_option = tyro.conf.Positional not in markers(hint)
    typed = f"--{told.get('name', name).replace('_', '-')} {value}".strip() if is_option else value
    return tuple(cell.replace("|", "\\|") for cell in (f"`{typed}`", code(shown), sentences(meaning, literals(kind))))


def sentences(text: str, choices: list[str]) -> str:
    """Return a docstring's words as sentences, and the valid values where it does not name them all."""
    words = (text if text[1:2] in ("", ",") else text[:1].upper() + text[1:]).rstrip(".") + "."
    if any(f'"{choice}"' not in text for choice in choices):
        words += " One of " + ", ".join(f'"{choice}"' for choice in choices) + "."
    return code(words)


def code(text: str) -> str:
    """Mark values in quotes and options as code."""
    return CODE.sub(lambda found: f"`{found[1] or found[2]}`", text)


def literals(kind: Any) -> list[str]:
    """Return the values that a type lists, itself or as one of several types."""
    if get_origin(kind) is Literal:
        return [value for value in get_args(kind) if isinstance(value, str)]
    return [value for part in get_args(kind) for value in literals(part)]


def metavar(kind: Any) -> str:
    """Return what stands for the value of an option on its command line."""
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        return f"{metavar(parts[0]) or 'BOOL'} ..." if parts[-1] is Ellipsis else " ".join(map(metavar, parts))
    if get_origin(kind) is Literal:
        return "INT" if isinstance(get_args(kind)[0], int) else "NAME"
    several = [metavar(part) for part in get_args(kind) if part is not type(None)]
    return several[-1] if several else METAVARS.get(kind, "")


def usage(name: str, rows: list[tuple[str, ...]]) -> str:
    """Return how a command is called: its positional arguments, in brackets where they may be left out."""
    places = [(typed.strip("`"), default) for typed, default, _ in rows if not typed.startswith("`--")]
    return " ".join(["unet-denoiser", name, *(p if d == "required" else f"[{p}]" for p, d in places), "[OPTIONS]"])


def table(rows: list[tuple[str, ...]]) -> str:
    """Return the rows under their heads."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [("option", "default", "meaning"), ("---",) * 3, *rows])


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
