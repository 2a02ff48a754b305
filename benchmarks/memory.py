"""The estimates of `unet-denoiser info --memory` beside measured peaks on a CPU, and tables for clusters.

python benchmarks/memory.py [measured|clusters]
"""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import torch
from measure import progress, reset_peak, resident, table

from unet_denoiser import Diffusion, Trainer, TrainingConfig, UNet, UNetConfig, preset
from unet_denoiser.data import ArrayData
from unet_denoiser.memory import Estimate, estimate
from unet_denoiser.memory_config import MemoryConfig

# name: network, size of the images, images per step
MEASURED: dict[str, tuple[UNetConfig, int, int]] = {
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


class Random(ArrayData):
    """As many random images as a step takes, with the conditions that a network was built for."""

    def __init__(self, config: UNetConfig, size: int, count: int) -> None:
        images = np.random.default_rng(0).uniform(-1, 1, (count, config.in_channels, size, size)).astype(np.float32)
        super().__init__(images, np.arange(count) if config.num_classes else None)
        self.context_dim = config.context_dim

    def __getitem__(self, index: int) -> dict[str, object]:
        context = {} if self.context_dim is None else {"context": torch.zeros(77, self.context_dim)}
        return super().__getitem__(index) | context


def probe(name: str, checkpointing: str) -> None:
    """Resident memory of a new process: what a trainer adds, and its peak in the third step."""
    config, size, batch = MEASURED[name]
    options = TrainingConfig(batch_size=batch, steps=3, gradient_checkpointing=checkpointing == "yes", device="cpu")
    small = replace(config, model_channels=64, context_dim=config.context_dim and 8, norm_groups=32)
    for warm_up in (True, False):
        base = reset_peak()
        torch.manual_seed(0)
        model = UNet.from_config(small if warm_up else config)
        data = Random(small if warm_up else config, size, 2 if warm_up else batch)
        steps = replace(options, batch_size=2) if warm_up else options
        trainer = Trainer(model, Diffusion(), data, steps)
        for step in trainer.steps():
            if step.step == 2:
                rest = reset_peak()
        found = {"peak": resident("VmHWM") - base, "held": rest - base}
        del trainer, model, data, step
    print(json.dumps(found))


def measured() -> str:
    """Estimate beside measurement, with and without checkpointing."""
    rows = []
    for name, (config, size, batch) in MEASURED.items():
        for checkpointing in ("no", "yes"):
            about = MemoryConfig(
                batch_size=batch, image_size=(size,), gradient_checkpointing=checkpointing == "yes"
            )
            said = estimate(config, about)
            command = [sys.executable, __file__, "probe", name, checkpointing]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            progress(f"{name}, checkpointing {checkpointing}:", found)
            rows.append([name, str(batch), checkpointing, *_compare(said, found)])
    head = ("network", "batch", "checkpointing", "activations", "estimated peak", "measured", "estimated / measured",
            "the step's part alone")  # fmt: skip
    return table(head, rows)


def _compare(said: Estimate, found: dict[str, float]) -> list[str]:
    held = said.parameters + said.optimizer + said.ema
    ratios = said.peak / found["peak"], (said.peak - held) / (found["peak"] - found["held"])
    mebibytes = said.activations, said.peak, found["peak"]
    return [*(f"{b / 2**20:.0f} MiB" for b in mebibytes), *(f"{r:.2f}" for r in ratios)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["probe"]:
        probe(*sys.argv[2:])
    else:
        print(measured())
