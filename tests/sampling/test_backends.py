"""Sampling in engines beside torch: samplers, guidance, editing, reuse; and what "auto" takes."""

from functools import partial

import pytest
import torch

from support.networks import CONDITIONS, small
from unet_denoiser import Diffusion, SamplingConfig, image_to_image, inpaint, interpolate, sample
from unet_denoiser.config.distillation import DistillationConfig
from unet_denoiser.sampling import backends
from unet_denoiser.sampling.calibration import calibrate

CLOSE = {"rtol": 0, "atol": 2e-4}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache, monkeypatch):
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(cache))


def network(**options):
    model = small(**options)
    model.output[2].weight.data.mul_(0.3)
    return model


def both(backend, task=sample, **options):
    """Return samples by torch and by a backend."""
    given = {"num_inference_steps": 4, "batch_size": 2} | options
    return [task(backend=name, **given) for name in ("torch", backend)]


def test_samples_are_torchs_with_guidance_and_a_last_batch_that_is_smaller():
    model, context = network(**CONDITIONS), torch.randn(3, 2, 6)
    given = {"class_labels": [0, 1, 2], "vector": torch.randn(3, 3), "context": context, "guidance_scale": 2.0}
    negative = {"context": torch.randn(3, 4, 6)}
    options = {"model": model, "process": Diffusion(), "seeds": range(3), "negative": negative}
    for sampler in ("dpm++", "ddpm", "heun"):
        wanted, found = both("openvino", **options, **given, sampler=sampler)
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert wanted.std() > 0.1


def test_onnxruntime_too_and_weights_of_classes():
    labels = torch.tensor([[0.5, 0.5, 0, 0, 0]])
    options = {"model": network(num_classes=5), "process": Diffusion(path="flow"), "seeds": [3], "class_labels": labels}
    wanted, found = both("onnxruntime", **options, image_size=(7, 9))
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_reuse_runs_both_entry_points(sampler):
    options = {"model": network(), "process": Diffusion(), "seeds": [0], "sampler": sampler}
    wanted, found = both("openvino", **options, num_inference_steps=12, reuse=3)
    torch.testing.assert_close(found, wanted, **CLOSE)
    exact = sample(**options, num_inference_steps=12)
    assert (wanted - exact).abs().max() > 1e-3


def test_editing_interpolation_and_autoguidance():
    model, image, process = network(), torch.rand(1, 3, 8, 8) * 2 - 1, Diffusion()
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 4:] = True
    tasks = (
        partial(image_to_image, model, process, image, strength=0.6, seeds=[0]),
        partial(inpaint, model, process, image, mask, seeds=[0], sampler="ddim", resample=2),
        partial(interpolate, model, process, seeds=(0, 1), count=3),
        partial(sample, model, process, seeds=[1], guide=network(seed=1), guidance_scale=1.5),
    )
    for task in tasks:
        wanted, found = (task(num_inference_steps=5, backend=name) for name in ("torch", "openvino"))
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_a_student_samples_by_it():
    process = Diffusion().distilled(DistillationConfig(num_steps=2, guidance_scale=(1.0, 3.0), teacher_steps=4))
    options = {"model": network(time_cond_dim=8), "process": process, "seeds": [0], "num_inference_steps": 2}
    options |= {"sampler": "ddim", "clip_sample": False, "guidance_scale": 1.5}
    wanted, found = both("openvino", **options)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4 * wanted.abs().max())


@pytest.mark.slow
def test_int8_is_near():
    options = {"model": network(model_channels=16), "process": Diffusion(), "seeds": [0, 1]}
    options |= {"num_inference_steps": 4}
    wanted = sample(**options)
    found = sample(**options, backend="openvino", backend_precision="int8")
    rms = (found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert 1e-4 < rms < 0.15


def test_calibration_visits_every_noise_level():
    model, process = network(num_classes=5), Diffusion()
    recorded = calibrate(model, process, (8, 8), count=4)
    times = torch.cat([call.t for call in recorded.calls])
    assert (times.min(), times.max()) == (0, 999)
    assert recorded.samples.abs().max() <= 1
    assert all(call.drop["class_labels"].tolist() == [False, True, False, True] for call in recorded.calls)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorrt"}, "backend='tensorrt' is not one of"),
        ({"backend": "openvino", "compile": True}, "compile=True compiles for torch, not for backend='openvino'"),
        ({"backend_precision": "int8"}, "backend_precision='int8' needs backend='openvino', not 'torch'"),
        ({"backend": "onnxruntime", "backend_precision": "bfloat16"}, "needs backend='openvino', not 'onnxruntime'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


def test_a_network_with_its_own_forward_is_refused_by_the_backends_name():
    model = network()
    model.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="backend=openvino needs a UNet with its own forward"):
        sample(model, Diffusion(), seeds=[0], num_inference_steps=2, backend="openvino")


def test_auto_takes_openvino_where_it_pays_and_says_so(monkeypatch, capsys):
    options = {"model": network(), "process": Diffusion(), "seeds": range(2), "num_inference_steps": 4}
    wanted = sample(**options)
    asked = sample(**options, backend="auto")  # milliseconds
    assert torch.equal(asked, wanted)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(backends, "_measure_call", lambda *args: 100.0)
    found = sample(**options, backend="auto")
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert not torch.equal(found, wanted)
    assert capsys.readouterr().err == "backend: openvino, which saves some 400 s here\n"
    monkeypatch.setattr(backends, "is_installed", lambda name: False)
    assert torch.equal(sample(**options, backend="auto"), wanted)


def test_auto_stays_with_torch_for_wide_networks_and_large_batches():
    assert backends.saved_share(128, 16) == 0
    assert backends.saved_share(32, 1) > backends.saved_share(32, 16) > 0
