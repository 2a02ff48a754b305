"""Gradients of what is computed again in the backward pass, against those of plain convolutions."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from support.convolutions import Twice, assert_same, count_recomputed_steps, gradients, make_block, run_plain
from support.networks import randomise
from unet_denoiser.models.layers.resampling import NearestUpsample


@pytest.mark.usefixtures("_dropout_of_any_layout")
@pytest.mark.parametrize("size", [(7,), (8, 6), (7, 5), (4, 3, 2)])
@pytest.mark.parametrize("modulation", ["add", "scale_shift"])
@pytest.mark.parametrize("resample", ["none", "down", "up"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resblocks_in_double_precision(size, modulation, resample, dropout):
    block, *args = make_block(size=size, modulation=modulation, resample=resample, dropout=dropout)
    assert count_recomputed_steps(block(*args)) == 2
    assert run_plain(lambda: count_recomputed_steps(block(*args))) == 0
    assert_same(gradients(block, *args), run_plain(gradients, block, *args), 1e-12)


@pytest.mark.usefixtures("_dropout_of_any_layout")
@pytest.mark.parametrize("modulation", ["add", "scale_shift"])
@pytest.mark.parametrize(("resample", "size"), [("none", (32, 33)), ("down", (64, 63)), ("up", (18, 17))])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resblocks_with_winograd(calls, size, modulation, resample, dropout):
    options = {"modulation": modulation, "resample": resample, "dropout": dropout}
    block, *args = make_block(64, 72, size, torch.float32, 1, norm_groups=8, **options)
    assert_same(gradients(block, *args), run_plain(gradients, block, *args), 2e-5)
    assert calls["weight_gradient"] > 0


def test_gradcheck_of_a_resblock():
    for modulation in ("add", "scale_shift"):
        for resample in ("none", "down", "up"):
            options = {"modulation": modulation, "resample": resample, "dropout": 0.3}
            block, x, emb = make_block(2, 4, (3, 2), batch=1, **options)

            def call(x, emb, *parameters, block=block):
                torch.manual_seed(1)
                return block(x, emb)

            assert gradcheck(call, (x, emb, *block.parameters()), fast_mode=True)


@pytest.mark.parametrize("size", [(3,), (3, 2), (2, 1, 3)])
def test_gradcheck_of_nearest_upsampling(size):
    up, x = randomise(NearestUpsample(2, len(size))).double(), torch.randn(2, 2, *size, dtype=torch.float64)
    smaller = [2 * n - 1 for n in size]
    assert count_recomputed_steps(up(x)) == 1
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
    block, *args = make_block(dtype=precision, **wide, batch=1)
    for name in frozen:
        for parameter in [p for n, p in block.named_parameters() if n.startswith(name)]:
            parameter.requires_grad_(False)
    found = gradients(block, *args)
    assert {name for name, g in found.items() if g is None} == {
        name for name, p in block.named_parameters() if not p.requires_grad
    }
    trained = [m for m in (block.conv1, block.conv2) if m.weight.requires_grad]
    assert calls["weight_gradient"] == (len(trained) if wide else 0)
    assert_same(found, run_plain(gradients, block, *args), 1e-5 if wide else 1e-12)


@pytest.mark.parametrize("needed", [[], [0], [1]])
def test_inputs_that_need_no_gradient(needed):
    block, *args = make_block()
    for i, x in enumerate(args):
        x.requires_grad_(i in needed)
    found = gradients(block, *args)
    assert [i for i in range(2) if found[f"input {i}"] is not None] == needed
    assert_same(found, run_plain(gradients, block, *args), 1e-12)


def test_no_graph_without_parameters_to_train():
    block, x, emb = make_block()
    block.requires_grad_(False)
    assert not block(x.detach(), emb.detach()).requires_grad


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


@pytest.mark.usefixtures("_dropout_of_any_layout")
@pytest.mark.parametrize(
    "around", [Twice, lambda b: Checkpointed(b, False), lambda b: Checkpointed(b, True), OnDisk],
    ids=["twice", "checkpoint", "reentrant checkpoint", "packed away"],
)  # fmt: skip
def test_blocks_inside_checkpoints_and_offloading(around):
    block, *args = make_block(4, 4, dropout=0.3)
    assert_same(gradients(around(block), *args), run_plain(gradients, around(block), *args), 1e-12)
    if around is not Twice:
        alone = {f"block.{n}" if "." in n else n: g for n, g in run_plain(gradients, block, *args).items()}
        assert_same(gradients(around(block), *args), alone, 1e-12)


def test_backward_twice_with_retain_graph():
    block, *args = make_block()
    loss = block(*args).square().sum()
    leaves = [*args, *block.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, leaves)


def test_in_place_change_before_backward_is_refused():
    block, *args = make_block()
    out = block(*args)
    with torch.no_grad():
        block.norm1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.usefixtures("default_thresholds")
def test_small_inputs_are_not_recomputed():
    block, x, emb = make_block(128, 128, (16, 16), torch.float32, 3, norm_groups=8)
    assert count_recomputed_steps(block(x, emb)) == 0
    assert count_recomputed_steps(block(torch.cat([x, x[:1]]), torch.cat([emb, emb[:1]]))) == 2


@pytest.mark.usefixtures("default_thresholds")
def test_few_channels_are_not_recomputed():
    block, *args = make_block(64, 64, (32, 32), torch.float32, 2, norm_groups=8)
    assert count_recomputed_steps(block(*args)) == 0
