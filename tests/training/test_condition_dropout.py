"""Dropout of conditions in training."""

import pytest
import torch

from unet_denoiser import Diffusion, Trainer, TrainingConfig, UNet


def test_conditions_are_dropped_together_and_each_alone():
    items = [{"image": torch.zeros(1, 4, 4), "class_labels": 0, "vector": torch.zeros(2)}] * 4
    model = UNet(in_channels=1, out_channels=1, model_channels=4, channel_mult=(1,), num_res_blocks=1, image_size=4,
                 attention_resolutions=(), num_heads=1, context_dim=None, num_classes=1, vector_dim=2,
                 norm_groups=1)  # fmt: skip
    drops = []
    model.register_forward_pre_hook(lambda module, args, inputs: drops.append(inputs["drop"]), with_kwargs=True)
    config = TrainingConfig(steps=25, batch_size=200, condition_dropout=0.2, device="cpu")
    for _ in Trainer(model, Diffusion(), items, config).steps():
        pass
    classes, vectors = (torch.cat([drop[name] for drop in drops]) for name in ("class_labels", "vector"))
    both, one = (classes & vectors).float().mean(), (classes ^ vectors).float().mean()
    assert both.item() == pytest.approx(0.2 + 0.8 * 0.2**2, abs=0.03)
    assert one.item() == pytest.approx(0.8 * 2 * 0.2 * 0.8, abs=0.03)
