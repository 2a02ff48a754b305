"""Properties that hold for every configuration, drawn by hypothesis from the whole option space at tiny sizes."""

from math import prod

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from support.network_draws import (
    CONDITIONS,
    calls,
    check_batch_independence,
    check_gradients,
    check_saved_and_loaded,
    configs,
)
from unet_denoiser import CrossAttention, SelfAttention
from unet_denoiser.models.layers.attention import ContextAttention, SpatialTransformer, TransformerBlock

checked = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow], database=None
)

costly = settings(checked, max_examples=20)


@checked
@given(calls(configs()))
def test_forward_and_backward_are_finite(call):
    check_gradients(*call)


def unused_parameters(model, args):
    """Ids of the parameters that cannot change the output of this call.

    A key's bias never does, as softmax ignores what is common to all scores; nor do queries and keys for a single
    token, or copies of one; nor embeddings of absent conditions and nulls that are not used.
    """
    found, none = [], torch.zeros(len(args["t"]), dtype=torch.bool)
    dropped = {name: ~none if name not in args else args.get("drop", {}).get(name, none) for name in CONDITIONS}
    if "context" in args:
        visible = (
            args.get("context_mask", torch.ones(args["context"].shape[:2])).sum(1).masked_fill(dropped["context"], 0)
        )
        dropped["context"] = visible == 0
    one_token = "context" not in args or visible.max() < 2
    for name, embedding, null in (
        ("class_labels", model.class_embedding, model.null_class),
        ("vector", model.vector_embedding, model.null_vector),
        ("context", None, model.null_context),
    ):
        found += [embedding] if embedding is not None and dropped[name].all() else []
        found += [null] if null is not None and not dropped[name].any() else []

    for module in model.modules():
        if isinstance(module, SelfAttention) and module.single:
            found += [module.attn.to_q, module.attn.to_k]
        if isinstance(module, SpatialTransformer) and module.single:
            found += [m for block in module.transformer_blocks for m in (block.attn1.to_q, block.attn1.to_k)]
        if isinstance(module, ContextAttention) and one_token:
            found += [module.norm, module.attn.to_q, module.attn.to_k]
        if isinstance(module, TransformerBlock) and one_token and model.config.context_dim:
            found += [module.norm2, module.attn2.to_q, module.attn2.to_k]
        if isinstance(module, CrossAttention) and module.to_k.bias is not None:
            found.append(module.to_k.bias)
    return {id(p) for m in found for p in (m.parameters() if isinstance(m, nn.Module) else [m])}


def record_shapes(model):
    """Mark attention with a single token as `single`, and list the groups (channels, values) of all norms."""
    groups = []

    def see(module, args, out):
        positions = prod(args[0].shape[2:])
        if isinstance(module, nn.GroupNorm):
            channels = module.num_channels // module.num_groups
            groups.append((channels, channels * positions))
        elif isinstance(module, nn.LayerNorm):
            groups.append(module.normalized_shape * 2)
        else:
            module.single = positions == 1

    for module in model.modules():
        if isinstance(module, SelfAttention | SpatialTransformer | nn.GroupNorm | nn.LayerNorm):
            module.register_forward_hook(see)
    return groups


@checked
@given(calls(configs(norm_groups=st.integers(1, 2))))
def test_every_used_parameter_gets_a_gradient(call):
    model, args = call
    assume(model.config.learned_null or "context_mask" not in args or args["context_mask"].any())  # else all is zeros
    groups, model = record_shapes(model), model.double()  # so that zero and not zero are far apart
    out = model(**{k: v.double() if k != "drop" and v.is_floating_point() else v for k, v in args.items()})
    # a norm over one value gives zero, over two plus and minus one; and over one channel it removes what is added to it
    assume(all(channels > 1 and values > 3 for channels, values in groups))
    (out * torch.randn_like(out)).sum().backward()
    exempt = unused_parameters(model, args)
    for name, p in model.named_parameters():
        largest = 0 if p.grad is None else p.grad.abs().max()
        assert (largest > 1e-9) == (id(p) not in exempt), (name, largest)


@costly
@given(calls(configs()))
def test_saving_and_loading_change_nothing(call):
    check_saved_and_loaded(*call)


@checked
@given(calls(configs()))
def test_each_sample_is_independent_of_its_batch(call):
    check_batch_independence(*call)


@checked
@given(calls(configs(dims=st.sampled_from([2, 3]))))
def test_channels_last_equals_contiguous(call):
    model, args = call
    last = torch.channels_last if model.config.dims == 2 else torch.channels_last_3d
    with torch.no_grad():
        expected = model(**args)
        out = model.to(memory_format=last)(**args | {"x": args["x"].contiguous(memory_format=last)})
    assert_close(out, expected, rtol=1e-3, atol=1e-4)


@costly
@given(calls(configs()))
def test_gradient_checkpointing_changes_nothing(call):
    model, args = call
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(**args).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.enable_gradient_checkpointing()
    assert_close(*grads)
