"""Many samples on disk, in .npz files of some hundreds each that appear whole, so that sampling can be resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unet_denoiser.utils.cache import digest
from unet_denoiser.utils.files import read_json, remove_leftovers, write_atomically, write_json

SETTINGS = "settings.json"


class Shards:
    """A folder of `.npz` files, each with the same number of samples and named by the first and last of them.

    Several processes may fill it, each with its share of the files that were missing when all of them opened it.

    Args:
        folder: created if it does not exist.
        count: total number of samples. A larger count than the folder's extends it.
        size: samples per file; a folder that has files keeps theirs.
        settings: everything that the values of the samples depend on, as JSON values; kept in `settings.json`.

    Raises:
        ValueError: the folder holds something else, or samples with other settings; names the first that differs.
    """

    def __init__(self, folder: Path, count: int, size: int, settings: Mapping[str, Any]) -> None:
        self.folder, self.count = folder, count
        wanted = {"num_images": count, **json.loads(json.dumps(settings))}
        if not (folder / SETTINGS).is_file() or self._is_empty():
            self._create({"shard_size": size, **wanted})
        found = read_json(folder / SETTINGS)
        self.size: int = found.pop("shard_size", size)
        if grows := isinstance(found.get("num_images"), int) and count > found["num_images"]:
            found["num_images"] = count
        for name in wanted | found:
            if (old := found.get(name)) != (new := wanted.get(name)):
                values = f"{_abbreviate(old)}, not {_abbreviate(new)}"
                raise ValueError(f"out={folder} holds samples made with {name}={values}; give another folder")
        if grows:  # an incomplete last file stays until the complete one, which has another name, is written
            write_json(folder / SETTINGS, {"shard_size": self.size, **wanted})
        self.missing = [part for part in self.parts() if not self.path(part).exists()]

    def _create(self, settings: Mapping[str, Any]) -> None:
        others = (path for path in self.folder.glob("[!.]*") if path.name != SETTINGS)
        if self.folder.exists() and (not self.folder.is_dir() or any(others)):
            raise ValueError(f"out={self.folder} holds something else than samples; give a new folder")
        write_json(self.folder / SETTINGS, settings)

    def _is_empty(self) -> bool:
        """Return True if the folder has settings but no samples, as a command leaves it that cannot start."""
        ours = {"shard_size", "num_images"} <= read_json(self.folder / SETTINGS).keys()
        return ours and not any(self.folder.glob("*.npz"))

    def parts(self) -> list[range]:
        """Return the sample indices of each file."""
        return [range(i, min(i + self.size, self.count)) for i in range(0, self.count, self.size)]

    def path(self, part: range) -> Path:
        """Return the file for sample indices."""
        return self.folder / f"{part[0]:06d}-{part[-1]:06d}.npz"

    def write(self, part: range, arrays: Mapping[str, np.ndarray]) -> Path:
        """Write a file, which appears whole or not at all."""
        path = self.path(part)
        if wrong := {name: len(array) for name, array in arrays.items() if len(array) != len(part)}:
            raise ValueError(f"{path.name} is for {len(part)} samples, not {wrong}")

        def save(temporary: Path) -> None:
            with temporary.open("wb") as file:  # np.savez on a path would add a suffix to the temporary name
                np.savez(file, allow_pickle=False, **arrays)

        write_atomically(path, save)
        self._drop_covered(f"{part[0]:06d}")
        return path

    def clean(self) -> None:
        """Delete what killed processes left; no process may be writing."""
        remove_leftovers(self.folder)
        self._drop_covered("[0-9]*")

    def _drop_covered(self, first: str) -> None:
        """Delete files from sample `first` on that are shorter than another file with the same first sample."""
        for path in self.folder.glob(f"{first}-*.npz"):
            start, _, end = path.stem.partition("-")
            if start.isdecimal() and end.isdecimal() and int(start) < self.count:
                complete = self.path(range(int(start), min(int(start) + self.size, self.count)))
                if path != complete and complete.exists():
                    path.unlink()


def read_shards(folder: Path, name: str = "images") -> np.ndarray:
    """Concatenate an array of all files of a finished folder; `sample` writes `images`, `labels` and `seeds`.

    Raises:
        ValueError: files are missing, or the folder holds no samples.
    """
    settings = read_json(folder / SETTINGS)
    if not {"num_images", "shard_size"} <= settings.keys():
        raise ValueError(f"{folder / SETTINGS} is not of samples: it lacks num_images or shard_size")
    shards = Shards(folder, settings.pop("num_images"), settings.pop("shard_size"), settings)
    if shards.missing:
        raise ValueError(f"{folder} lacks {len(shards.missing)} of its files; `sample` again with --out {folder}")
    return np.concatenate([np.load(shards.path(part), allow_pickle=False)[name] for part in shards.parts()])


def digest_weights(model: nn.Module) -> str:
    """Return a digest of a network's weights, equal for equal values only."""
    weights = ((name, t.detach().cpu().contiguous().view(-1)) for name, t in model.state_dict().items())
    return digest(part for name, t in weights for part in (name, t.view(torch.uint8).numpy().tobytes()))


def _abbreviate(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
