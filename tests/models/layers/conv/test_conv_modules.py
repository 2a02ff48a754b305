"""Modules of a block that are hooked, replaced or parametrized, or called with other parameters."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook

from support.convolutions import assert_same, gradients, make_block, run_plain
from support.networks import relative_error

PARTS = ["norm1", "conv1", "norm2", "conv2"]


def replace_forward(module, see):
    forward = module.forward
    module.forward = lambda x: (see(), forward(x))[1]


WATCHES = {
    "forward hook": lambda module, see: module.register_forward_hook(lambda *_: see()),
    "forward pre-hook": lambda module, see: module.register_forward_pre_hook(lambda *_: see()),
    "backward hook": lambda module, see: module.register_full_backward_hook(lambda *_: see()),
    "backward pre-hook": lambda module, see: module.register_full_backward_pre_hook(lambda *_: see()),
    "another forward": replace_forward,
}


@pytest.mark.parametrize("hooked", [[part] for part in PARTS] + [PARTS], ids=str)
@pytest.mark.parametrize("watch", list(WATCHES))
def test_hooks_see_each_call(watch, hooked):
    block, *args = make_block()
    seen = []
    for name in hooked:
        WATCHES[watch](getattr(block, name), lambda name=name: seen.append(name))
    found = gradients(block, *args)
    first, seen[:] = list(seen), []
    expected = run_plain(gradients, block, *args)
    assert sorted(seen) == sorted(hooked)
    assert first == seen
    assert_same(found, expected, 1e-12)


def test_a_hook_on_all_modules_sees_each_call():
    block, *args = make_block()
    names, seen = {module: name for name, module in block.named_modules()}, []
    hook = register_module_forward_hook(lambda module, *_: seen.append(names.get(module)))
    try:
        gradients(block, *args)
    finally:
        hook.remove()
    assert [name for name in seen if name in PARTS] == PARTS


@pytest.mark.parametrize("hooked", [*PARTS, "all"])
@pytest.mark.parametrize("modulation", ["add", "scale_shift"])
def test_outputs_kept_by_hooks_are_not_overwritten(hooked, modulation):
    block, *args = make_block(64, 64, (16, 16), torch.float32, modulation=modulation)
    kept = []
    keep = lambda module, args, out: kept.append((out, out.clone()))  # noqa: E731
    register = register_module_forward_hook if hooked == "all" else getattr(block, hooked).register_forward_hook
    hook = register(keep)
    try:
        with torch.no_grad():
            block(*args)
    finally:
        hook.remove()
    assert kept
    assert all(torch.equal(out, before) for out, before in kept)


@pytest.mark.parametrize("removed", [None, "norm1", "norm2", "conv1", "conv2"])
def test_inference_does_not_overwrite_its_inputs(removed):
    block, x, emb = make_block(64, 64, (16, 16), torch.float32)
    if removed:
        setattr(block, removed, nn.Identity())
    before = x.clone(), emb.clone()
    expected = run_plain(block, x, emb)
    with torch.no_grad():
        assert relative_error(block(x, emb), expected) < 1e-5
    assert torch.equal(x, before[0])
    assert torch.equal(emb, before[1])


@pytest.mark.parametrize("part", PARTS)
def test_a_replaced_module_is_used(part):
    """As adapters do (LoRA)."""

    class Scaled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.scale = base, nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, x):
            return self.scale * self.base(x)

    block, *args = make_block()
    setattr(block, part, Scaled(getattr(block, part)))
    found = gradients(block, *args)
    assert found[f"{part}.scale"].abs() > 1e-3
    assert_same(found, run_plain(gradients, block, *args), 1e-12)


@pytest.mark.parametrize("part", PARTS)
def test_parametrizations_get_their_gradients(part):
    class Squared(nn.Module):
        def forward(self, weight):
            return weight**2

    block, *args = make_block()
    nn.utils.parametrize.register_parametrization(getattr(block, part), "weight", Squared())
    assert_same(gradients(block, *args), run_plain(gradients, block, *args), 1e-12)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("wrap", [nn.Parameter, lambda x: x.requires_grad_()], ids=["parameters", "tensors"])
def test_gradients_of_functional_call(wrap, order):
    """torch.func.functional_call gives a module other parameters for a call, which is over when gradients are taken."""
    block, *args = make_block()
    others = {name: wrap(1.5 * p.detach()) for name, p in block.named_parameters()}

    def derived(out, parameters):
        wanted = [*parameters.values(), args[0]]
        if order == 2:
            out = torch.autograd.grad(out.square().sum(), args[0], create_graph=True)[0]
        found = torch.autograd.grad(out.square().sum(), wanted, materialize_grads=True)
        return dict(zip([*parameters, "input"], found, strict=True))

    found = derived(functional_call(block, others, tuple(args)), others)
    with torch.no_grad():
        for name, p in block.named_parameters():
            p.copy_(others[name])
    assert_same(found, run_plain(lambda: derived(block(*args), dict(block.named_parameters()))), 1e-12)
