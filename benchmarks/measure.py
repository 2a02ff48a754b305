"""Measurements for the other scripts: time, floating-point operations, memory, new processes, the machine."""

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import shlex
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
START_SECONDS = time.perf_counter()
# the vector instructions that torch's kernels choose between, and variables that hide some of them
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")
PACKAGES = ("torch", "unet-denoiser", "diffusers", "guided_diffusion_sdk", "denoising-diffusion-pytorch")


def rotate(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield every name once per round; each round starts with another name."""
    for i in range(rounds):
        start = i % len(names)
        yield from [*names[start:], *names[:start]]


def measure_seconds(
    calls: Mapping[str, Call], rounds: int, before: Callable[[str], object] = str, min_seconds: float = 0.3
) -> dict[str, float]:
    """Measure the seconds of each call: the minimum over interleaved rounds. The caller has warmed the calls up.

    Args:
        before: called with the name ahead of each call, outside the time.
        min_seconds: a shorter call is repeated for this long in each round.
    """
    best = dict.fromkeys(calls, float("inf"))
    gc.collect()
    gc.disable()
    try:
        for name in rotate(list(calls), rounds):
            total = 0.0
            while total < min_seconds:
                before(name)
                start = time.perf_counter()
                calls[name]()
                elapsed = time.perf_counter() - start
                best[name], total = min(best[name], elapsed), total + elapsed
    finally:
        gc.enable()
    return best


def count_gflop(call: Call) -> float:
    """Count the 10^9 floating-point operations of a call; a multiplication with an addition is two."""
    # FlopCounterMode does not know the CPU's fused attention; the plain one is matrix products, which it counts
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


@torch.inference_mode()
def measure_peak(seconds: float, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Measure the machine's GFLOP/s in a matrix product and a convolution, each in two rounds of `seconds`."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    x, weight = torch.randn(16, 256, 32, 32).to(dtype), torch.randn(256, 256, 3, 3).to(dtype)
    x, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weight))
    calls: dict[str, Call] = {
        "matmul 2048^3": lambda: a @ b,
        "conv 3x3, 256 channels, 16x32x32": lambda: torch.conv2d(x, weight, padding=1),
    }
    gflop = {name: count_gflop(call) for name, call in calls.items()}
    return {name: gflop[name] / s for name, s in measure_seconds(calls, 2, min_seconds=seconds).items()}


def saved_bytes(call: Call, model: nn.Module) -> int:
    """Return the bytes that a forward call saves for the backward call: all storages but those of the parameters."""
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address comes up twice

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del out
    return sum(storage.nbytes() for address, storage in storages.items() if address not in parameters)


def resident_bytes(field: str = "VmRSS") -> int:
    """Return the memory of this process: VmRSS now, VmHWM the peak since `reset_peak`, RssAnon without mapped files.

    getrusage's ru_maxrss would not do: a child process starts with its parent's, and it cannot be reset.
    """
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def reset_peak() -> int:
    """Return freed memory to the system, reset VmHWM, and return VmRSS."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()


def run_probe(*arguments: str) -> dict[str, float]:
    """Run `probe.py` with these arguments in a new process, and return its measurements."""
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print_progress(" ".join(a for a in arguments if "/" not in a) + ":", found)
    return found


def run_probe_rounds(arguments: Mapping[str, Sequence[str]], rounds: int) -> dict[str, dict[str, float]]:
    """Run `probe.py` for each name in interleaved rounds, and return the minimum of each measurement."""
    best: dict[str, dict[str, float]] = {}
    for name in rotate(list(arguments), rounds):
        found = run_probe(*arguments[name])
        best[name] = {key: min(value, best.get(name, found)[key]) for key, value in found.items()}
    return {name: best[name] for name in arguments}


def read_machine() -> dict[str, Any]:
    """Return processor, vector instructions, threads, load by other processes, and versions."""
    info = dict(line.split("\t:", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if "\t:" in line)
    info = {key.strip(): value.strip() for key, value in info.items()}
    flags = [flag for flag in info.get("flags", "").split() if flag in FLAGS]
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


def read_command() -> str:
    """Return the command line of this process, with the variables that choose its kernels and threads."""
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return " ".join([*variables, "python", shlex.join(sys.argv)])


def format_machine(machine: Mapping[str, Any], command: str) -> str:
    """Return the machine and the command in three lines."""
    flags = ", ".join(machine["flags"]) or "neither avx2 nor avx512"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    processor = f"{machine['processor']} ({flags}), {machine['threads']} threads, load before {machine['load']:.1f}"
    return f"{processor}\n{versions}\n`{command}`"


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table with aligned columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return f"| {' | '.join([row[0].ljust(widths[0]), *cells[1:]])} |"

    rule = f"|{'|'.join(['-' * (widths[0] + 2), *('-' * (width + 1) + ':' for width in widths[1:])])}|"
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def print_progress(text: str, values: Mapping[str, float] | None = None) -> None:
    """Print the seconds since the start and some values to stderr; stdout has the result alone."""
    listed = ", ".join(f"{name} {value:.3g}" for name, value in (values or {}).items())
    print(f"{time.perf_counter() - START_SECONDS:5.0f} s  {text} {listed}", file=sys.stderr, flush=True)
