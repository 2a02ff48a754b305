"""The export of a network: one folder with the network, its schedule, an example and a README, whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unet_denoiser.config.base import halve
from unet_denoiser.config.export import ExportConfig
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.export import onnx_format, openvino_format, torch_format
from unet_denoiser.export.check import CheckedCase, check_levels, compare, draw_inputs, require_precise
from unet_denoiser.export.libraries import is_installed
from unet_denoiser.export.network import AXES, ExportedNetwork, InputSpec, call_network, input_specs, least_size
from unet_denoiser.export.program import trace
from unet_denoiser.export.readme import Subject, format_readme
from unet_denoiser.export.schedule import SCHEDULE_NAME, describe_schedule
from unet_denoiser.models.unet import UNet
from unet_denoiser.utils.files import write_atomically, write_json

NETWORK_FILES = {"onnx": "network.onnx", "openvino": "network.xml", "torch": "network.pt2"}
EXAMPLE_NAME = "example.npz"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_DEFAULT_TOKENS = 77
Network = Callable[[Mapping[str, np.ndarray[Any, Any]]], list[np.ndarray[Any, Any]]]


@dataclass(frozen=True)
class ExportRequest:
    """A network to export, and what its README says of it.

    Args:
        model: in evaluation mode, in float32.
        steps: the timesteps of the sampling in the README, falling.
        clip_sample: clip each predicted x0 in it.
        example: conditions of one sample or more, by name; the sampling in the README uses them.
        calibration: inputs of calls at all noise levels, for int8.
        samples: of the network (N, C, *spatial): the check of int8, whose ranges are theirs, is made with them.
        subject: what the README says of the network.
        tokens: of a context in a file of fixed sizes.
    """

    model: UNet
    process: Diffusion
    steps: Sequence[int]
    clip_sample: bool = True
    example: Mapping[str, Tensor] = field(default_factory=dict)
    calibration: Sequence[Mapping[str, Tensor]] | None = None
    samples: Tensor | None = None
    subject: Subject = field(default_factory=Subject)
    tokens: int | None = None


@dataclass(frozen=True)
class ExportReport:
    """The result of an export: its folder, and the errors of its check."""

    folder: Path
    checked: Sequence[CheckedCase]
    error: float


def export_network(request: ExportRequest, out: Path, config: ExportConfig) -> ExportReport:
    """Export a network to a new folder, after checking the file's outputs against the network's.

    Raises:
        ValueError: an error past the bound of the precision, or sizes that the network does not take.
        FileExistsError: the folder exists already.
        ImportError: a library of the extra `export` is missing.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; give a new name")
    if request.model.dtype != torch.float32:
        raise ValueError(f"the network has weights in {request.model.dtype}; export takes those in float32")
    specs = fix_axes(input_specs(request.model.config, request.process), request, config)
    found: list[ExportReport] = []

    def write(folder: Path) -> None:
        folder.mkdir()
        path = folder / NETWORK_FILES[config.to]
        _save(request, specs, path, config)
        checked = _compare(request, open_network(path, config, specs), specs)
        found.append(ExportReport(out, checked, require_precise(checked, config.precision)))
        write_json(folder / SCHEDULE_NAME, describe_schedule(request.process, request.steps, request.clip_sample))
        example: dict[str, Any] = _make_example(request, specs)
        np.savez(folder / EXAMPLE_NAME, **example)
        process, network = request.process, request.model.config
        readme = format_readme(request.subject, specs, config, checked, process=process, network=network)
        (folder / "README.md").write_text(readme, encoding="utf-8")

    write_atomically(out, write)
    return found[0]


def require_libraries(config: ExportConfig) -> None:
    """Raise ImportError, with the command that installs it, if a library that the format needs is missing."""
    needed = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",), "torch": ()}[config.to]
    for name in (*needed, *["nncf"] * (config.precision == "int8")):
        if not is_installed(name):
            raise ImportError(f"to={config.to!r} needs {name}: pip install 'unet-denoiser[export]'")


def fix_axes(specs: Mapping[str, InputSpec], request: ExportRequest, config: ExportConfig) -> dict[str, InputSpec]:
    """Return the inputs with those axes fixed that the export fixes; ValueError for a wrong number of axes."""
    space, fixed = AXES[request.model.config.dims], dict[str, int]()
    if config.image_size is not None:
        sizes = config.image_size * (len(space) if len(config.image_size) == 1 else 1)
        if len(sizes) != len(space):
            raise ValueError(f"image_size={config.image_size} must be 1 or {len(space)} numbers")
        fixed |= dict(zip(space, sizes, strict=True))
    if config.batch_size is not None:
        fixed["batch"] = config.batch_size
    if config.image_size is not None and config.batch_size is not None:
        fixed["tokens"] = request.tokens or _DEFAULT_TOKENS
    return {
        name: spec._replace(shape=tuple(fixed.get(n, n) if isinstance(n, str) else n for n in spec.shape))
        for name, spec in specs.items()
    }


def free_axes(specs: Mapping[str, InputSpec]) -> set[str]:
    """Return the names of the axes that may have any length."""
    return {axis for spec in specs.values() for axis in spec.shape if isinstance(axis, str)}


