"""What only a new process can measure; `measure.fresh` runs this file and reads the JSON it prints.

python benchmarks/probe.py startup SIDE
python benchmarks/probe.py load SIDE FOLDER
python benchmarks/probe.py step NETWORK SIDE SOURCE BATCH full|quick
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Build = Callable[[], Any]


def torch_alone() -> Build:
    """What all of them import."""
    import torch

    return torch.nn.Identity


def ours() -> Build:
    """DDPM's network for CIFAR-10; the functions below give it in the other libraries' terms."""
    from unet_denoiser import UNet

    return lambda: UNet.from_preset("ddpm-cifar10")


def diffusers() -> Build:
    """The same network."""
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
    """The same widths and blocks."""
    from guided_diffusion.unet import UNetModel

    return lambda: UNetModel(32, 3, 128, 3, 2, (2,), channel_mult=(1, 2, 2, 2))


def denoising_diffusion_pytorch() -> Build:
    """The same widths; its blocks differ."""
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
    """Seconds to import a library and to build a network with it, and the process's memory then."""
    start = time.perf_counter()
    build = STARTUP[side]()
    imported = time.perf_counter()
    model = build()
    built = time.perf_counter()
    from measure import resident

    return {
        "import_s": imported - start,
        "build_s": built - imported,
        "total_s": built - start,
        "parameters": sum(p.numel() for p in model.parameters()),
        "resident": resident(),
    }


def load(side: str, folder: str) -> dict[str, float]:
    """Seconds and memory to read a network, and then to touch every weight: mapped files are read only then."""
    from measure import reset_peak, resident

    if side == "ours":
        from unet_denoiser import UNet as Model
    else:
        from diffusers import UNet2DConditionModel as Model
    base, private = reset_peak(), resident("RssAnon")
    start = time.perf_counter()
    model = Model.from_pretrained(folder)
    loaded = time.perf_counter()
    peak = resident("VmHWM") - base
    resumed = time.perf_counter()
    sum(p.sum() for p in model.parameters())
    touched = time.perf_counter()
    return {
        "load_s": loaded - start,
        "touched_s": loaded - start + touched - resumed,
        "load_peak": peak,
        "touched_peak": resident("VmHWM") - base,
        "private": resident("RssAnon") - private,
    }


def step(name: str, side: str, source: str, batch: str, size: str) -> dict[str, float]:
    """Resident memory that a training step adds at its peak to that of the network at rest, the second step."""
    import torch
    from measure import reset_peak, resident
    from sides import caller, networks, read

    torch.manual_seed(0)
    network = networks(size == "quick")[name]
    model = read(network, side, Path(source)).train()
    call = caller(network, side, model, int(batch))
    call().square().mean().backward()  # sets up what stays
    model.zero_grad(set_to_none=True)
    base = reset_peak()
    call().square().mean().backward()
    return {"peak": resident("VmHWM") - base}


if __name__ == "__main__":
    print(json.dumps({"startup": startup, "load": load, "step": step}[sys.argv[1]](*sys.argv[2:])))
