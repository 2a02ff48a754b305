"""Samples of distilled runs beside those of their teacher: their distance to images, their classes, their time.

Each row compares samples with the teacher's own of 25 guided steps from other seeds, or with held-out images
(--held-out). "as asked" is the share of samples that a support vector machine, trained on the teacher's data, puts into
the class that was asked for. Samplings of 25 and more steps make a quarter of the samples. Compare rows of equal count:
as the classes come in turn, distances of few samples can lie a little too low. With --times the table has times
instead, measured in turn in one process, beside diffusers with the teacher's weights; use a quiet machine.

Run: python benchmarks/distillation.py runs/digits runs/digits-4 runs/digits-2 [--num-samples 1000] [--times]
"""

import argparse
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import format_machine, format_table, measure_seconds, print_progress, read_command, read_machine
from reuse import Setting, Side, sample_with_diffusers
from sklearn.svm import SVC
from torch import Tensor

from unet_denoiser import DataConfig, Pipeline, Run, load_data, load_extractor, sample
from unet_denoiser.config.base import per_axis
from unet_denoiser.evaluation.feature_extractors import dataset_features, extract
from unet_denoiser.evaluation.metrics import kernel_distance

SLOW = {  # name -> options of sampling
    "ddim, 50 steps": {"sampler": "ddim", "num_inference_steps": 50},
    "ddim, 50 steps, reuse 5": {"sampler": "ddim", "num_inference_steps": 50, "reuse": 5},
    "dpm++, 25 steps": {"num_inference_steps": 25},
}
FAST: dict[str, dict[str, Any]] = {
    **{f"dpm++, {n} step{'s' * (n > 1)}": {"num_inference_steps": n} for n in (8, 4, 2, 1)},
    "dpm++, 8 quadratic steps": {"num_inference_steps": 8, "timestep_spacing": "quadratic"},
}
ENGINE = ("ddim, 50 steps", "dpm++, 8 quadratic steps")  # of the teacher, through OpenVINO too
SLOW_PART = 4  # a slow row has the samples divided by this
SAMPLE_BATCH, TIMED_IMAGES, ROUNDS = 50, 8, 2
MAX_JUDGED, MAX_HELD_OUT = 5000, 2000  # images of the support vector machine, and to compare with
REFERENCE_SEED = 100_000
HEAD = ["", "samples", "1000 x kernel distance", "as asked"]
TIMES_HEAD = ["", "ms per image", "of diffusers' time"]


class Row(NamedTuple):
    """A network and its options of sampling."""

    name: str
    pipeline: Pipeline
    options: dict[str, Any]
    part: int = 1

    def sample(self, seeds: range) -> tuple[Tensor, Tensor]:
        """Return samples (N, C, *spatial) and their labels, which come in turn."""
        p, labels = self.pipeline, self.pipeline.labels(len(seeds))
        options = self.options | {"batch_size": SAMPLE_BATCH}
        x = sample(p.model, p.process, seeds=seeds, class_labels=labels, **options)
        return p.decode(x).clamp(-1, 1), labels


@cache
def load_pipeline(run: Path) -> Pipeline:
    """Return a run's pipeline, which its rows share."""
    return Run.load(run).load_pipeline()


def make_teacher(options: argparse.Namespace, sampling: dict[str, Any], name: str = "", part: int = 1) -> Row:
    """Return a sampling of the guided teacher."""
    pipeline, guided = load_pipeline(options.teacher), {"guidance_scale": options.guidance_scale}
    return Row(f"teacher, {name}", pipeline, guided | sampling, part)


def make_rows(options: argparse.Namespace) -> list[Row]:
    """Return the samplings of the teacher, the slow ones first, and those of the students."""
    rows = [make_teacher(options, sampling, name, SLOW_PART) for name, sampling in SLOW.items()]
    rows += [make_teacher(options, sampling, name) for name, sampling in FAST.items()]
    rows += [Row(f"student, {path.name}", load_pipeline(path), {}) for path in options.students]
    if options.openvino:
        chosen = [row for row in rows if row.name.startswith("student") or row.name.endswith(ENGINE)]
        for precision in ("float32", "int8"):
            engine = {"backend": "openvino", "backend_precision": precision}
            rows += [
                row._replace(name=f"{row.name}, OpenVINO {precision}", options=row.options | engine) for row in chosen
            ]
    return [row for row in rows if any(part in row.name for part in options.only)]


