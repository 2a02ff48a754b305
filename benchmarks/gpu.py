"""Speed, memory and parity on a GPU, beside diffusers with the same weights. Needs torch, diffusers and this package.

    python benchmarks/gpu.py --out gpu                        # at most 8 minutes on an H100
    python benchmarks/gpu.py --quick --device cpu --out gpu   # small networks, to see that it works

Prints one table a part, the most telling first. An error costs one part, or one row where code is compiled. Each time
is the fastest of several rounds; how far they lie apart is in the column "spread", the slowest round over the fastest.
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
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from gpu_networks import (
    BATCHES,
    autocast,
    batch_size,
    call_peer,
    make_config,
    make_inputs,
    make_pair,
    make_sides,
    make_step,
    measure,
    options,
    step_gib,
    synchronize,
)
from measure import format_table
from torch import Tensor, nn

from unet_denoiser import Diffusion, Trainer, UNet, load_data, sample, save_grid
from unet_denoiser.sampling import cached_unet

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Row = list[str]
failures: list[str] = []  # tracebacks of the cells of a part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small networks, one repetition, kernels not compiled")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for the picture and the report")
    parser.add_argument("--minutes", type=float, default=6.5, help="no row begins after this time; one may take 1.5")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    vars(options).clear()
    parser.parse_args(namespace=options)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.quick:  # graphs are traced, which takes seconds, but no kernels are made
        torch.compile = partial(torch.compile, backend="eager")  # type: ignore[assignment]
    allow_tf32(True)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    report(f"{name}; torch {torch.__version__}, diffusers {diffusers.__version__}")
    begun = time.perf_counter()
    for part in options.only:
        report(f"\n## {part} ({PARTS[part].__doc__})\n")
        start, rows, end = time.perf_counter(), [], ""
        failures.clear()
        try:
            for row in PARTS[part]():  # keeps the rows that came before an error
                rows.append(row)
                if time.perf_counter() - begun > 60 * options.minutes:
                    end = f"\n\nstopped here: {options.minutes} minutes have passed"
                    break
        except Exception:
            failures.append(traceback.format_exc())
        report("\n".join([format_table(rows[0], rows[1:]) + end, *failures]) if rows else "\n".join(failures))
        gc.collect()
        report(f"\n{time.perf_counter() - start:.0f} s")


def report(text: str) -> None:
    """Print a text and append it to the report."""
    print(text, flush=True)
    with (options.out / "report.md").open("a") as file:
        file.write(text + "\n")


def attempt(measurement: Callable[[], Row], columns: int) -> Row:
    """Return the cells of a row; an error costs this row alone, and stands below the table."""
    try:
        return measurement()
    except Exception as error:
        failures.append(traceback.format_exc())
        return [f"failed: {type(error).__name__}", *[""] * (columns - 1)]


def allow_tf32(allow: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow


def compare_outputs() -> Iterator[Row]:
    """largest difference between ours and diffusers, over the largest output"""
    yield ["network", *PRECISIONS, "diffusers in bfloat16 from float32"]
    for name in BATCHES:
        (model, peer), inputs = make_pair(name), make_inputs(name, 2)
        with torch.no_grad():
            allow_tf32(False)
            exact = call_peer(peer, inputs)
            errors = [((model(**inputs) - exact).abs().max() / exact.abs().max()).item()]
            allow_tf32(True)
            with autocast("bfloat16"):
                for half in (model(**inputs), call_peer(peer, inputs)):
                    errors.append(((half - exact).abs().max() / exact.abs().max()).item())
        yield [name, *(f"{error:.1e}" for error in errors)]


def compare_speed() -> Iterator[Row]:
    """images a second, forward / training step, and the peak GiB that a step adds"""
    yield ["network, precision", "ours", "diffusers", "its channels last", "ours channels last", "spread"]
    for name in BATCHES:
        sides = make_sides(name, *make_pair(name))
        for precision in PRECISIONS:
            cells = [measure_side(*side, name, precision) for side in sides.values()]
            largest = max((spread for _, spread in cells), key=float)
            yield [f"{name}, {precision}", *(cell for cell, _ in cells), largest]


def compare_compiled() -> Iterator[Row]:
    """a training step in bfloat16 of the whole network through torch.compile, channels as given"""
    yield ["network, side", "images/s", "GiB of a step", "first step, s", "spread"]
    for name in ("ddpm-cifar10", "sd-1.5"):
        sides = make_sides(name, *make_pair(name), wrap=torch.compile)
        for side in ("ours", "diffusers"):
            network, forward, layout = sides[side]
            train = make_step(network.to(memory_format=layout), forward, "bfloat16")
            yield [f"{name}, {side}", *attempt(partial(_compiled_speed, train, batch_size(name)), 4)]


def _compiled_speed(train: Callable[[], Any], batch: int) -> Row:
    start = time.perf_counter()
    train()
    synchronize()
    first = time.perf_counter() - start
    seconds, spread = measure(train)
    return [f"{batch / seconds:.0f}", f"{step_gib(train):.1f}", f"{first:.0f}", f"{spread:.2f}"]


def measure_side(
    network: nn.Module, forward: Callable[[], Tensor], layout: torch.memory_format, name: str, precision: str
) -> tuple[str, str]:
    """Return images a second, forward and training step, and the GiB of a step; and the larger spread."""
    network.to(memory_format=layout)

    def predict() -> None:
        with torch.no_grad(), autocast(precision):
            forward()

    train = make_step(network, forward, precision)
    (forward_seconds, forward_spread), (step_seconds, step_spread) = measure(predict), measure(train)
    speeds = (f"{batch_size(name) / seconds:.0f}" for seconds in (forward_seconds, step_seconds))
    cell = f"{' / '.join(speeds)}, {step_gib(train):.1f}"
    return cell, f"{max(forward_spread, step_spread):.2f}"


def compare_sampling() -> Iterator[Row]:
    """50 steps of ddim with guidance 2, class-conditional network of ddpm-cifar10's size, bfloat16 weights"""
    yield ["images, way", "images/s", "spread"]
    torch.manual_seed(0)
    config = replace(make_config("ddpm-cifar10"), num_classes=10, learned_null=True)
    model = UNet.from_config(config).to(options.device, torch.bfloat16).eval()
    steps, compiled = 4 if options.quick else 50, cached_unet._compile
    for count in (2, 3) if options.quick else (4, 64):
        request = {"class_labels": torch.arange(count) % 10, "guidance_scale": 2.0, "sampler": "ddim"}
        call = partial(sample, model, Diffusion(), seeds=range(count), num_inference_steps=steps, **request)
        torch.compiler.reset()  # so that sizes are constants in each graph
        ways: dict[str, dict[str, Any]] = {"plain": {}, "reuse 5": {"reuse": 5}, "graphs": {"compile": True}}
        ways |= {"compiled without graphs": {"compile": True}} if count < 64 else {}
        for way, more in ways.items():
            alone = patch.object(cached_unet, "_compile", lambda part, graphs: compiled(part, False))
            with alone if way == "compiled without graphs" else nullcontext():
                yield [f"{count}, {way}", *attempt(partial(_sampling_speed, partial(call, **more), count), 2)]


