"""The inputs of samples and edits: those that a network has, and what was put into them. Standard library only."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar, get_args

from unet_denoiser.config.sampling import SamplerName

MAX_IMAGES, MAX_STEPS, MAX_CAPTION = 64, 1000, 1000  # of a request; letters of a caption
Task = Literal["vary", "inpaint", "outpaint", "upscale", "translate"]
SAMPLERS: tuple[str, ...] = get_args(SamplerName)


class Inputs(NamedTuple):
    """The inputs of a network, and their defaults.

    Args:
        classes: names of the classes, empty without.
        vector: how many numbers it is given, 0 for none.
        is_guided: guidance has an effect, and can be chosen.
        fixed: words that say why steps and sampler cannot be chosen; "" if they can.
        needs_image: it draws nothing without an image, so that only the edits are there.
        tasks: what it can do with an image.
        upscale: the factor that it was trained for, None for any.
        size: of its images in pixels, height and width.
    """

    classes: tuple[str, ...]
    captions: bool
    vector: int
    is_guided: bool
    fixed: str
    steps: int
    guidance: float
    sampler: str
    needs_image: bool
    tasks: tuple[Task, ...]
    upscale: int | None
    size: tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """The inputs of a sample or edit, as the page has them.

    Args:
        steps, guidance: None where the network has its own, as a distilled one.
        vector: numbers, as text.
    """

    classes: tuple[str, ...] = ()
    caption: str = ""
    vector: str = ""
    negative_class: str | None = None
    negative_caption: str = ""
    seed: float | None = 0
    count: float | None = 16
    steps: float | None = None
    guidance: float | None = None
    sampler: str | None = None


N = TypeVar("N", int, float)


def parse_number(name: str, text: str, kind: type[N]) -> N | None:
    """Return the number that a text says, None for an empty one; ValueError with its name if it says none."""
    if not text:
        return None
    try:
        return kind(text)
    except ValueError:
        valid = "a whole number, such as 1000" if kind is int else "a number, such as 1e-3"
        raise ValueError(f"{name}={text!r} must be {valid}, or empty") from None


def check_whole(name: str, value: float | None, least: int, most: int) -> int:
    """Return a whole number; ValueError with its name unless it is one in the range."""
    if value is None or value != int(value) or not least <= value <= most:
        shown = "nothing" if value is None else f"{value:g}"
        raise ValueError(f"{name}={shown} must be a whole number from {least} to {most}")
    return int(value)
