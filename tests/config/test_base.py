"""The check of every field of every configuration by its annotation."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from unet_denoiser.config.base import per_axis
from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.diffusion import DiffusionConfig
from unet_denoiser.config.editing import EditingConfig
from unet_denoiser.config.memory import MemoryConfig
from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.config.training import TrainingConfig
from unet_denoiser.config.unet import UNetConfig

CLASSES = (DataConfig, DiffusionConfig, EditingConfig, MemoryConfig, SamplingConfig, TrainingConfig, UNetConfig)
REQUIRED = {DataConfig: {"source": "digits"}}
ODD = ("1", "1e-4", "false", "yes", b"1", {}, {1}, object(), 1j, 1.5, (), ["a", 1], (1.5, "b"), [[1]])


def kinds(cls, name):
    """Return the types of a field, without those inside tuples."""
    hint = get_type_hints(cls)[name]
    return (hint,) if get_origin(hint) in (tuple, None) else get_args(hint)


def may_be(cls, name, value):
    """Tell whether a value is of a field's types, whatever its range."""
    found = kinds(cls, name)
    if isinstance(value, str):
        return bool({str, Path} & set(found)) or value in found
    if isinstance(value, float):
        return float in found
    return isinstance(value, tuple | list) and any(get_origin(hint) is tuple for hint in found)


@pytest.mark.parametrize(
    ("cls", "name"), [pytest.param(cls, f.name, id=f"{cls.__name__}.{f.name}") for cls in CLASSES for f in fields(cls)]
)
def test_a_value_of_another_type_is_refused_by_name(cls, name):
    for value in ODD:
        if not may_be(cls, name, value):
            with pytest.raises((TypeError, ValueError), match=rf"^{name}=") as error:
                cls(**REQUIRED.get(cls, {}) | {name: value})
            assert "\n" not in str(error.value)
    if bool not in kinds(cls, name):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}=True"):
            cls(**REQUIRED.get(cls, {}) | {name: True})
    if None not in kinds(cls, name) and type(None) not in kinds(cls, name):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}=None"):
            cls(**REQUIRED.get(cls, {}) | {name: None})


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        (TrainingConfig(steps=np.int64(7)), "steps", 7),
        (TrainingConfig(steps=10.0), "steps", 10),
        (TrainingConfig(learning_rate=np.float32(0.5)), "learning_rate", 0.5),
        (TrainingConfig(learning_rate=torch.tensor(0.5)), "learning_rate", 0.5),
        (TrainingConfig(keep_best=np.bool_(True)), "keep_best", True),
        (SamplingConfig(guidance_scale=2), "guidance_scale", 2),
        (SamplingConfig(guidance_interval=[0.3, np.float64(3)]), "guidance_interval", (0.3, 3)),
        (SamplingConfig(guidance_interval=np.array([0.25, 3])), "guidance_interval", (0.25, 3)),
        (DataConfig(Path("images")), "source", "images"),
        (DataConfig("digits", image_size=[32, 16]), "image_size", (32, 16)),
        (DataConfig("digits", class_names=["a", "b"]), "class_names", ("a", "b")),
        (EditingConfig(image="a.png"), "image", Path("a.png")),
        (EditingConfig(image="a.png", outpaint=range(4)), "outpaint", (0, 1, 2, 3)),
        (UNetConfig(channel_mult=np.array([1, 2]), num_heads=np.int32(4)), "channel_mult", (1, 2)),
        (UNetConfig(channel_mult=(np.int64(1), 2), num_heads=np.int32(4)), "num_heads", 4),
    ],
)
def test_plain_meanings_are_taken(config, name, expected):
    value = getattr(config, name)
    assert value == expected
    assert type(value) is type(expected)
    json.dumps(asdict(config), default=str)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (TrainingConfig, {"learning_rate": "1e-4"}, "learning_rate='1e-4' must be a number or None"),
        (TrainingConfig, {"keep_best": "false"}, "keep_best='false' must be True or False"),
        (TrainingConfig, {"track": "mlflow"}, "track='mlflow' is not one of 'tensorboard', 'wandb' or None"),
        (DataConfig, {"source": "digits", "vector_columns": "age"}, "vector_columns='age' must be a tuple of strings"),
        (SamplingConfig, {"guidance_interval": (1,)}, "guidance_interval=(1,) must be a tuple of 2 numbers or None"),
    ],
)
def test_messages_say_what_is_valid(cls, options, message):
    with pytest.raises((TypeError, ValueError)) as error:
        cls(**options)
    assert str(error.value) == message


def test_per_axis():
    assert per_axis(8, 2) == per_axis([8], 2) == per_axis(np.int64(8), 2) == per_axis(torch.Size([8, 8]), 2) == (8, 8)
    for size in ("8", "88", 8.5, None, [8, "8"], (8, 8, 8), 0, {8: 8}):
        with pytest.raises(ValueError, match=r"image_size=.* must be a positive int, or 2 of them"):
            per_axis(size, 2)
