"""Options of small networks of ADM's code."""

SMALL = {"image_size": 16, "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
SMALL |= {"in_channels": 3, "out_channels": 6, "attention_resolutions": (1, 2), "use_scale_shift_norm": True}
ADM = {"resblock_updown": True, "num_head_channels": 16}
ADM_4 = {"resblock_updown": True, "num_heads": 4}
LDM = {"use_scale_shift_norm": False, "num_head_channels": 32, "out_channels": 3}
CLASSES = {"num_classes": 7}


# what differs from SMALL; attention_resolutions are rates of downsampling, "up" is an upsampler
CASES = {
    "iddpm-64": {"num_heads": 4, "num_res_blocks": 2},
    "iddpm-64-cond": {"num_heads": 4} | CLASSES,
    "iddpm-lsun-256": {"use_scale_shift_norm": False, "num_heads": 1, "attention_resolutions": (2,)},
    "iddpm-up-64-256": {"num_heads": 4, "channel_mult": (1, 1)} | CLASSES,
    "adm-64-cond": ADM | CLASSES | {"use_new_attention_order": True},
    "adm-128-cond": ADM_4 | CLASSES,
    "adm-256": ADM,
    "adm-512-cond": ADM | CLASSES | {"model_channels": 128, "channel_mult": (0.5, 1)},
    "adm-up-64-256": ADM_4 | CLASSES,
    "adm-up-128-512": ADM | CLASSES,
    "ldm-vq4": LDM,
    "ldm-super-resolution": LDM | {"in_channels": 6, "attention_resolutions": (2,)},
    "ldm-churches": ADM_4 | {"num_heads": 8, "in_channels": 4, "out_channels": 4},
    "ldm-inpainting": ADM_4 | {"num_heads": 8, "in_channels": 7, "out_channels": 3, "use_scale_shift_norm": False},
}
