"""Sample quality after the same training time: our default configuration beside those of two other libraries.

All sides (implementations) train in one process, in turn for --slice seconds each, so that a noisy machine disturbs
them alike; only these slices count. Each side has its own network (of about the same number of parameters), optimizer,
schedule and averaging; see quality_sides.py. Samples are made with the same sampler for all, and at the end with each
library's own as well. Results are stored in --out: a benchmark that was stopped continues there, but a training that
was stopped starts anew.

Run: python benchmarks/quality.py /usr/share/datasets/fashion-mnist --out runs/quality [--minutes 20]
The folder has gzipped idx files; this one belongs to Debian's package dataset-fashion-mnist.
"""

import argparse
import gzip
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import format_machine, format_table, print_progress, read_machine
from PIL import Image
from quality_sides import BATCH_SIZE, SIDES, Ours, Side
from safetensors.torch import load_file, save_file
from torch import Tensor

from unet_denoiser import save_grid
from unet_denoiser.evaluation.feature_extractors import Extractor, extract, load_extractor
from unet_denoiser.evaluation.metrics import frechet_distance, kernel_distance
from unet_denoiser.utils.files import write_atomically

MARKS, OUR_MARK = (0.25, 0.4, 0.5, 1.0), 0.4  # shares of the time after which weights are saved; one for ours alone
SHARED_SAMPLER, NUM_STEPS = "ddim, 25 steps", 25
NUM_HELD_OUT = 4000
HEAD = ["", "minutes", "steps", "1000 x kernel distance", "Frechet distance"]
Row = dict[str, Any]


def read_idx(path: Path) -> np.ndarray:
    """Read an array from a gzipped idx file, the format of MNIST."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load_images(folder: Path, part: str) -> Tensor:
    """Return images (N, 1, 28, 28) in [-1, 1]."""
    return torch.from_numpy(read_idx(folder / f"{part}-images-idx3-ubyte.gz").copy())[:, None] / 127.5 - 1


# ---- training --------------------------------------------------------------------------------------------------------


def count_steps(sides: list[Side], seconds: float) -> dict[str, int]:
    """Return how many steps of each side fit into the time, which schedules need: from the median time in turn."""
    spent: dict[str, list[float]] = {side.name: [] for side in sides}
    for side in sides:
        side.begin(10**6)
        side.step()  # the first one is slow
    for side in sides * 15:
        start = time.perf_counter()
        side.step()
        spent[side.name].append(time.perf_counter() - start)
    return {name: int(seconds / np.median(times)) for name, times in spent.items()}


def train(sides: list[Side], options: argparse.Namespace) -> None:
    """Train each side for its time, and save its averaged weights at the marks."""
    seconds = 60 * options.minutes
    planned = count_steps(sides, seconds)
    print_progress("steps planned:", planned)
    for side in sides:
        side.begin(planned[side.name])
    done = {side.name: {"seconds": 0.0, "steps": 0} for side in sides}
    saved = {share * seconds: sides[:1] if share == OUR_MARK else sides for share in MARKS}
    marks = []
    for end in sorted({*saved, *np.arange(options.slice, seconds, options.slice)}):
        for side in sides:
            progress = done[side.name]
            while progress["seconds"] < end:
                start = time.perf_counter()
                if not side.step():
                    break
                progress["seconds"] += time.perf_counter() - start
                progress["steps"] += 1
        print_progress(f"{end / 60:.2f} min each; steps:", {name: progress["steps"] for name, progress in done.items()})
        for side in saved.get(end, ()):
            path = options.out / f"{side.name}-{end / 60:g}.safetensors"
            write_atomically(path, partial(save_file, side.averaged()))
            marks.append({"side": side.name, "minutes": end / 60, **done[side.name]})
    content = {
        "machine": read_machine(),
        "minutes": options.minutes,
        "slice": options.slice,
        "planned": planned,
        "marks": marks,
    }
    write_atomically(options.out / "training.json", lambda path: path.write_text(json.dumps(content, indent=1)))


# ---- distances -------------------------------------------------------------------------------------------------------


def read_features(path: Path, make: Callable[[], Tensor], extractor: Extractor) -> Tensor:
    """Read features from a file, or compute them from the images that `make` returns and save them."""
    if not path.exists():
        features = extract(extractor, make().split(BATCH_SIZE))
        write_atomically(path, partial(save_file, {"features": features}))
    return load_file(path)["features"]


def make_samples(side: Side, minutes: float, sampler: str, options: argparse.Namespace) -> Tensor:
    """Make samples from one side's weights, and save a picture of the first 40."""
    weights = load_file(options.out / f"{side.name}-{minutes:g}.safetensors")
    start, seeds = time.perf_counter(), range(0, options.num_samples, BATCH_SIZE)
    shared = sampler == SHARED_SAMPLER
    batches = [
        side.sample_shared(weights, seed, NUM_STEPS) if shared else side.sample_own(weights, seed) for seed in seeds
    ]
    images = torch.cat(batches).clamp(-1, 1)
    save_grid(images[:40], options.out / f"{side.name}-{minutes:g}-{'shared' if shared else 'own'}.png", 10)
    print_progress(f"{side.name}, {minutes:g} min, {sampler}:", {"s": time.perf_counter() - start})
    return images


