"""metadata.csv and metadata.jsonl: what rows and columns mean, and messages with file and line."""

import json
import re
import unicodedata
import warnings

import numpy as np
import pytest

from support.data import write_image
from unet_denoiser import load_data

NAN = float("nan")


def make_folder(folder, *names):
    for name in names or ("a.png", "b.png"):
        write_image(folder / name, np.zeros((8, 8)))
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "d")


def write_csv(folder, text, name="metadata.csv"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def write_jsonl(folder, *rows):
    text = "\n".join(json.dumps({"file_name": f"{name}.png"} | row) for name, row in zip("abc", rows, strict=False))
    return write_csv(folder, text, "metadata.jsonl")


def load_with_warnings(folder, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_data(folder, **options)
    return data, " | ".join(str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    "text",
    [
        "file_name,label\na.png,cat\nb.png,dog\n",
        "\ufefffile_name, label\r\na.png, cat\r\nb.png, dog\r\n",
        "\n,File_Name , Label,,\n,,,,\n0,a.png,cat,,\n\n1,./b.png,dog\n,,,,\n",  # pandas' index, a spreadsheet's commas
        "FILE_NAME\tlabel\n".replace("\t", ",") + 'x/../a.png,"cat"\r"b.png",dog',
        b"\xef\xbb\xbf" + "\ufefffile_name,labels\na.png ,cat\nb.png,dog".encode(),
    ],
)
def test_headers_are_taken_in_the_spellings_of_other_programs(folder, text):
    data, said = load_with_warnings(write_csv(folder, text))
    assert (data.files, data.class_names, data.labels.tolist()) == (["a.png", "b.png"], ["cat", "dog"], [0, 1])
    assert said == ""


def test_the_name_metadata_csv_may_be_in_upper_case(folder):
    data, said = load_with_warnings(write_csv(folder, "file_name,TEXT\na.png,one\nb.png,two\n", "Metadata.CSV"))
    assert (data.captions, said) == (["one", "two"], "")
    assert data.origins == {"caption": "column TEXT of Metadata.CSV"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "metadata.csv is empty"),
        ("\n \n", "metadata.csv is empty"),
        ("file_name,label\n", "metadata.csv has a header and no rows"),
        ("file_name,label\n,,\n", "metadata.csv has a header and no rows"),
        ("file_name;label\na.png;cat\n", "metadata.csv separates columns by semicolons"),
        ('"file_name"\t"label"\n', "metadata.csv separates columns by tabs"),
        (
            "\n\nfilename,label\na.png,cat\n",
            "line 3 of .*metadata.csv names no column file_name; it has filename",
        ),
        ("a.png,cat\n", "line 1 of .*metadata.csv names no column file_name; it has a.png, cat"),
        ("file_name,label, label\n", "line 1 of .*metadata.csv has the column 'label' twice"),
        ("\ufefffile_name,text\n\na.png,a cat, sitting\n", "line 3 of .*metadata.csv has more values .* quotes around"),
        ("file_name,text,,\na.png,a cat, sitting\n", "line 2 of .*metadata.csv has more values than columns"),
        ('file_name,text\na.png,"two\nlines"\n,x\n', "line 4 of .*metadata.csv has no file_name; it has text"),
        ('file_name,text\na.png,x\nb.png,"open\nx', "lines? 3.* of .*metadata.csv cannot be read: .* quotation marks"),
        ('file_name,text\na.png,"red" one\n', "line 2 of .*metadata.csv cannot be read: .* quotation marks"),
        (
            "file_name,label\r\na.png,caf\xe9\r\n".encode("latin-1"),
            r"line 2 of .*metadata.csv is not UTF-8 .byte 0xe9",
        ),
        (b"\xef\xbb\xbffile_name,label\na.png,caf\xe9\r", "line 2 of .*metadata.csv is not UTF-8 .byte 0xe9"),
        ("file_name\tlabel\n".encode("utf-16"), "metadata.csv is UTF-16; save it as UTF-8"),
        ("file_name,label\na.png,cat\nb.png,\n", "no 'label' in 1 of 2 rows; the first is line 3 of .*metadata.csv"),
        ("file_name,label\na.png,cat\nb.png\n", "no 'label' in 1 of 2 rows; the first is line 3 of .*metadata.csv"),
        ("file_name,age\na.png,1\n\nb.png,1;5\n", "finite number in every row; line 4 of .*metadata.csv has '1;5'"),
        ("file_name,text\na.png,x\nz.png,y\n", r"z\.png is missing \(line 3 of .*metadata.csv names it\)"),
        ("file_name,text\na.png,x\n\0.png,y\n", r"is missing \(line 3 of .*metadata.csv names it\)"),
    ],
)
def test_messages_name_the_line_of_a_csv(folder, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_data(write_csv(folder, text), vector_columns=("age",) if "age" in str(text) else ())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"file_name": "b.png", "text": "x"',
            "line 4 of .*jsonl is no whole JSON object: .* at character 35",
        ),
        ("not JSON", r"line 4 of .*metadata.jsonl is no whole JSON object: Expecting value at character 1"),
        ('["b.png"]', "line 4 of .*metadata.jsonl is no object with a file_name"),
        (
            '{"file_name": "b.png", "text": "x", "text ": "y"}',
            "line 4 of .*jsonl cannot be read: it has the key 'text' twice",
        ),
        ("[" * 100_000, "line 4 of .*metadata.jsonl cannot be read"),
        ('{"text": "x"}', "line 4 of .*metadata.jsonl has no file_name; it has text"),
        ('{"file_name": ["b.png"]}', r"line 4 of .*metadata.jsonl has the file_name \['b.png'\], which is no text"),
        ('{"file_name": "b.png", "text": null}', "no 'text' in 1 of 2 rows; the first is line 4 of .*metadata.jsonl"),
        ('{"file_name": "b.png", "text": NaN}', "no 'text' in 1 of 2 rows; the first is line 4 of"),
        ('{"file_name": "b.png", "text": []}', "no 'text' in 1 of 2 rows; the first is line 4 of"),
        ('{"file_name": "b.png", "text": [""]}', "no 'text' in 1 of 2 rows; the first is line 4 of"),
        ('{"file_name": "b.png", "text": {"en": "x"}}', "has the caption {'en': 'x'} in line 4 of .*metadata.jsonl"),
        ('{"file_name": "z.png", "text": "x"}', r"z\.png is missing \(line 4 of .*metadata.jsonl names it\)"),
    ],
)
def test_messages_name_the_line_of_a_jsonl(folder, line, message):
    write_csv(folder, f'\n{{"file_name": "a.png", "text": "one\u2028two"}}\n\n{line}', "metadata.jsonl")
    with pytest.raises(ValueError, match=message):
        load_data(folder)


