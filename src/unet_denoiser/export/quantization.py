"""Quantisation to 8 bits by NNCF: ranges of all noise levels, and the embeddings of time and conditions in float."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from unet_denoiser.export.libraries import require
from unet_denoiser.export.openvino_format import without_telemetry


def quantize(model: Any, calls: Sequence[Mapping[str, Tensor]]) -> Any:
    """Quantise weights and activations of an `openvino.Model` to 8 bits.

    NNCF's own choices break a diffusion network: it quantises the product of time and frequencies, which tells the
    noise levels apart, and takes the mean of the calls' ranges, which cuts off the levels that are wider.

    Args:
        calls: inputs of calls at all noise levels, by name; their least and largest activations are the ranges.
    """
    # its progress bars would come between the lines of a command
    with without_telemetry(), contextlib.redirect_stdout(io.StringIO()):
        nncf = require("nncf", "precision='int8'")
        ranges = require("nncf.quantization.range_estimator").RangeEstimatorParametersSet.MINMAX
        parameters = require("nncf.quantization.advanced_parameters").AdvancedQuantizationParameters
        logging.getLogger("nncf").setLevel(logging.ERROR)
        arrays = [{name: value.numpy().copy() for name, value in call.items()} for call in calls]
        return nncf.quantize(
            model,
            nncf.Dataset(arrays),
            subset_size=len(arrays),
            ignored_scope=nncf.IgnoredScope(names=sorted(names_without_image(model)), validate=False),
            advanced_parameters=parameters(activations_range_estimator_params=ranges),
        )


def names_without_image(model: Any) -> set[str]:
    """Return the names of all operations that depend on an input, but not on "x": the embeddings."""
    inputs = {parameter.get_friendly_name(): parameter for parameter in model.get_parameters()}
    names: dict[str, set[str]] = {}  # of each operation, the inputs that it depends on
    for node in model.get_ordered_ops():
        before: Iterable[Any] = (node.input_value(i).get_node() for i in range(node.get_input_size()))
        own = {node.get_friendly_name()} if node.get_friendly_name() in inputs else set()
        names[node.get_friendly_name()] = own.union(*(names[other.get_friendly_name()] for other in before))
    return {name for name, found in names.items() if found and "x" not in found and name not in inputs}
