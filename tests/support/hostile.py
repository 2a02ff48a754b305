"""Hostile files: each is opened by the command in a process of its own, which must end in one line, soon and small."""

import io
import json
import os
import pickle
import signal
import struct
import sys
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from unet_denoiser import load_data
from unet_denoiser.cli.app import main

MAX_BYTES, MAX_SECONDS = 2 * 2**30, 10
TERABYTE = 2**40


@dataclass(frozen=True)
class Outcome:
    name: str
    code: int
    said: str
    seconds: float
    peak: int  # bytes of memory
    ran: bool  # code of the file was run

    @property
    def is_refused(self) -> bool:
        """Return True if the file was refused in one line within the limits, and nothing in it was run."""
        errors = [line for line in self.said.splitlines() if line.startswith("unet-denoiser: error: ")]
        within = self.seconds <= MAX_SECONDS and self.peak <= MAX_BYTES
        return self.code == 2 and len(errors) == 1 and "Traceback" not in self.said and within and not self.ran


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.args


def make_files(folder: Path, marker: Path) -> Iterator[tuple[str, list[str]]]:
    """Write hostile files; yield the name of each and the command that opens it."""
    yield from make_pickles(folder, marker)
    yield from make_safetensors(folder)
    yield from make_arrays(folder)
    yield from make_images(folder)
    yield from make_json(folder)


