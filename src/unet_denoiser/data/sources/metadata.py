"""Metadata of a folder of images: the columns of metadata.csv and metadata.jsonl, by image."""

import codecs
import csv
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from unet_denoiser.data.columns import is_absent, pick_column
from unet_denoiser.data.sources.folder_walk import FolderContents
from unet_denoiser.utils.terminal import name_some


class Row(NamedTuple):
    """A row of a metadata file: its values by column, and the line that it begins at."""

    values: dict[str, Any]
    path: Path
    line: int

    @property
    def place(self) -> str:
        return f"line {self.line} of {self.path}"


class Cell(NamedTuple):
    """A value, and its row's place."""

    value: Any
    place: str


class Metadata:
    """The rows of all metadata files below a folder. Several rows of one image complete each other.

    Attributes:
        rows: by each image's path, relative to the folder and with "/", or outside of it.
        names: of all columns, so that rows without a value are found.
        where: the metadata, for messages.
    """

    def __init__(self, contents: FolderContents) -> None:
        self.where = f"the metadata of {contents.folder}"
        self.rows: dict[str, list[Row]] = {}
        locator = _Locator(contents)
        for path in contents.metadata:
            for row in read_rows(contents.folder / path):
                name = row.values.pop("file_name", None)
                if is_absent(name):
                    raise ValueError(f"{row.place} has no file_name; it has {', '.join(row.values) or 'no columns'}")
                if not isinstance(name, str):
                    raise ValueError(f"{row.place} has the file_name {name!r}, which is no text")
                self.rows.setdefault(locator.find(path.rpartition("/")[0], name), []).append(row)
        self.names = {name for rows in self.rows.values() for row in rows for name in row.values}

    def find_column(self, option: str, given: str | None, defaults: Sequence[str]) -> str | None:
        """Return the column that an option names, else the first default there is, in any case; None without one."""
        for name in defaults if given is None else [given]:
            alike = [name] if name in self.names else sorted(n for n in self.names if n.casefold() == name.casefold())
            if len(alike) > 1:
                raise ValueError(f"{self.where} has the columns {', '.join(alike)}; choose one by {option}")
            if alike:
                return alike[0]
        return pick_column(self.names, option, given, (), self.where)

    def read_column(self, name: str, files: Sequence[str]) -> list[Cell]:
        """Return a column's cell for each image.

        Raises:
            ValueError: images without a value, or with two.
        """
        found = [[row for row in self.rows[file] if not is_absent(row.values.get(name))] for file in files]
        if missing := [self.rows[file][0].place for file, rows in zip(files, found, strict=True) if not rows]:
            columns = f"columns: {', '.join(sorted(self.names))}"
            first = f"the first is {missing[0]}"
            raise ValueError(f"{self.where} has no {name!r} in {len(missing)} of {len(files)} rows; {first}; {columns}")
        for file, (row, *others) in zip(files, found, strict=True):
            for other in others:
                if str(other.values[name]) != str(row.values[name]):
                    both = f"{row.values[name]!r} in {row.place} and {other.values[name]!r} in {other.place}"
                    raise ValueError(f"{file} has two values of {name!r}: {both}; give each image one")
        return [Cell(row.values[name], row.place) for row, *_ in found]

    def describe(self, *columns: str) -> str:
        """Return the place of columns that are used, as in "column text of metadata.csv"."""
        rows = (row for rows in self.rows.values() for row in rows)
        files = sorted({row.path.name for row in rows if not row.values.keys().isdisjoint(columns)})
        return f"column{'s' if len(columns) > 1 else ''} {', '.join(columns)} of {' and '.join(files)}"


