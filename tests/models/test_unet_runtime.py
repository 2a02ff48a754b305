"""How a UNet runs: gradient checkpointing, compiling, exporting, number formats, memory formats."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.export import Dim, export
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from support.networks import CONDITIONS, inputs, relative_error, small

ATTENTION = ["plain", "transformer"]


# ---- gradient checkpointing ----------------------------------------------------------------------------------------


def gradients(model, args, seed=3):
    model.zero_grad()
    torch.manual_seed(seed)  # of the dropout
    out = model(**args)
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ATTENTION)
def test_checkpointing_leaves_gradients_as_they_are(attention):
    model = small(**CONDITIONS, attention=attention, dropout=0.3).train()
    args = inputs(model.config) | {"context_mask": torch.tensor([[True, False, True], [False, False, False]])}
    out, expected = gradients(model, args)
    model.enable_gradient_checkpointing()
    checkpointed, actual = gradients(model, args)
    assert torch.equal(checkpointed, out)
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert_close(actual[name], grad, msg=lambda text, name=name: f"{name}: {text}")
    assert (gradients(model, args, seed=4)[0] - out).abs().max() > 1e-3  # the dropout was active


@pytest.mark.parametrize("size", [8, 24])
def test_checkpointing_trains_what_is_not_frozen(size):
    """Even where no input of a block needs a gradient, as with the encoder frozen up to some block."""
    model = small(**CONDITIONS).requires_grad_(False)
    model.decoder.requires_grad_(True)
    model.encoder[-1].requires_grad_(True)
    args = inputs(model.config)
    args["x"] = torch.randn(*args["x"].shape[:2], size, size)
    _, expected = gradients(model, args)
    model.enable_gradient_checkpointing()
    _, actual = gradients(model, args)
    assert {name.split(".")[0] for name in expected} == {"encoder", "decoder"}
    assert_close(actual, expected)


def test_checkpointing_carries_gradients_to_the_inputs():
    model = small(**CONDITIONS)
    args = {name: v.requires_grad_() if v.is_floating_point() else v for name, v in inputs(model.config).items()}
    model(**args).sum().backward()
    expected = {name: args[name].grad.clone() for name in ("x", "vector", "context")}
    model.enable_gradient_checkpointing()
    for name in expected:
        args[name].grad = None
    model(**args).sum().backward()
    assert_close({name: args[name].grad for name in expected}, expected)


def kept_bytes(model, args):
    """Bytes of activations that autograd keeps between forward and backward."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**args)
    return sum(size for size, _ in kept.values())


def peak_bytes(model, args):
    """The most that a forward and a backward pass hold at once beyond what was there, from torch's own records."""
    gradients(model, args)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(**args).square().mean().backward()
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("measure", [kept_bytes, peak_bytes])
def test_checkpointing_needs_less_memory(measure):
    model = small(**CONDITIONS, num_res_blocks=2).train()
    args = inputs(model.config, size=(32, 32))
    plain = measure(model, args)
    model.enable_gradient_checkpointing()
    checkpointed = measure(model, args)
    model.disable_gradient_checkpointing()
    assert checkpointed < 0.6 * plain
    assert measure(model, args) == pytest.approx(plain, rel=0.01)


def test_no_checkpointing_without_gradients(monkeypatch):
    model = small()
    model.enable_gradient_checkpointing()
    monkeypatch.setattr(
        "unet_denoiser.models.unet.checkpoint", lambda *args, **kwargs: pytest.fail("checkpoint was called")
    )
    with torch.no_grad():
        model(**inputs(model.config))
    with pytest.raises(pytest.fail.Exception):
        model(**inputs(model.config))


# ---- torch.compile -------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def two_calls(model):
    """Two calls that differ in values alone."""
    drop = torch.tensor([[True, False], [False, False], [False, True]])
    masks = {"context_mask": torch.tensor([[True, True, False], [True, False, True]])}
    first = inputs(model.config) | masks | {"drop": dict(zip(("class_labels", "vector", "context"), drop, strict=True))}
    second = inputs(model.config, seed=1) | {"context_mask": ~masks["context_mask"]}
    second["drop"] = {name: ~mask for name, mask in first["drop"].items()}
    return first, second


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("attention", ATTENTION)
def test_compiles_once_without_graph_breaks(attention):
    model, counter = small(**CONDITIONS, attention=attention), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for args in two_calls(model):
            assert_close(compiled(**args), model(**args))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(("size", "checkpointing"), [((7, 5), False), ((8, 6), True)])
def test_compiled_gradients_are_equal(checkpointing, size):
    model = small(**{"num_classes": 5} if checkpointing else CONDITIONS, attention_resolutions=())
    args = inputs(model.config, size=size)
    out, expected = gradients(model, args)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.compile(backend="aot_eager", fullgraph=True)
    compiled, actual = gradients(model, args)
    assert_close(compiled, out)
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
def test_inductor_gives_the_same_result():
    model = small(channel_mult=(1,), attention_resolutions=())
    args = inputs(model.config)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(**args), model(**args)) < 1e-5


