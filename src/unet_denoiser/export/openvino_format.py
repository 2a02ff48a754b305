"""OpenVINO's format: converting programs to it, and running its files."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unet_denoiser.config.base import ExportPrecision
from unet_denoiser.export.libraries import require

Array = np.ndarray[Any, Any]


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Keep OpenVINO's converter and NNCF from sending usage statistics, which also cost half a minute offline."""
    name, before = "openvino_telemetry", sys.modules.get("openvino_telemetry")
    sys.modules[name] = None  # type: ignore[assignment]  # its import fails, and a stub takes its place
    try:
        yield
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before


def convert(program: Any, names: Sequence[str], outputs: Sequence[str] = ("output",)) -> Any:
    """Convert a program of torch.export to an `openvino.Model` of its own memory, with these names.

    A module is not taken: OpenVINO would trace it by torch.jit, which fails in ours.
    """
    with without_telemetry(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about what the converter uses of it
        model = require("openvino").convert_model(program)
    for ports, wanted in ((model.inputs, names), (model.outputs, outputs)):
        for port, name in zip(ports, wanted, strict=True):
            port.get_tensor().set_names({name})
    for parameter, name in zip(model.get_parameters(), names, strict=True):
        parameter.set_friendly_name(name)
    return model


def fix_shapes(model: Any, axes: Mapping[str, Sequence[int | str]]) -> None:
    """Give the inputs their lengths: the converter leaves all of them open, whatever the program says."""
    model.reshape({name: [n if isinstance(n, int) else -1 for n in shape] for name, shape in axes.items()})


def save(model: Any, path: Path, *, half: bool = False) -> None:
    """Write a model as PATH.xml and PATH.bin, with the weights in float16 if `half`."""
    require("openvino").save_model(model, str(path), compress_to_fp16=half)


@cache
def _core() -> Any:
    return require("openvino").Core()  # one per process: a second one doubles its threads


class OpenVINONetwork:
    """A file of OpenVINO on this CPU, called with arrays by name.

    Args:
        path: the .xml file.
        precision: of the arithmetic. OpenVINO would choose bfloat16 by itself where the processor has units for it.
        shapes: fixed shapes of the inputs by name; a file of any size is slow without.
        cache: a folder where OpenVINO keeps what it compiles.
        threads: of the CPU (default: torch's number).
    """

    def __init__(
        self,
        path: Path,
        precision: ExportPrecision,
        shapes: Mapping[str, Sequence[int]] | None = None,
        cache: Path | None = None,
        threads: int | None = None,
    ) -> None:
        core = _core()
        model = core.read_model(str(path))
        if shapes is not None:
            model.reshape({name: list(shape) for name, shape in shapes.items()})
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        }
        if cache is not None:
            options["CACHE_DIR"] = str(cache)
        self.compiled = core.compile_model(model, "CPU", options)
        self.request = self.compiled.create_infer_request()

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Return the outputs, in memory of their own."""
        self.request.infer({name: np.ascontiguousarray(value) for name, value in inputs.items()})
        # the request's memory is overwritten by the next call, and goes away with the request
        return [np.array(self.request.get_output_tensor(i).data) for i in range(len(self.compiled.outputs))]
