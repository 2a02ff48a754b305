"""Checks of the arguments of `UNet.forward`: a wrong call says what is wrong and what would be right.

They read shapes and dtypes alone, so torch.compile and torch.export meet no branch that depends on data. One check
needs values: the range of class labels. It runs on a CPU outside the compiler; on a GPU it would make the host wait.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unet_denoiser.config.base import halve
from unet_denoiser.config.unet import CONDITIONS, UNetConfig
from unet_denoiser.models.conditions import Conditions

Shape = Sequence[int | None]  # None: any length of at least 1


def check_inputs(
    config: UNetConfig,
    dtype: torch.dtype,
    x: Tensor,
    t: Tensor,
    conditions: Conditions,
    *,
    drop: Mapping[str, Tensor] | None = None,
    skip_residuals: Sequence[Tensor] | None = None,
    bottleneck_residual: Tensor | None = None,
) -> None:
    """Raise TypeError or ValueError for arguments of `UNet.forward` that it cannot take.

    Args:
        dtype: dtype of the weights; the other arguments are those of `UNet.forward`.
    """
    _check_tensor("x", x, dtype, (None, config.in_channels, *[None] * config.dims))
    batch = x.shape[0]
    _check_tensor("t", t, None, (batch,), hint="; one timestep per sample: t.expand(batch) repeats a single one")
    if t.dtype == torch.bool or t.is_complex():
        raise TypeError(f"t has dtype {t.dtype}; give integer or float timesteps")
    _check_conditions(config, dtype, batch, conditions)
    _check_drop(config, batch, conditions, drop)
    _check_residuals(config, dtype, x, skip_residuals, bottleneck_residual)


def condition_shapes(config: UNetConfig, batch: int) -> dict[str, Shape]:
    """Return the shape of each condition; None stands for any length."""
    return {
        "class_labels": (batch,),
        "vector": (batch, config.vector_dim),
        "context": (batch, None, config.context_dim),
        "time_cond": (batch, config.time_cond_dim),
    }


def _check_conditions(config: UNetConfig, dtype: torch.dtype, batch: int, conditions: Conditions) -> None:
    options = {**CONDITIONS, "time_cond": "time_cond_dim"}
    for name, shape in condition_shapes(config, batch).items():
        value, option = getattr(conditions, name), options[name]
        if value is None:
            if name in config.conditions and not config.learned_null:
                built = f"{option}={getattr(config, option)}"
                raise ValueError(f"{name} is missing: this network has {built} and learned_null=False")
        elif getattr(config, option) is None:
            raise ValueError(f"{name} was given, but this network has {option}=None; leave it out, or build for it")
        elif name == "class_labels":
            _check_labels(value, batch, config.num_classes or 0, dtype)
        else:
            _check_tensor(name, value, dtype, shape)
    if conditions.context_mask is not None:
        if conditions.context is None:
            raise ValueError("context_mask was given without a context")
        _check_tensor("context_mask", conditions.context_mask, torch.bool, (batch, conditions.context.shape[1]))


def _check_labels(labels: Tensor, batch: int, num_classes: int, dtype: torch.dtype) -> None:
    """Check integers (B,), or weights of the classes (B, num_classes)."""
    if isinstance(labels, Tensor) and labels.ndim == 2:
        return _check_tensor("class_labels", labels, dtype, (batch, num_classes))
    _check_tensor("class_labels", labels, None, (batch,))
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"class_labels has dtype {labels.dtype}; give int64")
    # a subclass of Tensor need not have values (FakeTensor has none)
    has_values = labels.device.type == "cpu" and not torch.compiler.is_compiling() and type(labels) is Tensor
    if has_values and labels.numel():
        low, high = labels.min(), labels.max()
        if low < 0 or high >= num_classes:
            raise ValueError(f"class_labels has {int(low if low < 0 else high)}; valid are 0 to {num_classes - 1}")


def _check_drop(config: UNetConfig, batch: int, conditions: Conditions, drop: Mapping[str, Tensor] | None) -> None:
    if drop is not None and not isinstance(drop, Mapping):
        raise TypeError(f"drop is a {type(drop).__name__}; give a dict of masks, for example {{'class_labels': mask}}")
    for name, mask in (drop or {}).items():
        if name not in CONDITIONS or getattr(conditions, name) is None:
            raise ValueError(f"drop has {name!r}, which was not given as a condition in this call")
        if not config.learned_null:
            raise ValueError(f"drop has {name!r}, but this network has learned_null=False: nothing can stand in for it")
        _check_tensor(f"drop[{name!r}]", mask, torch.bool, (batch,))


def _check_residuals(
    config: UNetConfig, dtype: torch.dtype, x: Tensor, skips: Sequence[Tensor] | None, bottleneck: Tensor | None
) -> None:
    def shape(level: int, channels: int) -> tuple[int, ...]:
        return (x.shape[0], channels, *[halve(n, level) for n in x.shape[2:]])

    if skips is not None:
        if len(skips) != len(config.skip_levels):
            raise ValueError(f"skip_residuals has {len(skips)} tensors; this network needs {len(config.skip_levels)}")
        for i, (residual, skip) in enumerate(zip(skips, config.skip_levels, strict=True)):
            _check_tensor(f"skip_residuals[{i}]", residual, dtype, shape(*skip))
    if bottleneck is not None:
        _check_tensor("bottleneck_residual", bottleneck, dtype, shape(len(config.widths) - 1, config.widths[-1]))


def _check_tensor(name: str, value: object, dtype: torch.dtype | None, shape: Shape, hint: str = "") -> None:
    """Check type, shape and, unless `dtype` is None, dtype; under autocast any float stands for any other."""
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
