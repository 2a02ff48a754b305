"""Labels, captions and numbers from columns."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def encode_labels(
    values: Sequence[Any] | np.ndarray, names: Sequence[str] | None, where: str
) -> tuple[Tensor, list[str]]:
    """Labels that are names or integers from 0 -> (N,) int64 and the class names in label order.

    Args:
        names: the classes in label order; default: the names sorted, or the integers themselves.
        where: what holds the labels, for messages.
    """
    array = np.asarray(values)
    if np.issubdtype(array.dtype, np.integer):
        if array.min() < 0:
            raise ValueError(f"labels of {where} go down to {array.min()}; give names, or integers from 0")
        if names is None and array.max() >= 1000 + 10 * len(array):
            raise ValueError(f"labels of {where} go up to {array.max()}; give names, or integers from 0 without gaps")
        known = list(names) if names is not None else [str(i) for i in range(int(array.max()) + 1)]
        if names is None and 2 * (present := len(np.unique(array))) < len(known):
            warnings.warn(
                f"{where} has images of {present} of the {len(known)} classes 0 to {len(known) - 1}; the others would "
                "be sampled untrained; number them without gaps, or give names",
                stacklevel=3,
            )
        if array.max() >= len(known):
            raise ValueError(f"class_names has {len(known)} entries, labels go up to {array.max()} in {where}")
        return torch.from_numpy(array.astype(np.int64)), known
    if array.dtype.kind not in "UO" or not all(isinstance(value, str) for value in values):
        raise ValueError(f"labels of {where} are of type {array.dtype}; give names, or integers from 0")
    known = list(names) if names is not None else sorted(set(values))
    index = {name: i for i, name in enumerate(known)}
    if unknown := sorted(set(values) - set(index)):
        raise ValueError(f"{where} has the class {unknown[0]!r}, which is not one of class_names: {', '.join(known)}")
    return torch.tensor([index[value] for value in values]), known


def encode_vectors(columns: Mapping[str, Sequence[Any] | np.ndarray], where: str) -> Tensor:
    """Numeric columns -> (N, D) float32 as they are; a network learns best from values of about unit size."""
    try:
        array = np.stack([np.asarray(values, np.float64) for values in columns.values()], 1)
    except (TypeError, ValueError):
        array = np.full((1, 1), np.nan)
    if not np.isfinite(array).all():
        raise ValueError(f"vector_columns={tuple(columns)} of {where} must hold a finite number in every row")
    return torch.from_numpy(array.astype(np.float32))


CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")


def pick_column(names: set[str], option: str, chosen: str | None, usual: Sequence[str], where: str) -> str | None:
    """The chosen column, else the first of the usual ones that is there; ValueError for a chosen one that is not."""
    if chosen is None:
        return next((name for name in usual if name in names), None)
    if chosen not in names:
        raise ValueError(f"{option}={chosen!r} is no column of {where}; it has {', '.join(sorted(map(str, names)))}")
    return chosen


def as_numbered(labels: torch.Tensor, found: list[str] | None, chosen: list[str]) -> torch.Tensor:
    """Labels numbered by the data set's own names, renumbered to the order of the chosen ones."""
    if found is None or found == chosen:
        return labels
    if unknown := sorted(set(found) - set(chosen)):
        raise ValueError(
            f"the data have the class {unknown[0]!r}, which is not one of class_names: {', '.join(chosen)}"
        )
    return torch.from_numpy(np.array([chosen.index(name) for name in found]))[labels]
