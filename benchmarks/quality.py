"""How good samples are after the same time of training: our default recipe beside those of two other libraries.

All sides train in one process, in turn for --slice seconds each, so that a noisy machine disturbs them alike; only
these slices count. Each has its own network (about the same number of parameters), optimizer, schedule and averaging;
see quality_sides.py. Samples are made by one sampler that is the same for all, and at the end by each library's own.
What is done is kept in --out, so that a run which was stopped goes on; a training that was stopped starts anew.

Run: python benchmarks/quality.py /usr/share/datasets/fashion-mnist --out runs/quality [--minutes 20]
The folder is that of Debian's package dataset-fashion-mnist: idx files, gzipped.
"""

import argparse
import gzip
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import describe, machine, progress, table
from PIL import Image
from quality_sides import PIECE, SIDES, Ours, Side
from safetensors.torch import load_file, save_file
from torch import Tensor

from unet_denoiser import save_grid
from unet_denoiser.evaluation.feature_extractors import Extractor, extract, load_extractor
from unet_denoiser.evaluation.metrics import frechet_distance, kernel_distance
from unet_denoiser.utils.files import write_atomically

MARKS, SOONER = (0.25, 0.4, 0.5, 1.0), 0.4  # shares of the time after which weights are kept; one for ours alone
SHARED, STEPS = "ddim, 25 steps", 25
HELD_OUT = 4000
Row = dict[str, Any]


def read_idx(path: Path) -> np.ndarray:
    """An array in the format of MNIST's files, gzipped."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load(folder: Path, part: str) -> Tensor:
    """(N, 1, 28, 28) images in [-1, 1]."""
    return torch.from_numpy(read_idx(folder / f"{part}-images-idx3-ubyte.gz").copy())[:, None] / 127.5 - 1


# ---- training --------------------------------------------------------------------------------------------------------


def steps_in(sides: list[Side], seconds: float) -> dict[str, int]:
    """How many steps of each side fit into the time: what schedules need to know. Measured in turn, the median."""
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
    """Give each side its time, and keep its averaged weights at the marks."""
    seconds = 60 * options.minutes
    planned = steps_in(sides, seconds)
    progress("steps planned:", planned)
    for side in sides:
        side.begin(planned[side.name])
    done = {side.name: {"seconds": 0.0, "steps": 0} for side in sides}
    keep = {share * seconds: sides[:1] if share == SOONER else sides for share in MARKS}
    marks = []
    for end in sorted({*keep, *np.arange(options.slice, seconds, options.slice)}):
        for side in sides:
            own = done[side.name]
            while own["seconds"] < end:
                start = time.perf_counter()
                if not side.step():
                    break
                own["seconds"] += time.perf_counter() - start
                own["steps"] += 1
        progress(f"{end / 60:.2f} min each; steps:", {name: own["steps"] for name, own in done.items()})
        for side in keep.get(end, ()):
            path = options.out / f"{side.name}-{end / 60:g}.safetensors"
            write_atomically(path, partial(save_file, side.averaged()))
            marks.append({"side": side.name, "minutes": end / 60, **done[side.name]})
    kept = {
        "machine": machine(),
        "minutes": options.minutes,
        "slice": options.slice,
        "planned": planned,
        "marks": marks,
    }
    write_atomically(options.out / "training.json", lambda path: path.write_text(json.dumps(kept, indent=1)))


# ---- judging ---------------------------------------------------------------------------------------------------------


def features_of(path: Path, make: Any, extractor: Extractor) -> Tensor:
    """Features kept in a file, or made now of the images that `make` returns."""
    if not path.exists():
        features = extract(extractor, make().split(PIECE))
        write_atomically(path, partial(save_file, {"features": features}))
    return load_file(path)["features"]


def samples_of(side: Side, minutes: float, sampler: str, options: argparse.Namespace) -> Tensor:
    """The samples of one side's weights; a picture of the first 40 is kept too."""
    weights = load_file(options.out / f"{side.name}-{minutes:g}.safetensors")
    start, seeds = time.perf_counter(), range(0, options.num_samples, PIECE)
    shared = sampler == SHARED
    pieces = [side.shared(weights, seed, STEPS) if shared else side.own(weights, seed) for seed in seeds]
    images = torch.cat(pieces).clamp(-1, 1)
    save_grid(images[:40], options.out / f"{side.name}-{minutes:g}-{'shared' if shared else 'own'}.png", 10)
    progress(f"{side.name}, {minutes:g} min, {sampler}:", {"s": time.perf_counter() - start})
    return images


