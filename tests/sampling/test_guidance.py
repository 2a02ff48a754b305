"""Guidance against its formulae, written out with separate calls, and against closed forms of its distributions."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch.testing import assert_close

from support.networks import CONDITIONS, inputs, small
from support.oracles import Mixture, alpha_sigma
from unet_denoiser import Diffusion, Guidance, Sampler, SamplingConfig, denoise, sample
from unet_denoiser.models.conditions import Conditions


def guidance(network, scale, guided=None, channels=None, **conditions):
    return Guidance(network, SamplingConfig(guidance_scale=scale), conditions, guided=guided, channels=channels)


class Counting:
    """A network that records the batch size of each call."""

    def __init__(self, model):
        self.model, self.batches = model, []

    def __call__(self, x, t, **inputs):
        self.batches.append(len(x))
        return self.model(x, t, **inputs)


@pytest.fixture
def setting():
    model = small(**CONDITIONS)
    args = inputs(model.config, batch=3)
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    return Counting(model), args.pop("x"), args.pop("t"), args | {"context_mask": mask}


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_classifier_free_guidance_equals_its_formula(setting, scale):
    network, x, t, conditions = setting
    with torch.no_grad():
        guided = guidance(network, scale, **conditions)(x, t)
        conditional, unconditional = network.model(x, t, **conditions), network.model(x, t)
    assert_close(guided, unconditional + scale * (conditional - unconditional), rtol=1e-4, atol=1e-4)
    assert (conditional - unconditional).abs().max() > 0.1


@pytest.mark.parametrize(("scale", "rows"), [(0.0, 3), (1.0, 3), (2.0, 6)])
def test_computes_only_what_it_needs_in_one_call(setting, scale, rows):
    network, x, t, conditions = setting
    guidance(network, scale, **conditions)(x, t)
    assert network.batches == [rows]


def test_channels_that_are_no_prediction_are_not_guided():
    """The channels of a learned variance stay those of the conditional network."""
    network = small(num_classes=5, out_channels=6)
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([5, 700]), torch.tensor([1, 4])
    with torch.no_grad():
        conditional, unconditional = network(x, t, class_labels=labels), network(x, t)
        guided = guidance(network, 3.0, channels=3, class_labels=labels)(x, t)
    everything = unconditional + 3.0 * (conditional - unconditional)
    assert_close(guided[:, :3], everything[:, :3], rtol=1e-4, atol=1e-4)
    assert_close(guided[:, 3:], conditional[:, 3:], rtol=1e-4, atol=1e-4)
    assert (everything - conditional)[:, 3:].abs().max() > 0.1


def test_scale_one_is_exactly_the_conditional_output(setting):
    network, x, t, conditions = setting
    with torch.no_grad():
        assert torch.equal(guidance(network, 1.0, **conditions)(x, t), network.model(x, t, **conditions))


def test_guidance_without_conditions(setting):
    network, x, t, _ = setting
    with torch.no_grad():
        assert torch.equal(guidance(network, 1.0, class_labels=None)(x, t), network.model(x, t))
    with pytest.raises(ValueError, match=r"guidance_scale=inf must be a finite"):
        guidance(network, float("inf"))
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 needs a condition"):
        guidance(network, 2.0, class_labels=None)


def test_conditions_may_be_a_record(setting):
    network, x, t, conditions = setting
    negative, config = {"class_labels": torch.tensor([4, 0, 1])}, SamplingConfig(guidance_scale=2.5)
    with torch.no_grad():
        by_name = Guidance(network, config, conditions, negative=negative)(x, t)
        record = Guidance(network, config, Conditions(**conditions), negative=Conditions(**negative))(x, t)
    assert torch.equal(record, by_name)


# ---- negative conditions, and guides -------------------------------------------------------------------------------


def test_negative_conditions_replace_the_null(setting):
    """With another mask and length; the conditions that `negative` does not have are dropped."""
    network, x, t, conditions = setting
    negative = {"class_labels": torch.tensor([4, 0, 1]), "context": torch.randn(3, 5, 6)}
    config = SamplingConfig(guidance_scale=2.5)
    with torch.no_grad():
        found = Guidance(network, config, conditions, negative=negative)(x, t)
        wanted, other = network.model(x, t, **conditions), network.model(x, t, **negative)
        kept = Guidance(network, config, conditions, negative=negative, guided=[])(x, t)
        others = {"vector": conditions["vector"], **negative}
        expected = network.model(x, t, **others)
        alone = Guidance(network, SamplingConfig(guidance_scale=0.0), conditions, negative=negative)(x, t)
    assert_close(found, other + 2.5 * (wanted - other), rtol=1e-4, atol=1e-4)
    assert_close(kept, expected + 2.5 * (wanted - expected), rtol=1e-4, atol=1e-4)
    assert_close(alone, other, rtol=1e-4, atol=1e-4)
    assert network.batches == [6, 6, 3]


def test_a_negative_condition_alone(setting):
    network, x, t, _ = setting
    negative = {"class_labels": torch.tensor([4, 0, 1])}
    with torch.no_grad():
        found = Guidance(network, SamplingConfig(guidance_scale=2.0), {}, negative=negative)(x, t)
        expected = 2 * network.model(x, t) - network.model(x, t, **negative)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scale", "calls"), [(1.0, ([3], [])), (2.0, ([3], [3])), (0.0, ([], [3]))])
def test_autoguidance_with_a_weaker_network(setting, scale, calls):
    network, x, t, conditions = setting
    guide = Counting(small(seed=5, **CONDITIONS))
    with torch.no_grad():
        found = Guidance(network, SamplingConfig(guidance_scale=scale), conditions, guide=guide)(x, t)
        wanted, other = network.model(x, t, **conditions), guide.model(x, t, **conditions)
    assert (network.batches, guide.batches) == calls
    assert_close(found, other + scale * (wanted - other), rtol=1e-4, atol=1e-4)


# ---- only somewhere, and rescaled ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "rows"), [(0.2, 3), (0.25, 3), (0.3, 6), (2.0, 6), (2.1, 3)])
def test_guidance_interval(setting, sigma, rows):
    """Outside, the conditional half alone, bit by bit; low < sigma / alpha <= high is inside."""
    network, x, t, conditions = setting
    config = SamplingConfig(guidance_scale=3.0, guidance_interval=(0.25, 2.0))
    level = (torch.tensor(0.5), torch.tensor(sigma / 2))
    with torch.no_grad():
        found = Guidance(network, config, conditions)(x, t, level)
        expected = guidance(network.model, 3.0 if rows == 6 else 1.0, **conditions)(x, t)
    assert network.batches == [rows]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("phi", [0.7, 1.0])
def test_rescale_equals_diffusers(setting, phi):
    network, x, t, conditions = setting
    config = SamplingConfig(guidance_scale=6.0, guidance_rescale=phi)
    with torch.no_grad():
        found = Guidance(network, config, conditions)(x, t)
        wanted, plain = network.model(x, t, **conditions), guidance(network.model, 6.0, **conditions)(x, t)
    assert_close(found, rescale_noise_cfg(plain, wanted, phi), rtol=1e-4, atol=1e-4)
    if phi == 1:
        assert_close(found.std((1, 2, 3)), wanted.std((1, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_all_calls_of_a_generation_get_the_same_tensors(scale):
    """The same tensors, so that a network can cache their embeddings; both halves run inside the interval alone."""
    model, seen = small(num_classes=5), []
    forward = model.forward

    def spy(x, t, **inputs):
        seen.append((len(x), inputs["class_labels"], (inputs.get("drop") or {}).get("class_labels")))
        return forward(x, t, **inputs)

    model.forward = spy
    options = {"guidance_scale": scale, "guidance_interval": (0.5, 5.0), "num_inference_steps": 10, "sampler": "ddim"}
    sample(model, Diffusion(), seeds=range(2), class_labels=torch.tensor([1, 2]), **options)
    levels = [Sampler(SamplingConfig("ddim", 10), Diffusion()).alpha_sigma(i) for i in range(10)]
    inside = [0.5 < sigma / alpha <= 5 for alpha, sigma in levels]
    assert 0 < sum(inside) < 10
    assert [rows for rows, _, _ in seen] == [4 if i and scale == 2 else 2 for i in inside]
    for where in (True, False):
        found = [entry for entry, i in zip(seen, inside, strict=True) if i == where]
        assert len({(id(labels), id(drop)) for _, labels, drop in found}) == 1


# ---- distributions: a mixture whose two components are the classes --------------------------------------------------

COMPONENTS = ((-0.5, 0.2), (0.4, 0.3))


def test_classifier_guidance_samples_the_class_of_a_mixture():
    """p(x) p(class | x) is the component: at scale 1 its mean and standard deviation, for every prediction type."""
    torch.manual_seed(0)
    z = torch.randn(4000, 1)
    for prediction in ("epsilon", "v_prediction", "sample"):
        process = Diffusion(prediction_type=prediction, clip_sample_range=None)
        mixture = Mixture(process, *zip(*COMPONENTS, strict=True), weights=(0.4, 0.6))

        def classifier(x, t, class_labels, mixture=mixture):
            return mixture.log_densities(x, t).log_softmax(1).gather(1, class_labels[:, None])[:, 0]

        for label, (mean, std) in enumerate(COMPONENTS):
            guided = Guidance(
                lambda x, t, class_labels, mixture=mixture: mixture(x, t),
                conditions={"class_labels": torch.full((4000,), label)},
                classifier=classifier,
                prediction_type=prediction,
            )
            *_, last = denoise(guided, process, z, num_inference_steps=60)
            assert last.x.mean().item() == pytest.approx(mean, abs=0.03)
            assert last.x.std().item() == pytest.approx(std, abs=0.03)


def test_classifier_scale_is_the_factor_of_the_score():
    """The channels of a learned variance stay as they are."""
    process = Diffusion(prediction_type="epsilon")
    level = (torch.tensor(0.6), torch.tensor(0.8))
    x, t = torch.randn(3, 2, 4, 4), torch.tensor([1, 2, 3])
    guided = Guidance(
        lambda x, t: torch.cat([x, 2 * x], 1), classifier=lambda x, t: (3 * x).flatten(1).sum(1), classifier_scale=2.0,
        prediction_type=process.prediction_type, channels=2,
    )  # fmt: skip
    assert_close(guided(x, t, level), torch.cat([x - 0.8 * 2 * 3, 2 * x], 1))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_guided_score_of_gaussians(prediction):
    """Conditional N(m, s^2) against unconditional: the guided score is the sum, whatever the network predicts."""
    process = Diffusion(prediction_type=prediction, beta_schedule="linear")
    one, other = Mixture(process, (0.5,), (0.3,)), Mixture(process, (-0.2,), (0.6,))
    x, t = torch.randn(6, 1), torch.tensor([0, 50, 300, 500, 800, 999])

    def network(x, t, class_labels, drop):
        return torch.where(drop["class_labels"][:, None], other(x, t), one(x, t))

    found = Guidance(network, SamplingConfig(guidance_scale=2.0), {"class_labels": torch.zeros(6).long()})(x, t)
    alpha, sigma = alpha_sigma(process, t)
    scores = [(alpha * m - x) / ((alpha * s) ** 2 + sigma**2) for m, s in ((0.5, 0.3), (-0.2, 0.6))]
    guided = 2 * scores[0] - scores[1]
    x0 = (x + sigma**2 * guided) / alpha  # Tweedie's formula
    assert_close(found, one.output(x0, x, t), rtol=1e-3, atol=1e-3)


def test_an_unconditional_network_with_a_classifier_of_labels():
    """The labels reach the classifier, one per seed, and not the network, which has no classes."""
    model, seen = small(), []

    def classifier(x, t, class_labels):
        seen.append(class_labels.tolist())
        return -(x * class_labels.view(-1, 1, 1, 1)).square().flatten(1).sum(1)

    options = {"class_labels": torch.tensor([0, 0, 9]), "num_inference_steps": 3, "batch_size": 2}
    x = sample(model, Diffusion(), seeds=range(3), classifier=classifier, **options)
    plain = sample(model, Diffusion(), seeds=range(3), num_inference_steps=3, batch_size=2)
    assert [0, 0] in seen
    assert [9] in seen
    assert torch.equal(x[:2], plain[:2])
    assert not torch.equal(x[2], plain[2])
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 needs a condition"):
        sample(model, Diffusion(), seeds=range(3), classifier=classifier, guidance_scale=2.0, **options)


def test_everything_together_in_sample():
    """Negative class, interval, rescale, threshold and a classifier; one negative label serves all, in any batches."""
    model = small(num_classes=5)
    options = {
        "class_labels": torch.tensor([1, 2, 3]), "negative": {"class_labels": torch.tensor([4])}, "guidance_scale": 3.0,
        "guidance_interval": (0.2, 5.0), "guidance_rescale": 0.7, "dynamic_threshold": 0.99, "num_inference_steps": 5,
        "classifier": lambda x, t, class_labels: -x.square().flatten(1).sum(1) / 9,
    }  # fmt: skip
    x = sample(model, Diffusion(), seeds=range(3), **options)
    assert_close(sample(model, Diffusion(), seeds=range(3), batch_size=1, **options), x, rtol=1e-3, atol=1e-3)
    for name in ("negative", "guidance_interval", "guidance_rescale", "dynamic_threshold", "classifier"):
        without = {key: value for key, value in options.items() if key != name}
        assert (sample(model, Diffusion(), seeds=range(3), **without) - x).abs().max() > 1e-3, name
    guided = sample(
        model, Diffusion(), seeds=[0], class_labels=torch.tensor([1]), guidance_scale=2.0, guide=small(3, num_classes=5)
    )
    assert guided.isfinite().all()
    both = {"guide": small(3, num_classes=5), "classifier": options["classifier"], "class_labels": torch.tensor([1])}
    assert (sample(model, Diffusion(), seeds=[0], guidance_scale=2.0, **both) - guided).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative": {"classes": torch.zeros(3)}}, "negative has 'classes'; conditions are class_labels"),
        ({"negative": {"context_mask": torch.ones(3, 2)}}, "negative has a context_mask without a context"),
        ({"guide": small, "negative": {"class_labels": torch.zeros(3)}}, "guide and negative both say"),
        ({"guide": small, "guided": ["class_labels"]}, "guide and guided both say"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Guidance(small, SamplingConfig(guidance_scale=2.0), {"class_labels": torch.zeros(3).long()}, **options)


def test_refuses_a_guide_of_another_process():
    with pytest.raises(ValueError, match="guide makes 1 channels; the network 3"):
        sample(small(), Diffusion(), seeds=[0], guide=small(in_channels=1, out_channels=1), guidance_scale=2.0)


@pytest.mark.parametrize(("scale", "image_scale"), [(3.0, 1.5), (1.0, 2.0), (0.0, 1.5), (3.0, 1.0)])
def test_an_image_has_a_weight_of_its_own(setting, scale, image_scale):
    """Against three separate calls, by equation 3 of Brooks et al. 2023."""
    model, x, t, conditions = setting
    image = torch.ones_like(x)

    def network(x, t, *, concat, drop=None, **inputs):
        drop = dict(drop or {})
        seen = torch.where(drop.pop("concat", torch.zeros(len(x), dtype=torch.bool))[:, None, None, None], 0, concat)
        return model(x + seen, t, drop=drop or None, **inputs)

    config = SamplingConfig(guidance_scale=scale, image_guidance_scale=image_scale)
    everything = torch.ones(len(x), dtype=torch.bool)
    dropped = {name: everything for name in conditions if name != "context_mask"}
    with torch.no_grad():
        found = Guidance(network, config, conditions | {"concat": image})(x, t)
        both = network(x, t, concat=image, **conditions)
        alone = network(x, t, concat=image, drop=dropped, **conditions)
        neither = network(x, t, concat=image, drop=dropped | {"concat": everything}, **conditions)
    assert model.batches == [3 * len(x)] + [len(x)] * 3
    assert_close(found, neither + image_scale * (alone - neither) + scale * (both - alone), rtol=1e-4, atol=1e-5)


def test_an_image_weight_needs_an_image(setting):
    network, *_, conditions = setting
    with pytest.raises(ValueError, match=r"image_guidance_scale=1\.5 needs the image of concat"):
        Guidance(network, SamplingConfig(image_guidance_scale=1.5), conditions)
