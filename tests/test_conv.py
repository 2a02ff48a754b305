"""The faster and leaner ways of convolutions against torch's own: numbers, gradients, memory, hooks, compilers.

`plain_convolutions()` is the reference for networks, torch's own layers are that for single convolutions.
"""

import copy
import gc
import pickle
import re
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from helpers import SMALL, inputs, randomise, relative_error
from unet_denoiser import ResBlock, UNet, conv
from unet_denoiser.conv import Conv2d, plain_convolutions, winograd_pays
from unet_denoiser.layers import NearestUpsample
from unet_denoiser.recompute import recomputed

pytestmark = pytest.mark.usefixtures("narrow_winograd")

checked = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow], database=None
)

# networks whose first level is large enough for Winograd's filtering, by the parts that the presets are made of
WIDE = SMALL | {"model_channels": 64, "norm_groups": 32, "image_size": 32, "attention_resolutions": (16,)}
KINDS = {
    "conv_transpose": {},
    "ddpm": {"upsample": "nearest", "downsample": "conv_asymmetric", "dropout": 0.1},
    "adm": {"modulation": "scale_shift", "upsample": "resblock", "downsample": "resblock", "num_classes": 5},
    "sd": {"attention": "transformer", "context_dim": 6, "upsample": "nearest"},
}
SHALLOW = {"channel_mult": (1,), "attention_resolutions": ()}


def wide(batch=1, size=(32, 32), **options):
    """A network, and arguments for it."""
    model = randomise(UNet(**WIDE | options))
    return model, inputs(model.config, batch, size)


def leaf(x):
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


def gradients(module, *args, **kwargs):
    """The output of a module, and the gradients of its parameters and inputs that arrive at them."""
    args, kwargs = [leaf(x) for x in args], {name: leaf(x) for name, x in kwargs.items()}
    module.zero_grad()
    torch.manual_seed(1)  # of the dropout
    out = module(*args, **kwargs)
    (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum().backward()
    named = dict(module.named_parameters()) | {f"input {i}": x for i, x in [*enumerate(args), *kwargs.items()]}
    return {"output": out.detach()} | {name: getattr(p, "grad", None) for name, p in named.items()}


def plain(function, *args, **kwargs):
    with plain_convolutions():
        return function(*args, **kwargs)


def assert_same(actual, expected, tolerance=1e-5):
    """Within the tolerance of the largest value of each; what should be zero (keys' biases), of that of all."""
    assert actual.keys() == expected.keys()
    largest = max(e.abs().max() for e in expected.values() if e is not None)
    for name, e in expected.items():
        a = actual[name]
        assert (a is None) == (e is None), name
        if e is not None:
            assert (a.shape, a.dtype) == (e.shape, e.dtype), name
            assert (a - e).abs().max() <= tolerance * (e.abs().max() + largest / 30), name


@pytest.fixture
def _same_masks(monkeypatch):
    """Dropout that leaves out the same values whatever the layout in memory."""
    monkeypatch.setattr("unet_denoiser.layers.dropout_mask", lambda like, p: torch.rand(like.shape) >= p)


@pytest.fixture
def calls(monkeypatch):
    """How often each function of Winograd's filtering was called."""
    counts = dict.fromkeys(("convolve", "transform_weight", "weight_gradient"), 0)
    for name in counts:
        function = getattr(conv, name)

        def counted(*args, name=name, function=function, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(conv, name, counted)
    return counts


@pytest.fixture
def cache(monkeypatch):
    """The cache of transformed weights, empty."""
    monkeypatch.setattr(conv, "_transformed", WeakTensorKeyDictionary())
    return conv._transformed


def recomputed_steps(out):
    """The number of `recomputed` in what autograd has recorded."""
    seen, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return sum(node.name() == "_RecomputedBackward" for node in seen)


# ---- single convolutions -------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other": lambda x: torch.stack([x, -x], dim=-1)[..., 0],
}


def pair(*args, **kwargs):
    """Ours and torch's convolution with the same weights."""
    ours, theirs = Conv2d(*args, **kwargs), nn.Conv2d(*args, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@checked
@given(
    channels=st.tuples(*[st.sampled_from([1, 3, 64, 80])] * 2),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 1, 2]),
    bias=st.booleans(),
    batch=st.integers(1, 3),
    size=st.tuples(*[st.integers(1, 40)] * 2),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_conv2d_equals_torch(channels, kernel, stride, bias, batch, size, layout):
    ours, theirs = pair(*channels, kernel, stride, kernel // 2, bias=bias)
    x = LAYOUTS[layout](torch.randn(batch, channels[0], *size)).requires_grad_()
    expected = gradients(theirs, x)
    assert_same(gradients(ours, x), expected, 2e-5)
    with torch.no_grad():
        assert_same({"output": ours(x)}, {"output": expected["output"]}, 2e-5)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "size"), [(1, (32, 33)), (3, (19, 31)), (1, (300, 7))])
