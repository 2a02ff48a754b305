"""Arguments of UNet.forward besides x and t: conditions, dropped or absent ones, and control residuals."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding
from torch.testing import assert_close

from support.networks import CONDITIONS, inputs, randomise, relative_error, small
from unet_denoiser.models.layers.attention import TransformerBlock
from unet_denoiser.models.layers.context import Context

NAMES = {"class_labels": "num_classes", "vector": "vector_dim", "context": "context_dim"}
ATTENTION = ["plain", "transformer"]
EVERY = (*NAMES, "time_cond")


def conditioned(*names, **options):
    """A network with these conditions, and its arguments."""
    model = small(**{NAMES[name]: CONDITIONS[NAMES[name]] for name in names}, **options)
    return model, inputs(model.config, batch=3)


def other(value):
    """A different condition of the same kind."""
    return (value + 1) % 5 if value.dtype == torch.int64 else value + torch.randn_like(value)


def embedding(model, args):
    """Return the embedding that the residual blocks receive."""
    seen = []
    handle = model.encoder[0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model(**args)
    handle.remove()
    return seen[0]


# ---- one or several conditions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("names", [[name] for name in NAMES] + [list(NAMES)], ids="+".join)
def test_each_condition_acts_on_its_own_sample(names, attention):
    model, args = conditioned(*names, attention=attention)
    plain = model(**args)
    for name in names:
        changed = args[name].clone()
        changed[1] = other(args[name])[1]
        difference = (model(**args | {name: changed}) - plain).abs().amax(dim=(1, 2, 3))
        assert difference[1] > 0.01
        assert max(difference[0], difference[2]) < 1e-5


def test_class_and_vector_are_added_to_the_time_embedding():
    model, args = conditioned("class_labels", "vector")
    time = model.time_mlp(args["t"])
    label = model.class_embedding.weight[args["class_labels"]]
    first, _, second = model.vector_embedding
    hidden = F.silu(F.linear(args["vector"], first.weight, first.bias))
    vector = F.linear(hidden, second.weight, second.bias)
    assert_close(embedding(model, args), time + label + vector)


def test_absent_class_and_vector_are_their_learned_nulls():
    model, args = conditioned("class_labels", "vector")
    given = {"x": args["x"], "t": args["t"]}
    assert_close(embedding(model, given), model.time_mlp(args["t"]) + model.null_class + model.null_vector)


@pytest.mark.parametrize("attention", ATTENTION)
def test_absent_context_is_one_learned_token(attention):
    model, args = conditioned("context", attention=attention)
    token = model.null_context.expand(3, 1, 6)
    assert_close(model(args["x"], args["t"]), model(args["x"], args["t"], token))
    assert relative_error(model(args["x"], args["t"]), model(**args)) > 0.01


# ---- dropped -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("names", [[name] for name in NAMES] + [list(NAMES), ["class_labels", "context"]], ids="+".join)
def test_a_dropped_sample_equals_a_call_without_the_condition(names, attention):
    model, args = conditioned(*NAMES, attention=attention)
    drop = torch.tensor([True, False, True])
    out, full = model(**args, drop=dict.fromkeys(names, drop)), model(**args)
    without = model(**{name: value for name, value in args.items() if name not in names})
    assert_close(out[drop], without[drop])
    assert_close(out[~drop], full[~drop])
    assert relative_error(without, full) > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_each_condition_has_its_own_drop(name):
    model, args = conditioned(*NAMES)
    drop = {other: torch.tensor([other == name] * 3) for other in NAMES}
    assert_close(model(**args, drop=drop), model(**{key: value for key, value in args.items() if key != name}))


@pytest.mark.parametrize("name", NAMES)
def test_a_null_gets_a_gradient_only_if_used(name):
    model, args = conditioned(*NAMES)
    null = {"class_labels": model.null_class, "vector": model.null_vector, "context": model.null_context}[name]
    for call, used in [
        (args, False),
        ({key: value for key, value in args.items() if key != name}, True),
        (args | {"drop": {name: torch.tensor([False, True, False])}}, True),
    ]:
        model.zero_grad()
        model(**call).square().sum().backward()
        assert (null.grad is not None and bool(null.grad.abs().max() > 1e-4)) == used


def test_without_learned_nulls_there_are_no_such_parameters():
    model, args = conditioned(*NAMES, learned_null=False)
    assert [name for name, _ in model.named_parameters() if "null" in name] == []
    assert model(**args).isfinite().all()


# ---- padded context ------------------------------------------------------------------------------------------------

MASK = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_masked_context_equals_a_shorter_one(attention):
    model, args = conditioned("context", attention=attention)
    out = model(**args, context_mask=MASK)
    row = {name: value[:1] for name, value in args.items()} | {"context": args["context"][:1, :2]}
    assert_close(out[:1], model(**row))
    assert_close(out[1], model(**args)[1])


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_fully_masked_sample_equals_a_dropped_one(attention):
    model, args = conditioned("context", attention=attention)
    out = model(**args, context_mask=MASK)
    assert out.isfinite().all()
    assert_close(out[2], model(args["x"], args["t"])[2])
    assert_close(out[2], model(**args, drop={"context": torch.tensor([False, False, True])})[2])


def test_a_fully_masked_sample_without_a_learned_null_attends_to_zeros():
    model, args = conditioned("context", learned_null=False)
    out = model(**args, context_mask=MASK)
    assert_close(out[2], model(**args | {"context": torch.zeros(3, 1, 6)})[2])


def test_masks_and_drops_combine():
    model, args = conditioned("context")
    out = model(**args, context_mask=MASK, drop={"context": torch.tensor([True, False, False])})
    assert_close(out[:2], torch.stack([model(args["x"], args["t"])[0], model(**args)[1]]))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("learned_null", [True, False])
@pytest.mark.parametrize("attention", ATTENTION)
def test_masked_tokens_have_no_effect(poison, learned_null, attention):
    model, args = conditioned("context", learned_null=learned_null, attention=attention)
    poisoned = args | {"context": args["context"].masked_fill(~MASK[..., None], poison)}
    out = model(**poisoned, context_mask=MASK)
    assert torch.equal(out, model(**args, context_mask=MASK))
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_dropped_values_have_no_effect():
    model, args = conditioned(*NAMES)
    row = torch.tensor([False, True, False])
    poisoned = {"vector": args["vector"].clone(), "context": args["context"].clone()}
    for value in poisoned.values():
        value[1] = float("nan")
    drop = {"vector": row, "context": row}
    assert torch.equal(model(**args | poisoned, drop=drop), model(**args, drop=drop))


# ---- residual hooks ------------------------------------------------------------------------------------------------


def record(module, into, output=False):
    """Append what the module gets first, or what it returns, to the list at each call."""
    if output:
        module.register_forward_hook(lambda m, args, out: into.append(out))
    else:
        module.register_forward_pre_hook(lambda m, args: into.append(args[0]))


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize("options", [{}, {"num_res_blocks": 2, "channel_mult": (1, 2, 3), "num_heads": 1}])
def test_residuals_are_added_to_the_skips(options, size):
    model = small(**options)
    args, pushed, popped = inputs(model.config, size=size), [], []
    for module in (model.input_conv, *model.encoder):
        record(module, pushed, output=True)
    for block in model.decoder:
        record(block, popped)
    plain = model(**args)
    skips = list(pushed)
    assert [s.shape[1] for s in skips] == [channels for _, channels in model.config.skip_levels]

    zeros = [torch.zeros_like(skip) for skip in skips]
    assert torch.equal(model(**args, skip_residuals=zeros), plain)

    popped.clear()
    residuals = [torch.randn_like(skip) for skip in skips]
    changed = model(**args, skip_residuals=residuals)
    assert relative_error(changed, plain) > 0.01
    for i, (skip, residual) in enumerate(zip(skips, residuals, strict=True)):
        assert_close(popped[-1 - i][:, -skip.shape[1] :], skip + residual)


def test_bottleneck_residual_is_added_to_its_output():
    model, residual = small(), torch.randn(2, 16, 4, 3)
    args = inputs(model.config)
    plain, changed = model(**args), model(**args, bottleneck_residual=residual)
    assert relative_error(changed, plain) > 0.01
    assert torch.equal(model(**args, bottleneck_residual=torch.zeros_like(residual)), plain)
    model.bottleneck[-1].register_forward_hook(lambda module, args, out: out + residual)
    assert_close(model(**args), changed)


def test_residuals_are_not_modified_and_get_gradients():
    model = small()
    residuals = [torch.randn(2, 8, 8, 6), torch.randn(2, 8, 8, 6), torch.randn(2, 8, 4, 3), torch.randn(2, 16, 4, 3)]
    given = [r.requires_grad_() for r in residuals]
    model(**inputs(model.config), skip_residuals=given).sum().backward()
    assert len(given) == 4
    assert all(r.grad.abs().max() > 0 for r in given)


def test_weights_of_classes_are_sums_of_embeddings():
    model = small(num_classes=4)
    args = inputs(model.config)
    hard = model(**args)
    assert_close(model(**args | {"class_labels": torch.eye(4)[args["class_labels"]]}), hard)
    half = torch.tensor([[0.5, 0.0, 0.5, 0.0]] * 2)
    both = small(num_classes=5)
    with torch.no_grad():
        both.load_state_dict(
            {
                name: torch.cat([p, p[:1] / 2 + p[2:3] / 2]) if name == "class_embedding.weight" else p
                for name, p in model.state_dict().items()
            }
        )
    assert_close(model(**args | {"class_labels": half}), both(**args | {"class_labels": torch.tensor([4, 4])}))
    with pytest.raises(ValueError, match=r"class_labels has shape \(2, 3\)"):
        model(**args | {"class_labels": half[:, :3]})


# ---- conditions of single published networks -----------------------------------------------------------------------


def test_time_cond_shifts_the_sinusoids():
    """As in diffusers' TimestepEmbedding: a projection is added before the first linear layer."""
    model = small(time_cond_dim=6)
    args, cond = inputs(model.config), torch.randn(2, 6)
    plain, shifted = model(**args), model(**args, time_cond=cond)
    assert relative_error(shifted, plain) > 1e-2
    peer = TimestepEmbedding(8, 32, cond_proj_dim=6)
    weights = {f"linear_{i}.{n}": p for i, m in ((1, 1), (2, 3)) for n, p in model.time_mlp[m].state_dict().items()}
    peer.load_state_dict(weights | {"cond_proj.weight": model.time_cond.weight})
    sinusoids = model.time_mlp[0](args["t"])
    assert_close(model.time_mlp(args["t"], model.time_cond(cond)), peer(sinusoids, cond))
    with pytest.raises(ValueError, match="time_cond was given, but this network has time_cond_dim=None"):
        small()(**inputs(small().config), time_cond=cond)
    with pytest.raises(ValueError, match=r"time_cond has shape \(2, 5\)"):
        model(**args, time_cond=torch.randn(2, 5))


