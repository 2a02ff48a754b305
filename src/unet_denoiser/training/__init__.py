"""From a dataset to a run directory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unet_denoiser.training.distillation import Distillation as Distillation
    from unet_denoiser.training.ema import EMA as EMA
    from unet_denoiser.training.loop import load_trainer as load_trainer
    from unet_denoiser.training.loop import train as train
    from unet_denoiser.training.run import Run as Run
    from unet_denoiser.training.trainer import Trainer as Trainer
    from unet_denoiser.training.trainer import TrainingStep as TrainingStep

_FILES = {"EMA": "ema", "load_trainer": "loop", "train": "loop", "Run": "run"}
_FILES |= {"Distillation": "distillation", "Trainer": "trainer", "TrainingStep": "trainer"}


def __getattr__(name: str) -> Any:
    """Import each name when it is first used: reading a run, as for sampling, does not load the trainer."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_FILES)
