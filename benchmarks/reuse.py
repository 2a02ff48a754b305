"""Guided sampling with feature caching (DeepCache): its time beside diffusers' loop, and its effect on the samples.

First both sides must make the same images from the same noise. Then times are measured in turn in one process, and then
the kernel distance of samples to held-out images for many settings. Features of samples are stored in --cache batch by
batch, so that a benchmark that was stopped continues.

Run: python benchmarks/reuse.py fashion=RUN:TEST.npz photos=RUN:TEST.npz [--count 2000] [--quick]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from measure import format_machine, format_table, measure_seconds, print_progress, read_machine
from torch import Tensor

from unet_denoiser import Run, UNet, load_data, sample, save_grid
from unet_denoiser.config.data import DataConfig
from unet_denoiser.convert.checkpoint import export_checkpoint
from unet_denoiser.evaluation.feature_extractors import Extractor, load_extractor
from unet_denoiser.evaluation.metrics import kernel_distance
from unet_denoiser.sampling.pipeline.npz_shards import digest_weights
from unet_denoiser.utils.files import write_atomically

GUIDANCE_SCALE, FEATURE_BATCH, MAX_ERROR = 2.0, 100, 1e-4
SAMPLE_BATCH = 16  # with more samples per call, features of such a network leave the cache of a CPU
SCHEDULERS = {"ddim": diffusers.DDIMScheduler, "dpm++": diffusers.DPMSolverMultistepScheduler}
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Options of sampling."""

    sampler: str
    steps: int
    reuse: int | None = None
    part: float = 1.0  # of --count; a quarter for settings that only show how the curve continues
    ours: bool = True  # False: in diffusers' loop

    def __str__(self) -> str:
        return f"{self.sampler} {self.steps}" + (f" reuse {self.reuse}" if self.reuse else "")


SETTINGS = [
    Setting("ddim", 50),
    Setting("ddim", 50, 5),
    *(Setting("ddim", 50, n, 0.25) for n in (3, 8)),
    *(Setting("dpm++", steps, None, 0.25) for steps in (25, 10)),
]


class Side:
    """A run's network, and the same weights in diffusers' class."""

    def __init__(self, name: str, run: Path, test: Path) -> None:
        self.name, self.run, self.test = name, Run.load(run), test
        self.model = self.run.load_model()
        self.peer, self.null = to_diffusers(self.model), self.run.model.num_classes
        self.key = digest_weights(self.model)[:16]

    def labels(self, seeds: range) -> Tensor:
        return torch.tensor([seed % self.null for seed in seeds])

    def sample(self, setting: Setting, seeds: range, **options: Any) -> Tensor:
        """Make the samples of these seeds."""
        if not setting.ours:
            return sample_with_diffusers(self, setting, seeds)
        options |= {"sampler": setting.sampler, "num_inference_steps": setting.steps, "reuse": setting.reuse}
        labels = self.labels(seeds)
        return sample(
            self.model,
            self.run.process,
            seeds=seeds,
            class_labels=labels,
            guidance_scale=GUIDANCE_SCALE,
            batch_size=SAMPLE_BATCH,
            **options,
        )


def to_diffusers(model: UNet) -> diffusers.UNet2DModel:
    """Convert the network; its null class becomes another class."""
    state = model.state_dict()
    null = state.pop("null_class")
    state["class_embedding.weight"] = torch.cat([state["class_embedding.weight"], null[None]])
    config = replace(model.config, learned_null=False, num_classes=model.config.num_classes + 1)
    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(state, config, Path(folder), "diffusers")
        return diffusers.UNet2DModel.from_pretrained(folder).eval()


@torch.no_grad()
def sample_with_diffusers(side: Side, setting: Setting, seeds: range) -> Tensor:
    """Sample as diffusers' pipelines do: both halves of the guidance in one batch."""
    scheduler = SCHEDULERS[setting.sampler].from_config(side.run.process.scheduler.config)
    scheduler.set_timesteps(setting.steps)
    config, labels = side.run.model, side.labels(seeds)
    size = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    noise = [torch.randn(config.in_channels, *size, generator=torch.Generator().manual_seed(i)) for i in seeds]
    x = torch.stack(noise) * scheduler.init_noise_sigma
    labels = torch.cat([labels, torch.full_like(labels, side.null)])
    # ours recomputes the noise after clipping x0, too; without it diffusers keeps the noise of the unclipped x0
    clipped = {"use_clipped_model_output": True} if setting.sampler == "ddim" else {}
    for t in scheduler.timesteps:
        output = side.peer(scheduler.scale_model_input(torch.cat([x, x]), t), t, class_labels=labels).sample
        conditional, unconditional = output.chunk(2)
        output = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
        x = scheduler.step(output, t, x, **clipped).prev_sample
    return x


