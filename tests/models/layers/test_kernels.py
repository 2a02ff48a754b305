"""Compiling kernels.cpp: kept on disk, for one processor, and no error without a compiler."""

import shutil
import stat

import pytest
import torch

from unet_denoiser.models.layers import kernels, weight_cache


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "cache"))
    kernels.load_kernels.cache_clear()
    yield
    monkeypatch.undo()
    kernels.load_kernels.cache_clear()


def write_compiler(path, command):
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


@pytest.mark.parametrize("command", ["exit 1", "touch broken", "exec true"])
def test_a_compiler_that_fails_is_no_error(monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)  # "touch" makes its file there
    monkeypatch.setenv("CXX", write_compiler(tmp_path / "c++", command))
    assert kernels.load_kernels() is None
    assert not list(tmp_path.glob("cache/*"))


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernels.load_kernels() is None


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="so the cache is a temporary directory"):
        library = kernels.load_kernels()
    assert library is None or not list(tmp_path.glob("cache/*"))


def test_a_compiler_may_have_arguments(monkeypatch):
    compiler = next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None or kernels.load_kernels() is None:
        pytest.skip("needs a C++ compiler")
    kernels.load_kernels.cache_clear()
    monkeypatch.setenv("CXX", f"env {compiler}")
    assert kernels.load_kernels() is not None


def test_compiled_once(monkeypatch, tmp_path):
    if kernels.load_kernels() is None:
        pytest.skip("needs a C++ compiler")
    (library,) = tmp_path.glob("cache/*")
    kernels.load_kernels.cache_clear()
    monkeypatch.setattr(kernels.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert kernels.load_kernels() is not None
    monkeypatch.setattr(kernels, "_read_processor", lambda: "another one")
    assert kernels._fingerprint("g++") not in library.name


@pytest.mark.parametrize(("dtype", "compiled"), [(torch.float32, True), (torch.bfloat16, True), (torch.float32, False)])
def test_a_digest_changes_with_every_value(monkeypatch, dtype, compiled):
    if not compiled:
        monkeypatch.setattr(weight_cache, "load_kernels", lambda: None)
    weight = torch.randn(5, 7, 3, 3, dtype=dtype)
    before, seen = weight_cache.digest_of(weight), set()
    for i in range(weight.numel()):
        changed = weight.clone()
        changed.view(-1)[i] *= 1.02
        seen.add(weight_cache.digest_of(changed))
    assert before not in seen
    assert len(seen) == weight.numel() or not compiled
    assert weight_cache.digest_of(weight.clone()) == before
