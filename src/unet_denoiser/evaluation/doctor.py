"""Looks at a run and names the likely cause of grey, noisy or copied samples: measuring; `findings` judges."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.config.unet import CONDITIONS
from unet_denoiser.data.dataloader import make_loader
from unet_denoiser.data.dataset import ImageDataset, StreamDataset
from unet_denoiser.data.load import load_data
from unet_denoiser.diffusion.loss import training_losses
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.evaluation.findings import Finding, Measures, judge, likely_cause
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.loop import Step, sample
from unet_denoiser.training.checkpoints import read_checkpoint
from unet_denoiser.training.run import Run
from unet_denoiser.utils.files import write_atomically
from unet_denoiser.utils.images import save_grid

BATCH = 32
LEVELS = 8
SAMPLING_STEPS = 25
SEARCHED, VALUES = 4096, 2**27  # training images that samples are compared with, at most, and values in all of them
Images = dict[str, Tensor]


@dataclass(frozen=True)
class Diagnosis:
    """What was measured, what it means, and the pictures."""

    path: Path
    measures: Measures
    findings: list[Finding]
    pictures: list[Path]

    def text(self) -> str:
        """A few lines to read: the likely cause, the findings, the loss per noise level."""
        lines = [likely_cause(self.findings), ""]
        for f in self.findings:
            lines += [f"{f.severity}: {f.name}: {f.text}", f"    -> {f.advice}"]
        if self.measures["levels"]:
            lines += ["", "noise level  loss     that of a trivial guess"]
        lines += [f"t = {x['t']:<7}  {x['error']:<8.4f} {x['trivial']:.4f}" for x in self.measures["levels"]]
        return "\n".join([*lines, "", *map(str, self.pictures)])


def examine(
    run: Run,
    data: ImageDataset | StreamDataset | None = None,
    *,
    num_images: int = 128,
    num_samples: int = 32,
    device: str = "cpu",
    on_step: Callable[[Step], object] | None = None,
) -> Diagnosis:
    """Measure a run with its averaged weights and write RUN/doctor: report.json and pictures.

    Args:
        data: what it was trained on (default: loaded anew).
        num_images: training images that the loss per noise level is measured on.
        num_samples: samples to make and to look for among the training images.
        on_step: called after every step of sampling, for a progress bar.

    Raises:
        ValueError, OSError: a run without a model, or data that cannot be read.
    """
    for name, value in (("num_images", num_images), ("num_samples", num_samples)):
        if value < 2:
            raise ValueError(f"{name}={value} must be at least 2")
    model = run.load_model().to(device)
    data = load_data(run.data) if data is None else data
    if not isinstance(data, ImageDataset):
        raise ValueError(f"{run.path} was trained on a stream, which cannot be searched; give data that can be indexed")
    searched = min(SEARCHED, VALUES // (data.channels * math.prod(data.image_size)))
    images = _some(data, max(num_images, num_samples, searched))
    folder = run.path / "doctor"
    bad = [name for name, p in model.state_dict().items() if not torch.isfinite(p).all()]
    bounds = run.process.data_range
    measures: Measures = {
        "run": str(run.path),
        "data_range": bounds,
        "timesteps": run.process.num_train_timesteps,
        "signal_at_end": float(run.process.alphas[-1]),
        "bad_weights": bad,
        "data": _statistics(images["image"], bounds),
        "training": _training(run, data),
        "curve": _curve(run.path / "metrics.jsonl"),
        "levels": [],
        "ema": _ema(run) | {"averaged_over_raw": None},
        "samples": {},
        "neighbours": {},
    }
    pictures = []
    if not bad:
        few = {name: value[:num_images] for name, value in images.items()}
        errors, picture = _errors(model, run.process, few)
        columns = picture.shape[0] // 3
        pictures.append(save_grid(run.decode(picture), folder / "denoising.png", columns, run.picture_range))
        measures["levels"] = _levels(errors, run.process, few["image"])
        measures["ema"]["averaged_over_raw"] = _against_raw(run, model, errors, few)
        x = _sample(model, run.process, {name: value[:num_samples] for name, value in images.items()}, on_step)
        measures["samples"] = _statistics(x, bounds)
        if measures["samples"]["finite"]:
            measures["neighbours"], nearest = _neighbours(x, images["image"])
            shown = min(16, len(x))
            pairs = torch.cat([x[:shown], images["image"][nearest[:shown]]])
            pictures.append(save_grid(run.decode(pairs), folder / "neighbours.png", shown, run.picture_range))
    report = Diagnosis(run.path, measures, judge(measures), pictures)
    _write(report, folder / "report.json")
    return report


def _write(report: Diagnosis, path: Path) -> None:
    content: dict[str, Any] = {
        "likely_cause": likely_cause(report.findings),
        "findings": [f._asdict() for f in report.findings],
    }
    content |= {"measures": report.measures}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


# ---- the data --------------------------------------------------------------------------------------------------------


def _some(data: ImageDataset | StreamDataset, count: int) -> Images:
    """Up to so many images in a random order, with their conditions; all of one size."""
    there = _count(data) or count
    size = there if there <= 512 else BATCH  # whole batches alone are taken
    loader = make_loader(data, size, seed=0, start=0, stop=max(1, min(count, there) // size), num_workers=0)
    batches = list(loader)
    batches = [batch for batch in batches if batch["image"].shape[1:] == batches[0]["image"].shape[1:]]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _count(data: ImageDataset | StreamDataset) -> int | None:
    """How many images there are; None for a stream, which does not know."""
    return None if isinstance(data, StreamDataset) else len(data)


def _statistics(x: Tensor, bounds: tuple[float, float] | None) -> dict[str, Any]:
    """Of images or samples: range, mean per channel, spread, share of values at the ends, and how rough they are."""
    finite = bool(torch.isfinite(x).all())
    x = x.float().nan_to_num()  # JSON has no other numbers
    variance = x.var(dim=[0, *range(2, x.ndim)], correction=0).mean()
    # half the mean square difference of neighbours is the variance where they have nothing to do with each other
    rough = x.diff(dim=-1).square().mean() / 2 / variance.clamp_min(1e-12) if x.shape[-1] > 1 else torch.tensor(1.0)
    ends = torch.tensor(0.0)
    if bounds is not None:
        margin = 0.005 * (bounds[1] - bounds[0])
        ends = ((x <= bounds[0] + margin) | (x >= bounds[1] - margin)).float().mean()
    return {
        "finite": finite,
        "shape": list(x.shape),
        "min": float(x.min()),
        "max": float(x.max()),
        "mean": x.mean(dim=[0, *range(2, x.ndim)]).tolist(),
        "mean_error": float(x.flatten(2).mean(2).std(0, correction=min(1, len(x) - 1)).max()) / math.sqrt(len(x)),
        "std": float(variance.sqrt()),
        "roughness": float(rough),
        "saturated": float(ends),
    }


# ---- the network -----------------------------------------------------------------------------------------------------


def _errors(model: UNet, process: Diffusion, images: Images) -> tuple[Tensor, Tensor]:
    """Squared errors of the prediction, (LEVELS, N), and x_t, predicted x0 and x0 of one image at every level."""
    device, rows, shown = model.input_conv.weight.device, [], []
    for t in _timesteps(process):
        errors = []
        for start in range(0, len(images["image"]), BATCH):
            batch = {name: value[start : start + BATCH].to(device) for name, value in images.items()}
            x0, inputs = batch["image"], _conditions(model, batch)
            # on the CPU, by position: the same for every network and device
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(start + t)).to(device)
            at = torch.full((len(x0),), t, device=device)
            record = _Recorded(model)
            with torch.no_grad():
                errors.append(training_losses(process, record, x0, t=at, noise=noise, **inputs).error.cpu())
            if start == 0:
                xt = process.add_noise(x0[:1], noise[:1], at[:1])
                output = record.output[:1, : x0.shape[1]].float()
                estimate = process.predict_x0(output, xt, process.alphas[t].to(device), process.sigmas[t].to(device))
                shown.append(torch.stack([xt[0], estimate[0], x0[0]]).cpu())
        rows.append(torch.cat(errors))
    return torch.stack(rows), torch.stack(shown, dim=1).flatten(0, 1)


class _Recorded:
    """A network that keeps its last output."""

    def __init__(self, model: UNet) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.output: Tensor = self.model(*args, **kwargs)
        return self.output


def _timesteps(process: Diffusion) -> list[int]:
    return [process.num_train_timesteps * (2 * i + 1) // (2 * LEVELS) for i in range(LEVELS)]


def _conditions(model: UNet, batch: Images) -> dict[str, Any]:
    names = [name for name, option in CONDITIONS.items() if getattr(model.config, option) is not None]
    names += ["context_mask"] * ("context" in names)
    return {name: batch[name] for name in [*names, "concat"] if name in batch}


def _levels(errors: Tensor, process: Diffusion, x0: Tensor) -> list[dict[str, float]]:
    """Measured error at each level, and that of guessing each pixel from x_t's alone, knowing mean and variance.

    For independent Gaussian pixels of variance v that guess is the best there is; its error in x0 is
    v sigma^2 / (alpha^2 v + sigma^2). For v = 1 that is alpha^2 in epsilon, 1 in v and sigma^2 in x0.
    """
    variance = x0.float().var(dim=[0, *range(2, x0.ndim)], correction=0).double()
    found = []
    for row, t in zip(errors, _timesteps(process), strict=True):
        alpha, sigma = process.alphas[t].double(), process.sigmas[t].double()
        of_x0 = (variance * sigma**2 / (alpha**2 * variance + sigma**2)).mean()
        trivial = float(of_x0 * process.prediction.error_scale((alpha / sigma) ** 2))
        error = float(row.mean())
        signal = float((alpha / sigma) ** 2 * variance.mean())
        found.append({"t": t, "signal": signal, "error": error, "trivial": trivial})
        found[-1]["ratio"] = error / max(trivial, 1e-12)
    return found


def _against_raw(run: Run, model: UNet, errors: Tensor, images: Images) -> float | None:
    """Loss of the averaged weights over that of the latest raw ones, on the same images and noise."""
    paths = run.checkpoints.paths()
    if not paths or run.training.lora_rank:
        return None
    tensors, _ = read_checkpoint(paths[-1])
    raw = {name.removeprefix("model."): tensors[name] for name in tensors if name.startswith("model.")}
    other = UNet.from_config(model.config).eval()
    other.load_state_dict(model.state_dict() | raw)
    few = {name: value[:BATCH] for name, value in images.items()}
    found, _ = _errors(other.to(model.input_conv.weight.device), run.process, few)
    # geometric mean over the levels, so that each counts the same
    logs = errors[:, :BATCH].mean(1).clamp_min(1e-12).log() - found.mean(1).clamp_min(1e-12).log()
    ratio = float(logs.mean().exp())
    return ratio if math.isfinite(ratio) else None


def _sample(model: UNet, process: Diffusion, images: Images, on_step: Callable[[Step], object] | None) -> Tensor:
    count = len(images["image"])
    options: dict[str, Any] = {
        "image_size": images["image"].shape[2:],
        "num_inference_steps": min(SAMPLING_STEPS, process.num_train_timesteps),
    }
    options |= {"batch_size": BATCH, "on_step": on_step} | _conditions(model, images)
    return sample(model, process, seeds=range(count), **options).cpu()


def _neighbours(x: Tensor, images: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Distances (root mean square per value) to the nearest training image: of samples, and of training images."""
    flat, scale = images.flatten(1).float(), math.sqrt(images[0].numel())
    distances, nearest = (torch.cdist(x.flatten(1).float(), flat) / scale).min(1)
    own = torch.cdist(flat[:512], flat) / scale
    own[torch.arange(len(own)), torch.arange(len(own))] = math.inf
    samples, data = float(distances.median()), float(own.min(1).values.median()) if len(flat) > 1 else 0.0
    found: dict[str, Any] = {"samples": samples, "data": data, "searched": len(flat)}
    if data > 0:
        found |= {"ratio": samples / data, "copies": samples < 0.5 * data}
    return found, nearest