@pytest.mark.parametrize("label", [["x"], {"name": "x"}, None, NAN, "", " "])
def test_refuses_labels_that_are_no_text_or_number(folder, label):
    with pytest.raises(ValueError, match=r"line 2 of .*metadata.jsonl"):
        load_data(write_jsonl(folder, {"label": "x"}, {"label": label}))


@pytest.mark.parametrize("value", [None, NAN, float("inf"), [1], {}, "", "x", 10**400])
def test_refuses_numbers_that_are_none(folder, value):
    with pytest.raises(ValueError, match=r"line 2 of .*metadata.jsonl"):
        load_data(write_jsonl(folder, {"age": 1}, {"age": value}), vector_columns=("age",))


def test_the_first_of_a_list_of_captions_is_taken(folder):
    data = load_data(write_jsonl(folder, {"captions": ["one", "two"]}, {"captions": "three"}))
    assert data.captions == ["one", "three"]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["0", "1"], ["0", "1"]),
        (["1", "0"], ["0", "1"]),
        (["01", "1"], ["01", "1"]),
        (["007", "008"], ["007", "008"]),
        (["+1", "1"], ["+1", "1"]),
        (["1.0", "x"], ["1.0", "x"]),
        (["\u0661", "1"], ["1", "\u0661"]),
        (["\uff10", "\uff11"], ["\uff10", "\uff11"]),
        (["\xb2", "2"], ["2", "\xb2"]),
        (["1_0", "1"], ["1", "1_0"]),
        (["nan", "None"], ["None", "nan"]),
        (["null", "NA"], ["NA", "null"]),
        (["True", "false"], ["True", "false"]),
        (["10", "9x"], ["10", "9x"]),
    ],
)
def test_classes_are_called_as_the_file_says(tmp_path, labels, names):
    for kind in ("csv", "jsonl"):
        folder = make_folder(tmp_path / kind)
        if kind == "csv":
            write_csv(folder, f"file_name,label\na.png,{labels[0]}\nb.png,{labels[1]}\n")
        else:
            write_jsonl(folder, *[{"label": label} for label in labels])
        data = load_data(folder)
        assert data.class_names == names
        assert [data.class_names[label] for label in data.labels.tolist()] == labels


