"""The trainer: it learns, its schedule and averages are right, it resumes exactly, it refuses what cannot work."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from support.networks import relative_error
from support.trainings import NET, Vectors, assert_equal, make_trainer, two_classes, weights
from unet_denoiser import Diffusion, Trainer, TrainingConfig, UNet, sample, training_losses


def test_trainings_of_several_precisions_in_one_process_are_independent():
    alone, first = make_trainer(), make_trainer()
    list(alone.steps())
    steps = first.steps()
    next(steps)
    second = make_trainer({"mixed_precision": "bf16"})
    halves = [list(second.steps()), list(steps)]
    assert [len(half) for half in halves] == [6, 5]
    assert_equal(weights(alone.model), weights(first.model))
    assert not torch.equal(first.model.input_conv.weight, second.model.input_conv.weight)
    assert relative_error(second.model.input_conv.weight, first.model.input_conv.weight) < 0.2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_learns_two_classes(prediction):
    """After a short training, samples of each class are about that class's constant; without a class both occur."""
    process = Diffusion(prediction_type=prediction)
    options = {"steps": 200, "batch_size": 32, "learning_rate": 5e-3, "warmup_steps": 20, "ema_decay": 0.95}
    trainer = make_trainer(options, process, net={"dropout": 0.0})
    losses = [float(step.loss) for step in trainer.steps()]
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])
    labels = torch.tensor([0, 1] * 16)
    with trainer.ema.swapped():
        x = sample(trainer.model, process, seeds=range(32), class_labels=labels).mean((1, 2, 3))
        free = sample(trainer.model, process, seeds=range(16)).mean((1, 2, 3))
    assert ((x > 0) == labels.bool()).float().mean() >= 0.9
    assert [x[0::2].mean().item(), x[1::2].mean().item()] == pytest.approx([-0.5, 0.5], abs=0.2)
    assert {bool(m > 0) for m in free} == {False, True}