def make_pickles(folder: Path, marker: Path) -> Iterator[tuple[str, list[str]]]:
    touch = f"touch {marker}"
    payloads = {
        "os.system": Call(os.system, touch),
        "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Call(exec, f"open({str(marker)!r}, 'w')"),
        "open": Call(open, str(marker), "w"),
        "nested": Call(dict, [("x", Call(os.system, touch))]),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
    }
    for name, payload in payloads.items():
        for kind, content in (
            ("alone", payload),
            ("beside tensors", {"state_dict": {"w": torch.ones(2)}, "x": payload}),
        ):
            for suffix in ("ckpt", "pt", "bin"):
                path = folder / f"{name} {kind}.{suffix}"
                if suffix == "ckpt":
                    path.write_bytes(pickle.dumps(content))
                else:
                    torch.save(content, path)
                yield path.name, ["convert", str(path), str(folder / "out")]
    huge = folder / "memo.pt"  # BINUNICODE8 that claims a terabyte
    huge.write_bytes(b"\x80\x04\x8d" + struct.pack("<Q", TERABYTE) + b"x" * 100)
    yield huge.name, ["convert", str(huge), str(folder / "out")]
    numbers = folder / "long.pt"  # LONG4 that claims two gigabytes of digits
    numbers.write_bytes(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\xff" * 100 + b".")
    yield numbers.name, ["convert", str(numbers), str(folder / "out")]
    deep = folder / "deep.pt"
    deep.write_bytes(b"\x80\x02" + b"(" * 1_000_000 + b"t" * 1_000_000 + b".")
    yield deep.name, ["convert", str(deep), str(folder / "out")]


def make_safetensors(folder: Path) -> Iterator[tuple[str, list[str]]]:
    def header(value: object, length: int | None = None, content: bytes = b"") -> bytes:
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + content

    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    files = {
        "terabyte header": header({}, TERABYTE),
        "terabyte tensor": header({"w": {"dtype": "F32", "shape": [TERABYTE // 4], "data_offsets": [0, TERABYTE]}}),
        "overlapping": header({"a": tensor, "b": tensor}, content=bytes(8)),
        "backwards": header({"a": tensor | {"data_offsets": [8, 0]}}, content=bytes(8)),
        "overflow": header({"a": tensor | {"shape": [2**62, 2**62, 16]}}, content=bytes(8)),
        "no JSON": header(b"{" * 1000),
        "deep": header(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        "300,000 tensors": header(
            {
                f"block.{i}.weight": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
                for i in range(300_000)
            },
            content=bytes(4 * 300_000),
        ),
        "long names": header({"x" * 50_000_000: tensor}, content=bytes(8)),
    }
    for name, content in files.items():
        path = folder / f"{name}.safetensors"
        path.write_bytes(content)
        yield path.name, ["convert", str(path), str(folder / "out")]
        model = folder / f"{name} model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
        (model / "diffusion_pytorch_model.safetensors").write_bytes(content)
        yield model.name, ["convert", str(model), str(folder / "out")]


def make_arrays(folder: Path) -> Iterator[tuple[str, list[str]]]:
    def npy(shape: tuple[int, ...], content: bytes = b"", descr: str = "|u1") -> bytes:
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        return file.getvalue() + content

    objects = io.BytesIO()
    np.save(objects, np.array([Call(os.system, "true")], object), allow_pickle=True)
    arrays = {
        "claims a terabyte": npy((TERABYTE // 1024, 16, 16, 4), bytes(100)),
        "claims more than 2^64": npy((2**40, 2**40, 16, 3)),
        "objects": objects.getvalue(),
        "negative": npy((-1, 8, 8, 3), bytes(1000)),
    }
    for name, content in arrays.items():
        path = folder / f"{name}.npy"
        path.write_bytes(content)
        yield path.name, ["train", str(path), "--out", str(folder / "run")]
        packed = folder / f"{name}.npz"
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("images.npy", content)
        yield packed.name, ["train", str(packed), "--out", str(folder / "run")]
    bomb = folder / "bomb.npz"
    with (
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as file,
    ):
        file.write(npy((5 * 2**30 // 192, 8, 8, 3)))
        for _ in range(64):  # 1 GiB of the 5 that the header claims
            file.write(bytes(2**24))
    yield bomb.name, ["train", str(bomb), "--out", str(folder / "run")]


def make_images(folder: Path) -> Iterator[tuple[str, list[str]]]:
    def png(width: int, height: int, data: bytes) -> bytes:
        def chunk(kind: bytes, content: bytes) -> bytes:
            return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

        start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    images = {
        "bomb.png": png(50_000, 50_000, zlib.compress(bytes(50_000_000))),
        "largest.png": png(2**31 - 1, 2**31 - 1, b""),
        "text.png": b"no image",
        "empty.jpg": b"",
    }
    for name, content in images.items():
        place = folder / f"folder of {name}"
        place.mkdir()
        (place / name).write_bytes(content)
        yield place.name, ["train", str(place), "--out", str(folder / "run")]


def make_json(folder: Path) -> Iterator[tuple[str, list[str]]]:
    texts = {
        "deep": '{"data": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "number": '{"data": ' + "9" * 10_000 + "}",
        "list": "[1]",
        "bytes": "\x00\x01",
        "surrogate": '{"data": {"source": "\\ud800"}, "model": {}, "process": {}, "training": {}}',
        "path": '{"data": {"source": "../../etc"}, "model": {}, "process": {}, "training": {}}',
    }
    for name, text in texts.items():
        run = folder / f"run of {name}"
        run.mkdir()
        (run / "config.json").write_text(text)
        yield run.name, ["train", "--resume", str(run)]
    place = folder / "metadata"
    place.mkdir()
    (place / "metadata.jsonl").write_text("[" * 100_000 + "\n")
    yield place.name, ["train", str(place), "--out", str(folder / "run")]


def open_in_process(name: str, command: list[str], marker: Path, log: Path) -> Outcome:
    """Run a command in a copy of this process; kill it after ten times the time that it may take."""
    marker.unlink(missing_ok=True)
    begun, shared = time.perf_counter(), resident_bytes()
    child = os.fork()
    if not child:
        code = 1
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest replaces them
            signal.alarm(10 * MAX_SECONDS)
            main(command)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, used = os.wait4(child, 0)
    seconds = time.perf_counter() - begun
    code, said = os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
    # the copy begins with the memory of this process, in which other tests may have left much
    peak = 1024 * used.ru_maxrss - shared
    return Outcome(name, code, said, seconds, peak, marker.exists())


def resident_bytes() -> int:
    """Return the memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(folder: Path) -> list[Outcome]:
    """Open all hostile files."""
    load_data("digits")  # imports what the processes then have
    marker, log = folder / "marker", folder / "log"
    return [open_in_process(name, command, marker, log) for name, command in make_files(folder, marker)]