def measure_distances(sides: list[Side], test: Tensor, extractor: Extractor, options: argparse.Namespace) -> list[Row]:
    """Return the distances to held-out images of training images, the floor, and of samples, the last marks first."""
    count = options.num_samples
    real = read_features(options.out / f"held-out-{extractor.name}.safetensors", lambda: test[:NUM_HELD_OUT], extractor)
    images = sides[0].images
    spread = images[torch.linspace(0, len(images) - 1, count).long()]
    rows: list[Row] = []

    def add(features: Tensor, **about: Any) -> None:
        kernel = kernel_distance(features, real)
        distances = {
            "kernel": kernel.value,
            "error": kernel.standard_error,
            "frechet": frechet_distance(features, real),
        }
        rows.append({**about, **distances})

    floor = read_features(
        options.out / f"training-images-{extractor.name}-{count}.safetensors", lambda: spread, extractor
    )
    add(floor, side="training images", minutes=0.0, sampler="", steps=0)
    trained = json.loads((options.out / "training.json").read_text())["marks"]
    for mark in sorted(trained, key=lambda mark: -mark["minutes"]):
        side = next(side for side in sides if side.name == mark["side"])
        samplers = [side.own_sampler] if mark["minutes"] == options.minutes else []
        for sampler in (SHARED_SAMPLER, *samplers):
            which = f"{side.name}-{mark['minutes']:g}-{'shared' if sampler == SHARED_SAMPLER else 'own'}"
            make = partial(make_samples, side, mark["minutes"], sampler, options)
            features = read_features(options.out / f"{which}-{extractor.name}-{count}.safetensors", make, extractor)
            add(features, side=side.name, minutes=mark["minutes"], sampler=sampler, steps=mark["steps"])
            print_progress(f"{which}:", {"1000 x kernel distance": 1e3 * rows[-1]["kernel"]})
    return rows


# ---- results ---------------------------------------------------------------------------------------------------------


def format_results(rows: list[Row], sizes: dict[str, int], options: argparse.Namespace, name: str) -> str:
    """Return the tables and the comparison."""
    trained = json.loads((options.out / "training.json").read_text())
    floor = next(row for row in rows if row["side"] == "training images")
    parameters = ", ".join(f"{side} {count / 1e6:.2f}M" for side, count in sizes.items())
    command = f"python benchmarks/quality.py {options.data} --out {options.out} --minutes {options.minutes:g}"
    lines = [
        format_machine(trained["machine"], command + f" --num-samples {options.num_samples}"),
        f"{options.num_samples} samples against {NUM_HELD_OUT} held-out images, features of {name}. Parameters: "
        f"{parameters}. As many training images are at {1e3 * floor['kernel']:.1f} +- {1e3 * floor['error']:.1f}, "
        f"Frechet distance {floor['frechet']:.1f}.",
    ]
    for title, shared in (
        (f"The same sampler: {SHARED_SAMPLER}", True),
        ("Each library's own sampler, shortened", False),
    ):
        chosen = [row for row in rows if row["side"] in sizes and (row["sampler"] == SHARED_SAMPLER) == shared]
        chosen.sort(key=lambda row: (row["minutes"], list(sizes).index(row["side"])))
        body = [
            [
                row["side"] if shared else f"{row['side']}: {row['sampler']}",
                f"{row['minutes']:g}",
                f"{row['steps']:,}",
                f"{1e3 * row['kernel']:.0f} +- {1e3 * row['error']:.0f}",
                f"{row['frechet']:.1f}",
            ]
            for row in chosen
        ]
        lines += [
            f"### {title}",
            format_table(HEAD, body),
        ]
    return "\n\n".join([*lines, format_comparison(rows, options.minutes)])