def check_images(side: Side) -> dict[str, float]:
    """Return the largest difference of images between both sides; end if it is too large to compare times."""
    errors = {}
    for name in SCHEDULERS:
        setting = Setting(name, 10)
        ours = side.sample(setting, range(4), clip_sample=name == "ddim")  # diffusers' dpm++ does not clip
        theirs = side.sample(diffusers_setting(setting), range(4))
        errors[name] = (ours - theirs).abs().max().item()
    print_progress(f"{side.name}, largest difference of images in [-1, 1]:", errors)
    if not max(errors.values()) <= MAX_ERROR:
        raise SystemExit(f"{side.name}: the sides' images differ by {max(errors.values()):.1e}")
    return errors


def diffusers_setting(setting: Setting) -> Setting:
    """Return the setting of diffusers' loop that this one is compared with."""
    return Setting(setting.sampler, setting.steps, ours=False)


def measure_times(side: Side, options: argparse.Namespace) -> dict[Setting, float]:
    """Measure the seconds per image of every setting, and of diffusers' loop."""
    settings = [*SETTINGS, *(diffusers_setting(s) for s in SETTINGS if s.reuse is None)]
    seeds = range(options.batch)
    calls: dict[str, Callable[[], Any]] = {repr(s): partial(side.sample, s, seeds) for s in settings}
    for setting in settings:
        side.sample(replace(setting, steps=2), seeds)  # warm up, and cache transformed weights
    seconds = measure_seconds(calls, options.rounds)
    found = {s: seconds[repr(s)] / options.batch for s in settings}
    print_progress(
        f"{side.name}, ms an image:", {f"{s}{'' if s.ours else ' (diffusers)'}": 1e3 * found[s] for s in settings}
    )
    return found


