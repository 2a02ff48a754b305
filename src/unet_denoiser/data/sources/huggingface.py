"""Hugging Face data sets and Parquet files, held on disk or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.columns import CAPTION_COLUMNS, as_numbered, encode_labels, encode_vectors, pick_column
from unet_denoiser.data.dataset import StreamDataset, StreamIndex
from unet_denoiser.data.sources.encoded_images import EncodedImages, check_config, choose_size, split_usable
from unet_denoiser.data.sources.verification import Header, header_of, verify_images
from unet_denoiser.data.transforms import (
    Source,
    UnreadableItemError,
    augment,
    fill_colour,
    open_image,
    to_float,
    to_pixels,
)

if TYPE_CHECKING:
    import datasets

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "pixels")
FIRST = 64  # images of a stream that tell its channels and size


class Columns(NamedTuple):
    """Which columns of a table hold what."""

    image: str
    label: str | None
    caption: str | None
    vectors: tuple[str, ...]


class HubDataset(EncodedImages):
    """The images of a `datasets.Dataset`.

    Args:
        table: it needs a column of images, and may have labels, captions and numbers.
        config: the other options of the data; its source is for messages.

    Raises:
        ValueError: no such columns, or images that cannot be used, by their rows.
    """

    def __init__(self, table: datasets.Dataset, config: DataConfig | None = None, **options: Any) -> None:
        config = replace(config or DataConfig("the data set"), **options)
        check_config(config)
        columns, table = find_columns(table, config)
        rows = {f"row {i}": [0] for i in range(len(table))}
        if not rows:
            raise ValueError(f"{config.source} has no rows")
        images = table.select_columns([columns.image])
        fingerprint = f"{config.source} {columns.image} {table._fingerprint}"
        found = verify_images(fingerprint, rows, lambda row: _content(images[int(row[4:])][columns.image]))
        headers, config = split_usable(found, config, config.source)
        kept = [int(row[4:]) for row in headers]
        self.table = table if len(kept) == len(table) else table.select(kept)
        self.columns, self.images = columns, self.table.select_columns([columns.image])
        if columns.label:
            found_names = _label_names(table, columns.label)
            names = found_names or config.class_names
            self.labels, self.class_names = encode_labels(list(self.table[columns.label]), names, config.source)
            if found_names and config.class_names:
                self.class_names = list(config.class_names)
                self.labels = as_numbered(self.labels, found_names, self.class_names)
        if columns.caption:
            self.captions = [_one_caption(caption) for caption in self.table[columns.caption]]
        if columns.vectors:
            self.vectors = encode_vectors({name: list(self.table[name]) for name in columns.vectors}, config.source)
            self.vector_dim = len(columns.vectors)
        self._set_up(config, list(headers.values()))

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f"row {int(index)} of {self.config.source}"

    def source(self, index: int) -> Source:
        return _content(self.images[int(index)][self.columns.image])


class HubStream(StreamDataset):
    """The images of a `datasets.IterableDataset`, in an order shuffled anew each epoch through a buffer.

    Every process reads the whole stream, and decodes its own part of each batch only; so order and batches are the
    same for any number of processes, and training goes on exactly, by reading up to its place without decoding.
    """

    def __init__(self, table: datasets.IterableDataset, config: DataConfig | None = None, **options: Any) -> None:
        config = replace(config or DataConfig("the data set", streaming=True), **options)
        check_config(config)
        if table.features is None:
            table = table._resolve_features()
        columns, table = find_columns(table, config)
        self.table, self.columns, self.config = table, columns, config
        first = list(self._headers())
        if not first:
            raise ValueError(f"{config.source} has no images that can be read among its first {FIRST} rows")
        self.channels = config.channels or (1 if all(header.grey for header in first) else 3)
        self.image_size = choose_size(config, first)
        self.background = fill_colour(config.background, self.channels)
        self._names = None
        if columns.label:
            self._names = _label_names(table, columns.label)
            chosen = config.class_names or self._names
            if chosen is None:
                raise ValueError(
                    f"label_column={columns.label!r} of the stream {config.source} does not tell its classes; "
                    "give class_names, in label order"
                )
            self.class_names = list(chosen)
        self.vector_dim = len(columns.vectors) or None

    def _headers(self) -> Iterator[Header]:
        for row in self.table.take(FIRST):
            try:
                yield header_of(open_image(_content(row[self.columns.image]), "a row"))
            except UnreadableItemError:
                continue

    def epoch(self, number: int, seed: int) -> Iterator[dict[str, Any]]:
        """The rows of the shards in a new order, mixed in a buffer.

        `IterableDataset.shuffle` reads shards in threads, and then the order is another in each run.
        """
        rng, shards = np.random.default_rng([seed, number, 0, 3]), self.table.num_shards
        buffer: list[dict[str, Any]] = []
        for shard in rng.permutation(shards).tolist():
            for row in self.table.shard(shards, shard):
                if len(buffer) < self.config.shuffle_buffer:
                    buffer.append(row)
                    continue
                i = int(rng.integers(len(buffer)))
                yield buffer[i]
                buffer[i] = row
        yield from (buffer[i] for i in rng.permutation(len(buffer)))

    def decode(self, row: dict[str, Any], place: StreamIndex) -> dict[str, Any]:
        c, columns = self.config, self.columns
        name = f"item {place.position} of {c.source}"
        image = open_image(_content(row[columns.image]), name)
        pixels = to_float(to_pixels(image, self.channels, self.image_size, c.resize_mode, c.background))
        item: dict[str, Any] = {"image": augment(pixels, self.image_size, c, place.rng(), self.background)}
        if columns.label and self.class_names is not None:
            label, _ = encode_labels([row[columns.label]], self._names or self.class_names, c.source)
            item["class_labels"] = as_numbered(label, self._names, self.class_names)[0]
        if columns.caption:
            item["caption"] = _one_caption(row[columns.caption])
        if columns.vectors:
            item["vector"] = encode_vectors({name: [row[name]] for name in columns.vectors}, c.source)[0]
        return item


def load_hub(config: DataConfig) -> HubDataset | HubStream:
    """The data set that `config.source` names: "hf:NAME", "hf:NAME:SUBSET", a .parquet file, or a folder of them."""
    import datasets

    path = Path(config.source)
    load: Any = datasets.load_dataset
    datasets.utils.disable_progress_bars()
    try:
        if config.source.startswith("hf:"):
            name, _, subset = config.source.removeprefix("hf:").partition(":")
            table = load(name, subset or None, split=config.split, streaming=config.streaming)
        else:
            files = [str(path)] if path.is_file() else sorted(map(str, path.rglob("*.parquet")))
            found = {config.split: files}
            table = load("parquet", data_files=found, split=config.split, streaming=config.streaming)
    except Exception as error:  # the hub's, pyarrow's and datasets' own kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{config.source} cannot be loaded as a data set: {lines[0]}") from None
    return HubStream(table, config) if config.streaming else HubDataset(table, config)


def find_columns(table: Any, config: DataConfig) -> tuple[Columns, Any]:
    """The columns to use, and the table with its images left encoded."""
    import datasets

    features, where = dict(table.features), config.source
    names = set(features)
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image = pick_column(names, "image_column", config.image_column, [*pictures, *IMAGE_COLUMNS], where)
    if image is None:
        raise ValueError(f"{where} has no column of images; give image_column, one of {', '.join(sorted(names))}")
    kind = getattr(features[image], "dtype", "")
    if isinstance(features[image], datasets.Value) and not kind.endswith(("binary", "string")):
        raise ValueError(f"image_column={image!r} of {where} holds {kind}, not images")
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    label = pick_column(names, "label_column", config.label_column, [*classes, "label", "labels"], where)
    caption = pick_column(names, "caption_column", config.caption_column, CAPTION_COLUMNS, where)
    for name in config.vector_columns:
        pick_column(names, "vector_columns", name, (), where)
    table = table.cast_column(image, datasets.Image(decode=False))
    return Columns(image, label, caption, config.vector_columns), table


def _label_names(table: Any, column: str) -> list[str] | None:
    names: list[str] | None = getattr(table.features[column], "names", None)
    return names


def _one_caption(caption: Any) -> str:
    """The caption, the first where an image has several."""
    if isinstance(caption, list):
        caption = caption[0] if caption else None
    return "" if caption is None else str(caption)


def _content(cell: Any) -> Source:
    """The content or the path of an image's cell."""
    if isinstance(cell, bytes):
        return cell
    if not cell or (cell.get("bytes") is None and cell.get("path") is None):
        return b""
    content: Source = cell["bytes"] if cell.get("bytes") is not None else cell["path"]
    return content
