"""The cached U-Net: shallow and deep parts, embeddings computed once, forecast features, compiling."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from support.networks import CONDITIONS, inputs, randomise, small
from unet_denoiser import Diffusion, UNet
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.layers.attention import CrossAttention
from unet_denoiser.models.layers.rules import plain_convolutions
from unet_denoiser.sampling import cached_unet as module
from unet_denoiser.sampling.cached_unet import CachedUNet, make_cached_unet
from unet_denoiser.sampling.loop import sample

KINDS = [
    {"num_classes": 5, "vector_dim": 3},
    CONDITIONS,
    CONDITIONS | {"attention": "transformer", "only_cross_attention": True},
]


def given(model, batch=3):
    """Return x, t and conditions, some of them dropped, with masked tokens."""
    args = inputs(model.config, batch)
    x, t = args.pop("x"), args.pop("t")
    if "context" in args:
        args["context_mask"] = torch.tensor([[True, True, False], [True] * 3, [False] * 3])[:batch]
    args["drop"] = {name: torch.arange(batch) == 1 for name in args if name != "context_mask"}
    return x, t, args


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_shallow_and_deep_parts_make_the_network_at_every_depth(options, size):
    model = small(**options, channel_mult=(1, 2, 2))
    args = inputs(model.config, size=size)
    x, t, conditions = args.pop("x"), args.pop("t"), args
    with torch.no_grad():
        expected = model(x, t, **conditions)
        added, context = model.embed_conditions(2, Conditions(**conditions), {})
        emb = sum(added, start=model.embed_time(t))
        for depth in range(1, len(model.decoder)):
            skips = model.encode_shallow(x, emb, context, depth)
            deep = model.deep_features(skips[-1], emb, context, depth)
            assert torch.equal(model.decode_shallow(deep, skips, emb, context), expected)


@pytest.mark.parametrize("options", KINDS)
def test_cached_unet_equals_the_network(options):
    model = small(**options, time_cond_dim=2)
    x, t, conditions = given(model)
    with torch.no_grad():
        for extra in ({}, {"time_cond": torch.randn(3, 2)}):
            for fast in (CachedUNet(model), CachedUNet(model, torch.cat([t, torch.arange(5), t]))):
                expected = model(x, t, **conditions, **extra)
                torch.testing.assert_close(fast(x, t, **conditions, **extra), expected, rtol=0, atol=2e-6)


def test_refuses_unknown_conditions():
    with pytest.raises(ValueError, match="class_labels was given"):
        CachedUNet(small())(torch.randn(1, 3, 8, 8), torch.zeros(1), class_labels=torch.tensor([1]))


def count_calls(monkeypatch, kind, name):
    calls, method = [], getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, *args: (calls.append(self), method(self, *args))[1])
    return calls


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("attention", ["plain", "transformer"])
def test_keys_and_values_and_embeddings_are_computed_once(monkeypatch, attention, guidance_scale):
    model = small(context_dim=6, num_classes=5, attention=attention)
    layers = [m for m in model.modules() if isinstance(m, CrossAttention) and m.to_k.in_features == 6]
    projected, embedded = count_calls(monkeypatch, CrossAttention, "keys_and_values"), []
    times, labels = (model.time_mlp.register_forward_hook, model.class_embedding.register_forward_hook)
    times(lambda module, args, out: embedded.append(("time", len(args[0]))))
    labels(lambda module, args, out: embedded.append(("class", len(args[0]))))
    conditions = {"context": torch.randn(2, 3, 6), "class_labels": torch.tensor([1, 2])}
    options = {"num_inference_steps": 6, "guidance_scale": guidance_scale}
    sample(model, Diffusion(), seeds=[0, 1], sampler="ddim", **options, **conditions)
    assert sorted(map(id, layers)) == sorted(id(m) for m in projected if m in layers)
    assert embedded == [("time", 6), ("class", 2 if guidance_scale == 1 else 4)]


def bottleneck_calls(model, **options):
    """Return the indices of the network calls that computed the deep features, and the number of calls."""
    calls, deep = [0], []
    hooks = [
        model.output.register_forward_hook(lambda *args: calls.append(0)),
        model.bottleneck[0].register_forward_hook(lambda *args: deep.append(len(calls) - 1)),
    ]
    sample(model, Diffusion(), seeds=[0], image_size=4, **options)
    for hook in hooks:
        hook.remove()
    return deep, len(calls) - 1


@pytest.mark.parametrize(
    ("sampler", "steps", "reuse", "expected"),
    [
        ("ddim", 20, None, list(range(20))),
        ("ddim", 20, 1, list(range(20))),
        ("ddim", 20, 5, [0, 1, 6, 11, 16, 19]),
        ("dpm++", 25, 4, [0, 1, 2, 6, 10, 14, 18, 22, 24]),
        ("heun", 10, 4, [0, 1, 5, 9, 13, 17, 18]),
        ("ddim", 3, 8, [0, 2]),
    ],
)
def test_which_calls_compute_the_deep_features(sampler, steps, reuse, expected):
    deep, calls = bottleneck_calls(small(), sampler=sampler, num_inference_steps=steps, reuse=reuse)
    assert (deep, calls) == (expected, expected[-1] + 1)


@pytest.mark.parametrize("options", [{}, {"sampler": "ddpm"}, {"guidance_scale": 2.0}])
def test_reuse_of_one_equals_none(options):
    model = small(num_classes=5)
    both = [
        sample(
            model, Diffusion(), seeds=[3, 4], num_inference_steps=8, class_labels=torch.arange(2), reuse=n, **options
        )
        for n in (None, 1)
    ]
    assert torch.equal(*both)


def test_features_on_a_line_are_forecast_exactly(monkeypatch):
    """Where deep features change by the same amount in every call, reuse makes no difference."""
    model = small()
    base, slope = torch.randn(2, 1, 8, 8, 8)
    calls = []
    monkeypatch.setattr(
        UNet, "deep_features", lambda self, h, *args: base + (len(calls) - 1) * slope if h is not None else h
    )
    fast = CachedUNet(model, torch.arange(30), reuse=4)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([5])
    with torch.no_grad():
        emb = model.embed_time(t)
        for i in range(30):
            calls.append(i)
            out, skips = fast(x, t), model.encode_shallow(x, emb, None)
            if i >= 7:  # by then there are two that are apart
                expected = model.decode_shallow(base + i * slope, skips, emb, None)
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_reuse_converges_to_the_full_computation_with_the_steps():
    """The forecast's error falls faster than linearly with the distance of the calls."""
    model = small(seed=1)
    with torch.no_grad():  # trained networks do not heed that the time's fast sinusoids turn many times in a step
        model.time_mlp[1].weight[:, [0, 1, 4, 5]] = 0
    error = {}
    for steps in (25, 100):
        full, fast = (
            sample(
                model,
                Diffusion(),
                seeds=range(4),
                num_inference_steps=steps,
                sampler="ddim",
                reuse=n,
                clip_sample=False,
            )
            for n in (None, 3)
        )
        error[steps] = (full - fast).square().mean().sqrt().item()
    assert 0 < error[100] < error[25] / 4


