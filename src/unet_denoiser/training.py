"""Training: a generator that yields after every optimizer step; whoever drives it logs, previews and saves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from unet_denoiser.config import UNetConfig
from unet_denoiser.data import DataTimer, ImageData, StreamData, as_data, first_item, make_loader
from unet_denoiser.diffusion import Diffusion
from unet_denoiser.ema import EMA
from unet_denoiser.inputs import CONDITIONS
from unet_denoiser.recipe import DeviceName, TrainingConfig
from unet_denoiser.unet import UNet


class TrainingStep(NamedTuple):
    """What one optimizer step did: its number from 1, mean loss and gradient norm (before clipping), learning rate."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float


class Trainer:
    """A network in training: model, process and data with optimizer, learning rate and averaged weights.

    It runs through Accelerate: in one process as it is, on many with `accelerate launch`.

    Args:
        model: trained in place, on the device of `config`; its weights are the start.
        data: items {"image": (C, *spatial) in the process's range, and conditions by the names that `UNet` takes}; what
            `load_data` returns, or any map-style or iterable data set of such dicts.
    """

    def __init__(self, model: UNet, process: Diffusion, data: Any, config: TrainingConfig) -> None:
        resolve_device(config.device)
        data = as_data(data)
        _check_fit(model.config, data)
        self.process, self.data, self.config = process, data, config
        self.step = 0
        self.accelerator = Accelerator(cpu=config.device == "cpu")
        model.gradient_checkpointing = config.gradient_checkpointing
        options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        self.prepared, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model: UNet = self.accelerator.unwrap_model(self.prepared)
        # not prepared: Accelerate would advance it once per process
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        self.ema = EMA(self.model, config.ema_decay)
        self.accelerator.register_for_checkpointing(self.schedule, self.ema)

    def steps(self) -> Iterator[TrainingStep]:
        """Train from the current step to the last, yielding after each optimizer step."""
        for batch in self._batches():
            self.prepared.train()
            self._seed_step()
            x0, conditions = self._inputs(batch)
            loss = self.process.loss(self.prepared, x0, drop=self._drop(conditions), **conditions).mean()
            self.accelerator.backward(loss)
            grad_norm = self.accelerator.clip_grad_norm_(self.prepared.parameters(), self.config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            learning_rate = self.schedule.get_last_lr()[0]
            self.schedule.step()
            self.ema.update()
            self.step += 1
            yield TrainingStep(self.step, loss.detach(), torch.as_tensor(grad_norm), float(learning_rate))

    def save(self, directory: Path) -> None:
        """Write everything that training needs to go on into `directory`."""
        self.accelerator.save_state(str(directory), safe_serialization=True)
        (directory / "step").write_text(str(self.step))

    def restore(self, directory: Path) -> None:
        """Go on from what `save` wrote: weights, averages, optimizer, learning rate, place in the data."""
        try:
            self.accelerator.load_state(str(directory))
            self.step = int((directory / "step").read_text())
        except Exception as error:  # each of the libraries behind it has exceptions of its own
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"{directory} cannot be read ({reason}); delete it to go on from the one before"
            ) from error

    def _batches(self) -> Iterator[Any]:
        """This process's part of every batch from the current step on, on its device."""
        c, device = self.config, self.accelerator.device
        loader = make_loader(
            self.data,
            c.batch_size,
            seed=c.seed,
            start=self.step,
            stop=c.steps,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
            num_workers=c.num_workers,
            pin_memory=device.type == "cuda",
        )
        self.data_timer = DataTimer(loader)
        return (send_to_device(batch, device, non_blocking=True) for batch in self.data_timer)

    def _seed_step(self) -> None:
        """Seed what this step draws (timesteps, noise, dropout) by its number, so that resuming is exact.

        Nothing that happens between steps, a preview or a save, can then change the training.
        """
        entropy = [self.config.seed, self.step, self.accelerator.process_index]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))

    def _inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The images, checked once against the range that samples will be clipped to, and the network's conditions."""
        x0, bounds = batch["image"], self.process.data_range
        if self.step == 0 and bounds is not None and (x0.min() < bounds[0] - 1e-3 or x0.max() > bounds[1] + 1e-3):
            found = f"[{x0.min():g}, {x0.max():g}]"
            raise ValueError(f"the images lie in {found}; the process has {list(bounds)}, set by clip_sample_range")
        given = [name for name, option in CONDITIONS.items() if getattr(self.model.config, option) is not None]
        given += ["context_mask"] * ("context" in given and "context_mask" in batch)
        given += ["concat"] * ("concat" in batch)
        return x0, {name: batch[name] for name in given}

    def _drop(self, conditions: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The samples that lose conditions in this step.

        A share `condition_dropout` loses all (Ho and Salimans 2022). Where there are several, each is lost alone as
        well, as often (Brooks et al. 2023), so that samples can be guided by any of them, or go without.
        """
        names = [name for name in CONDITIONS if name in conditions and self.model.config.learned_null]
        names += ["concat"] * ("concat" in conditions)
        if not names:
            return None
        values = conditions[names[0]]
        draws = torch.rand(1 + len(names) * (len(names) > 1), len(values), device=values.device)
        dropped = draws < self.config.condition_dropout
        return {name: dropped[0] | dropped[-1 - i] for i, name in enumerate(names)}

    def _learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero at the last step."""
        c = self.config
        warmup = min(c.warmup_steps, c.steps // 2)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, c.steps - warmup)
        return float(0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * min(1.0, progress), dtype=torch.float64)))


def _check_fit(config: UNetConfig, data: ImageData | StreamData) -> None:
    """ValueError for a network that cannot be trained on the data."""
    concat = getattr(data, "concat_channels", 0)
    for name, wanted in (("in_channels", data.channels + concat), ("out_channels", data.channels)):
        if getattr(config, name) != wanted:
            more = f" and {concat} to concatenate" if concat and name == "in_channels" else ""
            raise ValueError(f"{name}={getattr(config, name)}, but the data have {data.channels} channels{more}")
    if config.dims != len(data.image_size):
        raise ValueError(f"dims={config.dims}, but the data have {len(data.image_size)} axes")
    if config.num_classes is not None and config.num_classes < (classes := len(data.class_names or [])):
        raise ValueError(f"num_classes={config.num_classes}, but the data have {classes} classes; give that, or None")
    found = first_item(data)
    for name, option in CONDITIONS.items():
        if getattr(config, option) is not None and name not in found:
            raise ValueError(f"{option}={getattr(config, option)}, but the data have no {name}; give None")


def resolve_device(name: DeviceName) -> str:
    """The device that a choice means here; ValueError for one that is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, is_here in available.items() if is_here)
    if not available[name]:
        raise ValueError(f"device={name!r} is not available here; 'auto' takes what there is, or give 'cpu'")
    return name
