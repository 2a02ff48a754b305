"""Training: a generator that yields after every optimizer step; whoever drives it logs, previews and saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor

from unet_denoiser.config.defaults import default_learning_rate
from unet_denoiser.config.training import TrainingConfig
from unet_denoiser.config.unet import CONDITIONS, UNetConfig
from unet_denoiser.data.dataloader import DataTimer, EndlessBatches, make_loader
from unet_denoiser.data.dataset import ImageDataset, StreamDataset
from unet_denoiser.data.load import first_item
from unet_denoiser.data.sources.custom import as_dataset
from unet_denoiser.diffusion.loss import Losses, training_losses
from unet_denoiser.diffusion.loss_weighting import LossWeighting
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.unet import UNet
from unet_denoiser.training.distributed import gather_full, is_sharded, make_accelerator, shard_like
from unet_denoiser.training.ema import EMA
from unet_denoiser.training.finetuning import add_lora, merge_lora_weights
from unet_denoiser.training.randomness import DROPPABLE, condition_dropout, draw_for_loss, seed_dropout
from unet_denoiser.utils.finite import NonFiniteError, first_nonfinite_gradient, first_nonfinite_module


class TrainingStep(NamedTuple):
    """What one optimizer step did.

    step: its number, from 1. loss: mean over the batch. grad_norm: before clipping. losses: those of all samples, of
    all processes, in the order of the data. skipped: it was not finite and changed nothing. stop: a process was asked
    to stop.
    """

    step: int
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float
    losses: Losses
    skipped: bool
    stop: bool


class MicroBatch(NamedTuple):
    """One of the parts a batch is computed in, with all that is random in it."""

    x0: Tensor
    inputs: dict[str, Any]
    first: int  # position of its first sample in the endless stream


class Trainer:
    """A network in training: model, process and data with optimizer, learning rate and averaged weights.

    It runs through Accelerate: in one process as it is, on many with `accelerate launch`. The timestep, the noise and
    the dropped conditions of a sample depend on the seed and its position in the endless stream of samples alone. So
    neither the number of processes nor that of a batch's parts changes the training, and resuming is exact.

    Args:
        model: trained in place, on the device of `config`; its weights are the start.
        data: items {"image": (C, *spatial) in the process's range, and conditions by the names that `UNet` takes}; what
            `load_data` returns, or any map-style or iterable data set of such dicts.
    """

    def __init__(self, model: UNet, process: Diffusion, data: Any, config: TrainingConfig) -> None:
        data = as_dataset(data)
        _check_fit(model.config, process, data)
        self.process, self.data, self.config = process, data, config
        self.step, self.skipped_steps, self.bad_in_a_row = 0, 0, 0
        self.stop = False  # set it from a signal handler, for example: all processes then see `stop` after this step
        self.accelerator = make_accelerator(config)
        model.gradient_checkpointing = config.gradient_checkpointing
        if config.lora_rank:
            add_lora(model, config.lora_rank)
        if model.time_cond is not None:
            model.time_cond.requires_grad_(False)  # nothing feeds it here, and DDP waits for every weight's gradient
        trained = [p for p in model.parameters() if p.requires_grad]
        self.learning_rate = config.learning_rate or default_learning_rate(model.config.model_channels)
        options: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": config.weight_decay, "fused": True}
        optimizer = torch.optim.AdamW(trained, **options)
        self.prepared, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model: UNet = self.accelerator.unwrap_model(self.prepared)
        self.ema = EMA(self.model, config.ema_decay)
        self.weighting = LossWeighting(process.prediction_type, process.snr, config, self.accelerator.device)

    def steps(self) -> Iterator[TrainingStep]:
        """Train from the current step to the last, yielding after each optimizer step.

        Raises:
            NotFinite: `max_bad_steps` in a row had a loss or gradients that are not finite; where it began.
        """
        for batch in self._batches():
            self.prepared.train()
            learning_rate = self._learning_rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            parts = self._parts(batch)
            losses = [self._backward(part, last=part is parts[-1]) for part in parts]
            grad_norm = self._clip()
            everyone, stop = self._gather(losses)
            bad = not bool(torch.isfinite(everyone.loss).all() & torch.isfinite(grad_norm))
            if bad:
                self._skip(parts, everyone)
            else:
                self.optimizer.step()
                self.weighting.step(partial(self.accelerator.reduce, reduction="mean"))
                self.ema.update()
                self.bad_in_a_row = 0
            self.optimizer.zero_grad()
            self.weighting.zero_grad()
            self.step += 1
            yield TrainingStep(self.step, everyone.loss.mean(), grad_norm, learning_rate, everyone, bad, stop)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that training needs to go on: whole tensors by name, and plain facts (JSON).

        Every process must call it; the tensors are on the CPU of the main one, the others get none.
        """
        named = {f"model.{name}": p for name, p in self._trained()}
        named |= {f"ema.{name}": average for name, average in self.ema.averages().items()}
        for name, p in self._trained():
            named |= {f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[p].items()}
        named |= {f"weighting.{name}": value for name, value in self.weighting.tensors().items()}
        facts: dict[str, Any] = {
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "bad_in_a_row": self.bad_in_a_row,
        }
        facts |= {"ema_updates": self.ema.updates, "scaler": self._scaler.state_dict() if self._scaler else None}
        return gather_full(named, keep=self.accelerator.is_main_process), facts

    def averaged_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole network's averaged weights under its own names, a LoRA merged; every process must call it.

        Args:
            tensors: those of `state`.
        """
        averages = {name.removeprefix("ema."): t for name, t in tensors.items() if name.startswith("ema.")}
        frozen = {name: t for name, t in self.model.state_dict().items() if name not in self.ema.averages()}
        return merge_lora_weights(gather_full(frozen, keep=self.accelerator.is_main_process) | averages)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from a `state`, of any number of processes."""
        trained = dict(self._trained())
        groups: dict[str, dict[str, Tensor]] = {name: {} for name in trained}
        for name in tensors:
            if name.startswith("optimizer."):
                _, key, parameter = name.split(".", 2)
                groups[parameter][key] = tensors[name]
        for name, p in trained.items():
            p.copy_(shard_like(tensors[f"model.{name}"], p))
            self.ema.averages()[name].copy_(shard_like(tensors[f"ema.{name}"], p))
            for key, value in groups[name].items():
                self.optimizer.state[p][key] = shard_like(value, p) if value.ndim else value.to(p.device)
        self.weighting.load({name: tensors[f"weighting.{name}"] for name in self.weighting.tensors()})
        self.step, self.skipped_steps = facts["step"], facts["skipped_steps"]
        self.bad_in_a_row, self.ema.updates = facts["bad_in_a_row"], facts["ema_updates"]
        if self._scaler and facts["scaler"]:
            self._scaler.load_state_dict(facts["scaler"])

    @property
    def is_sharded(self) -> bool:
        """Whether each process has a shard of every weight only, so that all of them must run the network."""
        return is_sharded(self.accelerator)

    def _trained(self) -> list[tuple[str, Any]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    @property
    def _scaler(self) -> Any:
        return self.accelerator.scaler

    # ---- one step --------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """This process's share of every batch from the current step on, on its device."""
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

    def _parts(self, batch: dict[str, Tensor]) -> list[MicroBatch]:
        """A loaded batch as what the loss takes: timesteps, noise and dropped conditions drawn, divided into parts."""
        x0, bounds = batch["image"], self.process.data_range
        if self.step == 0 and bounds is not None and (x0.min() < bounds[0] - 1e-3 or x0.max() > bounds[1] + 1e-3):
            found = f"[{x0.min():g}, {x0.max():g}]"
            raise ValueError(f"the images lie in {found}; the process has {list(bounds)}, set by clip_sample_range")
        given = [name for name, option in CONDITIONS.items() if getattr(self.model.config, option) is not None]
        inputs: dict[str, Any] = {name: batch[name] for name in given}
        optional = ["concat"] + ["context_mask"] * ("context" in given)
        inputs |= {name: batch[name] for name in optional if name in batch}
        first = self.step * self.config.batch_size + self.accelerator.process_index * len(x0)
        draws = draw_for_loss(self.config.seed, first, x0, self.process.num_train_timesteps, self.config.noise_offset)
        inputs |= {"t": draws.t, "noise": draws.noise}
        if self.process.self_conditioning:
            inputs["self_condition"] = draws.self_condition
        names = [n for n in DROPPABLE if n in inputs and (n == "concat" or self.model.config.learned_null)]
        drop = condition_dropout(names, draws.chances, self.config.condition_dropout) if names else {}
        size = len(x0) // self.config.gradient_accumulation_steps
        return [
            MicroBatch(
                x0[rows],
                {name: value[rows] for name, value in inputs.items()}
                | ({"drop": {name: value[rows] for name, value in drop.items()}} if drop else {}),
                first + rows.start,
            )
            for rows in (slice(start, start + size) for start in range(0, len(x0), size))
        ]

    def _losses(self, part: MicroBatch, network: Any) -> Losses:
        seed_dropout(self.config.seed, part.first)
        return training_losses(self.process, network, part.x0, weighting=self.weighting, **part.inputs)

    def _backward(self, part: MicroBatch, last: bool) -> Losses:
        """Add the part's gradients; processes exchange them with the last part alone."""
        with nullcontext() if last else self.accelerator.no_sync(self.prepared):
            losses = self._losses(part, self.prepared)
            self.accelerator.backward(losses.loss.mean() / self.config.gradient_accumulation_steps)
        return Losses(*(value.detach() for value in losses))

    def _clip(self) -> Tensor:
        norm = self.accelerator.clip_grad_norm_(self.prepared.parameters(), self.config.max_grad_norm)
        norm = torch.as_tensor(norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _gather(self, losses: list[Losses]) -> tuple[Losses, bool]:
        """The losses of all processes in the order of the samples' positions, and whether one of them is to stop."""
        own = torch.stack([torch.stack([x.double() for x in part]) for part in losses])  # (parts, 3, samples)
        flag = torch.full_like(own[:, :1], float(self.stop))
        all_of_them = self.accelerator.gather(torch.cat([own, flag], 1)[None])  # (processes, parts, 4, samples)
        loss, error, t, stop = all_of_them.permute(2, 0, 1, 3).flatten(1)
        return Losses(loss.float(), error.float(), t.long()), bool(stop.any())

    def _skip(self, parts: list[MicroBatch], losses: Losses) -> None:
        """Leave weights and averages as they are; after `max_bad_steps` in a row say where it begins."""
        self.skipped_steps, self.bad_in_a_row = self.skipped_steps + 1, self.bad_in_a_row + 1
        if self._scaler:
            self._scaler.update()  # to a lower scale
        if self.bad_in_a_row < self.config.max_bad_steps:
            return
        found = None
        if bool(torch.isfinite(losses.loss).all()):
            self.optimizer.zero_grad()  # clipping has spread it to all gradients
            for part in parts:
                self._backward(part, last=part is parts[-1])
            found = first_nonfinite_gradient(self.model)
        for part in parts:
            place = first_nonfinite_module(self.model, partial(self._losses, part, self.prepared))
            found = found or (place and f"{place}, samples {self._indices(part)}")
        where = next((place for place in gather_object([found]) if place), "the loss")
        raise NonFiniteError(
            f"{self.bad_in_a_row} steps in a row were not finite, the last of them step {self.step + 1}; first: {where}"
        )

    def _indices(self, part: MicroBatch) -> str:
        """Which items of the data a part has, as the loader chose them."""
        if isinstance(self.data, StreamDataset):
            return f"{part.first} to {part.first + len(part.x0) - 1} of the stream"
        size = self.config.batch_size
        batches = EndlessBatches(self.data.buckets or len(self.data), size, self.config.seed, self.step, self.step + 1)
        start = part.first - self.step * size
        return (
            ", ".join(str(int(place)) for place in next(iter(batches))[start : start + len(part.x0)]) + " of the data"
        )

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero at the last step."""
        c = self.config
        highest, warmup = self.learning_rate, min(c.warmup_steps, c.steps // 2)
        if step < warmup:
            return highest * (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, c.steps - warmup)
        return highest * float(0.5 + 0.5 * np.cos(np.pi * min(1.0, progress)))


def _check_fit(config: UNetConfig, process: Diffusion, data: ImageDataset | StreamDataset) -> None:
    """ValueError for a network that cannot be trained on the data."""
    process.check_channels(config, data.channels, getattr(data, "concat_channels", 0))
    if config.dims != len(data.image_size):
        raise ValueError(f"dims={config.dims}, but the data have {len(data.image_size)} axes")
    if config.num_classes is not None and config.num_classes < (classes := len(data.class_names or [])):
        raise ValueError(f"num_classes={config.num_classes}, but the data have {classes} classes; give that, or None")
    found = first_item(data)
    for name, option in CONDITIONS.items():
        if getattr(config, option) is not None and name not in found:
            raise ValueError(f"{option}={getattr(config, option)}, but the data have no {name}; give None")
