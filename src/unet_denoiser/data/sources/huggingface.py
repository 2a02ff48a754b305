"""Hugging Face datasets and Parquet files, held on disk or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.columns import CAPTION_COLUMNS, encode_labels, encode_vectors, pick_column, renumber_labels
from unet_denoiser.data.dataset import StreamDataset, StreamIndex
from unet_denoiser.data.sources.encoded_images import EncodedImages, check_config, choose_size, split_usable
from unet_denoiser.data.sources.verification import Header, verify_images
from unet_denoiser.data.transforms import Source, UnreadableItemError, augment, make_fill, read_pixels, to_float

if TYPE_CHECKING:
    import datasets

UNNAMED_SOURCE = "the data set"  # spelled as in the keys of existing caches
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "pixels")
STREAM_HEADER_ROWS = 64  # at the start of a stream, which decide its channels and size


class Columns(NamedTuple):
    """The names of a table's columns that are used, and the classes of a ClassLabel column."""

    image: str
    label: str | None
    caption: str | None
    class_names: list[str] | None


class HubDataset(EncodedImages):
    """The images of a `datasets.Dataset`.

    Args:
        table: with a column of images; it may have labels, captions and numbers.
        config, options: the other options of the data, and fields of `config` to change; its source is for messages.

    Raises:
        ValueError: missing columns, or images that cannot be used, by their rows.
    """

    def __init__(self, table: datasets.Dataset, config: DataConfig | None = None, **options: Any) -> None:
        config = replace(config or DataConfig(UNNAMED_SOURCE), **options)
        check_config(config)
        columns, table = find_columns(table, config)
        stamps = {f"row {i}": [0] for i in range(len(table))}
        if not stamps:
            raise ValueError(f"{config.source} has no rows")
        images = table.select_columns([columns.image])
        # the fingerprint of `datasets` changes with the content, so rows need no stamps
        name = f"{config.source} {columns.image} {table._fingerprint}"
        headers = verify_images(name, stamps, lambda row: _read_cell(images[int(row[4:])][columns.image]))
        headers, config = split_usable(headers, config, config.source)
        kept = [int(row[4:]) for row in headers]
        self.table = table if len(kept) == len(table) else table.select(kept)
        self.columns, self.images = columns, self.table.select_columns([columns.image])
        self.labels, self.class_names, self.captions, self.vectors = read_conditions(self.table, columns, config)
        self.vector_dim = len(config.vector_columns) or None
        self._set_up(config, list(headers.values()))

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f"row {int(index)} of {self.config.source}"

    def source(self, index: int) -> Source:
        return _read_cell(self.images[int(index)][self.columns.image])


class HubStream(StreamDataset):
    """The images of a `datasets.IterableDataset`, in a new order each epoch, shuffled through a buffer.

    Every process reads the whole stream and decodes its slice of each batch. So order and batches are the same for any
    number of processes, and a resumed run continues exactly, after reading up to its position without decoding. The
    arguments are those of `HubDataset`.
    """

    def __init__(self, table: datasets.IterableDataset, config: DataConfig | None = None, **options: Any) -> None:
        config = replace(config or DataConfig(UNNAMED_SOURCE, streaming=True), **options)
        check_config(config)
        if table.features is None:
            table = table._resolve_features()
        columns, table = find_columns(table, config)
        self.table, self.columns, self.config = table, columns, config
        headers = list(self._read_headers())
        self.headers = headers
        if not headers:
            raise ValueError(f"{config.source} has no readable images among its first {STREAM_HEADER_ROWS} rows")
        self.channels = config.channels or (1 if all(header.is_grey for header in headers) else 3)
        self.image_size = choose_size(config, headers)
        self.background = make_fill(config.background, self.channels)
        if columns.label:
            names = config.class_names or columns.class_names
            if names is None:
                found = f"label_column={columns.label!r} of the stream {config.source} does not tell its classes"
                raise ValueError(f"{found}; give class_names, in label order")
            self.class_names = list(names)
        self.vector_dim = len(config.vector_columns) or None

    def _read_headers(self) -> Iterator[Header]:
        for row in self.table.take(STREAM_HEADER_ROWS):
            with suppress(UnreadableItemError):
                yield Header.read(_read_cell(row[self.columns.image]), "a row")

    def read_epoch(self, epoch: int, seed: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of all shards, the shards in a new order and their rows mixed in a buffer.

        `IterableDataset.shuffle` would not do: it reads shards in threads, in an order that differs from run to run.
        """
        rng, shards = np.random.default_rng([seed, epoch, 0, 3]), self.table.num_shards
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

    def decode(self, raw: dict[str, Any], index: StreamIndex) -> dict[str, Any]:
        config, columns = self.config, self.columns
        source, name = _read_cell(raw[columns.image]), f"item {index.position} of {config.source}"
        image = to_float(read_pixels(source, name, self.channels, self.image_size, config))
        image = augment(image, self.image_size, config, rng=index.rng(), background=self.background)
        row = {name: [value] for name, value in raw.items()}
        labels, _, captions, vectors = read_conditions(row, columns, config)
        found: Any = {"class_labels": labels, "caption": captions, "vector": vectors}
        return {"image": image} | {name: values[0] for name, values in found.items() if values is not None}


def load_hub(config: DataConfig) -> HubDataset | HubStream:
    """Load the dataset that `config.source` names: "hf:NAME", "hf:NAME:SUBSET", a .parquet file or a folder of them."""
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
            table = load("parquet", data_files={config.split: files}, split=config.split, streaming=config.streaming)
    except Exception as error:  # the hub, pyarrow and datasets raise exceptions of many types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{config.source} cannot be loaded as a dataset: {lines[0]}") from None
    return HubStream(table, config) if config.streaming else HubDataset(table, config)


def find_columns(table: Any, config: DataConfig) -> tuple[Columns, Any]:
    """Return the columns to use, and the table with its images left encoded; ValueError if a column is missing."""
    import datasets

    features, where = dict(table.features), config.source
    names = set(features)
    image_columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image = pick_column(names, "image_column", config.image_column, [*image_columns, *IMAGE_COLUMNS], where)
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
    # decoded by `open_image`, so that all sources give the same pixels
    table = table.cast_column(image, datasets.Image(decode=False))
    return Columns(image, label, caption, getattr(features.get(label), "names", None)), table


def read_conditions(
    table: Any, columns: Columns, config: DataConfig
) -> tuple[Tensor | None, list[str] | None, list[str] | None, Tensor | None]:
    """Return labels (N,), class names, N captions and vectors (N, D) of a table or dict of columns, or None each."""
    labels = class_names = captions = vectors = None
    if columns.label:
        names = columns.class_names or config.class_names
        labels, found_names = encode_labels(list(table[columns.label]), names, config.source)
        class_names = list(config.class_names or found_names)
        labels = renumber_labels(labels, columns.class_names, class_names)
    if columns.caption:
        captions = [_first_caption(caption) for caption in table[columns.caption]]
    if config.vector_columns:
        vectors = encode_vectors({name: list(table[name]) for name in config.vector_columns}, config.source)
    return labels, class_names, captions, vectors


def _first_caption(caption: Any) -> str:
    first = next(iter(caption), None) if isinstance(caption, list) else caption
    return "" if first is None else str(first)


def _read_cell(cell: Any) -> Source:
    """Return the content or the path of the image in a cell; b"" for an empty one."""
    if isinstance(cell, bytes):
        return cell
    contents = [cell[key] for key in ("bytes", "path") if cell and cell.get(key) is not None]
    return contents[0] if contents else b""
