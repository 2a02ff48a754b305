"""Damage a file at random, open what it belongs to as a user does, and say what came of it.

Every outcome but "silent" and "traceback" is right:

    equal       nothing changed: the damage was put right, passed over with a warning, or did not matter
    warned      something is missing, and a warning says so
    as edited   the edited value is a valid one, and is what was used
    refused     one line
"""

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from support.networks import SMALL, randomise
from unet_denoiser import Diffusion, Run, UNet, load_data
from unet_denoiser.convert import export_checkpoint
from unet_denoiser.training.checkpoints import read_checkpoint
from unet_denoiser.training.launch import TrainRequest, resume_run, start_run
from unet_denoiser.training.loop import train

STOPPED, STEPS = 4, 6
JSON = (".json", ".jsonl")
VALUES = (None, True, -1, 0, 3, 2.5, 1e400, 10**400, "", "x", [], [1, 2], {}, {"a": 1}, math.nan)


@dataclass(frozen=True)
class Target:
    """A folder or file that is opened by `open`, which returns all that a user gets from it, as text."""

    name: str
    path: Path
    open: Callable[[Path], str]
    header_only: bool = False  # bits of the content that no format could notice are left alone


@dataclass(frozen=True)
class Outcome:
    target: str
    file: str
    damage: str
    result: str
    message: str


def describe_tensors(tensors: Any) -> str:
    """Return names, shapes and exact sums of the bits of tensors."""
    total = {}
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous().cpu()
        total[name] = (tuple(value.shape), str(value.dtype), hash(value.numpy().tobytes()))
    return str(total)


def open_model(path: Path) -> str:
    model = UNet.from_pretrained(path)
    process = Diffusion.from_pretrained(path) if (path / "scheduler_config.json").is_file() else None
    return f"{model.config} {process and process.to_dict()} {describe_tensors(model.state_dict())}"


def resume(path: Path) -> str:
    """Load a run's weights, then resume it for its last two steps; return the weights, before and after."""
    pipeline = Run.load(path).load_pipeline()
    before = describe_tensors(pipeline.model.state_dict())
    run, trainer = resume_run(path, TrainRequest(), str)
    for _ in train(run, trainer):
        pass
    tensors, metadata = read_checkpoint(Run.load(path).checkpoints.find("latest"))
    config = {name: value for name, value in run.to_dict().items() if name != "training"}
    metrics = (path / "metrics.jsonl").read_text().count("\n")
    return f"{before} {describe_tensors(tensors)} {metadata['step']} {config} {metrics > 0}"


def open_arrays(path: Path) -> str:
    data = load_data(str(path))
    items = [data[i] for i in range(len(data))]
    return f"{len(data)} {data.class_names} " + describe_tensors(
        {f"{i}.{name}": torch.as_tensor(value) for i, item in enumerate(items) for name, value in item.items()}
    )


def make_targets(folder: Path) -> list[Target]:
    """Make one of each thing that a user opens."""
    torch.manual_seed(0)
    model = randomise(UNet(**SMALL | {"upsample": "nearest", "learned_null": False, "num_heads": 1})).eval()
    model.save_pretrained(folder / "model")
    Diffusion().save_pretrained(folder / "model")
    export_checkpoint(model.state_dict(), model.config, folder / "diffusers", "diffusers")
    training = {"steps": STEPS, "checkpoint_every": 2, "preview_every": 1000, "num_workers": 0, "batch_size": 8}
    network = {"model_channels": 8, "num_res_blocks": 1, "channel_mult": (1,)}
    run, trainer = start_run(TrainRequest("digits", folder / "run", training=training, model=network), str)
    for step in train(run, trainer):
        if step.step == STOPPED:
            break
    images, labels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8), np.arange(6) % 2
    np.savez(folder / "stored.npz", images=images, labels=labels)
    np.savez_compressed(folder / "packed.npz", images=images, labels=labels)
    np.save(folder / "images.npy", images)
    return [
        Target("model", folder / "model", open_model),
        Target("diffusers folder", folder / "diffusers", open_model, header_only=True),  # has no digest
        Target("run", folder / "run", resume),
        Target("stored.npz", folder / "stored.npz", open_arrays),
        Target("packed.npz", folder / "packed.npz", open_arrays),
        Target("images.npy", folder / "images.npy", open_arrays, header_only=True),
    ]


