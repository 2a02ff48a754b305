"""What an evaluation found: a table to read and a JSON file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from unet_denoiser.evaluation.memorization import Neighbours
from unet_denoiser.evaluation.metrics import Measurement, PrecisionRecall
from unet_denoiser.utils.files import write_atomically


class Figures(NamedTuple):
    """A set of images against the training images.

    images, reference: how many there are of each; overlap_count: how many of each for precision to coverage.
    """

    images: int
    reference: int
    frechet: float
    kernel: Measurement
    overlap_count: int
    overlap: PrecisionRecall


@dataclass(frozen=True)
class Report:
    """What was measured.

    Args:
        about: everything that is needed to measure it again.
        samples: the samples' figures.
        held_out: those of images that were not trained on: the floor.
        samples_at_held_out_count: the samples' figures at the held-out images' count, where there are fewer of those.
        neighbours: distances to the nearest training image, in each space.
        accuracy: "samples" and "held_out": how often a classifier finds the class; None without classes.
    """

    about: dict[str, Any]
    samples: Figures
    held_out: Figures
    samples_at_held_out_count: Figures | None
    neighbours: list[Neighbours]
    accuracy: dict[str, float] | None
    pictures: list[Path] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to report.json."""

        def plain(figures: Figures | None) -> dict[str, Any] | None:
            if figures is None:
                return None
            nested = {"kernel": figures.kernel._asdict(), "overlap": figures.overlap._asdict()}
            return figures._asdict() | nested

        return {
            "about": self.about,
            "samples": plain(self.samples),
            "held_out": plain(self.held_out),
            "samples_at_held_out_count": plain(self.samples_at_held_out_count),
            "neighbours": [n._asdict() | {"looks_copied": n.looks_copied} for n in self.neighbours],
            "accuracy": self.accuracy,
            "pictures": [picture.name for picture in self.pictures],
        }

    def write(self, folder: Path) -> Path:
        """Write report.json into a folder; its path."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / "report.json", lambda path: path.write_text(text, encoding="utf-8"))
        return folder / "report.json"

    def text(self) -> str:
        """A table to read: the samples' figures beside the held-out images'."""
        a = self.about
        extractor, d = a["extractor"], a["data"]
        columns = [self.samples, *filter(None, [self.samples_at_held_out_count]), self.held_out]
        heads = ["samples", *["samples"] * (len(columns) - 2), a["held_out"]["short"]]
        rows = [("", heads), ("", [f"{c.images:,} / {c.reference:,}" for c in columns])]
        rows += [(extractor["frechet_name"], [f"{c.frechet:.2f}" for c in columns])]
        kernel = [f"{1e3 * c.kernel.value:.3f} ± {1e3 * c.kernel.standard_error:.3f}" for c in columns]
        rows += [(f"1000 x {extractor['kernel_name']}", kernel)]
        for name in PrecisionRecall._fields:
            rows += [(name, [f"{getattr(c.overlap, name):.3f}" for c in columns])]
        if self.accuracy:
            spare = [""] * (len(columns) - 2)
            rows += [
                ("classified as asked", [f"{self.accuracy['samples']:.1%}", *spare, f"{self.accuracy['held_out']:.1%}"])
            ]
        lines = [f"{name:<44}" + "".join(f"{value:>20}" for value in values) for name, values in rows]
        lines = [
            f"{self.samples.images:,} samples against {self.samples.reference:,} of the {d['count']:,} images of "
            f"{d['source']}; {a['held_out']['words']}; {extractor['width']:,} features of {extractor['name']}",
            "",
            *lines,
            "",
        ]
        for n in self.neighbours:
            lines.append(
                f"nearest of {n.searched:,} training images in {n.space}: {n.median:.3g} for {n.compared:,} samples, "
                f"{n.held_out_median:.3g} for held-out images; {n.closer:.1%} of the samples are nearer than 95 % of "
                f"those ({'COPIES ARE LIKELY' if n.looks_copied else '5 % is expected'})"
            )
        return "\n".join([*lines, *map(str, self.pictures)])
