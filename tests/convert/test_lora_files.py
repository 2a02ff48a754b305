"""LoRA files: every name that tools give, and other methods named as what they are."""

import json

import pytest
import torch
from safetensors.torch import save_file

from support.networks import small
from unet_denoiser import merge_lora

DOWN, UP = torch.randn(2, 16), torch.randn(16, 2)
LAYER, KOHYA = "down_blocks.1.attentions.0.to_q", "down_blocks_1_attentions_0"
NAMES = [
    f"{LAYER}.lora_A.weight {LAYER}.lora_B.weight",
    f"unet.{LAYER}.lora_A.default.weight unet.{LAYER}.lora_B.default.weight",
    f"base_model.model.{LAYER}.lora_A.weight base_model.model.{LAYER}.lora_B.weight",
    f"_orig_mod.{LAYER}.lora_A.weight _orig_mod.{LAYER}.lora_B.weight",
    f"module.unet._orig_mod.{LAYER}.lora_down.weight module.unet._orig_mod.{LAYER}.lora_up.weight",
    f"unet.{LAYER}.lora.down.weight unet.{LAYER}.lora.up.weight",
    f"unet.{LAYER}_lora.down.weight unet.{LAYER}_lora.up.weight",
    f"unet.{LAYER}.lora_linear_layer.down.weight unet.{LAYER}.lora_linear_layer.up.weight",
    f"unet.{LAYER}.lora_layer.down.weight unet.{LAYER}.lora_layer.up.weight",
    "unet.down_blocks.1.attentions.0.processor.to_q_lora.down.weight "
    "unet.down_blocks.1.attentions.0.processor.to_q_lora.up.weight",
    f"lora_unet_{KOHYA}_to_q.lora_down.weight lora_unet_{KOHYA}_to_q.lora_up.weight",
    f"lora_unet__orig_mod_{KOHYA}_to_q.lora_down.weight lora_unet__orig_mod_{KOHYA}_to_q.lora_up.weight",
    f"lycoris_{KOHYA}_to_q.lora_down.weight lycoris_{KOHYA}_to_q.lora_up.weight",
    # diffusers' names before 0.14
    "unet.down_blocks.1.attentions.0.query.lora_A.weight unet.down_blocks.1.attentions.0.query.lora_B.weight",
    f"lora_unet_{KOHYA}_query.lora_down.weight lora_unet_{KOHYA}_query.lora_up.weight",
    "encoder.2.1.attn.to_q.lora_A.weight encoder.2.1.attn.to_q.lora_B.weight",
]


@pytest.fixture
def model():
    return small()


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.filterwarnings("ignore:.*no adapter_config.json tells alpha")
def test_a_layer_is_found_by_any_tools_name(names, model):
    before = model.encoder[2][1].attn.to_q.weight.clone()
    assert merge_lora(model, dict(zip(names.split(), (DOWN, UP), strict=True))) == 1
    torch.testing.assert_close(model.encoder[2][1].attn.to_q.weight, before + UP @ DOWN)


@pytest.mark.parametrize("name", ["to_out.0", "to_out", "proj_attn", "processor.to_out_lora"])
def test_the_output_projection_is_found_by_old_names(name, model):
    stem = f"unet.mid_block.attentions.0.{name}"
    ends = ("down", "up") if "lora" in name else ("lora_down", "lora_up")
    assert merge_lora(model, {f"{stem}.{end}.weight": t for end, t in zip(ends, (DOWN, UP), strict=True)}) == 1


OTHERS = """lora_te_ lora_te1_ lora_te2_ te1. te. clip_l. clip_g. text_encoder.
text_encoder_2. t5xxl. text_model. bundle_emb.
lora_vae_ base_model.model.text_model. conditioner."""


@pytest.mark.parametrize("prefix", OTHERS.split())
def test_parts_of_other_networks_are_counted_and_left_alone(prefix, model):
    others = {f"{prefix}x.{end}": torch.zeros(2) for end in ("lora_down.weight", "hada_w1_a", "alpha")}
    lora = {f"{LAYER}.lora_A.weight": DOWN, f"{LAYER}.lora_B.weight": UP}
    with pytest.warns(UserWarning, match="the LoRA: 3 tensors of text encoders .* are left alone") as seen:
        assert merge_lora(model, lora | others) == 1
    assert seen[0].filename == __file__
    with pytest.raises(ValueError, match="nothing for a U-Net"):
        merge_lora(model, others)


