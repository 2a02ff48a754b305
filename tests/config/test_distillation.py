"""The options of distillation: refused ones, and how they are said in words."""

import pytest

from unet_denoiser import DistillationConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((4, 1.0, 6), "teacher_steps=6 must be a multiple of num_steps=4"),
        ((4, 1.0, 4), "teacher_steps=4 must be a multiple of num_steps=4, at least twice as many; for example 16"),
        ((0, 1.0, 8), "num_steps=0 must be at least 1"),
        ((4, (4.0, 1.0), 16), "guidance_scale=.* the lower one first"),
        ((4, -1.0, 16), "guidance_scale=-1.0 must be a number of at least 0"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(*options)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DistillationConfig(1, 2.0, 4), "1 step of ddim with guidance of 2 built in"),
        (DistillationConfig(4, (1.0, 4.5)), "4 steps of ddim with guidance of 1 to 4.5"),
    ],
)
def test_says_its_steps_in_words(config, words):
    assert config.describe_steps() == words
    assert config.describe() == f"this network was distilled for {words}"
