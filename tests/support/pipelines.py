"""Tiny random pipelines of diffusers, with tokenizers of a few words."""

import json

import diffusers
import torch
import transformers

from support.checkpoints import DIFFUSERS

WORDS = ["a", "red", "fox", "blue", "house", "in", "snow", "blurry"]
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# as in the scheduler_config.json of Stable Diffusion
SD_SCHEDULE = SCALED | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
XL = {"kind": "CLIPTextModelWithProjection", "width": 16, "projection_dim": 1280, "hidden_act": "gelu"}


def tokenizer(folder, length=77):
    """CLIP's tokenizer with a vocabulary of single letters and a few words."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append(tuple(parts[:2]))
            parts[:2] = ["".join(parts[:2])]
    merges = list(dict.fromkeys(merges))
    names = [*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in merges)]
    vocab = {name: i for i, name in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    made = transformers.CLIPTokenizer.from_pretrained(folder)
    made.model_max_length = length
    return made


def text_encoder(words, width=24, kind="CLIPTextModel", **options):
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    lengths = {"vocab_size": len(words), "max_position_embeddings": words.model_max_length}
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**sizes | ends | lengths | options)).eval()


def vae(levels=2, **options):
    down, up = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
    widths = {"block_out_channels": (8, 16, 16, 16)[:levels], "latent_channels": 4, "norm_num_groups": 4}
    made = diffusers.AutoencoderKL(3, 3, down_block_types=down, up_block_types=up, **widths | options)
    with torch.no_grad():  # random ones hardly depend on the latents
        made.decoder.conv_in.weight *= 8
    return made.eval()


def vqvae(levels=2, **options):
    down, up = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
    widths = {"block_out_channels": (8, 16, 16, 16)[:levels], "latent_channels": 3, "norm_num_groups": 4}
    sizes = {"num_vq_embeddings": 64, "vq_embed_dim": 3}
    return diffusers.VQModel(3, 3, down_block_types=down, up_block_types=up, **widths | sizes | options).eval()


def network(name, **options):
    """A network of `support.checkpoints`."""
    kind, known = DIFFUSERS[name]
    return kind(**known | {"sample_size": 8} | options).eval()


def pixels(folder, kind, scheduler):
    torch.manual_seed(0)
    return save(kind(network("ddpm"), scheduler), folder)


def latent_diffusion(folder):
    torch.manual_seed(0)
    scheduler = diffusers.DDIMScheduler(**SCALED | {"clip_sample": False})
    return save(diffusers.LDMPipeline(vqvae(), network("ldm-vq4"), scheduler), folder)


def text_to_latents(folder):
    """LDM's pipeline for captions, with an autoencoder of its factor 8."""
    torch.manual_seed(0)
    words = tokenizer(folder / "tokenizer")
    scheduler = diffusers.DDIMScheduler(**SCALED | {"clip_sample": False, "set_alpha_to_one": False})
    pipe = diffusers.LDMTextToImagePipeline(vae(4), text_encoder(words), words, network("sd-1"), scheduler)
    return save(pipe, folder)


def stable_diffusion(folder, kind=None, net="sd-1", schedule=None, **parts):
    """A pipeline of Stable Diffusion 1 or 2, saved in the folder."""
    torch.manual_seed(0)
    words = tokenizer(folder / "tokenizer")
    known = {"vae": vae(), "text_encoder": text_encoder(words), "tokenizer": words, "unet": network(net)}
    known |= {"scheduler": diffusers.DDIMScheduler(**SD_SCHEDULE | (schedule or {}))}
    known |= {"safety_checker": None, "feature_extractor": None}
    return save((kind or diffusers.StableDiffusionPipeline)(**known | parts), folder)


def sdxl(folder, kind=None, net="sdxl", **options):
    """SDXL's base, or its refiner, which has the second text encoder alone."""
    torch.manual_seed(0)
    words = tokenizer(folder / "tokenizer")
    both = net != "sdxl-refiner"
    encoder = {"text_encoder": text_encoder(words, width=8, projection_dim=1280), "tokenizer": words}
    pair = encoder if both else dict.fromkeys(encoder)
    second = {"text_encoder_2": text_encoder(words, **XL | ({} if both else {"width": 24})), "tokenizer_2": words}
    scheduler = diffusers.EulerDiscreteScheduler(**SCALED, timestep_spacing="leading", steps_offset=1)
    parts = {"vae": vae(), "unet": network(net), "scheduler": scheduler, "add_watermarker": False}
    pipe = (kind or diffusers.StableDiffusionXLPipeline)(**pair | second | parts | options)
    save(pipe, folder)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe


def save(pipe, folder):
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def generators(seeds):
    """The generators whose noise both sides draw."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def images_of(pipe, **options):
    """Images (N, 3, H, W) in [-1, 1] of a diffusers pipeline."""
    return torch.from_numpy(pipe(output_type="np", **options).images).movedim(-1, 1) * 2 - 1
