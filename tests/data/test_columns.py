"""Labels, captions and numbers from columns: what counts, what is absent, and which row an error names."""

import warnings

import numpy as np
import pytest
import torch

from unet_denoiser.data.columns import (
    encode_labels,
    encode_vectors,
    is_absent,
    parse_texts,
    read_caption,
    refuse_absent,
    renumber_labels,
    warn_empty_classes,
    warn_unused,
)


@pytest.mark.parametrize(
    ("values", "names", "labels", "class_names"),
    [
        ([0, 2, 1], None, [0, 2, 1], ["0", "1", "2"]),
        (np.array([1, 0], np.uint8), ["cat", "dog"], [1, 0], ["cat", "dog"]),
        (["b", "a", "b"], None, [1, 0, 1], ["a", "b"]),
        (np.array(["b", "a"]), ["b", "a"], [0, 1], ["b", "a"]),
        (["01", "1", "007"], None, [1, 2, 0], ["007", "01", "1"]),
        ([True, False], None, [1, 0], ["False", "True"]),
        (np.array([True, False]), None, [1, 0], ["False", "True"]),
        (["a", 1], None, [1, 0], ["1", "a"]),
    ],
)
def test_labels(values, names, labels, class_names):
    found, found_names = encode_labels(values, names, "t")
    assert (found.tolist(), found_names, found.dtype) == (labels, class_names, torch.int64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None, "b", ""], "no 'label' in 2 of 4 rows, the first: item 1"),
        ([1.0, float("nan")], "no 'label' in 1 of 2 rows, the first: item 1"),
        ([0.0, 1.0], "the label 0.0 in item 0, of type float; give names, or integers from 0"),
        (np.array([0.0, 1.0]), "the label 0.0 in item 0, of type float"),
        (["a", ["b"]], r"the label \['b'\] in item 1, of type list"),
        ([{"a": 1}], "in item 0, of type dict"),
        ([0, 1, -1], "the label -1 in item 2"),
        ([0, 2**80], "go up to .* in item 1"),
        ([0, -(2**80)], "the label -.* in item 1"),
    ],
)
def test_refuses_labels_by_their_row(values, message):
    with pytest.raises(ValueError, match=message):
        encode_labels(values, None, "t")


def test_refuses_labels_beyond_the_names():
    with pytest.raises(ValueError, match="class_names has 2 entries, labels go up to 4 in line 7 of t"):
        encode_labels([0, 4, 1], ["a", "b"], "t", lambda i: f"line {i + 6}")
    with pytest.raises(ValueError, match=r"t has the class 'c', which is not one of class_names: a, b \(line 8\)"):
        encode_labels(["a", "b", "c"], ["a", "b"], "t", lambda i: f"line {i + 6}")
    names = ["a", "b", "unused"]
    assert renumber_labels(torch.tensor([0, 1]), names, ["b", "a"], "t").tolist() == [1, 0]
    with pytest.raises(ValueError, match="the class 'unused', which is not one of class_names"):
        renumber_labels(torch.tensor([0, 2]), names, ["b", "a"], "t")


@pytest.mark.parametrize(
    ("texts", "names", "labels"),
    [
        (["0", "10"], None, [0, 10]),
        (["01", "02"], None, ["01", "02"]),
        (["1", "a"], None, ["1", "a"]),
        (["True", "False"], None, ["True", "False"]),
        (["1.0", "2"], None, [1.0, 2.0]),
        (["1.0", "2.0"], ("1.0", "2.0"), ["1.0", "2.0"]),
        (["-1", "0"], None, [-1, 0]),
        (["٣"], None, ["٣"]),
    ],
)
def test_texts_of_a_csv_file(texts, names, labels):
    assert parse_texts(texts, names) == labels


def test_absent_cells():
    assert all(map(is_absent, [None, "", "  ", float("nan"), np.float32("nan"), [], [None], np.array([])]))
    assert not any(map(is_absent, [0, False, "nan", ["a"], {}, np.array(["a"])]))
    with pytest.raises(ValueError, match=r"t has no 'text' in 2 of 3 rows, the first: a\.png"):
        refuse_absent(["", "x", None], "text", "t", lambda i: f"{'abc'[i]}.png")


def test_captions():
    assert [read_caption(value, "t", "row 1") for value in (["a", "b"], ("a",), "c", 7)] == ["a", "a", "c", "7"]
    with pytest.raises(ValueError, match=r"t has the caption \{'raw': 'x'\} in row 1, of type dict; give text"):
        read_caption({"raw": "x"}, "t", "row 1")


@pytest.mark.parametrize("cell", [None, float("nan"), "x", 1e300, [1.0]])
def test_numbers_that_are_none(cell):
    assert encode_vectors({"age": ["1.5", 2], "is_new": [True, False]}, "t").tolist() == [[1.5, 1], [2, 0]]
    with pytest.raises(ValueError, match=r"finite number in every row; item 1 has .* in 'age'"):
        encode_vectors({"age": [1.0, cell]}, "t")


def test_classes_without_images():
    with pytest.warns(UserWarning, match="t has images of 3 of its 4 classes, none of 0; its labels begin at 1"):
        warn_empty_classes(torch.tensor([1, 2, 3]), list("0123"), "t")
    with pytest.warns(
        UserWarning, match="3 of its 10 classes, none of 0, 1, 2, 3, 4, and 2 more; its labels begin at 7"
    ):
        warn_empty_classes(torch.tensor([7, 8, 9, 9]), list("0123456789"), "t")
    with pytest.warns(UserWarning, match="1 of its 2 classes, none of dog; .* leave them out of class_names"):
        warn_empty_classes(torch.tensor([0]), ["cat", "dog"], "t")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_empty_classes(torch.tensor([1, 0]), ["cat", "dog"], "t")


def test_columns_that_look_as_if_they_counted():
    with pytest.warns(UserWarning, match="t has") as found:
        warn_unused(["file_name", "Label", "class", " Text"], None, None, "t")
    assert [str(warning.message) for warning in found] == [
        "t has the columns Label, class, which are not used; label_column='Label' would use it",
        "t has the column ' Text', which is not used; caption_column=' Text' would use it",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unused(["class", "age", "title"], "kind", "title", "t")
