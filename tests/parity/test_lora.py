"""LoRA: files of diffusers and kohya merged with diffusers' own result, and peft on our names."""

import json

import diffusers
import peft
import pytest
import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from safetensors.torch import save_file
from torch.testing import assert_close

from support.networks import randomise, relative_error, small
from unet_denoiser import UNet
from unet_denoiser.convert.checkpoint import export_checkpoint, export_state_dict
from unet_denoiser.convert.lora import merge_lora

SD1 = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "norm_num_groups": 4,
}
SDXL = SD1 | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": [1, 2],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}


def pair(options, tmp_path):
    """diffusers' network and ours, with the same random weights."""
    peer = randomise(diffusers.UNet2DConditionModel(**options)).eval()
    peer.save_pretrained(tmp_path / "unet")
    return peer, UNet.from_pretrained(tmp_path / "unet")


@pytest.fixture
def ours(tmp_path):
    return pair(SD1, tmp_path)[1]


def lora_for(weights, naming, alpha):
    """Random updates of other ranks for matrices and convolutions, for every weight by its name in a layout."""
    tensors = {}
    for name, weight in weights.items():
        if weight.ndim < 2 or name.startswith(("time_embed", "add_embedding")):
            continue
        rank, module = weight.ndim, name.removesuffix(".weight")
        down = torch.randn(rank, *weight.shape[1:]) / weight[0].numel() ** 0.5
        up = 0.3 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2))
        if naming == "diffusers":
            tensors |= {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}
            continue
        stem = "lora_unet_" + module.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def outputs(peer, ours):
    x, t, context = torch.randn(2, 4, 10, 10), torch.tensor([3, 700]), torch.randn(2, 5, 24)
    added, vector = None, None
    if ours.config.vector_dim:
        text, ids = torch.randn(2, 1280), torch.randint(0, 999, (2, 6)).float()
        added = {"text_embeds": text, "time_ids": ids}
        vector = torch.cat([text, peer.add_time_proj(ids.flatten()).reshape(2, -1)], dim=1)
    with torch.no_grad():
        return ours(x, t, context, vector=vector), peer(x, t, context, added_cond_kwargs=added).sample


@pytest.mark.parametrize("options", [SD1, SDXL], ids=["sd-1", "sdxl"])
@pytest.mark.parametrize(
    ("naming", "alpha"), [("diffusers", None), ("kohya", None), ("kohya", 1.0), ("kohya-ldm", None), ("kohya-ldm", 1.0)]
)
def test_a_merged_lora_equals_diffusers_own_merge(options, naming, alpha, tmp_path):
    """diffusers reads the same names with its own code and fuses the updates."""
    peer, ours = pair(options, tmp_path)
    before = {name: p.clone() for name, p in ours.state_dict().items()}
    layout = "compvis" if naming == "kohya-ldm" else "diffusers"
    tensors = lora_for(export_state_dict(before, ours.config, layout), naming, alpha)
    state, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(tensors), unet_config=peer.config)
    peer.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    peer.fuse_lora()
    with pytest.warns(UserWarning, match=r"1 tensors of text encoders .* \(text_encoder.x, ...\) are left alone"):
        count = merge_lora(ours, {**tensors, "text_encoder.x": torch.zeros(1)})
    assert count == sum("lora_A" in name or "lora_down" in name for name in tensors)
    out, expected = outputs(peer, ours)
    assert relative_error(out, expected) < 2e-6
    merge_lora(ours, tensors, scale=-1.0)
    for name, p in ours.state_dict().items():
        assert_close(p, before[name], rtol=0, atol=1e-6)


def test_names_of_the_ldm_layout_change_the_same_weights(ours):
    """kohya's SDXL files name modules as the LDM layout does: the same update, by either name, is the same weight."""
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


def test_an_update_that_fits_no_weight_is_refused(ours):
    a, b = torch.zeros(2, 32), torch.zeros(32, 2)
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    with pytest.raises(ValueError, match=r"to_nowhere.*fits no weight"):
        merge_lora(ours, {f"{key}.to_nowhere.lora_A.weight": a, f"{key}.to_nowhere.lora_B.weight": b})
    with pytest.raises(ValueError, match=r"fits no weight"):
        merge_lora(ours, {f"{key}.to_q.lora_A.weight": a})
    with pytest.raises(ValueError, match=r"is \(2, 31\).*must be \(rank, 32\)"):
        merge_lora(ours, {f"{key}.to_q.lora_A.weight": a[:, 1:], f"{key}.to_q.lora_B.weight": b})
    with pytest.raises(ValueError, match=r"is a LoHa \(lora_unet_x.hada_w1\); only LoRA and LoCon can be merged"):
        merge_lora(ours, {"lora_unet_x.hada_w1": a})


