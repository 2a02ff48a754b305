"""A folder of images, with classes, captions and vectors from sub-folders or metadata files."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.columns import CAPTION_COLUMNS, encode_labels, encode_vectors
from unet_denoiser.data.dataset import refuse_options
from unet_denoiser.data.sources import folder_walk as walk
from unet_denoiser.data.sources.encoded_images import EncodedImages, check_config, split_usable
from unet_denoiser.data.sources.metadata import Metadata, parse_labels, to_caption, to_label, to_number
from unet_denoiser.data.sources.verification import MISSING, Header, verify_images

SUB_FOLDERS = "its sub-folders"


class Columns(NamedTuple):
    """The columns of metadata that are used, each by the images' paths, and where they come from."""

    labels: dict[str, Any] | None
    captions: dict[str, str] | None
    vectors: dict[str, dict[str, float]]
    origins: dict[str, str]


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
        self.folder = Path(folder)
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
            warnings.warn(f"{found}: {walk.name_some(left_out)}", stacklevel=2)
        # before the images are verified, which may take minutes
        columns = Columns(None, None, {}, {}) if metadata is None else read_columns(metadata, files, config)
        headers, config = split_usable(self._verify(files, metadata), config, str(self.folder))
        self.files = list(headers)
        self.origins = columns.origins
        self._set_conditions(columns, config, "" if metadata is None else metadata.where)
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

    def _set_conditions(self, columns: Columns, config: DataConfig, where: str) -> None:
        if columns.labels is not None:
            labels = parse_labels([columns.labels[file] for file in self.files])
            self.labels, self.class_names = encode_labels(labels, config.class_names, where)
        elif classes := find_folder_classes(self.folder, self.files, has_metadata=bool(where)):
            self.labels, self.class_names = encode_labels(classes, config.class_names, str(self.folder))
            self.origins = {**self.origins, "class_labels": SUB_FOLDERS}
        if self.class_names is not None:
            walk.warn_of_similar(self.class_names, str(self.folder))
        if columns.captions is not None:
            self.captions = [columns.captions[file] for file in self.files]
        if columns.vectors:
            values = {name: [column[file] for file in self.files] for name, column in columns.vectors.items()}
            self.vectors, self.vector_dim = encode_vectors(values, where), len(values)


def read_columns(metadata: Metadata, files: Sequence[str], config: DataConfig) -> Columns:
    """Read the columns that the options or their names make conditions."""
    label = metadata.find_column("label_column", config.label_column, ("label", "labels"))
    caption = metadata.find_column("caption_column", config.caption_column, CAPTION_COLUMNS)
    metadata.warn_of_unused(label, caption, config.vector_columns)
    origins = {"class_labels": label, "caption": caption}
    return Columns(
        metadata.read_column(label, files, to_label) if label else None,
        metadata.read_column(caption, files, to_caption) if caption else None,
        {name: metadata.read_column(name, files, to_number) for name in config.vector_columns},
        {name: metadata.describe(column) for name, column in origins.items() if column}
        | ({"vector": metadata.describe(*config.vector_columns)} if config.vector_columns else {}),
    )


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
