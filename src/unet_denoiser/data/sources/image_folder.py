"""Images below a folder, with classes, captions and vectors from sub-folders or metadata files."""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.columns import CAPTION_COLUMNS, encode_labels, encode_vectors, pick_column
from unet_denoiser.data.dataset import refuse_options
from unet_denoiser.data.sources.encoded_images import EncodedImages, check_config, split_usable
from unet_denoiser.data.sources.verification import verify_images
from unet_denoiser.data.transforms import SUFFIXES

METADATA = ("metadata.csv", "metadata.jsonl")


class ImageFolder(EncodedImages):
    """Images below a folder, decoded when they are asked for.

    The folder's sub-folders are the classes, whatever lies how deep in them. A metadata.csv or metadata.jsonl, in the
    folder or in sub-folders of it, names files in its column "file_name" and brings captions, classes and vectors
    instead; images it does not name are left out. Files that do not end as images do, and hidden ones, are none.

    Args:
        folder: any formats that Pillow reads.
        config: every other option of the data, or some of its fields by name.

    Raises:
        FileNotFoundError, ValueError: no folder, no images, or images that cannot be used, by their paths.
    """

    def __init__(self, folder: str | Path, config: DataConfig | None = None, **options: Any) -> None:
        config = replace(config or DataConfig(str(folder)), **options)
        check_config(config)
        refuse_options(config, ("split", "image_column", "streaming"), "a folder of images")
        self.folder = Path(folder)
        files = list_images(self.folder)
        rows = read_metadata(self.folder)
        if rows is not None:
            if left_out := len(set(files) - set(rows)):
                warnings.warn(f"{left_out} images in {folder} are not in its metadata and are left out", stacklevel=2)
            files = sorted(rows)
        if not files:
            raise ValueError(f"no images were found in {folder}")
        stamps = {file: _stamp(self.folder / file) for file in files}
        found = verify_images(str(self.folder.absolute()), stamps, self._path)
        headers, config = split_usable(found, config, str(self.folder))
        self.files = list(headers)
        if rows is None:
            self._classes_of_folders(config)
        else:
            self._conditions_of_rows([rows[file] for file in self.files], config)
        self._set_up(config, list(headers.values()))

    def __len__(self) -> int:
        return len(self.files)

    def source(self, index: int) -> str:
        return self._path(self.files[index])

    def _path(self, file: str) -> str:
        return str(self.folder / file)

    def name(self, index: int) -> str:
        return self.source(index)

    def _classes_of_folders(self, config: DataConfig) -> None:
        tops = [PurePosixPath(file).parts[0] if "/" in file else None for file in self.files]
        named = [top for top in tops if top is not None]
        if len(named) == len(tops):
            self.labels, self.class_names = encode_labels(named, config.class_names, str(self.folder))
        elif named:
            warnings.warn(
                f"{len(tops) - len(named)} of {len(tops)} images lie beside the sub-folders of {self.folder}, not in "
                "them; so the sub-folders are not taken as classes",
                stacklevel=2,
            )
        refuse_options(config, ("label_column", "caption_column", "vector_columns"), "a folder without metadata")

    def _conditions_of_rows(self, rows: list[dict[str, Any]], config: DataConfig) -> None:
        names = {name for row in rows for name in row}  # what a row lacks is then said by its column's name
        where = f"the metadata of {self.folder}"
        label = pick_column(names, "label_column", config.label_column, ("label", "labels"), where)
        caption = pick_column(names, "caption_column", config.caption_column, CAPTION_COLUMNS, where)
        if label:
            values = _column(rows, label, where)
            self.labels, self.class_names = encode_labels(_as_integers(values), config.class_names, where)
        if caption:
            self.captions = [str(value) for value in _column(rows, caption, where)]
        if config.vector_columns:
            columns = {name: _column(rows, name, where) for name in config.vector_columns}
            self.vectors = encode_vectors(columns, where)
            self.vector_dim = len(columns)


def list_images(folder: Path) -> list[str]:
    """The files below a folder that are named as images are, hidden ones left out: sorted paths, relative, with "/"."""
    found = []

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        base = Path(root).relative_to(folder)
        named = [name for name in files if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES]
        found += [(base / name).as_posix() for name in named]
    return sorted(found)


def read_metadata(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The rows of all metadata files below a folder by the path of their image; None where there are no such files."""
    paths = sorted(path for name in METADATA for path in folder.rglob(name))
    if not paths:
        return None
    rows = {}
    for path in paths:
        base = path.parent.relative_to(folder)
        for number, row in enumerate(_read_rows(path), start=1):
            if not row.get("file_name"):
                raise ValueError(f"row {number} of {path} has no file_name; it has {', '.join(map(str, row))}")
            if None in row:  # where the csv module puts what is beyond the columns
                raise ValueError(
                    f"row {number} of {path} has more values than there are columns; put quotes around text with commas"
                )
            rows[os.path.normpath(base / str(row.pop("file_name"))).replace(os.sep, "/")] = row
    return rows


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file)
            else:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise ValueError(
                                f"line {number} of {path} is no object with a file_name: {line.strip()[:80]}"
                            )
                        yield row
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _column(rows: list[dict[str, Any]], name: str, where: str) -> list[Any]:
    missing = [i for i, row in enumerate(rows) if row.get(name) in (None, "")]
    if missing:
        raise ValueError(
            f"{where} has no {name!r} in {len(missing)} of {len(rows)} rows; columns: {', '.join(rows[0])}"
        )
    return [row[name] for row in rows]


def _as_integers(values: list[Any]) -> list[Any]:
    """Integers where all values are, as a .csv has them as text; otherwise names."""
    texts = [str(value) for value in values]
    return [int(text) for text in texts] if all(text.isdecimal() for text in texts) else texts


def _stamp(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except OSError:
        return [-1, -1]
    return [stat.st_size, stat.st_mtime_ns]
