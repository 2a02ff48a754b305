"""Helpers for tests of networks: random weights, small networks, and inputs that fit a configuration."""

import math

import torch
from torch import nn

from unet_denoiser import UNet


def randomise(module, seed=0):
    """Give every parameter a random value, zero-initialised ones too, that keeps activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in module.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)]
    gains = {id(m.weight) for m in norms}
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator).to(p.dtype)
            if id(p) in gains:
                p.copy_(1 + 0.3 * noise)
            elif p.ndim == 1:
                p.copy_(noise if "null" in name else 0.3 * noise)
            else:
                p.copy_(noise / math.sqrt(p[0].numel()))
    return module


SMALL = {
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "num_heads": 2,
    "context_dim": None,
    "image_size": 8,
    "norm_groups": 4,
    "dropout": 0.0,
}
CONDITIONS = {"num_classes": 5, "vector_dim": 3, "context_dim": 6}


ODD_AND_EVEN_SIZES = [(1,), (6,), (7,), (1, 1), (8, 6), (7, 4), (5, 9), (4, 3, 5)]


def half_size(size):
    """Halve a spatial size, rounding up."""
    return [(n + 1) // 2 for n in size]


def small(seed=0, **options):
    """Build a small network in evaluation mode, without conditions, with random weights."""
    return randomise(UNet(**SMALL | options), seed).eval()


def inputs(config, batch=2, size=None, seed=0, tokens=3):
    """Make the arguments of forward, all that the configuration has, as a dict."""
    g = torch.Generator().manual_seed(seed)
    size = size or (8, 6, 4)[: config.dims]
    args = {
        "x": torch.randn(batch, config.in_channels, *size, generator=g),
        "t": torch.randint(0, 1000, (batch,), generator=g),
    }
    if config.num_classes:
        args["class_labels"] = torch.randint(0, config.num_classes, (batch,), generator=g)
    if config.vector_dim:
        args["vector"] = torch.randn(batch, config.vector_dim, generator=g)
    if config.context_dim:
        args["context"] = torch.randn(batch, tokens, config.context_dim, generator=g)
    return args


def count_parameters(config):
    """Count the parameters of a network, which is built without storage."""
    with torch.device("meta"):
        return sum(p.numel() for p in UNet.from_config(config).parameters())


def relative_error(actual, expected):
    """Return the largest difference over the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def as_multihead(attn):
    """Build an nn.MultiheadAttention with the weights of a CrossAttention."""
    dim, width = attn.to_q.in_features, attn.to_k.in_features
    peer = nn.MultiheadAttention(dim, attn.num_heads, kdim=width, vdim=width, batch_first=True)
    projections = (attn.to_q, attn.to_k, attn.to_v)
    weights = [projection.weight for projection in projections]
    if width == dim:
        state = {"in_proj_weight": torch.cat(weights)}
    else:
        state = dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), weights, strict=True))
    state["in_proj_bias"] = torch.cat([projection.bias for projection in projections])
    state |= {f"out_proj.{name}": p for name, p in attn.to_out.state_dict().items()}
    peer.load_state_dict(state)
    return peer