def damage(file: Path, draw: Random, header_only: bool) -> str:
    """Damage a file; return how."""
    content = bytearray(file.read_bytes())
    kinds = ["bits", "truncated", "zeros", "edited"] if file.suffix in JSON else ["bits", "truncated", "zeros"]
    kind, length = draw.choice(kinds), len(content)
    if header_only and file.suffix == ".safetensors":
        length = 8 + int.from_bytes(content[:8], "little")
    elif header_only and file.suffix == ".npy":
        length = 128
    if kind == "edited":
        return edit_json(file, draw)
    if kind == "bits":
        where = [draw.randrange(length) for _ in range(draw.randint(1, 3))]
        for place in where:
            content[place] ^= 1 << draw.randrange(8)
        said = f"bits at {where}"
    elif kind == "truncated":
        size = draw.randrange(len(content))
        content, said = content[:size], f"cut to {size} of {len(content)} bytes"
    else:
        start = draw.randrange(length)
        stop = min(start + 512, length)
        content[start:stop], said = bytes(stop - start), f"zeros from {start} to {stop}"
    file.write_bytes(content)
    return said


def edit_json(file: Path, draw: Random) -> str:
    """Change one value of a JSON file, or of a line of JSON, or remove it."""
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    number = draw.randrange(len(lines))
    tree = json.loads(lines[number])
    parent, key = draw.choice(list(find_values(tree)))
    if draw.random() < 0.25 and isinstance(parent, dict):
        said = f"{key} removed"
        del parent[key]
    else:
        value = draw.choice(VALUES)
        said = f"{key}={str(value)[:20]}"
        parent[key] = value
    lines[number] = json.dumps(tree)
    file.write_text("\n".join(lines) + "\n" * (file.suffix == ".jsonl"))
    return said


def find_values(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the parent and key of every value in a JSON tree."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from find_values(tree[key])


def try_once(target: Target, truth: str, draw: Random, work: Path) -> Outcome:
    """Damage a file of a copy of a target, open it, and judge what happens."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    path = work / target.path.name
    (shutil.copytree if target.path.is_dir() else shutil.copy)(target.path, path)
    files = (
        [path]
        if path.is_file()
        else sorted(p for p in path.rglob("*") if p.stat().st_size and "samples" not in p.parts)
    )
    file = draw.choice([p for p in files if p.is_file() and p.suffix != ".png"])
    before = file.read_bytes()
    how = damage(file, draw, target.header_only)
    edited, warned = file.suffix in JSON, []  # other digits in a number are a valid text too
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            got = target.open(path)
        except (ValueError, TypeError, OSError) as error:
            result = "refused" if "\n" not in str(error) else "traceback"
            got, message = None, f"{type(error).__name__}: {error}"
        except Exception as error:  # the command would print a traceback
            got, result, message = None, "traceback", f"{type(error).__name__}: {error}"
    if got is not None:
        warned = [str(w.message) for w in seen if issubclass(w.category, UserWarning)]
        message = "; ".join(warned)
        unchanged = got == truth or (file.exists() and file.read_bytes() == before)
        result = "equal" if unchanged else "as edited" if edited else "warned" if warned else "silent"
    return Outcome(target.name, str(file.relative_to(work)), how, result, message)


def run(folder: Path, count: int, seed: int) -> list[Outcome]:
    """Damage `count` times, each time another file of another target."""
    targets, draw = make_targets(folder), Random(seed)
    truths = {}
    for target in targets:
        copy = folder / "truth" / target.path.name
        copy.parent.mkdir(exist_ok=True)
        (shutil.copytree if target.path.is_dir() else shutil.copy)(target.path, copy)
        truths[target.name] = target.open(copy)
    return [try_once(target, truths[target.name], draw, folder / "work") for target in draw.choices(targets, k=count)]
