"""Strips, GIFs and live previews of a sampling."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from support.networks import small
from unet_denoiser import Diffusion, TrajectoryRecorder, sample, sample_steps
from unet_denoiser.sampling.callbacks import MAX_FRAMES, LivePreview
from unet_denoiser.utils.images import save_gif


def record(count=3, **options):
    film = TrajectoryRecorder()
    x = sample(small(in_channels=1, out_channels=1), Diffusion(), seeds=range(count), on_step=film, **options)
    return film, x


def test_a_strip_ends_in_the_samples(tmp_path):
    film, x = record(num_inference_steps=30, sampler="ddim", batch_size=2)
    strip = np.asarray(Image.open(film.save_strip(tmp_path / "s.png")))
    assert strip.shape == (2 * 2 * 34 + 2, 10 * 34 + 2)  # of the first batch x_t and x0 each, in ten frames
    last = ((x[:2, 0] + 1) * 127.5).clamp(0, 255)
    for row in range(4):
        tile = strip[2 + 34 * row :, 2 + 34 * 9 :][:32:4, :32:4]
        assert np.abs(tile - last[row // 2].numpy()).max() <= 0.51
    first = strip[2:34, 2:34].astype(float)
    assert first.std() > 60  # noise, almost


@pytest.mark.parametrize("steps", [1, 5, 150])
def test_a_gif_of_bounded_length(tmp_path, steps):
    film, x = record(num_inference_steps=steps)
    with Image.open(film.save_gif(tmp_path / "new" / "a.gif")) as gif:
        assert gif.size == (2 * 34 + 2, 2 * 34 + 2)
        assert 1 <= gif.n_frames <= min(steps, MAX_FRAMES + 1)
        gif.seek(gif.n_frames - 1)
        found = np.asarray(gif.convert("L"))[2:34:4, 2:34:4]
    assert np.abs(found - ((x[0, 0] + 1) * 127.5).clamp(0, 255).numpy()).max() <= 1.01
    assert len(film.frames) <= MAX_FRAMES + 1
    assert torch.equal(film.frames[-1][0], x)


def test_a_gif_wants_pictures(tmp_path):
    with pytest.raises(ValueError, match="a GIF shows uint8 images of 1, 3 or 4 channels"):
        save_gif([torch.zeros(2, 4, 4, dtype=torch.uint8)], tmp_path / "a.gif")
    assert not (tmp_path / "a.gif").exists()


def test_previews_fill_up():
    seen = []
    preview = LivePreview(5, 2, lambda x: seen.append(x.clone()))
    x = sample(small(), Diffusion(), seeds=range(5), batch_size=2, num_inference_steps=4, on_step=preview)
    assert len(seen) == 6  # every second of 3 * 4 steps
    assert not seen[1][2:].any()
    assert_close(seen[1][:2], x[:2])
    assert_close(seen[3][:4], x[:4])
    assert not seen[3][4:].any()
    assert_close(seen[5], x)


def test_steps_one_by_one():
    model, options = small(), {"seeds": range(3), "batch_size": 2, "num_inference_steps": 3, "sampler": "ddim"}
    steps = list(sample_steps(model, Diffusion(), **options))
    assert [step.indices for step in steps] == [slice(0, 2)] * 3 + [slice(2, 3)] * 3
    assert_close(torch.cat([steps[2].x0, steps[5].x0]), sample(model, Diffusion(), **options))
    with pytest.raises(ValueError, match="seeds is empty"):
        sample_steps(model, Diffusion(), seeds=[])  # when called, not when iterated
    model.train()
    few = sample_steps(model, Diffusion(), **options)
    next(few)
    few.close()
    assert model.training
