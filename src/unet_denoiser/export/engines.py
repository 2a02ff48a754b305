"""Engines that sampling runs a network in: converted once for its weights, compiled once per size, kept on disk."""

from __future__ import annotations

import atexit
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
from unet_denoiser.export.network import AXES, least_size
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
        # the few sizes below cannot be traced together with all others
        fixed = sizes if min(sizes) < least_size(self.model.config) else None
        if (entry, fixed) not in self.files:
            self.files[entry, fixed] = self._make(entry, fixed)
        shapes = tuple((name, tuple(value.shape)) for name, value in inputs.items())
        network = _open(self.files[entry, fixed], self.precision, shapes, torch.get_num_threads())
        outputs = network({name: value.detach().contiguous().numpy() for name, value in inputs.items()})
        return tuple(torch.from_numpy(output) for output in outputs)

    def _make(self, entry: Entry, fixed: tuple[int, ...] | None) -> Path:
        """Return the converted step, from the cache if it is there."""
        libraries = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnxscript")}[self.name]
        versions = [f"{name} {version(name)}" for name in ("unet-denoiser", "torch", *libraries)]
        key = digest([self._weights, self.name, self.precision, entry, str(fixed), *versions])
        return compute_once("engines", key, lambda folder: self._convert(folder, entry, fixed))

    @cached_property
    def _weights(self) -> str:
        """A digest of the architecture and the weights."""
        tensors = (value.contiguous().view(torch.uint8).numpy().data for value in self.model.state_dict().values())
        return digest([json.dumps(self.model.config.to_dict(), sort_keys=True), *map(bytes, tensors)])

    def _convert(self, folder: Path, entry: Entry, fixed: tuple[int, ...] | None) -> None:
        config = self.model.config
        axes, names = step_axes(self.model, entry), tuple(step_axes(self.model, entry))
        least, space = least_size(config), AXES[config.dims]
        sizes = fixed or tuple(max(n, least) for n in config.sizes)
        given = dict(zip(space, sizes, strict=True))
        if fixed is not None:
            axes = {name: tuple(given.get(n, n) if isinstance(n, str) else n for n in shape) for name, shape in axes.items()}
        inputs = draw_step_inputs(self.model, entry, given | {"batch": 2, "tokens": 3})
        program = trace(NetworkStep(self.model, entry), inputs, axes, least)
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
