"""The loss of distillation: its target against the teacher's own sampling and a Gaussian's exact flow; resuming."""

import json
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from support.oracles import Mixture
from support.trainings import NET, Vectors, assert_equal, make_trainer, two_classes, weights
from unet_denoiser import Diffusion, DistillationConfig, Guidance, SamplingConfig, Trainer, UNet, denoise, sample
from unet_denoiser.sampling.guidance import embed_guidance_scale
from unet_denoiser.sampling.samplers import Sampler
from unet_denoiser.training.distillation import GUIDANCE_DIM, Distillation

PATHS = ["vp", "flow", "edm"]
KINDS = [{"prediction_type": kind} for kind in ("epsilon", "v_prediction", "sample")]
LEVELS = {"trailing": [249, 499, 749, 999], "quadratic": [61, 249, 561, 999]}  # of four steps; 1000 (1/4)^2 = 62.5
SPACINGS = {"vp": "quadratic", "flow": "quadratic", "edm": "trailing"}  # the defaults
PROCESSES = [kind | {"beta_schedule": "scaled_linear"} for kind in KINDS] + [{"path": "flow"}, {"path": "edm"}]


class Oracle(nn.Module):
    """The perfect network of a mixture of Gaussians, as a teacher without conditions."""

    config = SimpleNamespace(conditions=(), learned_null=True, in_channels=1, out_channels=1)

    def __init__(self, process):
        super().__init__()
        self.predict = Mixture(process)

    def forward(self, x, t, **conditions):
        return self.predict(x, t)


class Recorder:
    """A network that notes its x_t, timesteps and conditions, and predicts an x0 of 0."""

    def __init__(self, process):
        self.process = process

    def __call__(self, seen, time, **conditions):
        self.t, self.conditions = torch.searchsorted(self.process.times, time.contiguous()), conditions
        alpha, sigma = levels_of(self.process, self.t, seen)
        self.x = seen / self.process.prediction.c_in(alpha, sigma)
        return self.process.target(torch.zeros_like(seen), self.x / sigma, self.t)


def target_of(losses, recorder):
    """Return the size of the target x0 that a loss compares a prediction of 0 with: (B, 1)."""
    alpha, sigma = recorder.process.alpha_sigma(recorder.t, recorder.x)
    return (losses.error[:, None] / (1 + (alpha / sigma) ** 2)).sqrt()


