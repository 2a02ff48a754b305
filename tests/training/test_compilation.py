"""torch.compile for training: the same training, few graphs, exact resuming, and no compiler."""

import os
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from support.networks import relative_error, small
from support.trainings import assert_equal, make_trainer, weights
from unet_denoiser.config.training import TRAINING_CHANGEABLE
from unet_denoiser.training import compilation
from unet_denoiser.training.compilation import compile_blocks
from unet_denoiser.utils.finite import first_nonfinite_module


@pytest.fixture
def graphs(monkeypatch):
    """Compile without generating code; the counter of graphs."""
    torch._dynamo.reset()
    compilation._compile.cache_clear()
    counter, compiler = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend=counter, fullgraph=True))
    yield counter
    compilation._compile.cache_clear()
    torch._dynamo.reset()


def run(network, batch, size, **conditions):
    """The output, and the gradients by name, of one pass through a network."""
    generator = torch.Generator().manual_seed(batch * size[0] + size[1])
    x = torch.randn(batch, 3, *size, generator=generator)
    network.zero_grad()
    torch.manual_seed(0)
    out = network(x, torch.arange(batch), **conditions)
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"context_dim": 8, "attention": "transformer"}, {"downsample": "resblock"}])
def test_blocks_of_the_same_shape_share_graphs_of_any_size(graphs, options):
    network = small(num_res_blocks=3, channel_mult=(1, 2), dropout=0.0, **options).train()
    given = {"context": torch.randn(2, 4, 8)} if "context_dim" in options else {}
    plain = deepcopy(network)
    compile_blocks(network)
    blocks = [module for module in network.modules() if isinstance(module, compilation.REPEATED)]
    shapes = {(type(m), *((n, p.shape) for n, p in m.named_parameters())) for m in blocks}
    counts = []
    for height in (16, 8, 12):
        for width in (12, 20, 16, 10):  # among them squares, and a side of the length of the batch
            out, grads = run(network, 2, (height, width), **given)
            expected, wanted = run(plain, 2, (height, width), **given)
            assert relative_error(out, expected) < 1e-5
            assert all(relative_error(grads[name], g) < 1e-4 for name, g in wanted.items() if g.abs().max() > 1e-6)
            counts.append(graphs.frame_count)
    assert len(shapes) < len(blocks)
    each = 2 if options.get("downsample") == "resblock" else 1  # blocks that resample may have the shapes of others
    assert len(shapes) <= counts[0] <= each * len(shapes)
    assert counts[-1] <= each * len(shapes)
    assert list(network.state_dict()) == list(plain.state_dict())


def test_networks_share_graphs_and_evaluation_compiles_nothing(graphs):
    for _ in range(2):
        network = small(dropout=0.1).train()
        compile_blocks(network)
        run(network, 2, (8, 8))
        found = graphs.frame_count
        network.eval()
        run(network, 2, (8, 8))
        run(deepcopy(network), 2, (8, 8))
        assert graphs.frame_count == found > 0


def test_hooks_of_inner_layers_see_their_calls(graphs):
    network, inputs = small().train(), (torch.randn(2, 3, 8, 8), torch.arange(2))
    compile_blocks(network)
    assert first_nonfinite_module(network, lambda: network(*inputs)) is None
    assert graphs.frame_count == 0
    with torch.no_grad():
        network.encoder[0][0].norm2.weight.fill_(torch.nan)
    place = first_nonfinite_module(network, lambda: network(*inputs))
    assert place == "the output of encoder.0.0.norm2 (GroupNorm) from finite inputs"


def state_after_three_steps(trainer):
    for step in trainer.steps():
        if step.step == 3:
            break
    return trainer.state()


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}])
def test_resumes_exactly_and_with_or_without_compile(graphs, options):
    whole = make_trainer({"compile": True} | options)
    list(whole.steps())
    assert graphs.frame_count > 0
    state = state_after_three_steps(make_trainer({"compile": True} | options))
    found = {}
    for compiled in (True, False):
        resumed = make_trainer({"compile": compiled, "seed": 0} | options)
        resumed.restore(*state)
        list(resumed.steps())
        found[compiled] = weights(resumed.model)
    assert_equal(found[True], weights(whole.model))
    error = relative_error(found[False]["input_conv.weight"], found[True]["input_conv.weight"])
    assert 0 < error < 0.2  # other dropout masks
    assert "compile" in TRAINING_CHANGEABLE


def test_an_uncompiled_training_resumes_compiled(graphs):
    state = state_after_three_steps(make_trainer(net={"dropout": 0.0}))
    losses = {}
    for compiled in (True, False):
        resumed = make_trainer({"compile": compiled}, net={"dropout": 0.0})
        resumed.restore(*state)
        losses[compiled] = [step.losses.loss for step in resumed.steps()]
    # not those after it: AdamW makes full steps of gradients that are nothing but rounding
    torch.testing.assert_close(losses[True][0], losses[False][0], rtol=1e-3, atol=1e-4)
    assert graphs.frame_count > 0


WITHOUT_COMPILER = """
import sys, warnings
from support.trainings import assert_equal, make_trainer, weights
plain, compiled = make_trainer({"steps": 2}), make_trainer({"steps": 2, "compile": True})
list(plain.steps())
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    list(compiled.steps())
assert_equal(weights(plain.model), weights(compiled.model))
(warning,) = [str(w.message) for w in seen if "compile" in str(w.message)]
print(warning)
"""


@pytest.mark.parametrize("env", [{"PATH": "/nonexistent"}, {"CXX": "no-such-compiler"}])
def test_without_a_compiler_one_line_warns_and_the_training_is_the_uncompiled_one(env, tmp_path):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)} | env
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.strip().splitlines()
    assert line.startswith("compile=True: torch.compile fails here, going on without it: ")
