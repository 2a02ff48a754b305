"""Labels, captions and numbers from the columns of a table."""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unet_denoiser.utils.terminal import name_some

LABEL_COLUMNS = ("label", "labels")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
# of columns that are not taken by themselves, yet look as if they were meant to be
LABEL_LIKE = {*LABEL_COLUMNS, "breed", "category", "class", "classes", "classname", "species", "tag", "tags", "target"}
CAPTION_LIKE = {*CAPTION_COLUMNS, "description", "prompts", "sentence", "sentences", "texts", "title"}
INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
NUMBER = re.compile(rf"{INTEGER.pattern}(\.[0-9]*)?([eE][-+]?[0-9]+)?")

Namer = Callable[[int], str]  # from a row's position to its name in messages


def pick_column(names: set[str], option: str, given: str | None, defaults: Sequence[str], where: str) -> str | None:
    """Return the given column, else the first of the defaults that exists, else None.

    `option`, the field of `DataConfig`, and `where`, the table, are for the ValueError if the given one is missing.
    """
    if given is None:
        return next((name for name in defaults if name in names), None)
    if given not in names:
        raise ValueError(f"{option}={given!r} is no column of {where}; it has {', '.join(sorted(map(str, names)))}")
    return given


def warn_unused(columns: Iterable[str], label: str | None, caption: str | None, where: str) -> bool:
    """Warn of columns that look like labels or captions, if no column is used as that; return True if there are any."""
    warned, names = False, list(map(str, columns))
    for option, used, alike in (("label_column", label, LABEL_LIKE), ("caption_column", caption, CAPTION_LIKE)):
        if used or not (found := [name for name in names if not alike.isdisjoint(_split_words(name))]):
            continue
        what = f"the column {found[0]!r}, which is" if len(found) == 1 else f"the columns {', '.join(found)}, which are"
        warnings.warn(f"{where} has {what} not used; {option}={found[0]!r} would use it", stacklevel=3)
        warned = True
    return warned


def _split_words(name: str) -> list[str]:
    """Return the words of a name like "class_name" or "captionEn", in lower case."""
    return re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower())


def is_absent(value: Any) -> bool:
    """Return True for a cell that holds nothing: None, NaN, a text without letters, or an empty list."""
    if isinstance(value, list | tuple | np.ndarray):
        return len(value) == 0 or is_absent(value[0])
    return value is None or (isinstance(value, str) and not value.strip()) or bool(value != value)


def refuse_absent(values: Sequence[Any], name: str, where: str, name_row: Namer = "item {}".format) -> None:
    """Raise ValueError, with a count and the first row, if a cell of the column holds nothing."""
    if absent := [i for i, value in enumerate(values) if is_absent(value)]:
        rows = f"{len(absent)} of {len(values)} rows, the first: {name_row(absent[0])}"
        raise ValueError(f"{where} has no {name!r} in {rows}")


def encode_labels(
    values: Sequence[Any] | np.ndarray, names: Sequence[str] | None, where: str, name_row: Namer = "item {}".format
) -> tuple[Tensor, list[str]]:
    """Return labels as (N,) int64, and the class names in label order.

    Args:
        values: N class names, or N integers from 0. Booleans are the names "False" and "True".
        names: of the classes in label order (default: the names sorted, or the integers).

    Raises:
        ValueError: values of another type, integers with large gaps, or a class that is not in `names`; by its row.
    """
    remedy = "give names, or integers from 0"
    array = values if isinstance(values, np.ndarray) and values.dtype.kind in "iu" else _to_array(values)
    if array is None:
        texts = [value.item() if isinstance(value, np.generic) else value for value in values]
        refuse_absent(texts, "label", where, name_row)
        for i, value in enumerate(texts):
            if not isinstance(value, str | int):
                found = f"the label {value!r} in {name_row(i)}, of type {type(value).__name__}"
                raise ValueError(f"{where} has {found}; {remedy}")
        texts = list(map(str, texts))
        class_names = list(names) if names is not None else sorted(set(texts))
        return _find_classes(texts, class_names, where, name_row), class_names
    if (low := int(array.argmin())) >= 0 and array[low] < 0:
        raise ValueError(f"{where} has the label {array[low]} in {name_row(low)}; {remedy}")
    high = int(array.argmax())
    largest = int(array[high])
    if names is None and largest >= 1000 + 10 * len(array):
        raise ValueError(f"labels of {where} go up to {largest} in {name_row(high)}; {remedy} without gaps")
    class_names = list(names) if names is not None else [str(i) for i in range(largest + 1)]
    if largest >= len(class_names):
        found = f"labels go up to {largest} in {name_row(high)} of {where}"
        raise ValueError(f"class_names has {len(class_names)} entries, {found}")
    return torch.from_numpy(array.astype(np.int64)), class_names


