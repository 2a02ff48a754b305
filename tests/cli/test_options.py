"""The page of the command line is what the command has."""

import re
import runpy
from pathlib import Path

import pytest

from unet_denoiser.cli.app import COMMANDS, main

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
    assert len(options) > 2
    section = re.search(rf"^## {command}\n.*?(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)[0]
    for title in re.findall(r"^Also the options of \[`(\w+)`\]", section, flags=re.MULTILINE):
        section += re.search(rf"^### \w+: {title}\n.*?(?=^## |^### |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)[0]
    assert set(re.findall(r"^\| `(--[a-z][\w.-]*)", section, flags=re.MULTILINE)) == options
