"""The convert command's work: a checkpoint of any format into any other, checked against its own code on request."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unet_denoiser.config.base import QKVOrder
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert.architecture import detect_layout, published_order
from unet_denoiser.convert.checkpoint_files import read_state
from unet_denoiser.convert.diffusers_config import to_diffusers
from unet_denoiser.models.unet import UNet


class Comparison(NamedTuple):
    """The class that a checkpoint was compared with, and the largest difference relative to its largest output."""

    peer: str
    error: float


TOLERANCE = 1e-4  # rounding of float32 through a deep network stays below 1e-5; a wrong tensor is above 1e-2


@torch.no_grad()
def compare(source: Path, model: UNet, *, ema: bool = False, variant: str | None = None, **options: Any) -> Comparison:
    """Run a checkpoint in the code it comes from and in ours, on the same random input, in float32.

    Args:
        source: the checkpoint. model: what `UNet.from_pretrained` made of it, with these options.

    Raises:
        ValueError: no installed package runs such a checkpoint, or its output is zero everywhere.
    """
    state, foreign = read_state(source, ema, variant)
    c, layout = model.config, detect_layout(state)
    model = copy.deepcopy(model).float()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    size = (c.image_size,) * c.dims if isinstance(c.image_size, int) else c.image_size
    x, t = random(1, c.in_channels, *size), torch.tensor([500])
    labels = torch.tensor([c.num_classes - 1]) if c.num_classes else None
    if layout == "compvis" and c.attention == "plain":
        peer = _guided_diffusion(c, state, options.get("qkv_order"))
        out, expected = model(x, t, class_labels=labels), peer(x, t, labels)
    else:
        from unet_denoiser.models.diffusers_adapter import DiffusersUNet

        peer = _diffusers(layout, c, state, foreign)
        given: dict[str, Any] = {"class_labels": labels}
        if c.context_dim:
            given["encoder_hidden_states"] = random(1, 77, c.context_dim)
        if c.time_cond_dim:
            given["timestep_cond"] = random(1, c.time_cond_dim)
        if c.vector_dim:  # pooled text, and the sizes as 256 sines and cosines each
            sizes = torch.tensor([[1024.0, 768, 0, 0, 1024, 1024]])[:, : (c.vector_dim - 1280) // 256]
            text = random(1, c.vector_dim - 256 * sizes.shape[1])
            given["added_cond_kwargs"] = {"text_embeds": text, "time_ids": sizes}
        out, expected = DiffusersUNet(model)(x, t, **given).sample, peer(x, t, **given).sample
    if not expected.any():
        raise ValueError(f"{source} is an untrained network, whose output is zero: nothing to compare")
    return Comparison(type(peer).__name__, ((out - expected).abs().max() / expected.abs().max()).item())


def _guided_diffusion(c: UNetConfig, state: dict[str, Tensor], order: QKVOrder | None) -> nn.Module:
    """OpenAI's network, which improved-diffusion's, ADM's and some of LDM's files are for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it uses torch names of old
            from guided_diffusion.unet import UNetModel  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError("verify: needs OpenAI's code; pip install --no-deps guided-diffusion-sdk") from None
    levels = [level for level in range(len(c.widths)) if c.has_attention(level)]
    if isinstance(c.num_heads, tuple) or isinstance(c.head_dim, tuple):
        raise ValueError("verify: OpenAI's code has one number of heads for all levels")
    peer = UNetModel(
        image_size=c.image_size,
        in_channels=c.in_channels,
        model_channels=c.model_channels,
        out_channels=c.out_channels,
        num_res_blocks=c.num_res_blocks,
        attention_resolutions=[2**level for level in levels],
        channel_mult=c.channel_mult,
        conv_resample=c.downsample != "avgpool",
        dims=c.dims,
        num_classes=c.num_classes,
        num_heads=c.num_heads or 1,
        num_head_channels=c.head_dim or -1,
        use_scale_shift_norm=c.modulation == "scale_shift",
        resblock_updown=c.downsample == "resblock",
        use_new_attention_order=(order or published_order(c)) == "new",
    )
    peer.load_state_dict(state)
    return peer.eval()


def _diffusers(layout: str, c: UNetConfig, state: dict[str, Tensor], foreign: dict[str, Any] | None) -> nn.Module:
    """Diffusers' network, filled by its own code: its folders directly, LDM's files through its converter."""
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    if layout not in ("diffusers", "compvis"):
        raise ValueError(f"verify: no installed package runs files of the {layout} layout")
    config = foreign or to_diffusers(c)
    peer = getattr(diffusers, config["_class_name"]).from_config(config)
    if layout == "compvis":
        prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
        state = convert_ldm_unet_checkpoint(prefixed, {"class_embed_type": None} | dict(peer.config))
    peer.load_state_dict(state)
    return peer.eval()
