"""`benchmarks/gpu.py` in its quick form on a CPU, so that it works the first time it meets a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = {"parity": 3, "speed": 6, "training": 1, "sharding": 2, "sampling": 8, "compiled": 4}


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module, which leaves torch's settings alone."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    monkeypatch.setattr(gpu, "allow_tf32", lambda allow: None)
    return gpu


def run(gpu, monkeypatch, folder, parts, *options):
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--out", str(folder), *options])
    gpu.main()
    return (folder / "report.md").read_text()


def test_every_part_prints_its_table(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--quick", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    _, *parts = re.split(r"^## ", done.stdout, flags=re.MULTILINE)
    assert [part.split()[0] for part in parts] == list(ROWS)
    for part in parts:
        assert "Traceback" not in part, part
        assert "failed" not in part, part
        assert "stopped here" not in part, part
        assert len(re.findall(r"^\| ", part, flags=re.MULTILINE)) > ROWS[part.split()[0]], part
    assert (tmp_path / "digits.png").is_file()
    assert (tmp_path / "report.md").read_text() == done.stdout


def test_an_error_costs_its_part_or_its_row_alone(gpu, monkeypatch, tmp_path):
    def broken():
        """breaks"""
        yield ["way", "speed"]
        yield ["first", "12.5"]
        raise RuntimeError("no such kernel")

    def mended():
        """has a row that breaks"""
        yield ["way", "speed", "spread"]
        yield ["first", *gpu.attempt(lambda: [str(1 // 0), "1.0"], 2)]
        yield ["second", *gpu.attempt(lambda: ["3.5", "1.0"], 2)]

    def empty():
        """breaks at once"""
        yield from [][0]

    report = run(gpu, monkeypatch, tmp_path, {"broken": broken, "empty": empty, "mended": mended})
    assert "## broken (breaks)\n\n| way   | speed |\n|-------|------:|\n| first |  12.5 |\nTraceback" in report
    assert "RuntimeError: no such kernel" in report
    assert "IndexError" in report
    assert re.search(r"\| first  \| failed: ZeroDivisionError \| +\|\n\| second \| +3.5 \|    1.0 \|\nTrace", report)


def test_no_row_begins_after_the_time_is_up(gpu, monkeypatch, tmp_path):
    def rows():
        """counts"""
        yield from [[str(i)] for i in range(3)]

    report = run(gpu, monkeypatch, tmp_path, {"counts": rows}, "--minutes", "0")
    assert "| 0 |\n|---|\n\nstopped here: 0.0 minutes have passed" in report
