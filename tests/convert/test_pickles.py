"""Files of torch.save: read without importing or running anything, whatever objects they hold."""

import argparse
import builtins
import collections
import functools
import io
import operator
import os
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from unet_denoiser.convert.pickles import Inert, describe_object, read_pickle

WEIGHTS = {"a": torch.arange(3.0)}


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def make_class(name, base, monkeypatch):
    """A class of a module that can be found while the file is written only."""
    module, _, leaf = name.rpartition(".")
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        part = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, part, sys.modules.get(part) or types.ModuleType(part))
    cls = type(leaf, (base,), {"__module__": module})
    setattr(sys.modules[module], leaf, cls)
    return cls


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_training_frameworks_are_read(zipped, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        callback = make_class("pytorch_lightning_x.callbacks.ModelCheckpoint", object, patch)
        attributes = make_class("pytorch_lightning_x.parsing.AttributeDict", dict, patch)
        listed = make_class("omegaconf_x.ListConfig", list, patch)
        config = make_class("omegaconf_x.DictConfig", object, patch)()
        config._content = {"a": callback()}
        options = attributes(lr=1e-4, inner=attributes(a=1))
        options.note = 3
        content = {
            "state_dict": WEIGHTS,
            "callbacks": {callback: {"score": torch.tensor(1.0), "best": np.float64(0.5)}},
            "hyper_parameters": options,
            "config": config,
            "list": listed([1, 2]),
            "args": argparse.Namespace(path=pathlib.PurePosixPath("/x")),
            "counts": collections.defaultdict(list, {"a": [1]}),
            "queue": collections.deque([1, 2], maxlen=3),
            "numpy": (np.arange(5), np.dtype("f4"), np.random.get_state()),
            "others": (slice(1, 2), range(3), {1, 2}, frozenset([1]), 1j, 10**30, b"x", torch.device("cpu")),
        }
        torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    imported = set(sys.modules)
    found = read_pickle(tmp_path / "m.ckpt")
    assert {name for name in set(sys.modules) - imported if not name.startswith("encodings")} == set()
    assert torch.equal(found["state_dict"]["a"], WEIGHTS["a"])
    assert found["hyper_parameters"]["inner"] == {"a": 1}
    assert found["list"] == [1, 2]
    assert found["counts"] == {"a": [1]}
    assert describe_object(found["config"]) == "omegaconf_x.DictConfig"
    assert vars(found["config"]) == {}
    assert describe_object(found["args"]) == "argparse.Namespace"


def test_a_whole_network_is_an_inert_object(tmp_path):
    torch.save({"ema": torch.nn.Linear(2, 2)}, tmp_path / "m.pkl")
    found = read_pickle(tmp_path / "m.pkl")["ema"]
    assert isinstance(found, Inert)
    assert describe_object(found) == "torch.nn.modules.linear.Linear"


HOSTILE = {
    "mkdir": lambda path: Call(os.mkdir, path),
    "system": lambda path: Call(os.system, f"mkdir {path}"),
    "eval": lambda path: Call(eval, f"__import__('os').mkdir({path!r})"),
    "exec": lambda path: Call(exec, f"__import__('os').mkdir({path!r})"),
    "import": lambda path: Call(builtins.__import__, "antigravity"),
    "Popen": lambda path: Call(subprocess.Popen, ["mkdir", path]),
    "check_output": lambda path: Call(subprocess.check_output, ["mkdir", path]),
    "open": lambda path: Call(io.open, path, "w"),
    "partial": lambda path: Call(functools.partial, os.mkdir, path),
    "methodcaller": lambda path: Call(operator.methodcaller, "mkdir"),
    "bytearray": lambda path: Call(bytearray, 10**12),
    "tensor": lambda path: Call(torch.Tensor, 10**14),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused(kind, zipped, tmp_path):
    content = {"model": WEIGHTS, "x": [HOSTILE[kind](str(tmp_path / "owned"))]}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"m\.pt (holds more than tensors.*would run|is not a readable)") as caught:
        read_pickle(tmp_path / "m.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "call",
    [
        lambda path: Call(functools.partial, pathlib.Path.mkdir, pathlib.Path(path)),
        lambda path: Call(getattr, pathlib.Path(path), "mkdir"),
        lambda path: Call(map, print, [1]),
        lambda path: Call(np.save, path, 1),
        lambda path: Call(torch.save, 1, path),
    ],
)
def test_other_functions_do_nothing(call, tmp_path):
    torch.save({"model": WEIGHTS, "x": call(str(tmp_path / "owned"))}, tmp_path / "m.pt")
    assert torch.equal(read_pickle(tmp_path / "m.pt")["model"]["a"], WEIGHTS["a"])
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02",
        b"\x80\x02" + b"(" * 1_000_000 + b"l" * 10,
        b"\x80\x02" + b"".join(b"cmod\nname%d\n" % i for i in range(10_000)) + b"t.",
        b"\x80\x02\x8b\xff\xff\xff\x7f",
        b"\x80\x02X\xff\xff\xff\xff",
        b"PK\x03\x04" + bytes(100),
        pickle.dumps({"a": 1}),
    ],
)
def test_damaged_files_are_one_line(content, tmp_path):
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.pt is not a readable checkpoint") as caught:
        read_pickle(tmp_path / "m.pt")
    assert "\n" not in str(caught.value)


def test_other_archives_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50 * 2**20))
    np.savez(tmp_path / "a.npz", a=np.zeros(2))
    with zipfile.ZipFile(tmp_path / "any.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    for name, message in {"bomb.pt": "its parts are compressed", "a.npz": "a NumPy", "any.zip": "a zip"}.items():
        with pytest.raises(ValueError, match=f"{name} is .*{message}"):
            read_pickle(tmp_path / name)


def test_the_name_of_the_file_does_not_matter(tmp_path):
    torch.save(WEIGHTS, tmp_path / "m.safetensors")
    assert torch.equal(read_pickle(tmp_path / "m.safetensors")["a"], WEIGHTS["a"])
