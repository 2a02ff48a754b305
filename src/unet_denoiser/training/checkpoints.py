"""Training states on disk: one safetensors file each, tensors by name and JSON metadata in its header.

A file appears whole or not at all, even if the process is killed. It holds full tensors, so that any number of
processes can resume from it. Reading one runs no code of the file.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.config.training import TrainingConfig
from unet_denoiser.utils.finite import check_finite, is_finite
from unet_denoiser.utils.tensor_files import read_safetensors, write_safetensors

Metadata = dict[str, Any]
_METADATA_KEY = "unet_denoiser_training"


class Checkpoints:
    """The checkpoints of a run: files `step-00001000.safetensors` in a folder, which the first one creates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """Return the files, oldest first."""
        found = [path for path in self.folder.glob("step-*.safetensors") if path.stem.removeprefix("step-").isdecimal()]
        return sorted(found, key=parse_step)

    def write(self, tensors: Mapping[str, Tensor], metadata: Metadata) -> Path:
        """Write a checkpoint, named by `metadata["step"]`.

        Raises:
            NonFiniteError: a tensor holds NaN or infinity; nothing has been written.
            OSError: the disk is full, for example; earlier files are unchanged.
        """
        check_finite(tensors)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{metadata['step']:08d}.safetensors"
        write_safetensors(path, tensors, {_METADATA_KEY: json.dumps(metadata)})
        return path

    def verify(self, path: Path, tensors: Mapping[str, Tensor], metadata: Metadata) -> None:
        """Raise OSError unless a file reads back, bit for bit, as it was written."""
        found, found_metadata = read_checkpoint(path)
        same = found_metadata == json.loads(json.dumps(metadata)) and set(found) == set(tensors)
        if not same or not all(torch.equal(found[name], t) for name, t in tensors.items()):
            raise OSError(f"{path} does not read back as it was written; the disk cannot be trusted")

    def read_newest(self) -> tuple[Path, Mapping[str, Tensor], Metadata] | None:
        """Read the newest checkpoint that is whole and finite, and warn of newer ones; None if there are no files.

        ValueError if there are files, but none is good.
        """
        problems: list[str] = []
        for path in reversed(self.paths()):
            try:
                tensors, metadata = read_whole_checkpoint(path)
            except ValueError as error:
                problems.append(str(error))
                continue
            if problems:
                count = "" if len(problems) == 1 else f" ({len(problems)} checkpoints are damaged)"
                warnings.warn(f"{problems[0]}{count}; going on from {path.name} instead", stacklevel=3)
            return path, tensors, metadata
        if problems:
            raise ValueError(f"{self.folder} has no checkpoint that can be used: {problems[0]}")
        return None

    def set_aside(self, step: int) -> None:
        """Rename the checkpoints after a step to "*.damaged": training goes on from before them."""
        for path in self.paths():
            if parse_step(path) > step:
                path.replace(path.with_name(f"{path.name}.damaged"))

    def best(self) -> Path | None:
        """Return the checkpoint with the lowest smoothed loss, or None if there is none."""
        losses = {}
        for path in self.paths():
            with suppress(ValueError):  # a damaged one
                losses[path] = read_metadata(path).get("smoothed_loss")
        known = {path: loss for path, loss in losses.items() if loss is not None}
        return min(known, key=lambda path: known[path]) if known else None

    def prune(self, config: TrainingConfig) -> None:
        """Delete all checkpoints but those that `keep_last`, `keep_every` and `keep_best` keep."""
        paths = self.paths()
        kept = set(paths[-config.keep_last :])
        if config.keep_every:
            kept |= {path for path in paths if parse_step(path) % config.keep_every == 0}
        if config.keep_best and (best := self.best()):
            kept.add(best)
        for path in set(paths) - kept:
            path.unlink()

    def find(self, name: str) -> Path:
        """Return the file of "latest", "best" or the number of a step; FileNotFoundError lists those there are."""
        paths = self.paths()
        by_name = {str(parse_step(path)): path for path in paths} | ({"latest": paths[-1]} if paths else {})
        found = self.best() if name == "best" else by_name.get(name)
        if found is None:
            available = ", ".join([*by_name, "best"]) if paths else "none"
            raise FileNotFoundError(f"checkpoint={name!r} is not in {self.folder}; there: {available}")
        return found


def parse_step(path: Path) -> int:
    """Return the step in a checkpoint's file name."""
    return int(path.stem.removeprefix("step-"))


def select_averages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the averaged weights (EMA) among a checkpoint's tensors, by parameter name."""
    return {name.removeprefix("ema."): tensors[name] for name in tensors if name.startswith("ema.")}


def read_checkpoint(path: Path) -> tuple[Mapping[str, Tensor], Metadata]:
    """Open a checkpoint: its tensors, each read on access, and metadata; ValueError if it is damaged or none."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to resume from the one before") from None
    text = (file.metadata() or {}).get(_METADATA_KEY)
    if text is None:
        raise ValueError(f"{path} is not a checkpoint of a training; delete it to resume from the one before")
    try:
        metadata = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has damaged metadata: {error}") from None
    if not isinstance(metadata, dict) or metadata.get("step") != parse_step(path):
        raise ValueError(f"{path} is not the checkpoint of its step; delete it to resume from the one before")
    return _LazyTensors(file), metadata


def read_whole_checkpoint(path: Path) -> tuple[Mapping[str, Tensor], Metadata]:
    """Read all of a checkpoint; ValueError if it is damaged or holds NaN or infinity."""
    _, metadata = read_checkpoint(path)
    tensors = read_safetensors(path)
    if bad := [name for name, t in tensors.items() if t.is_floating_point() and not is_finite(t)]:
        raise ValueError(f"{path} is damaged: {bad[0]} is not finite")
    return tensors, metadata


def read_metadata(path: Path) -> Metadata:
    """Read the metadata of a checkpoint alone; errors as `read_checkpoint`."""
    return read_checkpoint(path)[1]


class _LazyTensors(Mapping[str, Tensor]):
    """Tensors of an open file, read one by one: no process holds a whole checkpoint in memory."""

    def __init__(self, file: Any) -> None:
        self.file, self.names = file, dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