def test_winograd_convolutions_equal_torch(calls, layout, bias, batch, size):
    ours, theirs = pair(64, 72, 3, padding=1, bias=bias)
    x = LAYOUTS[layout](torch.randn(batch, 64, *size)).requires_grad_()
    assert_same(gradients(ours, x), gradients(theirs, x), 2e-5)
    assert calls == {"convolve": 2, "transform_weight": 2, "weight_gradient": 1}


OPTIONS = [
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 3},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 1, "padding": 1},
    {"kernel_size": 1, "groups": 2},
]


class AfterSiLU(nn.Module):
    """A convolution after an activation."""

    def __init__(self, convolution, again=False):
        super().__init__()
        self.conv, self.again = convolution, again

    def forward(self, x):
        return recomputed(F.silu, self.conv, x) if self.again else self.conv(F.silu(x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(32, 32), (8, 8)])
def test_other_options_of_convolutions_equal_torch(options, size):
    """Seamless tiles are made by setting padding_mode="circular", for one."""
    ours, theirs = pair(64, 64, **options)
    x = torch.randn(1, 64, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = gradients(AfterSiLU(theirs), x)
    assert_same(gradients(AfterSiLU(ours), x), expected)
    assert_same(gradients(AfterSiLU(ours, again=True), x), expected)


@pytest.mark.parametrize("kernel", [1, 3])
def test_an_image_without_batch_equals_torch(kernel):
    ours, theirs = pair(64, 64, kernel, padding=kernel // 2)
    x = torch.randn(64, 32, 32)
    assert relative_error(ours(x), theirs(x)) < 1e-5


# 128 channels in and out, 3x3, padded by one unless said otherwise; for the size of an image, batch 1
RULE = [
    ("1024 pixels", {}, (32, 32), True, True),
    ("fewer", {}, (33, 31), True, False),
    ("several images", {}, (4, 16, 16), True, True),
    ("several images, too few pixels", {}, (3, 16, 16), True, False),
    ("few pixels, but weights that stay", {}, (16, 32), False, True),
    ("fewer, but weights that stay", {}, (16, 28), False, False),
    ("wide", {}, (3, 1000), True, False),  # tiles of four rows
    ("as wide, full tiles", {}, (4, 1000), True, True),
    ("few channels in", {"in_channels": 48}, (64, 64), True, False),
    ("few channels out", {"out_channels": 48}, (64, 64), True, False),
    ("rather few channels", {"in_channels": 64}, (64, 64), True, True),
    ("last tiles nearly empty", {}, (8, 13, 33), True, False),
    ("last tiles full enough", {}, (8, 15, 33), True, True),
    ("last tiles nearly empty, but of many", {}, (65, 65), True, True),
    ("strided", {"stride": 2}, (32, 32), True, False),
    ("strided along one axis", {"stride": (1, 2)}, (32, 32), True, False),
    ("not padded", {"padding": 0}, (32, 32), True, False),
    ("1x1", {"kernel_size": 1, "padding": 0}, (32, 32), True, False),
    ("5x5", {"kernel_size": 5}, (32, 32), True, False),
    ("1x3", {"kernel_size": (1, 3)}, (32, 32), True, False),
    ("grouped", {"groups": 2}, (32, 32), True, False),
    ("dilated", {"dilation": 2}, (32, 32), True, False),
    ("padded by the other side", {"padding_mode": "circular"}, (32, 32), True, False),
    ("double precision", {"dtype": torch.float64}, (32, 32), True, False),
    ("half precision", {"dtype": torch.bfloat16}, (32, 32), True, False),
    ("no memory", {"device": "meta"}, (32, 32), True, False),
]


@pytest.mark.parametrize(("options", "size", "training", "pays"), [row[1:] for row in RULE], ids=[r[0] for r in RULE])
@pytest.mark.usefixtures("as_measured")
def test_the_rule_of_when_winograd_pays(options, size, training, pays):
    options = {"in_channels": 128, "out_channels": 128, "kernel_size": 3, "padding": 1} | options
    layer = Conv2d(**options)
    batch = size[:-2] or (1,)
    x = torch.empty(*batch, options["in_channels"], *size[-2:], dtype=layer.weight.dtype, device=layer.weight.device)
    assert winograd_pays(layer, x, training) is pays


@pytest.mark.usefixtures("cache", "as_measured")
def test_few_pixels_pay_only_where_transformed_weights_can_be_kept(monkeypatch):
    layer, few, many = Conv2d(128, 128, 3, padding=1), torch.empty(1, 128, 16, 32), torch.empty(1, 128, 32, 32)
    for room in (0, 1):
        monkeypatch.setattr(conv, "_KEPT", 4 * 128 * 128 * 36 - 1 + room)
        assert winograd_pays(layer, few, training=False) is bool(room)
        assert winograd_pays(layer, many, training=False)


@pytest.mark.usefixtures("as_measured")
def test_winograd_does_not_pay_in_other_precisions():
    layer, x = Conv2d(128, 128, 3, padding=1), torch.empty(1, 128, 32, 32)
    assert not winograd_pays(layer, x.bfloat16(), True)
    with torch.autocast("cpu"):
        assert not winograd_pays(layer, x, True)
    assert winograd_pays(layer, x, True)


# ---- gradients of what is computed again ---------------------------------------------------------------------------


def block_and_args(in_ch=4, out_ch=6, size=(8, 6), dtype=torch.float64, batch=2, dropout=0.0, **options):
    block = randomise(ResBlock(in_ch, out_ch, 8, dropout, dims=len(size), **{"norm_groups": 2} | options)).to(dtype)
    x, emb = torch.randn(batch, in_ch, *size, dtype=dtype), torch.randn(batch, 8, dtype=dtype)
    return block, x.requires_grad_(), emb.requires_grad_()


@pytest.mark.usefixtures("_same_masks")
@pytest.mark.parametrize("size", [(7,), (8, 6), (7, 5), (4, 3, 2)])
@pytest.mark.parametrize("modulation", ["add", "scale_shift"])
@pytest.mark.parametrize("resample", ["none", "down", "up"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resblocks_in_double_precision(size, modulation, resample, dropout):
    block, *args = block_and_args(size=size, modulation=modulation, resample=resample, dropout=dropout)
    assert recomputed_steps(block(*args)) == 2
    assert plain(lambda: recomputed_steps(block(*args))) == 0
    assert_same(gradients(block, *args), plain(gradients, block, *args), 1e-12)


@pytest.mark.usefixtures("_same_masks")
@pytest.mark.parametrize("modulation", ["add", "scale_shift"])
@pytest.mark.parametrize(("resample", "size"), [("none", (32, 33)), ("down", (64, 63)), ("up", (18, 17))])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resblocks_with_winograd(calls, size, modulation, resample, dropout):
    options = {"modulation": modulation, "resample": resample, "dropout": dropout}
    block, *args = block_and_args(64, 72, size, torch.float32, 1, norm_groups=8, **options)
    assert_same(gradients(block, *args), plain(gradients, block, *args), 2e-5)
    assert calls["weight_gradient"] > 0


def test_gradcheck_of_a_resblock():
    for modulation in ("add", "scale_shift"):
        for resample in ("none", "down", "up"):
            options = {"modulation": modulation, "resample": resample, "dropout": 0.3}
            block, x, emb = block_and_args(2, 4, (3, 2), batch=1, **options)

            def call(x, emb, *parameters, block=block):
                torch.manual_seed(1)
                return block(x, emb)

            assert gradcheck(call, (x, emb, *block.parameters()), fast_mode=True)


@pytest.mark.parametrize("size", [(3,), (3, 2), (2, 1, 3)])
def test_gradcheck_of_nearest_upsampling(size):
    up, x = randomise(NearestUpsample(2, len(size))).double(), torch.randn(2, 2, *size, dtype=torch.float64)
    smaller = [2 * n - 1 for n in size]
    assert recomputed_steps(up(x)) == 1
    assert gradcheck(lambda x, *_: up(x), (x.requires_grad_(), *up.parameters()))
    assert gradcheck(lambda x, *_: up(x, size=smaller), (x, *up.parameters()))


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "frozen",
    [
        ["norm1"], ["norm2"], ["conv1"], ["conv2"], ["norm1.weight", "norm2.bias"], ["conv1.weight"], ["conv2.bias"],
        ["norm1", "conv1"], ["norm1", "conv1", "norm2", "conv2", "time_mlp", "skip"],
    ],
    ids=str,
)  # fmt: skip
def test_frozen_parameters_get_no_gradient(calls, frozen, precision):
    wide = {"in_ch": 64, "out_ch": 72, "size": (32, 32), "norm_groups": 8} if precision == torch.float32 else {}
    block, *args = block_and_args(dtype=precision, **wide, batch=1)
    for name in frozen:
        for parameter in [p for n, p in block.named_parameters() if n.startswith(name)]:
            parameter.requires_grad_(False)
    found = gradients(block, *args)
    assert {name for name, g in found.items() if g is None} == {
        name for name, p in block.named_parameters() if not p.requires_grad
    }
    trained = [m for m in (block.conv1, block.conv2) if m.weight.requires_grad]
    assert calls["weight_gradient"] == (len(trained) if wide else 0)
    assert_same(found, plain(gradients, block, *args), 1e-5 if wide else 1e-12)


@pytest.mark.parametrize("needed", [[], [0], [1]])
def test_inputs_that_need_no_gradient(needed):
    block, *args = block_and_args()
    for i, x in enumerate(args):
        x.requires_grad_(i in needed)
    found = gradients(block, *args)
    assert [i for i in range(2) if found[f"input {i}"] is not None] == needed
    assert_same(found, plain(gradients, block, *args), 1e-12)


def test_nothing_is_recorded_where_nothing_needs_a_gradient():
    block, x, emb = block_and_args()
    block.requires_grad_(False)
    assert not block(x.detach(), emb.detach()).requires_grad


class Twice(nn.Module):
    """A block that is used two times over, and whose first result is used two times."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, emb):
        h = self.block(x, emb)
        return self.block(h, emb) + h


class Checkpointed(Twice):
    def __init__(self, block, use_reentrant):
        super().__init__(block)
        self.use_reentrant = use_reentrant

    def forward(self, x, emb):
        return checkpoint(self.block, x, emb, use_reentrant=self.use_reentrant)


class OnDisk(Twice):
    """With what is kept for the backward pass packed away, as to save memory."""

    def forward(self, x, emb):
        with torch.autograd.graph.save_on_cpu():
            return self.block(x, emb)


@pytest.mark.usefixtures("_same_masks")
@pytest.mark.parametrize(
    "around", [Twice, lambda b: Checkpointed(b, False), lambda b: Checkpointed(b, True), OnDisk],
    ids=["twice", "checkpoint", "reentrant checkpoint", "packed away"],
)  # fmt: skip
def test_blocks_within_something_else(around):
    block, *args = block_and_args(4, 4, dropout=0.3)
    assert_same(gradients(around(block), *args), plain(gradients, around(block), *args), 1e-12)
    if around is not Twice:
        alone = {f"block.{n}" if "." in n else n: g for n, g in plain(gradients, block, *args).items()}
        assert_same(gradients(around(block), *args), alone, 1e-12)


def test_backward_twice_with_retain_graph():
    block, *args = block_and_args()
    loss = block(*args).square().sum()
    leaves = [*args, *block.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, leaves)


def test_a_change_in_place_between_forward_and_backward_is_noticed():
    block, *args = block_and_args()
    out = block(*args)
    with torch.no_grad():
        block.norm1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- what watches, changes or replaces modules ---------------------------------------------------------------------

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


@pytest.mark.parametrize("watched", [[part] for part in PARTS] + [PARTS], ids=str)
@pytest.mark.parametrize("watch", list(WATCHES))
def test_whatever_watches_a_module_sees_each_call(watch, watched):
    block, *args = block_and_args()
    seen = []
    for name in watched:
        WATCHES[watch](getattr(block, name), lambda name=name: seen.append(name))
    found = gradients(block, *args)
    first, seen[:] = list(seen), []
    expected = plain(gradients, block, *args)
    assert sorted(seen) == sorted(watched)
    assert first == seen
    assert_same(found, expected, 1e-12)


def test_a_hook_on_all_modules_sees_each_call():
    block, *args = block_and_args()
    names, seen = {module: name for name, module in block.named_modules()}, []
    hook = register_module_forward_hook(lambda module, *_: seen.append(names.get(module)))
    try:
        gradients(block, *args)
    finally:
        hook.remove()
    assert [name for name in seen if name in PARTS] == PARTS


@pytest.mark.parametrize("watched", [*PARTS, "all"])
@pytest.mark.parametrize("modulation", ["add", "scale_shift"])
def test_what_a_hook_keeps_is_not_overwritten(watched, modulation):
    block, *args = block_and_args(64, 64, (16, 16), torch.float32, modulation=modulation)
    kept = []
    keep = lambda module, args, out: kept.append((out, out.clone()))  # noqa: E731
    register = register_module_forward_hook if watched == "all" else getattr(block, watched).register_forward_hook
    hook = register(keep)
    try:
        with torch.no_grad():
            block(*args)
    finally:
        hook.remove()
    assert kept
    assert all(torch.equal(out, before) for out, before in kept)


@pytest.mark.parametrize("removed", [None, "norm1", "norm2", "conv1", "conv2"])
def test_inference_overwrites_nothing_that_it_was_given(removed):
    block, x, emb = block_and_args(64, 64, (16, 16), torch.float32)
    if removed:
        setattr(block, removed, nn.Identity())
    before = x.clone(), emb.clone()
    expected = plain(block, x, emb)
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

    block, *args = block_and_args()
    setattr(block, part, Scaled(getattr(block, part)))
    found = gradients(block, *args)
    assert found[f"{part}.scale"].abs() > 1e-3
    assert_same(found, plain(gradients, block, *args), 1e-12)


@pytest.mark.parametrize("part", PARTS)
def test_parametrizations_get_their_gradients(part):
    class Squared(nn.Module):
        def forward(self, weight):
            return weight**2

    block, *args = block_and_args()
    nn.utils.parametrize.register_parametrization(getattr(block, part), "weight", Squared())
    assert_same(gradients(block, *args), plain(gradients, block, *args), 1e-12)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("wrap", [nn.Parameter, lambda x: x.requires_grad_()], ids=["parameters", "tensors"])
def test_lent_parameters_get_the_gradients(wrap, order):
    """torch.func.functional_call gives a module other parameters for a call, which is over when gradients are taken."""
    block, *args = block_and_args()
    lent = {name: wrap(1.5 * p.detach()) for name, p in block.named_parameters()}

    def derived(out, parameters):
        wanted = [*parameters.values(), args[0]]
        if order == 2:
            out = torch.autograd.grad(out.square().sum(), args[0], create_graph=True)[0]
        found = torch.autograd.grad(out.square().sum(), wanted, materialize_grads=True)
        return dict(zip([*parameters, "input"], found, strict=True))

    found = derived(functional_call(block, lent, tuple(args)), lent)
    with torch.no_grad():
        for name, p in block.named_parameters():
            p.copy_(lent[name])
    assert_same(found, plain(lambda: derived(block(*args), dict(block.named_parameters()))), 1e-12)


# ---- torch.func, derivatives of derivatives ------------------------------------------------------------------------


@pytest.fixture(params=["Winograd's", "narrow"])
def function(request):
    """The loss of a network as a function of parameters and input; parameters; two batches of input."""
    model, args = wide(
        **SHALLOW if request.param == "Winograd's" else SHALLOW | {"model_channels": 8, "norm_groups": 4}
    )
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loss = lambda p, x: functional_call(model, p, (x, args["t"])).square().mean()  # noqa: E731
    return loss, parameters, torch.stack([args["x"], args["x"].flip(-1)])


def test_func_grad(function):
    loss, parameters, x = function
    assert_same(grad(loss)(parameters, x[0]), plain(grad(loss), parameters, x[0]))


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad])
def test_func_vmap(function, mode):
    loss, parameters, x = function
    with mode():
        expected = torch.stack([plain(loss, parameters, x[i]) for i in range(2)])
        assert relative_error(vmap(loss, (None, 0))(parameters, x), expected) < 1e-5


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad])
def test_func_vmap_over_an_ensemble(function, mode):
    loss, parameters, x = function
    ensemble = {name: torch.stack([p, 0.9 * p]) for name, p in parameters.items()}
    with mode():
        expected = [plain(loss, {name: p[i] for name, p in ensemble.items()}, x[0]) for i in range(2)]
        assert relative_error(vmap(loss, (0, None))(ensemble, x[0]), torch.stack(expected)) < 1e-5


def test_func_gradients_of_each_sample(function):
    loss, parameters, x = function
    found = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(2):
        assert_same({name: g[i] for name, g in found.items()}, plain(grad(loss), parameters, x[i]))


def attention(q, k, v, attn_mask=None):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def test_func_jvp(function, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)  # the CPU's own has no forward derivative
    loss, parameters, x = function
    for at in (lambda x: loss(parameters, x), x[0]), (lambda p: loss(p, x[0]), parameters):
        tangent = {name: p.cos() for name, p in at[1].items()} if isinstance(at[1], dict) else at[1].cos()
        found, expected = jvp(at[0], (at[1],), (tangent,)), plain(jvp, at[0], (at[1],), (tangent,))
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
        return block_and_args(64, 64, (32, 32), torch.float32)
    block, *args = block_and_args(4, 4)
    return (block if name == "block" else Gained(block)), *args


@pytest.mark.parametrize("loss", [torch.sum, torch.norm])
@pytest.mark.parametrize("name", ["convolution", "block", "Winograd's block", "block after a gain", "network"])
def test_second_derivatives_are_refused_clearly_or_right(monkeypatch, name, loss):
    """Autograd tells that a step has none only if it passes it on its way to a parameter, and not always then."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)  # the CPU's own has no second derivative
    module, x, *others = twice_differentiated(name)
    x.requires_grad_()

    def penalty():
        (first,) = torch.autograd.grad(loss(module(x, *others)), x, create_graph=True)
        wanted = {name: p for name, p in module.named_parameters() if p.requires_grad} | {"input": x}
        found = torch.autograd.grad((first + x).square().sum(), list(wanted.values()), materialize_grads=True)
        return dict(zip(wanted, found, strict=True))

    expected = plain(penalty)
    try:
        found = penalty()
    except RuntimeError as error:
        assert re.search(r"plain_convolutions|twice", str(error))  # noqa: PT017
        return
    assert_same(found, expected, 1e-4 if x.dtype == torch.float32 else 1e-10)


# ---- autocast ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_same_masks")
@pytest.mark.parametrize("kind", list(KINDS))
def test_autocast_to_bfloat16(kind):
    model = randomise(UNet(**SMALL | KINDS[kind]))
    args = inputs(model.config)
    args["x"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = gradients(model, **args), plain(gradients, model, **args)
    assert found["output"].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for name, g in found.items() if name != "output" and g is not None)
    assert_same(found, expected, 0.05)


class Autocast(Twice):
    """A block under autocast, which is over when gradients are taken, as torch recommends."""

    def forward(self, *args):
        with torch.autocast("cpu", torch.bfloat16):
            return self.block(*args)


def test_autocast_in_the_forward_pass_alone():
    block, *args = block_and_args(64, 64, (32, 32), torch.float32, 1)
    found = gradients(Autocast(block), *args)
    assert_same(found, plain(gradients, Autocast(block), *args), 1e-5)
    assert (found["output"] - block(*args)).abs().max() > 1e-3  # it had an effect


def test_what_is_computed_again_has_the_precision_that_it_had():
    matrix, seen = torch.randn(8, 8), []

    def cheap(x):
        h = x @ matrix
        seen.append(h.dtype)
        return h

    class Module(AfterSiLU):
        def forward(self, x):
            return recomputed(cheap, self.conv, x)

    gradients(Autocast(Module(Conv2d(4, 4, 3, padding=1))), torch.randn(1, 4, 8, 8, requires_grad=True))
    assert seen == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("modulation", ["add", "scale_shift"])
def test_autocast_gives_the_same_dtype_with_and_without_gradients(modulation):
    block, *args = block_and_args(8, 8, (8, 8), torch.float32, modulation=modulation)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(*args)
        with torch.no_grad():
            assert block(*args).dtype == out.dtype


# ---- whole networks ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_same_masks")
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("size", [(32, 32), (35, 31)])
def test_networks_train_as_with_plain_convolutions(calls, kind, size):
    model, args = wide(size=size, **KINDS[kind])
    args["x"].requires_grad_()
    found = gradients(model, **args)
    used = dict(calls)
    assert_same(found, plain(gradients, model, **args), 2e-5)
    assert used["weight_gradient"] >= 6  # both convolutions of the first level's three blocks
    assert calls == used


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_networks_predict_as_with_plain_convolutions(calls, kind, mode):
    model, args = wide(batch=2, **KINDS[kind])
    model.eval()
    with mode():
        out, again = model(**args), model(**args)
        used = dict(calls)
        assert torch.equal(out, again)
        assert relative_error(out, plain(model, **args)) < 1e-5
    assert relative_error(out, model(**args)) < 1e-5  # with gradients
    assert used["convolve"] >= 2 * 12  # both levels' blocks
    assert used["transform_weight"] == used["convolve"] / 2  # kept for the second call


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad])
def test_the_layout_of_the_output_is_that_of_the_input(mode):
    model, args = wide()
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
    model, args = wide(**SHALLOW)
    expected = gradients(model, **args)
    with mode():
        model(**args)
    assert_same(gradients(model, **args), expected, 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_after_inference_is_a_network_of_its_own(copied):
    model, args = wide(**SHALLOW)
    with torch.no_grad():
        out = model(**args)
        other = copied(model)
        assert torch.equal(other(**args), out)
        for p in other.parameters():
            p.mul_(1.1)
        assert relative_error(other(**args), plain(other, **args)) < 1e-5
        assert torch.equal(model(**args), out)
    assert_same(gradients(other, **args), plain(gradients, other, **args))


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


def test_half_of_the_memory_between_forward_and_backward():
    model, args = wide(2, **KINDS["ddpm"], attention_resolutions=())
    size, _ = kept_bytes(model.train(), args)
    plain_size, _ = plain(kept_bytes, model, args)
    assert size <= 0.5 * plain_size


# ---- the cache of transformed weights ------------------------------------------------------------------------------


def step(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(1, 64, 32, 32)).square().sum().backward()
    optimizer.step()


def in_place(change):
    def apply(layer):
        with torch.no_grad():
            change(layer.weight)

    return apply


def new_parameter(layer):
    layer.weight = nn.Parameter(2 * layer.weight.detach())


CHANGES = {
    "in place": in_place(lambda weight: weight.mul_(2)),
    "the same values in another order": in_place(lambda weight: weight.copy_(weight.flip(0))),
    "one value in place": in_place(lambda weight: weight[5, 6, 1, 1].add_(3)),
    "through .data": lambda layer: layer.weight.data.mul_(2),
    "an input channel through .data": lambda layer: layer.weight.data[:, 5].zero_(),
    "an output channel through .data": lambda layer: layer.weight.data[5].zero_(),
    "a place of the kernel through .data": lambda layer: layer.weight.data[..., 1, 1].zero_(),
    "other .data": lambda layer: setattr(layer.weight, "data", 2 * layer.weight.data),
    "an optimizer's step": step,
    "load_state_dict": lambda layer: layer.load_state_dict(Conv2d(64, 64, 3, padding=1).state_dict()),
    "load_state_dict, assigned": lambda layer: layer.load_state_dict(
        Conv2d(64, 64, 3, padding=1).state_dict(), assign=True
    ),
    "another parameter": new_parameter,
}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", list(CHANGES))
def test_changed_weights_are_transformed_again(calls, change, mode):
    layer, x = Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 16, 16)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-9, 10, layer.weight.shape) / 64)  # sums of these are free of rounding
    with mode():
        before = layer(x)
        assert torch.equal(layer(x), before)
        assert calls == {"convolve": 2, "transform_weight": 1, "weight_gradient": 0}
    CHANGES[change](layer)
    with mode():
        after = layer(x)
        assert relative_error(after, F.conv2d(x, layer.weight, layer.bias, padding=1)) < 1e-5
    assert relative_error(after, before) > 1e-4


