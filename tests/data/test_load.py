"""What `load_data` refuses, and a run with all wrappers."""

import json

import numpy as np
import pytest
from PIL import Image

from support.data import CAPTIONS, MINILM, TINY, failure, write_captions, write_folder
from unet_denoiser import DataConfig, load_data
from unet_denoiser.cli.app import main
from unet_denoiser.config.data import ConcatKind
from unet_denoiser.data.load import with_found_values


def test_refuses_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"DATA=nowhere is not 'digits'"):
        load_data("nowhere")
    (tmp_path / "broken.npz").write_bytes(b"PK not really")
    with pytest.raises(ValueError, match=r"broken\.npz is not a readable"):
        load_data(tmp_path / "broken.npz")
    np.savez(tmp_path / "pickled.npz", images=np.array([{"code": 1}], object))
    with pytest.raises(ValueError, match=r"pickled\.npz is not a readable"):
        load_data(tmp_path / "pickled.npz")


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
def test_refuses_options_in_one_line(options, message, image_folder, vae, tmp_path, capsys):
    options = [str(vae) if option == "VAE" else option for option in options]
    assert message in failure(["train", image_folder, "--out", tmp_path / "r", *options], capsys)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("options", ["caption", "latent", "concat", "caption latent concat"])
def test_evaluation_of_a_conditioned_run(options, vae, tmp_path, capsys):
    """Samples are decoded, and their conditions are those of the data's items."""
    folder = write_captions(write_folder(tmp_path / "many", count=24), CAPTIONS * 4)
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


@pytest.mark.parametrize(
    ("concat", "kind"),
    [
        (None, None),
        ("downscaled:4", ConcatKind("downscaled", factor=4)),
        ("inpainting", ConcatKind("inpainting")),
        ("edges", ConcatKind("folder", folder="edges")),
    ],
)
def test_concat_kinds(concat, kind):
    assert DataConfig("d", concat=concat).concat_kind == kind


def test_found_values_have_absolute_paths(image_folder, tmp_path, monkeypatch):
    """But for "inpainting", which names no folder even if there is one."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "pairs", seed=1)
    (tmp_path / "inpainting").mkdir()
    for concat, expected in (("pairs", str(tmp_path / "pairs")), ("inpainting", "inpainting")):
        config = DataConfig(str(image_folder), concat=concat)
        found = with_found_values(config, load_data(config))
        assert (found.concat, found.image_size, found.channels) == (expected, (8, 8), 3)
