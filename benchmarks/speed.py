"""Time and memory of this library beside diffusers, guided-diffusion and denoising-diffusion-pytorch.

Every side has the same network and weights in float32, and their outputs are compared before any is timed. All sides
take turns, and the fastest of all rounds counts.

Run: python benchmarks/speed.py [--quick] [--only MEASURE ...] [--json FILE]
"""

import argparse
import json
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from measure import (
    Call,
    count_gflop,
    measure_peak,
    measure_seconds,
    print_progress,
    read_machine,
    run_probe,
    run_probe_rounds,
    saved_bytes,
)
from probe import LOAD, STARTUP
from report import format_report
from sides import Network, list_sides, make_call, networks, read, save
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

MEASURES = ("forward", "train", "retained", "memory", "startup", "load")
MAX_ERROR = 1e-4
Row = dict[str, Any]


def compare(name: str, network: Network, options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Yield the rows of forward, train, retained and memory of one network, for all its sides."""
    folder.mkdir()
    source = save(network, folder)
    names = list_sides(network, options.compiled)
    eager = {side: read(network, side, source) for side in names if "compiled" not in side}
    models = {side: eager[side.replace(" compiled", "")] for side in names}
    peer = models[network.peer]
    about = {
        "network": name,
        "parameters": sum(p.numel() for p in peer.parameters()),
        "gflop": count_gflop(make_call(network, network.peer, peer, 1)),
    }
    for batch in options.batches if "forward" in options.only else []:
        yield from forward(network, models, batch, options, about)
    if {"train", "retained"} & set(options.only):
        yield from train(network, models, options, about)
    del models, eager, peer
    if "memory" in options.only and (name == options.networks[0] or not options.quick):
        # without the compiled ones: each would compile again, for minutes, in its new process
        yield from memory(name, [side for side in names if "compiled" not in side], source, options, about)


def check_training(name: str, network: Network, models: dict[str, nn.Module], batch: int) -> None:
    """End if the sides differ in dropout, or in the gradients' norm without dropout."""
    dropout = network.options.get("dropout", 0.0)
    if "ours" in models and models["ours"].config.dropout != dropout:
        raise SystemExit(f"{name}: dropout of ours is {models['ours'].config.dropout}, not {dropout}")
    norms = {}
    for side, model in models.items():
        make_call(network, side, model, batch)().square().mean().backward()
        norms[side] = get_total_norm(p.grad for p in model.parameters() if p.grad is not None).item()
        model.zero_grad(set_to_none=True)
    expected = norms[network.peer]
    check_errors(name, "the gradients' norm", {side: abs(norm / expected - 1) for side, norm in norms.items()})


def check_errors(name: str, what: str, errors: dict[str, float]) -> None:
    """Print relative errors, and end with a message if one is too large."""
    print_progress(f"{name}, differences of {what}:", errors)
    for side, error in errors.items():
        if not error <= MAX_ERROR:
            raise SystemExit(f"{name}: {what} of {side} differs by {error:.1e}, more than {MAX_ERROR:.0e}")


@torch.inference_mode()
def forward(
    network: Network, models: dict[str, nn.Module], batch: int, options: argparse.Namespace, about: Row
) -> list[Row]:
    """Measure a forward call in inference mode, after a check that all sides have the same output."""
    torch.compiler.reset()  # torch limits the compilations of one method, which all sides and batch sizes share
    calls = {side: make_call(network, side, model, batch) for side, model in models.items()}
    name, expected = about["network"], calls[network.peer]()
    about = about | {"measure": "forward", "batch": batch}
    failed = drop_failing(name, calls)
    errors = {side: relative_error(call(), expected) for side, call in calls.items()}
    check_errors(name, f"outputs at batch {batch}", errors)
    seconds = measure_seconds(calls, options.rounds)
    print_progress(f"{name}, forward, batch {batch}, seconds:", seconds)
    rows = [{"side": side, "seconds": seconds[side], "error": errors[side]} for side in calls]
    return [about | row for row in rows + failed]


def train(network: Network, models: dict[str, nn.Module], options: argparse.Namespace, about: Row) -> list[Row]:
    """Measure a forward and backward pass in training mode that starts without gradients, and the memory it saves."""
    torch.compiler.reset()
    name, batch = about["network"], options.train_batch
    check_training(name, network, {side: model for side, model in models.items() if "compiled" not in side}, batch)
    calls = {side: make_call(network, side, model.train(), batch) for side, model in models.items()}
    steps: dict[str, Call] = {side: lambda call=call: call().square().mean().backward() for side, call in calls.items()}
    failed = drop_failing(name, steps)
    rows: list[Row] = []
    if "retained" in options.only:
        kept = {side: saved_bytes(calls[side], models[side]) for side in steps}
        rows += [{"measure": "retained", "side": side, "bytes": value} for side, value in kept.items()]
        print_progress(f"{name}, kept for backward, bytes:", kept)
    if "train" in options.only:
        seconds = measure_seconds(steps, options.rounds, before=lambda side: models[side].zero_grad(set_to_none=True))
        rows += [{"measure": "train", "side": side, "seconds": value} for side, value in seconds.items()]
        rows += [{"measure": "train"} | row for row in failed]
        print_progress(f"{name}, training step, seconds:", seconds)
    return [about | {"batch": batch} | row for row in rows]


def drop_failing(name: str, calls: dict[str, Call]) -> list[Row]:
    """Compile each by a call; remove those that torch cannot compile from `calls`, and return their rows."""
    failed = {}
    for side, call in calls.items():
        try:
            call()
        except Exception as error:
            if "compiled" not in side:
                raise
            failed[side] = str(error).strip().splitlines()[0]
            print_progress(f"{name}, {side} fails: {failed[side]}")
    for side in failed:
        del calls[side]
    return [{"side": side, "failed": reason} for side, reason in failed.items()]


def memory(name: str, names: list[str], source: Path, options: argparse.Namespace, about: Row) -> Iterator[Row]:
    """Measure the resident memory of a training step, each side in a new process."""
    rest = (str(source), str(options.train_batch), "quick" if options.quick else "full")
    for side in names:
        found = run_probe("step", name, side, *rest)
        yield about | {"measure": "memory", "side": side, "batch": options.train_batch, "bytes": found["peak"]}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def startup(options: argparse.Namespace) -> list[Row]:
    """Measure import and construction, each side in new processes."""
    found = run_probe_rounds({side: ("startup", side) for side in STARTUP}, options.rounds)
    return [{"measure": "startup", "side": side} | figures for side, figures in found.items()]


def load(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Measure construction with the weights of a file in the page cache, each side in new processes."""
    widths = (64, 128, 256, 256) if options.quick else (320, 640, 1280, 1280)
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(block_out_channels=widths, cross_attention_dim=768, attention_head_dim=8)
    parameters = sum(p.numel() for p in model.parameters())
    model.save_pretrained(folder)
    del model
    (file,) = folder.glob("*.safetensors")
    with file.open("rb") as stream:
        while stream.read(2**24):
            pass
    found = run_probe_rounds({side: ("load", side, str(folder)) for side in LOAD}, options.rounds)
    about = {"measure": "load", "parameters": parameters, "file": file.stat().st_size}
    return [about | {"side": side} | figures for side, figures in found.items()]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; --quick changes the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=MEASURES, default=MEASURES, metavar="MEASURE", help=", ".join(MEASURES)
    )
    parser.add_argument(
        "--networks", nargs="+", choices=networks(False), default=list(networks(False)), metavar="NETWORK"
    )
    parser.add_argument("--batches", nargs="+", type=int, help="of the forward call (default: 1 4 16)")
    parser.add_argument("--train-batch", type=int, help="of the training step (default: 16)")
    parser.add_argument("--rounds", type=int, help="measurements of every side, in turn (default: 4)")
    parser.add_argument(
        "--compiled", action="store_true", help="also through torch.compile: minutes more for each side and batch size"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small networks, batch 1, one round; memory of one network"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to this file")
    options = parser.parse_args()
    full = {"batches": [1, 4, 16], "train_batch": 16, "rounds": 4}
    quick = {"batches": [1], "train_batch": 1, "rounds": 1}
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the finally clause prints what is measured by then
    peak_seconds = 0.3 if options.quick else 1.5
    report: Row = {
        "machine": read_machine(),
        "command": f"python {shlex.join(sys.argv)}",
        "peak": measure_peak(peak_seconds),
        "rows": [],
    }
    rows = report["rows"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            # torch.compile's cache may hold half-written files of a run that was stopped
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/compiled")
            for name in options.networks if {"forward", "train", "retained", "memory"} & set(options.only) else []:
                for row in compare(name, networks(options.quick)[name], options, Path(folder, name)):
                    rows.append(row)  # one by one, so that those before an error are printed
            if "startup" in options.only:
                rows += startup(options)
            if "load" in options.only:
                rows += load(options, Path(folder, "load"))
        again = measure_peak(peak_seconds)
        report["peak"] = {name: max(value, again[name]) for name, value in report["peak"].items()}
    finally:
        print(format_report(report))
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
