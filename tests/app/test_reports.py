"""The reports of doctor and evaluate, as the page shows them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from unet_denoiser.app.pictures import show_pictures
from unet_denoiser.app.reports import escape_markdown, make_table, read_doctor, read_evaluation
from unet_denoiser.cli.app import main

OLD = Path(__file__).parents[1] / "support" / "old"  # a run of two steps


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return shutil.copytree(OLD / "run", tmp_path_factory.mktemp("reports") / "run")


def test_without_a_report_the_command_that_writes_it_is_shown(tmp_path):
    assert read_doctor(tmp_path) == (f"There is none yet: `unet-denoiser doctor {tmp_path}` writes it.", [])
    assert read_evaluation(tmp_path) == (f"There is none yet: `unet-denoiser evaluate {tmp_path}` writes it.", [])


def test_the_doctors_report_says_what_the_command_prints(run, capsys):
    main(["doctor", str(run), "--num-images", "4", "--num-samples", "4", "--device", "cpu"])
    printed = capsys.readouterr().out
    section = read_doctor(run)
    report = json.loads((run / "doctor" / "report.json").read_text())
    assert escape_markdown(report["likely_cause"]) in section.text
    for finding in report["findings"]:
        assert escape_markdown(finding["text"]) in section.text
    for t, loss, guess in re.findall(r"^t = (\d+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE):
        assert f"| {t} | {loss} | {guess} |" in section.text
    assert [file.name for file, _ in section.pictures] == ["denoising.png", "neighbours.png"]
    assert show_pictures(section.pictures).count('src="data:image/png;base64,iVBOR') == 2


def test_the_evaluations_figures_are_those_that_the_command_prints(run, capsys):
    few = ["--num-samples", "12", "--num-inference-steps", "2", "--extractor", "pixels", "--allow-few"]
    main(["evaluate", str(run), "--held-out", "digits:held-out", *few])
    printed = capsys.readouterr().out
    section = read_evaluation(run)
    for name in ("precision", "recall", "density", "coverage", "classified as asked"):
        figures = re.search(rf"^{name} +(.+)$", printed, re.MULTILINE)[1].split()
        row = re.search(rf"^\| {name} \|(.+)\|$", section.text, re.MULTILINE)[1]
        assert [cell.strip() for cell in row.split("|") if cell.strip()] == figures
    assert [file.name for file, _ in section.pictures] == ["neighbours.png"]


@pytest.mark.parametrize("text", ["{}", '{"likely_cause": 3, "findings": [1]}', "[]", "no JSON"])
def test_a_file_that_is_no_report_is_one_line(tmp_path, text):
    for name, read in (("doctor", read_doctor), ("evaluation", read_evaluation)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "report.json").write_text(text)
        with pytest.raises(ValueError, match=r"report\.json"):
            read(tmp_path)


def test_text_of_a_report_is_text(tmp_path):
    assert escape_markdown("<b>*a*_[x](y)") == r"\<b\>\*a\*\_\[x\](y)"
    assert make_table(("a", "b|c"), [("1", "2")]) == "| a | b\\|c |\n| --- | --: |\n| 1 | 2 |"


def test_a_broken_picture_is_one_line(tmp_path):
    (tmp_path / "step.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"step\.png cannot be read as an image"):
        show_pictures([(tmp_path / "step.png", "step 1")])
    Image.new("L", (10, 20)).save(tmp_path / "small.png")
    shown = show_pictures([(tmp_path / "small.png", "<step>")])
    assert "width: 240px" in shown
    assert "&lt;step&gt;" in shown
