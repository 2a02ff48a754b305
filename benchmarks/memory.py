"""The estimates of `unet-denoiser info --memory` beside measured peaks on a CPU, and tables for clusters.

python benchmarks/memory.py measured|clusters
"""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import torch
from measure import format_table, print_progress, reset_peak, resident_bytes

from unet_denoiser import Diffusion, Trainer, TrainingConfig, UNet, UNetConfig, preset
from unet_denoiser.config.memory import MemoryConfig
from unet_denoiser.data.sources.arrays import ArrayDataset
from unet_denoiser.models.memory_estimate import MemoryEstimate, estimate

# name: network, image size, images per step
NETWORKS: dict[str, tuple[UNetConfig, int, int]] = {
    "DDPM, CIFAR-10": (preset("ddpm-cifar10"), 32, 16),
    "SD's shape, 320 -> 96 channels": (
        replace(preset("sd-1.5"), model_channels=96, channel_mult=(1, 2, 4), context_dim=768),
        32,
        12,
    ),
    "ADM's shape, 64 pixels, 192 -> 64 channels": (
        replace(preset("edm-imagenet64-cond"), model_channels=64, head_dim=32),
        64,
        8,
    ),
}


class RandomImages(ArrayDataset):
    """The random images of a training step, with the conditions that a network is built for."""

    def __init__(self, config: UNetConfig, size: int, count: int) -> None:
        images = np.random.default_rng(0).uniform(-1, 1, (count, config.in_channels, size, size)).astype(np.float32)
        super().__init__(images, np.arange(count) if config.num_classes else None)
        self.context_dim = config.context_dim

    def __getitem__(self, index: int) -> dict[str, object]:
        context = {} if self.context_dim is None else {"context": torch.zeros(77, self.context_dim)}
        return super().__getitem__(index) | context


def probe(name: str, checkpointing: str) -> None:
    """Print the resident memory that a trainer adds to a new process: before the third step, and at its peak."""
    config, size, batch = NETWORKS[name]
    options = TrainingConfig(batch_size=batch, steps=3, gradient_checkpointing=checkpointing == "yes", device="cpu")
    small = replace(config, model_channels=64, context_dim=config.context_dim and 8, norm_groups=32)
    for warm_up in (True, False):
        base = reset_peak()
        torch.manual_seed(0)
        model = UNet.from_config(small if warm_up else config)
        data = RandomImages(small if warm_up else config, size, 2 if warm_up else batch)
        steps = replace(options, batch_size=2) if warm_up else options
        trainer = Trainer(model, Diffusion(), data, steps)
        for step in trainer.steps():
            if step.step == 2:
                rest = reset_peak()
        found = {"peak": resident_bytes("VmHWM") - base, "held": rest - base}
        del trainer, model, data, step
    print(json.dumps(found))


def compare_estimates() -> str:
    """Return a table of estimates beside measurements, with and without gradient checkpointing."""
    rows = []
    for name, (config, size, batch) in NETWORKS.items():
        for checkpointing in ("no", "yes"):
            options = MemoryConfig(batch_size=batch, image_size=(size,), gradient_checkpointing=checkpointing == "yes")
            estimated = estimate(config, options)
            command = [sys.executable, __file__, "probe", name, checkpointing]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print_progress(f"{name}, checkpointing {checkpointing}:", found)
            rows.append([name, str(batch), checkpointing, *_format_comparison(estimated, found)])
    head = ("network", "batch", "checkpointing", "activations", "peak", "resident", "measured", "resident / measured",
            "holes")  # fmt: skip
    return format_table(head, rows)


def _format_comparison(estimated: MemoryEstimate, found: dict[str, float]) -> list[str]:
    held = estimated.parameters + estimated.optimizer + estimated.ema
    holes = (found["peak"] - found["held"]) / (estimated.peak - held)
    mebibytes = estimated.activations, estimated.peak, estimated.resident, found["peak"]
    return [*(f"{b / 2**20:.0f} MiB" for b in mebibytes), f"{estimated.resident / found['peak']:.2f}", f"{holes:.2f}"]


# GPUs: gigabytes of each, their number, dense bf16 TFLOP/s of each (RTX 4090, A100)
CLUSTERS = {
    "1 x 24 GB": (24, 1, 165),
    "1 x 80 GB": (80, 1, 312),
    "8 x 80 GB": (80, 8, 312),
    "64 x 80 GB": (80, 64, 312),
}
UTILISATION = 0.35  # share of the peak that a training step reaches
CONTEXT_BYTES, FRAGMENTED_SHARE = 1.5 * 2**30, 0.08  # lost to the libraries, and to the allocator


def tabulate_clusters() -> str:
    """Return a table of the most images per GPU that fit, a power of two, for SD- and SDXL-sized training in bf16."""
    rows = []
    for name in ("sd-1.5", "sdxl-base"):
        for cluster, (gigabytes, count, speed) in CLUSTERS.items():
            for sharding in ("none",) if count == 1 else ("ddp", "fsdp"):
                for checkpointing in (False, True):
                    max_bytes = (gigabytes * 1e9 - CONTEXT_BYTES) * (1 - FRAGMENTED_SHARE)
                    batch, found = _largest_batch(name, sharding, count, checkpointing, max_bytes)
                    print_progress(f"{name} {cluster} {sharding} {checkpointing}: {batch}")
                    fits = (
                        [str(batch), f"{found.peak / 1e9:.1f}"] if batch else ["none", f"{found.peak / 1e9:.1f} for 1"]
                    )
                    seconds = found.flops / (count * speed * 1e12 * UTILISATION)
                    timing = [f"{found.flops / 1e12:,.0f}", f"{seconds:.2f}"] if batch else ["", ""]
                    how = [sharding, "yes" if checkpointing else "no", *fits, str(batch * count or ""), *timing]
                    rows.append([f"{name}, {cluster}", *how])
    head = ("network, GPUs", "sharding", "checkpointing", "images per GPU", "GB per GPU", "batch_size",
            "TFLOP a step", "s a step")  # fmt: skip
    return format_table(head, rows)


def _largest_batch(
    name: str, sharding: str, count: int, checkpointing: bool, max_bytes: float
) -> tuple[int, MemoryEstimate]:
    """Return how many images fit on each GPU (0: not even one), and the estimate for them (or for one)."""
    options = {"mixed_precision": "bf16", "gradient_checkpointing": checkpointing, "sharding": sharding}

    def estimate_batch(batch: int) -> MemoryEstimate:
        config = MemoryConfig(batch_size=batch * count, num_processes=count, **options)
        return estimate(preset(name), config, "cuda")

    one, two = estimate_batch(1), estimate_batch(2)
    if one.peak > max_bytes:
        return 0, one
    # the peak is the maximum of several linear functions, so extrapolating from two batches never finds too few
    batch = min(256, 2 ** int(math.log2(1 + (max_bytes - one.peak) / (two.peak - one.peak))))
    while (found := estimate_batch(batch)).peak > max_bytes:
        batch //= 2
    return batch, found


if __name__ == "__main__":
    if sys.argv[1:2] == ["probe"]:
        probe(*sys.argv[2:])
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        tables = {"measured": compare_estimates, "clusters": tabulate_clusters}
        parser.add_argument("table", choices=tables)
        print(tables[parser.parse_args().table]())
