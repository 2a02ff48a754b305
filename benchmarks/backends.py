"""Time of a network's call in OpenVINO and onnxruntime beside torch, its error, and what the first call costs.

Both sides run as in a sampling: time and conditions are embedded before, and the call is `CachedUNet`'s. Weights are
random; no time depends on them. The engines are converted anew, in a cache that is deleted at the end.

Run: python benchmarks/backends.py [--networks fashion ddpm-cifar10] [--batch 1 16] [--rounds 4] [--quick]
"""

import argparse
import os
import tempfile
import time

os.environ["UNET_DENOISER_CACHE"] = tempfile.mkdtemp(prefix="backends-")

import shutil
from functools import partial

import torch
from measure import format_machine, format_table, measure_seconds, print_progress, read_command, read_machine

from unet_denoiser import Diffusion, UNet
from unet_denoiser.config.defaults import architecture_for
from unet_denoiser.export.engines import Engines
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.layers.rules import prepare_to_sample
from unet_denoiser.sampling.backends import calibrate_step
from unet_denoiser.sampling.cached_unet import CachedUNet

BACKENDS = [
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("openvino", "int8"),
    ("onnxruntime", "float32"),
]


def build(name: str, quick: bool) -> UNet:
    """Build a network with random weights that do not vanish, as it is loaded to sample from."""
    torch.manual_seed(0)
    if name == "fashion":
        options = {"model_channels": 8} if quick else {}
        model = UNet.from_config(architecture_for(1, (28, 28), 10, options, on_cpu=True))
    else:
        model = UNet.from_preset(name, **({"model_channels": 32} if quick else {}))
    for p in model.parameters():
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return prepare_to_sample(model.eval())


@torch.no_grad()
def measure(name: str, batches: list[int], rounds: int, precisions: list[str], quick: bool) -> list[list[str]]:
    """Return rows of the table for one network."""
    model, process, rows = build(name, quick), Diffusion(), []
    config = model.config
    calibration = partial(calibrate_step, model, process, config.sizes, Conditions())
    engines = {
        f"{engine} {precision}": Engines(model, engine, precision, calibration)
        for engine, precision in BACKENDS
        if precision in precisions
    }
    times = torch.tensor([500])
    for batch in batches:
        x, t = torch.randn(batch, config.in_channels, *config.sizes), times.expand(batch)
        given = {"class_labels": torch.arange(batch) % 10} if config.num_classes else {}
        networks = {"torch": CachedUNet(model, times)}
        networks |= {name: CachedUNet(model, times, engines=engine) for name, engine in engines.items()}
        first, errors, wanted = {}, {}, networks["torch"](x, t, **given)
        for side, network in networks.items():
            start = time.perf_counter()
            found = network(x, t, **given)
            first[side] = time.perf_counter() - start
            errors[side] = ((found - wanted).square().mean() / wanted.square().mean()).sqrt().item()
            print_progress(f"{name}, batch {batch}, {side}:", {"first call, s": first[side], "error": errors[side]})
        calls = {side: partial(network, x, t, **given) for side, network in networks.items()}
        seconds = measure_seconds(calls, rounds)
        parameters = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"
        for side in networks:
            row = [f"{name} ({parameters})", str(batch), side, f"{1000 * seconds[side]:.1f}"]
            rows.append([*row, f"{seconds[side] / seconds['torch']:.2f}", f"{errors[side]:.0e}", f"{first[side]:.1f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["fashion", "ddpm-cifar10"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="small networks, one round")
    args = parser.parse_args()
    machine, rows = read_machine(), []
    for name in args.networks:
        rows += measure(name, args.batch, 1 if args.quick else args.rounds, args.precisions, args.quick)
    head = ["network", "batch", "backend", "ms", "of torch", "error", "first call, s"]
    print(format_machine(machine, read_command()))
    print()
    print(format_table(head, rows))
    shutil.rmtree(os.environ["UNET_DENOISER_CACHE"], ignore_errors=True)


if __name__ == "__main__":
    main()
