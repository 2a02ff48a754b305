"""ONNX: writing programs, and running the files by onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unet_denoiser.export.libraries import require

Array = np.ndarray[Any, Any]
_MAX_INLINE_BYTES = 2**30  # a protocol buffer holds 2 GiB at most


def save(program: Any, path: Path, names: Sequence[str], outputs: Sequence[str] = ("output",)) -> None:
    """Write a program of torch.export as an ONNX file; weights of more than 1 GiB go to PATH.data beside it."""
    require("onnx"), require("onnxscript")
    external = sum(value.nbytes for value in program.state_dict.values()) > _MAX_INLINE_BYTES
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it reports its steps
        warnings.simplefilter("ignore")
        for name in ("onnxscript", "torch.onnx"):
            logging.getLogger(name).setLevel(logging.ERROR)
        result: Any = torch.onnx.export(
            program, (), dynamo=True, input_names=list(names), output_names=list(outputs), verbose=False
        )
        result.save(str(path), external_data=external)


class OnnxNetwork:
    """An ONNX file on this CPU, called with arrays by name.

    Args:
        path: the .onnx file.
        threads: of the CPU (default: torch's number).
        optimized: where onnxruntime keeps the graph that it has optimised, to load faster the next time.
    """

    def __init__(self, path: Path, threads: int | None = None, optimized: Path | None = None) -> None:
        runtime = require("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Return the outputs."""
        return [np.array(value) for value in self.session.run(None, dict(inputs))]
