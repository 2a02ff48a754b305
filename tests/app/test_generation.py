"""Samples and edits of the page are those of the library, and stop when they are asked to."""

import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from support import pipelines
from support.networks import randomise
from unet_denoiser import DataConfig, Diffusion, DistillationConfig, EditingConfig, Pipeline, UNet
from unet_denoiser.app.form import Form
from unet_denoiser.app.generation import PipelineHolder, Stopped, make_request, stream
from unet_denoiser.app.inputs import read_inputs
from unet_denoiser.app.uploads import check_upload, make_canvas, make_edit, save_mask
from unet_denoiser.sampling.pipeline.generation import generate

OLD = Path(__file__).parents[1] / "support" / "old"
OPTIONS = {"model_channels": 8, "channel_mult": (1,), "num_heads": 1, "norm_groups": 2, "image_size": 8}


def make_pipeline(tmp_path, process=None, concat=None, **options):
    model = UNet(**{"in_channels": 1, "out_channels": 1, "context_dim": None} | OPTIONS | options)
    names = tuple("abc") if model.config.num_classes else None
    data = DataConfig(str(tmp_path), image_size=(8, 8), channels=1, class_names=names, concat=concat)
    return Pipeline(tmp_path, randomise(model).eval(), process or Diffusion(), data)


@pytest.fixture
def pipeline(tmp_path):
    return make_pipeline(tmp_path, num_classes=3)


@pytest.fixture
def image(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_the_last_frame_is_what_generate_makes(pipeline, tmp_path):
    request = make_request(pipeline, Form(classes=("b", "a"), seed=5, count=4, steps=6, guidance=2, sampler="ddim"))
    frames = list(stream(pipeline, request, threading.Event()))
    assert [frame.is_last for frame in frames] == [False] * (len(frames) - 1) + [True]
    assert frames[-1].text.startswith("4 images in ")
    pipeline.save_grid(generate(pipeline, request), tmp_path / "expected.png", ("b", "a"))
    with Image.open(tmp_path / "expected.png") as expected:
        assert np.array_equal(frames[-1].picture, expected)


def test_a_generation_stops_after_the_step_in_which_it_is_asked(pipeline):
    stop = threading.Event()
    frames = stream(pipeline, make_request(pipeline, Form(count=1, steps=1000, guidance=1, sampler="ddpm")), stop)
    assert not next(frames).is_last
    stop.set()
    with pytest.raises(Stopped, match=r"stopped after step \d+$"):
        list(frames)


def test_a_viewer_that_leaves_ends_the_generation(pipeline):
    before = threading.active_count()
    frames = stream(pipeline, make_request(pipeline, Form(count=1, steps=1000, guidance=1)), threading.Event())
    next(frames)
    frames.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 must be a whole number from 1 to 1000"),
        ({"steps": 2.5}, r"steps=2.5 must be a whole number"),
        ({"count": 65}, "number=65 must be a whole number from 1 to 64"),
        ({"count": None}, "number=nothing must be"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"caption": "x" * 1001}, "caption has 1001 letters; at most 1000"),
        ({"vector": "1, x"}, "vector='1, x' must be numbers"),
        ({"guidance": float("inf")}, "guidance_scale=inf must be a finite number"),
        ({"sampler": "none"}, "sampler='none' is not one of"),
    ],
)
def test_a_value_out_of_range_is_one_line(pipeline, changes, message):
    with pytest.raises(ValueError, match=message):
        make_request(pipeline, replace(Form(steps=2, guidance=1), **changes))


def test_only_the_inputs_of_the_network_are_shown(tmp_path):
    inputs = read_inputs(make_pipeline(tmp_path))
    assert (inputs.classes, inputs.captions, inputs.vector, inputs.is_guided, inputs.fixed) == ((), False, 0, False, "")
    assert inputs.tasks == ("vary", "inpaint", "outpaint", "upscale")
    inputs = read_inputs(make_pipeline(tmp_path, num_classes=3, vector_dim=2))
    assert (inputs.classes, inputs.vector, inputs.is_guided) == (("a", "b", "c"), 2, True)


