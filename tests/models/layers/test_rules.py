"""The ways that layers choose between: right for the precision that the user has set."""

import pytest
import torch
import torch.nn.functional as F

from support.networks import relative_error, small
from unet_denoiser.models.layers import rules
from unet_denoiser.models.layers.attention import CrossAttention
from unet_denoiser.models.layers.conv import Conv2d


@pytest.fixture
def _restored_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
    if hasattr(torch.backends.mkldnn, "matmul"):
        torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("_restored_precision")
@pytest.mark.parametrize("setting", ["medium", "mkldnn"])
def test_no_winograd_with_products_by_bfloat16_units(setting):
    torch.manual_seed(0)
    layer, x = Conv2d(128, 128, 3, padding=1), torch.randn(4, 128, 32, 32)
    x = x.contiguous(memory_format=torch.channels_last)
    assert rules.winograd_pays(layer, x, training=False)
    exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    if setting == "medium":
        torch.set_float32_matmul_precision("medium")
    elif hasattr(torch.backends.mkldnn, "matmul"):
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    else:
        pytest.skip("needs torch 2.9")
    assert not rules.winograd_pays(layer, x, training=False)
    with torch.no_grad():
        found, plain = layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1)
    assert relative_error(found.double(), exact) <= 1.5 * relative_error(plain.double(), exact)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_products_in_bfloat16(masked):
    """It rounds the scores, which the fused one keeps in float32: with scores as large as here, twice its error."""
    torch.manual_seed(0)
    layer = CrossAttention(64, 64, num_heads=4)
    torch.nn.init.normal_(layer.to_q.weight, std=0.5)  # scores that are not all alike
    x, context = torch.randn(2, 50, 64), torch.randn(2, 30, 64)
    mask = torch.arange(30)[None] < torch.tensor([[30], [7]]) if masked else None
    exact = layer(x, context, mask)
    layer, x, context = layer.bfloat16(), x.bfloat16().requires_grad_(), context.bfloat16()
    q = layer._split_heads(layer.to_q(x))
    assert rules.products_pay(q, layer.keys_and_values(context)[0])
    direction = torch.randn(2, 50, 64).bfloat16()
    errors, gradients = [], []
    for products in (True, False):
        out = layer(x, context, mask) if products else _fused(layer, x, context, mask)
        errors.append(relative_error(out.float(), exact))
        gradients.append(torch.autograd.grad(out, x, direction)[0].float())
    assert errors[0] < 2.5 * errors[1]
    assert relative_error(*gradients) < 0.05


def _fused(layer, x, context, mask):
    with rules.plain_convolutions():
        return layer(x, context, mask)


def test_many_scores_take_the_fused_attention():
    q = torch.empty(4, 4, 1024, 16, dtype=torch.bfloat16, device="meta")
    assert not rules.products_pay(q, q)
    assert not rules.products_pay(torch.empty(1, 1, 16, 16), torch.empty(1, 1, 16, 16))  # float32


def test_few_pixels_keep_the_channels_last():
    """Else all that follows would have them first, where upsampling takes ten times as long."""
    layer = Conv2d(128, 128, 3, padding=1).bfloat16()
    x = torch.randn(2, 128, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    assert rules.channels_last_costs(layer, x)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_few_pixels_are_trained_with_the_channels_as_given():
    few, more = torch.randn(4, 3, 8, 8), torch.randn(5, 3, 8, 8)
    assert rules.preferred_layout(few) is few
    assert rules.is_channels_last(rules.preferred_layout(more))
    with torch.no_grad():
        assert rules.is_channels_last(rules.preferred_layout(few))
    layer = Conv2d(128, 128, 3, padding=1)
    assert not rules.is_channels_last(layer(torch.randn(2, 128, 4, 4)))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_weights_prepared_to_sample_are_the_same_in_memory_order_of_images(dims):
    torch.manual_seed(0)
    size = (6, 4, 4)[-dims:]
    model = small(dims=dims, image_size=size).eval()
    x, t = torch.randn(2, model.config.in_channels, *size), torch.tensor([3, 700])
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.inference_mode():
        expected = model(x, t)
        assert rules.prepare_to_sample(model) is model
        assert relative_error(model(x, t), expected) < 1e-5
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    images = [p for p in model.parameters() if p.ndim == 4]
    assert len(images) > 3 or dims != 2
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in images)
