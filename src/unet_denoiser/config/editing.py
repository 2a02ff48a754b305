"""The options of image editing and interpolation."""

from dataclasses import dataclass, fields
from pathlib import Path

from unet_denoiser.config.base import check_minimum, check_types
from unet_denoiser.config.paths import local_path

# at most one of TASKS may be given
INTERPOLATIONS = ("interpolate_seeds", "interpolate_classes", "interpolate_captions")
TASKS = ("strength", "mask", "outpaint", "upscale", "invert", *INTERPOLATIONS)
DEFAULT_STRENGTH = 0.6


@dataclass(frozen=True)
class EditingConfig:
    """Editing of an existing image, or interpolation between two samples.

    Args:
        image: the image to edit; without further options, generate variations of it (image to image).
        strength: share of the noise levels that is added to the image and removed again: more changes it more, 1
            ignores it (default: 0.6).
        mask: a mask image, white where to paint (inpainting); all other pixels stay exactly the same.
        outpaint: pixels to add at the top, right, bottom and left, and to paint.
        resample: how often each step is repeated with new noise, so that painted and given pixels fit each other
            (RePaint, Lugmayr et al. 2022); with the samplers ddim, ddpm, euler and euler_a.
        upscale: enlarge the image by this factor; averaged over the old pixels, the result equals the image.
        invert: find the noise that generates the image (DDIM inversion) and sample from it again, for example with
            another class or caption.
        image_class: class of the image, for --invert (default: the class to generate).
        image_caption: caption of the image, for --invert (default: the caption to generate).
        interpolate_seeds: two seeds, between whose samples to interpolate.
        interpolate_classes: two classes to interpolate between.
        interpolate_captions: two captions to interpolate between.

    Raises:
        ValueError: options that cannot work, alone or together, with their names.
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
        check_types(self)
        for name in ("image", "mask"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, local_path(path))
        self._check_exclusions()
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength} must be above 0 and at most 1")
        if self.outpaint is not None and (min(self.outpaint) < 0 or not any(self.outpaint)):
            raise ValueError(f"outpaint={self.outpaint} must be pixels at the top, right, bottom and left, as 0 8 0 8")
        for seed in self.interpolate_seeds or ():
            if not -(2**63) <= seed < 2**63:
                raise ValueError(f"interpolate_seeds={self.interpolate_seeds}: {seed} does not fit 64 bits")
        check_minimum(self, 1, "resample")
        check_minimum(self, 2, "upscale")

    def _check_exclusions(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        tasks = [name for name in given if name in TASKS]
        if self.image is None and (dependent := [name for name in given if not name.startswith("interpolate_")]):
            raise ValueError(f"{dependent[0]}={getattr(self, dependent[0])} needs an image")
        if self.image is not None and self.interpolates:
            tasks.insert(0, "image")
        elif "interpolate_seeds" in tasks:  # seeds go with classes or captions
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
        """Return True if the task is an interpolation."""
        return any(getattr(self, name) for name in INTERPOLATIONS)
