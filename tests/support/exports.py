"""Exported networks: small pipelines, and the code of a README run as a user runs it."""

import contextlib
import json
import os
import re

import numpy as np
import torch

from support.networks import small
from unet_denoiser import DataConfig, Diffusion
from unet_denoiser.export import exporter
from unet_denoiser.export.network import call_network
from unet_denoiser.sampling.pipeline.pipeline import Pipeline

NET = {"in_channels": 1, "out_channels": 1}


def pipeline(folder, process=None, **options):
    """Make a pipeline of a small network with random weights, whose output is moderate."""
    model = small(**NET | options)
    model.output[2].weight.data.mul_(0.3)
    process = process or Diffusion()
    names = tuple(map(str, range(model.config.num_classes or 0))) or None
    data = DataConfig(str(folder), model.config.sizes, process.data_channels(model.config), names)
    return Pipeline(folder, model, process, data)


def readme_blocks(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def run_readme(folder):
    """Run the README's code in its folder, without this package; return its names."""
    code, names, before = "\n".join(readme_blocks(folder)), {}, os.getcwd()
    assert "unet_denoiser" not in code
    os.chdir(folder)
    try:
        exec(compile(code, "README.md", "exec"), names)
    finally:
        os.chdir(before)
    return names


def first_noise(folder):
    """Return the noise that the README's sampling starts from."""
    shape = np.load(folder / "example.npz")["x"].shape
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def read_schedule(folder):
    return json.loads((folder / "schedule.json").read_text())


def as_arrays(model):
    """Return a network as an engine is called: with arrays by name."""

    def network(inputs):
        with torch.no_grad():
            return [call_network(model, {name: torch.from_numpy(np.array(v)) for name, v in inputs.items()}).numpy()]

    return network


def without_engine(monkeypatch, model):
    """Let exports write an empty file, and let the network stand for the engine that would read it."""
    monkeypatch.setattr(exporter, "_save", lambda request, specs, path, config: path.touch())
    monkeypatch.setattr(exporter, "open_network", lambda *args: as_arrays(model))


def run_sampling(folder, model):
    """Run the sampling of the README alone, with the network itself in place of the exported file."""
    call, loop = readme_blocks(folder)
    example = dict(np.load(folder / "example.npz"))
    network = as_arrays(model)
    names = {"np": np, "example": example, "network": lambda **inputs: network(inputs)[0]}
    compile(call, "README.md", "exec")
    with contextlib.chdir(folder):
        exec(compile(loop, "README.md", "exec"), names)
    return np.load(folder / "samples.npy")
