"""The page of the command line is what the command has."""

import re
import runpy
from pathlib import Path

import pytest

from unet_denoiser.cli.app import COMMANDS, main
from unet_denoiser.cli.options import LISTS, merge_repeated
from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.training import TrainingConfig

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
PAGE = (REFERENCE / "cli.md").read_text(encoding="utf-8")


def test_the_page_is_in_step():
    """docs/reference/cli.md is what docs/reference/cli.py writes."""
    assert runpy.run_path(str(REFERENCE / "cli.py"))["page"]() == PAGE


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_has_all_options_of_help(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = set(re.findall(r"^│? {1,2}(--[a-z][\w.-]*)", capsys.readouterr().out, flags=re.MULTILINE))
    assert len(options) > 1
    section = re.search(rf"^## {command}\n.*?(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)[0]
    for title in re.findall(r"^Also the options of \[`(\w+)`\]", section, flags=re.MULTILINE):
        section += re.search(rf"^### \w+: {title}\n.*?(?=^## |^### |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)[0]
    assert set(re.findall(r"^\| `(--[a-z][\w.-]*)", section, flags=re.MULTILINE)) == options


@pytest.mark.parametrize(
    ("given", "merged"),
    [
        ("sample r --class A --class B", "sample r --class A B"),
        ("sample r --class=A --steps 3 --class=B C", "sample r --class=A B C --steps 3"),
        ("sample --class A --class B r", "sample --class A B r"),
        ("train d --vector_columns a --vector-columns b", "train d --vector_columns a b"),
        ("sample r --caption a --caption a", "sample r --caption a --caption a"),
        ("sample r -- --class --class", "sample r -- --class --class"),
        ("train d --seed -5 --steps 2", "train d --seed -5 --steps 2"),
    ],
)
def test_values_of_a_repeated_list_are_joined(given, merged):
    assert merge_repeated(given.split()) == merged.split()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("train d --steps 1 --steps=2", "--steps was given twice, as --steps 1 and --steps=2; the last one counts"),
        ("train d --model.image-size 8 --model.image_size 16", "--model.image-size was given twice"),
        ("train d --cache-images --no-cache-images", "--cache-images was given twice"),
        ("train --steps 1 d --steps 2", "--steps was given twice"),
    ],
)
def test_other_options_that_are_given_twice_are_named(given, message):
    with pytest.warns(UserWarning, match=message):
        assert merge_repeated(given.split()) == given.split()


def test_options_of_names_are_lists():
    fields = [*DataConfig.__dataclass_fields__.values(), *TrainingConfig.__dataclass_fields__.values()]
    names = {"--" + field.name.replace("_", "-") for field in fields if "tuple[str, ...]" in str(field.type)}
    assert {*names, "--class"} == set(LISTS)
