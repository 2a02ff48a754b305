"""The examples at tiny size."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    demo = runpy.run_path(str(EXAMPLES / "demo.py"))
    settings = demo["main"].__globals__
    train = settings["TRAIN"].replace(
        "--steps 480 --batch-size 128", "--steps 2 --batch-size 4 --model.model-channels 8"
    )
    assert train != settings["TRAIN"]
    settings.update(TRAIN=train, SAMPLE=settings["SAMPLE"] + " --num-inference-steps 2", SAMPLES=20)
    demo["main"]()
    report = (tmp_path / "runs" / "digits" / "report.txt").read_text()
    assert report.strip() in capsys.readouterr().out
    assert "1438 digits to train on, 359 held out; 20 samples" in report
    assert "99.2%" in report  # the SVC on digits it was not trained on
    assert (tmp_path / "runs" / "digits" / "samples.png").exists()
