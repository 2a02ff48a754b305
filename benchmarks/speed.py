"""Time and memory of this library beside diffusers, guided-diffusion and denoising-diffusion-pytorch.

Every side has the same network and weights, and their outputs are compared before any is timed. All sides take turns,
and the fastest of all rounds counts. In bfloat16, forward calls have weights and inputs in bfloat16, and training steps
are under autocast with weights in float32.

Run: python benchmarks/speed.py [--quick] [--precision PRECISION ...] [--only MEASURE ...] [--json FILE]
     python benchmarks/speed.py --sweep [--minutes 30]   # small networks of many widths, sizes and batches
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from checks import find_wrong, gradient_errors, gradient_norm, relative_error
from measure import (
    Call,
    count_gflop,
    measure_peak,
    measure_seconds,
    print_progress,
    read_command,
    read_machine,
    run_probe,
    run_probe_rounds,
    saved_bytes,
)
from probe import LOAD, STARTUP
from report import format_report, format_sweep
from sides import PRECISIONS, Network, as_sampled, autocast, list_sides, make_call, make_step, networks, read, save
from sweep import sweep
from torch import Tensor, nn

MEASURES = ("forward", "train", "retained", "memory", "startup", "load")
Row = dict[str, Any]


def compare(name: str, network: Network, options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Yield the rows of forward, train, retained and memory of one network, for all its sides and precisions."""
    folder.mkdir()
    source = save(network, folder)
    names = list_sides(network, options.compiled)
    eager = [side for side in names if "compiled" not in side]
    full = {side: read(network, side, source) for side in eager}
    peer = full[network.peer]
    about = {
        "network": name,
        "parameters": sum(p.numel() for p in peer.parameters()),
        "gflop": count_gflop(make_call(network, network.peer, peer, 1)),
    }
    for precision in options.precision:
        about["precision"] = precision
        if "forward" in options.only and (precision == "float32" or network.bfloat16):
            weights = (
                full if precision == "float32" else {side: read(network, side, source, precision) for side in eager}
            )
            models = {side: weights[side.replace(" compiled", "")] for side in names}
            for batch in options.batches:
                with torch.inference_mode():
                    expected = make_call(network, network.peer, peer, batch)()
                yield from forward(network, models, expected, options, about | {"batch": batch})
            del weights, models
        if {"train", "retained"} & set(options.only):
            models = {side: full[side.replace(" compiled", "")] for side in names}
            yield from train(network, models, options, about | {"batch": options.train_batch})
    del full, peer
    if "memory" in options.only and (name == options.networks[0] or not options.quick):
        # without the compiled ones: each would compile again, for minutes, in its new process
        for precision in options.precision:
            yield from memory(eager, source, options, about | {"precision": precision, "batch": options.train_batch})


def check_training(network: Network, models: dict[str, nn.Module], about: Row) -> None:
    """End if the sides differ in dropout, or in the gradients' norm without dropout from the peer in float32."""
    name, batch, precision = about["network"], about["batch"], about["precision"]
    dropout = network.options.get("dropout", 0.0)
    if "ours" in models and models["ours"].config.dropout != dropout:
        raise SystemExit(f"{name}: dropout of ours is {models['ours'].config.dropout}, not {dropout}")
    calls = {side: make_call(network, side, model.eval(), batch) for side, model in models.items()}
    expected = gradient_norm(make_step(calls[network.peer], "float32"), models[network.peer])
    errors = gradient_errors({side: make_step(call, precision) for side, call in calls.items()}, models, expected)
    end_if_wrong(f"{name}, the gradients' norm in {precision}", precision, errors)


def end_if_wrong(name: str, precision: str, errors: dict[str, float]) -> None:
    """Print relative errors, and end with a message if one is too large."""
    print_progress(f"{name}, differences from the peer in float32:", errors)
    if wrong := find_wrong(name, precision, errors):
        raise SystemExit(wrong)


@torch.inference_mode()
def forward(
    network: Network, models: dict[str, nn.Module], expected: Tensor, options: argparse.Namespace, about: Row
) -> list[Row]:
    """Measure a forward call in inference mode, after a check that all sides have the expected output."""
    torch.compiler.reset()  # torch limits the compilations of one method, which all sides and batch sizes share
    name, precision = f"{about['network']}, {about['precision']}, forward, batch {about['batch']}", about["precision"]
    sampled = as_sampled(models)
    calls = {side: make_call(network, side, model, about["batch"]) for side, model in sampled.items()}
    failed = drop_failing(name, calls)
    errors = {side: relative_error(call(), expected) for side, call in calls.items()}
    end_if_wrong(name, precision, errors)
    seconds = measure_seconds(calls, options.rounds)
    print_progress(f"{name}, seconds:", seconds)
    rows = [{"side": side, "seconds": seconds[side], "error": errors[side]} for side in calls]
    return [about | {"measure": "forward"} | row for row in rows + failed]