def test_peft_trains_only_the_adapter_and_merges_it():
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


def test_alpha_is_read_from_the_header_that_diffusers_writes(tmp_path):
    torch.manual_seed(0)
    kind = diffusers.UNet2DConditionModel
    peer = randomise(kind(**SD1)).eval()
    peer.save_pretrained(tmp_path / "unet")
    peer.add_adapter(peft.LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "conv1"], alpha_pattern={"conv1": 6}))
    for name, parameter in peer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peer.save_lora_adapter(tmp_path)
    ours = UNet.from_pretrained(tmp_path / "unet")
    merge_lora(ours, tmp_path / "pytorch_lora_weights.safetensors")
    assert relative_error(*outputs(peer, ours)) < 2e-6


def test_alpha_is_read_from_the_config_that_peft_writes(tmp_path):
    peer = randomise(diffusers.UNet2DConditionModel(**SD1)).eval()
    peer.save_pretrained(tmp_path / "unet")
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "conv1"], use_rslora=True)
    wrapped = peft.get_peft_model(peer, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path / "unet")
    merge_lora(ours, tmp_path / "adapter_model.safetensors")
    assert relative_error(*outputs(wrapped, ours)) < 2e-6


TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
FEED = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
LORAS = {
    "one weight is unknown": {f"{TO_Q}.to_q": (32, 32), "unet.nonsense": (2, 2)},
    "as many numbers, another shape": {f"{TO_Q}.to_q": (32, 32), FEED: (128, 32)},
}


@pytest.mark.parametrize("name", LORAS)
def test_a_refused_lora_changes_nothing(name, tmp_path):
    randomise(diffusers.UNet2DConditionModel(**SD1)).save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path)
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    lora = {f"{key}.lora_A.weight": torch.ones(2, shape[1]) for key, shape in LORAS[name].items()}
    lora |= {f"{key}.lora_B.weight": torch.ones(shape[0], 2) for key, shape in LORAS[name].items()}
    with pytest.raises(ValueError, match="the LoRA"):
        merge_lora(ours, lora)
    assert all(torch.equal(tensor, before[key]) for key, tensor in ours.state_dict().items())


def test_loras_of_the_time_embedding_and_with_old_names_are_merged(tmp_path):
    torch.manual_seed(0)
    peer = randomise(diffusers.UNet2DConditionModel(**SD1)).eval()
    peer.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path)
    lora = {}
    for module in ("time_embedding.linear_1", "time_embedding.linear_2"):
        out, inputs = peer.get_submodule(module).weight.shape
        name = f"lora_unet_{module.replace('.', '_')}"
        lora[f"{name}.lora_down.weight"], lora[f"{name}.lora_up.weight"] = torch.randn(2, inputs), torch.randn(out, 2)
        peer.get_submodule(module).weight.data += lora[f"{name}.lora_up.weight"] @ lora[f"{name}.lora_down.weight"]
    old = f"{TO_Q}.processor.to_out_lora"
    lora[f"{old}.down.weight"], lora[f"{old}.up.weight"] = torch.randn(2, 32), torch.randn(32, 2)
    weight = peer.get_submodule(f"{TO_Q.removeprefix('unet.')}.to_out.0").weight
    weight.data += lora[f"{old}.up.weight"] @ lora[f"{old}.down.weight"]
    assert merge_lora(ours, lora) == 3
    assert relative_error(*outputs(peer, ours)) < 2e-6