def test_learning_rate_warms_up_and_decays():
    trainer = make_trainer({"steps": 20, "warmup_steps": 4, "learning_rate": 1.0e-3, "ema_decay": 0.5})
    rates = [step.learning_rate for step in trainer.steps()]
    expected = [1e-3 * (i + 1) / 5 for i in range(4)]
    expected += [1e-3 * (0.5 + 0.5 * math.cos(math.pi * i / 16)) for i in range(16)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("width", [8, 16])
def test_learning_rate_follows_the_width_unless_it_is_given(width):
    for chosen, expected in ((None, 0.032 / width), (3e-4, 3e-4)):
        options = {"steps": 3, "warmup_steps": 0, "learning_rate": chosen}
        trainer = make_trainer(options, net={"model_channels": width, "norm_groups": 4})
        (first, *_) = [step.learning_rate for step in trainer.steps()]
        assert first == pytest.approx(expected)


def test_one_step_is_adamw_on_clipped_gradients(monkeypatch):
    """The same step by hand, with torch's own optimizer."""
    options = {"steps": 1, "warmup_steps": 0, "max_grad_norm": 0.01, "condition_dropout": 0.0, "learning_rate": 1e-2}
    trainer = make_trainer(options, net={"dropout": 0.0})
    model = UNet(**NET | {"num_classes": 2, "dropout": 0.0})
    model.load_state_dict(trainer.model.state_dict())
    seen = {}

    def record(process, network, x0, **inputs):
        seen.update(inputs, x0=x0)
        return training_losses(process, network, x0, **inputs)

    monkeypatch.setattr("unet_denoiser.training.trainer.training_losses", record)
    (step,) = trainer.steps()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=trainer.config.weight_decay)
    inputs = {name: seen[name] for name in ("x0", "t", "noise", "class_labels")}
    training_losses(trainer.process, model, **inputs).loss.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.01)
    optimizer.step()
    assert_close(step.grad_norm, norm)
    assert norm > 0.01
    for name, p in model.named_parameters():
        if "null" not in name:  # gets a zero gradient there, none here
            assert_close(p, trainer.model.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_conditions_are_dropped_with_the_given_probability(monkeypatch):
    trainer = make_trainer({"steps": 40, "batch_size": 100, "condition_dropout": 0.3})
    dropped = []

    def record(*args, drop, **inputs):
        dropped.append(drop["class_labels"])
        return training_losses(*args, drop=drop, **inputs)

    monkeypatch.setattr("unet_denoiser.training.trainer.training_losses", record)
    list(trainer.steps())
    assert torch.cat(dropped).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_averages_move_and_differ_from_the_weights():
    trainer = make_trainer()
    start = weights(trainer.model)
    list(trainer.steps())
    end = weights(trainer.model)
    with trainer.ema.swapped():
        averages = weights(trainer.model)
    name = "input_conv.weight"
    assert not torch.equal(averages[name], start[name])
    assert not torch.equal(averages[name], end[name])
    assert trainer.ema.updates == 6


@pytest.mark.parametrize("cut", [1, 5])
@pytest.mark.parametrize("parts", [1, 3])
def test_resumes_bit_for_bit(cut, parts):
    """N + M steps equal N steps, a state, new objects as in a new process, a restore, and M steps."""
    # the batch does not divide the data: batches run over the end of an epoch
    options = {"batch_size": 12, "gradient_accumulation_steps": parts}
    straight = make_trainer(options)
    losses = [float(step.loss) for step in straight.steps()]
    first = make_trainer(options)
    for step in first.steps():
        if step.step == cut:
            break
    tensors, metadata = first.state()
    torch.manual_seed(99)
    second = make_trainer(options | {"seed": 0})
    second.restore(tensors, json.loads(json.dumps(metadata)))
    rest = [float(step.loss) for step in second.steps()]
    assert rest == losses[cut:]
    assert_equal(weights(second.model), weights(straight.model))
    assert_equal(second.ema.state_dict()["averages"], straight.ema.state_dict()["averages"])


def make_full_objective_trainer(**options):
    """A trainer with learned weighting, learned variance, self-conditioning and offset noise: all states and draws."""
    process = Diffusion(variance_type="learned_range", self_conditioning=True, prediction_type="v_prediction")
    options = {"loss_weighting": "learned", "noise_offset": 0.1} | options
    return make_trainer(options, process, process.channels(1) | {"dropout": 0.0})


def test_a_full_objective_resumes_bit_for_bit():
    straight, first, second = (make_full_objective_trainer(batch_size=5) for _ in range(3))
    losses = [float(step.loss) for step in straight.steps()]
    for step in first.steps():
        if step.step == 3:
            break
    tensors, metadata = first.state()
    second.restore(tensors, json.loads(json.dumps(metadata)))
    assert [float(step.loss) for step in second.steps()] == losses[3:]
    assert_equal(weights(second.model), weights(straight.model))
    learned = straight.weighting.uncertainty.weight
    assert torch.equal(second.weighting.uncertainty.weight, learned)
    assert learned.abs().max() > 0


def test_micro_batches_do_not_change_the_objective():
    """Which samples see an estimate, and what is drawn, depends on the sample alone."""
    whole, parts = make_full_objective_trainer(), make_full_objective_trainer(gradient_accumulation_steps=4)
    losses = [float(step.loss) for step in whole.steps()]
    assert [float(step.loss) for step in parts.steps()] == pytest.approx(losses, rel=1e-4)
    assert_close(parts.weighting.uncertainty.weight, whole.weighting.uncertainty.weight, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("option", [{"loss_weighting": "p2"}, {"noise_offset": 0.5}])
def test_options_of_the_objective_reach_the_loss(option):
    plain, other = make_trainer(), make_trainer(option)
    assert float(next(plain.steps()).loss) != float(next(other.steps()).loss)


def test_gradient_checkpointing_is_the_same_training():
    plain, saving = make_trainer(), make_trainer({"gradient_checkpointing": True})
    losses = [float(step.loss) for step in plain.steps()]
    assert [float(step.loss) for step in saving.steps()] == pytest.approx(losses, rel=1e-6)
    assert saving.model.gradient_checkpointing


def test_workers_give_the_same_batches():
    plain, workers = make_trainer({"num_workers": 0}), make_trainer({"num_workers": 2})
    for a, b in zip(plain._batches(), workers._batches(), strict=True):
        assert torch.equal(a["image"], b["image"])


def test_a_custom_dataset_provides_any_conditions():
    data = two_classes()
    own = Vectors(data.images.numpy(), data.labels.numpy())
    trainer = make_trainer(net={"vector_dim": 3, "context_dim": 5}, data=own)
    before = weights(trainer.model)
    list(trainer.steps())
    after = weights(trainer.model)
    for name in ("vector_embedding.0.weight", "null_vector", "null_context", "bottleneck.2.attn.to_v.weight"):
        assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ({"in_channels": 3}, "in_channels=3, but the data have 1 channels"),
        ({"out_channels": 2}, "out_channels=2, but the data have 1 channels.*needs variance_type='learned_range'"),
        ({"dims": 1}, "dims=1, but the data have 2 axes"),
        ({"num_classes": 1}, "num_classes=1, but the data have 2 classes"),
        ({"context_dim": 4}, "context_dim=4, but the data have no context"),
        ({"vector_dim": 4}, "vector_dim=4, but the data have no vector"),
    ],
)
def test_refuses_networks_that_do_not_fit_the_data(net, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(net=net)


def test_refuses_data_outside_the_range():
    with pytest.raises(ValueError, match=r"the images lie in .* clip_sample_range"):
        next(make_trainer(process=Diffusion(clip_sample_range=0.25)).steps())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"condition_dropout": 1.5}, "condition_dropout=1.5"),
        ({"num_workers": -2}, "num_workers=-2"),
        ({"loss_weighting": "snr"}, "loss_weighting='snr' is not one of 'constant', 'min_snr'"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma=0.0 must be positive"),
        ({"p2_gamma": -1.0}, "p2_gamma=-1.0"),
        ({"noise_offset": float("nan")}, "noise_offset=nan"),
        ({"device": "tpu"}, "device='tpu' is not one of 'auto', 'cpu'"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_refuses_a_missing_gpu():
    with pytest.raises(ValueError, match="device='cuda' is not available here"):
        make_trainer({"device": "cuda"})


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), torch.nn.DataParallel])
def test_wrapped_networks_train_and_resume_as_plain_ones(wrap, monkeypatch):
    for module in ("norm", "resblock"):  # compiled code would draw other masks and round differently
        monkeypatch.setattr(f"unet_denoiser.models.layers.{module}.is_generated", lambda x: False)
    monkeypatch.setattr("unet_denoiser.models.layers.rules.load_kernels", lambda: None)
    plain = make_trainer({"steps": 1})
    list(plain.steps())
    torch.manual_seed(0)
    wrapped = Trainer(wrap(UNet(**NET | {"num_classes": 2})), Diffusion(), two_classes(), plain.config)
    list(wrapped.steps())
    (tensors, metadata), (expected, _) = wrapped.state(), plain.state()
    assert_equal(tensors, expected)
    assert wrapped.averaged_weights(tensors).keys() == plain.averaged_weights(expected).keys()
    old = {name.replace("model.", "model._orig_mod."): t for name, t in tensors.items()}
    for start, trainer in ((old, make_trainer({"steps": 1})), (expected, wrapped)):
        trainer.restore(start, metadata)
        assert_equal(trainer.state()[0], expected)