def format_comparison(rows: list[Row], minutes: float) -> str:
    """Return our distance as a share of the better peer's, and the minute at which we had reached that distance."""
    found = {(row["side"], row["minutes"]): row["kernel"] for row in rows if row["sampler"] == SHARED_SAMPLER}
    others = {side: kernel for (side, at), kernel in found.items() if at == minutes and side != Ours.name}
    best = min(others, key=lambda side: others[side])
    curve = sorted((at, kernel) for (side, at), kernel in found.items() if side == Ours.name)
    reached = next((at for at, kernel in curve if kernel <= others[best]), None)
    text = f"At {minutes:g} minutes ours is at {found[Ours.name, minutes] / others[best]:.2f} of {best}'s distance"
    if reached is None:
        return text + ", whose figure is not reached."
    return text + f", whose figure we had reached by minute {reached:g}."


def plot(rows: list[Row], sizes: dict[str, int], path: Path) -> None:
    """Plot the distance over minutes, a line for each side."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
    for side in sizes:
        of_side = [row for row in rows if row["side"] == side]
        line = sorted((row for row in of_side if row["sampler"] == SHARED_SAMPLER), key=lambda row: row["minutes"])
        x, y, error = ([row[key] for row in line] for key in ("minutes", "kernel", "error"))
        panel.errorbar(x, [1e3 * v for v in y], [1e3 * v for v in error], marker="o", capsize=2, label=side)
    panel.set(
        yscale="log", xlabel="minutes of training", ylabel="1000 x kernel distance to held-out images", xlim=(0, None)
    )
    for axis_formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        axis_formatter("{x:g}")
    panel.set_title(SHARED_SAMPLER, fontsize=10)
    figure.legend(loc="outside upper center", ncols=len(sizes), fontsize=9)
    write_atomically(path, partial(figure.savefig, format="svg"))


def stack_pictures(sides: list[Side], options: argparse.Namespace) -> None:
    """Save the pictures of each side's last samples, of the same sampler and noise, below each other."""
    pictures = [Image.open(options.out / f"{side.name}-{options.minutes:g}-shared.png") for side in sides]
    height = sum(picture.height + 8 for picture in pictures) - 8
    stack = Image.new(pictures[0].mode, (pictures[0].width, height), "white")
    for i, picture in enumerate(pictures):
        stack.paste(picture, (0, i * (picture.height + 8)))
    write_atomically(options.png, partial(stack.save, format="PNG"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="FOLDER", help="with train-images-idx3-ubyte.gz and t10k-...")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, each side")
    parser.add_argument("--slice", type=float, default=60.0, help="seconds that each side trains in turn")
    parser.add_argument("--num-samples", type=int, default=400, help=f"a multiple of {BATCH_SIZE}")
    parser.add_argument("--extractor", default="efficientnet-lite0")
    parser.add_argument("--svg", type=Path, help="where to draw the curves")
    parser.add_argument("--png", type=Path, help="where to show the samples")
    options = parser.parse_args()
    if options.num_samples < BATCH_SIZE or options.num_samples % BATCH_SIZE:
        parser.error(f"--num-samples {options.num_samples} is not a positive multiple of {BATCH_SIZE}")
    return options


def main() -> None:
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    images, test = load_images(options.data, "train"), load_images(options.data, "t10k")
    sides = [kind(images) for kind in SIDES]
    sizes = {side.name: sum(p.numel() for p in side.architecture().parameters()) for side in sides}
    training = options.out / "training.json"
    if not training.exists():
        train(sides, options)
    if (minutes := json.loads(training.read_text())["minutes"]) != options.minutes:
        raise SystemExit(f"--out {options.out} has trainings of {minutes:g} minutes, not {options.minutes:g}")
    extractor = load_extractor(options.extractor)
    rows = measure_distances(sides, test, extractor, options)
    write_atomically(options.out / "quality.json", lambda path: path.write_text(json.dumps(rows, indent=1)))
    if options.svg:
        plot(rows, sizes, options.svg)
    if options.png:
        stack_pictures(sides, options)
    print(format_results(rows, sizes, options, extractor.name))


if __name__ == "__main__":
    main()
