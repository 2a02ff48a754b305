"""Samples of distilled runs beside those of their teacher in as many steps and in more.

Each row compares samples with the teacher's own of 25 guided steps from other seeds, or with held-out images
(--held-out). "as asked" is the share of samples that a support vector machine, trained on the teacher's data, puts into
the class that was asked for.

Run: python benchmarks/distillation.py runs/digits runs/digits-4 runs/digits-2 [--num-samples 1000]
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from measure import format_machine, format_table, print_progress, read_machine
from sklearn.svm import SVC
from torch import Tensor

from unet_denoiser import DataConfig, Run, load_data, load_extractor, sample
from unet_denoiser.evaluation.feature_extractors import Extractor
from unet_denoiser.evaluation.metrics import kernel_distance

TEACHER_STEPS = (25, 8, 4, 2, 1)
MAX_JUDGED = 5000  # training images of the support vector machine
REFERENCE_SEED = 100_000
HEAD = ["", "network calls", "ms per image", "1000 x kernel distance", "as asked"]


def make_samples(path: Path, count: int, seed: int, **options: Any) -> tuple[Tensor, Tensor, float]:
    """Return samples (N, C, *spatial), their labels in turn, and the seconds of an image."""
    pipeline = Run.load(path).load_pipeline()
    labels, start = pipeline.labels(count), time.perf_counter()
    x = sample(pipeline.model, pipeline.process, seeds=range(seed, seed + count), class_labels=labels, **options)
    return pipeline.decode(x).clamp(-1, 1), labels, (time.perf_counter() - start) / count


def train_judge(run: Run) -> SVC:
    """Return a classifier of the run's images."""
    data = load_data(run.data)
    indices = torch.linspace(0, len(data) - 1, min(len(data), MAX_JUDGED)).long().tolist()
    images, labels = torch.stack([data[i]["image"] for i in indices]), [int(data[i]["class_labels"]) for i in indices]
    return SVC(C=10).fit(images.flatten(1).numpy(), labels)


def features(extractor: Extractor, images: Tensor) -> Tensor:
    """Return the features of images (N, D), in batches."""
    return torch.cat([extractor(part) for part in images.split(100)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, metavar="TEACHER")
    parser.add_argument("students", type=Path, nargs="*", metavar="STUDENT")
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="of the teacher")
    parser.add_argument("--extractor", default="pixels")
    parser.add_argument("--held-out", metavar="DATA", help="compare with these images, as of `train`")
    options = parser.parse_args()
    machine, count, run = read_machine(), options.num_samples, Run.load(options.teacher)
    extractor, judge, guided = (
        load_extractor(options.extractor),
        train_judge(run),
        {"guidance_scale": options.guidance_scale},
    )
    if options.held_out is None:
        reference = make_samples(options.teacher, count, REFERENCE_SEED, **guided)[0]
    else:
        held_out = load_data(DataConfig(options.held_out, run.data.image_size, run.data.channels))
        reference = torch.stack([held_out[i]["image"] for i in range(min(len(held_out), 2 * count))])
    real, rows = features(extractor, reference), []

    def add(name: str, path: Path, calls: int, **more: Any) -> None:
        x, labels, seconds = make_samples(path, count, 0, **more)
        distance = kernel_distance(features(extractor, x), real)
        asked = (judge.predict(x.flatten(1).numpy()) == labels.numpy()).mean()
        shown = f"{1e3 * distance.value:.1f} ± {1e3 * distance.standard_error:.1f}"
        rows.append([name, str(calls), f"{1e3 * seconds:.1f}", shown, f"{asked:.1%}"])
        print_progress(f"{name}: {shown}, {asked:.1%} as asked")

    for steps in TEACHER_STEPS:
        add(
            f"teacher, dpm++ {steps}",
            options.teacher,
            steps * (1 + (guided["guidance_scale"] != 1)),
            num_inference_steps=steps,
            **guided,
        )
    for path in options.students:
        config = Run.load(path).process.distillation
        assert config is not None
        add(f"{path.name}: {config.num_steps} steps", path, config.num_steps)
    students = " ".join(map(str, options.students))
    print(
        format_machine(machine, f"python benchmarks/distillation.py {options.teacher} {students} --num-samples {count}")
    )
    print(format_table(HEAD, rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
