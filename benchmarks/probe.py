"""Measurements that need a new process; `measure.run_probe` runs this file and reads the JSON it prints.

python benchmarks/probe.py startup SIDE
python benchmarks/probe.py load SIDE FOLDER
python benchmarks/probe.py step NETWORK SIDE SOURCE BATCH float32|bfloat16 full|quick
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Build = Callable[[], Any]


def torch_alone() -> Build:
    """Import torch, as all of them do."""
    import torch

    return torch.nn.Identity


def ours() -> Build:
    """Import this library; return a function that builds DDPM's network for CIFAR-10."""
    from unet_denoiser import UNet

    return lambda: UNet.from_preset("ddpm-cifar10")


def diffusers() -> Build:
    """Import diffusers; return a function that builds the same network."""
    from diffusers import UNet2DModel

    return lambda: UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    )


def guided_diffusion() -> Build:
    """Import guided-diffusion; return a function that builds a network of the same widths and blocks."""
    from guided_diffusion.unet import UNetModel

    return lambda: UNetModel(32, 3, 128, 3, 2, (2,), channel_mult=(1, 2, 2, 2))


def denoising_diffusion_pytorch() -> Build:
    """Import denoising-diffusion-pytorch; return a function that builds a network of the same widths."""
    from lucidrains import Unet

    return lambda: Unet(128, dim_mults=(1, 2, 2, 2))


STARTUP = {
    "torch alone": torch_alone,
    "ours": ours,
    "diffusers": diffusers,
    "guided-diffusion": guided_diffusion,
    "denoising-diffusion-pytorch": denoising_diffusion_pytorch,
}
LOAD = ("ours", "diffusers")


def startup(side: str) -> dict[str, float]:
    """Measure the seconds to import a library and to build a network with it, and the process's memory then."""
    start = time.perf_counter()
    build = STARTUP[side]()
    imported = time.perf_counter()
    model = build()
    built = time.perf_counter()
    from measure import resident_bytes

    return {
        "import_s": imported - start,
        "build_s": built - imported,
        "total_s": built - start,
        "parameters": sum(p.numel() for p in model.parameters()),
        "resident": resident_bytes(),
    }


def load(side: str, folder: str) -> dict[str, float]:
    """Measure seconds and memory to load a network, and then to touch every weight, when mapped files are read."""
    from measure import reset_peak, resident_bytes

    if side == "ours":
        from unet_denoiser import UNet as Model
    else:
        from diffusers import UNet2DConditionModel as Model
    base, private = reset_peak(), resident_bytes("RssAnon")
    start = time.perf_counter()
    model = Model.from_pretrained(folder)
    loaded = time.perf_counter()
    peak = resident_bytes("VmHWM") - base
    resumed = time.perf_counter()
    sum(p.sum() for p in model.parameters())
    touched = time.perf_counter()
    return {
        "load_s": loaded - start,
        "touched_s": loaded - start + touched - resumed,
        "load_peak": peak,
        "touched_peak": resident_bytes("VmHWM") - base,
        "private": resident_bytes("RssAnon") - private,
    }


def step(*arguments: str) -> dict[str, float]:
    """Measure the peak of the resident memory that a training step adds to the network at rest, in the second step."""
    import torch
    from measure import reset_peak, resident_bytes
    from sides import make_call, make_step, networks, read

    name, side, source, batch, precision, size = arguments
    torch.manual_seed(0)
    network = networks(size == "quick")[name]
    model = read(network, side, Path(source)).train()
    train = make_step(make_call(network, side, model, int(batch)), precision)
    train()  # allocates memory that stays
    model.zero_grad(set_to_none=True)
    base = reset_peak()
    train()
    return {"peak": resident_bytes("VmHWM") - base}


if __name__ == "__main__":
    print(json.dumps({"startup": startup, "load": load, "step": step}[sys.argv[1]](*sys.argv[2:])))
