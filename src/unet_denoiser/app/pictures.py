"""Pictures inside of the page's HTML: read or drawn here, so that the server serves no file."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

SHOWN_SIDE = 240  # pixels of a picture's shorter side, at least, by default


def show_pictures(pictures: Sequence[tuple[Path, str]], side: int = SHOWN_SIDE) -> str:
    """Return HTML of pictures with their captions; ValueError if one cannot be read.

    A picture whose shorter side is below `side` pixels is enlarged by a whole factor.
    """
    return f'<div class="ud-pictures">{"".join(_show(file, words, side) for file, words in pictures)}</div>'


def show_figure(figure: Any) -> str:
    """Return HTML of a figure of matplotlib, for a column of half the page."""
    figure.set_size_inches(12, 4.4)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return (
        f'<img class="ud-plot" alt="loss, gradient norm and loss per noise level" src="{_as_uri(buffer.getvalue())}">'
    )


def _show(file: Path, words: str, side: int) -> str:
    try:
        with Image.open(file) as picture:
            size = picture.size
            picture.verify()
    except Exception as error:  # decoders raise exceptions of many types
        raise ValueError(f"{file} cannot be read as an image: {error}") from None
    scale = max(1, -(-side // min(size)))
    width = min(1160, scale * size[0])
    image = f'<img style="width: {width}px" alt="{escape(words)}" src="{_as_uri(file.read_bytes())}">'
    return f"<figure>{image}<figcaption>{escape(words)}</figcaption></figure>"


def _as_uri(data: bytes) -> str:
    return f"data:image/png;base64,{b64encode(data).decode()}"
