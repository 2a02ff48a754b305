"""Networks and their arguments, drawn by hypothesis from all options at tiny sizes, and what holds for every one."""

import copy
import tempfile

import torch
from hypothesis import strategies as st
from torch.testing import assert_close

from support.networks import inputs, randomise
from unet_denoiser import UNet, UNetConfig

CONDITIONS = {"class_labels": "num_classes", "vector": "vector_dim", "context": "context_dim"}
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


def check_gradients(model, args):
    """Check the shape of the output, and that output and gradients are finite."""
    out = model.train()(**args)
    assert out.shape == (len(args["t"]), model.config.out_channels, *args["x"].shape[2:])
    assert out.isfinite().all()
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def check_saved_and_loaded(model, args):
    """Check that a saved and loaded network has the same configuration and output."""
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        model.save_pretrained(directory)
        loaded = UNet.from_pretrained(directory)
        assert loaded.config == model.config
        assert_close(loaded(**args), model(**args))
        copied = UNet.from_config(loaded.config).eval()  # the file's tensors lie elsewhere in memory's lines, which
        copied.load_state_dict(loaded.state_dict())  # costs the last bit; their values are the same to the bit
        assert torch.equal(copied(**args), model(**args))


def check_batch_independence(model, args):
    """Check that each sample's output is the one that it has alone: in float64, and in float32 as far as that rounds.

    A norm over two values makes large differences of small ones, so float32 has no bound of its own.
    """
    wide = {k: v.double() if k != "drop" and v.is_floating_point() else v for k, v in args.items()}
    with torch.no_grad():
        exact, exact_alone = run_alone(copy.deepcopy(model).double(), wide)
        assert_close(exact_alone, exact, rtol=1e-7, atol=1e-8)
        out, alone = run_alone(model, args)
        rounding = (out - exact).abs().max().item()
        assert_close(alone, out, rtol=1e-3, atol=1e-4 + 20 * rounding)


def run_alone(network, args):
    """Return the output for a batch, and that of its samples one by one."""
    alone = []
    for i in range(len(args["t"])):
        row = {name: value[i : i + 1] for name, value in args.items() if name != "drop"}
        row["drop"] = {name: mask[i : i + 1] for name, mask in args.get("drop", {}).items()}
        alone.append(network(**row))
    return network(**args), torch.cat(alone)
