"""A folder of images, with classes, captions and vectors from sub-folders or metadata files."""

import csv
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.paths import local_path
from unet_denoiser.data.columns import CAPTION_COLUMNS, encode_labels, encode_vectors, pick_column
from unet_denoiser.data.dataset import refuse_options
from unet_denoiser.data.sources.encoded_images import EncodedImages, check_config, split_usable
from unet_denoiser.data.sources.verification import verify_images
from unet_denoiser.data.transforms import SUFFIXES

METADATA_FILES = ("metadata.csv", "metadata.jsonl")


class ImageFolder(EncodedImages):
    """The images in a folder and its sub-folders, decoded when they are asked for.

    The first sub-folder of each image's path is its class, however deep the image lies. Instead, a metadata.csv or
    metadata.jsonl, in the folder or in sub-folders, may name images in its column "file_name" and give captions,
    classes and vectors; images that it does not name are left out. Hidden files, and files whose suffix is not that of
    an image format, are ignored.

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
        files = list_images(self.folder)
        rows = read_metadata(self.folder)
        if rows is not None:
            if left_out := len(set(files) - set(rows)):
                warnings.warn(f"{left_out} images in {folder} are not in its metadata and are left out", stacklevel=2)
            files = sorted(rows)
        if not files:
            raise ValueError(f"no images were found in {folder}")
        stamps = {file: _stamp(self.folder / file) for file in files}
        headers = verify_images(str(self.folder.absolute()), stamps, lambda file: str(self.folder / file))
        headers, config = split_usable(headers, config, str(self.folder))
        self.files = list(headers)
        if rows is None:
            self._read_folder_classes(config)
        else:
            self._read_metadata_columns([rows[file] for file in self.files], config)
        self._set_up(config, list(headers.values()))

    def __len__(self) -> int:
        return len(self.files)

    def source(self, index: int) -> str:
        return str(self.folder / self.files[index])

    def _read_folder_classes(self, config: DataConfig) -> None:
        classes, count = [file.partition("/")[0] for file in self.files if "/" in file], len(self.files)
        if len(classes) == count:
            self.labels, self.class_names = encode_labels(classes, config.class_names, str(self.folder))
        elif classes:
            found = f"{count - len(classes)} of {count} images lie beside the sub-folders of {self.folder}, not in them"
            warnings.warn(f"{found}; so the sub-folders are not taken as classes", stacklevel=2)
        refuse_options(config, ("label_column", "caption_column", "vector_columns"), "a folder without metadata")

    def _read_metadata_columns(self, rows: list[dict[str, Any]], config: DataConfig) -> None:
        names = {name for row in rows for name in row}  # of all rows, so that a row without a value is reported
        where = f"the metadata of {self.folder}"
        label = pick_column(names, "label_column", config.label_column, ("label", "labels"), where)
        caption = pick_column(names, "caption_column", config.caption_column, CAPTION_COLUMNS, where)
        if label:
            values = _read_column(rows, label, where)
            self.labels, self.class_names = encode_labels(_parse_integers(values), config.class_names, where)
        if caption:
            self.captions = [str(value) for value in _read_column(rows, caption, where)]
        if config.vector_columns:
            self.vectors = encode_vectors({k: _read_column(rows, k, where) for k in config.vector_columns}, where)
            self.vector_dim = len(config.vector_columns)


def list_images(folder: Path) -> list[str]:
    """Return the sorted paths of the image files below a folder, relative to it and with "/", without hidden ones."""
    found = []

    def refuse(error: OSError) -> None:  # by default os.walk passes over such folders
        raise error

    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]  # in place: os.walk descends into these
        base = Path(root).relative_to(folder)
        images = [name for name in files if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES]
        found += [(base / name).as_posix() for name in images]
    return sorted(found)


def read_metadata(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Return the rows of all metadata files below a folder, by their image's path; None without such files."""
    paths = sorted(path for name in METADATA_FILES for path in folder.rglob(name))
    if not paths:
        return None
    rows = {}
    for path in paths:
        base = path.parent.relative_to(folder)
        for number, row in enumerate(_read_rows(path), start=1):
            if not row.get("file_name"):
                raise ValueError(f"row {number} of {path} has no file_name; it has {', '.join(map(str, row))}")
            if None in row:  # the csv module's key for values beyond the last column
                raise ValueError(f"row {number} of {path} has more values than columns; put quotes around commas")
            rows[os.path.normpath(base / str(row.pop("file_name"))).replace(os.sep, "/")] = row
    return rows


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file)
                return
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} of {path} is no object with a file_name: {line.strip()[:80]}")
                yield row
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _read_column(rows: list[dict[str, Any]], name: str, where: str) -> list[Any]:
    if missing := sum(row.get(name) in (None, "") for row in rows):
        raise ValueError(f"{where} has no {name!r} in {missing} of {len(rows)} rows; columns: {', '.join(rows[0])}")
    return [row[name] for row in rows]


def _parse_integers(values: list[Any]) -> list[Any]:
    """Return integers if all values are, since a .csv holds text only; otherwise names."""
    texts = [str(value) for value in values]
    return [int(text) for text in texts] if all(text.isdecimal() for text in texts) else texts


def _stamp(path: Path) -> list[int]:
    """Return size and modification time in nanoseconds; -1 for a missing file."""
    try:
        stat = path.stat()
    except OSError:
        return [-1, -1]
    return [stat.st_size, stat.st_mtime_ns]
