"""Neither the network nor the loss nor the reverse process waits for a device.

The meta device has no values, so everything that would wait for a result fails there: reading a number, branching on
one, copying to the CPU. Copies to a device are counted, since torch waits for these as well.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unet_denoiser import Diffusion, UNet, sample, training_losses
from unet_denoiser.training.prefetch import to_device

NETWORK = {
    "model_channels": 32, "channel_mult": (1, 2), "attention_resolutions": (8,), "num_heads": 2, "context_dim": 8,
    "image_size": 16, "num_classes": 5, "norm_groups": 8,
}  # fmt: skip


class Copies(TorchDispatchMode):
    """Counts copies from one device to another."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            self.count += source.device != out.device
        return out


@pytest.fixture
def network():
    """A network without values, and its inputs."""
    with torch.device("meta"):
        conditions = {"context": torch.randn(2, 4, 8), "class_labels": torch.zeros(2, dtype=torch.long)}
        return UNet(**NETWORK), torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.long), conditions


def test_the_count_sees_copies_and_reading_a_value_fails():
    with Copies() as copies:
        torch.zeros(3).to("meta")
        torch.zeros(3, device="meta").copy_(torch.ones(3))
    assert copies.count == 2
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros((), device="meta").item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(3, device="meta").cpu()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_forward_pass_waits_for_nothing(network, mode):
    model, x, t, conditions = network
    getattr(model, mode)()
    with Copies() as copies:
        model(x, t, **conditions)
    assert copies.count == 0


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_training_step_waits_for_nothing(network, prediction_type, variance_type):
    model, x, _, conditions = network
    process = Diffusion(prediction_type=prediction_type, variance_type=variance_type)
    if variance_type == "learned_range":
        with torch.device("meta"):
            model = UNet(**NETWORK | {"out_channels": 6})
    training_losses(process, model, x, **conditions)  # the schedule moves to the device once
    with Copies() as copies:
        training_losses(process, model, x, **conditions).loss.mean().backward()
    assert copies.count == 0
    assert model.input_conv.weight.grad is not None


def test_each_tensor_of_a_batch_is_copied_once_when_its_step_comes():
    """A GPU gets it one step ahead, without a wait: tests/training/test_prefetch.py."""
    read = []
    batches = (read.append(i) or {"image": torch.ones(2), "labels": [torch.zeros(1)]} for i in range(3))
    with Copies() as copies:
        for number, batch in enumerate(to_device(batches, torch.device("meta")), start=1):
            assert (batch["image"].device.type, batch["labels"][0].device.type) == ("meta", "meta")
            assert (len(read), copies.count) == (number, 2 * number)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "euler", "heun"])  # diffusers' unipc makes tensors in each step
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_the_reverse_process_waits_for_no_step(network, sampler, guidance_scale):
    model, _, _, conditions = network
    counts = []
    for steps in (4, 8):
        with Copies() as copies:
            options = {"sampler": sampler, "num_inference_steps": steps, "guidance_scale": guidance_scale}
            x = sample(model, Diffusion(), seeds=range(2), **options, **conditions)
        assert x.shape == (2, 3, 16, 16)
        counts.append(copies.count)
    assert counts[0] == counts[1] <= 3  # the noise, and all timesteps for the sampler and for their embeddings
