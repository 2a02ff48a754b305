"""The networks that are compared, and how each side (an implementation) reads and calls them."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from guided_diffusion.unet import UNetModel
from torch import Tensor, nn

from parity import CIFAR, DDPM, DDPM_BLOCKS, randomise
from unet_denoiser import UNet
from unet_denoiser.models.layers.rules import prepare_to_sample

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEXT_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
ADM = {
    "image_size": 32,
    "in_channels": 3,
    "out_channels": 6,
    "num_res_blocks": 2,
    "attention_resolutions": (2, 4),
    "channel_mult": (1, 2, 3),
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_new_attention_order": True,
}


class Network(NamedTuple):
    """A network of another library, the peer."""

    peer: str
    build: Callable[..., Any]
    options: dict[str, Any]  # of `build`
    ours: dict[str, Any] | None  # options that ours needs besides the file; None: ours cannot build this network
    channels: int = 3
    context_dim: int | None = None
    size: int = 32  # height and width of the inputs
    bfloat16: bool = True  # False: the peer computes part in float32 and fails where its weights are bfloat16


def build_lucidrains(**options: Any) -> nn.Module:
    """Build the network of denoising-diffusion-pytorch, which is installed for `make bench` only."""
    from lucidrains import Unet

    return Unet(**options)


def networks(quick: bool) -> dict[str, Network]:
    """Return the networks by name, at half the width or less if quick."""
    width = 64 if quick else 128
    head = width // 2
    widths = (width // 4, width // 2, width // 2)
    narrow = CIFAR | {"block_out_channels": widths, "norm_num_groups": 8, "attention_head_dim": 16}
    narrow |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")}
    narrow |= {"up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")}
    cifar = CIFAR | {"block_out_channels": (width, 2 * width, 2 * width, 2 * width), "dropout": 0.1}
    text = {"block_out_channels": (width, 2 * width, 4 * width), "cross_attention_dim": 256, "attention_head_dim": 4}
    adm = ADM | {"model_channels": width, "num_head_channels": head}
    unstated = {"head_dim": head, "qkv_order": "new", "dropout": 0.0}
    return {
        "ddpm-cifar10": Network("diffusers", UNet2DModel, cifar | DDPM_BLOCKS | DDPM, ours={}),
        "sd-small": Network(
            "diffusers",
            UNet2DConditionModel,
            text | TEXT_BLOCKS | {"sample_size": 32},
            ours={},
            channels=4,
            context_dim=256,
        ),
        "narrow": Network("diffusers", UNet2DModel, narrow, ours={}),
        "adm-small": Network("guided-diffusion", UNetModel, adm, ours=unstated, bfloat16=False),
        "lucidrains": Network(
            "denoising-diffusion-pytorch",
            build_lucidrains,
            {"dim": width, "dim_mults": (1, 2, 2, 2), "dropout": 0.1},
            ours=None,
            bfloat16=False,
        ),
    }


def list_sides(network: Network, compiled: bool) -> list[str]:
    """List ours first, then the peer in the default memory format and in the one that convolutions prefer."""
    peers = [network.peer, f"{network.peer} channels-last"]
    if network.ours is None:
        return peers
    if not compiled:
        return ["ours", *peers]
    return ["ours", "ours compiled", *peers, f"{network.peer} compiled", f"{network.peer} compiled channels-last"]


def save(network: Network, folder: Path) -> Path:
    """Write the network with random non-zero weights, as a folder of diffusers or a state dict."""
    torch.manual_seed(0)
    model = network.build(**network.options)
    randomise(model)
    if network.peer == "diffusers":
        model.save_pretrained(folder)
        return folder
    torch.save(model.state_dict(), folder / "model.pt")
    return folder / "model.pt"


def read(network: Network, side: str, source: Path, precision: str = "float32") -> nn.Module:
    """Read one side's network with weights in this precision, in evaluation mode, not compiled."""
    if side.startswith("ours"):
        return UNet.from_pretrained(source, **network.ours or {}).eval().to(PRECISIONS[precision])
    if source.is_dir():
        model = network.build.from_pretrained(source, torch_dtype=PRECISIONS[precision])
    else:  # a peer that has no bfloat16
        model = network.build(**network.options)
        model.load_state_dict(torch.load(source, weights_only=True))
    return model.eval().to(memory_format=torch.channels_last) if "channels-last" in side else model.eval()


def as_sampled(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the sides' models with ours as `Pipeline.from_pretrained` has it; training has the one that was read."""
    return {
        side: prepare_to_sample(deepcopy(model)) if side.startswith("ours") else model for side, model in models.items()
    }


def make_call(network: Network, side: str, model: nn.Module, batch: int) -> Callable[[], Tensor]:
    """Return the forward call of one side, on inputs in its weights' precision that are the same for all sides."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    x = torch.randn(batch, network.channels, network.size, network.size, generator=generator).to(dtype)
    inputs = [x, torch.randint(0, 1000, (batch,), generator=generator)]
    if network.context_dim:
        inputs.append(torch.randn(batch, 77, network.context_dim, generator=generator).to(dtype))
    if "channels-last" in side:
        inputs[0] = x.to(memory_format=torch.channels_last)
    if "compiled" in side:
        model = torch.compile(model, dynamic=False)
    if side.startswith("diffusers"):
        return lambda: model(*inputs).sample
    return lambda: model(*inputs)


def autocast(call: Callable[[], Tensor], precision: str) -> Callable[[], Tensor]:
    """Return a forward call under autocast if the precision is bfloat16, else as it is."""

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call()

    return run if precision == "bfloat16" else call


def make_step(call: Callable[[], Tensor], precision: str) -> Callable[[], None]:
    """Return a training step of a forward call: loss and backward pass, in bfloat16 with the forward under autocast."""
    forward = autocast(call, precision)
    return lambda: forward().float().square().mean().backward()