def train(network: Network, models: dict[str, nn.Module], options: argparse.Namespace, about: Row) -> list[Row]:
    """Measure a forward and backward pass in training mode that starts without gradients, and the memory it saves."""
    torch.compiler.reset()
    name, precision = f"{about['network']}, {about['precision']}", about["precision"]
    check_training(network, {side: model for side, model in models.items() if "compiled" not in side}, about)
    calls = {side: make_call(network, side, model.train(), about["batch"]) for side, model in models.items()}
    steps: dict[str, Call] = {side: make_step(call, precision) for side, call in calls.items()}
    failed = drop_failing(name, steps)
    rows: list[Row] = []
    if "retained" in options.only:
        kept = {side: saved_bytes(autocast(calls[side], precision), models[side]) for side in steps}
        rows += [{"measure": "retained", "side": side, "bytes": value} for side, value in kept.items()]
        print_progress(f"{name}, kept for backward, bytes:", kept)
    if "train" in options.only:
        seconds = measure_seconds(steps, options.rounds, before=lambda side: models[side].zero_grad(set_to_none=True))
        rows += [{"measure": "train", "side": side, "seconds": value} for side, value in seconds.items()]
        rows += [{"measure": "train"} | row for row in failed]
        print_progress(f"{name}, training step, seconds:", seconds)
    for model in models.values():
        model.eval().zero_grad(set_to_none=True)
    return [about | row for row in rows]


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


def memory(sides: list[str], source: Path, options: argparse.Namespace, about: Row) -> Iterator[Row]:
    """Measure the resident memory of a training step, each side in a new process."""
    rest = (str(source), str(about["batch"]), about["precision"], "quick" if options.quick else "full")
    for side in sides:
        found = run_probe("step", about["network"], side, *rest)
        yield about | {"measure": "memory", "side": side, "bytes": found["peak"]}


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
    """Parse the command line; --quick and --sweep change the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="of the measurements (default: both)",
    )
    parser.add_argument("--only", nargs="+", choices=MEASURES, metavar="MEASURE", help=", ".join(MEASURES))
    parser.add_argument("--networks", nargs="+", choices=networks(False), metavar="NETWORK")
    parser.add_argument("--batches", nargs="+", type=int, help="of the forward call (default: 1 4 16)")
    parser.add_argument("--train-batch", type=int, help="of the training step (default: 16)")
    parser.add_argument("--rounds", type=int, help="measurements of every side, in turn (default: 4; of the sweep: 6)")
    parser.add_argument(
        "--compiled", action="store_true", help="also through torch.compile: minutes more for each side and batch size"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small networks, batch 1, one round; memory of one network"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="ours beside diffusers in small networks; --batches is of both measures"
    )
    parser.add_argument("--minutes", type=float, help="that the sweep may take (default: 30)")
    parser.add_argument("--widths", nargs="+", type=int, help="of the sweep (default: 32 64 128 256)")
    parser.add_argument("--sizes", nargs="+", type=int, help="of the sweep (default: 8 16 32 64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to this file")
    options = parser.parse_args()
    check_sweep(parser, options)
    if options.sweep:
        full: Row = {"only": ["forward", "train"], "widths": [32, 64, 128, 256], "sizes": [8, 16, 32, 64]}
        full |= {"batches": [1, 4, 16, 64], "rounds": 6, "minutes": 30.0}
        quick: Row = {"widths": [32], "sizes": [8]}
    else:
        full = {"only": MEASURES, "networks": list(networks(False)), "batches": [1, 4, 16], "rounds": 4}
        full |= {"train_batch": 16}
        quick = {"train_batch": 1}
    quick |= {"batches": [1], "rounds": 1}
    for name, value in (full | quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def check_sweep(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a message if an option has no effect with --sweep, or none without it."""
    unused = ("networks", "train_batch", "compiled") if options.sweep else ("minutes", "widths", "sizes")
    for name in unused:
        if getattr(options, name):
            parser.error(f"--{name.replace('_', '-')} has no effect with{'' if options.sweep else 'out'} --sweep")
    if options.sweep and not set(options.only or ()) <= {"forward", "train"}:
        parser.error("--sweep measures forward and train only")


def main() -> None:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the finally clause prints what is measured by then
    report: Row = {"machine": read_machine(), "command": read_command(), "rows": []}
    try:
        with tempfile.TemporaryDirectory() as folder:
            # torch.compile's cache may hold half-written files of a run that was stopped
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/compiled")
            if options.sweep:
                sweep(options, report, Path(folder))
            else:
                measure(options, report, Path(folder))
    finally:
        print(format_sweep(report) if options.sweep else format_report(report))
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(options: argparse.Namespace, report: Row, folder: Path) -> None:
    """Add the machine's peaks and all rows to the report, one by one, so that those before an error are printed."""
    seconds = 0.1 if options.quick else 1.5
    peaks = report["peak"] = {name: measure_peak(seconds, PRECISIONS[name]) for name in options.precision}
    rows = report["rows"]
    for name in options.networks if {"forward", "train", "retained", "memory"} & set(options.only) else []:
        for row in compare(name, networks(options.quick)[name], options, folder / name):
            rows.append(row)
    if "startup" in options.only:
        rows += startup(options)
    if "load" in options.only:
        rows += load(options, folder / "load")
    for precision, peak in peaks.items():
        again = measure_peak(seconds, PRECISIONS[precision])
        peaks[precision] = {kernel: max(value, again[kernel]) for kernel, value in peak.items()}


if __name__ == "__main__":
    main()
