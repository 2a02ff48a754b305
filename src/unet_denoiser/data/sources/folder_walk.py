"""The files in a folder and its sub-folders, and warnings about what is there and not used."""

import os
import re
import unicodedata
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from unet_denoiser.data.transforms import SUFFIXES
from unet_denoiser.utils.terminal import count_of, name_some

METADATA_FILES = ("metadata.csv", "metadata.jsonl")
METADATA_WORD = re.compile("annotations?|captions?|class(es)?|dataset|labels?|metadata|prompts?")
TABLES = frozenset((".csv", ".jsonl", ".ndjson", ".ods", ".tsv", ".xls", ".xlsx"))
TEXTS = frozenset((".json", ".json1", ".txt", ".xml", ".yaml", ".yml"))
SIDECARS = (".txt", ".caption", ".json")  # captions, one file for each image
OTHER_SUFFIXES = frozenset({  # of files that often lie beside images
    *TABLES, *TEXTS, "", ".caption", ".css", ".db", ".doc", ".docx", ".gz", ".htm", ".html", ".info", ".ini", ".ipynb",
    ".js", ".lnk", ".lock", ".log", ".md", ".md5", ".pdf", ".py", ".rst", ".rtf", ".safetensors", ".sh", ".sha256",
    ".parquet", ".tar", ".toml", ".torrent", ".url", ".zip",
})  # fmt: skip
SPLIT = re.compile(
    "((data|images?|imgs)[ _-]?)?(train|training|test|testing|val|valid|validation|dev|eval)"
    "([ _-]?(data|images?|imgs|set|split|[ab]|[0-9]+))?"
)


class FolderContents(NamedTuple):
    """The visible files of a folder, as sorted paths relative to it, with "/".

    Attributes:
        images, metadata, others: files by what their names promise.
        sub_folders: the folders at the top.
        repeated: folders that are read under another name, mostly links.
        broken: links that lead nowhere, and devices. One with an image's suffix is among the images, to be refused.
    """

    folder: Path
    images: list[str]
    metadata: list[str]
    others: list[str]
    sub_folders: list[str]
    repeated: list[str]
    broken: list[str]


def walk_folder(folder: Path) -> FolderContents:
    """Find the files below a folder: links to folders are followed, and each real folder is read once.

    Real folders come before links, so that a link does not take the place of the folder that it leads to.
    """
    contents = FolderContents(folder, [], [], [], [], [], [])
    seen = set()
    real, links = deque([""]), deque[str]()
    while real or links:
        base = real.popleft() if real else links.popleft()
        stat = (folder / base).stat()
        # some file systems do not number their files
        if (key := (stat.st_dev, stat.st_ino or os.path.realpath(folder / base))) in seen:
            contents.repeated.append(base)
            continue
        seen.add(key)
        with os.scandir(folder / base) as entries:
            visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
        for entry in visible:
            path = f"{base}/{entry.name}" if base else entry.name
            if _leads_to(entry.is_dir):
                (links if entry.is_symlink() else real).append(path)
                contents.sub_folders.extend([] if base else [path])
            elif PurePosixPath(path).suffix.lower() in SUFFIXES:
                contents.images.append(path)
            elif entry.name.lower() in METADATA_FILES:
                contents.metadata.append(path)
            else:
                (contents.others if _leads_to(entry.is_file) else contents.broken).append(path)
    for paths in (contents.images, contents.metadata, contents.others):
        paths.sort()
    return contents


def list_images(folder: Path) -> list[str]:
    """Return the sorted paths of the image files below a folder, relative to it and with "/", without hidden ones."""
    return walk_folder(folder).images


def _leads_to(is_kind: Callable[[], bool]) -> bool:
    try:
        return is_kind()
    except OSError:  # for example a link to itself
        return False


def describe_unread(contents: FolderContents) -> str:
    """Count the files that may be images and are not read, as in "200 .heic files"; "" if there are none."""
    counts = Counter(PurePosixPath(path).suffix.lower() for path in contents.others)
    found = [count_of(n, f"{suffix} file") for suffix, n in counts.most_common() if suffix not in OTHER_SUFFIXES]
    nameless = [path for path in contents.others if not PurePosixPath(path).suffix]
    if count := sum(_is_image(contents.folder / path) for path in nameless):
        found.append(f"{count_of(count, 'image')} without a suffix")
    return name_some(found)