# ---- the training ----------------------------------------------------------------------------------------------------


def _training(run: Run, data: ImageDataset | StreamDataset) -> dict[str, Any]:
    paths, images = run.checkpoints.paths(), _count(data)
    step = int(read_checkpoint(paths[-1])[1]["step"]) if paths else None
    epochs = (step or 0) * run.training.batch_size / images if images else None
    return {"step": step, "steps": run.training.steps, "images": images, "epochs": epochs}


def _ema(run: Run) -> dict[str, Any]:
    """The decay, and the share of the averages that is still the start, given the decay's warm-up (see `EMA`)."""
    paths, decay, share = run.checkpoints.paths(), run.training.ema_decay, None
    if paths:
        updates = int(read_checkpoint(paths[-1])[1]["ema_updates"])
        share = math.exp(sum(math.log(max(1e-300, min(decay, (1 + n) / (10 + n)))) for n in range(1, updates + 1)))
    return {"decay": decay, "share_of_start": share}


def _curve(path: Path) -> dict[str, Any]:
    """From metrics.jsonl: lines without a finite loss, and its change from the third to the last quarter."""
    losses, bad = [], 0
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            loss = json.loads(line)["loss"]
        except (ValueError, KeyError):  # cut off by a kill
            continue
        if isinstance(loss, int | float) and math.isfinite(loss):
            losses.append(float(loss))
        else:
            bad += 1
    quarter = len(losses) // 4
    change = None
    if quarter >= 5:  # fewer tell nothing
        change = sum(losses[-quarter:]) / max(1e-12, sum(losses[-2 * quarter : -quarter])) - 1
    return {"not_finite": bad, "change": change}