def judge(sides: list[Side], test: Tensor, extractor: Extractor, options: argparse.Namespace) -> list[Row]:
    """Distances of every side's samples to held-out images, the last marks first; and of training images, the floor."""
    count = options.num_samples
    real = features_of(options.out / f"held-out-{extractor.name}.safetensors", lambda: test[:HELD_OUT], extractor)
    seen = sides[0].images
    spread = seen[torch.linspace(0, len(seen) - 1, count).long()]
    rows: list[Row] = []

    def add(features: Tensor, **about: Any) -> None:
        kernel = kernel_distance(features, real)
        distances = {
            "kernel": kernel.value,
            "error": kernel.standard_error,
            "frechet": frechet_distance(features, real),
        }
        rows.append({**about, **distances})

    floor = features_of(
        options.out / f"training-images-{extractor.name}-{count}.safetensors", lambda: spread, extractor
    )
    add(floor, side="training images", minutes=0.0, sampler="", steps=0)
    trained = json.loads((options.out / "training.json").read_text())["marks"]
    for mark in sorted(trained, key=lambda mark: -mark["minutes"]):
        side = next(side for side in sides if side.name == mark["side"])
        own = [side.own_sampler] if mark["minutes"] == options.minutes else []
        for sampler in (SHARED, *own):
            which = f"{side.name}-{mark['minutes']:g}-{'shared' if sampler == SHARED else 'own'}"
            make = partial(samples_of, side, mark["minutes"], sampler, options)
            features = features_of(options.out / f"{which}-{extractor.name}-{count}.safetensors", make, extractor)
            add(features, side=side.name, minutes=mark["minutes"], sampler=sampler, steps=mark["steps"])
            progress(f"{which}:", {"1000 x kernel distance": 1e3 * rows[-1]["kernel"]})
    return rows


# ---- telling ---------------------------------------------------------------------------------------------------------


def render(rows: list[Row], sizes: dict[str, int], options: argparse.Namespace, name: str) -> str:
    """The tables, and what they say of the two questions: how much nearer at the end, and how much sooner as near."""
    trained = json.loads((options.out / "training.json").read_text())
    floor = next(row for row in rows if row["side"] == "training images")
    parameters = ", ".join(f"{side} {count / 1e6:.2f}M" for side, count in sizes.items())
    command = f"python benchmarks/quality.py {options.data} --out {options.out} --minutes {options.minutes:g}"
    lines = [
        describe(trained["machine"], command + f" --num-samples {options.num_samples}"),
        f"{options.num_samples} samples against {HELD_OUT} held-out images, features of {name}. Parameters: "
        f"{parameters}. As many training images are at {1e3 * floor['kernel']:.1f} +- {1e3 * floor['error']:.1f}, "
        f"Frechet distance {floor['frechet']:.1f}.",
    ]
    for title, shared in ((f"The same sampler: {SHARED}", True), ("Each library's own sampler, shortened", False)):
        chosen = [row for row in rows if row["side"] in sizes and (row["sampler"] == SHARED) == shared]
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
        lines += [f"### {title}", table(["", "minutes", "steps", "1000 x kernel distance", "Frechet distance"], body)]
    return "\n\n".join([*lines, verdict(rows, options.minutes)])