def warn_of_links(contents: FolderContents) -> None:
    """Warn of links that lead nowhere, and of folders that are reached twice."""
    if paths := contents.broken:
        found = f"links without a file or folder behind them, and devices: {len(paths)} in {contents.folder}"
        warnings.warn(f"left out {found}: {name_some(paths)}", stacklevel=3)
    if paths := contents.repeated:
        found = f"{count_of(len(paths), 'folder')} in {contents.folder} that another name leads to as well"
        warnings.warn(f"not read again: {found}: {name_some(paths)}", stacklevel=3)


def warn_of_unread(contents: FolderContents, has_captions: bool) -> None:
    """Warn of files that look like images, metadata or captions and are not read."""
    if found := describe_unread(contents):
        warnings.warn(f"{contents.folder} has {found}, which are not read", stacklevel=3)
    images = {*contents.images, *(str(PurePosixPath(path).with_suffix("")) for path in contents.images)}
    beside, tables = [], []
    for path in map(PurePosixPath, contents.others):
        suffix, words = path.suffix.lower(), re.findall("[a-z]+", path.name.lower())
        if str(path.with_suffix("")) in images and suffix in SIDECARS:
            beside.append(str(path))
        elif (
            "metadata" in words
            or (suffix in TABLES and not contents.metadata)
            or (suffix in TABLES | TEXTS and any(map(METADATA_WORD.fullmatch, words)))
        ):
            tables.append(str(path))
    if tables:
        found = f"{count_of(len(tables), 'file')} in {contents.folder} may hold labels or captions and are not read"
        remedy = "only metadata.csv and metadata.jsonl are, with a column file_name"
        warnings.warn(f"{found}: {name_some(tables)}; {remedy}", stacklevel=3)
    if beside and not has_captions:
        found = f"{count_of(len(beside), 'file')} beside images of {contents.folder} may hold captions and are not read"
        remedy = "write a metadata.csv with the columns file_name and text"
        warnings.warn(f"{found}: {name_some(beside)}; {remedy}", stacklevel=3)


def warn_of_sub_folders(contents: FolderContents, files: Sequence[str], are_classes: bool) -> None:
    """Warn of sub-folders that look like splits or wrap the classes, and of those without any of the used `files`."""
    folder, used = contents.folder, sorted({file.partition("/")[0] for file in files if "/" in file})
    splits = [name for name in used if is_split(name)]
    inner = sorted({file.split("/")[1] for file in files if file.count("/") > 1})
    if are_classes and len(used) == 1 and all(file.count("/") > 1 for file in files):
        found = f"all images of {folder} are of the one class {used[0]!r}, whose folder has only sub-folders"
        warnings.warn(f"{found} ({name_some(inner)}); give {folder / used[0]} to make these the classes", stacklevel=3)
    elif len(splits) > 1 or (are_classes and splits == used):
        found = f"the sub-folders {name_some(splits)} of {folder} look like splits of a dataset, and all are read"
        as_classes = " as its classes" if are_classes else ""
        best = next((name for name in splits if "train" in name.casefold()), splits[0])
        warnings.warn(f"{found}{as_classes}; give {folder / best} to read that one", stacklevel=3)
    empty = set(contents.sub_folders) - {*used, *contents.repeated, "__MACOSX"}
    if are_classes and empty:
        found = f"{count_of(len(empty), 'sub-folder')} of {folder} without usable images"
        warnings.warn(f"no classes are made of {found}: {name_some(sorted(empty))}", stacklevel=3)


def is_split(name: str) -> bool:
    """Return True for a folder's name such as "train", "test" or "val2017"."""
    return SPLIT.fullmatch(name.casefold()) is not None


def warn_of_similar(names: Sequence[str], where: str) -> None:
    """Warn of classes whose names differ in case, spaces or the encoding of accents only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault("".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    if similar := [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]:
        reason = "differ in case, spaces or the encoding of accents only, and are classes of their own"
        warnings.warn(f"{where} has classes that {reason}: {name_some(similar)}", stacklevel=3)


def check_encoding(path: str, kind: str) -> None:
    """Raise ValueError for a path whose bytes are no UTF-8, which configurations cannot hold."""
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = path.encode(errors="surrogateescape").decode(errors="backslashreplace")
        raise ValueError(f"the name of {kind} is no UTF-8: {shown}; rename it") from None


def _is_image(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except Exception:  # decoders raise exceptions of many types
        return False
