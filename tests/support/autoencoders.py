"""Small autoencoders of diffusers with random weights."""

import diffusers


def small_kl(**options):
    return diffusers.AutoencoderKL(
        **{
            "in_channels": 1,
            "out_channels": 1,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 16),
            "latent_channels": 3,
            "norm_num_groups": 4,
            "mid_block_add_attention": False,
            **options,
        }
    ).eval()


def small_tiny(channels=1):
    return diffusers.AutoencoderTiny(
        in_channels=channels,
        out_channels=channels,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=2.0,
    ).eval()