def train_judge(run: Run) -> SVC:
    """Return a classifier of the run's images."""
    data = load_data(run.data)
    indices = torch.linspace(0, len(data) - 1, min(len(data), MAX_JUDGED)).long().tolist()
    images, labels = torch.stack([data[i]["image"] for i in indices]), [int(data[i]["class_labels"]) for i in indices]
    return SVC(C=10).fit(images.flatten(1).numpy(), labels)


def measure_quality(rows: list[Row], run: Run, options: argparse.Namespace) -> list[list[str]]:
    """Return the lines of the table of distances and classes."""
    extractor, judge = load_extractor(options.extractor), train_judge(run)
    lines: list[list[str]] = []
    if options.held_out is None:
        images = make_teacher(options, {}).sample(range(REFERENCE_SEED, REFERENCE_SEED + options.num_samples))[0]
        real = extract(extractor, images.split(SAMPLE_BATCH))
    else:
        data = load_data(DataConfig(options.held_out, run.data.image_size, run.data.channels))
        real = dataset_features(data, np.arange(min(len(data), MAX_HELD_OUT)), extractor, "held-out images")
    print_progress(f"{len(real)} images to compare with")
    for row in rows:
        x, labels = row.sample(range(options.num_samples // row.part))
        distance = kernel_distance(extract(extractor, x.split(SAMPLE_BATCH)), real)
        asked = (judge.predict(x.flatten(1).numpy()) == labels.numpy()).mean()
        shown = f"{1e3 * distance.value:.1f} ± {1e3 * distance.standard_error:.1f}"
        lines.append([row.name, f"{len(x):,}", shown, f"{asked:.1%}"])
        print_progress(", ".join(lines[-1]))
    return lines


def match_sizes(side: Side) -> None:
    """Let diffusers' network go from a side of 4 to one of 7, which only its text-conditional networks do."""
    size, blocks = per_axis(side.run.model.image_size, 2), side.peer.up_blocks
    sizes = [tuple(-(-s // 2**level) for s in size) for level in range(len(blocks))]
    for block, wanted in zip(blocks[:-1], sizes[-2::-1], strict=True):
        block.upsamplers[0].forward = partial(block.upsamplers[0].forward, output_size=wanted)


def measure_times(rows: list[Row], options: argparse.Namespace) -> list[list[str]]:
    """Return the lines of the table of times; ValueError for a teacher whose network diffusers would call otherwise."""
    side, seeds = Side("teacher", options.teacher, Path()), range(TIMED_IMAGES)
    if side.run.process.path != "vp":
        raise ValueError(
            f"--times: {options.teacher} has another path than vp, which diffusers' loop here cannot sample"
        )
    peer, peer_name = Setting("ddim", 50, ours=False), "diffusers, ddim, 50 steps"
    match_sizes(side)
    ours = make_teacher(options, SLOW["ddim, 50 steps"])
    error = (ours.sample(range(2))[0] - sample_with_diffusers(side, peer, range(2)).clamp(-1, 1)).abs().max()
    print_progress(f"images of both sides differ by {error:.1e} at most")
    calls: dict[str, Any] = {row.name: partial(row.sample, seeds) for row in rows}
    calls[peer_name] = partial(sample_with_diffusers, side, peer, seeds)
    for row in rows:  # the first call is slow
        if row.name.startswith(("student", "teacher, dpm++, 1 ")) or "OpenVINO" in row.name:
            row.sample(seeds)
    seconds = measure_seconds(calls, ROUNDS)
    whole = seconds[peer_name]
    return [[name, f"{1e3 * s / TIMED_IMAGES:.1f}", f"{s / whole:.3f}"] for name, s in seconds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, metavar="TEACHER")
    parser.add_argument("students", type=Path, nargs="*", metavar="STUDENT")
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="of the teacher")
    parser.add_argument("--extractor", default="pixels")
    parser.add_argument("--held-out", metavar="DATA", help="compare with these images, as of `train`")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--openvino", action="store_true", help="also sample through OpenVINO")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="rows whose names contain one of these")
    options = parser.parse_args()
    machine, run = read_machine(), Run.load(options.teacher)
    rows = make_rows(options)
    if not rows:
        parser.error(f"--only {' '.join(options.only)}: no row has such a name")
    table = measure_times(rows, options) if options.times else measure_quality(rows, run, options)
    print(format_machine(machine, read_command()))
    print(format_table(TIMES_HEAD if options.times else HEAD, table))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
