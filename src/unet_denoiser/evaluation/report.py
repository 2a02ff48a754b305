"""Report of an evaluation: a table to read and a JSON file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from unet_denoiser.evaluation.memorization import Neighbours
from unet_denoiser.evaluation.metrics import Measurement, PrecisionRecall
from unet_denoiser.utils.files import write_json


class Figures(NamedTuple):
    """Metrics of a set of images against the training images."""

    images: int
    reference: int  # number of training images
    frechet: float
    kernel: Measurement
    overlap_count: int  # images of either kind for `overlap`
    overlap: PrecisionRecall

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return self._asdict() | {"kernel": self.kernel._asdict(), "overlap": self.overlap._asdict()}


class ClassAccuracy(NamedTuple):
    """Accuracy of a classifier of features on samples, and on held-out images."""

    samples: float
    held_out: float


class DataSource(NamedTuple):
    """A dataset: the source in its configuration, or "arrays", and its number of images."""

    source: str
    count: int  # type: ignore[assignment]


class ExtractorInfo(NamedTuple):
    """An extractor: its name, the number of features, and the names of their distances."""

    name: str
    width: int
    frechet_name: str
    kernel_name: str


class Setup(NamedTuple):
    """Everything that is needed to evaluate again."""

    samples: dict[str, Any]  # their number, and all that the caller tells of them
    data: DataSource
    held_out: DataSource | None  # None if half of the data stands in for them
    extractor: ExtractorInfo
    versions: dict[str, str]  # of the packages that the figures depend on

    def describe_held_out(self) -> dict[str, Any]:
        """Return a column's head ("short"), a phrase ("words"), and the source if there is one."""
        if (source := self.held_out) is None:
            words = "no held-out images given, so half of the images used are taken for them"
            return {"short": "half of the data", "words": words}
        words = f"held out: {source.count:,} images of {source.source}"
        return {"short": "held-out", **source._asdict(), "words": words}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        data, extractor = self.data._asdict(), self.extractor._asdict()
        return self._asdict() | {"data": data, "held_out": self.describe_held_out(), "extractor": extractor}


@dataclass(frozen=True)
class Report:
    """Results of an evaluation."""

    about: Setup
    samples: Figures
    held_out: Figures  # of images never trained on, which no network can be expected to beat
    samples_at_held_out_count: Figures | None  # of as many samples as held-out images, if there are fewer of those
    neighbours: list[Neighbours]  # in each space
    accuracy: ClassAccuracy | None  # None without classes
    pictures: list[Path] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as report.json holds them."""
        same_count = self.samples_at_held_out_count
        return {
            "about": self.about.to_dict(),
            "samples": self.samples.to_dict(),
            "held_out": self.held_out.to_dict(),
            "samples_at_held_out_count": same_count and same_count.to_dict(),
            "neighbours": [n._asdict() | {"looks_copied": n.copies_are_likely} for n in self.neighbours],
            "accuracy": self.accuracy and self.accuracy._asdict(),
            "pictures": [picture.name for picture in self.pictures],
        }

    def write(self, folder: Path) -> None:
        """Write report.json into a folder."""
        write_json(folder / "report.json", self.to_dict())

    def text(self) -> str:
        """Return a table to read: the samples' figures beside the held-out images'."""
        data, extractor = self.about.data, self.about.extractor
        heading = (
            f"{self.samples.images:,} samples against {self.samples.reference:,} of the {data.count:,} images of "
            f"{data.source}; {self.about.describe_held_out()['words']}; "
            f"{extractor.width:,} features of {extractor.name}"
        )
        table = [f"{name:<44}" + "".join(f"{value:>20}" for value in values) for name, values in self._table()]
        neighbours = [
            f"nearest of {n.searched:,} training images in {n.space}: {n.median:.3g} for {n.compared:,} samples, "
            f"{n.held_out_median:.3g} for held-out images; {n.closer:.1%} of the samples are nearer than 95 % of "
            f"those ({'COPIES ARE LIKELY' if n.copies_are_likely else '5 % is expected'})"
            for n in self.neighbours
        ]
        return "\n".join([heading, "", *table, "", *neighbours, *map(str, self.pictures)])

    def _table(self) -> list[tuple[str, list[str]]]:
        """Return the rows of the table: a name, and a value for each set of images."""
        extra = [] if self.samples_at_held_out_count is None else [self.samples_at_held_out_count]
        columns, extractor = [self.samples, *extra, self.held_out], self.about.extractor
        kernels = [f"{1e3 * c.kernel.value:.3f} ± {1e3 * c.kernel.standard_error:.3f}" for c in columns]
        rows = [
            ("", ["samples", *["samples" for _ in extra], self.about.describe_held_out()["short"]]),
            ("", [f"{c.images:,} / {c.reference:,}" for c in columns]),
            (extractor.frechet_name, [f"{c.frechet:.2f}" for c in columns]),
            (f"1000 x {extractor.kernel_name}", kernels),
        ]
        rows += [(name, [f"{getattr(c.overlap, name):.3f}" for c in columns]) for name in PrecisionRecall._fields]
        if self.accuracy is not None:
            shares = [f"{self.accuracy.samples:.1%}", *["" for _ in extra], f"{self.accuracy.held_out:.1%}"]
            rows.append(("classified as asked", shares))
        return rows