def test_other_batches_have_their_features_computed():
    """As where a guidance interval begins or ends: the conditional half alone, both halves, then alone again."""
    model = small(num_classes=5)
    fast = CachedUNet(model, torch.arange(99), reuse=50)
    fast.warm_up = 0
    x, one = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    both, drop = torch.cat([one, one]), {"class_labels": torch.tensor([False, False, True, True])}
    with torch.no_grad():
        for t in (9, 8):
            t = torch.full((2,), t)
            alone = model(x, t, class_labels=one)
            doubled = model(torch.cat([x, x]), torch.cat([t, t]), class_labels=both, drop=drop)
            for _ in range(2):
                assert torch.allclose(fast(x, t, class_labels=one), alone, atol=1e-6)
            for _ in range(2):
                out = fast(torch.cat([x, x]), torch.cat([t, t]), class_labels=both, drop=drop)
                assert torch.allclose(out, doubled, atol=1e-6)


@pytest.mark.parametrize("reuse", [None, 3])
@pytest.mark.parametrize("sampler", ["dpm++", "ddpm"])
def test_samples_do_not_depend_on_the_batch(reuse, sampler):
    """Batches of 1, 3 and 64, with guidance; in the largest, wide layers go through Winograd's filtering."""
    model = randomise(UNet(**SEEDS)).eval()
    with torch.no_grad():
        model.output[-1].weight *= 0.5  # outputs of the size that trained networks have
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "sampler": sampler, "reuse": reuse}
    labels = torch.arange(64) % 3

    def some(count, batch_size):
        seeds = range(100, 100 + count)
        return sample(model, Diffusion(), seeds=seeds, batch_size=batch_size, class_labels=labels[:count], **options)

    whole = some(64, 64)
    for batch_size in (1, 3):
        torch.testing.assert_close(some(4, batch_size), whole[:4], rtol=0, atol=1e-5)
    with plain_convolutions():
        assert not torch.equal(some(64, 64), whole)  # the filtering was used


