"""Networks whose layers are quantised, stored in 8 bits, reparametrised or offloaded by other libraries."""

import copy

import accelerate
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils.parametrizations import weight_norm

from support.networks import CONDITIONS, inputs, relative_error, small
from unet_denoiser import Diffusion, UNet
from unet_denoiser.models.layers.conv import Conv2d
from unet_denoiser.sampling.loop import sample


class Linear8Bit(nn.Linear):
    """A linear layer with integers as weights, as bitsandbytes has."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.scale, self.bias = layer.weight.detach().abs().max() / 127, layer.bias
        self.weight = nn.Parameter((layer.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        assert x.dtype == torch.float32
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def to_8_bits(model):
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Linear:
                setattr(module, name, Linear8Bit(layer))
    return model


def layerwise(pattern="auto"):
    def cast(model):
        apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=pattern)
        return model

    return cast


def normalise(model):
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
        weight_norm(layer)
    return model


def offload(model):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model


WRAPPERS = {
    "quantize_dynamic": (lambda model: quantize_dynamic(model, {nn.Linear}), 0.05),
    "8-bit integers": (to_8_bits, 0.05),
    "8-bit floats": (layerwise(), 0.2),
    "8-bit floats everywhere": (layerwise(None), 0.3),
    "weight_norm": (normalise, 1e-5),
    "cpu_offload": (offload, 1e-6),  # a hooked norm takes torch's own operations
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_and_sampling_stay_near_the_networks_own(wrapper):
    wrap, tolerance = WRAPPERS[wrapper]
    model = small(**CONDITIONS, time_cond_dim=5)
    args = inputs(model.config) | {"time_cond": torch.randn(2, 5)}
    conditions = {name: value for name, value in args.items() if name not in ("x", "t")}
    wrapped = wrap(copy.deepcopy(model))
    assert wrapped.dtype == torch.float32
    assert wrapped.device == torch.device("cpu")
    with torch.no_grad():
        assert relative_error(wrapped(**args), model(**args)) <= tolerance
        samples = [sample(m, Diffusion(), seeds=[3, 4], num_inference_steps=2, **conditions) for m in (wrapped, model)]
    assert relative_error(*samples) <= 2 * tolerance
    with pytest.raises(TypeError, match=r"x has dtype torch.float64; this call needs torch.float32"):
        wrapped(**args | {"x": args["x"].double()})


def test_tensors_without_storage():
    with torch.device("meta"):
        model = UNet(**small(**CONDITIONS).config.to_dict())
    assert model.device.type == "meta"
    assert model(**{name: value.to("meta") for name, value in inputs(model.config).items()}).shape == (2, 3, 8, 6)


def test_skipped_initialisation_of_a_convolution():
    assert nn.utils.skip_init(Conv2d, 4, 4, 3, padding=1)(torch.zeros(1, 4, 8, 8)).shape == (1, 4, 8, 8)
