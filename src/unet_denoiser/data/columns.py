"""Labels, captions and numbers from the columns of a table."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")


def pick_column(names: set[str], option: str, given: str | None, defaults: Sequence[str], where: str) -> str | None:
    """Return the given column, else the first of the defaults that exists, else None.

    `option`, the field of `DataConfig`, and `where`, the table, are for the ValueError if the given one is missing.
    """
    if given is None:
        return next((name for name in defaults if name in names), None)
    if given not in names:
        raise ValueError(f"{option}={given!r} is no column of {where}; it has {', '.join(sorted(map(str, names)))}")
    return given


def encode_labels(
    values: Sequence[Any] | np.ndarray, names: Sequence[str] | None, where: str
) -> tuple[Tensor, list[str]]:
    """Return labels as (N,) int64, and the class names in label order.

    Args:
        values: N class names, or N integers from 0.
        names: of the classes in label order (default: the names sorted, or the integers).

    Raises:
        ValueError: values of another type, integers with large gaps, or a class that is not in `names`.
    """
    array = np.asarray(values)
    if np.issubdtype(array.dtype, np.integer):
        if array.min() < 0:
            raise ValueError(f"labels of {where} go down to {array.min()}; give names, or integers from 0")
        if names is None and array.max() >= 1000 + 10 * len(array):
            raise ValueError(f"labels of {where} go up to {array.max()}; give names, or integers from 0 without gaps")
        class_names = list(names) if names is not None else [str(i) for i in range(int(array.max()) + 1)]
        if names is None and 2 * (present := len(np.unique(array))) < len(class_names):
            found = f"{where} has images of {present} of the {len(class_names)} classes 0 to {len(class_names) - 1}"
            remedy = "the others would stay untrained; number the classes without gaps, or give names"
            warnings.warn(f"{found}; {remedy}", stacklevel=3)
        if array.max() >= len(class_names):
            raise ValueError(f"class_names has {len(class_names)} entries, labels go up to {array.max()} in {where}")
        return torch.from_numpy(array.astype(np.int64)), class_names
    if array.dtype.kind not in "UO" or not all(isinstance(value, str) for value in values):
        raise ValueError(f"labels of {where} are of type {array.dtype}; give names, or integers from 0")
    class_names = list(names) if names is not None else sorted(set(values))
    return _find_classes(values, class_names, where), class_names


def renumber_labels(labels: Tensor, names: list[str] | None, class_names: list[str]) -> Tensor:
    """Renumber labels (N,) from the dataset's own names to `class_names`; ValueError if one is missing."""
    if names is None or names == class_names:
        return labels
    return _find_classes(names, class_names, "the dataset")[labels]


def _find_classes(names: Sequence[str] | np.ndarray, class_names: list[str], where: str) -> Tensor:
    numbers = {name: i for i, name in enumerate(class_names)}
    if unknown := sorted(set(names) - set(numbers)):
        known = ", ".join(class_names)
        raise ValueError(f"{where} has the class {unknown[0]!r}, which is not one of class_names: {known}")
    return torch.tensor([numbers[name] for name in names])


def encode_vectors(columns: Mapping[str, Sequence[Any] | np.ndarray], where: str) -> Tensor:
    """Stack D columns of N finite numbers as (N, D) float32; their values are not scaled."""
    try:
        array = np.stack([np.asarray(values, np.float64) for values in columns.values()], 1)
    except (TypeError, ValueError):
        array = np.full((1, 1), np.nan)
    if not np.isfinite(array).all():
        raise ValueError(f"vector_columns={tuple(columns)} of {where} must hold a finite number in every row")
    return torch.from_numpy(array.astype(np.float32))
