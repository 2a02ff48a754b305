"""Published architectures by name."""

from typing import Any

from unet_denoiser.config.unet import UNetConfig

Options = dict[str, Any]

# fmt: off
# The options that each family shares, as many in a line as fit. Published networks have no learned null:
# an empty caption stands for no text.
_PUBLISHED: Options = {"context_dim": None, "learned_null": False, "upsample": "nearest"}
_DDPM: Options = _PUBLISHED | {
    "num_heads": 1, "attention_resolutions": (16,), "downsample": "conv_asymmetric", "norm_eps": 1e-6,
}
_IDDPM: Options = _PUBLISHED | {
    "out_channels": 6, "num_heads": 4, "modulation": "scale_shift", "time_frequencies": "half",
}
_ADM: Options = _IDDPM | {
    "num_heads": None, "head_dim": 64, "downsample": "resblock", "upsample": "resblock", "model_channels": 256,
    "attention_resolutions": (32, 16, 8), "dropout": 0.0,
}
_LDM: Options = _PUBLISHED | {"time_frequencies": "half", "dropout": 0.0, "image_size": 64}
_LDM_VQ4: Options = _LDM | {
    "model_channels": 224, "channel_mult": (1, 2, 3, 4), "attention_resolutions": (32, 16, 8), "num_heads": None,
    "head_dim": 32,
}
_SD1: Options = _LDM | {
    "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": (1, 2, 4, 4),
    "attention_resolutions": (64, 32, 16), "context_dim": 768, "attention": "transformer",
}
_SD2: Options = _SD1 | {"num_heads": None, "head_dim": 64, "context_dim": 1024}
_SDXL: Options = _SD2 | {
    "image_size": 128, "channel_mult": (1, 2, 4), "attention_resolutions": (64, 32), "transformer_depth": (0, 2, 10),
    "context_dim": 2048, "vector_dim": 2816,
}

