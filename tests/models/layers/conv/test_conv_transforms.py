"""torch.func, derivatives of derivatives, and autocast through the fast convolutions."""

import re
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from support.convolutions import (
    KINDS,
    SHALLOW,
    AfterSiLU,
    Twice,
    assert_same,
    gradients,
    make_block,
    make_wide_unet,
    run_plain,
)
from support.networks import SMALL, inputs, randomise, relative_error
from unet_denoiser import UNet
from unet_denoiser.models.layers.conv import Conv2d
from unet_denoiser.models.layers.recompute import recompute_input

# ---- torch.func, derivatives of derivatives ------------------------------------------------------------------------


@pytest.fixture(params=["Winograd's", "narrow"])
def function(request):
    """The loss of a network as a function of parameters and input; parameters; two batches of input."""
    model, args = make_wide_unet(
        **SHALLOW if request.param == "Winograd's" else SHALLOW | {"model_channels": 8, "norm_groups": 4}
    )
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loss = lambda p, x: functional_call(model, p, (x, args["t"])).square().mean()  # noqa: E731
    return loss, parameters, torch.stack([args["x"], args["x"].flip(-1)])


def test_func_grad(function):
    loss, parameters, x = function
    assert_same(grad(loss)(parameters, x[0]), run_plain(grad(loss), parameters, x[0]))


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad])
def test_func_vmap(function, mode):
    loss, parameters, x = function
    with mode():
        expected = torch.stack([run_plain(loss, parameters, x[i]) for i in range(2)])
        assert relative_error(vmap(loss, (None, 0))(parameters, x), expected) < 1e-5


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad])
def test_func_vmap_over_an_ensemble(function, mode):
    loss, parameters, x = function
    ensemble = {name: torch.stack([p, 0.9 * p]) for name, p in parameters.items()}
    with mode():
        expected = [run_plain(loss, {name: p[i] for name, p in ensemble.items()}, x[0]) for i in range(2)]
        assert relative_error(vmap(loss, (0, None))(ensemble, x[0]), torch.stack(expected)) < 1e-5


def test_func_gradients_of_each_sample(function):
    loss, parameters, x = function
    found = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(2):
        assert_same({name: g[i] for name, g in found.items()}, run_plain(grad(loss), parameters, x[i]))


def attention(q, k, v, attn_mask=None):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def test_func_jvp(function, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)  # the CPU's own has no forward derivative
    loss, parameters, x = function
    for at in (lambda x: loss(parameters, x), x[0]), (lambda p: loss(p, x[0]), parameters):
        tangent = {name: p.cos() for name, p in at[1].items()} if isinstance(at[1], dict) else at[1].cos()
        found, expected = jvp(at[0], (at[1],), (tangent,)), run_plain(jvp, at[0], (at[1],), (tangent,))
        assert [f.item() for f in found] == pytest.approx([e.item() for e in expected], rel=1e-4)


class Gained(nn.Module):
    """A block after something else with a parameter."""

    def __init__(self, block):
        super().__init__()
        self.block, self.gain = block.requires_grad_(False), nn.Parameter(torch.ones(4, 1, 1, dtype=torch.float64))

    def forward(self, x, emb):
        return self.block((self.gain * x).tanh(), emb)


def twice_differentiated(name):
    if name == "convolution":
        return Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 32, 32)
    if name == "network":
        return randomise(UNet(**SMALL)).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([3, 500])
    if name == "Winograd's block":
        return make_block(64, 64, (32, 32), torch.float32)
    block, *args = make_block(4, 4)
    return (block if name == "block" else Gained(block)), *args


@pytest.mark.parametrize("loss", [torch.sum, torch.norm])
@pytest.mark.parametrize("name", ["convolution", "block", "Winograd's block", "block after a gain", "network"])
def test_second_derivatives_are_right_or_refused(monkeypatch, name, loss):
    """Autograd tells that a step has none only if it passes it on its way to a parameter, and not always then."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)  # the CPU's own has no second derivative
    module, x, *others = twice_differentiated(name)
    x.requires_grad_()

    def penalty():
        (first,) = torch.autograd.grad(loss(module(x, *others)), x, create_graph=True)
        wanted = {name: p for name, p in module.named_parameters() if p.requires_grad} | {"input": x}
        found = torch.autograd.grad((first + x).square().sum(), list(wanted.values()), materialize_grads=True)
        return dict(zip(wanted, found, strict=True))

    expected = run_plain(penalty)
    try:
        found = penalty()
    except RuntimeError as error:
        assert re.search(r"plain_convolutions|twice", str(error))  # noqa: PT017
        return
    assert_same(found, expected, 1e-4 if x.dtype == torch.float32 else 1e-10)


# ---- autocast ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_dropout_of_any_layout")
@pytest.mark.parametrize("kind", list(KINDS))
def test_autocast_to_bfloat16(kind):
    model = randomise(UNet(**SMALL | KINDS[kind]))
    args = inputs(model.config)
    args["x"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = gradients(model, **args), run_plain(gradients, model, **args)
    assert found["output"].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for name, g in found.items() if name != "output" and g is not None)
    assert_same(found, expected, 0.05)


class Autocast(Twice):
    """A block under autocast, which is over when gradients are taken, as torch recommends."""

    def forward(self, *args):
        with torch.autocast("cpu", torch.bfloat16):
            return self.block(*args)


def test_autocast_in_the_forward_pass_alone():
    block, *args = make_block(64, 64, (32, 32), torch.float32, 1)
    found = gradients(Autocast(block), *args)
    assert_same(found, run_plain(gradients, Autocast(block), *args), 1e-5)
    assert (found["output"] - block(*args)).abs().max() > 1e-3  # it had an effect


def test_recomputation_has_the_autocast_of_the_forward_pass():
    matrix, seen = torch.randn(8, 8), []

    def cheap(x):
        h = x @ matrix
        seen.append(h.dtype)
        return h

    class Module(AfterSiLU):
        def forward(self, x):
            return recompute_input(cheap, self.conv, x)

    gradients(Autocast(Module(Conv2d(4, 4, 3, padding=1))), torch.randn(1, 4, 8, 8, requires_grad=True))
    assert seen == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("modulation", ["add", "scale_shift"])
def test_autocast_gives_the_same_dtype_with_and_without_gradients(modulation):
    block, *args = make_block(8, 8, (8, 8), torch.float32, modulation=modulation)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(*args)
        with torch.no_grad():
            assert block(*args).dtype == out.dtype