@pytest.mark.parametrize(
    "name",
    [
        *("sub/\xe4 %20b.png", "./sub/\xe4 %20b.png", "sub//\xe4 %20b.png", "sub/x/../\xe4 %20b.png"),
        *("sub\\\xe4 %20b.png", " sub/\xe4 %20b.png ", unicodedata.normalize("NFD", "sub/\xe4 %20b.png"), "ABSOLUTE"),
    ],
)
def test_images_are_found_in_the_spellings_of_other_systems(tmp_path, name):
    folder = make_folder(tmp_path / "d", "sub/\xe4 %20b.png", "a.png")
    name = str(folder / "sub" / "\xe4 %20b.png") if name == "ABSOLUTE" else name
    data, said = load_with_warnings(write_csv(folder, f'file_name,label\na.png,cat\n"{name}",dog\n'))
    assert (data.files, data.labels.tolist(), said) == (["a.png", "sub/\xe4 %20b.png"], [0, 1], "")


def test_composed_names_are_found_on_disks_that_keep_them_apart(tmp_path):
    """As in archives made on macOS."""
    folder = make_folder(tmp_path / "d", "a\u0308.png")
    data, said = load_with_warnings(write_csv(folder, "file_name,label\n\xe4.png,cat\n"))
    assert (len(data), said) == (1, "")


def test_images_outside_the_folder_belong_to_no_sub_folder(tmp_path):
    folder = make_folder(tmp_path / "d", "x/a.png", "y/b.png")
    make_folder(tmp_path / "other", "c.png", "d.png")
    rows = f"x/a.png,one\ny/b.png,two\n../other/c.png,three\n{tmp_path}/other/d.png,four\n"
    data, said = load_with_warnings(write_csv(folder, f"file_name,text\n{rows}"))
    assert (len(data), data.class_names, said) == (4, None, "")
    assert sorted(data.captions) == ["four", "one", "three", "two"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("a.png,cat\na.png,dog\nb.png,dog\n", None, "'cat' in line 2 of .*csv and 'dog' in line 3 of .*csv"),
        ("a.png,cat\nb.png,dog\n./a.png,dog\n", None, "'cat' in line 2 of .*csv and 'dog' in line 4 of .*csv"),
        ("a.png,cat\nb.png,dog\n", {"label": "dog"}, "'cat' in line 2 of .*csv and 'dog' in line 1 of .*jsonl"),
        ("a.png,cat\nb.png,dog\na.png,cat\na.png,\n", None, None),
        ("a.png,1\nb.png,2\n", {"label": 1}, None),
    ],
)
def test_rows_of_one_image_must_agree(folder, first, second, message):
    write_csv(folder, f"file_name,label\n{first}")
    if second:
        write_jsonl(folder, second)
    if message is None:
        assert load_data(folder).files == ["a.png", "b.png"]
        return
    with pytest.raises(ValueError, match=rf"a\.png has two values of 'label': {message}"):
        load_data(folder)


