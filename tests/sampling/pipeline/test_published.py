"""Published pipelines: images equal to diffusers' own, of tiny random ones."""

import json
import shutil

import diffusers
import pytest
import torch
from PIL import Image

from support import pipelines
from unet_denoiser import Pipeline
from unet_denoiser.config.editing import EditingConfig
from unet_denoiser.sampling.pipeline import GenerationRequest, generate

SEEDS = (3, 4)
CAPTIONS = ("a red fox", "a blue house in snow")


def ours(pipeline, *, sampler="ddim", steps=4, captions=CAPTIONS, edit=None, request=None, **options):
    """Images of a pipeline, by a sampler and what else its own scheduler says; options are of the sampling."""
    config = pipeline.sampling_config(sampler=sampler, num_inference_steps=steps, **options)
    request = GenerationRequest(edit or EditingConfig(), config, SEEDS, captions=captions, **request or {})
    return generate(pipeline, request)


def theirs(pipe, *, steps=4, **options):
    return pipelines.images_of(pipe, num_inference_steps=steps, generator=pipelines.generators(SEEDS), **options)


def assert_equal(found, expected):
    assert found.shape == expected.shape
    assert expected.std() > 0.02  # an image, not a plane
    assert (found - expected).abs().max() < 1e-4


def picture(path, size, seed=0):
    """An image file of smooth noise, and the image."""
    torch.manual_seed(seed)
    small = torch.rand(4, 4, 3).mul(255).byte().numpy()
    image = Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)
    image.save(path)
    return image


@pytest.mark.parametrize("options", [{}, {"clip_sample": False}], ids=["clipped", "not clipped"])
def test_ddim_of_pixels_is_diffusers(tmp_path, options):
    pipe = pipelines.pixels(tmp_path, diffusers.DDIMPipeline, diffusers.DDIMScheduler(**options))
    pipeline = Pipeline.from_pretrained(tmp_path)
    assert_equal(ours(pipeline, captions=()), theirs(pipe, batch_size=2))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_of_pixels_is_diffusers(tmp_path, variance):
    pipe = pipelines.pixels(tmp_path, diffusers.DDPMPipeline, diffusers.DDPMScheduler(variance_type=variance))
    pipeline = Pipeline.from_pretrained(tmp_path)
    assert_equal(ours(pipeline, sampler="ddpm", captions=()), theirs(pipe, batch_size=2))


def test_latent_diffusion_is_diffusers(tmp_path):
    pipe = pipelines.latent_diffusion(tmp_path)
    assert_equal(ours(Pipeline.from_pretrained(tmp_path), captions=()), theirs(pipe, batch_size=2))


def test_latent_diffusion_of_captions_is_diffusers(tmp_path):
    pipe, prompts = pipelines.text_to_latents(tmp_path), [*CAPTIONS]
    generator = torch.stack([torch.randn(4, 8, 8, generator=g) for g in pipelines.generators(SEEDS)])
    found = ours(Pipeline.from_pretrained(tmp_path), guidance_scale=3.0)
    assert_equal(found, theirs(pipe, prompt=prompts, guidance_scale=3.0, latents=generator))