def test_only_cross_attention_sees_no_other_position():
    """Without self-attention, one transformer block acts on each position alone."""
    for cross_only in (False, True):
        block = randomise(TransformerBlock(8, 2, 6, cross_only))
        tokens, context = torch.randn(1, 5, 8), Context(torch.randn(1, 3, 6))
        changed = tokens.clone()
        changed[:, 0] = torch.randn(8)  # adding a constant would be taken away by the norm
        moved = (block(changed, context) - block(tokens, context)).abs().amax(-1)[0]
        assert (moved[1:].max() < 1e-5) == cross_only
        assert moved[0] > 1e-2


@pytest.mark.parametrize("given", [(), ("class_labels",), ("vector", "context"), ("context",), ("time_cond",), EVERY])
@pytest.mark.parametrize("attention", ["plain", "transformer"])
def test_every_parameter_gets_a_gradient_whatever_is_given(given, attention):
    """DistributedDataParallel waits for all of them."""
    model = small(**CONDITIONS, time_cond_dim=4, attention=attention)
    args = inputs(model.config) | {"time_cond": torch.ones(2, 4)}
    args = {name: value for name, value in args.items() if name in ("x", "t", *given)}
    out = model(**args)
    out.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        assert relative_error(out, model(**args)) < 1e-6
        if "class_labels" in given:
            model.null_class.fill_(torch.nan)  # not used, so without effect
            assert relative_error(out, model(**args)) < 1e-6
    if "class_labels" in given:
        assert relative_error(out, model(**args)) < 1e-6
