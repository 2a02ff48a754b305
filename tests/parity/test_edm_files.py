"""Files of EDM's DhariwalUNet. Its code is no package: the oracle here is written from the paper's description.

Karras et al. 2022, arXiv 2206.00364, appendix F, and the names and shapes of the published files.
"""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from support.networks import relative_error
from unet_denoiser import Diffusion, UNet, sample
from unet_denoiser.cli.app import main
from unet_denoiser.convert.checkpoint import export_state_dict
from unet_denoiser.sampling.pipeline.pipeline import Pipeline

SIZE, WIDTH, MULTS, BLOCKS, ATTENDED, CLASSES = 16, 128, (1, 2), 1, (8,), 7


def make_state(augment=0, classes=CLASSES):
    """Random tensors of the published names and shapes at small width."""
    state = {}

    def add(name, *shape, bias=True):
        state[f"{name}.weight"] = (
            torch.randn(shape) / torch.Size(shape[1:]).numel() ** 0.5 if len(shape) > 1 else 1 + torch.rand(shape)
        )
        if bias:
            state[f"{name}.bias"] = 0.3 * torch.randn(shape[0])

    def block(name, cin, cout, attention=False, resample=False):
        add(f"{name}.norm0", cin)
        add(f"{name}.conv0", cout, cin, 3, 3)
        add(f"{name}.affine", 2 * cout, 4 * WIDTH)
        add(f"{name}.norm1", cout)
        add(f"{name}.conv1", cout, cout, 3, 3)
        if cin != cout:
            add(f"{name}.skip", cout, cin, 1, 1)
        if resample:
            state[f"{name}.conv0.resample_filter"] = state[f"{name}.skip.resample_filter"] = torch.full(
                (1, 1, 2, 2), 0.25
            )
        if attention:
            add(f"{name}.norm2", cout)
            add(f"{name}.qkv", 3 * cout, cout, 1, 1)
            add(f"{name}.proj", cout, cout, 1, 1)

    add("map_layer0", 4 * WIDTH, WIDTH)
    add("map_layer1", 4 * WIDTH, 4 * WIDTH)
    if classes:
        add("map_label", 4 * WIDTH, classes, bias=False)
    if augment:
        add("map_augment", WIDTH, augment, bias=False)
    widths, skips = [WIDTH * m for m in MULTS], [WIDTH]
    add(f"enc.{SIZE}x{SIZE}_conv", widths[0], 3, 3, 3)
    ch = widths[0]
    for level, width in enumerate(widths):
        res = SIZE >> level
        if level:
            block(f"enc.{res}x{res}_down", ch, ch, resample=True)
            skips.append(ch)
        for i in range(BLOCKS):
            block(f"enc.{res}x{res}_block{i}", ch, width, res in ATTENDED)
            ch = width
            skips.append(ch)
    for level, width in reversed(list(enumerate(widths))):
        res = SIZE >> level
        if level == len(widths) - 1:
            block(f"dec.{res}x{res}_in0", ch, ch, attention=True)
            block(f"dec.{res}x{res}_in1", ch, ch)
        else:
            block(f"dec.{res}x{res}_up", ch, ch, resample=True)
        for i in range(BLOCKS + 1):
            block(f"dec.{res}x{res}_block{i}", ch + skips.pop(), width, res in ATTENDED)
            ch = width
    add("out_norm", ch)
    add("out_conv", 3, ch, 3, 3)
    return state