SCHEDULES = {
    "stable diffusion's": {},
    "to x0": {"set_alpha_to_one": True},
    "trailing": {"timestep_spacing": "trailing"},
    "v": {"prediction_type": "v_prediction"},
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_stable_diffusion_is_diffusers(tmp_path, schedule):
    pipe = pipelines.stable_diffusion(tmp_path, net="sd-2" if schedule else "sd-1", schedule=schedule)
    pipeline = Pipeline.from_pretrained(tmp_path)
    options = {"prompt": [*CAPTIONS]}
    assert_equal(ours(pipeline, guidance_scale=1.0), theirs(pipe, guidance_scale=1.0, **options))
    assert_equal(ours(pipeline), theirs(pipe, **options))  # 7.5 in both
    expected = theirs(pipe, negative_prompt=["blurry"] * 2, guidance_scale=4, **options)
    assert_equal(ours(pipeline, guidance_scale=4, request={"negative_caption": "blurry"}), expected)


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_is_diffusers(tmp_path, zeros):
    pipe = pipelines.sdxl(tmp_path, force_zeros_for_empty_prompt=zeros)
    pipeline = Pipeline.from_pretrained(tmp_path)
    options = {"prompt": [*CAPTIONS], "height": 24, "width": 16}
    size = {"image_size": (24, 16)}
    assert_equal(ours(pipeline, request=size), theirs(pipe, **options))
    assert_equal(ours(pipeline, guidance_scale=1.0, request=size), theirs(pipe, guidance_scale=1.0, **options))
    expected = theirs(pipe, negative_prompt=["blurry"] * 2, **options)
    assert_equal(ours(pipeline, request=size | {"negative_caption": "blurry"}), expected)
    expected = theirs(pipe, negative_prompt=[""] * 2, **options)
    assert_equal(ours(pipeline, request=size | {"negative_caption": ""}), expected)


def test_sdxl_scales_latents_by_their_statistics(tmp_path):
    statistics = {"latents_mean": [0.3, -0.2, 0.1, 0.0], "latents_std": [1.5, 0.7, 2.0, 1.0], "scaling_factor": 0.5}
    torch.manual_seed(1)
    pipe = pipelines.sdxl(tmp_path, vae=pipelines.vae(**statistics))
    assert_equal(ours(Pipeline.from_pretrained(tmp_path)), theirs(pipe, prompt=[*CAPTIONS]))


def test_sdxl_embeds_sizes_in_any_width(tmp_path):
    torch.manual_seed(1)
    sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 1280 + 6 * 8}
    pipe = pipelines.sdxl(tmp_path, unet=pipelines.network("sdxl", **sizes))
    assert_equal(ours(Pipeline.from_pretrained(tmp_path)), theirs(pipe, prompt=[*CAPTIONS]))


def test_the_refiner_is_diffusers(tmp_path):
    kind = diffusers.StableDiffusionXLImg2ImgPipeline
    options = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    pipe = pipelines.sdxl(tmp_path / "refiner", kind, "sdxl-refiner", **options)
    image = picture(tmp_path / "image.png", 16)
    edit = EditingConfig(image=tmp_path / "image.png", strength=0.5)
    expected = theirs(pipe, prompt=[*CAPTIONS], image=[image] * 2, strength=0.5, negative_prompt=["blurry"] * 2)
    pipeline = Pipeline.from_pretrained(tmp_path / "refiner")
    assert_equal(ours(pipeline, edit=edit, request={"negative_caption": "blurry"}), expected)
    expected = theirs(pipe, prompt=[*CAPTIONS], image=[image] * 2, strength=0.5)
    assert_equal(ours(pipeline, edit=edit), expected)


@pytest.mark.parametrize("net", ["sd-1-inpainting", "sdxl-inpainting"])
def test_inpainting_is_diffusers_where_the_mask_is(tmp_path, net):
    folder, image, mask = tmp_path / "pipeline", picture(tmp_path / "image.png", 16), Image.new("L", (16, 16))
    if net.startswith("sdxl"):
        pipe = pipelines.sdxl(folder, diffusers.StableDiffusionXLInpaintPipeline, net)
    else:
        pipe = pipelines.stable_diffusion(folder, diffusers.StableDiffusionInpaintPipeline, net)
    mask.paste(255, (3, 4, 12, 14))
    mask.save(tmp_path / "mask.png")
    edit = EditingConfig(image=tmp_path / "image.png", mask=tmp_path / "mask.png")
    pictures = {"image": [image] * 2, "mask_image": [mask] * 2, "strength": 1.0}
    expected = theirs(pipe, prompt=[*CAPTIONS], negative_prompt=["blurry"] * 2, **pictures)
    found = ours(Pipeline.from_pretrained(folder), edit=edit, request={"negative_caption": "blurry"})
    assert_equal(found[:, :, 4:14, 3:12], expected[:, :, 4:14, 3:12])
    kept = torch.ones(16, 16, dtype=torch.bool)
    kept[4:14, 3:12] = False
    known = Pipeline.from_pretrained(folder).read_image(tmp_path / "image.png")
    assert torch.equal(found[:, :, kept], known.expand_as(found)[:, :, kept])


