"""Training states on disk, each one safetensors file: tensors by name, and the plain facts in its header.

One file is there whole or not at all, whenever the process is killed; it holds whole tensors, so that any number of
processes can go on from it; and nothing in it can run code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.config.training import TrainingConfig
from unet_denoiser.utils.finite import check_finite
from unet_denoiser.utils.tensor_files import write_safetensors

Metadata = dict[str, Any]
_FACTS = "unet_denoiser_training"


class Checkpoints:
    """The checkpoints of a run: `step-00001000.safetensors` and so on in one folder.

    Args:
        folder: made with the first of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """Their files, oldest first."""
        return sorted(self.folder.glob("step-*.safetensors"))

    def write(self, tensors: Mapping[str, Tensor], facts: Metadata) -> Path:
        """Add one, named by its step.

        Raises:
            NotFinite: a tensor with NaN or infinity in it; nothing has been written.
            OSError: a full disk, for example; what was there is as it was.
        """
        check_finite(tensors)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{facts['step']:08d}.safetensors"
        write_safetensors(path, tensors, {_FACTS: json.dumps(facts)})
        return path

    def verify(self, path: Path, tensors: Mapping[str, Tensor], facts: Metadata) -> None:
        """OSError unless a file that was just written reads back as what was written into it, bit for bit."""
        found, found_facts = read_checkpoint(path)
        same = found_facts == json.loads(json.dumps(facts)) and set(found) == set(tensors)
        if not same or not all(torch.equal(found[name], t) for name, t in tensors.items()):
            raise OSError(f"{path} does not read back as it was written; the disk cannot be trusted")

    def best(self) -> Path | None:
        """The one with the lowest smoothed loss, or None while there is none."""
        losses = {path: read_metadata(path).get("smoothed_loss") for path in self.paths()}
        known = {path: loss for path, loss in losses.items() if loss is not None}
        return min(known, key=lambda path: known[path]) if known else None

    def prune(self, config: TrainingConfig) -> None:
        """Delete those that `keep_last`, `keep_every` and `keep_best` do not keep."""
        paths = self.paths()
        kept = set(paths[-config.keep_last :])
        if config.keep_every:
            kept |= {path for path in paths if step_of(path) % config.keep_every == 0}
        if config.keep_best and (best := self.best()):
            kept.add(best)
        for path in set(paths) - kept:
            path.unlink()

    def find(self, which: str) -> Path:
        """The file that a name means: "latest", "best" or a step's number.

        Raises:
            FileNotFoundError: there is none of that name, saying which there are.
        """
        paths = self.paths()
        by_name = {str(step_of(path)): path for path in paths} | ({"latest": paths[-1]} if paths else {})
        found = self.best() if which == "best" else by_name.get(which)
        if found is None:
            there = ", ".join([*by_name, "best"]) if paths else "none"
            raise FileNotFoundError(f"checkpoint={which!r} is not in {self.folder}; there: {there}")
        return found


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("step-"))


def read_metadata(path: Path) -> Metadata:
    """What a checkpoint's header tells; ValueError for a file that is none."""
    with _opened(path) as file:
        return _facts(path, file)


def read_checkpoint(path: Path) -> tuple[Mapping[str, Tensor], Metadata]:
    """A checkpoint's tensors, read when they are asked for, and its facts; ValueError for a file that is none."""
    file = _opened(path)
    return _Lazy(file), _facts(path, file)


class _Lazy(Mapping[str, Tensor]):
    """Tensors of an open file: on many processes, none holds a whole checkpoint in memory."""

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


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to go on from the one before") from None


def _facts(path: Path, file: Any) -> Metadata:
    text = (file.metadata() or {}).get(_FACTS)
    if text is None:
        raise ValueError(f"{path} is not a checkpoint of a training; delete it to go on from the one before")
    return json.loads(text)