def _sampling_speed(call: Callable[[], Any], count: int) -> Row:
    seconds, spread = measure(call, rounds=3)
    return [f"{count / seconds:.1f}", f"{spread:.2f}"]


def train_digits() -> Iterator[Row]:
    """class-conditional training on the demo's digits, enlarged to 32x32, for up to 25 s a row"""
    yield ["way", "images/s", "first step, s", "steps", "loss"]
    digits = load_data("digits")
    images = torch.stack([digits[i]["image"] for i in range(len(digits))])
    images = torch.nn.functional.interpolate(images, size=32, mode="bilinear")
    data = [{"image": x, "class_labels": int(label)} for x, label in zip(images, digits.labels, strict=True)]
    width, steps = (8, 3) if options.quick else (96, 1500)
    batch = 8 if options.quick else 256
    training: dict[str, Any] = {"steps": steps, "batch_size": batch, "device": options.device, "num_workers": 0}
    for way in ("as it comes", "compiled"):
        model = UNet(
            in_channels=1, model_channels=width, out_channels=1, channel_mult=(1, 2, 2), attention_resolutions=(16, 8),
            num_heads=4, context_dim=None, image_size=32, num_classes=10, norm_groups=8,
        )  # fmt: skip
        yield [way, *attempt(partial(_train, model, data, training | {"compile": way == "compiled"}), 4)]


def _train(model: UNet, data: list[Any], config: dict[str, Any]) -> Row:
    """Train for up to 25 s, save images, and return the cells of the row."""
    trainer = Trainer(model, Diffusion(), data, config)
    start, losses, first = time.perf_counter(), [], 0.0
    for step in trainer.steps():
        losses.append(step.loss.detach())
        if step.step == 1:
            synchronize()
            first = time.perf_counter() - start
        if step.step % 50 == 0 and time.perf_counter() - start > 25:
            break
    synchronize()
    speed = (len(losses) - 1) * trainer.config.batch_size / (time.perf_counter() - start - first)
    loss = float(np.mean([float(value) for value in losses[-100:]]))
    request = {"guidance_scale": 2.0, "num_inference_steps": 2 if options.quick else 25}
    with trainer.ema.swapped():
        samples = sample(trainer.model, Diffusion(), seeds=range(80), class_labels=torch.arange(80) // 8, **request)
    save_grid(samples.cpu(), options.out / "digits.png")
    return [f"{speed:.0f}", f"{first:.1f}", str(len(losses)), f"{loss:.4f}"]


def compare_sharding() -> Iterator[Row]:
    """training step of sd-1.5 in bfloat16: FSDP2 on one device, and plain"""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    yield ["way", "images/s", "GiB of a step", "spread"]
    name = "sd-1.5"
    inputs = make_inputs(name, batch_size(name))
    with tempfile.NamedTemporaryFile() as file:
        backend = "nccl" if options.device == "cuda" else "gloo"
        init_process_group(backend, init_method=f"file://{file.name}", rank=0, world_size=1)
        try:
            for way in ("plain", "FSDP2"):
                model = copy.deepcopy(make_pair(name)[0])
                model.to(memory_format=torch.contiguous_format)  # FSDP takes no other
                if way == "FSDP2":
                    mesh = init_device_mesh(options.device, (1,))
                    for block in [*model.encoder, *model.bottleneck, *model.decoder, model]:
                        fully_shard(block, mesh=mesh)
                train = make_step(model, partial(model, **inputs), "bfloat16")
                seconds, spread = measure(train)
                yield [way, f"{batch_size(name) / seconds:.1f}", f"{step_gib(train):.1f}", f"{spread:.2f}"]
        finally:
            destroy_process_group()


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "parity": compare_outputs,
    "speed": compare_speed,
    "training": train_digits,
    "sharding": compare_sharding,
    "sampling": compare_sampling,
    "compiled": compare_compiled,
}

if __name__ == "__main__":
    main()
