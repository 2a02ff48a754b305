"""What a card says: front matter that the hub reads, the data, figures of `evaluate`, and what diffusers lacks."""

import json

import pytest
from huggingface_hub import ModelCard

from support.commands import error
from support.networks import SMALL
from support.shared import make_run
from unet_denoiser import DataConfig, Diffusion, Run, TrainingConfig, UNet
from unet_denoiser.cli.app import main
from unet_denoiser.training.sharing import share

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def run(here):
    return make_run(here, "classes")


def card_of(run, folder):
    share(run, folder, f"owner/{folder.name}", "apache-2.0")
    return ModelCard.load(folder / "README.md")


def test_front_matter_and_data(run, here):
    card = card_of(run, here / "mine")
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "unet-denoiser",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "unet-denoiser", "diffusers"],
    }
    assert "A diffusion model of 8x8 images, given classes." in card.text
    assert "trained for 3 steps in batches of 4." in card.text
    for row in ("source | digits", "images | 1,438", "size | 8x8", "channels | 1", "classes | 10: 0, 1, 2, 3"):
        assert f"| {row}" in card.text
    assert "Class 10 stands for no class, which guidance leads away from." in card.text
    assert "![Samples](samples.png)" in card.text
    assert "Figures" not in card.text
    assert "unet-denoiser sample owner/mine --num-images 40 --guidance-scale 2 --out samples.png" in card.text


def test_a_student_tells_its_steps(here):
    text = card_of(make_run(here / "made", "distilled"), here / "mine").text
    assert "This network was distilled for 4 steps of ddim with guidance of 2 built in" in text
    assert "scheduler.set_timesteps(timesteps=[999, 561, 249, 61])" in text
    assert "nothing" not in text
    assert "--guidance-scale" not in text


def test_figures_of_evaluate(run, here, capsys):
    options = "--num-samples 20 --allow-few --extractor pixels --num-inference-steps 2 --device cpu"
    main(["evaluate", str(run.path), *options.split()])
    report = json.loads((run.path / "evaluation" / "report.json").read_text())
    text = card_of(run, here / "mine").text
    assert "## Figures of `unet-denoiser evaluate`" in text
    assert f"| {report['samples']['frechet']:.2f} | {report['held_out']['frechet']:.2f} |" in text
    assert f"| recall | {report['samples']['overlap']['recall']:.3f} |" in text
    assert "Sampled with 2 steps of dpm++ and guidance of 1." in text
    assert "They are of step" not in text
    report["about"]["samples"]["step"] = 2
    (run.path / "evaluation" / "report.json").write_text(json.dumps(report))
    assert "They are of step 2; this is step 3." in card_of(run, here / "other").text
    (run.path / "evaluation" / "report.json").write_text('{"about": {}}')
    told = error(capsys, "share", run.path, here / "third", "--license", "mit")
    assert "report.json is no report of evaluate ('samples'); delete it, or evaluate again" in told


def test_a_run_without_checkpoints_or_preview(here):
    """Only the model's folder is left; the card leaves out what nothing tells."""
    run = make_run(here, "vectors")
    for path in [*run.checkpoints.paths(), *(run.path / "samples").glob("*.png")]:
        path.unlink()
    text = card_of(run, here / "mine").text
    assert "samples.png)" not in text
    assert "| images |" not in text
    assert "trained for" not in text
    assert "| numbers | 2, without names |" in text
    assert "--vector 0 0" in text


def test_a_hub_dataset_is_named(here):
    run = make_run(here, "pixels").with_data(source="hf:owner/things:small", split="train")
    card = card_of(run, here / "mine")
    assert card.data.datasets == ["owner/things"]
    assert "| source | owner/things:small |" in card.text


def test_one_dimension_has_no_picture(here):
    model = UNet(
        **SMALL | {"dims": 1, "in_channels": 2, "out_channels": 2, "image_size": 16, "attention_resolutions": ()}
    )
    run = Run(here / "run", DataConfig("waves.npy", (16,), 2), model.config, Diffusion(), TrainingConfig(steps=1))
    run.write()
    model.save_pretrained(run.path / "model")
    share(run, here / "mine", "./mine", "mit")
    text = (here / "mine" / "README.md").read_text()
    assert not (here / "mine" / "samples.png").exists()
    assert "--out samples.npy" in text
    assert "There is no copy for diffusers: dims=1" in text
