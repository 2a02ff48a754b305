"""What is installed: the wheel and the source distribution, alone, and the oldest versions that they admit."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

from support.documents import ROOT

PACKAGE = ROOT / "src" / "unet_denoiser"
DEVELOPMENT = [
    "pytest",
    "hypothesis",
    "mypy",
    "ruff",
    "hatchling",
    "importlinter",
    "peft",
    "tensorboard",
    "transformers",
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def build(source: Path, folder: Path, *kinds: str) -> Path:
    targets = [word for kind in kinds for word in ("--target", kind)]
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder), *targets]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return folder


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name.removeprefix("unet_denoiser/") for name in archive.namelist() if "dist-info" not in name}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("dist"), "wheel", "sdist")


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


def test_the_wheel_has_every_file_of_the_package(wheel):
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert files_of(wheel) == files
    assert {"py.typed", "models/layers/kernels.cpp"} < files


def test_the_source_distribution_builds_the_same_wheel(built, wheel, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(tmp_path.iterdir())
    again = next(build(source, tmp_path / "again", "wheel").glob("*.whl"))
    assert files_of(again) == files_of(wheel)
    assert (source / "tests" / "project" / "test_packages.py").is_file()


def test_the_wheel_trains_and_samples_without_development_tools(wheel, tmp_path):
    """Nor extras, but for that of the digits, nor a compiler on the path."""
    place = tmp_path / "installed"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(place), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
    code = f"""
import sys
sys.modules.update(dict.fromkeys({DEVELOPMENT}))
import unet_denoiser
assert unet_denoiser.__file__.startswith({str(place)!r}), unet_denoiser.__file__
from unet_denoiser.cli.app import main
main("train digits --out run --steps 1 --batch-size 2 --device cpu --model.model-channels 8".split())
main("sample run --num-images 1 --num-inference-steps 2 --device cpu".split())
"""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC", "CXX")}
    environment = kept | {"PYTHONPATH": str(place), "PATH": "", "UNET_DENOISER_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "run" / "samples.png").is_file()


def test_the_oldest_constraints_are_the_lower_bounds():
    """Of the dependencies and of the extras that the core of the tests needs (Makefile)."""
    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *(one for name in ("demo", "lora", "text") for one in extras[name])]
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", one).groups() for one in needed)
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert bounds.keys() == oldest.keys()
    for name, version in oldest.items():
        assert Version(version) == Version(bounds[name]), name