def test_weights_that_are_inference_tensors_are_not_kept(calls, cache):
    """Their changes cannot be noticed."""
    with torch.inference_mode():
        layer, x = Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 32, 32)
        for _ in range(2):
            assert relative_error(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1)) < 1e-5
            layer.weight[5, 6, 1, 1] += 3
    assert calls["transform_weight"] == 2
    assert len(cache) == 0


def test_weights_of_large_images_are_not_kept(calls, cache):
    """Transforming them again takes little beside the convolution."""
    layer, x = Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 80, 80)
    with torch.no_grad():
        layer(x)
    assert calls["transform_weight"] == 1
    assert len(cache) == 0


def test_training_keeps_no_transformed_weights(calls, cache):
    model, args = wide(**SHALLOW)
    gradients(model.train(), **args)
    model.enable_gradient_checkpointing()
    gradients(model, **args)
    layer = Conv2d(64, 64, 3, padding=1)
    gradients(layer, torch.randn(1, 64, 32, 32))
    assert calls["transform_weight"] > 0
    assert len(cache) == 0


def test_transformed_weights_go_with_their_network(cache):
    model, args = wide(**SHALLOW)
    with torch.no_grad():
        model(**args)
        assert len(cache) > 0
        held = sum(kept.weight.untyped_storage().nbytes() for kept in cache.values())
        assert held == 4 * sum(weight.untyped_storage().nbytes() for weight in cache)  # no more than the docstring says
    del model
    gc.collect()
    assert len(cache) == 0


