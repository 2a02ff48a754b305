"""merge_lora: which object it changes, and what it refuses to change."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from support.networks import small
from unet_denoiser import DiffusersUNet, merge_lora
from unet_denoiser.convert.checkpoint import export_state_dict
from unet_denoiser.training.ema import EMA

NAME = "mid_block.attentions.0.to_q"
LORA = {f"unet.{NAME}.lora_A.weight": torch.ones(2, 16), f"unet.{NAME}.lora_B.weight": torch.ones(16, 2)}


@pytest.fixture
def model():
    return small(upsample="nearest", time_frequencies="half")


class Lightning(nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet


WRAPPERS = {
    "adapter": DiffusersUNet,
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled in an adapter": lambda model: DiffusersUNet(torch.compile(model)),
    "parallel and compiled": lambda model: torch.compile(nn.DataParallel(model)),
    "inside": Lightning,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_network_inside_a_wrapper_is_changed(wrapper, model):
    wrapped = WRAPPERS[wrapper](model)
    inner = next(m for m in wrapped.modules() if m.__class__.__name__ == "UNet")
    before = inner.bottleneck[1].attn.to_q.weight.clone()
    assert merge_lora(wrapped, LORA) == 1
    assert torch.equal(inner.bottleneck[1].attn.to_q.weight, before + 2)


def test_layers_that_are_compiled_or_have_an_adapter_are_found(model):
    import peft

    before = model.bottleneck[1].attn.to_q.weight.clone()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q"]), model)
    model.bottleneck[1] = torch.compile(model.bottleneck[1])
    assert merge_lora(model, LORA) == 1
    assert torch.equal(model.bottleneck[1].attn.to_q.base_layer.weight, before + 2)


def test_an_object_that_is_no_network_is_named(model):
    with pytest.raises(TypeError, match="model is a EMA; merge_lora needs a UNet of this library"):
        merge_lora(EMA(model, 0.9), LORA)
    with pytest.raises(TypeError, match=r"model is a SimpleNamespace; .* for example its \.unet"):
        merge_lora(SimpleNamespace(unet=model), LORA)
    with pytest.raises(TypeError, match="model is a Linear; merge_lora needs a UNet"):
        merge_lora(nn.Linear(2, 2), LORA)
    with pytest.raises(TypeError, match="model is a ModuleList with 2 U-Nets; give the one to change"):
        merge_lora(nn.ModuleList([model, small()]), LORA)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_are_no_plain_numbers_are_refused(dtype, model):
    weight = model.bottleneck[1].attn.to_q.weight
    model.bottleneck[1].attn.to_q.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"bottleneck\.1\.attn\.to_q\.weight is a tensor of .*: merge the LoRA before"):
        merge_lora(model, LORA)


def test_a_packed_projection_is_refused_since_its_order_is_not_kept(model):
    adm = export_state_dict(model.state_dict(), model.config, "compvis")
    for name in (name for name in adm if name.endswith(".qkv.weight")):
        stem = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        out, inputs = adm[name].shape[:2]
        lora = {f"{stem}.lora_down.weight": torch.ones(2, inputs), f"{stem}.lora_up.weight": torch.ones(out, 2)}
        with pytest.raises(ValueError, match=r"for query, key and value in one; .* give a LoRA of to_q, to_k and to_v"):
            merge_lora(model, lora)
