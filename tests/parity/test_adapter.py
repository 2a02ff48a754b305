"""Tiny random diffusers pipelines give the same images with our network in the place of theirs."""

import diffusers
import pytest
import torch

from support.networks import randomise, relative_error
from unet_denoiser import DiffusersUNet, UNet

pytestmark = pytest.mark.filterwarnings("ignore:norm_groups:UserWarning")
SHAPE = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
}
ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 20,
}


def peer_and_ours(tmp_path, kind=diffusers.UNet2DConditionModel, **options):
    torch.manual_seed(0)
    peer = randomise(kind(**options)).eval()
    peer.save_pretrained(tmp_path / "unet")
    return peer, DiffusersUNet(UNet.from_pretrained(tmp_path / "unet"))


def vae():
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8).eval()


def embeds(width=24, count=5):
    generator = torch.Generator().manual_seed(2)
    return {
        "prompt_embeds": torch.randn(1, count, width, generator=generator),
        "negative_prompt_embeds": torch.randn(1, count, width, generator=generator),
    }


def stable_diffusion(unet, kind=diffusers.StableDiffusionPipeline, **extra):
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False)
    off = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipeline = kind(vae=vae(), unet=unet, scheduler=scheduler, requires_safety_checker=False, **off, **extra)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same_images(run, peer, ours):
    with torch.no_grad():
        expected, found = run(peer), run(ours)
    assert torch.as_tensor(expected).std() > 0.01
    assert (torch.as_tensor(found) - torch.as_tensor(expected)).abs().max() < 1e-4


def options(**more):
    return {
        "num_inference_steps": 3,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(3),
    } | more


def test_text_to_image_pipeline(tmp_path):
    peer, ours = peer_and_ours(tmp_path, **SHAPE)

    def run(unet):
        return stable_diffusion(unet)(**embeds(), **options(height=8, width=16, guidance_scale=5.0)).images

    assert_same_images(run, peer, ours)


def test_image_to_image_pipeline(tmp_path):
    peer, ours = peer_and_ours(tmp_path, **SHAPE)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    kind = diffusers.StableDiffusionImg2ImgPipeline

    def run(unet):
        return stable_diffusion(unet, kind)(image=image, strength=0.7, **embeds(), **options()).images

    assert_same_images(run, peer, ours)


def test_inpainting_pipeline(tmp_path):
    peer, ours = peer_and_ours(tmp_path, **SHAPE | {"in_channels": 9})
    generator = torch.Generator().manual_seed(4)
    inputs = {"image": torch.rand(1, 3, 8, 8, generator=generator), "mask_image": torch.ones(1, 1, 8, 8)}
    inputs["mask_image"][..., :4] = 0
    kind = diffusers.StableDiffusionInpaintPipeline

    def run(unet):
        return stable_diffusion(unet, kind)(**inputs, height=8, width=8, **embeds(), **options()).images

    assert_same_images(run, peer, ours)


def test_controlnet_pipeline(tmp_path):
    peer, ours = peer_and_ours(tmp_path, **SHAPE)
    control = randomise(
        diffusers.ControlNetModel.from_unet(peer, conditioning_embedding_out_channels=(16,)), seed=5
    ).eval()
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    kind = diffusers.StableDiffusionControlNetPipeline

    def run(unet):
        return stable_diffusion(unet, kind, controlnet=control)(image=image, **embeds(), **options()).images

    assert_same_images(run, peer, ours)


def test_stable_diffusion_xl_pipeline(tmp_path):
    peer, ours = peer_and_ours(tmp_path, **SHAPE | ADDED | {"use_linear_projection": True})
    pooled = torch.randn(1, 20, generator=torch.Generator().manual_seed(6))
    inputs = embeds() | {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled}

    def run(unet):
        off = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
        scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=vae(), unet=unet, scheduler=scheduler, add_watermarker=False, **off
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(**inputs, **options(height=8, width=8, guidance_scale=3.0)).images

    assert_same_images(run, peer, ours)


def test_unconditional_pipeline(tmp_path):
    shape = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 64), "attention_head_dim": 8}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    peer, ours = peer_and_ours(tmp_path, diffusers.UNet2DModel, **shape, **blocks)

    def run(unet):
        pipeline = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(batch_size=2, **options()).images

    assert_same_images(run, peer, ours)


def test_arguments_without_a_counterpart_are_refused(tmp_path):
    _, ours = peer_and_ours(tmp_path, **SHAPE)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 24)
    with pytest.raises(ValueError, match="cross_attention_kwargs has no counterpart"):
        ours(x, 3, context, cross_attention_kwargs={"scale": 0.5})
    assert ours(x, 3, context, return_dict=False)[0].shape == x.shape


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"image_embeds": torch.ones(1, 4)}, "added_cond_kwargs has 'image_embeds'; this network takes text_embeds"),
        ({"text_embeds": torch.ones(1, 4)}, "added_cond_kwargs has text_embeds alone; this network takes"),
    ],
)
def test_other_added_conditions_are_refused(tmp_path, added, message):
    _, ours = peer_and_ours(tmp_path, **SHAPE | ADDED)
    with pytest.raises(ValueError, match=message):
        ours(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 3, 24), added_cond_kwargs=added)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_equal_diffusers_where_a_row_has_no_one(tmp_path, dtype):
    peer, ours = peer_and_ours(tmp_path, **SHAPE)
    x, context = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 24)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).to(dtype)
    with torch.no_grad():
        found, expected = (unet(x, 3, context, encoder_attention_mask=mask).sample for unet in (ours, peer))
    assert relative_error(found, expected) < 1e-3  # diffusers adds -10000 to the scores, whose rounding that is


NEEDED = [
    "load_lora_adapter",
    "load_attn_procs",
    "attn_processors",
    "enable_freeu",
    "fuse_qkv_projections",
    "set_attn_processor",
    "_load_ip_adapter_weights",
    "set_adapters",
    "save_attn_procs",
    "set_default_attn_processor",
]


@pytest.mark.parametrize("name", NEEDED)
def test_methods_of_diffusers_networks_say_what_to_do(tmp_path, name):
    _, ours = peer_and_ours(tmp_path, **SHAPE)
    with pytest.raises(AttributeError, match=rf"^DiffusersUNet has no {name}; .*(merge_lora|save_pretrained)\("):
        getattr(ours, name)
    assert not hasattr(ours, "text_encoder_hid_proj")


def test_calls_of_pipelines(tmp_path):
    _, ours = peer_and_ours(tmp_path, **SHAPE)
    pipeline = stable_diffusion(ours)
    with pytest.raises(AttributeError, match="merge_lora"):
        pipeline.load_lora_weights({"unet.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3)})
    with pytest.raises(AttributeError, match="DiffusersUNet has no enable_freeu"):
        pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    pipeline.enable_attention_slicing()
    pipeline.unet.enable_gradient_checkpointing()
    assert ours.model.gradient_checkpointing
    pipeline.unet.disable_gradient_checkpointing()
    pipeline.to(torch.float16)
    assert ours.dtype == torch.float16
    pipeline.to(torch.float32)
    ours.save_pretrained(tmp_path / "saved")
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "saved")
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 24)
    with torch.no_grad():
        assert relative_error(ours(x, 3, context).sample, again(x, 3, context).sample) < 1e-4
