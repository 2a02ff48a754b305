"""The memory estimate against real steps: autograd's hooks, torch's record of allocations, its FLOP counter."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from unet_denoiser import UNet, UNetConfig
from unet_denoiser.cli.app import main
from unet_denoiser.config.memory import MemoryConfig
from unet_denoiser.models.layers.rules import plain_convolutions
from unet_denoiser.models.memory_estimate import estimate

PLAIN = UNetConfig(
    model_channels=64,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
    num_heads=2,
    context_dim=None,
    image_size=16,
    num_classes=5,
)
TEXT = replace(
    PLAIN, model_channels=32, context_dim=24, attention="transformer", num_classes=None, vector_dim=6, norm_groups=8
)


def inputs(config, batch, tokens=7):
    given = {"x": torch.randn(batch, 3, 16, 16), "t": torch.arange(batch)}
    given |= {"class_labels": torch.zeros(batch, dtype=torch.long)} if config.num_classes else {}
    given |= {"vector": torch.randn(batch, config.vector_dim)} if config.vector_dim else {}
    return given | ({"context": torch.randn(batch, tokens, config.context_dim)} if config.context_dim else {})


def kept_bytes(model, given):
    """Bytes of the distinct storages that a real forward pass keeps, without the parameters."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(**given)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del out
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", [PLAIN, TEXT])
def test_activations_equal_those_of_a_real_forward_pass(config, checkpointing):
    model = UNet.from_config(config).train()
    model.gradient_checkpointing = checkpointing
    options = MemoryConfig(batch_size=6, context_tokens=7, gradient_checkpointing=checkpointing)
    found = estimate(config, options).activations
    assert found == pytest.approx(kept_bytes(model, inputs(config, 6)), abs=4096)  # t is float there


def test_autocast_keeps_half_of_the_activations_and_half_size_weights():
    model = UNet.from_config(TEXT).train()
    found = estimate(TEXT, MemoryConfig(batch_size=4, context_tokens=7, mixed_precision="bf16")).activations
    with torch.autocast("cpu", torch.bfloat16):
        assert found == pytest.approx(kept_bytes(model, inputs(TEXT, 4)), rel=0.01)


def test_the_precision_is_that_of_a_training_on_the_device(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # an estimate for another machine's GPU
    for device, precision in (("cpu", "no"), ("cuda", "bf16")):
        expected = estimate(TEXT, MemoryConfig(batch_size=4, mixed_precision=precision), device)
        assert estimate(TEXT, MemoryConfig(batch_size=4), device) == expected


def test_peak_equals_the_allocations_of_a_real_step():
    model = UNet.from_config(PLAIN).train()
    given = inputs(PLAIN, 8)
    model(**given).square().mean().backward()  # sets up what stays
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model(**given).square().mean().backward()
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    found = estimate(PLAIN, MemoryConfig(batch_size=8))
    assert found.peak - found.parameters - found.optimizer - found.ema == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("config", [PLAIN, TEXT])
def test_operations_equal_those_that_torch_counts(config):
    model = UNet.from_config(replace(config, dropout=0.0)).train()
    with plain_convolutions(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs(config, 2)).square().mean().backward()
    found = estimate(config, MemoryConfig(batch_size=2, context_tokens=7))
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    twice = estimate(config, MemoryConfig(batch_size=4, context_tokens=7, gradient_checkpointing=True))
    assert twice.flops == pytest.approx(found.flops * 2 * 4 / 3)


def test_bytes_per_device_with_ddp_and_fsdp():
    """Each device holds a copy with DDP, and its buckets, or a share with FSDP; a part of the batch either way."""
    one = estimate(PLAIN, MemoryConfig(batch_size=2))
    parameters = sum(p.numel() for p in UNet.from_config(PLAIN).parameters())
    assert (one.parameters, one.optimizer, one.ema) == (4 * parameters, 8 * parameters, 4 * parameters)
    ddp = estimate(PLAIN, MemoryConfig(batch_size=8, sharding="ddp", num_processes=4))
    assert (ddp.activations, ddp.peak - one.peak, ddp.flops) == (one.activations, 4 * parameters, 4 * one.flops)
    fsdp = estimate(PLAIN, MemoryConfig(batch_size=8, sharding="fsdp", num_processes=4))
    assert fsdp.optimizer == 2 * fsdp.gradients == 8 * -(-parameters // 4)
    parts = estimate(PLAIN, MemoryConfig(batch_size=8, gradient_accumulation_steps=4))
    assert parts.activations == one.activations
    assert one.peak < parts.peak <= one.peak + 4 * parameters
    bare = estimate(PLAIN, MemoryConfig(batch_size=2, optimizer_states=0, ema=False))
    assert one.peak - bare.peak == 12 * parameters


def test_an_estimate_leaves_later_steps_unchanged():
    """No tensor without storage stays in the buffers of the convolutions."""
    torch.manual_seed(0)
    model, given = UNet.from_config(PLAIN).eval(), inputs(PLAIN, 8)
    before = model(**given)
    for device in ("cpu", "cuda"):
        estimate(PLAIN, MemoryConfig(batch_size=8), device)
    assert torch.equal(model(**given), before)


def test_info_memory_command(capsys):
    main(["info", "ddpm-cifar10", "--memory", "--batch-size", "2", "--image-size", "16", "--device", "cpu"])
    text = capsys.readouterr().out
    assert "parameters (float32)" in text
    assert "136.4 MiB" in text
    assert "2 images at a time" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batch-size 4", "batch_size: the options of a training step need --memory"),
        ("--memory --batch-size 0", "batch_size=0 must be at least 1"),
        ("--memory --batch-size 9 --num-processes 2 --sharding ddp", "batch_size=9 does not divide into 2 parts"),
        ("--memory --num-processes 2", "sharding='none' with num_processes=2"),
        ("--memory --image-size 4 4 4", "image_size=(4, 4, 4) must be a positive int, or 2 of them"),
    ],
)
def test_invalid_options_are_refused(capsys, options, message):
    with pytest.raises(SystemExit) as exit_info:
        main(["info", "ddpm-cifar10", *options.split()])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
