"""The network of a file is found by its own tensors, in any nest, below any prefix, beside anything."""

import pytest
import torch

from unet_denoiser.convert.find_network import find_network

WHOLE = ("input_blocks.0.0.weight", "input_blocks.1.0.x.weight", "middle_block.0.weight", "out.2.weight")


def make(value, prefix="", names=WHOLE):
    """A network whose tensors all have one value, below a prefix."""
    return {prefix + name: torch.full((2,), float(value)) for name in names}


RAW, AVERAGES = make(1), make(2)
FLAT = {"model_ema." + f"diffusion_model.{name}".replace(".", ""): p for name, p in AVERAGES.items()}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "unet.", "net.", "model.unet.", "model.diffusion_model.")
NESTS = {
    "state_dict": lambda net: {"state_dict": net, "epoch": 3},
    "any name": lambda net: {"my_unet": net, "optimizer": OPTIMIZER},
    "deep": lambda net: {"a": {"b": [1, {"c": {"d": net}}]}},
    "list": lambda net: [net, OPTIMIZER, 3],
    "metric beside": lambda net: net | {"val_metric.total": torch.ones(1)},
    "control network beside": lambda net: net | make(3, "control_model.", WHOLE[:-1]),
    "autoencoder beside": lambda net: net | {"first_stage_model.decoder.conv_in.weight": torch.ones(1)},
    "moments beside": lambda net: {"model": net, "optim": {"exp_avg": make(3)}},
    "twice": lambda net: {"model": net, "the_same": net},
    "averages in a list": lambda net: [net, OPTIMIZER, 1, 2, AVERAGES],
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("nest", NESTS)
def test_one_network_is_found_anywhere(nest, prefix):
    if nest == "metric beside" and not prefix:
        pytest.skip("without a prefix nothing tells that it is no part")
    if nest == "autoencoder beside" and not prefix:
        pytest.skip("without a prefix nothing tells that it is no part")
    found = find_network(NESTS[nest](make(1, prefix)))
    assert sorted(found.tensors) == sorted(WHOLE)
    assert all((tensor == 1).all() for tensor in found.tensors.values())


def test_wrappers_inside_names_are_left_out():
    names = ("input_blocks.0._orig_mod.0.weight", "middle_block._checkpoint_wrapped_module.0.weight", "out.2.weight")
    assert set(find_network(make(1, names=names)).tensors) == {WHOLE[0], WHOLE[2], WHOLE[3]}


@pytest.mark.parametrize(
    "content",
    [
        {"model": RAW, "ema": AVERAGES},
        {"state_dict": RAW, "state_dict_ema": AVERAGES},
        {"params": RAW, "params_ema": AVERAGES},
        {"net": RAW, "ema_model": AVERAGES},
        {"model": RAW, "modelEma": AVERAGES},
        {"model": RAW, "ema": {"shadow": AVERAGES, "decay": 0.9}},
        {"model": RAW, "averaged_weights": AVERAGES},
        {"model": RAW, "swa": make(2, "module.")},
        [RAW, OPTIMIZER, 1, 2, AVERAGES],
        make(1, "model.") | make(2, "model_ema."),
        RAW | make(2, "ema."),
        make(1, "model.diffusion_model.") | FLAT | {"model_ema.decay": torch.ones(1)},
        make(1, "model.") | {name.replace("diffusion_model", ""): p for name, p in FLAT.items()},
    ],
)
def test_averages_are_taken_if_asked_for(content):
    for ema, value in ((False, 1), (True, 2)):
        found = find_network(content, ema=ema).tensors
        assert sorted(found) == sorted(WHOLE)
        assert all((tensor == value).all() for tensor in found.values())


@pytest.mark.parametrize("ema", [False, True])
def test_averages_alone_are_the_network(ema):
    assert find_network({"ema": AVERAGES}, ema=ema).tensors == AVERAGES


def test_several_networks_are_named_and_chosen_by_prefix():
    content = {"student": RAW, "teacher": make(3, "net.")}
    with pytest.raises(ValueError, match=r"several networks: 'student' and 'teacher.net'; choose with prefix="):
        find_network(content)
    assert (find_network(content, prefix="teacher.net").tensors[WHOLE[0]] == 3).all()
    with pytest.raises(ValueError, match="prefix='x': no network is there; networks in the file: 'student'"):
        find_network(content, prefix="x")
    with pytest.raises(ValueError, match="several networks"):
        find_network({"model": RAW, "ema_0.999": AVERAGES, "ema_0.9999": make(4)}, ema=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (RAW, "no averaged weights beside the others$"),
        ({"model": RAW, "ema": {"shadow_params": [torch.ones(1)]}}, "shadow_params is a list without names"),
    ],
)
def test_averages_that_are_not_there(content, message):
    with pytest.raises(ValueError, match=message):
        find_network(content, ema=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no tensors at all"),
        (3, "holds a int"),
        ({"vae": {"conv.weight": torch.ones(1)}}, r"it has vae\.conv\.weight"),
        ({"unet.a.lora_A.weight": torch.ones(1)}, "it is a LoRA, not a network"),
        ({"time_embedding.linear_1.qweight": torch.ones(1)}, "it holds weights of GPTQ or AWQ"),
        ({f"t{i}": torch.ones(1) for i in range(60_000)}, "60,000 tensors"),
        ({f"p{i}.{WHOLE[0]}": torch.ones(1) for i in range(60)}, "more than 50 networks"),
    ],
)
def test_what_is_there_instead_is_named(content, message):
    with pytest.raises(ValueError, match=message):
        find_network(content)


def test_marks_of_the_process_are_kept_apart():
    found = find_network(RAW | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)})
    assert sorted(found.tensors) == sorted(WHOLE)
    assert found.marks == {"v_pred", "ztsnr"}
    assert find_network(make(1, "model.diffusion_model.") | {"v_pred": torch.empty(0)}).marks == {"v_pred"}


def test_a_nest_that_repeats_itself_ends():
    content = []
    for _ in range(60):
        content = [content, content]
    assert find_network({"a": content, "model": RAW}).tensors == RAW
