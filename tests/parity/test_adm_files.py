"""Files of ADM, improved-diffusion and latent diffusion's networks without text: the same numbers, the same tensors.

The oracle is OpenAI's own network at small width with random non-zero weights.
"""

import pytest
import torch
import torch.nn.functional as F
from guided_diffusion.nn import GroupNorm32
from guided_diffusion.unet import SuperResModel, UNetModel
from safetensors.torch import save_file
from test_checkpoints import assert_equal_gradients, assert_same_tensors

from helpers import randomise, relative_error
from unet_denoiser import UNet
from unet_denoiser.convert.checkpoint import write

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


@pytest.mark.parametrize("name", CASES)
def test_output_gradients_and_the_file_back(name, tmp_path, monkeypatch):
    """Output and all gradients of the network in a file, and the file's tensors again, bit for bit."""
    options, upsampler = SMALL | CASES[name], "-up-" in name
    # theirs are always 32; with one channel per group, the time embedding would have no effect
    groups = 32 if options["model_channels"] == 128 else 4
    monkeypatch.setattr("guided_diffusion.unet.normalization", lambda channels: GroupNorm32(groups, channels))
    peer = randomise((SuperResModel if upsampler else UNetModel)(**options)).eval()
    path = tmp_path / ("model.safetensors" if name.startswith("ldm") else "model.pt")
    if name.startswith("ldm"):
        save_file({f"model.diffusion_model.{key}": p for key, p in peer.state_dict().items()}, path)
    else:
        torch.save(peer.state_dict(), path)
    order = "new" if "use_new_attention_order" in options else "legacy"
    told = {"num_heads": options.get("num_heads"), "head_dim": options.get("num_head_channels"), "norm_groups": groups}
    model = UNet.from_pretrained(path, qkv_order=order, **told)

    t, x = torch.tensor([3, 950]), torch.randn(2, options["in_channels"], 16, 8, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    labels = torch.tensor([0, 6]) if model.config.num_classes else None
    if upsampler:
        low = torch.randn(2, 3, 8, 4)
        out = model(torch.cat([x, F.interpolate(low, (16, 8), mode="bilinear")], dim=1), t, class_labels=labels)
        expected = peer(same, t, low_res=low, y=labels)
    else:
        out, expected = model(x, t, class_labels=labels), peer(same, t, labels)
    assert relative_error(out, expected) < 2e-6
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    gradients = write(gradients, model.config, "compvis", qkv_order=order)
    assert_equal_gradients(
        gradients | {"x": x.grad}, {key: p.grad for key, p in peer.named_parameters()} | {"x": same.grad}
    )

    assert_same_tensors(write(model.state_dict(), model.config, "compvis", qkv_order=order), peer.state_dict())
