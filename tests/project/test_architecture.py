"""docs/development/architecture.md is the code's picture: every file, the import rule, and the places it names."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "unet_denoiser"
PAGE = (ROOT / "docs" / "development" / "architecture.md").read_text(encoding="utf-8")


def tree() -> dict[str, str]:
    """Return the files of the page's tree, from the package on, with what is said of each."""
    block = re.search(r"^```\nsrc/unet_denoiser/\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)[1]
    files, folders = {}, []
    for line in block.splitlines():
        indent, name, role = re.fullmatch(r"( +)(\S+) +(\S.*)", line).groups()
        folders = folders[: len(indent) // 2 - 1]
        if name.endswith("/"):
            folders.append(name)
        else:
            files["".join(folders) + name] = role
    return files


def defines(path: Path, name: str) -> bool:
    """Return True if a module defines a function, a class, a method (with its class) or a constant of this name."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return all(re.search(rf"^\s*(def|class) {part}\b|^{part}\b.* = ", text, re.MULTILINE) for part in name.split("."))


def test_the_tree_has_every_file_and_no_other():
    """But for the `__init__.py` of sub-packages, which only re-export."""
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert tree().keys() == {name for name in files if "/" not in name or not name.endswith("__init__.py")}


def test_the_import_rule_is_the_linters():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    assert "\n" + " > ".join(contracts[0]["layers"]) + "\n" in PAGE


def test_the_places_that_it_names_exist():
    places = re.findall(r"`([\w/]+\.py): ([\w.]+)`", PAGE)
    assert len(places) > 40
    assert not [f"{file}: {name}" for file, name in places if not defines(PACKAGE / file, name)]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w/]+/[\w]*(?:\.py)?)`", PAGE))))
def test_the_files_that_it_names_exist(path):
    assert any((base / path).exists() for base in (PACKAGE, ROOT))
