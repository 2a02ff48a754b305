"""Many samples on disk: files of some hundreds each, written whole, so that a run that is interrupted goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unet_denoiser.utils.cache import digest
from unet_denoiser.utils.files import read_json, remove_leftovers, write_atomically

SETTINGS = "settings.json"


class Shards:
    """A folder of `.npz` files of equally many samples, named by the first and the last, and what they are made with.

    Several processes may fill it, each its share of what was missing when all of them opened it.

    Args:
        folder: made where it is not there.
        count: samples in all; more than a folder was made for are added to what it has.
        size: samples of a file; that of the folder counts where it has files.
        settings: what decides how the samples come out, of what JSON knows; kept in `settings.json`.

    Raises:
        ValueError: the folder holds something else, or samples with other settings, by the name of the first that
            differs.
    """

    def __init__(self, folder: Path, count: int, size: int, settings: Mapping[str, Any]) -> None:
        self.folder, self.count = folder, count
        wanted, grows = {"num_images": count, **json.loads(json.dumps(settings))}, False
        if not (folder / SETTINGS).is_file() or self._only_settings():  # of a command that could not start, perhaps
            others = (path for path in folder.glob("[!.]*") if path.name != SETTINGS)
            if folder.exists() and (not folder.is_dir() or any(others)):
                raise ValueError(f"out={folder} holds something else than samples; give a new folder")
            folder.mkdir(parents=True, exist_ok=True)
            self._write_settings({"shard_size": size, **wanted})
        found = read_json(folder / SETTINGS)
        self.size: int = found.pop("shard_size", size)
        for name in wanted | found:
            had, wants = found.get(name), wanted.get(name)
            if name == "num_images" and isinstance(had, int) and count > had:
                grows = True
            elif wants != had:
                raise ValueError(
                    f"out={folder} holds samples made with {name}={_shortly(had)}, not {_shortly(wants)}; give another "
                    "folder"
                )
        if grows:  # a last file that is not full stays until the full one, which has another name, is there
            self._write_settings({"shard_size": self.size, **wanted})
        self.missing = [part for part in self.parts() if not self.path(part).exists()]

    def _only_settings(self) -> bool:
        """Whether the folder has our settings, and no samples yet."""
        ours = {"shard_size", "num_images"} <= read_json(self.folder / SETTINGS).keys()
        return ours and not any(self.folder.glob("*.npz"))

    def parts(self) -> list[range]:
        """The numbers of each file's samples."""
        return [range(i, min(i + self.size, self.count)) for i in range(0, self.count, self.size)]

    def path(self, part: range) -> Path:
        """The file of such numbers."""
        return self.folder / f"{part[0]:06d}-{part[-1]:06d}.npz"

    def write(self, part: range, arrays: Mapping[str, np.ndarray]) -> Path:
        """Write a file, whole or not at all."""
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
        """Delete what killed processes have left; nobody may be writing."""
        remove_leftovers(self.folder)
        self._drop_covered("[0-9]*")

    def _drop_covered(self, first: str) -> None:
        """Delete shorter files, beginning with sample `first`, all of whose samples a file of this number has too."""
        for path in self.folder.glob(f"{first}-*.npz"):
            start, _, end = path.stem.partition("-")
            if start.isdecimal() and end.isdecimal() and int(start) < self.count:
                whole = self.path(range(int(start), min(int(start) + self.size, self.count)))
                if path != whole and whole.exists():
                    path.unlink()

    def _write_settings(self, settings: Mapping[str, Any]) -> None:
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.folder / SETTINGS, lambda path: path.write_text(text, encoding="utf-8"))


def read_shards(folder: Path, name: str = "images") -> np.ndarray:
    """One array of all files of a finished folder, in order; `images`, `labels` and `seeds` are what `sample` writes.

    Raises:
        ValueError: files are missing, or the folder is not of samples.
    """
    settings = read_json(folder / SETTINGS)
    if not {"num_images", "shard_size"} <= settings.keys():
        raise ValueError(f"{folder / SETTINGS} is not of samples: it lacks num_images or shard_size")
    shards = Shards(folder, settings.pop("num_images"), settings.pop("shard_size"), settings)
    if shards.missing:
        raise ValueError(f"{folder} lacks {len(shards.missing)} of its files; `sample` again with --out {folder}")
    return np.concatenate([np.load(shards.path(part), allow_pickle=False)[name] for part in shards.parts()])


def digest_weights(model: nn.Module) -> str:
    """A name for a network's weights, the same for the same values only."""
    weights = ((name, t.detach().cpu().contiguous().view(-1)) for name, t in model.state_dict().items())
    return digest(part for name, t in weights for part in (name, t.view(torch.uint8).numpy().tobytes()))


def _shortly(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
