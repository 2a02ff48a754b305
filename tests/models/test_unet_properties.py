"""Properties that hold for every configuration, drawn by hypothesis from the whole option space at tiny sizes."""

import tempfile
from math import prod

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from support.networks import inputs, randomise
from unet_denoiser import CrossAttention, SelfAttention, UNet, UNetConfig
from unet_denoiser.models.layers.attention import ContextAttention, SpatialTransformer, TransformerBlock

CONDITIONS = {"class_labels": "num_classes", "vector": "vector_dim", "context": "context_dim"}
checked = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow], database=None
)

costly = settings(checked, max_examples=20)


ANY_DIMS, ANY_GROUPS = st.integers(1, 3), st.sampled_from([1, 2, 3, 5, 32])


@st.composite
def configs(draw, dims=ANY_DIMS, norm_groups=ANY_GROUPS):
    one_of = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    levels, width = draw(st.integers(1, 3)), draw(st.integers(2, 11))
    dims = draw(dims)
    mult = tuple(one_of(1, 2, 3, *([1.5, 0.5] if width % 2 == 0 else [])) for _ in range(levels))
    widths = [int(m * width) for m in mult]
    size = draw(st.integers(1, 9) | st.tuples(*[st.integers(1, 9)] * dims))
    longest = max(size) if isinstance(size, tuple) else size
    resolutions = [-(-longest // 2**level) for level in range(levels)]
    divisors = tuple(one_of(*[d for d in range(1, w + 1) if w % d == 0]) for w in widths)
    common = one_of(*[d for d in range(1, min(widths) + 1) if all(w % d == 0 for w in widths)])
    heads, attention = one_of(divisors, common), one_of("plain", "transformer")
    by_number = draw(st.booleans())
    depths = st.integers(1, 2) | st.tuples(*[st.integers(1, 2)] * levels)
    optional = st.sampled_from([None, 1, 2, 3, 5])
    return UNetConfig(
        in_channels=draw(st.integers(1, 5)),
        model_channels=width,
        out_channels=draw(st.integers(1, 5)),
        num_res_blocks=draw(st.integers(1, 2)),
        attention_resolutions=tuple(draw(st.sets(st.sampled_from(resolutions)))),
        channel_mult=mult,
        num_heads=heads if by_number else None,
        head_dim=None if by_number else heads,
        context_dim=draw(optional),
        image_size=size,
        dims=dims,
        num_classes=draw(optional),
        vector_dim=draw(optional),
        learned_null=draw(st.booleans()),
        attention=attention,
        transformer_depth=draw(depths) if attention == "transformer" else 1,
        modulation=one_of("add", "scale_shift"),
        downsample=one_of("conv", "conv_asymmetric", "avgpool", "resblock"),
        upsample=one_of("conv_transpose", "nearest", "resblock"),
        norm_groups=draw(norm_groups),
        norm_eps=one_of(1e-5, 1e-6, 1e-2),
        dropout=one_of(0.0, 0.2),
        time_frequencies=one_of("endpoint", "half"),
    )


@st.composite
def calls(draw, configs, smallest=1):
    """A network with random weights, and arguments for it: conditions given, left out, masked and dropped."""
    config = draw(configs)
    batch, seed = draw(st.integers(1, 3)), draw(st.integers(0, 99))
    args = inputs(config, batch, draw(st.tuples(*[st.integers(smallest, 7)] * config.dims)), seed)
    if draw(st.booleans()):
        args["t"] = args["t"] + 0.25
    if config.learned_null:
        for name in sorted(args.keys() & CONDITIONS.keys()):
            if draw(st.booleans()):
                del args[name]
    rows = st.lists(st.booleans(), min_size=batch, max_size=batch).map(torch.tensor)
    if "context" in args and draw(st.booleans()):
        args["context_mask"] = torch.stack([draw(rows) for _ in range(args["context"].shape[1])], dim=1)
    if config.learned_null:
        args["drop"] = {name: draw(rows) for name in CONDITIONS if name in args and draw(st.booleans())}
    return randomise(UNet.from_config(config), seed).eval(), args


@checked
@given(calls(configs()))
def test_forward_and_backward_are_finite(call):
    model, args = call
    out = model.train()(**args)
    assert out.shape == (len(args["t"]), model.config.out_channels, *args["x"].shape[2:])
    assert out.isfinite().all()
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


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
    model, args = call
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        model.save_pretrained(directory)
        loaded = UNet.from_pretrained(directory)
        assert loaded.config == model.config
        assert_close(loaded(**args), model(**args))
        copied = UNet.from_config(loaded.config).eval()  # the file's tensors lie elsewhere in memory's lines, which
        copied.load_state_dict(loaded.state_dict())  # costs the last bit; their values are the same to the bit
        assert torch.equal(copied(**args), model(**args))


@checked
@given(calls(configs()))
def test_each_sample_is_independent_of_its_batch(call):
    model, args = call
    with torch.no_grad():
        out = model(**args)
        for i in range(len(out)):
            row = {name: value[i : i + 1] for name, value in args.items() if name != "drop"}
            row["drop"] = {name: mask[i : i + 1] for name, mask in args.get("drop", {}).items()}
            assert_close(model(**row)[0], out[i], rtol=1e-3, atol=1e-4)


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
