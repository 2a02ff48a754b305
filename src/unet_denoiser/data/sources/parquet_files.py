"""The .parquet files of a folder, and the splits that their names tell."""

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

SHARD = re.compile(r"(\w+)-[0-9]{5}-of-[0-9]{5}")
# the words of `datasets`
SPLITS = {"train": "train", "training": "train"}
SPLITS |= dict.fromkeys(("validation", "valid", "dev", "val"), "validation")
SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")


def list_tables(folder: Path) -> list[str]:
    """Return the sorted paths of the .parquet files below a folder, without hidden ones; each real folder once."""
    found, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(root)) in seen:
            folders.clear()  # in place: os.walk descends into these
            continue
        seen.add(place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [str(Path(root, name)) for name in files if name[0] != "." and name.lower().endswith(".parquet")]
    return sorted(found)


def choose_files(path: Path, split: str) -> tuple[dict[str, list[str]], str]:
    """Return the .parquet files by the splits that `split` names, as "test" or "train[:50%]", and `split` itself.

    A path whose names tell no splits, or a single one, is read whole by the default, "train".

    Raises:
        ValueError: a split that does not exist.
    """
    files = list_tables(path) if path.is_dir() else [str(path)]
    splits: dict[str, list[str]] = {}
    names = {file: _name_split(Path(file).relative_to(path if path.is_dir() else path.parent)) for file in files}
    for file, name in names.items():
        splits.setdefault(name or "", []).append(file)
    others = splits.pop("", [])
    splits = dict(sorted(splits.items()))
    wanted = [part.partition("[")[0].strip() for part in split.split("+")]
    if wanted == ["train"] and "train" not in splits and len(splits) <= 1:
        name = next(iter(splits), "train")
        if splits and path.is_dir():
            warnings.warn(f"{path} has the split {name} only, which is read", stacklevel=4)
        return {name: files}, name
    if missing := [name for name in wanted if name not in splits]:
        known = f"it has {', '.join(splits)}" if splits else "its names tell no splits; leave it out"
        raise ValueError(f"split={split!r}: {path} has no split {missing[0]!r}; {known}")
    if others:
        count = f"{len(others)} of {len(files)} .parquet files"
        warnings.warn(f"{count} in {path} are in none of its splits and are left out, as {others[0]}", stacklevel=4)
    if split == "train" and len(splits) > 1:
        rest = ", ".join(name for name in splits if name != "train")
        warnings.warn(f"{path} has several splits: train is read, {rest} left out; split chooses", stacklevel=4)
    return {name: splits[name] for name in wanted}, split


def _name_split(file: Path) -> str | None:
    """Return the split that a file's name tells, as `datasets` would; else the one that its folders tell, or None."""
    if shard := SHARD.match(file.name):
        return SPLITS.get(shard[1], shard[1])
    words = [re.split(r"[-._ 0-9]", part.lower()) for part in (file.stem, *reversed(file.parts[:-1]))]
    return next((SPLITS[word] for part in words for word in part if word in SPLITS), None)


def check_files(files: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError for a file that is no .parquet, or if all of them together have no rows."""
    import pyarrow.parquet

    rows = 0
    for file in chain(*files.values()):
        try:
            rows += pyarrow.parquet.read_metadata(file).num_rows
        except Exception as error:  # of many types
            raise ValueError(f"{Path(file).name}: {error}") from None
    if not rows:
        raise ValueError("it has no rows")
