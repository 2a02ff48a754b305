"""A folder of images, with classes, captions and vectors from sub-folders or metadata files."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.paths import local_path
from unet_denoiser.data.columns import (
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    encode_labels,
    encode_vectors,
    parse_texts,
    read_caption,
    warn_unused,
)
from unet_denoiser.data.dataset import refuse_options
from unet_denoiser.data.sources import folder_walk as walk
from unet_denoiser.data.sources.encoded_images import EncodedImages, check_config, split_usable
from unet_denoiser.data.sources.metadata import Cell, Metadata
from unet_denoiser.data.sources.verification import MISSING, Header, verify_images
from unet_denoiser.utils.terminal import name_some

SUB_FOLDERS = "its sub-folders"


class Columns(NamedTuple):
    """The columns of metadata that are used, a value for each image, and where they come from."""

    labels: list[Cell] | None = None
    captions: list[str] | None = None
    vectors: Tensor | None = None
    origins: Mapping[str, str] = {}


class ImageFolder(EncodedImages):
    """The images in a folder and its sub-folders, decoded when they are asked for.

    The first sub-folder of each image's path is its class, however deep the image lies. A metadata.csv or
    metadata.jsonl, in the folder or in sub-folders, may name images in its column "file_name" and give captions,
    vectors and other classes; images that it does not name are left out. Hidden files and folders are ignored, and so
    are files whose suffix is not that of an image format. Links to folders are followed; each folder is read once.

    Args:
        folder: images in any format that Pillow reads.
        config, options: the other options of the data, and fields of `config` to change.

    Raises:
        FileNotFoundError, ValueError: no folder, no images, or images that cannot be used, by their paths.
    """

    def __init__(self, folder: str | Path, config: DataConfig | None = None, **options: Any) -> None:
        config = replace(config or DataConfig(str(folder)), **options)
        check_config(config)
        refuse_options(config, ("split", "image_column", "streaming"), "a folder of images")
        self.folder = local_path(folder)
        walk.check_encoding(str(self.folder.absolute()), "the folder")
        contents = walk.walk_folder(self.folder)
        for name in contents.sub_folders:
            walk.check_encoding(name, f"a sub-folder of {folder}")
        walk.warn_of_links(contents)
        metadata = Metadata(contents) if contents.metadata else None
        files = contents.images if metadata is None else sorted(metadata.rows)
        if not files:
            others = f", only {found}, which are not read" if (found := walk.describe_unread(contents)) else ""
            raise ValueError(f"no images were found in {folder}{others}")
        if metadata is None:
            refuse_options(config, ("label_column", "caption_column", "vector_columns"), "a folder without metadata")
        elif left_out := sorted(set(contents.images) - set(files)):
            found = f"{len(left_out)} images in {folder} are not in its metadata and are left out"
            warnings.warn(f"{found}: {name_some(left_out)}", stacklevel=2)
        # before the images are verified, which may take minutes
        columns = Columns() if metadata is None else read_columns(metadata, files, config)
        headers, config = split_usable(self._verify(files, metadata), config, str(self.folder))
        self.files = list(headers)
        self._set_conditions(columns, [i for i, file in enumerate(files) if file in headers], config, metadata)
        walk.warn_of_unread(contents, has_captions=self.captions is not None)
        walk.warn_of_sub_folders(contents, self.files, self.origins.get("class_labels") == SUB_FOLDERS)
        self._set_up(config, list(headers.values()))

    def __len__(self) -> int:
        return len(self.files)

    def source(self, index: int) -> str:
        return str(self.folder / self.files[index])

    def _verify(self, files: Sequence[str], metadata: Metadata | None) -> dict[str, Header]:
        stamps = {file: _stamp(self.folder / file) for file in files}
        headers = verify_images(str(self.folder.absolute()), stamps, lambda file: str(self.folder / file))
        if metadata is not None:
            for file in [file for file in files if headers[file].problem == MISSING]:
                named = f"{MISSING} ({metadata.rows[file][0].place} names it)"
                headers[file] = headers[file]._replace(problem=named)
        return headers

    def _set_conditions(self, columns: Columns, kept: list[int], config: DataConfig, metadata: Metadata | None) -> None:
        self.origins = columns.origins
        if columns.labels is not None and metadata is not None:
            self.labels, self.class_names = encode_cells([columns.labels[i] for i in kept], config, metadata.where)
        elif classes := find_folder_classes(self.folder, self.files, has_metadata=metadata is not None):
            self.labels, self.class_names = encode_labels(classes, config.class_names, str(self.folder))
            self.origins = {**self.origins, "class_labels": SUB_FOLDERS}
        if self.class_names is not None:
            walk.warn_of_similar(self.class_names, str(self.folder))
        if columns.captions is not None:
            self.captions = [columns.captions[i] for i in kept]
        if columns.vectors is not None:
            self.vectors, self.vector_dim = columns.vectors[kept], columns.vectors.shape[1]


def read_columns(metadata: Metadata, files: Sequence[str], config: DataConfig) -> Columns:
    """Read the columns that the options or their names make conditions."""
    where, numbers, origins = metadata.where, config.vector_columns, {}
    labels = captions = vectors = None
    label = metadata.find_column("label_column", config.label_column, LABEL_COLUMNS)
    caption = metadata.find_column("caption_column", config.caption_column, CAPTION_COLUMNS)
    named = warn_unused(sorted(metadata.names - {*numbers}), label, caption, where)
    if metadata.names and not (named or label or caption or numbers):
        found = f"no column of {where} is used: {name_some(sorted(metadata.names))}"
        warnings.warn(f"{found}; label_column, caption_column or vector_columns would use them", stacklevel=3)
    if label:
        labels, origins["class_labels"] = metadata.read_column(label, files), metadata.describe(label)
        encode_cells(labels, config, where)  # raises for values that are no labels
    if caption:
        cells, origins["caption"] = metadata.read_column(caption, files), metadata.describe(caption)
        captions = [read_caption(cell.value, where, cell.place) for cell in cells]
    if numbers:
        origins["vector"] = metadata.describe(*numbers)
        vectors = torch.cat([_encode_column(name, metadata.read_column(name, files), where) for name in numbers], 1)
    return Columns(labels, captions, vectors, origins)


def encode_cells(cells: Sequence[Cell], config: DataConfig, where: str) -> tuple[Tensor, list[str]]:
    """Return labels and class names as `encode_labels` does; texts that are integers become such."""
    values = [cell.value for cell in cells]
    if all(isinstance(value, str) for value in values):
        values = parse_texts(values, config.class_names)
    return encode_labels(values, config.class_names, where, lambda i: cells[i].place)


def _encode_column(name: str, cells: Sequence[Cell], where: str) -> Tensor:
    """Return a column of numbers as (N, 1)."""
    return encode_vectors({name: [cell.value for cell in cells]}, where, lambda i: cells[i].place)


def find_folder_classes(folder: Path, files: Sequence[str], has_metadata: bool) -> list[str] | None:
    """Return the first sub-folder of each file, its class; None if files lie beside the sub-folders.

    Beside metadata, which are there to tell what images show, one sub-folder or "train" and "test" are no classes.
    """
    outside = [file for file in files if os.path.isabs(file) or file.startswith("../")]
    classes = [file.partition("/")[0] for file in files if "/" in file]
    if has_metadata and (outside or len(set(classes)) < 2 or all(map(walk.is_split, classes))):
        return None
    if classes and len(classes) < len(files):
        found = (
            f"{len(files) - len(classes)} of {len(files)} images lie beside the sub-folders of {folder}, not in them"
        )
        warnings.warn(f"{found}; so the sub-folders are not taken as classes", stacklevel=4)
        return None
    return classes or None


def _stamp(path: Path) -> list[int]:
    """Return size and times of modification and change in nanoseconds; -1 for a missing file."""
    try:
        stat = path.stat()
    except (OSError, ValueError):  # ValueError: a name with a NUL
        return [-1, -1, -1]
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