def draw(count=16):
    x0, noise = torch.full((count, 1), 0.3), torch.linspace(0.5, 2, count)[:, None]
    return x0, {"noise": noise, "t": torch.arange(count) * 1000 // count, "guidance": torch.zeros(count)}


def levels_of(process, t, like):
    """Return alpha and sigma at timesteps of which 0 stands for clean data; pure noise has the alpha of samplers."""
    alpha, sigma = process.alpha_sigma(t, like)
    alpha = torch.where(alpha == 0, 1 / process.ratios[-1], alpha)
    is_clean = (t == 0)[:, None]
    return torch.where(is_clean, 1, alpha), torch.where(is_clean, 0, sigma)


def flow_to(x, start, end):
    """Follow the probability flow of N(0.3, 0.5^2) from x at one level (alpha, sigma) to another."""
    (a, s), (b, r) = start, end
    return b * 0.3 + (x - a * 0.3) * ((b * 0.5) ** 2 + r**2).sqrt() / ((a * 0.5) ** 2 + s**2).sqrt()


def exact_target(x, start, end):
    """Return the x0 whose ddim step leads from x along the same flow to another level."""
    (a, s), (b, r) = start, end
    return (flow_to(x, start, end) - r / s * x) / (b - a * r / s)


class PerfectStudent:
    """The network whose steps are exact, from each of four levels to the next."""

    def __init__(self, process):
        self.process = process
        self.levels = torch.tensor([0, *LEVELS[process.distillation.timestep_spacing]])

    def __call__(self, seen, time, **conditions):
        t = torch.searchsorted(self.process.times, time.contiguous())
        alpha, sigma = levels_of(self.process, t, seen)
        x = seen / self.process.prediction.c_in(alpha, sigma)
        x0 = exact_target(
            x, (alpha, sigma), levels_of(self.process, self.levels[torch.searchsorted(self.levels, t) - 1], x)
        )
        return self.process.target(x0, (x - alpha * x0) / sigma, t)


@pytest.mark.parametrize("spacing", LEVELS)
@pytest.mark.parametrize("options", PROCESSES, ids=str)
def test_the_target_of_a_perfect_teacher_is_the_exact_jump(options, spacing):
    """At each of 4 levels; with twice the steps of the teacher the error is a quarter or less."""
    base = Diffusion(**options, clip_sample_range=None)
    x0, draws = draw()
    errors, levels = [], LEVELS[spacing]
    starts, ends = ([level for level in each for _ in range(4)] for each in (levels, [0, *levels[:-1]]))
    for teacher_steps in (100, 200):
        process = base.distilled(DistillationConfig(4, teacher_steps=teacher_steps, timestep_spacing=spacing))
        network = Recorder(process)
        losses = Distillation(process, Oracle(process))(network, x0, **draws)
        assert network.t.tolist() == starts
        assert torch.equal(losses.t, network.t)
        end = levels_of(process, torch.tensor(ends), x0)
        exact = exact_target(network.x, levels_of(process, network.t, x0), end).abs()
        errors.append((target_of(losses, network) - exact)[4:].abs().max().item())
    assert errors[1] < 2e-3
    assert errors[0] / errors[1] > 3


@pytest.mark.parametrize("path", PATHS)
def test_a_student_whose_steps_are_exact_has_no_loss_and_samples_the_flow(path):
    """So training and sampling agree on the levels: four steps end where the flow does."""
    process = Diffusion(path=path, clip_sample_range=None).distilled(DistillationConfig(4, teacher_steps=200))
    student, (x0, draws) = PerfectStudent(process), draw()
    losses = Distillation(process, Oracle(process))(student, x0, **draws)
    assert losses.error.max() < 1e-4
    x = draws["noise"]
    *_, last = denoise(student, process, x, SamplingConfig(**process.sampling_defaults))
    start = levels_of(process, torch.full((len(x),), 999), x)
    assert_close(last.x, flow_to(x, start, (torch.ones(1), torch.zeros(1))), rtol=1e-3, atol=1e-3)


def test_large_errors_count_by_their_size_and_small_ones_by_their_square():
    """The pseudo-Huber loss of each value, whose two ends are |e| - 0.03 and e^2 / 0.06."""
    process = Diffusion(clip_sample_range=None).distilled(DistillationConfig(4, teacher_steps=8))
    x0, draws = draw()
    losses = Distillation(process, Oracle(process))(Recorder(process), x0, **draws)
    size = losses.error.sqrt()  # the data have one value
    assert_close(losses.loss, (size**2 + 0.03**2).sqrt() - 0.03)
    large = size > 0.3
    assert large.any()
    assert_close(losses.loss[large], size[large] - 0.03, rtol=0.01, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_half_of_the_states_are_the_networks_own(path):
    """The other half is noised data."""
    process = Diffusion(path=path, clip_sample_range=None).distilled(DistillationConfig(4, teacher_steps=8))
    x0, draws = draw()
    student, seen = PerfectStudent(process), []

    def network(x, time, **conditions):
        seen.append((x, time))
        return student(x, time)

    Distillation(process, Oracle(process))(network, x0, **draws)
    t = torch.searchsorted(process.times, seen[-1][1].contiguous())
    alpha, sigma = levels_of(process, t, x0)
    x = seen[-1][0] / process.prediction.c_in(alpha, sigma)
    noised = alpha * x0 + sigma * draws["noise"]
    start = levels_of(process, torch.full_like(t, 999), x0)
    own = flow_to(start[1] * draws["noise"], start, (alpha, sigma))  # where exact steps lead
    is_own = (torch.arange(16) % 4 >= 2)[:, None]
    assert_close(x, torch.where(is_own, own, noised), rtol=1e-4, atol=1e-4)


def make_student(guidance_scale=2.0, num_steps=2, options=None, net=None, seed=0, **more):
    """Return the trainer of a student whose teacher is its own random start."""
    config = DistillationConfig(num_steps, guidance_scale, teacher_steps=4 * num_steps)
    process = Diffusion(**more).distilled(config)
    torch.manual_seed(0)
    net = NET | {"num_classes": 2, "dropout": 0.0} | (net or {})
    start = UNet(**net | ({"time_cond_dim": GUIDANCE_DIM} if config.draws_guidance else {}))
    with torch.no_grad():
        for p in start.parameters():  # layers that begin at zero would make all outputs equal
            p.add_(0.1 * torch.randn_like(p))
    options = {"steps": 6, "batch_size": 8, "warmup_steps": 2, "device": "cpu", "condition_dropout": 0.0} | (
        options or {}
    )
    return Trainer(start, process, two_classes(), options, distillation=Distillation(process, deepcopy(start)))


@pytest.mark.parametrize(
    ("scale", "path"), [(0.0, "vp"), (1.0, "vp"), (2.5, "vp"), (2.5, "flow"), (2.5, "edm"), ((1.0, 4.0), "vp")]
)
def test_the_target_is_what_the_teacher_samples(scale, path):
    """With one step, the network learns the images that `denoise` makes of x_t with the teacher's dpm++."""
    trainer = make_student(scale, num_steps=1, path=path)
    teacher, process = trainer.distillation.teacher, trainer.process
    x0 = two_classes().images[:4]
    noise, labels, place = torch.randn_like(x0), torch.tensor([0, 1, 0, 1]), torch.tensor([0.0, 0.25, 0.5, 1.0])
    recorder = Recorder(process)
    draws = {"t": torch.zeros(4, dtype=torch.long), "noise": noise, "guidance": place, "class_labels": labels}
    losses = trainer.distillation(recorder, x0, **draws)
    scales = [1 + 3 * float(p) for p in place] if isinstance(scale, tuple) else [scale] * 4
    for i, each in enumerate(scales):
        config = SamplingConfig(num_inference_steps=4, guidance_scale=each, timestep_spacing=SPACINGS[path])
        guidance = Guidance(teacher, config, {"class_labels": labels[i : i + 1]})
        with torch.no_grad():
            steps = list(denoise(guidance, Diffusion(path=path), recorder.x[i : i + 1], config))
        alpha, sigma = process.alpha_sigma(recorder.t[i : i + 1], x0)
        expected = (1 + (alpha / sigma) ** 2).mean() * steps[-1].x.square().mean()
        assert_close(losses.error[i], expected, rtol=1e-3, atol=1e-6)
    if isinstance(scale, tuple):
        assert_close(recorder.conditions["time_cond"], embed_guidance_scale(torch.tensor(scales), GUIDANCE_DIM))


@pytest.mark.parametrize(
    ("scale", "parts", "path"), [(2.0, 1, "vp"), (2.0, 2, "flow"), (2.0, 2, "edm"), ((1.0, 4.0), 2, "vp")]
)
def test_resumes_bit_for_bit(scale, parts, path):
    options = {"gradient_accumulation_steps": parts}
    straight, first, second = (make_student(scale, options=options, path=path) for _ in range(3))
    losses = [float(step.loss) for step in straight.steps()]
    for step in first.steps():
        if step.step == 3:
            break
    tensors, metadata = first.state()
    torch.manual_seed(99)
    second.restore(tensors, json.loads(json.dumps(metadata)))
    assert [float(step.loss) for step in second.steps()] == losses[3:]
    assert_equal(weights(second.model), weights(straight.model))
    assert_equal(second.ema.averages(), straight.ema.averages())
    assert_equal(weights(first.distillation.teacher), weights(straight.distillation.teacher))


@pytest.mark.parametrize("path", PATHS)
def test_each_step_is_learned_equally_often(path):
    """A density of training times that nearly leaves out pure noise is the teacher's, and not the student's."""
    student = make_student(num_steps=4, options={"batch_size": 32, "steps": 4}, path=path)
    levels = torch.cat([step.losses.t for step in student.steps()])
    timesteps, counts = levels.unique(return_counts=True)
    assert timesteps.tolist() == LEVELS[SPACINGS[path]]
    assert counts.min() >= 20  # of 128, where 32 are expected, with a standard deviation of 5


@pytest.mark.parametrize("path", PATHS)
def test_a_student_of_two_classes_makes_them_in_two_steps_without_guidance(path):
    options = {"steps": 200, "batch_size": 32, "learning_rate": 5e-3, "warmup_steps": 20, "ema_decay": 0.95}
    teacher = make_trainer(options, Diffusion(path=path))
    list(teacher.steps())
    model = teacher.model
    with teacher.ema.swapped():
        start = deepcopy(model).eval()
    process = teacher.process.distilled(DistillationConfig(2, 2.0, 8))
    options = {"steps": 30, "batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 5, "condition_dropout": 0.0}
    loss = Distillation(process, deepcopy(start))
    student = Trainer(start, process, two_classes(), options | {"device": "cpu"}, distillation=loss)
    losses = [float(step.loss) for step in student.steps()]
    assert sum(losses[-5:]) < sum(losses[:5])
    labels = torch.tensor([0, 1] * 16)
    x = sample(student.model, process, seeds=range(32), class_labels=labels).mean((1, 2, 3))
    assert [x[0::2].mean().item(), x[1::2].mean().item()] == pytest.approx([-0.5, 0.5], abs=0.1)


def test_guidance_in_a_range_reaches_the_network_as_its_time_cond():
    student = make_student((1.0, 4.0))
    weight = student.model.time_cond.weight
    before = weight.detach().clone()
    list(student.steps())
    assert not torch.equal(weight, before)
    labels, model = torch.tensor([0, 1]), student.model
    x = {
        w: sample(model, student.process, seeds=[0, 1], class_labels=labels, guidance_scale=w) for w in (1.0, 2.5, 4.0)
    }
    assert not torch.equal(x[1.0], x[4.0])
    assert torch.equal(x[2.5], sample(model, student.process, seeds=[0, 1], class_labels=labels))
    one = sample(model, student.process, seeds=[1], class_labels=labels[1:], batch_size=1)
    assert_close(one[0], x[2.5][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("request_options", "message"),
    [
        ({"num_inference_steps": 8}, "num_inference_steps=8: this network was distilled for 2 steps of ddim with "),
        ({"guidance_scale": 3.0}, "guidance_scale=3.0: .* guidance of 2 built in; leave it out, or give 1.0"),
        ({"sampler": "heun"}, "sampler='heun': .* give 'ddim'"),
        ({"eta": 0.5}, "eta=0.5: .* give 0.0"),
        ({"reuse": 2}, "reuse=2: .* give None"),
        ({"negative": {"class_labels": [0]}}, "negative needs guidance, and this network was distilled"),
        ({"config": SamplingConfig()}, "=.*: this network was distilled for 2 steps"),
    ],
)
def test_refuses_other_ways_to_sample(request_options, message):
    student = make_student()
    with pytest.raises(ValueError, match=message):
        sample(student.model, student.process, seeds=[0], class_labels=[0], **request_options)


def test_refuses_guidance_outside_its_range():
    student = make_student((1.0, 4.0))
    with pytest.raises(ValueError, match=r"guidance_scale=5.0: this network was distilled for 1 to 4"):
        sample(student.model, student.process, seeds=[0], class_labels=[0], guidance_scale=5.0)


def test_the_process_keeps_its_distillation_in_its_file(tmp_path):
    for scale in (2.0, (1.0, 4.0)):
        process = Diffusion(prediction_type="sample").distilled(DistillationConfig(3, scale, 9))
        process.save_pretrained(tmp_path)
        loaded = Diffusion.from_pretrained(tmp_path)
        assert loaded.distillation == DistillationConfig(3, scale, 9, "quadratic")
        assert loaded.to_dict() == process.to_dict()
    assert Diffusion().distillation is None
    assert "distillation" not in Diffusion().to_dict()


def test_a_network_distilled_before_spacings_could_be_chosen_keeps_its_timesteps():
    saved = Diffusion().distilled(DistillationConfig(4)).to_dict()
    del saved["distillation"]["timestep_spacing"]
    process = Diffusion.from_dict(saved)
    sampler = Sampler(SamplingConfig(**process.sampling_defaults), process)
    assert sampler.timesteps.tolist() == LEVELS["trailing"][::-1]


def test_refuses_more_steps_of_the_teacher_than_end_with_those_of_the_network():
    process = Diffusion(num_train_timesteps=100).distilled(DistillationConfig(4, teacher_steps=28))
    with pytest.raises(ValueError, match="teacher_steps=28 must be at most 25 for num_steps=4 with"):
        Distillation(process, UNet(**NET))


def test_refuses_what_cannot_be_distilled():
    plain, net = Diffusion(), NET | {"num_classes": 2}
    process = plain.distilled(DistillationConfig(2, 2.0, 8))
    with pytest.raises(ValueError, match="process has no distillation"):
        Distillation(plain, UNet(**net))
    with pytest.raises(ValueError, match="guidance_scale=2\\.0 needs conditions"):
        Distillation(process, UNet(**NET))
    with pytest.raises(ValueError, match="cannot go without its conditions"):
        Distillation(process, UNet(**net, learned_null=False))
    selfish = Diffusion(self_conditioning=True).distilled(DistillationConfig(2, 2.0, 8))
    with pytest.raises(ValueError, match="self_conditioning=True cannot be distilled"):
        Distillation(selfish, UNet(**net | {"in_channels": 2}))
    loss, model = Distillation(process, UNet(**net)), UNet(**net)
    options = {"steps": 1, "device": "cpu", "condition_dropout": 0.0}
    with pytest.raises(ValueError, match="needs the loss"):
        Trainer(model, process, two_classes(), options)
    with pytest.raises(ValueError, match=r"condition_dropout=0.1: .* give 0.0"):
        Trainer(model, process, two_classes(), options | {"condition_dropout": 0.1}, distillation=loss)
    with pytest.raises(ValueError, match=r"loss_weighting='min_snr': .* give 'constant'"):
        Trainer(model, process, two_classes(), options | {"loss_weighting": "min_snr"}, distillation=loss)


def test_captions_and_vectors_are_guided_too():
    process = Diffusion().distilled(DistillationConfig(2, 2.0, 4))
    net = NET | {"context_dim": 5, "vector_dim": 3, "dropout": 0.0}
    teacher, options = UNet(**net), {"steps": 2, "batch_size": 4, "device": "cpu", "condition_dropout": 0.0}
    data = Vectors(two_classes().images.numpy())
    student = Trainer(UNet(**net), process, data, options, distillation=Distillation(process, teacher))
    assert all(torch.isfinite(step.loss) for step in student.steps())