@pytest.mark.usefixtures("_fresh_compiler")
def test_inductor_gives_the_same_gradients():
    """With odd sizes, so that upsampling crops: that crop's backward pass, as index_select, has corrupted the heap."""
    model = small(channel_mult=(1, 1), attention_resolutions=(), upsample="nearest")
    args = inputs(model.config, size=(9, 7))
    out, expected = gradients(model, args)
    model.compile(fullgraph=True)
    compiled, actual = gradients(model, args)
    assert_close(compiled, out, rtol=1e-4, atol=1e-5)
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ---- torch.export --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("downsample", "upsample", "attention", "strict"),
    [
        ("conv", "conv_transpose", "plain", False),
        ("conv_asymmetric", "nearest", "transformer", False),
        ("avgpool", "nearest", "plain", True),
        ("resblock", "resblock", "plain", False),
    ],
)
def test_exports_with_dynamic_batch_and_size(downsample, upsample, attention, strict):
    model = small(**CONDITIONS, downsample=downsample, upsample=upsample, attention=attention, attention_resolutions=())
    args, dynamic = inputs(model.config, size=(9, 12)), Dim.DYNAMIC  # an error, should an axis turn out to be fixed
    shapes = {name: {0: dynamic} for name in args} | {"x": {0: dynamic, 2: dynamic, 3: dynamic}}
    shapes["context"][1] = dynamic
    program = export(model, (), args, dynamic_shapes=shapes, strict=strict).module()
    for batch, size in [(3, (16, 8)), (5, (11, 7))]:
        args = inputs(model.config, batch=batch, size=size, tokens=7)
        assert_close(program(**args), model(**args))


# ---- number and memory formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.01), (torch.float64, 1e-5)])
@pytest.mark.parametrize("attention", ATTENTION)
def test_other_dtypes_stay_near_float32(dtype, tolerance, attention):
    model = small(**CONDITIONS, attention=attention, modulation="scale_shift")
    args = inputs(model.config) | {"t": torch.tensor([3, 999])}
    drop = {"drop": {"context": torch.tensor([True, False])}}
    with torch.no_grad():
        expected = model(**args, **drop)
        cast = {name: v.to(dtype) if v.is_floating_point() else v for name, v in args.items()}
        out = model.to(dtype)(**cast, **drop)
    assert model.dtype == out.dtype == dtype
    assert relative_error(out.float(), expected) < tolerance
    with pytest.raises(TypeError, match=rf"x has dtype torch.float32; this call needs {dtype}"):
        model(**args)


@pytest.mark.parametrize("attention", ATTENTION)
def test_autocast_stays_near_float32_and_trains(attention):
    model = small(**CONDITIONS, attention=attention)
    args = inputs(model.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**args, drop={"context": torch.tensor([True, False])})
    assert relative_error(out.float(), model(**args, drop={"context": torch.tensor([True, False])})) < 0.1
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_fractional_timesteps():
    model = small()
    x, t = inputs(model.config)["x"], torch.tensor([3.0, 500.0])
    assert_close(model(x, t), model(x, t.long()))
    assert relative_error(model(x, t + 0.5), model(x, t)) > 1e-3


# ---- strides of the inputs -----------------------------------------------------------------------------------------


def sliced(t):
    """The tensor as every second value of a larger one, with an offset."""
    large = torch.zeros([2 * n + 1 for n in t.shape], dtype=t.dtype)
    view = large[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


LAYOUTS = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else t,
    "reversed axes": lambda t: t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim))),
    "sliced": sliced,
    "batch last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t,
    "in a larger batch": lambda t: torch.cat([t, t])[len(t) :],
}


@pytest.mark.parametrize(
    "options", [{"dims": 1}, {"dims": 2}, {"dims": 3}, {"model_channels": 128, "image_size": 32}], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_inputs_change_nothing(layout, options):
    model = small(**CONDITIONS | options)
    # 128 channels of 32x32 go through Winograd's filtering
    args = inputs(model.config, size=(32, 32) if "model_channels" in options else None)
    args["context_mask"] = torch.tensor([[True, False, True], [True, True, False]])
    strided = {name: LAYOUTS[layout](value) for name, value in args.items()}
    assert all(torch.equal(strided[name], args[name]) for name in args)
    results = []
    for given in (args, strided):
        x = given["x"].detach().requires_grad_()
        out = model(**given | {"x": x})
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
        with torch.no_grad():
            assert relative_error(model(**given), out) < 1e-4
    for actual, expected in zip(results[1], results[0], strict=True):
        assert relative_error(actual, expected) < 1e-4


def test_repeated_samples_may_share_their_memory():
    model = small(**CONDITIONS)
    args = {name: value[:1].expand(3, *value.shape[1:]) for name, value in inputs(model.config).items()}
    copies = {name: value.clone() for name, value in args.items()}
    with torch.no_grad():
        assert relative_error(model(**args), model(**copies)) < 1e-4
