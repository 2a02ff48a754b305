"""A pipeline: made from a run or from a saved model, its labels, and what it refuses."""

import subprocess
import sys

import pytest
import torch

from support.networks import small
from unet_denoiser import DataConfig, Diffusion, Pipeline, Run, TrainingConfig
from unet_denoiser.convert.checkpoint import export_checkpoint
from unet_denoiser.utils.files import write_json


def make_pipeline(path, class_names=("low", "high"), **options):
    data = DataConfig("two", (8, 8), 3, class_names=class_names)
    return Pipeline(path, small(num_classes=2, **options), Diffusion(), data)


def test_labels_take_turns(tmp_path):
    pipeline = make_pipeline(tmp_path)
    assert pipeline.class_names == ["low", "high"]
    assert pipeline.labels(5).tolist() == [0, 1, 0, 1, 0]
    assert pipeline.labels(3, ["high"]).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="class='cat' is not one of low, high"):
        pipeline.labels(3, ["cat"])
    with pytest.raises(ValueError, match="was trained without classes"):
        make_pipeline(tmp_path, class_names=None).labels(1)


def test_a_run_loads_its_pipeline(tmp_path):
    saved = make_pipeline(tmp_path)
    run = Run(tmp_path, saved.data, saved.model.config, saved.process, TrainingConfig())
    with pytest.raises(FileNotFoundError, match="has no model yet"):
        run.load_pipeline()
    saved.model.save_pretrained(tmp_path / "model")
    pipeline = run.load_pipeline()
    assert (pipeline.path, pipeline.data, pipeline.process) == (tmp_path, run.data, run.process)
    assert all(torch.equal(p, saved.model.get_parameter(name)) for name, p in pipeline.model.named_parameters())
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in pipeline.model.parameters() if w.ndim == 4)


def test_a_model_folder_loads_with_its_schedule_and_class_names(tmp_path):
    saved = make_pipeline(tmp_path, image_size=(8, 6))
    saved.model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no scheduler_config.json"):
        Pipeline.from_pretrained(tmp_path)
    Diffusion(beta_end=0.03).save_pretrained(tmp_path)
    pipeline = Pipeline.from_pretrained(tmp_path)
    assert (pipeline.data.image_size, pipeline.data.channels, pipeline.class_names) == ((8, 6), 3, ["0", "1"])
    assert pipeline.process.to_dict() == Diffusion(beta_end=0.03).to_dict()
    write_json(tmp_path / "class_names.json", ["low", "high"])
    assert Pipeline.from_pretrained(tmp_path).class_names == ["low", "high"]


def test_a_diffusers_folder_loads_with_the_scheduler_beside_it(tmp_path):
    model = small(upsample="nearest")
    export_checkpoint(model.state_dict(), model.config, tmp_path / "unet", "diffusers")
    Diffusion(prediction_type="epsilon").save_pretrained(tmp_path / "scheduler")
    pipeline = Pipeline.from_pretrained(tmp_path / "unet")
    assert pipeline.process.prediction_type == "epsilon"
    assert pipeline.class_names is None
    assert torch.equal(pipeline.model.input_conv.weight, model.input_conv.weight)


@pytest.mark.parametrize(
    ("options", "image_size", "message"),
    [({"image_size": (8, 8)}, (0,), r"image_size=\(0, 0\)"), ({}, (8, 8, 8), "must be 1 or 2 positive numbers")],
)
def test_sizes_are_checked(tmp_path, options, image_size, message):
    pipeline = make_pipeline(tmp_path, **options)
    assert pipeline.sample_size((12,)) == (12, 12)
    assert pipeline.sample_size(None) is None
    with pytest.raises(ValueError, match=message):
        pipeline.sample_size(image_size)


def test_networks_of_other_data_make_no_images(tmp_path):
    model = small(in_channels=2, out_channels=2)
    pipeline = Pipeline(tmp_path, model, Diffusion(), DataConfig("two"))
    assert not pipeline.makes_images
    with pytest.raises(ValueError, match=r"image=a.png: .* makes no images"):
        pipeline.read_image("a.png")


def test_reading_a_run_does_not_load_the_trainer():
    code = "import sys, unet_denoiser.training.run; print('unet_denoiser.training.trainer' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
