"""Training as a generator that yields after every optimizer step; its caller logs, previews and saves."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from unet_denoiser.config.defaults import default_learning_rate
from unet_denoiser.config.training import TrainingConfig
from unet_denoiser.data.contents import describe_contents
from unet_denoiser.data.dataloader import DataTimer, EndlessBatches, make_loader
from unet_denoiser.data.dataset import StreamDataset
from unet_denoiser.data.sources.custom import as_dataset
from unet_denoiser.diffusion.loss import Losses, training_losses
from unet_denoiser.diffusion.loss_weighting import LossWeighting
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.unet import UNet
from unet_denoiser.training.checkpoints import select_averages
from unet_denoiser.training.compilation import compile_blocks
from unet_denoiser.training.distillation import Distillation, check_loss
from unet_denoiser.training.distributed import gather_full, make_accelerator, shard_like, with_precision
from unet_denoiser.training.ema import EMA, inner_name, unwrap
from unet_denoiser.training.fit import check_fit
from unet_denoiser.training.lora import add_lora, merge_lora_weights
from unet_denoiser.training.prefetch import to_device
from unet_denoiser.training.randomness import DROPPABLE, LossDraws, condition_dropout, draw_for_loss, seed_dropout
from unet_denoiser.training.schedule import learning_rate_at
from unet_denoiser.utils.finite import NonFiniteError, first_nonfinite_gradient, first_nonfinite_module


class TrainingStep(NamedTuple):
    """The result of one optimizer step.

    step: its number, from 1. loss: mean over the batch. grad_norm: before clipping. losses: of each sample of all
    processes, in the order of the data. skipped: loss or gradients were not finite, so nothing changed. stop: a process
    was asked to stop. save, preview: `Trainer.due` of the main process said so. next_checkpoint: when it comes, in
    words.
    """

    step: int
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float
    losses: Losses
    skipped: bool
    stop: bool
    save: bool = False
    preview: bool = False
    next_checkpoint: str = ""


class MicroBatch(NamedTuple):
    """A part of a batch that is computed at once, with the random draws of its loss.

    first: position of its first sample in the training stream. x0: (B, C, *spatial).
    """

    first: int
    x0: Tensor
    draws: LossDraws
    conditions: Conditions


class Trainer:
    """Trains a network: model, process and data with optimizer, learning rate and averaged weights.

    Runs through Accelerate, in one process, or in several with `accelerate launch`. Timestep, noise and dropped
    conditions of a sample depend only on the seed and on the sample's position in the training stream. So the number of
    processes and of micro-batches does not change the training, and resuming is exact.

    Args:
        model: trained in place, from its present weights, on the device of `config`; also a compiled or wrapped one.
        data: map-style or iterable dataset of dicts, such as `load_data` returns: "image" (C, *spatial) in the
            process's range, and conditions under the names of `UNet.forward`'s arguments.
        distillation: the loss of a network of few steps, for a process with `distillation`.

    ValueError if the network does not fit the data, or the loss not the process.
    """

    def __init__(
        self,
        model: UNet,
        process: Diffusion,
        data: Any,
        config: TrainingConfig | Mapping[str, Any],
        *,
        distillation: Distillation | None = None,
    ) -> None:
        config = with_precision(config if isinstance(config, TrainingConfig) else TrainingConfig(**config))
        given, model, data = model, unwrap(model), as_dataset(data)
        check_fit(model.config, process, data)
        check_loss(process, config, distillation)
        self.process, self.data, self.config, self.distillation = process, data, config, distillation
        self.step, self.skipped_steps, self.bad_in_a_row = 0, 0, 0
        self.stop = False  # a signal handler may set it: all processes then see `stop` after this step
        # called in each step with its number: (save, preview); the answers of the main process count for all
        self.due: Callable[[int], tuple[bool, bool]] = lambda step: (False, False)
        self.accelerator = make_accelerator(config)
        self._scaler = self.accelerator.scaler  # of the gradients in float16, else None
        model.gradient_checkpointing = config.gradient_checkpointing
        if config.lora_rank:
            add_lora(model, config.lora_rank)
        if distillation is not None:
            distillation.to(self.accelerator.device)
        if model.time_cond is not None and not (distillation and distillation.config.draws_guidance):
            model.time_cond.requires_grad_(False)  # nothing feeds it here, and DDP waits for every weight's gradient
        if config.compile:
            compile_blocks(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.learning_rate = config.learning_rate or default_learning_rate(model.config.model_channels)
        optimizer = torch.optim.AdamW(trained, self.learning_rate, weight_decay=config.weight_decay, fused=True)
        compiled = given._modules.get("_orig_mod") is model  # Accelerate makes its own DDP
        self.prepared, self.optimizer = self.accelerator.prepare(given if compiled else model, optimizer)
        self.model: UNet = unwrap(self.accelerator.unwrap_model(self.prepared))
        self.ema = EMA(self.model, config.ema_decay)
        self.weighting = LossWeighting(process.prediction, process.snr, config, self.accelerator.device)

    def steps(self) -> Generator[TrainingStep, None, None]:
        """Train from the current step to the last, yielding after each optimizer step.

        NonFiniteError if loss or gradients were not finite for `max_bad_steps` steps in a row; says where that begins.
        """
        for batch in self._batches():
            self.prepared.train()
            learning_rate = learning_rate_at(self.step, self.learning_rate, self.config)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            parts = self._split(batch)
            losses = [self._backward(part, last=part is parts[-1]) for part in parts]
            grad_norm = self._clip()
            gathered, wishes = self._gather(losses)
            bad = not bool(torch.isfinite(gathered.loss).all() & torch.isfinite(grad_norm))
            if bad:
                self._skip(parts, gathered)
            else:
                self.optimizer.step()
                self.weighting.step(partial(self.accelerator.reduce, reduction="mean"))
                self.ema.update()
                self.bad_in_a_row = 0
            self.optimizer.zero_grad()
            self.weighting.zero_grad()
            self.step += 1
            yield TrainingStep(self.step, gathered.loss.mean(), grad_norm, learning_rate, gathered, bad, *wishes)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that `restore` needs: full tensors by name, and metadata (JSON).

        Every process must call it; the main one gets the tensors, on the CPU, the others none.
        """
        named = {f"model.{name}": p for name, p in self._trained()}
        named |= {f"ema.{name}": average for name, average in self.ema.averages().items()}
        for name, p in self._trained():
            named |= {f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[p].items()}
        named |= {f"weighting.{name}": value for name, value in self.weighting.tensors().items()}
        counts = {"step": self.step, "skipped_steps": self.skipped_steps, "bad_in_a_row": self.bad_in_a_row}
        scaler = self._scaler.state_dict() if self._scaler else None
        metadata = {**counts, "ema_updates": self.ema.updates, "scaler": scaler}
        return gather_full(named, keep=self.accelerator.is_main_process), metadata

    def averaged_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the network's weights with the averages in the tensors of `state`; a LoRA is merged.

        Every process must call it.
        """
        averages = self.ema.averages()
        named = {inner_name(name): t for name, t in self.model.state_dict().items()}
        frozen = {name: t for name, t in named.items() if name not in averages}
        weights = gather_full(frozen, keep=self.accelerator.is_main_process) | select_averages(tensors)
        return merge_lora_weights(weights)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Resume from a `state`, which any number of processes may have written."""
        trained, names = dict(self._trained()), {inner_name(name): name for name in tensors}
        groups: dict[str, dict[str, Tensor]] = {name: {} for name in trained}
        for name, kept in names.items():
            if name.startswith("optimizer."):
                _, key, parameter = name.split(".", 2)
                groups[parameter][key] = tensors[kept]
        for name, p in trained.items():
            p.copy_(shard_like(tensors[names[f"model.{name}"]], p))
            self.ema.averages()[name].copy_(shard_like(tensors[names[f"ema.{name}"]], p))
            for key, value in groups[name].items():
                self.optimizer.state[p][key] = shard_like(value, p) if value.ndim else value.to(p.device)
        self.weighting.load({name: tensors[f"weighting.{name}"] for name in self.weighting.tensors()})
        self.step, self.skipped_steps = metadata["step"], metadata["skipped_steps"]
        self.bad_in_a_row, self.ema.updates = metadata["bad_in_a_row"], metadata["ema_updates"]
        if self._scaler and metadata["scaler"]:
            self._scaler.load_state_dict(metadata["scaler"])

    @cached_property
    def contents(self) -> dict[str, Any]:
        """Digests of the data, which a checkpoint keeps to notice that they changed."""
        return describe_contents(self.data)

    def _trained(self) -> list[tuple[str, Any]]:
        return [(inner_name(name), p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """Load this process's slice of every batch from the current step on, onto its device."""
        c, device = self.config, self.accelerator.device
        options: dict[str, Any] = {"num_workers": c.num_workers, "pin_memory": device.type == "cuda"}
        options |= {"num_processes": self.accelerator.num_processes, "process_index": self.accelerator.process_index}
        loader = make_loader(self.data, c.batch_size, seed=c.seed, start=self.step, stop=c.steps, **options)
        self.data_timer = DataTimer(loader)
        return to_device(self.data_timer, device)

    def _split(self, batch: Mapping[str, Tensor]) -> list[MicroBatch]:
        """Draw the randomness of a loaded batch and divide it into micro-batches."""
        x0, c = batch["image"], self.config  # x0: (B of this process, C, *spatial)
        bounds = self.process.data_range
        if self.step == 0 and bounds is not None and (x0.min() < bounds[0] - 1e-3 or x0.max() > bounds[1] + 1e-3):
            found = f"[{x0.min():g}, {x0.max():g}]"
            raise ValueError(f"the images lie in {found}; the process has {list(bounds)}, set by clip_sample_range")
        first = self.step * c.batch_size + self.accelerator.process_index * len(x0)
        draws = draw_for_loss(c.seed, first, x0, self.process.num_train_timesteps, c.noise_offset)
        if self.distillation is None:  # whose steps are learned equally often, whatever the density
            draws = draws._replace(t=self.process.timestep(draws.t))
        conditions = Conditions.select(batch, [*self.model.config.conditions, "concat"])
        size = len(x0) // c.gradient_accumulation_steps
        slices = [slice(start, start + size) for start in range(0, len(x0), size)]
        return [MicroBatch(first + rows.start, x0[rows], draws.rows(rows), conditions.rows(rows)) for rows in slices]

    def _losses(self, part: MicroBatch) -> Losses:
        """Compute the losses of a micro-batch, each (B,)."""
        seed_dropout(self.config.seed, part.first)
        inputs: dict[str, Any] = part.conditions.given() | {"t": part.draws.t, "noise": part.draws.noise}
        if self.distillation is not None:
            with self.accelerator.autocast():  # for the teacher, which is not prepared
                return self.distillation(self.prepared, part.x0, guidance=part.draws.guidance, **inputs)
        droppable = [n for n in DROPPABLE if n in inputs and (self.model.config.learned_null or n == "concat")]
        if drop := condition_dropout(droppable, part.draws.chances, self.config.condition_dropout):
            inputs["drop"] = drop
        inputs["self_condition"] = part.draws.self_condition
        return training_losses(self.process, self.prepared, part.x0, weighting=self.weighting, **inputs)

    def _backward(self, part: MicroBatch, last: bool) -> Losses:
        """Add the gradients of a micro-batch; processes exchange them with the last one only."""
        with nullcontext() if last else self.accelerator.no_sync(self.prepared):
            losses = self._losses(part)
            self.accelerator.backward(losses.loss.mean() / self.config.gradient_accumulation_steps)
        return Losses(*(value.detach() for value in losses))

    def _clip(self) -> Tensor:
        """Scale the gradients down to `max_grad_norm`; return their norm before that."""
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(self.prepared.parameters(), self.config.max_grad_norm))
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _gather(self, losses: list[Losses]) -> tuple[Losses, tuple[bool, bool, bool]]:
        """Return the losses of all processes, ordered by position, and what they agree on: stop, save, preview."""
        local = torch.stack([torch.stack([x.double() for x in part]) for part in losses])  # (parts, 3, samples)
        save, preview = self.due(self.step + 1)
        wishes = torch.full_like(local[:, :1], self.stop + 2 * save + 4 * preview)
        gathered = self.accelerator.gather(torch.cat([local, wishes], 1)[None])  # (processes, parts, 4, samples)
        loss, error, t, _ = gathered.permute(2, 0, 1, 3).flatten(1)
        codes = gathered[:, 0, 3, 0].long().tolist()  # of each process
        agreed = any(code & 1 for code in codes), bool(codes[0] & 2), bool(codes[0] & 4)
        return Losses(loss.float(), error.float(), t.long()), agreed

    def _skip(self, parts: list[MicroBatch], losses: Losses) -> None:
        """Count a step that is not finite; after `max_bad_steps` in a row raise NonFiniteError."""
        self.skipped_steps, self.bad_in_a_row = self.skipped_steps + 1, self.bad_in_a_row + 1
        if self._scaler:
            self._scaler.update()  # to a lower scale
        if self.bad_in_a_row < self.config.max_bad_steps:
            return
        where = next((place for place in gather_object([self._locate_nonfinite(parts, losses)]) if place), "the loss")
        steps = f"{self.bad_in_a_row} steps in a row were not finite, the last of them step {self.step + 1}"
        raise NonFiniteError(f"{steps}; first: {where}")

    def _locate_nonfinite(self, parts: list[MicroBatch], losses: Losses) -> str | None:
        """Return the gradient or the module in which NaN or infinity begins on this process."""
        found = None
        if bool(torch.isfinite(losses.loss).all()):
            self.optimizer.zero_grad()  # clipping has spread the NaN to all gradients
            for part in parts:
                self._backward(part, last=part is parts[-1])
            found = first_nonfinite_gradient(self.model)
        for part in parts:  # all of them, as processes with shards must run the network equally often
            place = first_nonfinite_module(self.model, partial(self._losses, part))
            found = found or (place and f"{place}, samples {self._indices(part)}")
        return found

    def _indices(self, part: MicroBatch) -> str:
        """Name the items of a micro-batch: by their indices in the data, or by their positions in a stream."""
        if isinstance(self.data, StreamDataset):
            return f"{part.first} to {part.first + len(part.x0) - 1} of the stream"
        size = self.config.batch_size
        batches = EndlessBatches(self.data.buckets or len(self.data), size, self.config.seed, self.step, self.step + 1)
        start = part.first - self.step * size
        indices = next(iter(batches))[start : start + len(part.x0)]
        return f"{', '.join(str(int(index)) for index in indices)} of the data"
