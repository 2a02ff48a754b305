"""Files of ADM, improved-diffusion and latent diffusion's networks without text: the same numbers, the same tensors.

The oracle is OpenAI's own network at small width with random non-zero weights.
"""

import pytest
import torch
import torch.nn.functional as F
from guided_diffusion.nn import GroupNorm32
from guided_diffusion.unet import SuperResModel, UNetModel
from safetensors.torch import save_file

from support.adm import CASES, SMALL
from support.checkpoints import assert_equal_gradients, assert_same_tensors
from support.networks import randomise, relative_error
from unet_denoiser import UNet
from unet_denoiser.convert.checkpoint import export_state_dict


@pytest.mark.parametrize("name", CASES)
def test_an_adm_file_gives_its_output_and_gradients_and_comes_back(name, tmp_path, monkeypatch):
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
    gradients = export_state_dict(gradients, model.config, "compvis", qkv_order=order)
    assert_equal_gradients(
        gradients | {"x": x.grad}, {key: p.grad for key, p in peer.named_parameters()} | {"x": same.grad}
    )

    assert_same_tensors(
        export_state_dict(model.state_dict(), model.config, "compvis", qkv_order=order), peer.state_dict()
    )