PRESETS: dict[str, Options] = {
    # the specification's network: the defaults
    "specification": {},
    # Ho et al. 2020, arXiv 2006.11239; 256: cat, church, bedroom, CelebA-HQ
    "ddpm-cifar10": _DDPM | {"image_size": 32, "channel_mult": (1, 2, 2, 2)},
    "ddpm-celeba64": _DDPM | {"image_size": 64, "channel_mult": (1, 2, 2, 2, 4)},
    "ddpm-256": _DDPM | {"image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "dropout": 0.0},
    # Nichol and Dhariwal 2021, arXiv 2102.09672
    "iddpm-cifar10": _IDDPM | {
        "image_size": 32, "num_res_blocks": 3, "channel_mult": (1, 2, 2, 2), "attention_resolutions": (16, 8),
        "dropout": 0.3,
    },
    "iddpm-64": _IDDPM | {"num_res_blocks": 3, "channel_mult": (1, 2, 3, 4), "dropout": 0.0},
    "iddpm-64-cond": _IDDPM | {
        "model_channels": 192, "num_res_blocks": 3, "channel_mult": (1, 2, 3, 4), "num_classes": 1000, "dropout": 0.0,
    },
    "iddpm-lsun-256": _IDDPM | {
        "image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "attention_resolutions": (16,), "num_heads": 1,
        "modulation": "add", "dropout": 0.0,
    },
    "iddpm-up-64-256": _IDDPM | {
        "in_channels": 6, "image_size": 256, "model_channels": 192, "channel_mult": (1, 1, 2, 2, 4, 4),
        "attention_resolutions": (16, 8), "num_classes": 1000, "dropout": 0.0,
    },
    # Dhariwal and Nichol 2021, arXiv 2105.05233
    "adm-64-cond": _ADM | {
        "model_channels": 192, "num_res_blocks": 3, "channel_mult": (1, 2, 3, 4), "num_classes": 1000, "dropout": 0.1,
    },
    "adm-128-cond": _ADM | {
        "image_size": 128, "channel_mult": (1, 1, 2, 3, 4), "num_heads": 4, "head_dim": None, "num_classes": 1000,
    },
    "adm-256": _ADM | {"image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4)},
    "adm-256-cond": _ADM | {"image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "num_classes": 1000},
    "adm-512-cond": _ADM | {
        "image_size": 512, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4), "stem_channels": 128, "num_classes": 1000,
    },
    "adm-up-64-256": _ADM | {
        "in_channels": 6, "image_size": 256, "model_channels": 192, "channel_mult": (1, 1, 2, 2, 4, 4), "num_heads": 4,
        "head_dim": None, "num_classes": 1000,
    },
    "adm-up-128-512": _ADM | {
        "in_channels": 6, "image_size": 512, "model_channels": 192, "channel_mult": (1, 1, 2, 2, 4, 4),
        "attention_resolutions": (32, 16), "num_classes": 1000,
    },
    # Karras et al. 2022, arXiv 2206.00364: their DhariwalUNet
    "edm-imagenet64-cond": _ADM | {
        "out_channels": 3, "model_channels": 192, "num_res_blocks": 3, "channel_mult": (1, 2, 3, 4),
        "num_classes": 1000, "dropout": 0.1,
    },
    # Rombach et al. 2022, arXiv 2112.10752; vq4: CelebA-HQ, FFHQ, bedrooms
    "ldm-cin256": _LDM | {
        "model_channels": 192, "channel_mult": (1, 2, 3, 5), "attention_resolutions": (32, 16, 8), "num_heads": 1,
        "attention": "transformer", "context_dim": 512,
    },
    "ldm-vq4": _LDM_VQ4,
    "ldm-churches": _LDM | {
        "in_channels": 4, "out_channels": 4, "image_size": 32, "model_channels": 192, "channel_mult": (1, 2, 2, 4, 4),
        "attention_resolutions": (32, 16, 8, 4), "modulation": "scale_shift", "downsample": "resblock",
        "upsample": "resblock",
    },
    "ldm-text2img": _SD1 | {"image_size": 32, "attention_resolutions": (32, 16, 8), "context_dim": 1280},
    "ldm-super-resolution": _LDM_VQ4 | {
        "in_channels": 6, "model_channels": 160, "channel_mult": (1, 2, 2, 4), "attention_resolutions": (8,),
    },
    "ldm-inpainting": _LDM | {
        "in_channels": 7, "model_channels": 256, "channel_mult": (1, 2, 3, 4), "attention_resolutions": (32, 16, 8),
        "downsample": "resblock", "upsample": "resblock",
    },
    # Stable Diffusion, by its in_channels: 9 inpainting, 8 instruct-pix2pix, 5 depth; lcm: Luo et al. 2023
    "sd-1.5": _SD1,
    "sd-1.5-inpainting": _SD1 | {"in_channels": 9},
    "instruct-pix2pix": _SD1 | {"in_channels": 8},
    "lcm-sd-1.5": _SD1 | {"time_cond_dim": 256},
    "sd-2": _SD2 | {"image_size": 96, "attention_resolutions": (96, 48, 24)},
    "sd-2-base": _SD2,
    "sd-2-inpainting": _SD2 | {"in_channels": 9},
    "sd-2-depth": _SD2 | {"in_channels": 5},
    "sd-x4-upscaler": _SD2 | {
        "in_channels": 7, "image_size": 128, "model_channels": 256, "channel_mult": (1, 2, 2, 4),
        "attention_resolutions": (64, 32, 16), "num_heads": 8, "head_dim": None,
        "only_cross_attention": (True, True, True, False), "num_classes": 1000,
    },
    "sdxl-base": _SDXL,
    "sdxl-inpainting": _SDXL | {"in_channels": 9},
    "sdxl-refiner": _SDXL | {
        "model_channels": 384, "channel_mult": (1, 2, 4, 4), "transformer_depth": 4, "context_dim": 1280,
        "vector_dim": 2560,
    },
}
# fmt: on


def list_presets() -> list[str]:
    """Return the names of the published architectures."""
    return list(PRESETS)


def preset(name: str) -> UNetConfig:
    """Return a published architecture by its name; ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is not one of {', '.join(PRESETS)}")
    return UNetConfig(**PRESETS[name])