def test_steps_and_guidance_of_a_distilled_network_are_fixed(tmp_path):
    process = Diffusion().distilled(DistillationConfig(num_steps=4, guidance_scale=3.0))
    pipeline = make_pipeline(tmp_path, process, num_classes=3)
    inputs = read_inputs(pipeline)
    assert (inputs.steps, inputs.sampler, inputs.is_guided) == (4, "ddim", False)
    assert inputs.fixed == "this network was distilled for 4 steps of ddim with guidance of 3 built in"
    request = make_request(pipeline, Form(count=1))
    assert request.config.num_inference_steps == 4
    assert list(stream(pipeline, request, threading.Event()))[-1].is_last


@pytest.mark.parametrize(
    ("concat", "channels", "tasks", "factor"),
    [("downscaled:2", 2, ("upscale",), 2), ("inpainting", 3, ("inpaint", "outpaint"), None)],
)
def test_a_network_that_sees_an_image_needs_one(tmp_path, image, concat, channels, tasks, factor):
    pipeline = make_pipeline(tmp_path, concat=concat, in_channels=channels)
    inputs = read_inputs(pipeline)
    assert (inputs.needs_image, inputs.tasks, inputs.upscale) == (True, tasks, factor)
    if factor:
        edit, seen = make_edit("upscale", image, inputs, {}, tmp_path)
        frame = list(stream(pipeline, make_request(pipeline, Form(count=1, steps=2), edit, seen), threading.Event()))[
            -1
        ]
        assert frame.picture.size == (34 + 2, 34 + 2)  # one of 16x16, twice as large, with its border


@pytest.mark.parametrize("task", ["vary", "inpaint", "outpaint", "upscale"])
def test_edits_are_those_of_the_library(pipeline, tmp_path, image, task):
    painted = Image.new("RGBA", (320, 320))
    painted.paste((255, 127, 14, 200), (0, 0, 160, 320))
    values = {"strength": 0.5, "margins": (0, 2, 0, 2), "factor": 2, "resample": 1, "layers": [painted]}
    inputs = read_inputs(pipeline)
    edit, concat = make_edit(task, image, inputs, values, tmp_path)
    request = make_request(pipeline, Form(classes=("a",), seed=1, count=1, steps=3, guidance=1), edit, concat)
    frame = list(stream(pipeline, request, threading.Event()))[-1]
    found = generate(pipeline, request)
    pipeline.save_grid(found, tmp_path / "expected.png", columns=1)
    with Image.open(tmp_path / "expected.png") as expected:
        assert np.array_equal(frame.picture, expected)
    given = pipeline.read_image(image)[0]
    if task == "inpaint":
        torch.testing.assert_close(found[0, :, :, 4:], given[:, :, 4:], rtol=0, atol=0)
        assert not torch.equal(found[0, :, :, :4], given[:, :, :4])
    assert tuple(found.shape[2:]) == {"outpaint": (8, 12), "upscale": (16, 16)}.get(task, (8, 8))


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("translate", {}, "task='translate': this network does not do it; it does vary, inpaint, outpaint, upscale"),
        ("upscale", {"factor": 1}, "factor=1 must be a whole number from 2 to 16"),
        ("outpaint", {"margins": (0, -1, 0, 0)}, "right=-1 must be a whole number from 0 to 512"),
        ("outpaint", {"margins": (0, 0, 0, 0)}, r"outpaint=\(0, 0, 0, 0\) must be pixels"),
        ("vary", {"strength": 2}, "strength=2.0 must be above 0 and at most 1"),
        ("inpaint", {"layers": []}, "mask: nothing is painted"),
        ("inpaint", {"layers": [Image.new("RGBA", (8, 8))]}, "mask: nothing is painted"),
        ("inpaint", {"resample": 0}, "resample=0 must be a whole number from 1 to 20"),
    ],
)
def test_an_edit_that_cannot_be_made_is_one_line(pipeline, tmp_path, image, task, changes, message):
    values = {"strength": 0.5, "margins": (1, 1, 1, 1), "factor": 2, "resample": 1, "layers": []} | changes
    with pytest.raises(ValueError, match=message):
        make_edit(task, image, read_inputs(pipeline), values, tmp_path)


