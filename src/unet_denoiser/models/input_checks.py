"""What `UNet.forward` accepts, checked before any computation: a wrong call says what is wrong and what would be right.

Only shapes and dtypes are looked at, so compiling and exporting see no data-dependent branch. The one check that needs
values, the range of class labels, runs on CPU labels outside the compiler; on a GPU it would make the host wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unet_denoiser.config.unet import CONDITIONS, UNetConfig


def check_inputs(
    config: UNetConfig,
    dtype: torch.dtype,
    x: Tensor,
    t: Tensor,
    conditions: Mapping[str, Tensor | None],
    context_mask: Tensor | None,
    time_cond: Tensor | None,
    drop: Mapping[str, Tensor] | None,
    skip_residuals: Sequence[Tensor] | None,
    bottleneck_residual: Tensor | None,
) -> None:
    """Raise TypeError or ValueError for arguments of `UNet.forward` that it cannot take; arguments as there.

    Args:
        dtype: that of the weights.
        conditions: "class_labels", "vector" and "context", each a tensor or None.
    """
    _check_tensor("x", x, dtype, (None, config.in_channels, *[None] * config.dims))
    _check_tensor("t", t, None, (x.shape[0],), hint="; one timestep per sample: t.expand(batch) repeats a single one")
    if t.dtype == torch.bool or t.is_complex():
        raise TypeError(f"t has dtype {t.dtype}; give integer or float timesteps")
    batch = x.shape[0]
    built_for = {name: getattr(config, option) for name, option in CONDITIONS.items()}
    for name, value in conditions.items():
        if value is None and built_for[name] is not None and not config.learned_null:
            raise ValueError(
                f"{name} is missing: this network has {CONDITIONS[name]}={built_for[name]} and learned_null=False"
            )
        if value is not None and built_for[name] is None:
            raise ValueError(
                f"{name} was given, but this network has {CONDITIONS[name]}=None; leave it out, or build for it"
            )
    if (labels := conditions["class_labels"]) is not None:
        if isinstance(labels, Tensor) and labels.ndim == 2:  # weights of the classes
            _check_tensor("class_labels", labels, dtype, (batch, config.num_classes))
        else:
            _check_labels(labels, batch, config.num_classes or 0)
    if (vector := conditions["vector"]) is not None:
        _check_tensor("vector", vector, dtype, (batch, config.vector_dim))
    if (context := conditions["context"]) is not None:
        _check_tensor("context", context, dtype, (batch, None, config.context_dim))
    if context_mask is not None:
        if context is None:
            raise ValueError("context_mask was given without a context")
        _check_tensor("context_mask", context_mask, torch.bool, (batch, context.shape[1]))
    if time_cond is not None:
        if config.time_cond_dim is None:
            raise ValueError(
                "time_cond was given, but this network has time_cond_dim=None; leave it out, or build for it"
            )
        _check_tensor("time_cond", time_cond, dtype, (batch, config.time_cond_dim))
    if drop is not None and not isinstance(drop, Mapping):
        raise TypeError(f"drop is a {type(drop).__name__}; give a dict of masks, for example {{'class_labels': mask}}")
    for name, mask in (drop or {}).items():
        if conditions.get(name) is None:
            raise ValueError(f"drop has {name!r}, which was not given as a condition in this call")
        if not config.learned_null:
            raise ValueError(f"drop has {name!r}, but this network has learned_null=False: nothing can stand in for it")
        _check_tensor(f"drop[{name!r}]", mask, torch.bool, (batch,))
    _check_residuals(config, x, dtype, skip_residuals, bottleneck_residual)


def _check_residuals(
    config: UNetConfig, x: Tensor, dtype: torch.dtype, skips: Sequence[Tensor] | None, bottleneck: Tensor | None
) -> None:
    def shape(level: int, channels: int) -> tuple[int, ...]:
        return (x.shape[0], channels, *[(n + 2**level - 1) // 2**level for n in x.shape[2:]])

    if skips is not None:
        if len(skips) != len(config.skip_levels):
            raise ValueError(
                f"skip_residuals has {len(skips)} tensors; this network has {len(config.skip_levels)} skips"
            )
        for i, (residual, skip) in enumerate(zip(skips, config.skip_levels, strict=True)):
            _check_tensor(f"skip_residuals[{i}]", residual, dtype, shape(*skip))
    if bottleneck is not None:
        _check_tensor("bottleneck_residual", bottleneck, dtype, shape(len(config.widths) - 1, config.widths[-1]))


def _check_labels(labels: Tensor, batch: int, num_classes: int) -> None:
    _check_tensor("class_labels", labels, None, (batch,))
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"class_labels has dtype {labels.dtype}; give int64")
    # a subclass of Tensor need not have values (FakeTensor has none)
    has_values = labels.device.type == "cpu" and not torch.compiler.is_compiling() and type(labels) is Tensor
    if has_values and labels.numel():
        low, high = labels.min(), labels.max()
        if low < 0 or high >= num_classes:
            raise ValueError(f"class_labels has {int(low if low < 0 else high)}; valid are 0 to {num_classes - 1}")


def _check_tensor(
    name: str, value: object, dtype: torch.dtype | None, shape: Sequence[int | None], hint: str = ""
) -> None:
    """A tensor of this shape (None: any length of at least 1) and, unless autocast is on, of this dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; give a torch.Tensor{hint}")
    fits = len(value.shape) == len(shape)
    if not fits or any(n != m if m is not None else n < 1 for n, m in zip(value.shape, shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {tuple(value.shape)}; this call needs ({wanted}){hint}")
    if dtype is None or value.dtype == dtype:
        return
    if not (dtype.is_floating_point and value.is_floating_point() and torch.is_autocast_enabled(value.device.type)):
        raise TypeError(f"{name} has dtype {value.dtype}; this call needs {dtype}")
