"""Measuring: time, floating-point operations, memory, fresh processes, the machine."""

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Call = Callable[[], Any]
STARTED = time.perf_counter()
PACKAGES = ("torch", "unet-denoiser", "diffusers", "guided_diffusion_sdk", "denoising-diffusion-pytorch")


def rotations(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Every name once per round, each round starting with another one."""
    for i in range(rounds):
        start = i % len(names)
        yield from [*names[start:], *names[:start]]


def fastest(
    calls: Mapping[str, Call], rounds: int, before: Callable[[str], object] = str, at_least: float = 0.3
) -> dict[str, float]:
    """Seconds of each call, the minimum over interleaved rounds; the caller has warmed them up.

    Args:
        before: called with the name ahead of each call, outside the time.
        at_least: seconds that a call shorter than that is repeated for, in each round.
    """
    best = dict.fromkeys(calls, float("inf"))
    gc.collect()
    gc.disable()
    try:
        for name in rotations(list(calls), rounds):
            spent = 0.0
            while spent < at_least:
                before(name)
                start = time.perf_counter()
                calls[name]()
                elapsed = time.perf_counter() - start
                best[name], spent = min(best[name], elapsed), spent + elapsed
    finally:
        gc.enable()
    return best


def gflop(call: Call) -> float:
    """10^9 floating-point operations of one call, a multiplication with an addition as two."""
    # FlopCounterMode does not know the CPU's fused attention; the plain one is matrix products, which it counts
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


@torch.inference_mode()
def machine_peak(seconds: float) -> dict[str, float]:
    """GFLOP/s of a float32 matrix product and of a convolution, each tried twice for so long: what to hope for."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    x, weight = torch.randn(16, 256, 32, 32), torch.randn(256, 256, 3, 3)
    x, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weight))
    calls: dict[str, Call] = {
        "matmul 2048^3": lambda: a @ b,
        "conv 3x3, 256 channels, 16x32x32": lambda: torch.conv2d(x, weight, padding=1),
    }
    work = {name: gflop(call) for name, call in calls.items()}
    return {name: work[name] / s for name, s in fastest(calls, 2, at_least=seconds).items()}


def retained(call: Call, model: nn.Module) -> int:
    """Bytes that a forward call keeps for the backward one: the distinct storages, the parameters' left out."""
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes up twice

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del out
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM the most since `reset_peak`, RssAnon without mapped files.

    Not getrusage's ru_maxrss: a child process starts with its parent's there, and it cannot be reset.
    """
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def reset_peak() -> int:
    """Give freed memory back to the system, start VmHWM anew, and return VmRSS."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def fresh(*arguments: str) -> dict[str, float]:
    """What `probe.py` measures with these arguments, in a new process."""
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    progress(" ".join(a for a in arguments if "/" not in a) + ":", found)
    return found


def fresh_rounds(arguments: Mapping[str, Sequence[str]], rounds: int) -> dict[str, dict[str, float]]:
    """The smallest figures of each name's `fresh` process over interleaved rounds."""
    best: dict[str, dict[str, float]] = {}
    for name in rotations(list(arguments), rounds):
        found = fresh(*arguments[name])
        best[name] = {key: min(value, best.get(name, found)[key]) for key, value in found.items()}
    return {name: best[name] for name in arguments}


def machine() -> dict[str, Any]:
    """Processor, vector instructions, threads, what else runs on it, and versions."""
    info = dict(line.split("\t:", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if "\t:" in line)
    info = {key.strip(): value.strip() for key, value in info.items()}
    flags = [flag for flag in info.get("flags", "").split() if flag == "avx2" or flag.startswith(("avx512", "amx"))]
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "processor": info.get("model name", platform.machine()),
        "flags": flags,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": versions,
    }


def describe(about: Mapping[str, Any], command: str) -> str:
    """The machine and the command in three lines."""
    flags = ", ".join(about["flags"]) or "neither avx2 nor avx512"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    processor = f"{about['processor']} ({flags}), {about['threads']} threads, load before {about['load']:.1f}"
    return f"{processor}\n{versions}\n`{command}`"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table with its columns aligned, the first to the left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return f"| {' | '.join([row[0].ljust(widths[0]), *cells[1:]])} |"

    rule = f"|{'|'.join(['-' * (widths[0] + 2), *('-' * (width + 1) + ':' for width in widths[1:])])}|"
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def progress(text: str, values: Mapping[str, float] | None = None) -> None:
    """Tell on stderr how far it is; stdout has the result alone."""
    figures = ", ".join(f"{name} {value:.3g}" for name, value in (values or {}).items())
    print(f"{time.perf_counter() - STARTED:5.0f} s  {text} {figures}", file=sys.stderr, flush=True)