SEEDS = {
    "model_channels": 128,
    "channel_mult": (1,),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "num_heads": 4,
    "context_dim": None,
    "num_classes": 3,
    "image_size": 8,
}


def test_compiled_entry_points_give_the_same_samples(monkeypatch):
    monkeypatch.setattr(module, "_compile", lambda part, graphs: torch.compile(part, backend="eager", fullgraph=True))
    model = small(num_classes=5, channel_mult=(1,))
    options = {"seeds": [0, 1], "num_inference_steps": 7, "class_labels": torch.arange(2), "reuse": 3}
    plain = sample(model, Diffusion(), **options)
    torch.testing.assert_close(sample(model, Diffusion(), compile=True, **options), plain, rtol=0, atol=1e-5)


def test_warns_and_continues_without_a_compiler(monkeypatch):
    from torch._dynamo.exc import BackendCompilerFailed

    tried = []

    def fail(*args):
        tried.append(args)
        raise BackendCompilerFailed("inductor", RuntimeError("no C++ compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda function, mode: fail)
    module._compile.cache_clear()
    model, options = small(), {"seeds": [0, 1, 2], "num_inference_steps": 6, "reuse": 3}
    with pytest.warns(UserWarning, match="compile=True: torch.compile fails here, going on without it: .*no C.. comp"):
        compiled = sample(model, Diffusion(), compile=True, batch_size=1, **options)
    module._compile.cache_clear()
    assert len(tried) == 2  # once for each entry point, not in every call
    assert torch.equal(compiled, sample(model, Diffusion(), batch_size=1, **options))


@pytest.mark.parametrize(("device", "graphs"), [("cpu", False), ("cuda", True), ("mps", False)])
def test_a_gpu_compiles_to_cuda_graphs(monkeypatch, device, graphs):
    seen = []
    monkeypatch.setattr(module, "_compile", lambda part, graphs: seen.append((part, graphs)))
    monkeypatch.setattr(UNet, "device", torch.device(device))
    make_cached_unet(small(), compile=True)
    make_cached_unet(small())
    assert seen == [(module._run_full, graphs), (module._run_shallow, graphs)]
    with ThreadPoolExecutor(1) as pool:  # where some versions of torch cannot use them
        pool.submit(make_cached_unet, small(), compile=True).result()
    assert seen[2:] == [(module._run_full, False), (module._run_shallow, False)]


def test_outputs_of_cuda_graphs_outlive_the_next_replay(monkeypatch):
    """A replay writes to the memory of the one before, as this stand-in does."""
    memory = torch.zeros(2, 3)
    modes = []

    def compiled(function, mode):
        modes.append(mode)
        return lambda value: (memory[0].fill_(value), memory[1].fill_(-value))

    monkeypatch.setattr(torch, "compile", compiled)
    module._compile.cache_clear()
    call = module._compile(module._run_full, True)
    first, second = call(1.0), call(2.0)
    module._compile.cache_clear()
    assert modes == ["reduce-overhead"]
    assert [t.tolist() for t in (*first, *second)] == [[1.0] * 3, [-1.0] * 3, [2.0] * 3, [-2.0] * 3]


def test_hooked_networks_are_called_as_they_are():
    model, seen = small(), []
    model.register_forward_hook(lambda *args: seen.append(0))
    sample(model, Diffusion(), seeds=[0], num_inference_steps=3)
    assert len(seen) == 3
    for options in ({"reuse": 3}, {"compile": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.* needs a UNet with its own forward"):
            make_cached_unet(model, **options)


def test_a_subclass_with_another_forward_is_called_as_it_is():
    class Constant(UNet):
        def forward(self, x, t, **conditions):
            return torch.zeros_like(x)

    network = Constant.from_config(small().config)
    assert make_cached_unet(network)(torch.ones(1, 3, 8, 8), torch.tensor([5])).abs().max() == 0


def test_self_conditioning_variance_and_concat_go_with_reuse():
    process = Diffusion(self_conditioning=True, variance_type="learned_range")
    model = small(in_channels=8, out_channels=6, num_classes=5)
    options = {"seeds": range(4), "concat": torch.randn(4, 2, 8, 8), "class_labels": torch.arange(4)}
    options |= {"num_inference_steps": 12, "guidance_scale": 2.0, "guided": ["class_labels"], "reuse": 3}
    whole = sample(model, process, **options)
    alone = sample(model, process, batch_size=1, **options)
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)


def test_refuses_reuse_below_one():
    with warnings.catch_warnings(), pytest.raises(ValueError, match="reuse=0 must be at least 1"):
        sample(small(), Diffusion(), seeds=[0], reuse=0)
