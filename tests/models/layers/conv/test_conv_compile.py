"""Compiling and exporting networks and convolutions."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from support.convolutions import SHALLOW, assert_same, gradients, make_block, make_wide_unet, run_plain
from support.networks import relative_error
from unet_denoiser.models.layers.conv import Conv2d


@pytest.mark.usefixtures("_fresh_compiler")
def test_training_compiles_without_graph_breaks(calls):
    model, args = make_wide_unet(**SHALLOW)
    expected = gradients(model, **args)
    assert calls["weight_gradient"] > 0
    eager, compiled = dict(calls), torch.compile(model, backend="aot_eager", fullgraph=True)
    found = gradients(compiled, **args)
    assert_same({name.removeprefix("_orig_mod."): g for name, g in found.items()}, expected)
    assert calls["weight_gradient"] == 2 * eager["weight_gradient"]


@pytest.mark.usefixtures("_fresh_compiler")
def test_inference_compiles_without_graph_breaks(calls):
    model, args = make_wide_unet(size=(16, 16), **SHALLOW)
    compiled = torch.compile(model.eval(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(**args)
        eager = calls["convolve"]
        assert eager > 0
        assert relative_error(compiled(**args), expected) < 1e-5
    assert calls["convolve"] == 2 * eager


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inductor_accepts_the_announced_strides(calls, layout):
    """It checks strides of results and gradients against those that the operators announced."""
    layer = Conv2d(64, 64, 3, padding=1).to(memory_format=layout)
    x = torch.randn(1, 64, 32, 32, requires_grad=True)
    expected = run_plain(gradients, layer, x)
    found = gradients(torch.compile(layer, fullgraph=True), x)
    assert calls["weight_gradient"] == 1
    assert_same({name.removeprefix("_orig_mod."): g for name, g in found.items()}, expected)


def test_an_exported_network_has_only_torch_operators():
    model, args = make_wide_unet(**SHALLOW)
    program = torch.export.export(model.eval(), (), args)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("unet_denoiser" in target for target in targets)
    assert any("conv2d" in target for target in targets)
    with torch.no_grad():
        assert relative_error(program.module()(**args), model(**args)) < 1e-5


@pytest.mark.usefixtures("_fresh_compiler", "default_thresholds")
@pytest.mark.parametrize("training", [False, True])
def test_sizes_share_graphs(training):
    """Sizes lie on both sides of each decision: Winograd or not, few pixels or many, cached weights or not."""
    block, _, _ = make_block(128, 128, (8, 8), torch.float32, norm_groups=32)
    counter = CompileCounter()
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(training):
        for batch, height, width in [(2, 32, 32), (3, 24, 40), (2, 8, 12), (5, 4, 6), (2, 9, 7)]:
            x, emb = torch.randn(batch, 128, height, width), torch.randn(batch, 8)
            out = compiled(x, emb)
            assert relative_error(out, block(x, emb)) < 1e-5
            if training:
                out.sum().backward()
    assert counter.frame_count <= 3