def verdict(rows: list[Row], minutes: float) -> str:
    """Our distance beside the better other side's, and when we were as near as it is at the end."""
    found = {(row["side"], row["minutes"]): row["kernel"] for row in rows if row["sampler"] == SHARED}
    others = {side: kernel for (side, at), kernel in found.items() if at == minutes and side != Ours.name}
    best = min(others, key=lambda side: others[side])
    curve = sorted((at, kernel) for (side, at), kernel in found.items() if side == Ours.name)
    reached = next((at for at, kernel in curve if kernel <= others[best]), None)
    text = f"At {minutes:g} minutes ours is at {found[Ours.name, minutes] / others[best]:.2f} of {best}'s distance"
    if reached is None:
        return text + ", whose figure is not reached."
    return text + f", whose figure we had reached by minute {reached:g}."


def plot(rows: list[Row], sizes: dict[str, int], path: Path) -> None:
    """Distance over minutes, one line a side."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
    for side in sizes:
        own = [row for row in rows if row["side"] == side]
        line = sorted((row for row in own if row["sampler"] == SHARED), key=lambda row: row["minutes"])
        x, y, error = ([row[key] for row in line] for key in ("minutes", "kernel", "error"))
        panel.errorbar(x, [1e3 * v for v in y], [1e3 * v for v in error], marker="o", capsize=2, label=side)
    panel.set(
        yscale="log", xlabel="minutes of training", ylabel="1000 x kernel distance to held-out images", xlim=(0, None)
    )
    for axis_formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        axis_formatter("{x:g}")
    panel.set_title(SHARED, fontsize=10)
    figure.legend(loc="outside upper center", ncols=len(sizes), fontsize=9)
    write_atomically(path, partial(figure.savefig, format="svg"))


def stack_pictures(sides: list[Side], options: argparse.Namespace) -> None:
    """The pictures kept of each side's last samples, of the same sampler and noise, below each other."""
    kept = [Image.open(options.out / f"{side.name}-{options.minutes:g}-shared.png") for side in sides]
    whole = Image.new(kept[0].mode, (kept[0].width, sum(picture.height + 8 for picture in kept) - 8), "white")
    for i, picture in enumerate(kept):
        whole.paste(picture, (0, i * (picture.height + 8)))
    write_atomically(options.png, partial(whole.save, format="PNG"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="FOLDER", help="with train-images-idx3-ubyte.gz and t10k-...")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, each side")
    parser.add_argument("--slice", type=float, default=60.0, help="seconds that each side trains in turn")
    parser.add_argument("--num-samples", type=int, default=400, help=f"a multiple of {PIECE}")
    parser.add_argument("--extractor", default="efficientnet-lite0")
    parser.add_argument("--svg", type=Path, help="where to draw the curves")
    parser.add_argument("--png", type=Path, help="where to show the samples")
    options = parser.parse_args()
    if options.num_samples < PIECE or options.num_samples % PIECE:
        parser.error(f"--num-samples {options.num_samples} is not a positive multiple of {PIECE}")
    return options


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    images, test = load(options.data, "train"), load(options.data, "t10k")
    sides = [kind(images) for kind in SIDES]
    sizes = {side.name: sum(p.numel() for p in side.architecture().parameters()) for side in sides}
    kept = options.out / "training.json"
    if not kept.exists():
        train(sides, options)
    if (minutes := json.loads(kept.read_text())["minutes"]) != options.minutes:
        raise SystemExit(f"--out {options.out} has trainings of {minutes:g} minutes, not {options.minutes:g}")
    extractor = load_extractor(options.extractor)
    rows = judge(sides, test, extractor, options)
    write_atomically(options.out / "quality.json", lambda path: path.write_text(json.dumps(rows, indent=1)))
    if options.svg:
        plot(rows, sizes, options.svg)
    if options.png:
        stack_pictures(sides, options)
    print(render(rows, sizes, options, extractor.name))


if __name__ == "__main__":
    main()
