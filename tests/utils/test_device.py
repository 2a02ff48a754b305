"""What is chosen for a device: precision of a training, TF32."""

import pytest
import torch

from support.networks import small
from support.trainings import make_trainer
from unet_denoiser import Diffusion, sample
from unet_denoiser.utils.device import allow_tf32, default_precision, has_bfloat16

MATMUL = torch.backends.cuda.matmul


@pytest.fixture
def precision():
    """The precision of a GPU's matrix products, as a new process has it before and after."""
    assert MATMUL.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "none"
    yield lambda: MATMUL.fp32_precision
    MATMUL.allow_tf32 = False
    MATMUL.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


def pretend(monkeypatch, available, bfloat16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)


@pytest.mark.parametrize("available", [False, True])
@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_other_devices_than_gpus_train_in_float32(monkeypatch, device, available):
    pretend(monkeypatch, available, True)
    assert default_precision(device) == "no"


def test_a_gpu_trains_in_bfloat16_if_it_computes_in_it(monkeypatch):
    for available, bfloat16, expected in ((True, True, "bf16"), (True, False, "no"), (False, False, "bf16")):
        pretend(monkeypatch, available, bfloat16)
        assert default_precision("cuda") == expected  # without a GPU it is an estimate for another machine's


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_begins_with_compute_capability_8(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device=None: type("", (), {"major": capability[0]})()
    )
    assert has_bfloat16() is expected


def test_tf32_is_for_the_products_of_a_gpu_alone(precision):
    a = torch.randn(64, 64)
    before = a @ a
    allow_tf32("cpu")
    assert precision() == "none"
    allow_tf32("cuda")
    assert precision() == "tf32"
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    assert torch.equal(a @ a, before)
    # what torch.compile reads; it raises if only the newer setting was changed
    assert (MATMUL.allow_tf32, torch.get_float32_matmul_precision()) == (True, "high")


@pytest.mark.parametrize("choice", ["allow_tf32", "set_float32_matmul_precision"])
def test_a_precision_that_was_chosen_stays(precision, choice):
    if choice == "allow_tf32":
        MATMUL.allow_tf32 = False
    else:
        torch.set_float32_matmul_precision("highest")
    allow_tf32("cuda")
    assert precision() == "ieee"


def test_training_and_sampling_on_a_cpu_leave_it(precision):
    trainer = make_trainer({"steps": 1})
    list(trainer.steps())
    sample(small(), Diffusion(), seeds=[0], num_inference_steps=2)
    assert precision() == "none"


def test_training_and_sampling_choose_it_for_their_device(monkeypatch):
    asked = []
    for module in ("training.distributed", "sampling.loop"):
        monkeypatch.setattr(f"unet_denoiser.{module}.allow_tf32", asked.append)
    make_trainer({"steps": 1})
    sample(small(), Diffusion(), seeds=[0], num_inference_steps=1)
    assert asked == ["cpu", "cpu"]
