"""Safetensors files: any damage is noticed; a file is told by its first bytes; hostile headers are refused at once."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unet_denoiser.utils.tensor_files import read_safetensors, recognize_file, write_safetensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(5, dtype=torch.float16)}


@pytest.fixture
def path(tmp_path):
    write_safetensors(tmp_path / "t.safetensors", TENSORS, {"note": "x"})
    return tmp_path / "t.safetensors"


def test_round_trip_with_metadata_that_others_read(path):
    found = read_safetensors(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert load_file(path).keys() == TENSORS.keys()
    with safe_open(path, "pt") as file:
        assert file.metadata().items() >= {"format": "pt", "note": "x"}.items()


def test_every_changed_bit_is_one_line(path):
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in (0, 3, 5):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"t\.safetensors (is damaged|is not a readable)") as caught:
                read_safetensors(path)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:40], lambda b: b""])
def test_a_cut_or_longer_file_is_refused(path, change):
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"t\.safetensors (is damaged|is not a readable)"):
        read_safetensors(path)


def test_a_digest_covers_chunks_in_any_number(tmp_path):
    path = tmp_path / "large.safetensors"
    write_safetensors(path, {"a": torch.zeros(3 * 2**20)})  # three chunks
    with path.open("r+b") as file:
        file.seek(-7, 2)
        file.write(b"\1")
    with pytest.raises(ValueError, match="is damaged: its contents do not match its digest"):
        read_safetensors(path)


def test_files_without_a_digest_are_read(tmp_path):
    save_file(TENSORS, tmp_path / "old.safetensors")
    write_safetensors(tmp_path / "theirs.safetensors", TENSORS, digest=False)
    for name in ("old", "theirs"):
        assert read_safetensors(tmp_path / f"{name}.safetensors").keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of git-lfs"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"<HTML>", "a web page"),
        (b"GGUF\3\0\0\0", "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x89PNG\r\n", "a PNG"),
        (b"\x08\x07\x12\x07pytorch", "an ONNX file"),
        (b"\x81\xa6params", "a msgpack file"),
        (b"\x1f\x8b\x08", "a gzip archive"),
        (b'{"a": 1}', "a JSON text"),
        (b"a" * 257 + b"ustar", "a tar archive"),
        ((10**6).to_bytes(8, "little") + b'{"a":', "a safetensors file that is cut off"),
        (b"something", "something else"),
    ],
)
def test_what_a_file_is_whatever_its_name(content, words, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    kind = recognize_file(path)
    assert kind.container == "other"
    assert kind.words.startswith(words)
    with pytest.raises(ValueError, match=f"is not a readable safetensors file: it is {words}"):
        read_safetensors(path)


@pytest.mark.parametrize(
    "header",
    [
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(60_000)},
        {"__metadata__": {f"k{i}": "" for i in range(300_000)}},
        {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
        {f"t{i}": {"dtype": "F32", "shape": [2], "data_offsets": [i, i + 8]} for i in (0, 4)},
        "x" * 1_000_000,
    ],
)
def test_hostile_headers_are_refused_in_one_short_line(header, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "h.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    with pytest.raises(ValueError, match=r"h\.safetensors (has a header of|is not a readable)") as caught:
        read_safetensors(tmp_path / "h.safetensors")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
