"""Compiled training steps beside diffusers, both compiled: seconds until the first step, and of a step after it.

All sides have the same network and weights; they take turns, and the fastest of all rounds counts. Ours is compiled as
a whole, and block by block as `train --compile` does. A step is a forward and backward pass without the optimizer.

Run: python benchmarks/compiled.py [--networks NAME ...] [--precisions NAME ...] [--sides NAME ...] [--rounds N]
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from measure import Call, format_table, measure_seconds, print_progress
from sides import Network, make_call, networks, read, save
from torch._inductor.utils import fresh_cache

from unet_denoiser.training.compilation import compile_blocks

# the side of `sides.py` that reads and calls each
SIDES = {
    "ours": "ours",
    "ours compiled": "ours compiled",
    "ours compiled by blocks": "ours",
    "diffusers compiled": "diffusers compiled",
    "diffusers compiled channels-last": "diffusers compiled channels-last",
}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_step(network: Network, name: str, source: Path, precision: str, batch: int) -> Call:
    """Return a training step of one side, which the first call compiles."""
    side = SIDES[name]
    model = read(network, side.replace(" compiled", ""), source).train()
    if name.endswith("by blocks"):
        compile_blocks(model)
    call = make_call(network, side, model, batch)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            out = call()
        out.float().square().mean().backward()

    return step


def measure(name: str, network: Network, precision: str, options: argparse.Namespace, source: Path) -> list[list[str]]:
    """Return the rows of one network in one precision."""
    torch.compiler.reset()  # torch limits the graphs of one method, which all networks of a class share
    steps = {side: make_step(network, side, source, precision, options.batch) for side in options.sides}
    first = {}
    for side, step in steps.items():
        with fresh_cache():  # without code of other sides, as before a first training
            start = time.perf_counter()
            step()
            first[side] = time.perf_counter() - start
        print_progress(f"{name}, {precision}, {side}: first step, seconds:", {side: first[side]})
    seconds = measure_seconds(steps, options.rounds)
    peers = [seconds[side] for side in seconds if side.startswith("diffusers")]
    best = min(peers) if peers else float("nan")
    return [
        [name, precision, side, f"{first[side]:.1f}", f"{1e3 * seconds[side]:.1f}", f"{seconds[side] / best:.2f}"]
        for side in steps
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, choices in (("networks", ["ddpm-cifar10", "narrow"]), ("precisions", PRECISIONS), ("sides", SIDES)):
        parser.add_argument(f"--{option}", nargs="+", choices=list(choices), default=list(choices), metavar="NAME")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of every side, in turn")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            network = networks(False)[name]
            Path(folder, name).mkdir()
            source = save(network, Path(folder, name))
            for precision in options.precisions:
                rows += measure(name, network, precision, options, source)
    head = ["network", "precision", "side", "first step, s", "step, ms", "ratio to the best compiled peer"]
    print(format_table(head, rows))


if __name__ == "__main__":
    main()
