"""Hugging Face datasets and Parquet files, held on disk or streamed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.columns import (
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    Namer,
    encode_labels,
    encode_vectors,
    is_absent,
    pick_column,
    read_caption,
    renumber_labels,
    warn_unused,
)
from unet_denoiser.data.dataset import StreamDataset, StreamIndex
from unet_denoiser.data.sources.encoded_images import EncodedImages, check_config, choose_size, split_usable
from unet_denoiser.data.sources.parquet_files import check_files, choose_files
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

    def origins(self, config: DataConfig) -> dict[str, str]:
        """Return the columns of the conditions, as `ImageDataset.origins`."""
        vector = ", ".join(config.vector_columns) or None
        found = {"class_labels": self.label, "caption": self.caption, "vector": vector}
        return {name: f"column {column}" for name, column in found.items() if column}


class HubDataset(EncodedImages):
    """The images of a `datasets.Dataset`.

    Args:
        table: with a column of images; it may have labels, captions and numbers.
        config, options: the other options of the data, and fields of `config` to change; its source is for messages.

    Raises:
        ValueError: missing columns, or images that cannot be used, by their rows.
    """

    def __init__(self, table: datasets.Dataset, config: DataConfig | None = None, **options: Any) -> None:
        config = source = replace(config or DataConfig(UNNAMED_SOURCE), **options)
        check_config(config)
        if table.format["type"] == "custom":
            raise TypeError("the data set has a transform; give it to Trainer, which takes the items that it makes")
        columns, table = find_columns(table if table.format["type"] is None else table.with_format(None), config)
        stamps = {f"row {i}": [0] for i in range(len(table))}
        if not stamps:
            raise ValueError(f"{config.source} has no rows")
        images = table.select_columns([columns.image])
        # the fingerprint of `datasets` changes with the content, so rows need no stamps
        name = f"{config.source} {columns.image} {table._fingerprint}"
        headers = verify_images(name, stamps, lambda row: _read_cell(images[int(row[4:])][columns.image], source, row))
        for column in filter(None, (columns.label, columns.caption)):
            for i in (i for i, value in enumerate(table[column]) if is_absent(value)):
                headers[f"row {i}"] = headers[f"row {i}"]._replace(problem=f"has no {column!r}")
        headers, config = split_usable(headers, config, config.source)
        kept = [int(row[4:]) for row in headers]
        self.table = table if len(kept) == len(table) else table.select(kept)
        self.columns, self.images = columns, self.table.select_columns([columns.image])
        found = read_conditions(self.table, columns, config, lambda i: f"row {kept[i]}")
        self.labels, self.class_names, self.captions, self.vectors = found
        self.vector_dim, self.origins = len(config.vector_columns) or None, columns.origins(config)
        self._set_up(config, list(headers.values()))

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f"row {int(index)} of {self.config.source}"

    def source(self, index: int) -> Source:
        return _read_cell(self.images[int(index)][self.columns.image], self.config, self.name(index))


class HubStream(StreamDataset):
    """The images of a `datasets.IterableDataset`, in a new order each epoch, shuffled through a buffer.

    Every process reads the whole stream and decodes its slice of each batch. So order and batches are the same for any
    number of processes, and a resumed run continues exactly, after reading up to its position without decoding. The
    arguments are those of `HubDataset`.
    """

    def __init__(self, table: datasets.IterableDataset, config: DataConfig | None = None, **options: Any) -> None:
        config = replace(config or DataConfig(UNNAMED_SOURCE, streaming=True), **options)
        check_config(config)
        if (features := resolve_features(table)) is None:
            raise ValueError(f"the columns of the stream {config.source} have no types that `datasets` can tell")
        columns, table = find_columns(features.with_format(None), config)
        self.table, self.columns, self.config = table, columns, config
        self.problem = "it is empty"
        headers = list(self._read_headers())
        self.headers = headers
        if not headers:
            found = f"has no readable images among its first {STREAM_HEADER_ROWS} rows"
            raise ValueError(f"{config.source} {found}: {self.problem}")
        self.channels = config.channels or (1 if all(header.is_grey for header in headers) else 3)
        self.image_size = choose_size(config, headers)
        self.background = make_fill(config.background, self.channels)
        if columns.label:
            names = config.class_names or columns.class_names
            if names is None:
                found = f"label_column={columns.label!r} of the stream {config.source} does not tell its classes"
                raise ValueError(f"{found}; give class_names, in label order")
            self.class_names = list(names)
        self.vector_dim, self.origins = len(config.vector_columns) or None, columns.origins(config)

    def _read_headers(self) -> Iterator[Header]:
        for i, row in enumerate(self.table.take(STREAM_HEADER_ROWS)):
            try:
                yield Header.read(_read_cell(row[self.columns.image], self.config, f"row {i}"), f"row {i}")
            except UnreadableItemError as error:
                self.problem = str(error)

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
        name = f"item {index.position} of {config.source}"
        for column in filter(None, (columns.label, columns.caption)):
            if is_absent(raw[column]):
                raise UnreadableItemError(name, f"has no {column!r}")
        source = _read_cell(raw[columns.image], config, name)
        image = to_float(read_pixels(source, name, self.channels, self.image_size, config))
        image = augment(image, self.image_size, config, rng=index.rng(), background=self.background)
        row = {name: [value] for name, value in raw.items()}
        labels, _, captions, vectors = read_conditions(row, columns, config, lambda _: f"item {index.position}")
        found: Any = {"class_labels": labels, "caption": captions, "vector": vectors}
        return {"image": image} | {name: values[0] for name, values in found.items() if values is not None}


def load_hub(config: DataConfig) -> HubDataset | HubStream:
    """Load the dataset that `config.source` names: "hf:NAME", "hf:NAME:SUBSET", a .parquet file or a folder of them."""
    import datasets

    load: Any = datasets.load_dataset
    datasets.utils.disable_progress_bars()
    is_named = config.source.startswith("hf:")
    files, split = ({}, config.split) if is_named else choose_files(Path(config.source), config.split)
    try:
        if is_named:
            name, _, subset = config.source.removeprefix("hf:").partition(":")
            table = load(name, subset or None, split=split, streaming=config.streaming)
        else:
            check_files(files)
            table = load("parquet", data_files=files, split=split, streaming=config.streaming)
    except Exception as error:  # the hub, pyarrow and datasets raise exceptions of many types
        cause: BaseException = error
        while cause.__cause__ is not None:  # the last one only says that an error occurred
            cause = cause.__cause__
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise ValueError(f"{config.source} cannot be loaded as a dataset: {lines[0]}") from None
    return HubStream(table, config) if config.streaming else HubDataset(table, config)


def find_columns(table: Any, config: DataConfig) -> tuple[Columns, Any]:
    """Return the columns to use, and the table with its images left encoded; ValueError if a column is missing."""
    import datasets

    features, where = dict(table.features), config.source
    names = set(features)
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    usual = [name for name in IMAGE_COLUMNS if name in images]
    image = pick_column(names, "image_column", config.image_column, [*usual, *images, *IMAGE_COLUMNS], where)
    if image is None:
        raise ValueError(f"{where} has no column of images; give image_column, one of {', '.join(sorted(names))}")
    _check_image_feature(features[image], image, where)
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    label = pick_column(names, "label_column", config.label_column, [*LABEL_COLUMNS, *classes], where)
    caption = pick_column(names, "caption_column", config.caption_column, CAPTION_COLUMNS, where)
    for option, taken, alike in (("image_column", image, images), ("label_column", label, classes)):
        if getattr(config, option) is None and len(alike) > 1 and taken not in LABEL_COLUMNS:
            found = f"{where} has the columns {', '.join(alike)}, of which {taken} is used"
            warnings.warn(f"{found}; {option} chooses another", stacklevel=4)
    warn_unused(features, label, caption, where)
    for name in config.vector_columns:
        pick_column(names, "vector_columns", name, (), where)
    # decoded by `open_image`, so that all sources give the same pixels
    table = table.cast_column(image, datasets.Image(decode=False))
    return Columns(image, label, caption, getattr(features.get(label), "names", None)), table


def _check_image_feature(feature: Any, image: str, where: str) -> None:
    """Raise ValueError for a column that holds no image files, such as numbers or arrays of pixels."""
    import datasets

    kind = str(getattr(feature, "dtype", ""))
    is_content = isinstance(feature, datasets.Value) and kind.removesuffix("_view").endswith(("binary", "string"))
    if is_content or isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature):
        return
    found = kind if isinstance(feature, datasets.Value) else type(feature).__name__
    remedy = "give image files as bytes or paths, or the pixels as an .npy file or items {'image': tensor}"
    raise ValueError(f"image_column={image!r} of {where} holds {found}, not images; {remedy}")


def resolve_features(table: datasets.IterableDataset) -> datasets.IterableDataset | None:
    """Return a stream that knows the types of its columns; None for items that no table can hold, such as tensors."""
    if table.features is not None:
        return table
    try:
        return table._resolve_features()
    except Exception:  # pyarrow raises exceptions of many types
        return None


def read_conditions(
    table: Any, columns: Columns, config: DataConfig, name_row: Namer
) -> tuple[Tensor | None, list[str] | None, list[str] | None, Tensor | None]:
    """Return labels (N,), class names, N captions and vectors (N, D) of a table or dict of columns, or None each."""
    labels = class_names = captions = vectors = None
    where = config.source
    if columns.label:
        names = columns.class_names or config.class_names
        labels, found_names = encode_labels(list(table[columns.label]), names, where, name_row)
        class_names = list(config.class_names or found_names)
        labels = renumber_labels(labels, columns.class_names, class_names, where)
    if columns.caption:
        captions = [read_caption(caption, where, name_row(i)) for i, caption in enumerate(table[columns.caption])]
    if config.vector_columns:
        vectors = encode_vectors({name: list(table[name]) for name in config.vector_columns}, where, name_row)
    return labels, class_names, captions, vectors


def _read_cell(cell: Any, config: DataConfig, name: str) -> Source:
    """Return the content or the path of the image in a cell, b"" for an empty one.

    Relative paths count from the working directory, or else from the folder of the .parquet file.

    Raises:
        UnreadableItemError: a path of no file.
    """
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, Image.Image):  # of a stream with a filter, which decodes
        buffer = BytesIO()
        cell.save(buffer, "TIFF")  # loses nothing in any mode
        return buffer.getvalue()
    if not cell or (cell.get("bytes") is None and cell.get("path") is None):
        return b""
    if cell.get("bytes") is not None:
        content: bytes = cell["bytes"]
        return content
    source = Path(config.source)
    places = [Path(cell["path"]), (source if source.is_dir() else source.parent) / cell["path"]]
    if (found := next((place for place in places if place.is_file()), None)) is None:
        raise UnreadableItemError(name, f"names the file {cell['path']}, which does not exist")
    return str(found)
