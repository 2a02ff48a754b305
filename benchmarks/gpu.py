"""Speed, memory and parity on a GPU, beside diffusers with the same weights. Needs torch, diffusers and this package.

    python benchmarks/gpu.py --out gpu                        # at most 8 minutes on an H100
    python benchmarks/gpu.py --quick --device cpu --out gpu   # small networks, to see that it works

Prints one table a part. Each part is caught on its own: an error costs that part alone.
"""

import argparse
import copy
import gc
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from measure import format_table
from torch import Tensor, nn

from unet_denoiser import Diffusion, Trainer, TrainingConfig, UNet, load_data, preset, sample, save_grid
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert import export_checkpoint

BATCHES = {"ddpm-cifar10": 128, "adm-64-cond": 32, "sd-1.5": 8}
SIZES = {"ddpm-cifar10": 32, "adm-64-cond": 64, "sd-1.5": 64}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Row = list[str]
options = argparse.Namespace()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small networks, few repetitions")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for the picture and the report")
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins after this time")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.parse_args(namespace=options)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    report(f"{name}; torch {torch.__version__}, diffusers {diffusers.__version__}")
    begun = time.perf_counter()
    for part in options.only:
        minutes = (time.perf_counter() - begun) / 60
        if minutes > options.minutes:
            report(f"\n## {part}\n\nleft out: {minutes:.1f} minutes have passed")
            continue
        report(f"\n## {part} ({PARTS[part].__doc__})\n")
        start, rows, error = time.perf_counter(), [], ""
        try:
            rows.extend(PARTS[part]())  # keeps the rows that came before an error
        except Exception:
            error = "\n" + traceback.format_exc()
        report(format_table(rows[0], rows[1:]) + error)
        gc.collect()
        report(f"\n{time.perf_counter() - start:.0f} s")


def report(text: str) -> None:
    """Print a text and append it to the report."""
    print(text, flush=True)
    with (options.out / "report.md").open("a") as file:
        file.write(text + "\n")


def make_config(name: str) -> UNetConfig:
    """Return a preset that diffusers can hold too; a quarter as wide or less if quick."""
    config = replace(preset(name), learned_null=False, dropout=0.0)
    if options.quick:
        config = replace(config, model_channels=32, num_res_blocks=1, norm_groups=16, num_heads=None, head_dim=32)
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
    config, size = make_config(name), 16 if options.quick else SIZES[name]
    g = torch.Generator().manual_seed(1)
    inputs = {"x": torch.randn(batch, config.in_channels, size, size, generator=g)}
    inputs["t"] = torch.randint(0, 1000, (batch,), generator=g)
    if config.num_classes:
        inputs["class_labels"] = torch.randint(0, config.num_classes, (batch,), generator=g)
    if config.context_dim:
        inputs["context"] = torch.randn(batch, 77, config.context_dim, generator=g)
    return {key: value.to(options.device) for key, value in inputs.items()}


