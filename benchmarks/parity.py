"""Numeric parity of published networks at full size: the largest difference between their code's output and ours.

With random non-zero weights, float32, one sample of the published input size.
Run: python benchmarks/parity.py [NAME ...]
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
from guided_diffusion.unet import UNetModel

from unet_denoiser import UNet

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.checkpoints import DDPM

DDPM_BLOCKS = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
CIFAR = {"sample_size": 32, "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2}
ADM64 = {
    "image_size": 64,
    "in_channels": 3,
    "model_channels": 192,
    "out_channels": 6,
    "num_res_blocks": 3,
    "attention_resolutions": (2, 4, 8),
    "channel_mult": (1, 2, 3, 4),
    "num_head_channels": 64,
    "num_classes": 1000,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_new_attention_order": True,
}
NETWORKS = {
    "ddpm-cifar10": (lambda: diffusers.UNet2DModel(**CIFAR, **DDPM_BLOCKS, **DDPM), 3, 32),
    "adm-64-cond": (lambda: UNetModel(**ADM64), 3, 64),
    "sd-1.5": (lambda: diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8), 4, 64),
}


def randomise(model: torch.nn.Module) -> None:
    """Give every parameter random values, zero-initialised ones too, that keep activations of order one."""
    for name, p in model.named_parameters():
        is_gain = p.ndim == 1 and "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(p, 1.0 if is_gain else 0.0, 0.3 if p.ndim == 1 else p[0].numel() ** -0.5)


def compare(name: str, folder: Path) -> str:
    """Save the peer's network, load it as ours, and return a row of the table."""
    build, channels, size = NETWORKS[name]
    torch.manual_seed(0)
    peer = build().eval()
    randomise(peer)
    x, t = torch.randn(1, channels, size, size), torch.tensor([500])
    context, label = torch.randn(1, 77, 768), torch.tensor([7])
    with torch.no_grad():
        if name == "sd-1.5":
            expected = peer(x, t, context).sample
        else:
            expected = peer(x, t, label) if name.startswith("adm") else peer(x, t).sample
    source = folder / name if name != "adm-64-cond" else folder / "adm.pt"
    torch.save(peer.state_dict(), source) if source.suffix else peer.save_pretrained(source)
    parameters = sum(p.numel() for p in peer.parameters())
    del peer
    start = time.perf_counter()
    model = UNet.from_pretrained(source)  # which finds the architecture by itself
    seconds = time.perf_counter() - start
    conditions = {"context": context} if model.config.context_dim else {}
    conditions |= {"class_labels": label} if model.config.num_classes else {}
    with torch.no_grad():
        out = model(x, t, **conditions)
    error = ((out - expected).abs().max() / expected.abs().max()).item()
    return f"| {name} | {parameters:,} | {size}x{size} | {error:.1e} | {seconds:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NETWORKS))
    names = parser.parse_args().names or NETWORKS
    print("| network | parameters | input | max difference / max output | load, s |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(compare(name, Path(folder)), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"\n{versions}; peak memory of both networks {peak:.1f} GiB")


if __name__ == "__main__":
    main()