def test_no_more_transformed_weights_are_kept_than_there_is_room_for(monkeypatch, calls, cache):
    monkeypatch.setattr(conv, "_KEPT", 2 * 4 * 64 * 64 * 36)  # of two layers
    layers, x = [Conv2d(64, 64, 3, padding=1) for _ in range(3)], torch.randn(1, 64, 32, 32)
    with torch.no_grad():
        for layer in layers * 2:
            assert relative_error(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1)) < 1e-5
        assert set(cache) == {layer.weight for layer in layers[:2]}
        assert calls["transform_weight"] == 2 + 2
        del layers[0], layer
        gc.collect()
        layers[1](x)
    assert set(cache) == {layer.weight for layer in layers}


# ---- compiling and exporting ---------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_network_compiles_whole_for_training(calls):
    model, args = wide(**SHALLOW)
    expected = gradients(model, **args)
    assert calls["weight_gradient"] > 0
    eager, compiled = dict(calls), torch.compile(model, backend="aot_eager", fullgraph=True)
    found = gradients(compiled, **args)
    assert_same({name.removeprefix("_orig_mod."): g for name, g in found.items()}, expected)
    assert calls["weight_gradient"] == 2 * eager["weight_gradient"]


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_network_compiles_whole_for_inference(calls):
    model, args = wide(size=(16, 16), **SHALLOW)
    compiled = torch.compile(model.eval(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(**args)
        eager = calls["convolve"]
        assert eager > 0
        assert relative_error(compiled(**args), expected) < 1e-5
    assert calls["convolve"] == 2 * eager


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inductor_gets_what_it_was_told_to_expect(calls, layout):
    """It checks strides of results and gradients against those that the operators announced."""
    layer = Conv2d(64, 64, 3, padding=1).to(memory_format=layout)
    x = torch.randn(1, 64, 32, 32, requires_grad=True)
    expected = plain(gradients, layer, x)
    found = gradients(torch.compile(layer, fullgraph=True), x)
    assert calls["weight_gradient"] == 1
    assert_same({name.removeprefix("_orig_mod."): g for name, g in found.items()}, expected)


def test_an_exported_network_has_torch_operators_alone():
    model, args = wide(**SHALLOW)
    program = torch.export.export(model.eval(), (), args)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("unet_denoiser" in target for target in targets)
    assert any("conv2d" in target for target in targets)
    with torch.no_grad():
        assert relative_error(program.module()(**args), model(**args)) < 1e-5
