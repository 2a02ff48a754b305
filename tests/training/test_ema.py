"""Averaged weights: equal to torch's, swapped in, and always swapped out again."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

from unet_denoiser import EMA


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def step(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))


def test_equals_torchs_average():
    model = net()
    ema, peer = EMA(model, decay=0.15), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.15))
    peer.update_parameters(model)  # its first update copies
    for _ in range(5):  # with such a short memory the warm-up, (1 + n) / (10 + n) > 0.18, is over from the start
        step(model)
        ema.update()
        peer.update_parameters(model)
    for average, expected in zip(ema.state_dict()["averages"].values(), peer.module.parameters(), strict=True):
        assert_close(average, expected.data)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: nn.DataParallel(torch.compile(model))])
def test_wrappers_do_not_change_names(wrap):
    model = net()
    plain, wrapped = EMA(model), EMA(wrap(model))
    assert list(wrapped.averages()) == list(plain.averages())
    old = {f"module._orig_mod.{name}": average + 1 for name, average in plain.averages().items()}
    wrapped.load_state_dict({"updates": 3, "averages": old})
    assert all(torch.equal(average, plain.averages()[name] + 1) for name, average in wrapped.averages().items())


def test_warm_up():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema, expected = EMA(model, decay=0.9999), 0.0
    for n in range(1, 6):
        model.weight.data.fill_(float(n))
        ema.update()
        expected += (n - expected) * (1 - (1 + n) / (10 + n))
    assert ema.state_dict()["averages"]["weight"].item() == pytest.approx(expected)


def test_weights_return_bit_equal_after_a_swap():
    model = net()
    ema = EMA(model)
    step(model)
    ema.update()
    own = [p.detach().clone() for p in model.parameters()]
    storages = [p.data_ptr() for p in model.parameters()]
    with ema.swapped():
        for p, average in zip(model.parameters(), ema.state_dict()["averages"].values(), strict=True):
            assert torch.equal(p, average)
        assert not torch.equal(model[0].weight, own[0])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), own, strict=True))
    assert storages == [p.data_ptr() for p in model.parameters()]


def test_weights_return_after_an_exception():
    model = net()
    ema = EMA(model)
    step(model)
    own = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="preview failed"), ema.swapped():
        raise RuntimeError("preview failed")
    assert torch.equal(model[0].weight, own)
    ema.update()  # and goes on


def test_a_change_inside_the_swap_does_not_reach_the_averages():
    model = net()
    ema = EMA(model)
    before = {name: a.clone() for name, a in ema.state_dict()["averages"].items()}
    with ema.swapped(), pytest.raises(RuntimeError, match="inside"):
        ema.update()
    assert all(torch.equal(a, before[name]) for name, a in ema.state_dict()["averages"].items())
    with ema.swapped(), pytest.raises(RuntimeError, match="inside itself"), ema.swapped():
        pass


def test_half_precision_is_averaged_in_float32():
    model = net().bfloat16()
    ema = EMA(model, decay=0.999)
    ema.updates = 10_000
    model[0].weight.data.add_(1)
    ema.update()
    assert ema.state_dict()["averages"]["0.weight"].dtype == torch.float32
    with ema.swapped():
        assert model[0].weight.dtype == torch.bfloat16


def test_state_is_restored():
    model = net()
    ema = EMA(model)
    step(model)
    ema.update()
    again = EMA(net())
    again.load_state_dict(ema.state_dict())
    assert again.updates == 1
    for a, b in zip(again.state_dict()["averages"].values(), ema.state_dict()["averages"].values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="another architecture"):
        EMA(nn.Linear(2, 2)).load_state_dict(ema.state_dict())


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_refuses(decay):
    with pytest.raises(ValueError, match=f"ema_decay={decay}"):
        EMA(net(), decay)


def assign(model):
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)


CHANGES = {
    "assigned weights": (assign, "0.weight and 3 more was replaced"),
    "another module": (lambda model: model.__setitem__(1, nn.Linear(4, 2)), "1.weight and 1 more was replaced"),
    "another parameter": (lambda model: setattr(model[0], "bias", nn.Parameter(torch.ones(4))), "0.bias was replaced"),
    "weight norm": (lambda model: weight_norm(model[0]), "0.weight was replaced"),
    "an added module": (lambda model: model.append(nn.Linear(2, 2)), "2.weight and 1 more was added or unfrozen"),
    "an unfrozen weight": (lambda model: model[1].requires_grad_(True), "1.weight and 1 more was added or unfrozen"),
    "a LoRA": (
        lambda model: inject_adapter_in_model(LoraConfig(r=1, target_modules=["1"]), model),
        "was (replaced|added or unfrozen)",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_refuses_other_parameters_than_those_of_the_start(change):
    model = net()
    model[1].requires_grad_(change != "an unfrozen weight")
    ema = EMA(model, 0.9)
    apply, message = CHANGES[change]
    apply(model)
    with pytest.raises(RuntimeError, match=message):
        ema.update()
    with pytest.raises(RuntimeError, match=message), ema.swapped():
        pass
    assert ema.updates == 0


def test_parameters_may_be_frozen_and_converted_in_place():
    model = net()
    ema = EMA(model, 0.9)
    model[0].requires_grad_(False)
    model.double().load_state_dict({name: torch.ones_like(value) for name, value in model.state_dict().items()})
    for _ in range(400):
        ema.update()
    with ema.swapped():
        assert_close(model[1].weight, torch.ones_like(model[1].weight))
