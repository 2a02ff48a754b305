"""Helpers for tests of the convolutions: networks wide enough for Winograd's filtering, and gradients.

The reference is `plain_convolutions()` for networks, and torch's own layers for single convolutions.
"""

import torch
import torch.nn.functional as F
from torch import nn

from support.networks import SMALL, inputs, randomise
from unet_denoiser import ResBlock, UNet
from unet_denoiser.models.layers import rules
from unet_denoiser.models.layers.recompute import recompute_input
from unet_denoiser.models.layers.rules import plain_convolutions

# options of networks whose first level is large enough for Winograd's filtering, by the layers of the presets
WIDE = SMALL | {"model_channels": 64, "norm_groups": 32, "image_size": 32, "attention_resolutions": (16,)}
KINDS = {
    "conv_transpose": {},
    "ddpm": {"upsample": "nearest", "downsample": "conv_asymmetric", "dropout": 0.1},
    "adm": {"modulation": "scale_shift", "upsample": "resblock", "downsample": "resblock", "num_classes": 5},
    "sd": {"attention": "transformer", "context_dim": 6, "upsample": "nearest"},
}
SHALLOW = {"channel_mult": (1,), "attention_resolutions": ()}


def make_wide_unet(batch=1, size=(32, 32), **options):
    """Build a network, and arguments for it."""
    model = randomise(UNet(**WIDE | options))
    return model, inputs(model.config, batch, size)


def as_leaf(x):
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


def gradients(module, *args, **kwargs):
    """Return the output of a module, and the gradients of its parameters and inputs."""
    args, kwargs = [as_leaf(x) for x in args], {name: as_leaf(x) for name, x in kwargs.items()}
    module.zero_grad()
    torch.manual_seed(1)  # of the dropout
    out = module(*args, **kwargs)
    (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum().backward()
    named = dict(module.named_parameters()) | {f"input {i}": x for i, x in [*enumerate(args), *kwargs.items()]}
    return {"output": out.detach()} | {name: getattr(p, "grad", None) for name, p in named.items()}


def run_plain(function, *args, **kwargs):
    with plain_convolutions():
        return function(*args, **kwargs)


def assert_same(actual, expected, tolerance=1e-5):
    """Compare relative to the largest value of each tensor or, for those near zero (keys' biases), of all tensors."""
    assert actual.keys() == expected.keys()
    largest = max(e.abs().max() for e in expected.values() if e is not None)
    for name, e in expected.items():
        a = actual[name]
        assert (a is None) == (e is None), name
        if e is not None:
            assert (a.shape, a.dtype) == (e.shape, e.dtype), name
            assert (a - e).abs().max() <= tolerance * (e.abs().max() + largest / 30), name


SMALLEST = {"_MIN_RECOMPUTE_NUMEL": 0, "_MIN_RECOMPUTE_CHANNELS": 0, "_MIN_TRAINED_PIXELS": 0}
DEFAULTS = {name: getattr(rules, name) for name in (*SMALLEST, "_MAX_TIME_RATIO")}


def take_each_way(monkeypatch):
    """Compute in a small network as in a large one, and as on a processor with AVX2, whatever this one has."""
    monkeypatch.setattr(rules, "_WINOGRAD_COSTS", (24, 60, 220))
    for name, value in SMALLEST.items():
        monkeypatch.setattr(rules, name, value)


def count_recomputed_steps(out):
    """Count the steps of `recompute_input` in the autograd graph."""
    seen, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return sum(node.name() == "_RecomputeInputBackward" for node in seen)


def make_block(in_ch=4, out_ch=6, size=(8, 6), dtype=torch.float64, batch=2, dropout=0.0, **options):
    block = randomise(ResBlock(in_ch, out_ch, 8, dropout, dims=len(size), **{"norm_groups": 2} | options)).to(dtype)
    x, emb = torch.randn(batch, in_ch, *size, dtype=dtype), torch.randn(batch, 8, dtype=dtype)
    return block, x.requires_grad_(), emb.requires_grad_()


class AfterSiLU(nn.Module):
    """A convolution after an activation, whose input is recomputed with `again`."""

    def __init__(self, convolution, again=False):
        super().__init__()
        self.conv, self.again = convolution, again

    def forward(self, x):
        return recompute_input(F.silu, self.conv, x) if self.again else self.conv(F.silu(x))


class Twice(nn.Module):
    """A block that is called twice, and whose first result is used twice."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, emb):
        h = self.block(x, emb)
        return self.block(h, emb) + h