def read_features(side: Side, setting: Setting, extractor: Extractor, options: argparse.Namespace) -> Tensor:
    """Read the features of the setting's samples from the cache, or compute them in batches."""
    count, size = round(setting.part * options.count), min(FEATURE_BATCH, options.count)
    folder = options.cache / side.name / side.key / f"{extractor.name}-{size}"
    folder.mkdir(parents=True, exist_ok=True)
    batches = []
    for start in range(0, count, FEATURE_BATCH):
        path = folder / f"{str(setting).replace(' ', '-')}-{start:06d}.npy"
        if not path.exists():
            start_seconds = time.perf_counter()
            images = side.sample(setting, range(start, start + size))
            found = extractor(images).cpu().numpy()
            write_atomically(path, partial(_save, array=found))
            if start == 0:
                save_grid(images[:40], folder / f"{str(setting).replace(' ', '-')}.png", 10)
            print_progress(
                f"{side.name}, {setting}: {start + size} of {count},", {"s": time.perf_counter() - start_seconds}
            )
        batches.append(torch.from_numpy(np.load(path)))
    return torch.cat(batches)[:count]


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def read_reference(side: Side, extractor: Extractor, count: int, cache: Path) -> Tensor:
    """Read the features of `count` held-out images from the cache, or compute them."""
    path = cache / side.name / f"test-{extractor.name}-{count}.npy"
    if not path.exists():
        data = load_data(DataConfig(str(side.test)))
        batches = [
            torch.stack([data[i]["image"] for i in range(j, min(j + FEATURE_BATCH, count))])
            for j in range(0, count, FEATURE_BATCH)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        found = np.concatenate([extractor(batch).cpu().numpy() for batch in batches])
        write_atomically(path, partial(_save, array=found))
    return torch.from_numpy(np.load(path))


def measure(side: Side, extractor: Extractor, options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each setting: seconds per image, share of diffusers' time, distance with its standard error."""
    errors = check_images(side)
    seconds = measure_times(side, options)
    total = sum(seconds[s] * s.part for s in SETTINGS) * options.count
    print_progress(
        f"{side.name}: sampling takes {total / 3600:.1f} h at this speed, less what is kept in {options.cache}"
    )
    real = read_reference(side, extractor, options.count, options.cache)
    full: dict[tuple[str, int], Any] = {}
    for s in SETTINGS:
        kid = kernel_distance(read_features(side, s, extractor, options), real)
        if s.reuse is None:
            full[s.sampler, s.steps] = kid
        base = full[s.sampler, s.steps]
        plain = seconds[diffusers_setting(s)]
        allowed = max(0.1 * abs(base.value), 2 * base.standard_error)
        yield {
            "network": side.name,
            "sampler": s.sampler,
            "steps": s.steps,
            "reuse": s.reuse,
            "samples": round(s.part * options.count),
            "seconds": seconds[s],
            "diffusers": plain,
            "share": seconds[s] / plain,
            "kid": kid.value,
            "error": kid.standard_error,
            "within": abs(kid.value - base.value) <= allowed,
            "difference": max(errors.values()),
        }


def format_results(about: Mapping[str, Any], found: list[Row], options: argparse.Namespace, name: str) -> str:
    """Return a table for each network."""
    parts = [
        format_machine(about, "python benchmarks/reuse.py " + " ".join(options.runs)),
        f"Guidance {GUIDANCE_SCALE}, batches of {options.batch} for the times. Distance: the "
        f"kernel distance of {name} features to held-out images, +- its standard error. Within: less than 10 % or two "
        "standard errors from the full computation's.",
    ]
    for network in dict.fromkeys(row["network"] for row in found):
        body = [
            [
                f"{row['sampler']}, {row['steps']} steps",
                str(row["reuse"] or "off"),
                f"{row['samples']:,}",
                f"{1e3 * row['seconds']:.1f}",
                f"{1e3 * row['diffusers']:.1f}",
                f"{row['share']:.2f}",
                f"{1e3 * row['kid']:.2f} +- {1e3 * row['error']:.2f}",
                "yes" if row["within"] else "no",
            ]
            for row in found
            if row["network"] == network
        ]
        head = ["", "reuse", "samples", "ms an image", "diffusers, ms", "share", "1000 x distance", "within"]
        parts += [f"### {network}", format_table(head, body)]
    return "\n\n".join(parts)


def plot(found: list[Row], path: Path) -> None:
    """Plot distance against time: a panel for each network, a line for each sampler and number of steps."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    networks = list(dict.fromkeys(row["network"] for row in found))
    figure, panels = plt.subplots(1, len(networks), figsize=(5 * len(networks), 4), squeeze=False)
    for panel, network in zip(panels[0], networks, strict=True):
        of_network = [row for row in found if row["network"] == network]
        for sampler, steps in dict.fromkeys((row["sampler"], row["steps"]) for row in of_network):
            line = [row for row in of_network if (row["sampler"], row["steps"]) == (sampler, steps)]
            x, y = [1e3 * row["seconds"] for row in line], [1e3 * row["kid"] for row in line]
            drawn = panel.errorbar(
                x, y, [1e3 * row["error"] for row in line], marker="o", capsize=2, label=f"{sampler}, {steps} steps"
            )
            for row, a, b in zip(line, x, y, strict=True):
                panel.annotate(f" {row['reuse'] or 'full'}", (a, b), fontsize=7, va="bottom")
            panel.plot(1e3 * line[0]["diffusers"], y[0], "x", color=drawn[0].get_color())
        panel.set(title=network, xscale="log", xlabel="ms an image (x: diffusers' loop)")
        panel.set_ylabel("1000 x kernel distance to held-out images")
        panel.legend(fontsize=7)
    figure.tight_layout()
    write_atomically(path, partial(figure.savefig, format="svg"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN:TEST", help="a run with classes, and its held-out images")
    parser.add_argument("--count", type=int, help="samples of each setting (default: 2000)")
    parser.add_argument("--batch", type=int, help="batch size of the time measurements (default: 16)")
    parser.add_argument("--rounds", type=int, help="time measurements of each setting, in turn (default: 3)")
    parser.add_argument("--extractor", default="efficientnet-lite0")
    parser.add_argument("--cache", type=Path, default=Path("runs/reuse"), help="folder of the features")
    parser.add_argument("--svg", type=Path, help="where to draw the figures")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--quick", action="store_true", help="24 samples, batch 4, one round")
    options = parser.parse_args()
    quick = options.quick
    options.count = options.count or (24 if quick else 2000)
    options.batch = options.batch or (4 if quick else 16)
    options.rounds = options.rounds or (1 if quick else 3)
    return options


def main() -> None:
    options, about, found = parse_arguments(), read_machine(), []
    extractor = load_extractor(options.extractor)
    for given in options.runs:
        name, _, paths = given.partition("=")
        run, _, test = paths.rpartition(":")
        found += measure(Side(name, Path(run), Path(test)), extractor, options)
        if options.svg:
            plot(found, options.svg)
        if options.json:
            options.json.write_text(json.dumps({"machine": about, "rows": found}, indent=1) + "\n")
    print(format_results(about, found, options, extractor.name))


if __name__ == "__main__":
    main()