def call_peer(peer: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Call diffusers' network with the arguments of ours."""
    more = {"encoder_hidden_states": inputs["context"]} if "context" in inputs else {}
    more |= {"class_labels": inputs["class_labels"]} if "class_labels" in inputs else {}
    return peer(inputs["x"], inputs["t"], **more).sample


def autocast(precision: str) -> Any:
    return torch.autocast(options.device, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def synchronize() -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def measure(call: Callable[[], Any], seconds: float = 1.0) -> float:
    """Return the seconds of a call: the mean of as many as fit into `seconds`, after three to warm up."""
    for _ in range(1 if options.quick else 3):
        call()
    synchronize()
    start, count = time.perf_counter(), 0
    while count == 0 or (not options.quick and time.perf_counter() - start < seconds):
        call()
        count += 1
        if count % 4 == 0:
            synchronize()
    synchronize()
    return (time.perf_counter() - start) / count


def peak_gib(call: Callable[[], Any]) -> float:
    """Return the peak memory of a call in GiB, everything included; 0 on a CPU."""
    if options.device != "cuda":
        call()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**30


def compare_outputs() -> Iterator[Row]:
    """largest difference between ours and diffusers, over the largest output"""
    yield ["network", *PRECISIONS, "diffusers in bfloat16 from float32"]
    for name in BATCHES:
        (model, peer), inputs = make_pair(name), make_inputs(name, 2)
        with torch.no_grad():
            torch.backends.cudnn.allow_tf32 = False
            torch.set_float32_matmul_precision("highest")
            exact = call_peer(peer, inputs)
            errors = [((model(**inputs) - exact).abs().max() / exact.abs().max()).item()]
            torch.backends.cudnn.allow_tf32 = True
            torch.set_float32_matmul_precision("high")
            with autocast("bfloat16"):
                for half in (model(**inputs), call_peer(peer, inputs)):
                    errors.append(((half - exact).abs().max() / exact.abs().max()).item())
        yield [name, *(f"{error:.1e}" for error in errors)]


def compare_speed() -> Iterator[Row]:
    """images a second, forward / training step, and peak GiB of a training step"""
    yield ["network, precision", "ours", "diffusers", "its channels last", "ours channels last"]
    for name, full in BATCHES.items():
        model, peer = make_pair(name)
        batch = 2 if options.quick else full
        inputs = make_inputs(name, batch)
        last = inputs | {"x": inputs["x"].to(memory_format=torch.channels_last)}
        for precision in PRECISIONS:
            cells = []
            for side, (network, forward) in make_sides(model, peer, inputs, last).items():
                layout = torch.channels_last if "channels last" in side else torch.contiguous_format
                network.to(memory_format=layout)
                cells.append(measure_side(network, forward, precision, batch))
            yield [f"{name}, {precision}", *cells]


def make_sides(
    model: UNet, peer: nn.Module, inputs: dict[str, Tensor], last: dict[str, Tensor]
) -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    """Return network and forward call of each side; `last` are the inputs with the channels last."""
    return {
        "ours": (model, lambda: model(**inputs)),
        "diffusers": (peer, lambda: call_peer(peer, inputs)),
        "its channels last": (peer, lambda: call_peer(peer, last)),
        "ours channels last": (model, lambda: model(**last)),
    }


def compare_compiled() -> Iterator[Row]:
    """images a second, forward / training step, and peak GiB of a step in bfloat16, through torch.compile"""
    yield ["network", "ours, channels as given", "ours, channels last", "diffusers, channels last"]
    for name in ("ddpm-cifar10", "sd-1.5")[: 1 if options.quick else 2]:
        model, peer = make_pair(name)
        batch = 2 if options.quick else BATCHES[name]
        inputs = make_inputs(name, batch)
        last = inputs | {"x": inputs["x"].to(memory_format=torch.channels_last)}
        ours, theirs = torch.compile(model), torch.compile(peer)
        cells = []
        for network, forward, layout in (
            (model, lambda f=ours, i=inputs: f(**i), torch.contiguous_format),
            (model, lambda f=ours, i=last: f(**i), torch.channels_last),
            (peer, lambda f=theirs, i=last: call_peer(f, i), torch.channels_last),
        ):
            network.to(memory_format=layout)
            cells.append(measure_side(network, forward, "bfloat16", batch))
        yield [name, *cells]


def measure_side(network: nn.Module, forward: Callable[[], Tensor], precision: str, batch: int) -> str:
    """Return images a second, forward and training step, and the peak GiB of a step."""

    def predict() -> None:
        with torch.no_grad(), autocast(precision):
            forward()

    speed, gib = measure_training(network, forward, precision, batch)
    return f"{batch / measure(predict):.0f} / {speed:.0f}, {gib:.1f}"


def measure_training(
    network: nn.Module, forward: Callable[[], Tensor], precision: str, batch: int
) -> tuple[float, float]:
    """Return images a second of a training step, and its peak memory in GiB."""
    optimizer = torch.optim.AdamW(network.parameters(), 1e-6, fused=options.device == "cuda")

    def train() -> None:
        with autocast(precision):
            loss = forward().float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return batch / measure(train), peak_gib(train)


def compare_sampling() -> Iterator[Row]:
    """50 steps of ddim with guidance 2 and 64 images, class-conditional network of ddpm-cifar10's size, bfloat16"""
    yield ["way", "images/s"]
    torch.manual_seed(0)
    config = replace(make_config("ddpm-cifar10"), num_classes=10, learned_null=True)
    model = UNet.from_config(config).to(options.device, torch.bfloat16).eval()
    count, steps = (2, 4) if options.quick else (64, 50)
    labels = torch.arange(count, device=options.device) % 10
    ways: dict[str, dict[str, Any]] = {"plain": {}, "reuse 5": {"reuse": 5}, "compiled": {"compile": True}}
    for way, more in ways.items():
        if options.quick and way == "compiled":
            continue
        request = {"class_labels": labels, "guidance_scale": 2.0, "sampler": "ddim", "num_inference_steps": steps}
        call = lambda request=request | more: sample(model, Diffusion(), seeds=range(count), **request)  # noqa: E731
        yield [way, f"{count / measure(call, 3):.1f}"]


def compare_sharding() -> Iterator[Row]:
    """training step of sd-1.5 in bfloat16: FSDP2 on one device, and plain"""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    yield ["way", "images/s, GiB"]
    batch = 2 if options.quick else BATCHES["sd-1.5"]
    inputs = make_inputs("sd-1.5", batch)
    with tempfile.NamedTemporaryFile() as file:
        backend = "nccl" if options.device == "cuda" else "gloo"
        init_process_group(backend, init_method=f"file://{file.name}", rank=0, world_size=1)
        try:
            for way in ("plain", "FSDP2"):
                model = copy.deepcopy(make_pair("sd-1.5")[0])
                if way == "FSDP2":
                    mesh = init_device_mesh(options.device, (1,))
                    for block in [*model.encoder, *model.bottleneck, *model.decoder, model]:
                        fully_shard(block, mesh=mesh)
                speed, gib = (
                    measure_side(model, lambda m=model: m(**inputs), "bfloat16", batch).split(" / ")[1].split(",")
                )
                yield [way, f"{speed},{gib}"]
        finally:
            destroy_process_group()


def train_digits() -> Iterator[Row]:
    """class-conditional training on the demo's digits, enlarged to 32x32, for up to a minute"""
    yield ["images/s", "steps", "loss", "picture"]
    digits = load_data("digits")
    images = torch.stack([digits[i]["image"] for i in range(len(digits))])
    images = torch.nn.functional.interpolate(images, size=32, mode="bilinear")
    data = [{"image": x, "class_labels": int(label)} for x, label in zip(images, digits.labels, strict=True)]
    width, steps = (8, 2) if options.quick else (96, 1500)
    model = UNet(
        in_channels=1, model_channels=width, out_channels=1, channel_mult=(1, 2, 2), attention_resolutions=(16, 8),
        num_heads=4, context_dim=None, image_size=32, num_classes=10, norm_groups=8,
    )  # fmt: skip
    training = TrainingConfig(
        steps=steps,
        batch_size=8 if options.quick else 256,
        device=options.device,
        mixed_precision="no" if options.quick else "bf16",
        num_workers=0,
    )
    trainer = Trainer(model, Diffusion(), data, training)
    start, losses = time.perf_counter(), []
    for step in trainer.steps():
        losses.append(step.loss.detach())
        if step.step % 50 == 0 and time.perf_counter() - start > 60:
            break
    synchronize()
    speed = len(losses) * training.batch_size / (time.perf_counter() - start)
    request = {
        "class_labels": torch.arange(80) // 8,
        "guidance_scale": 2.0,
        "num_inference_steps": 2 if options.quick else 25,
    }
    with trainer.ema.swapped():
        samples = sample(trainer.model, Diffusion(), seeds=range(80), **request)
    save_grid(samples.cpu(), options.out / "digits.png")
    loss = float(np.mean([float(value) for value in losses[-100:]]))
    yield [f"{speed:.0f}", str(len(losses)), f"{loss:.4f}", str(options.out / "digits.png")]


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "parity": compare_outputs,
    "speed": compare_speed,
    "sharding": compare_sharding,
    "training": train_digits,
    "sampling": compare_sampling,
    "compiled": compare_compiled,
}

if __name__ == "__main__":
    main()
