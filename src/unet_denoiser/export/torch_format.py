"""Programs of torch.export as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]


def save(program: Any, path: Path) -> None:
    """Write a program as a .pt2 file."""
    torch.export.save(program, str(path))


class TorchNetwork:
    """A .pt2 file, called with arrays by name.

    Args:
        names: of the inputs, in the order of its arguments.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.module, self.names = torch.export.load(str(path)).module(), tuple(names)

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Return the outputs."""
        with torch.no_grad():
            output = self.module(*(torch.from_numpy(np.array(inputs[name])) for name in self.names))
        return [output.numpy().copy()]