class _Locator:
    """Finds the images that metadata name, also in the spellings of other systems."""

    def __init__(self, contents: FolderContents) -> None:
        self.folder, self.images = contents.folder, set(contents.images)

    def find(self, base: str, name: str) -> str:
        """Return the path of the image that a metadata file in the sub-folder `base` calls `name`."""
        paths = [_join(base, text) for text in (name, name.strip(), name.strip().replace("\\", "/"))]
        for path in dict.fromkeys(paths):
            if path in self.images:
                return path
            if composed := self._composed.get(unicodedata.normalize("NFC", path)):
                return composed
            if os.path.isfile(self.folder / path):
                return self._real_images.get(self._resolve(path), path)
        return paths[0]

    def _resolve(self, path: str) -> str:
        base, name = os.path.split(self.folder / path)
        return os.path.join(_real_folder(base), name)  # a link to a file stays a file of its own

    @cached_property
    def _composed(self) -> dict[str, str]:
        """Return the images by their names as other systems encode accents."""
        return {unicodedata.normalize("NFC", image): image for image in self.images}

    @cached_property
    def _real_images(self) -> dict[str, str]:
        """Return the images by absolute paths without links to folders."""
        return {self._resolve(image): image for image in self.images}


_real_folder = lru_cache(1024)(os.path.realpath)


def _join(base: str, name: str) -> str:
    return os.path.normpath(os.path.join(base, name)).replace(os.sep, "/")


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a metadata.csv or metadata.jsonl; ValueError naming file and line if that fails."""
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is UTF-16; save it as UTF-8 (in Excel as 'CSV UTF-8')")
    try:
        # without the mark at its start, which "utf-8-sig" does not count in an error's position
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\r|\n", error.object[: error.start])) + 1
        raise ValueError(
            f"line {line} of {path} is not UTF-8 (byte {error.object[error.start]:#x}); save it as UTF-8"
        ) from None
    rows = list((_read_csv if path.suffix.lower() == ".csv" else _read_jsonl)(text, path))
    if not rows:
        raise ValueError(f"{path} {'has a header and no rows' if text.strip() else 'is empty'}")
    return rows


def _read_csv(text: str, path: Path) -> Iterator[Row]:
    first = next((line for line in StringIO(text) if line.strip()), "")
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "'|'")):
        names = [_clean_name(part.strip().strip('"')) for part in first.split(separator)]
        if "file_name" in names and len(names) > 1:
            raise ValueError(f"{path} separates columns by {name}; separate them by commas")
    # strict, since an open quotation mark would otherwise take all lines to the next one into its value
    reader = csv.reader(StringIO(text, newline=""), strict=True, skipinitialspace=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            lines = f"line {line}" if reader.line_num <= line else f"lines {line} to {reader.line_num}"
            raise ValueError(f"{lines} of {path} cannot be read: {error}; check the quotation marks") from None
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = _read_header(cells, f"line {line} of {path}")
            continue
        if any(cell.strip() for cell in cells[len(header) :]):
            raise ValueError(f"line {line} of {path} has more values than columns; put quotes around commas")
        # a column without a name is an index, which pandas writes
        yield Row({name: cell for name, cell in zip(header, cells, strict=False) if name}, path, line)


def _read_header(cells: list[str], place: str) -> list[str]:
    names = [_clean_name(cell) for cell in cells]
    while not names[-1]:  # of spreadsheets
        names.pop()
    if repeated := [name for i, name in enumerate(names) if name and name in names[:i]]:
        raise ValueError(f"{place} has the column {repeated[0]!r} twice")
    if "file_name" not in names:
        raise ValueError(f"{place} names no column file_name; it has {name_some(names)}")
    return names


def _read_jsonl(text: str, path: Path) -> Iterator[Row]:
    for line, content in enumerate(StringIO(text, newline=""), start=1):
        if not content.strip():
            continue
        place = f"line {line} of {path}"
        try:
            values = json.loads(content, object_pairs_hook=_to_dict)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is no whole JSON object: {error.msg} at character {error.pos + 1}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} cannot be read: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{place} is no object with a file_name: {content.strip()[:80]}")
        yield Row(values, path, line)


def _to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = {_clean_name(name): value for name, value in pairs}
    if len(values) < len(pairs):
        names = [_clean_name(name) for name, _ in pairs]
        raise ValueError(f"it has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return values


def _clean_name(name: str) -> str:
    """Return a column's name without the spaces and marks of other programs."""
    name = name.strip("\ufeff").strip()
    return "file_name" if name.casefold() == "file_name" else name
