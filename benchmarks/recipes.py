"""Recipes of training compared after as many images: the distance of samples to held-out images of Fashion-MNIST.

All train the network that `train` chooses on a CPU, without conditions, on as many images (--steps batches of 32), with
the learning rate's warm-up and cosine over them. One training keeps several averages of its weights (EMA), a column
each. Prints a row for each training as it is done; --jobs trainings run at once, each with one thread.

Run: python benchmarks/recipes.py fashion.npz test.npz [--steps 2000] [--seeds 0 1] [--device cuda --jobs 12]
The files have "images" (N, 28, 28, 1), as `train` takes them.
"""

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import format_machine, read_command, read_machine
from torch import Tensor, nn

from unet_denoiser import Diffusion, DiffusionConfig, TrainingConfig, UNet, load_data, sample
from unet_denoiser.config.defaults import architecture_for, default_learning_rate
from unet_denoiser.diffusion.loss import training_losses
from unet_denoiser.diffusion.loss_weighting import LossWeighting
from unet_denoiser.evaluation.feature_extractors import dataset_features, extract, load_extractor
from unet_denoiser.evaluation.metrics import kernel_distance
from unet_denoiser.training.ema import EMA
from unet_denoiser.training.schedule import learning_rate_at

BATCH, SAMPLE_BATCH, HELD_OUT = 32, 50, 2000


@dataclass(frozen=True)
class Recipe:
    """What differs from the defaults: options of the process and of training, the batch, the optimizer."""

    process: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    batches: tuple[int, int] = (BATCH, BATCH)  # at the first and at the last step; it grows with the images seen
    muon: bool = False
    samplings: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})


def _lr(rate: float) -> dict[str, Any]:
    return {"training": {"learning_rate": rate}}


RECIPES = {
    "default": Recipe(
        samplings={
            "": {},
            ", quadratic steps": {"timestep_spacing": "quadratic"},
            ", ddim 25": {"sampler": "ddim"},
            ", heun 13": {"sampler": "heun", "num_inference_steps": 13},
        }
    ),
    "flow, logit-normal times": Recipe({"path": "flow"}),
    "flow, uniform times": Recipe({"path": "flow", "density": "uniform"}),
    "EDM": Recipe({"path": "edm"}),
    "EDM, learned weighting": Recipe({"path": "edm"}, {"loss_weighting": "learned"}),
    "logit-normal times": Recipe({"density": "logit_normal"}),
    "learned weighting": Recipe(training={"loss_weighting": "learned"}),
    "min-SNR": Recipe(training={"loss_weighting": "min_snr"}),
    "learning rate x 0.5": Recipe(**_lr(5e-4)),
    "learning rate x 2": Recipe(**_lr(2e-3)),
    "batch 16": Recipe(batches=(16, 16)),
    "batch 16 to 64": Recipe(batches=(16, 64)),
    "batch 64, learning rate x 2": Recipe(batches=(64, 64), **_lr(2e-3)),
    "Muon": Recipe(muon=True),
    "Muon, learning rate x 2": Recipe(muon=True, **_lr(2e-3)),
}


class Muon:
    """AdamW, but Muon (Jordan 2024) for matrices and for convolutions as matrices (out, in x kernel).

    The first and the last layer and embeddings stay with AdamW, as its author advises. Updates are scaled to AdamW's
    size (Liu et al. 2025, "Muon is scalable for LLM training"), so that they share the learning rate.
    """

    def __init__(self, model: UNet, learning_rate: float, weight_decay: float) -> None:
        inner = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        inner -= {id(model.input_conv.weight), id(model.output[-1].weight)}
        parameters = list(model.parameters())
        self.matrices = [p for p in parameters if id(p) in inner]
        self.views = [p.detach().flatten(1) for p in self.matrices]  # share their memory
        rest = [p for p in parameters if id(p) not in inner]
        options: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
        self.parts = [
            torch.optim.Muon(self.views, adjust_lr_fn="match_rms_adamw", **options),
            torch.optim.AdamW(rest, fused=True, **options),
        ]
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for view, p in zip(self.views, self.matrices, strict=True):
            view.grad = None if p.grad is None else p.grad.flatten(1)
        for part in self.parts:
            part.step()


