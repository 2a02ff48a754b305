"""LoRA: files of diffusers and kohya merged with diffusers' own result, and peft on our names."""

import diffusers
import peft
import pytest
import torch
from torch.testing import assert_close

from helpers import randomise, relative_error, small
from unet_denoiser import UNet
from unet_denoiser.convert.lora import merge_lora

pytestmark = pytest.mark.filterwarnings("ignore:norm_groups:UserWarning")
SHAPE = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1"]


@pytest.fixture
def peer_and_ours(tmp_path):
    torch.manual_seed(0)
    peer = randomise(diffusers.UNet2DConditionModel(**SHAPE)).eval()
    peer.save_pretrained(tmp_path / "unet")
    return peer, UNet.from_pretrained(tmp_path / "unet")


def adapted(peer):
    """Give diffusers' network a LoRA of random values by peft, and its file's tensors."""
    peer.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    for name, p in peer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    return {f"unet.{name}": p.detach() for name, p in peft.get_peft_model_state_dict(peer).items()}


def outputs(peer, ours):
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 24)
    with torch.no_grad():
        return ours(x, t, context), peer(x, t, context).sample


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_merged_equals_diffusers(peer_and_ours, layout):
    peer, ours = peer_and_ours
    before = {name: p.clone() for name, p in ours.state_dict().items()}
    tensors = adapted(peer)
    if layout == "kohya":
        renamed = {}
        for name, p in tensors.items():
            module, kind = name.removeprefix("unet.").split(".lora_")
            stem = "lora_unet_" + module.replace(".", "_")
            renamed[f"{stem}.lora_{'down' if kind.startswith('A') else 'up'}.weight"] = p
            renamed[f"{stem}.alpha"] = torch.tensor(2.0)  # half of the rank: twice the up matrix makes up for it
        tensors = {name: 2 * p if "lora_up" in name else p for name, p in renamed.items()}
    plain = outputs(peer, ours)
    assert relative_error(*plain) > 1e-2
    assert merge_lora(ours, {**tensors, "text_encoder.x": torch.zeros(1)}) == len(
        [n for n in tensors if "lora_A" in n or "lora_down" in n]
    )
    assert relative_error(*outputs(peer, ours)) < 5e-6
    merge_lora(ours, tensors, scale=-1.0)
    for name, p in ours.state_dict().items():
        assert_close(p, before[name], rtol=1e-4, atol=1e-5)


def test_the_ldm_layouts_names_mean_the_same_weights(peer_and_ours):
    """kohya's SDXL files name modules as the LDM layout does: the same update, by either name, is the same weight."""
    _, ours = peer_and_ours
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    block = "transformer_blocks_0_attn1_to_q"
    changed = []
    for module in ("down_blocks_0_attentions_0", "input_blocks_1_1"):
        model = UNet(**{name: getattr(ours.config, name) for name in ours.config.to_dict()})
        model.load_state_dict(ours.state_dict())
        stem = f"lora_unet_{module}_{block}"
        assert merge_lora(model, {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}) == 1
        changed.append(model.state_dict())
    assert all(torch.equal(p, changed[1][name]) for name, p in changed[0].items())
    name = "encoder.0.1.transformer_blocks.0.attn1.to_q.weight"
    assert_close(changed[0][name] - ours.state_dict()[name], up @ down, rtol=1e-4, atol=1e-5)


def test_refuses_what_does_not_fit(peer_and_ours):
    _, ours = peer_and_ours
    a, b = torch.zeros(2, 32), torch.zeros(32, 2)
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    with pytest.raises(ValueError, match=r"to_nowhere.*fits no weight"):
        merge_lora(ours, {f"{key}.to_nowhere.lora_A.weight": a, f"{key}.to_nowhere.lora_B.weight": b})
    with pytest.raises(ValueError, match=r"fits no weight"):
        merge_lora(ours, {f"{key}.to_q.lora_A.weight": a})
    with pytest.raises(ValueError, match=r"makes \(32, 31\)"):
        merge_lora(ours, {f"{key}.to_q.lora_A.weight": a[:, 1:], f"{key}.to_q.lora_B.weight": b})
    with pytest.raises(ValueError, match=r"hada_w1, which is not understood"):
        merge_lora(ours, {"lora_unet_x.hada_w1": a})


def test_peft_trains_our_network():
    """peft finds our layers by name; only the adapter learns, and merging it keeps the output."""
    model = small(attention="transformer", context_dim=6)
    x, t, context = torch.randn(2, 3, 8, 8), torch.tensor([5, 9]), torch.randn(2, 3, 6)
    plain = model(x, t, context).detach()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out", "conv1"]))
    assert_close(wrapped(x, t, context), plain)
    wrapped(x, t, context).square().mean().backward()
    learning = {name for name, p in wrapped.named_parameters() if p.grad is not None}
    assert learning
    assert all("lora_" in name for name in learning)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    changed = wrapped(x, t, context).detach()
    assert relative_error(changed, plain) > 1e-2
    assert relative_error(wrapped.merge_and_unload()(x, t, context), changed) < 1e-5
