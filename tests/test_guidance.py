"""Classifier-free guidance against its formula, written out with separate calls."""

import pytest
import torch
from torch.testing import assert_close

from helpers import CONDITIONS, inputs, small
from unet_denoiser import Guidance, SamplingConfig


def guidance(network, scale, guided=None, channels=None, **conditions):
    return Guidance(network, SamplingConfig(guidance_scale=scale), conditions, guided=guided, channels=channels)


class Counting:
    """A network that counts its calls and rows."""

    def __init__(self, model):
        self.model, self.rows = model, []

    def __call__(self, x, t, **inputs):
        self.rows.append(len(x))
        return self.model(x, t, **inputs)


@pytest.fixture
def setting():
    model = small(**CONDITIONS)
    args = inputs(model.config, batch=3)
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    return Counting(model), args.pop("x"), args.pop("t"), args | {"context_mask": mask}


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_formula(setting, scale):
    network, x, t, conditions = setting
    with torch.no_grad():
        guided = guidance(network, scale, **conditions)(x, t)
        conditional, unconditional = network.model(x, t, **conditions), network.model(x, t)
    assert_close(guided, unconditional + scale * (conditional - unconditional), rtol=1e-4, atol=1e-4)
    assert (conditional - unconditional).abs().max() > 0.1


@pytest.mark.parametrize(("scale", "rows"), [(0.0, 3), (1.0, 3), (2.0, 6)])
def test_computes_only_what_it_needs_in_one_call(setting, scale, rows):
    network, x, t, conditions = setting
    guidance(network, scale, **conditions)(x, t)
    assert network.rows == [rows]


def test_channels_that_are_no_prediction_are_not_guided():
    """Those of a learned variance stay the conditional network's."""
    network = small(num_classes=5, out_channels=6)
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([5, 700]), torch.tensor([1, 4])
    with torch.no_grad():
        conditional, unconditional = network(x, t, class_labels=labels), network(x, t)
        guided = guidance(network, 3.0, channels=3, class_labels=labels)(x, t)
    everything = unconditional + 3.0 * (conditional - unconditional)
    assert_close(guided[:, :3], everything[:, :3], rtol=1e-4, atol=1e-4)
    assert_close(guided[:, 3:], conditional[:, 3:], rtol=1e-4, atol=1e-4)
    assert (everything - conditional)[:, 3:].abs().max() > 0.1


def test_one_is_exactly_off(setting):
    network, x, t, conditions = setting
    with torch.no_grad():
        assert torch.equal(guidance(network, 1.0, **conditions)(x, t), network.model(x, t, **conditions))


def test_without_conditions(setting):
    network, x, t, _ = setting
    with torch.no_grad():
        assert torch.equal(guidance(network, 1.0, class_labels=None)(x, t), network.model(x, t))
    with pytest.raises(ValueError, match=r"guidance_scale=inf must be a finite"):
        guidance(network, float("inf"))
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 needs a condition"):
        guidance(network, 2.0, class_labels=None)