def test_instruct_pix2pix_is_diffusers(tmp_path):
    kind, folder = diffusers.StableDiffusionInstructPix2PixPipeline, tmp_path / "pipeline"
    pipe, image = pipelines.stable_diffusion(folder, kind, "instruct-pix2pix"), picture(tmp_path / "image.png", 16)
    pipeline, given = Pipeline.from_pretrained(folder), {"concat_image": tmp_path / "image.png"}
    options = {"prompt": [*CAPTIONS], "image": [image] * 2}
    assert_equal(ours(pipeline, request=given), theirs(pipe, **options))
    expected = theirs(pipe, negative_prompt=["blurry"] * 2, guidance_scale=3, image_guidance_scale=2.5, **options)
    scales = {"guidance_scale": 3.0, "image_guidance_scale": 2.5}
    assert_equal(ours(pipeline, **scales, request=given | {"negative_caption": "blurry"}), expected)


def test_the_upscaler_is_diffusers(tmp_path):
    kind, folder = diffusers.StableDiffusionUpscalePipeline, tmp_path / "pipeline"
    torch.manual_seed(2)
    parts = {"vae": pipelines.vae(3, scaling_factor=0.08333), "unet": pipelines.network("x4", num_class_embeds=1000)}
    low = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    pipe = pipelines.stable_diffusion(folder, kind, low_res_scheduler=low, **parts)
    image = picture(tmp_path / "image.png", 8)
    pipeline, given = Pipeline.from_pretrained(folder), {"concat_image": tmp_path / "image.png"}
    options = {"prompt": [*CAPTIONS], "image": [image] * 2}
    found = ours(pipeline, request=given)
    assert found.shape == (2, 3, 32, 32)
    assert_equal(found, theirs(pipe, **options))
    expected = theirs(pipe, negative_prompt=["blurry"] * 2, guidance_scale=2, **options)
    assert_equal(ours(pipeline, guidance_scale=2, request=given | {"negative_caption": "blurry"}), expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    pipelines.stable_diffusion(folder)
    return folder


@pytest.mark.parametrize("sampler", ["dpm++", "ddpm", "pndm"])
def test_every_sampler_and_task_goes_with_a_published_pipeline(folder, tmp_path, sampler):
    picture(tmp_path / "image.png", 20)
    pipeline = Pipeline.from_pretrained(folder)
    for edit in (
        EditingConfig(),
        EditingConfig(tmp_path / "image.png", 0.5),
        EditingConfig(tmp_path / "image.png", outpaint=(0, 4, 0, 4)),
    ):
        images = ours(pipeline, sampler=sampler, edit=edit)
        assert images.isfinite().all()
        assert images.shape[1:] == ((3, 16, 24) if edit.outpaint else (3, 16, 16))


def test_what_is_not_held_is_refused_by_name(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="is a FluxPipeline, which is not held; held are DDPMPipeline, "):
        Pipeline.from_pretrained(copy)
    (copy / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(copy / "vae")
    with pytest.raises(FileNotFoundError, match="has no folder vae, a part of its StableDiffusionPipeline"):
        Pipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": ()}, "a StableDiffusionPipeline, draws what a caption says; give caption"),
        ({"request": {"concat_image": "a.png"}}, "concat_image=a.png: .* sees no such image; leave it out"),
        ({"request": {"vector": (1.0,)}}, "vector=.* computes its own; leave it out"),
        ({"request": {"classes": ("cat",)}}, "class='cat': .* was trained without classes"),
    ],
)
def test_what_a_pipeline_does_not_take_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ours(Pipeline.from_pretrained(folder), **options)
