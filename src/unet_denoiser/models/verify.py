"""Run a checkpoint in the code it comes from too, and compare the outputs."""

import copy
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert.checkpoint import ForeignCheckpoint
from unet_denoiser.convert.diffusers_config import to_diffusers
from unet_denoiser.models.unet import UNet

MAX_RELATIVE_ERROR = 1e-4  # rounding of float32 through a deep network stays below 1e-5; a wrong tensor is above 1e-2


class Comparison(NamedTuple):
    """The class that a checkpoint was compared with, and the largest difference relative to its largest output."""

    peer: str
    error: float


@torch.no_grad()
def compare(checkpoint: ForeignCheckpoint, model: UNet) -> Comparison:
    """Run a checkpoint in the code it comes from and in ours, on the same random input, in float32.

    `model` is the network that `UNet.from_checkpoint` made of it. Raise ValueError if no installed package runs such a
    checkpoint, or if its output is zero everywhere.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    model = copy.deepcopy(model).float()
    x, t = torch.randn(1, config.in_channels, *config.sizes, generator=generator), torch.tensor([500])
    labels = torch.tensor([config.num_classes - 1]) if config.num_classes else None
    if checkpoint.layout == "compvis" and config.attention == "plain":
        peer = _build_guided_diffusion(checkpoint)
        out, expected = model(x, t, class_labels=labels), peer(x, t, labels)
    else:
        from unet_denoiser.models.diffusers_adapter import DiffusersUNet

        peer = _build_diffusers(checkpoint)
        conditions = {"class_labels": labels, **_draw_conditions(config, generator)}
        out, expected = DiffusersUNet(model)(x, t, **conditions).sample, peer(x, t, **conditions).sample
    if not expected.any():
        raise ValueError(f"{checkpoint.path} is an untrained network, whose output is zero: nothing to compare")
    return Comparison(type(peer).__name__, ((out - expected).abs().max() / expected.abs().max()).item())


def _draw_conditions(config: UNetConfig, generator: torch.Generator) -> dict[str, Any]:
    """Draw the conditions of one sample, as keyword arguments of diffusers' networks."""
    conditions: dict[str, Any] = {}
    if config.context_dim:
        conditions["encoder_hidden_states"] = torch.randn(1, 77, config.context_dim, generator=generator)
    if config.time_cond_dim:
        conditions["timestep_cond"] = torch.randn(1, config.time_cond_dim, generator=generator)
    if config.vector_dim and config.is_vector_projected:
        conditions["class_labels"] = torch.randn(1, config.vector_dim, generator=generator)
    elif config.vector_dim:  # pooled text, and the sizes as 256 sines and cosines each
        sizes = torch.tensor([[1024.0, 768, 0, 0, 1024, 1024]])[:, : (config.vector_dim - 1280) // 256]
        text = torch.randn(1, config.vector_dim - 256 * sizes.shape[1], generator=generator)
        conditions["added_cond_kwargs"] = {"text_embeds": text, "time_ids": sizes}
    return conditions


def _build_guided_diffusion(checkpoint: ForeignCheckpoint) -> nn.Module:
    """Build OpenAI's network, which runs the files of improved-diffusion, of ADM and some of LDM."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it uses old names of torch
            from guided_diffusion.unet import UNetModel  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError("verify: needs OpenAI's code; pip install --no-deps guided-diffusion-sdk") from None
    c = checkpoint.config
    if isinstance(c.num_heads, tuple) or isinstance(c.head_dim, tuple):
        raise ValueError("verify: OpenAI's code has one number of heads for all levels")
    same = ("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "channel_mult", "dims")
    peer = UNetModel(
        **{name: getattr(c, name) for name in same},
        attention_resolutions=[2**level for level in range(len(c.widths)) if c.has_attention(level)],
        conv_resample=c.downsample != "avgpool",
        num_classes=c.num_classes,
        num_heads=c.num_heads or 1,
        num_head_channels=c.head_dim or -1,
        use_scale_shift_norm=c.modulation == "scale_shift",
        resblock_updown=c.downsample == "resblock",
        use_new_attention_order=checkpoint.kind.packing == "new",
    )
    peer.load_state_dict(checkpoint.tensors)
    return peer.eval()


def _build_diffusers(checkpoint: ForeignCheckpoint) -> nn.Module:
    """Build diffusers' network, filled by its own code: its folders directly, LDM's files through its converter."""
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    if checkpoint.layout not in ("diffusers", "compvis"):
        raise ValueError(f"verify: no installed package runs files of the {checkpoint.layout} layout")
    if checkpoint.layout == "diffusers" and checkpoint.diffusers_config is None:
        raise ValueError(
            f"verify: {checkpoint.path} has no config.json beside it, and what names and shapes do not tell cannot "
            "be verified; give the folder"
        )
    config, tensors = checkpoint.diffusers_config or to_diffusers(checkpoint.config), checkpoint.tensors
    peer = getattr(diffusers, config["_class_name"]).from_config(config)
    if checkpoint.layout == "compvis":
        prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
        tensors = convert_ldm_unet_checkpoint(prefixed, {"class_embed_type": None} | dict(peer.config))
        if checkpoint.config.time_cond_dim:  # the converter leaves it out
            tensors["time_embedding.cond_proj.weight"] = checkpoint.tensors["time_embed.cond_proj.weight"]
    peer.load_state_dict(tensors)
    return peer.eval()
