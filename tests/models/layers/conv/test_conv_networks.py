"""Whole networks with the fast convolutions and with plain ones: numbers, layouts, copies, memory."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch

from support.convolutions import KINDS, SHALLOW, assert_same, gradients, make_wide_unet, run_plain
from support.networks import relative_error

# ---- whole networks ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_dropout_of_any_layout")
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("size", [(32, 32), (35, 31)])
def test_networks_train_as_with_plain_convolutions(calls, kind, size):
    model, args = make_wide_unet(size=size, **KINDS[kind])
    args["x"].requires_grad_()
    found = gradients(model, **args)
    used = dict(calls)
    assert_same(found, run_plain(gradients, model, **args), 2e-5)
    assert used["weight_gradient"] >= 6  # both convolutions of the first level's three blocks
    assert calls == used


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_networks_predict_as_with_plain_convolutions(calls, kind, mode):
    model, args = make_wide_unet(batch=2, **KINDS[kind])
    model.eval()
    with mode():
        out, again = model(**args), model(**args)
        used = dict(calls)
        assert torch.equal(out, again)
        assert relative_error(out, run_plain(model, **args)) < 1e-5
    assert relative_error(out, model(**args)) < 1e-5  # with gradients
    assert used["convolve"] >= 2 * 12  # both levels' blocks
    assert used["transform_weight"] == used["convolve"] / 2  # kept for the second call


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad])
def test_output_has_the_memory_layout_of_the_input(mode):
    model, args = make_wide_unet()
    within = []
    model.input_conv.register_forward_hook(lambda module, args, out: within.append(out))
    with mode():
        out = model(**args)
        assert out.is_contiguous()
        assert within[0].is_contiguous(memory_format=torch.channels_last)
        args["x"] = args["x"].contiguous(memory_format=torch.channels_last)
        last = model(**args)
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(last, out) < 1e-5
        moved = model.to(memory_format=torch.channels_last)(**args)
        assert relative_error(moved, out) < 1e-5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_network_trains_after_inference(mode):
    model, args = make_wide_unet(**SHALLOW)
    expected = gradients(model, **args)
    with mode():
        model(**args)
    assert_same(gradients(model, **args), expected, 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_after_inference_is_independent(copied):
    model, args = make_wide_unet(**SHALLOW)
    with torch.no_grad():
        out = model(**args)
        other = copied(model)
        assert torch.equal(other(**args), out)
        for p in other.parameters():
            p.mul_(1.1)
        assert relative_error(other(**args), run_plain(other, **args)) < 1e-5
        assert torch.equal(model(**args), out)
    assert_same(gradients(other, **args), run_plain(gradients, other, **args))


# ---- memory --------------------------------------------------------------------------------------------------------


def kept_bytes(model, args):
    """Bytes of distinct storages that autograd keeps between forward and backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}  # held, so that no address comes up twice

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(**args)
    size = sum(storage.nbytes() for address, storage in storages.items() if address not in parameters)
    return size, out


def test_recomputation_halves_the_memory_of_activations():
    model, args = make_wide_unet(2, **KINDS["ddpm"], attention_resolutions=())
    size, _ = kept_bytes(model.train(), args)
    plain_size, _ = run_plain(kept_bytes, model, args)
    assert size <= 0.5 * plain_size