NOT_FINITE, NOT_FLOAT = "values that are not finite", "must be floating point"
DAMAGES = {
    "a number": (lambda t: t.sum(), r"is \(\)"),
    "a vector": (lambda t: t.flatten(), "they must be"),
    "empty": (lambda t: t[:0], "they must be"),
    "transposed": (lambda t: t.transpose(0, 1).contiguous(), "they must be"),
    "cut": (lambda t: t[:-1], "they must be"),
    "another axis in front": (lambda t: t[None], "they must be"),
    "an axis elsewhere": (lambda t: t.flatten()[None] if t.ndim == 2 else t.permute(0, 2, 3, 1), "they must be"),
    "integers": (lambda t: t.int(), NOT_FLOAT),
    "complex": (lambda t: t * 1j, NOT_FLOAT),
    "one not a number": (lambda t: t.where(t != t.max(), torch.nan), NOT_FINITE),
    "infinite": (lambda t: t / 0, NOT_FINITE),
    "too large": (lambda t: t * 1e38, "overflow in torch.float32"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_a_damaged_tensor_is_named_and_nothing_merged(naming, name, ours):
    before = {key: p.clone() for key, p in ours.state_dict().items()}
    lora = lora_for(export_state_dict(before, ours.config, "diffusers"), naming, 4.0)
    damage, message = DAMAGES[name]
    for key in [
        key for key in lora if key.endswith("weight") and ("mid_block" in key and ("to_q" in key or "conv1" in key))
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            merge_lora(ours, lora | {key: damage(lora[key])}, 1e6 if name == "too large" else 1.0)
        if name != "too large":
            assert key in str(caught.value)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(p, before[key]) for key, p in ours.state_dict().items())


@pytest.mark.parametrize("alpha", [torch.zeros(2), torch.tensor(torch.nan), torch.tensor(1j), torch.zeros(0)])
def test_an_alpha_that_is_not_one_finite_number_is_refused(alpha, ours):
    lora = {f"{TO_Q}.to_q.lora_down.weight": torch.ones(2, 32), f"{TO_Q}.to_q.lora_up.weight": torch.ones(32, 2)}
    with pytest.raises(ValueError, match=r"to_q\.alpha must be one finite number, and is "):
        merge_lora(ours, lora | {f"{TO_Q}.to_q.alpha": alpha})


HEADERS = {
    "{": "is not valid JSON",
    "[" * 10_000: "is not valid JSON",
    "null": "is a JSON NoneType, not an object",
    '{"unet.alpha_pattern": [1]}': r"alpha_pattern=\[1\] must be an object",
    '{"unet.alpha_pattern": {"(": 3}}': r"alpha_pattern has '\(', no regular expression",
    '{"unet.alpha_pattern": {"to_q": "3"}}': r"alpha_pattern\['to_q'\]='3' must be a number",
    '{"unet.lora_alpha": "16"}': "lora_alpha='16' must be a number",
    '{"unet.lora_alpha": null}': "lora_alpha=None must be a number",
    '{"unet.lora_alpha": NaN}': "lora_alpha=nan must be a number",
    '{"unet.lora_alpha": 1%s}' % ("0" * 400): "lora_alpha=1000+.* must be a number",
    '{"unet.use_rslora": "no"}': "use_rslora='no' must be true or false",
}


@pytest.mark.parametrize("header", HEADERS, ids=HEADERS.values())
def test_a_malformed_header_is_named(header, ours, tmp_path):
    lora = {f"{TO_Q}.to_q.lora_A.weight": torch.ones(2, 32), f"{TO_Q}.to_q.lora_B.weight": torch.ones(32, 2)}
    save_file(lora, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": header})
    with pytest.raises(ValueError, match=HEADERS[header]) as caught:
        merge_lora(ours, tmp_path / "lora.safetensors")
    assert str(caught.value).startswith(f"{tmp_path / 'lora.safetensors'}: lora_adapter_metadata in its header")
    assert len(str(caught.value)) < len(str(tmp_path)) + 250


@pytest.mark.parametrize("rank_stabilised", [True, False])
def test_an_update_is_scaled_by_alpha_and_rank(rank_stabilised, ours, tmp_path):
    """alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)."""
    lora = {f"{TO_Q}.to_q.lora_A.weight": torch.ones(4, 32), f"{TO_Q}.to_q.lora_B.weight": torch.ones(32, 4)}
    header = {"unet.lora_alpha": 16, "unet.use_rslora": rank_stabilised, "text_encoder.lora_alpha": "left alone"}
    save_file(lora, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": json.dumps(header)})
    weight = ours.get_parameter("encoder.0.1.transformer_blocks.0.attn1.to_q.weight")
    before = weight.detach().clone()
    merge_lora(ours, tmp_path / "lora.safetensors", 0.5)
    assert_close(weight - before, torch.full((32, 32), 0.5 * 4 * 16 / (2 if rank_stabilised else 4)), atol=1e-4, rtol=0)


def test_a_file_that_is_no_lora_is_refused(ours, tmp_path):
    down, up = torch.zeros(2, 32), torch.zeros(32, 2)
    for lora in ({}, {"text_encoder.x.lora_A.weight": down}):
        with pytest.raises(ValueError, match="nothing for a U-Net"):
            merge_lora(ours, lora)
    names = (f"{TO_Q}.to_q", TO_Q.removeprefix("unet.") + ".to_q")
    twice = {f"{name}.lora_{half}.weight": tensor for name in names for half, tensor in (("A", down), ("B", up))}
    old = {f"{TO_Q}.processor.to_q_lora.down.weight": down, f"{TO_Q}.to_q.lora.down.weight": down}
    for lora in (twice, old):
        with pytest.raises(ValueError, match="another update for the same weight"):
            merge_lora(ours, lora)
    with pytest.raises(FileNotFoundError, match="is no file"):
        merge_lora(ours, tmp_path)
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"scale={scale} must be a finite number"):
            merge_lora(ours, twice, scale)


def train_with_peft(peer, folder, **options):
    """Save an adapter of random updates, as peft does; the network with it."""
    wrapped = peft.get_peft_model(peer, peft.LoraConfig(r=4, target_modules=["to_q"], **options))
    wrapped.save_pretrained(folder / "init")
    generator = torch.Generator().manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changed_the_base_is_refused_until_peft_converts_it(kind, tmp_path):
    peer, ours = pair(SD1, tmp_path)
    wrapped = train_with_peft(peer, tmp_path, init_lora_weights=kind)
    before = {name: p.clone() for name, p in ours.state_dict().items()}
    with pytest.raises(ValueError, match=rf"init_lora_weights='{kind}' changed .*path_initial_model_for_weight_conv"):
        merge_lora(ours, tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(p, before[name]) for name, p in ours.state_dict().items())
    wrapped.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    merge_lora(ours, tmp_path / "lora" / "adapter_model.safetensors")
    assert relative_error(*outputs(wrapped, ours)) < 1e-5


HARMLESS = [
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn1.to_q": 6}, "use_rslora": True},
    {"layers_to_transform": [0], "layers_pattern": "transformer_blocks", "lora_dropout": 0.5},
]


@pytest.mark.parametrize("options", HARMLESS, ids=str)
def test_an_adapter_whose_options_change_no_base_weight_is_merged(options, tmp_path):
    peer, ours = pair(SD1, tmp_path)
    wrapped = train_with_peft(peer, tmp_path, **options).eval()
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "renamed.safetensors")
    merge_lora(ours, tmp_path / "renamed.safetensors")
    assert relative_error(*outputs(wrapped, ours)) < 2e-6


ODD = [{"flip_sin_to_cos": False}, {"freq_shift": 1}, {"flip_sin_to_cos": False, "freq_shift": 1}]
LCM = {"time_cond_proj_dim": 12}


@pytest.mark.parametrize(
    "naming", ["unet.{}.lora_{}.weight", "lora_unet_{_}.lora_{}.weight", "base_model.model.{}.lora_{}.weight"]
)
@pytest.mark.parametrize("options", ODD, ids=str)
def test_a_lora_of_the_time_embedding_has_the_order_of_its_checkpoint(options, naming, tmp_path):
    """Also after the network was saved in our own format, and written back."""
    peer, _ = pair(SD1 | LCM | options, tmp_path)
    UNet.from_pretrained(tmp_path / "unet").save_pretrained(tmp_path / "own")
    ours = UNet.from_pretrained(tmp_path / "own")
    lora = {}
    for layer in ("time_embedding.linear_1", "time_embedding.cond_proj"):
        weight = peer.get_submodule(layer).weight
        down, up = torch.randn(2, weight.shape[1]) / 8, torch.randn(len(weight), 2)
        weight.data += up @ down
        for half, tensor in (("A", down), ("B", up)):
            lora[naming.replace("{_}", layer.replace(".", "_")).format(*[layer] * ("{_}" not in naming), half)] = tensor
    if "_}" in naming:
        lora = {name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for name, t in lora.items()}
    assert merge_lora(ours, lora) == 2
    x, t, context, cond = torch.randn(2, 4, 10, 10), torch.tensor([3, 700]), torch.randn(2, 5, 24), torch.randn(2, 12)
    with torch.no_grad():
        expected = peer(x, t, context, timestep_cond=cond).sample
        assert relative_error(ours(x, t, context, time_cond=cond), expected) < 2e-6
        export_checkpoint(ours.state_dict(), ours.config, tmp_path / "back", "diffusers")
        back = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "back")
        assert torch.equal(back(x, t, context, timestep_cond=cond).sample, expected)
    assert back.config.flip_sin_to_cos == options.get("flip_sin_to_cos", True)


def test_a_lora_of_our_own_names_has_our_order():
    model = small(attention="transformer", context_dim=6, time_frequencies="half")
    before = model.time_mlp[1].weight.clone()
    down, up = torch.randn(2, 8), torch.randn(32, 2)
    merge_lora(model, {"time_mlp.1.lora_A.weight": down, "time_mlp.1.lora_B.weight": up})
    assert_close(model.time_mlp[1].weight, before + up @ down)