METHODS = {
    "hada_w1_a": "a LoHa",
    "hada_t1": "a LoHa",
    "lokr_w2": "a LoKr",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector.weight": "a DoRA",
    "lora_mid.weight": "a LoCon in Tucker's form",
    "diff": "a full difference of weights",
    "diff_b": "a full difference of weights",
    "w_norm": "trained norms",
    "oft_blocks": "an OFT",
    "boft_R": "a BOFT",
    "on_input": r"an \(IA\)\^3",
    "a1.weight": "a GLoRA",
    "lora_E": "an AdaLoRA",
    "lora_B.bias": "a LoRA with a bias",
    "lora_embedding_A": "a LoRA of an embedding",
}


@pytest.mark.parametrize("ending", METHODS)
@pytest.mark.parametrize("prefix", [f"lora_unet_{KOHYA}_to_q", f"base_model.model.{LAYER}"])
def test_another_method_is_named(prefix, ending, model):
    lora = {f"{prefix}.lora_down.weight": DOWN, f"{prefix}.lora_up.weight": UP, f"{prefix}.{ending}": torch.zeros(2)}
    with pytest.raises(ValueError, match=rf"is {METHODS[ending]} \({prefix}.{ending}\); only LoRA and LoCon can"):
        merge_lora(model, lora)


CONFIGS = [
    (
        {"init_lora_weights": "pissa_niter_16"},
        "init_lora_weights='pissa_niter_16' changed .*path_initial_model",
    ),
    ({"init_lora_weights": "corda"}, "init_lora_weights='corda' changed .*path_initial_model"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga' changed .*path_initial_model"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' changed the base.*only peft can use it"),
    ({"init_lora_weights": "unheard_of"}, "init_lora_weights='unheard_of'"),
    ({"peft_type": "LOHA"}, "peft_type='LOHA' is another method"),
    ({"peft_type": "ADALORA"}, "peft_type='ADALORA' is another method"),
    ({"use_dora": True}, "use_dora=True, a DoRA is more than a LoRA"),
    ({"lora_bias": True}, "lora_bias=True is more than a LoRA"),
    ({"bias": "lora_only"}, "bias='lora_only' is more than a LoRA"),
    ({"modules_to_save": ["conv_in"]}, r"modules_to_save=\['conv_in'\] is more than a LoRA"),
    ({"target_parameters": ["x"]}, "target_parameters"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"use_qalora": True}, "use_qalora"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"kasa_config": {"a": 1}}, "kasa_config"),
    ({"use_something_new": True}, "use_something_new=True is more than a LoRA"),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS, ids=[str(config) for config, _ in CONFIGS])
@pytest.mark.parametrize("place", ["beside", "header"])
def test_a_configuration_of_more_than_a_lora_is_refused_by_its_field(place, config, message, model, tmp_path):
    config = {"lora_alpha": 4, "r": 2, "use_dora": False, "modules_to_save": None} | config
    stem = f"base_model.model.{LAYER}" if place == "beside" else f"unet.{LAYER}"
    prefixed = {f"unet.{name}": value for name, value in config.items()}
    header = {"lora_adapter_metadata": json.dumps(prefixed)} if place == "header" else None
    save_file({f"{stem}.lora_A.weight": DOWN, f"{stem}.lora_B.weight": UP}, tmp_path / "x.safetensors", header)
    if place == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        merge_lora(model, tmp_path / "x.safetensors")


def test_a_peft_file_without_its_configuration_says_which_alpha_is_taken(model, tmp_path):
    stem = f"base_model.model.{LAYER}"
    save_file({f"{stem}.lora_A.weight": DOWN, f"{stem}.lora_B.weight": UP}, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match="no adapter_config.json tells alpha; it is taken to be the rank"):
        merge_lora(model, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.float8_e4m3fn]
)
def test_an_alpha_of_any_dtype_is_read(dtype, model):
    before = model.encoder[2][1].attn.to_q.weight.clone()
    alpha = {f"{LAYER}.alpha": torch.tensor(4.0).to(dtype)}
    merge_lora(model, {f"{LAYER}.lora_down.weight": DOWN, f"{LAYER}.lora_up.weight": UP} | alpha)
    torch.testing.assert_close(model.encoder[2][1].attn.to_q.weight, before + 2 * UP @ DOWN)