def test_a_message_names_the_file_that_has_the_value(folder):
    write_jsonl(write_csv(folder, "file_name,age\na.png,1\nb.png,2\n"), {"size": 1}, {"size": "x"})
    with pytest.raises(ValueError, match=r"line 2 of .*metadata.jsonl has 'x' in 'size'"):
        load_data(folder, vector_columns=("age", "size"))
    write_jsonl(folder, {"size": 1}, {"size": 5})
    assert load_data(folder, vector_columns=("size", "age")).vectors.tolist() == [[1, 1], [5, 2]]


def test_two_files_complete_each_other(folder):
    write_jsonl(write_csv(folder, "file_name,label\nb.png,cat\na.png,dog\n"), {"text": "one"}, {"text": "two"})
    data = load_data(folder)
    assert (data.labels.tolist(), data.captions) == ([1, 0], ["one", "two"])
    assert data.origins == {"class_labels": "column label of metadata.csv", "caption": "column text of metadata.jsonl"}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("class", "has the column 'class', which is not used; label_column='class' would use it"),
        ("categoryName", "which is not used; label_column='categoryName'"),
        ("Target", "which is not used; label_column='Target'"),
        ("caption_en", "which is not used; caption_column='caption_en'"),
        ("age", "is used: age; label_column, caption_column or vector_columns would use them"),
    ],
)
def test_columns_that_are_not_used_are_named(folder, header, message):
    write_csv(folder, f"file_name,{header}\na.png,1\nb.png,2\n")
    data, said = load_with_warnings(folder)
    assert (data.class_names, data.captions) == (None, None)
    assert message in said
    assert " | " not in said  # one warning
    assert re.search("used", load_with_warnings(folder, vector_columns=(header,))[1]) is None


def test_columns_that_differ_in_case_must_be_chosen(folder):
    write_csv(folder, "file_name,Label,LABEL\na.png,1,x\nb.png,0,y\n")
    with pytest.raises(ValueError, match="has the columns LABEL, Label; choose one by label_column"):
        load_data(folder)
    assert load_data(folder, label_column="LABEL").class_names == ["x", "y"]


def test_sub_folders_stay_classes_beside_captions(tmp_path):
    folder = make_folder(tmp_path / "d", "cats/a.png", "dogs/b.png", "dogs/c.png")
    text = "file_name,text,kind\ncats/a.png,one,0\ndogs/b.png,two,1\ndogs/c.png,three,1\n"
    data = load_data(write_csv(folder, text))
    assert (data.class_names, data.labels.tolist(), data.captions) == (
        ["cats", "dogs"],
        [0, 1, 1],
        ["one", "two", "three"],
    )
    assert data.origins == {"class_labels": "its sub-folders", "caption": "column text of metadata.csv"}
    chosen = load_data(folder, label_column="kind", vector_columns=("kind",))
    assert chosen.class_names == ["0", "1"]
    assert chosen.origins["class_labels"] == "column kind of metadata.csv"
    assert chosen.origins["vector"] == "column kind of metadata.csv"


@pytest.mark.parametrize(
    "names", [("images/a.png", "images/b.png"), ("train/a.png", "test/b.png"), ("x/a.png", "b.png")]
)
def test_folders_that_tell_nothing_are_no_classes_beside_captions(tmp_path, names):
    folder = make_folder(tmp_path / "d", *names)
    data = load_data(write_csv(folder, f"file_name,text\n{names[0]},one\n{names[1]},two\n"))
    assert (data.class_names, len(data.captions)) == (None, 2)
