"""Engines of sampling: each step beside the network's own, for any size, and what is kept on disk."""

import pytest
import torch

from support.networks import CONDITIONS, relative_error, small
from unet_denoiser.export.engines import Engines, release_engines
from unet_denoiser.models.conditions import Conditions


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache, monkeypatch):
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(cache))
    yield
    release_engines()


def steps(model, batch, size, tokens=4):
    """Return inputs and outputs of all steps, the outputs by the network itself."""
    x, t = torch.randn(batch, 3, *size), torch.full((batch,), 300)
    given = Conditions()
    if model.config.context_dim:
        mask = torch.arange(tokens) < torch.arange(1, batch + 1)[:, None]
        given = Conditions(torch.arange(batch), torch.randn(batch, 3), torch.randn(batch, tokens, 6), mask)
    with torch.no_grad():
        added, attended = model.embed_conditions(batch, given, {})
        emb = sum(added, start=model.embed_time(t))
        skips = model.encode_shallow(x, emb, attended)
        deep = model.deep_features(skips[-1], emb, attended)
        out = model.decode_shallow(deep, skips, emb, attended)
    inputs = {"x": x, "emb": emb}
    return inputs | ({"tokens": attended.tokens, "mask": attended.mask} if attended else {}), out, deep


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_step_equals_the_networks_for_any_batch(name):
    model = small(**CONDITIONS)
    engines = Engines(model, name, "float32")
    for batch, tokens in ((2, 4), (1, 1), (5, 6)):
        inputs, out, _ = steps(model, batch, (7, 5), tokens)
        (found,) = engines("full", inputs)
        assert relative_error(found, out) < 1e-5


def test_the_parts_of_reuse_equal_the_networks():
    model = small()
    engines = Engines(model, "openvino", "float32")
    inputs, out, deep = steps(model, 2, (2, 3))  # one position at the coarsest level
    found, features = engines("full_deep", inputs)
    assert relative_error(found, out) < 1e-5
    assert relative_error(features, deep) < 1e-5
    (found,) = engines("shallow", inputs | {"deep": deep})
    assert relative_error(found, out) < 1e-5


def test_a_process_finds_what_another_converted_and_new_weights_are_converted_anew(monkeypatch):
    model = small()
    inputs = {"x": torch.randn(2, 3, 8, 8), "emb": torch.randn(2, model.config.time_dim)}
    (first,) = Engines(model, "openvino", "float32")("full", inputs)
    release_engines()
    converted = []
    monkeypatch.setattr(Engines, "_convert", lambda self, *args: converted.append(args))
    (again,) = Engines(small(), "openvino", "float32")("full", inputs)
    assert torch.equal(first, again)
    assert not converted
    with pytest.raises(RuntimeError):  # there is no file, as nothing converts it
        Engines(small(seed=1), "openvino", "float32")("full", inputs)
    assert len(converted) == 1


def test_outputs_have_memory_of_their_own():
    model = small()
    engines, emb = Engines(model, "openvino", "float32"), torch.randn(2, model.config.time_dim)
    (first,) = engines("full", {"x": torch.randn(2, 3, 8, 8), "emb": emb})
    kept = first.clone()
    engines("full", {"x": torch.randn(2, 3, 8, 8), "emb": emb})
    release_engines()
    assert torch.equal(first, kept)


def test_other_precisions_and_missing_libraries_are_refused(monkeypatch):
    with pytest.raises(
        ValueError, match=r"backend='openvino' runs networks in float32 on a CPU; this one is in torch.b"
    ):
        Engines(small().bfloat16(), "openvino", "float32")
    monkeypatch.setattr("unet_denoiser.export.libraries.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"backend='onnxruntime' needs onnxruntime: pip install 'unet-denoiser\[ex"):
        Engines(small(), "onnxruntime", "float32")