def _cases(model: UNet, specs: Mapping[str, InputSpec]) -> list[dict[str, int]]:
    """Return the lengths of the axes that are checked: the network's own, and odd ones where any may come."""
    space = AXES[model.config.dims]
    own = dict(zip(space, model.config.sizes, strict=True)) | {"batch": 2, "tokens": 7}
    low = least_size(model.config)
    own |= {axis: max(own[axis], low) for axis in space}
    free = free_axes(specs)
    fixed = {"batch": _fixed(specs["x"].shape[0]), **dict(zip(space, map(_fixed, specs["x"].shape[2:]), strict=True))}
    first = own | {axis: n for axis, n in fixed.items() if n is not None}
    others = []
    if "batch" in free or "tokens" in free:
        others.append(first | {axis: n for axis, n in (("batch", 3), ("tokens", 4)) if axis in free})
    if free & set(space):
        odd = {axis: max(low, halve(own[axis], 1) + 1 + i) for i, axis in enumerate(space)}
        others.append(first | odd | ({"batch": 1} if "batch" in free else {}))
    return [first, *others]


def _fixed(length: int | str) -> int | None:
    return length if isinstance(length, int) else None


def _save(request: ExportRequest, specs: Mapping[str, InputSpec], path: Path, config: ExportConfig) -> None:
    """Trace the network in the export's precision, and write it in the export's format."""
    model, names = copy.deepcopy(request.model).cpu().eval().requires_grad_(False), tuple(specs)
    if config.to != "openvino" and config.precision in _DTYPES:
        model = model.to(_DTYPES[config.precision])
    generator, axes = torch.Generator().manual_seed(0), _cases(request.model, specs)[0]
    inputs = draw_inputs(specs, request.process, request.process.num_train_timesteps // 2, axes, generator=generator)
    program = trace(
        ExportedNetwork(model, names), inputs, {n: s.shape for n, s in specs.items()}, least_size(model.config)
    )
    if config.to == "torch":
        torch_format.save(program, path)
    elif config.to == "onnx":
        onnx_format.save(program, path, names)
    else:
        converted = openvino_format.convert(program, names)
        openvino_format.fix_shapes(converted, {name: spec.shape for name, spec in specs.items()})
        if config.precision == "int8":
            from unet_denoiser.export.quantization import quantize

            converted = quantize(converted, _fit_calls(request.calibration or (), specs))
        openvino_format.save(converted, path, half=config.precision in _DTYPES)


def _fit_calls(calls: Sequence[Mapping[str, Tensor]], specs: Mapping[str, InputSpec]) -> list[dict[str, Tensor]]:
    """Cut recorded calls to the fixed lengths of a file's batch and tokens."""
    fitted = []
    for call in calls:
        size = specs["x"].shape[0]
        for first in range(0, len(call["x"]), size if isinstance(size, int) else len(call["x"])):
            rows = torch.arange(first, first + (size if isinstance(size, int) else len(call["x"]))) % len(call["x"])
            fitted.append({name: fit_tokens(call[name][rows], name, specs) for name in specs})
    return fitted


def fit_tokens(value: Tensor, name: str, specs: Mapping[str, InputSpec]) -> Tensor:
    """Cut or pad the tokens of a context, or its mask, to a file's fixed number; other inputs stay as they are."""
    if name not in ("context", "context_mask") or isinstance(count := specs[name].shape[1], str):
        return value
    missing = max(0, count - value.shape[1])
    padding = value.new_zeros(len(value), missing, *value.shape[2:])
    return torch.cat([value[:, :count], padding], dim=1)


def _compare(request: ExportRequest, network: Network, specs: Mapping[str, InputSpec]) -> list[CheckedCase]:
    """Compare an exported file with the network."""
    model, process = request.model, request.process

    def original(inputs: Mapping[str, Tensor]) -> Tensor:
        return call_network(model, {name: value.to(model.device) for name, value in inputs.items()})

    def draw(k: int, axes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        return draw_inputs(specs, process, k, axes, generator=generator, samples=request.samples)

    return compare(network, original, draw, check_levels(process), _cases(model, specs))


def open_network(path: Path, config: ExportConfig, specs: Mapping[str, InputSpec]) -> Network:
    """Open an exported file to call it with arrays by name."""
    if config.to == "onnx":
        return onnx_format.OnnxNetwork(path)
    if config.to == "torch":
        return torch_format.TorchNetwork(path, tuple(specs))
    return openvino_format.OpenVINONetwork(path, config.precision)


def _make_example(request: ExportRequest, specs: Mapping[str, InputSpec]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the inputs of one call, with the example's conditions, and the network's output for them."""
    axes, process = _cases(request.model, specs)[0], request.process
    k = process.num_train_timesteps // 2
    given = {name: value for name, value in request.example.items() if name in specs}
    if "tokens" in free_axes(specs) and "context" in given:
        axes = axes | {"tokens": given["context"].shape[1]}
    inputs = draw_inputs(specs, process, k, axes, generator=torch.Generator().manual_seed(1))
    for name, value in given.items():
        rows = value[torch.arange(axes["batch"]) % len(value)].to(inputs[name].dtype)
        inputs[name] = fit_tokens(rows, name, specs)
        if name == "context" and "context_mask" not in given:
            inputs["context_mask"] = fit_tokens(torch.ones(rows.shape[:2], dtype=torch.bool), "context_mask", specs)
    inputs |= {name: torch.zeros_like(value) for name, value in inputs.items() if name.startswith("drop_")}
    with torch.no_grad():
        output = call_network(request.model, {name: v.to(request.model.device) for name, v in inputs.items()})
    others = {name: value for name, value in request.example.items() if name.startswith("negative_")}
    for name, value in others.items():
        rows = value[torch.arange(axes["batch"]) % len(value)]
        inputs[name] = fit_tokens(rows, name.removeprefix("negative_"), specs)
    return {name: value.numpy() for name, value in inputs.items()} | {"output": output.cpu().numpy()}
