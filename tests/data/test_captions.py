"""Captions as tokens: the wrapper, and runs that are trained on them."""

import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from support.data import CAPTIONS, MINILM, TINY, failure, write_captions
from unet_denoiser import Diffusion, Run, Trainer, TrainingConfig, UNet, load_data, sample
from unet_denoiser.cli.app import main
from unet_denoiser.models.text_encoder import TextEncoder


def test_captions_become_context(captioned_folder):
    data = load_data(str(captioned_folder), text_encoder=MINILM)
    context, mask = TextEncoder(MINILM)(CAPTIONS)
    assert data.context_dim == 384
    for i in range(len(CAPTIONS)):
        item = data[i]
        assert "caption" not in item
        assert torch.equal(item["context_mask"], mask[i])
        torch.testing.assert_close(item["context"], context[i], rtol=1e-3, atol=1e-3)
    assert torch.equal(pickle.loads(pickle.dumps(data))[2]["context"], data[2]["context"])
    assert torch.equal(data.conditions(2)["context"], data[2]["context"])


def test_run_samples_from_captions(captioned_folder, tmp_path, capsys):
    run = tmp_path / "run"
    main(["train", str(captioned_folder), "--out", str(run), "--text-encoder", MINILM, *TINY])
    loaded = Run.load(run)
    assert loaded.model.context_dim == 384
    assert loaded.data.text_encoder == MINILM
    sampling = ["sample", str(run), "--num-images", "4", "--guidance-scale", "2", "--num-inference-steps", "2"]
    captions = ["--caption", "a red drake", "--caption", "blue wall"]
    main([*sampling, *captions, "--device", "cpu", "--out", str(run / "a.png")])
    width, height = Image.open(run / "a.png").size
    assert height < width  # two rows of two, with a caption beside each
    assert len(list((run / "samples").glob("*.png"))) == 1
    assert "needs a class, caption, vector or image" in failure(sampling, capsys)


def test_run_encodes_each_caption_once(captioned_folder, tmp_path, monkeypatch):
    run, encoded = tmp_path / "run", []
    main(["train", str(captioned_folder), "--out", str(run), "--text-encoder", MINILM, *TINY])
    tokens = TextEncoder.tokens
    monkeypatch.setattr(TextEncoder, "tokens", lambda self, texts: encoded.extend(texts) or tokens(self, texts))
    pipeline, asked = Run.load(run).load_pipeline(), ["a red drake", "blue", "a red drake"]
    found = [pipeline.encode_captions(asked), pipeline.encode_captions(["blue"]), pipeline.encode_captions(asked)]
    assert encoded == ["a red drake", "blue"]
    context, mask = TextEncoder(MINILM)(asked)
    for one in (found[0], found[2]):
        torch.testing.assert_close(one.context, context, rtol=1e-3, atol=1e-3)
        assert torch.equal(one.context_mask, mask)
    assert torch.equal(found[1].context_mask[0], mask[1][mask[1]])


def test_samples_follow_their_captions(tmp_path):
    """Trained on a dark and a bright image with captions, the network makes each by its caption."""
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
    with trainer.ema.swapped():
        context, mask = TextEncoder(MINILM)(["dark", "bright"] * 4)
        x = sample(model, process, seeds=range(8), context=context, context_mask=mask, num_inference_steps=8)
    assert x[::2].mean() < -0.4 < 0.4 < x[1::2].mean()


def test_refuses_data_without_captions(image_folder, tmp_path, capsys):
    line = failure(["train", image_folder, "--out", tmp_path / "r", "--text-encoder", MINILM], capsys)
    assert "the data have no captions" in line
    line = failure(["train", image_folder, "--out", tmp_path / "r", "--text-encoder", "/nowhere"], capsys)
    assert line.endswith("text_encoder=/nowhere is no folder; give one, or a hub name")
    main(["train", str(image_folder), "--out", str(tmp_path / "r"), *TINY])
    line = failure(["sample", tmp_path / "r", "--caption", "x"], capsys)
    assert "was trained without captions" in line


def test_captions_that_are_cut_are_counted(captioned_folder, tmp_path, capsys):
    """When they are encoded, when they come from the cache, and when they are sampled from."""
    long = "red drake on a blue wall in the sun"
    write_captions(captioned_folder, [long, *CAPTIONS[1:]])
    options = {"text_encoder": MINILM, "caption_length": 5}
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of 6 captions are longer than the 5 tokens"):
            load_data(str(captioned_folder), **options)
    run = tmp_path / "run"
    command = ["train", captioned_folder, "--out", run, "--text-encoder", MINILM, "--caption-length", 5, *TINY]
    main([str(part) for part in command])
    with pytest.warns(UserWarning, match="1 of 2 captions are longer than the 5 tokens"):
        Run.load(run).load_pipeline().encode_captions([long, "red", "red"])
    with pytest.raises(ValueError, match=r"caption_length=1000: .* takes at most 512 tokens"):
        TextEncoder(MINILM, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(str(captioned_folder), text_encoder=MINILM)