def train(recipe: Recipe, images: Tensor, steps: int, seed: int, decays: list[float]) -> tuple[UNet, list[EMA], int]:
    """Train a network on `steps` batches of 32 images; return it, its averages, and the number of optimizer steps."""
    device, config = images.device, TrainingConfig(**{"steps": steps, **recipe.training})
    process = make_process(recipe)
    torch.manual_seed(seed)
    architecture = architecture_for(1, images.shape[2:], None, {}, on_cpu=True)
    model = UNet.from_config(architecture).to(device)
    rate = config.learning_rate or default_learning_rate(architecture.model_channels)
    if recipe.muon:
        optimizer: Any = Muon(model, rate, config.weight_decay)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=config.weight_decay, fused=True)
    averages = [EMA(model, decay) for decay in decays]
    weighting = LossWeighting(process.prediction, process.snr, config, device)
    seen, updates = 0, 0
    for x0 in batches(images, recipe.batches, steps * BATCH):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(seen // BATCH, rate, config)
        loss = training_losses(process, model, x0, weighting=weighting).loss.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        weighting.step(lambda gradient: gradient)
        model.zero_grad()
        weighting.zero_grad()
        for average in averages:
            average.update()
        seen, updates = seen + len(x0), updates + 1
    return model.eval(), averages, updates


def make_process(recipe: Recipe) -> Diffusion:
    return Diffusion(**asdict(DiffusionConfig(**recipe.process)))


def batches(images: Tensor, sizes: tuple[int, int], total: int) -> Iterator[Tensor]:
    """Yield batches that grow evenly with the images seen, shuffled in each pass through the data."""
    seen, order = 0, images.new_empty(0, dtype=torch.long)
    while seen < total:
        size = round(sizes[0] + (sizes[1] - sizes[0]) * seen / total)
        if len(order) < size:
            order = torch.randperm(len(images), device=images.device)
        chosen, order = order[:size], order[size:]
        yield images[chosen].float() / 127.5 - 1
        seen += size


def read_held_out(options: argparse.Namespace) -> Tensor:
    """Return the features of the held-out images, which are computed once."""
    data = load_data(str(options.held_out))
    indices = np.arange(min(HELD_OUT, len(data)))
    return dataset_features(data, indices, load_extractor("efficientnet-lite0", options.device), "held-out images")


def judge(recipe: Recipe, model: UNet, averages: list[EMA], options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the cells of each sampling: 1000 x the kernel distance of samples to the held-out images."""
    extractor, real = load_extractor("efficientnet-lite0", options.device), options.real
    process, cells = make_process(recipe), {name: [] for name in recipe.samplings}
    for average in averages:
        with average.swapped():
            for name, sampling in recipe.samplings.items():
                x = sample(model, process, seeds=range(options.num_samples), batch_size=SAMPLE_BATCH, **sampling)
                found = kernel_distance(extract(extractor, x.clamp(-1, 1).split(SAMPLE_BATCH)), real)
                cells[name].append(f"{1e3 * found.value:.1f} ± {1e3 * found.standard_error:.1f}")
    return cells


def load_images(path: Path) -> Tensor:
    """Return images (N, 1, 28, 28), integers."""
    return torch.from_numpy(np.load(path)["images"]).permute(0, 3, 1, 2).contiguous()


def run(name: str, seed: int, options: argparse.Namespace) -> list[str]:
    """Train and sample by a recipe; return the lines of its rows."""
    torch.set_num_threads(1)
    start, images = time.perf_counter(), load_images(options.data).to(options.device)
    model, averages, updates = train(RECIPES[name], images, options.steps, seed, options.ema_decays)
    seconds, cells = time.perf_counter() - start, judge(RECIPES[name], model, averages, options)
    return [
        " | ".join([f"{name}{sampling}", str(seed), *row, str(updates), f"{seconds:.0f}"])
        for sampling, row in cells.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="TRAIN.npz")
    parser.add_argument("held_out", type=Path, metavar="TEST.npz")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--ema-decays", type=float, nargs="+", default=[0.99, 0.995, 0.998, 0.999])
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    print(format_machine(read_machine(), read_command()))
    options.real = read_held_out(options)
    print(" | ".join(["recipe", "seed", *(f"EMA {decay:g}" for decay in options.ema_decays), "updates", "seconds"]))
    print("|".join(["---", *["--:"] * (len(options.ema_decays) + 3)]), flush=True)
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(run, name, seed, options): name for seed in options.seeds for name in options.only}
        for job in as_completed(jobs):
            print("\n".join(job.result()), flush=True)


if __name__ == "__main__":
    main()