def oracle(state, x, t, labels=None, augment=None):
    """Compute the output of DhariwalUNet with these tensors; names are visited in the order in which it was built."""

    def norm(name, h):
        return F.group_norm(h, min(32, h.shape[1] // 4), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def conv(name, h):
        weight = state[f"{name}.weight"]
        return F.conv2d(h, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def linear(name, h):
        return F.linear(h, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def resample(name, h):
        if name.endswith("_down"):
            return F.avg_pool2d(h, 2)
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3) if name.endswith("_up") else h

    def block(name, h, emb):
        residual = resample(name, h)
        h = conv(f"{name}.conv0", resample(name, F.silu(norm(f"{name}.norm0", h))))
        scale, shift = linear(f"{name}.affine", emb)[..., None, None].chunk(2, dim=1)
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h) * (scale + 1) + shift))
        h = h + (conv(f"{name}.skip", residual) if f"{name}.skip.weight" in state else residual)
        if f"{name}.qkv.weight" not in state:
            return h
        b, c, height, width = h.shape
        q, k, v = conv(f"{name}.qkv", norm(f"{name}.norm2", h)).reshape(b, c // 64, 64, 3, -1).unbind(3)
        weights = torch.einsum("bhcq,bhck->bhqk", q, k / 8).softmax(dim=-1)
        return h + conv(f"{name}.proj", torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(b, c, height, width))

    freqs = 10000 ** (-torch.arange(WIDTH // 2) / (WIDTH // 2))
    angles = t[:, None] * freqs
    emb = torch.cat([angles.cos(), angles.sin()], dim=1)
    emb = emb if augment is None else emb + linear("map_augment", augment)
    emb = linear("map_layer1", F.silu(linear("map_layer0", emb)))
    emb = emb if labels is None else emb + linear("map_label", F.one_hot(labels, CLASSES).to(x.dtype))
    emb = F.silu(emb)
    skips = []
    for name in dict.fromkeys(".".join(key.split(".")[:2]) for key in state if key.startswith("enc.")):
        x = conv(name, x) if name.endswith("_conv") else block(name, x, emb)
        skips.append(x)
    for name in dict.fromkeys(".".join(key.split(".")[:2]) for key in state if key.startswith("dec.")):
        if "_block" in name:
            x = torch.cat([x, skips.pop()], dim=1)
        x = block(name, x, emb)
    return conv("out_conv", F.silu(norm("out_norm", x)))


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(("classes", "augment"), [(CLASSES, 0), (0, 9)])
def test_an_edm_file_gives_its_output_and_comes_back(classes, augment, prefix, tmp_path):
    torch.manual_seed(0)
    state = make_state(augment, classes)
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "edm.pt")
    model = UNet.from_pretrained(tmp_path / "edm.pt")
    assert (model.config.image_size, model.config.attention_resolutions) == (SIZE, ATTENDED)
    x, t = torch.randn(2, 3, SIZE, SIZE), torch.tensor([-0.7, 1.1])  # their time is ln(sigma) / 4
    labels = torch.tensor([0, 6]) if classes else None
    extra = torch.randn(2, augment) if augment else None
    exact = {name: tensor.double() for name, tensor in state.items()}
    inputs = [x.double(), t.double(), labels, extra if extra is None else extra.double()]
    with torch.no_grad():
        out = copy.deepcopy(model).double()(*inputs[:2], class_labels=labels, time_cond=inputs[3])
        # both in double precision, but for our sinusoids; in single precision either is 2e-6 to 3e-6 from that
        assert relative_error(out, oracle(exact, *inputs)) < 2e-7

    back = export_state_dict(model.state_dict(), model.config, "edm")
    assert back.keys() == {name for name in state if "resample_filter" not in name}
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_a_converted_network_samples_with_its_preconditioning(sampler, tmp_path):
    """By EDM's own equations: D = c_skip x + c_out F(c_in x, log(sigma) / 4), and dx/dsigma = (x - D) / sigma."""
    torch.manual_seed(0)
    state = make_state()
    torch.save(state, tmp_path / "edm.pt")
    main(["convert", str(tmp_path / "edm.pt"), str(tmp_path / "edm")])
    pipeline = Pipeline.from_pretrained(tmp_path / "edm")
    assert pipeline.process.to_dict() == Diffusion(path="edm").to_dict()
    labels, count, d = torch.tensor([0, 6]), 4, 0.5
    options = {"class_labels": labels, "sampler": sampler, "sigma_schedule": "karras", "clip_sample": False}
    ours = sample(pipeline.model, pipeline.process, seeds=[3, 4], num_inference_steps=count, **options)

    def denoised(x, sigma):
        norm = (sigma**2 + d**2) ** 0.5
        output = oracle(state, x / norm, torch.full((2,), float(sigma)).log() / 4, labels)
        return d**2 / norm**2 * x + sigma * d / norm * output

    sigmas = [*torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), count, dtype=torch.float64) ** 7, 0.0]
    noise = [torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    x = torch.stack(noise) * (80**2 + 1) ** 0.5  # the variance of x0 + sigma eps for data of variance 1
    for sigma, after in pairwise(sigmas):
        slope = (x - denoised(x, sigma)) / sigma
        moved = x + (after - sigma) * slope
        if sampler == "heun" and after > 0:
            slope = (slope + (moved - denoised(moved, after)) / after) / 2
        x = x + (after - sigma) * slope
    assert relative_error(ours, x) < 1e-4


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("enc.16x16_block0.affine.weight", torch.zeros(128, 512), "SongUNet .* scales its skips"),
        ("enc.8x8_down.conv0.resample_filter", torch.full((1, 1, 4, 4), 1 / 64), "resample_filter, which the network"),
        ("out_norm.weight", torch.ones(64), r"norms of \[16, 32\] groups have no counterpart"),
        ("dec.8x8_in0.qkv.bias", torch.zeros(3), r"dec.8x8_in0.qkv.bias \(3,\), not \(768,\)"),
    ],
)
def test_other_networks_of_edm_are_refused(name, value, message, tmp_path):
    torch.save(make_state() | {name: value}, tmp_path / "edm.pt")
    with pytest.raises(ValueError, match=message):
        UNet.from_pretrained(tmp_path / "edm.pt")


def test_the_published_edm_network_is_recognised():
    """Names and shapes of the ImageNet-64 file come from the preset and lead back to it."""
    from unet_denoiser import preset
    from unet_denoiser.convert.architecture import detect_layout, detect_structure, infer_options

    with torch.device("meta"):
        theirs = export_state_dict(
            UNet.from_preset("edm-imagenet64-cond").state_dict(), preset("edm-imagenet64-cond"), "edm"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert detect_layout(shapes) == "edm"
    seen = infer_options("edm", shapes, detect_structure("edm", shapes))
    wanted = preset("edm-imagenet64-cond").to_dict()
    assert {name: wanted[name] for name in seen} == {n: list(v) if isinstance(v, tuple) else v for n, v in seen.items()}
