"""What is made of an existing picture, or between two samples: the options, checked. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

# what excludes each other
TASKS = (
    "strength",
    "mask",
    "outpaint",
    "upscale",
    "invert",
    "interpolate_seeds",
    "interpolate_classes",
    "interpolate_captions",
)
DEFAULT_STRENGTH = 0.6


@dataclass(frozen=True)
class EditingConfig:
    """What to make of an existing picture, or between two samples.

    Args:
        image: the picture to change; alone, samples that resemble it (image to image).
        strength: how far from the picture they may go: its share of the noise levels is added and taken away again; 1
            forgets the picture (default: 0.6).
        mask: a picture, white where to paint; every other pixel of the image comes back exactly.
        outpaint: pixels to add at the top, right, bottom and left, and to paint.
        resample: how often each step is repeated with new noise while painting, so that old and new fit each other
            (RePaint); with the samplers ddim, ddpm, euler and euler_a.
        upscale: make the image this many times as large; the result's means over the old pixels are the image.
        invert: find the noise that the image comes from, and generate from it again, with other conditions if you like.
        image_class: the image's own class, with --invert (default: the one to generate).
        image_caption: the image's own caption, likewise.
        interpolate_seeds: two seeds; the images go from the one's sample to the other's.
        interpolate_classes: two classes, likewise.
        interpolate_captions: two captions, likewise.

    Raises:
        ValueError: options that cannot work, alone or together, by their names.
    """

    image: Path | None = None
    strength: float | None = None
    mask: Path | None = None
    outpaint: tuple[int, int, int, int] | None = None
    resample: int = 1
    upscale: int | None = None
    invert: bool = False
    image_class: str | None = None
    image_caption: str | None = None
    interpolate_seeds: tuple[int, int] | None = None
    interpolate_classes: tuple[str, str] | None = None
    interpolate_captions: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        self._check_exclusions()
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength} must be above 0 and at most 1")
        if self.outpaint is not None and (min(self.outpaint) < 0 or not any(self.outpaint)):
            raise ValueError(f"outpaint={self.outpaint} must be pixels at the top, right, bottom and left, as 0 8 0 8")
        for seed in self.interpolate_seeds or ():
            if not -(2**63) <= seed < 2**63:
                raise ValueError(f"interpolate_seeds={self.interpolate_seeds}: {seed} does not fit 64 bits")
        if self.resample < 1:
            raise ValueError(f"resample={self.resample} must be at least 1")
        if self.upscale is not None and self.upscale < 2:
            raise ValueError(f"upscale={self.upscale} must be at least 2")

    def _check_exclusions(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        tasks = [name for name in given if name in TASKS]
        if self.image is None and (lonely := [name for name in given if not name.startswith("interpolate_")]):
            raise ValueError(f"{lonely[0]}={getattr(self, lonely[0])} needs an image")
        if self.image is not None and self.interpolates:
            tasks.insert(0, "image")
        elif "interpolate_seeds" in tasks:  # goes with any condition
            tasks.remove("interpolate_seeds")
        if len(tasks) > 1:
            raise ValueError(f"{tasks[0]} and {tasks[1]} exclude each other; give one of them")
        if self.resample > 1 and not {"mask", "outpaint", "upscale"} & set(given):
            raise ValueError(f"resample={self.resample} needs a mask, outpaint or upscale")
        for name in ("image_class", "image_caption"):
            if name in given and not self.invert:
                raise ValueError(f"{name}={getattr(self, name)!r} needs invert")

    @property
    def interpolates(self) -> bool:
        """Whether the samples are on the way from one to another."""
        return bool(self.interpolate_seeds or self.interpolate_classes or self.interpolate_captions)