def _to_array(values: Sequence[Any] | np.ndarray) -> np.ndarray | None:
    """Return values (N,) that are integers, and not booleans, as int64; None for others."""
    if all(isinstance(value, int | np.integer) and not isinstance(value, bool) for value in values):
        return np.array([max(-(2**62), min(int(value), 2**62)) for value in values], np.int64)
    return None


def parse_texts(texts: Sequence[str], names: Sequence[str] | None) -> list[Any]:
    """Return the labels that the texts of a .csv file stand for: integers or floats if all of them are, else the texts.

    A text like "07" is no integer, and texts that are in `names` are names.
    """
    if names is not None and set(texts) <= set(names):
        return list(texts)
    for kind, pattern in ((int, INTEGER), (float, NUMBER)):
        if all(pattern.fullmatch(text) for text in texts):
            return [kind(text) for text in texts]
    return list(texts)


def renumber_labels(labels: Tensor, names: list[str] | None, class_names: list[str], where: str) -> Tensor:
    """Renumber labels (N,) from the dataset's own names to `class_names`; ValueError if one that occurs is missing."""
    if names is None or names == class_names:
        return labels
    occurring = labels.unique().tolist()
    numbers = torch.zeros(len(names), dtype=torch.long)
    numbers[occurring] = _find_classes([names[i] for i in occurring], class_names, where)
    return numbers[labels]


def _find_classes(values: Sequence[str], class_names: list[str], where: str, name_row: Namer | None = None) -> Tensor:
    numbers = {name: i for i, name in enumerate(class_names)}
    if (i := next((i for i, value in enumerate(values) if value not in numbers), None)) is not None:
        row = f" ({name_row(i)})" if name_row else ""
        known = ", ".join(class_names)
        raise ValueError(f"{where} has the class {values[i]!r}, which is not one of class_names: {known}{row}")
    return torch.tensor([numbers[value] for value in values])


def warn_empty_classes(labels: Tensor, class_names: Sequence[str], where: str) -> None:
    """Warn of classes that have no image: they stay untrained, yet samples of all classes have them."""
    counts = torch.bincount(labels, minlength=len(class_names)).tolist()
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if not empty:
        return
    present = f"{len(class_names) - len(empty)} of its {len(class_names)} classes"
    numbered = list(class_names) == list(map(str, range(len(class_names))))
    begins = f"; its labels begin at {counts.index(next(filter(None, counts)))}" if empty[0] == "0" and numbered else ""
    remedy = "number the classes from 0 without gaps, or give names" if numbered else "leave them out of class_names"
    found = f"{where} has images of {present}, none of {name_some(empty)}{begins}"
    warnings.warn(f"{found}; samples are made of classes without images, too: {remedy}", stacklevel=3)


def read_caption(value: Any, where: str, row: str) -> str:
    """Return a cell's caption, of a list of them the first; ValueError if it is no text."""
    first = value[0] if isinstance(value, list | tuple | np.ndarray) and len(value) else value
    if not isinstance(first, str | int | float | np.number):
        raise ValueError(
            f"{where} has the caption {str(value)[:60]} in {row}, of type {type(first).__name__}; give text"
        )
    return str(first)


def encode_vectors(
    columns: Mapping[str, Sequence[Any] | np.ndarray], where: str, name_row: Namer = "item {}".format
) -> Tensor:
    """Stack D columns of N finite numbers as (N, D) float32; their values are not scaled.

    ValueError if a cell is none, by its row.
    """
    numbers = [_to_numbers(name, values, where, name_row) for name, values in columns.items()]
    return torch.from_numpy(np.stack(numbers, 1))


def _to_numbers(name: str, values: Sequence[Any] | np.ndarray, where: str, name_row: Namer) -> np.ndarray:
    array: np.ndarray = np.zeros(())
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(values, np.float64).astype(np.float32)
    except (OverflowError, TypeError, ValueError):
        pass  # the row is named below
    if array.ndim == 1 and np.isfinite(array).all():
        return array
    row = next((i for i, value in enumerate(values) if not _is_number(value)), 0)
    found = f"{name_row(row)} has {str(values[row])[:60]!r} in {name!r}"
    raise ValueError(f"vector_columns of {where} must hold a finite number in every row; {found}")


def _is_number(value: Any) -> bool:
    try:
        with np.errstate(over="ignore"):
            return bool(np.isfinite(np.float32(float(value))))
    except (OverflowError, TypeError, ValueError):
        return False
