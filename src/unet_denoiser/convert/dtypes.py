"""One floating dtype for all tensors of a checkpoint."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.utils.finite import is_finite

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# dtypes that torch stores and does not compute with
_STORAGE_ONLY = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
# endings of the tensors that quantisers keep beside their weights
_QUANTISED = {
    ".scale_weight": "scaled fp8 weights of ComfyUI",
    ".scale_input": "scaled fp8 weights of ComfyUI",
    "scaled_fp8": "scaled fp8 weights of ComfyUI",
    ".comfy_quant": "quantised weights of ComfyUI",
    ".weight_scale": "quantised weights with scales",
    ".weight_scale_2": "quantised weights with scales",
    ".weight_scale_inv": "quantised weights with scales",
    ".input_scale": "quantised weights with scales",
    ".absmax": "4-bit weights of bitsandbytes",
    ".quant_map": "4-bit weights of bitsandbytes",
    ".SCB": "8-bit weights of bitsandbytes",
    ".weight_format": "8-bit weights of bitsandbytes",
    ".qweight": "weights of GPTQ or AWQ",
    ".qzeros": "weights of GPTQ or AWQ",
    ".W_q": "weights of HQQ",
    ".weight._data": "weights of optimum-quanto",
    ".weight_qdata": "weights of torchao",
    "._packed_params._packed_params": "weights of torch's quantisation",
    ".wcscales": "weights of Nunchaku",
    ".encoded_exponent": "compressed weights of DFloat11",
}


def check_dtype(torch_dtype: Any) -> torch.dtype | None:
    """Return a dtype that a network can have, given as such, by its name or as None; ValueError for any other."""
    named = getattr(torch, torch_dtype, torch_dtype) if isinstance(torch_dtype, str) else torch_dtype
    if named is None or named in DTYPES:
        return named
    raise ValueError(f"torch_dtype={torch_dtype!r} is not one of {', '.join(map(str, DTYPES))}")


def describe_quantisation(names: Iterable[str]) -> str | None:
    """Return whose quantised weights these are, by the name of a tensor that is kept beside them; None if of none."""
    found = ((kind, name) for name in names for ending, kind in _QUANTISED.items() if name.endswith(ending))
    return next((f"{kind} ({name})" for kind, name in found), None)


def unify_dtypes(tensors: Mapping[str, Tensor], source: object, torch_dtype: Any = None) -> dict[str, Tensor]:
    """Return the tensors in one floating dtype: the given one, else the widest among them; fp8 becomes bfloat16.

    A warning says so where the file has others. Raise ValueError for tensors that are no plain floating numbers, such
    as quantised ones, and for values that are not finite, by name.
    """
    wanted = check_dtype(torch_dtype)
    if kind := describe_quantisation(tensors):
        raise ValueError(f"{source} holds {kind}; give the file that they were made from")
    for name, tensor in tensors.items():
        if tensor.dtype not in (*DTYPES, *_STORAGE_ONLY) or tensor.layout != torch.strided:
            found = tensor.dtype if tensor.layout == torch.strided else tensor.layout
            raise ValueError(f"{source}: {name} is {found}; weights must be floating-point numbers")
    counts = Counter(tensor.dtype for tensor in tensors.values())
    plain = [dtype for dtype in counts if dtype in DTYPES]
    dtype = wanted or reduce(torch.promote_types, plain or [torch.bfloat16])
    if wanted is None and set(counts) - {dtype}:
        kinds = ", ".join(f"{number} tensors of {kind}" for kind, number in counts.most_common())
        warnings.warn(f"{source} has {kinds}; all are loaded as {dtype}; torch_dtype=... gives another", stacklevel=2)
    return {name: _convert(tensor, dtype, f"{source}: {name}") for name, tensor in tensors.items()}


def _convert(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a tensor in a dtype; ValueError if it holds values that are not finite, or that the dtype cannot hold."""
    converted = tensor.to(dtype)
    if tensor.dtype in DTYPES and not is_finite(tensor):
        raise ValueError(f"{name} has values that are not finite: the file is damaged, or its training diverged")
    if converted is not tensor and not is_finite(converted):
        raise ValueError(f"{name} has values that {dtype} cannot hold")
    return converted
