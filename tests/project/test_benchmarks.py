"""`benchmarks/speed.py` in its quick form, and the parts of it that decide what a table says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run_speed(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, BENCHMARKS / "speed.py", *arguments], capture_output=True, text=True)


@pytest.fixture
def scripts(monkeypatch):
    """Let the test import from benchmarks/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def report(scripts):
    import report

    return report


def test_the_sweep_measures_every_kind_of_case(tmp_path):
    done = run_speed("--quick", "--sweep", "--json", str(tmp_path / "sweep.json"))
    assert done.returncode == 0, done.stderr
    assert "8 of 8 cases measured" in done.stdout
    assert "The worst 8" in done.stdout
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert len({(row["precision"], row["measure"], row["text"]) for row in rows}) == 8
    for row in rows:
        assert row["ratio"] == pytest.approx(row["seconds"]["ours"] / min(list(row["seconds"].values())[1:]))
        # in bfloat16 a side whose error is nil would not have computed in bfloat16
        assert all(error > 1e-5 if row["precision"] == "bfloat16" else error < 1e-5 for error in row["errors"].values())


def test_bfloat16_has_tables_of_its_own(tmp_path):
    options = ("--quick", "--precision", "bfloat16", "--networks", "narrow", "--only", "forward", "train", "memory")
    done = run_speed(*options, "--json", str(tmp_path / "speed.json"))
    assert done.returncode == 0, done.stderr
    assert "### narrow, bfloat16" in done.stdout
    assert "### narrow, float32" not in done.stdout
    found = json.loads((tmp_path / "speed.json").read_text())
    assert set(found["peak"]) == {"bfloat16"}
    assert len(found["rows"]) == 3 * 3
    assert all(row.get("seconds", row.get("bytes")) > 0 for row in found["rows"])


def test_without_time_the_sweep_measures_nothing_and_says_so():
    done = run_speed("--sweep", "--minutes", "0", "--precision", "float32", "--widths", "32", "256")
    assert done.returncode == 0, done.stderr
    assert "0 of 128 cases measured" in done.stdout
    assert "more were left out because the time was over" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sweep", "--compiled"), "--compiled has no effect with --sweep"),
        (("--sweep", "--train-batch", "4"), "--train-batch has no effect with --sweep"),
        (("--minutes", "3"), "--minutes has no effect without --sweep"),
        (("--sweep", "--only", "load"), "--sweep measures forward and train only"),
    ],
)
def test_options_without_an_effect_are_refused(arguments, message, scripts, monkeypatch, capsys):
    import speed

    monkeypatch.setattr(sys, "argv", ["speed.py", *arguments])
    with pytest.raises(SystemExit) as end:
        speed.parse_arguments()
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_the_distribution_counts_ratios_along_each_axis(report):
    axes = {"precision": "float32", "measure": "train", "text": False, "size": 8, "batch": 1}
    rows = [axes | {"width": 32 if i < 4 else 64, "ratio": 0.9 + i / 50} for i in range(10)]  # up to 1.08
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.format_spread(rows).splitlines()]
    assert lines[2] == ["all", "10", "0.990", "1.060", "1.080", "3"]
    assert ["width 32", "4", "0.930", "0.960", "0.960", "0"] in lines
    assert ["width 64", "6", "1.030", "1.080", "1.080", "3"] in lines


def test_a_side_that_differs_or_is_not_finite_is_named(report):
    from checks import find_wrong

    assert find_wrong("net", "bfloat16", {"ours": 0.01, "diffusers": 0.02}) == ""
    assert find_wrong("net", "float32", {"ours": 0.01}) == "net: ours differs by 1.0e-02, more than 1e-04"
    assert "ours differs by nan" in find_wrong("net", "bfloat16", {"ours": float("nan")})
