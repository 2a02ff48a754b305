"""The networks of gpu.py, ours and diffusers' with the same weights: inputs, calls, and how these are timed."""

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from unet_denoiser import UNet, preset
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert import export_checkpoint

BATCHES = {"ddpm-cifar10": 128, "adm-64-cond": 32, "sd-1.5": 8}
SIZES = {"ddpm-cifar10": 32, "adm-64-cond": 64, "sd-1.5": 64}
ROUNDS, ROUND_SECONDS = 5, 0.2
options = argparse.Namespace()  # device and quick, as they were given to gpu.py


def make_config(name: str) -> UNetConfig:
    """Return a preset that diffusers can hold too; small if quick."""
    config = replace(preset(name), learned_null=False, dropout=0.0)
    if options.quick:
        small: dict[str, Any] = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "norm_groups": 16}
        config = replace(config, **small, num_heads=None, head_dim=32)
    return config


@cache
def make_pair(name: str) -> tuple[UNet, nn.Module]:
    """Return our network with random weights, and diffusers' with the same."""
    torch.manual_seed(0)
    with torch.device(options.device):
        model = UNet.from_config(make_config(name))
    with torch.no_grad():
        for p in model.parameters():  # zero-initialised ones too, so that every layer shows in the output
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.02 if p.ndim == 1 else p[0].numel() ** -0.5)
    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(model.state_dict(), model.config, Path(folder) / "unet", "diffusers")
        kind = diffusers.UNet2DConditionModel if model.config.context_dim else diffusers.UNet2DModel
        peer = kind.from_pretrained(Path(folder) / "unet")
    return model, peer.to(options.device)


def make_inputs(name: str, batch: int) -> dict[str, Tensor]:
    """Return the arguments of our network for a batch."""
    config, size = make_config(name), 8 if options.quick else SIZES[name]
    g = torch.Generator().manual_seed(1)
    inputs = {"x": torch.randn(batch, config.in_channels, size, size, generator=g)}
    inputs["t"] = torch.randint(0, 1000, (batch,), generator=g)
    if config.num_classes:
        inputs["class_labels"] = torch.randint(0, config.num_classes, (batch,), generator=g)
    if config.context_dim:
        inputs["context"] = torch.randn(batch, 77, config.context_dim, generator=g)
    return {key: value.to(options.device) for key, value in inputs.items()}


def call_peer(peer: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    """Call diffusers' network with the arguments of ours."""
    more = {"encoder_hidden_states": inputs["context"]} if "context" in inputs else {}
    more |= {"class_labels": inputs["class_labels"]} if "class_labels" in inputs else {}
    return peer(inputs["x"], inputs["t"], **more).sample


def make_sides(
    name: str, model: UNet, peer: nn.Module, wrap: Callable[[Any], Any] = lambda network: network
) -> dict[str, tuple[nn.Module, Callable[[], Tensor], torch.memory_format]]:
    """Return network, forward call and memory format of each side."""
    inputs, given, last = make_inputs(name, batch_size(name)), torch.contiguous_format, torch.channels_last
    turned = inputs | {"x": inputs["x"].to(memory_format=last)}
    ours, theirs = wrap(model), wrap(peer)
    return {
        "ours": (model, lambda: ours(**inputs), given),
        "diffusers": (peer, lambda: call_peer(theirs, inputs), given),
        "its channels last": (peer, lambda: call_peer(theirs, turned), last),
        "ours channels last": (model, lambda: ours(**turned), last),
    }


def batch_size(name: str) -> int:
    return 2 if options.quick else BATCHES[name]


def autocast(precision: str) -> Any:
    return torch.autocast(options.device, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def synchronize() -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def measure(call: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, float]:
    """Return the seconds of a call in the fastest round, and the slowest round over that; three calls warm up."""
    for _ in range(1 if options.quick else 3):
        call()
    means = []
    for _ in range(1 if options.quick else rounds):
        synchronize()
        start, count = time.perf_counter(), 0
        while count == 0 or (not options.quick and time.perf_counter() - start < ROUND_SECONDS):
            call()
            count += 1
            if count % 4 == 0:
                synchronize()
        synchronize()
        means.append((time.perf_counter() - start) / count)
    return min(means), max(means) / min(means)


def step_gib(call: Callable[[], Any]) -> float:
    """Return the peak memory that a call adds to what is held before it, in GiB; 0 on a CPU."""
    if options.device != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - held) / 2**30


def make_step(network: nn.Module, forward: Callable[[], Tensor], precision: str) -> Callable[[], None]:
    """Return a training step with autocast and fused AdamW."""
    optimizer = torch.optim.AdamW(network.parameters(), 1e-6, fused=True)

    def train() -> None:
        with autocast(precision):
            loss = forward().float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train
