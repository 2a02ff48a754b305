"""Engines that sampling runs a network in: converted once for its weights, compiled once per size, kept on disk."""

from __future__ import annotations

import atexit
import copy
import json
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unet_denoiser.config.base import BackendPrecision
from unet_denoiser.export import onnx_format, openvino_format
from unet_denoiser.export.libraries import require
from unet_denoiser.export.network import AXES
from unet_denoiser.export.program import trace
from unet_denoiser.export.steps import Entry, NetworkStep, draw_step_inputs, step_axes
from unet_denoiser.models.unet import UNet
from unet_denoiser.utils.cache import cache_directory, compute_once, digest

EngineName = Literal["openvino", "onnxruntime"]
Calibration = Callable[[], list[dict[str, Tensor]]]
_KEPT = 8  # compiled sizes that a process holds


class Engines:
    """The steps of one network in an engine; each is made when it is first called.

    Args:
        model: on a CPU, in float32 and in evaluation mode; its weights must not change.
        name: of the engine.
        precision: of its arithmetic.
        calibration: inputs of the step "full" at all noise levels, for int8.
    """

    def __init__(
        self, model: UNet, name: EngineName, precision: BackendPrecision, calibration: Calibration | None = None
    ) -> None:
        if model.device.type != "cpu" or model.dtype != torch.float32:
            raise ValueError(
                f"backend={name!r} runs networks in float32 on a CPU; this one is in {model.dtype} on {model.device}; "
                "give device cpu, or backend 'torch'"
            )
        require("openvino" if name == "openvino" else "onnxruntime", f"backend={name!r}")
        self.model, self.name, self.precision, self.calibration = model, name, precision, calibration
        self.files: dict[tuple[Any, ...], Path] = {}

    def __call__(self, entry: Entry, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs of a step."""
        sizes = tuple(inputs["x"].shape[2:])
        if (entry, sizes) not in self.files:
            self.files[entry, sizes] = self._make(entry, sizes)
        shapes = tuple((name, tuple(value.shape)) for name, value in inputs.items())
        network = _open(self.files[entry, sizes], self.precision, shapes, torch.get_num_threads())
        outputs = network({name: value.detach().contiguous().numpy() for name, value in inputs.items()})
        return tuple(torch.from_numpy(output) for output in outputs)

    def is_kept(self, entry: Entry, sizes: tuple[int, ...]) -> bool:
        """Return True if a step is converted already."""
        return (cache_directory() / "engines" / self._key(entry, sizes)).is_dir()

    def _make(self, entry: Entry, sizes: tuple[int, ...]) -> Path:
        """Return the converted step, from the cache if it is there."""
        return compute_once("engines", self._key(entry, sizes), lambda folder: self._convert(folder, entry, sizes))

    def _key(self, entry: Entry, sizes: tuple[int, ...]) -> str:
        libraries = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnxscript")}[self.name]
        versions = [f"{name} {version(name)}" for name in ("unet-denoiser", "torch", *libraries)]
        return digest([self._weights, self.name, self.precision, entry, str(sizes), *versions])

    @cached_property
    def _weights(self) -> str:
        """A digest of the architecture and the weights."""
        tensors = (value.contiguous().view(torch.uint8).numpy().data for value in self.model.state_dict().values())
        return digest([json.dumps(self.model.config.to_dict(), sort_keys=True), *map(bytes, tensors)])

    def _convert(self, folder: Path, entry: Entry, sizes: tuple[int, ...]) -> None:
        """Convert a step for one size and any batch: with the size open as well, it takes three times as long."""
        fixed, model = dict(zip(AXES[len(sizes)], sizes, strict=True)), copy.deepcopy(self.model).requires_grad_(False)
        axes = {
            name: tuple(fixed.get(n, n) if isinstance(n, str) else n for n in shape)
            for name, shape in step_axes(model, entry).items()
        }
        names, inputs = tuple(axes), draw_step_inputs(model, entry, fixed | {"batch": 2, "tokens": 3})
        program = trace(NetworkStep(model, entry), inputs, axes)
        outputs = ("output", "deep_features") if entry == "full_deep" else ("output",)
        if self.name == "onnxruntime":
            return onnx_format.save(program, folder / "network.onnx", names, outputs)
        converted = openvino_format.convert(program, names, outputs)
        if self.precision == "int8":
            from unet_denoiser.export.quantization import quantize

            assert self.calibration is not None
            converted = quantize(converted, self.calibration())
        openvino_format.save(converted, folder / "network.xml")


@lru_cache(maxsize=_KEPT)
def _open(folder: Path, precision: BackendPrecision, shapes: tuple[Any, ...], threads: int) -> Any:
    """Open a converted step for one size; onnxruntime's file serves all sizes."""
    if (folder / "network.onnx").is_file():
        return _open_onnx(folder / "network.onnx", threads)
    compiled = cache_directory() / "openvino"
    return openvino_format.OpenVINONetwork(folder / "network.xml", precision, dict(shapes), compiled, threads)


@lru_cache(maxsize=_KEPT)
def _open_onnx(path: Path, threads: int) -> Any:
    return onnx_format.OnnxNetwork(path, threads)


def release_engines() -> None:
    """Free all compiled networks of this process; those on disk stay."""
    _open.cache_clear()
    _open_onnx.cache_clear()


atexit.register(release_engines)  # while their libraries are still there