def test_uploads_are_checked(tmp_path, image):
    assert check_upload(str(image)) == image
    (tmp_path / "broken.png").write_bytes(image.read_bytes()[:45])
    (tmp_path / "text.png").write_text("no image")
    for name in ("broken.png", "text.png"):
        with pytest.raises(ValueError, match=rf"^{name} cannot be read as an image"):
            check_upload(str(tmp_path / name))
    Image.new("1", (5000, 5000)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"large.png has 5,000 x 5,000 pixels; at most 16,777,216 pixels"):
        check_upload(str(tmp_path / "large.png"))
    with pytest.raises(ValueError, match="no image is uploaded"):
        check_upload(None)
    Image.new("L", (600, 600)).save(tmp_path / "wide.png")
    inputs = read_inputs(make_pipeline(tmp_path))
    with pytest.raises(ValueError, match="the result has 1,200 x 1,200 pixels; at most 1,048,576 are made"):
        make_edit("upscale", tmp_path / "wide.png", inputs, {"factor": 2}, tmp_path)


def test_the_canvas_shows_what_the_network_sees_and_masks_are_what_is_painted(pipeline, tmp_path, image):
    canvas = np.asarray(make_canvas(pipeline, image, keep_size=False))
    assert canvas.shape == (320, 320, 3)
    assert np.array_equal(canvas[::40, ::40, 0], np.asarray(Image.open(image)))
    first, second = (Image.new("RGBA", (4, 4)) for _ in range(2))
    first.putpixel((0, 0), (0, 0, 0, 9))
    second.putpixel((3, 2), (255, 0, 0, 255))
    mask = np.asarray(Image.open(save_mask([first, second], tmp_path)))
    assert sorted(zip(*np.nonzero(mask), strict=True)) == [(0, 0), (2, 3)]
    assert EditingConfig(image=image, mask=tmp_path / "mask.png").mask == tmp_path / "mask.png"


def test_a_published_pipeline_is_sampled_by_its_captions(tmp_path):
    """With its own guidance; the networks that change an image show that they need one."""
    pipelines.stable_diffusion(tmp_path / "drawing")
    pipeline = PipelineHolder().load(str(tmp_path / "drawing"))
    inputs = read_inputs(pipeline)
    assert (inputs.captions, inputs.classes, inputs.is_guided, inputs.guidance) == (True, (), True, 7.5)
    assert inputs.tasks == ("vary", "inpaint", "outpaint")
    form = Form(caption="a red fox", negative_caption="blurry", seed=3, count=2, steps=2, guidance=3, sampler="ddim")
    request = make_request(pipeline, form)
    frame = list(stream(pipeline, request, threading.Event()))[-1]
    pipeline.save_grid(generate(pipeline, request), tmp_path / "expected.png", ("a red fox",))
    with Image.open(tmp_path / "expected.png") as expected:
        assert np.array_equal(frame.picture, expected)
    with pytest.raises(ValueError, match="draws what a caption says"):
        list(stream(pipeline, make_request(pipeline, replace(form, caption=" ")), threading.Event()))
    pipelines.stable_diffusion(tmp_path / "painting", diffusers.StableDiffusionInpaintPipeline, "sd-1-inpainting")
    inputs = read_inputs(PipelineHolder().load(str(tmp_path / "painting")))
    assert (inputs.needs_image, inputs.tasks) == (True, ("inpaint", "outpaint"))


def test_a_pipeline_is_kept_until_its_files_change(tmp_path):
    run, holder = shutil.copytree(OLD / "run", tmp_path / "run"), PipelineHolder()
    first = holder.load(str(run))
    assert holder.load(str(run)) is first
    os.utime(run / "model" / "model.safetensors", (1, 1))
    assert holder.load(str(run)) is not first
