"""Shared by the configurations: names that options may have, checks, sizes."""

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, Concatenate, Literal, ParamSpec, get_args

P = ParamSpec("P")

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
VarianceType = Literal["fixed_small", "fixed_large", "learned_range"]
LossWeightingName = Literal["constant", "min_snr", "p2", "truncated_snr", "learned"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
MixedPrecision = Literal["no", "bf16", "fp16"]
TrackerName = Literal["tensorboard", "wandb"]
ForeignFormat = Literal["diffusers", "ldm", "adm", "ddpm"]
CheckpointFormat = Literal["unet-denoiser", "pipeline", ForeignFormat]
QKVOrder = Literal["legacy", "new"]


def signature_of(cls: Callable[P, Any]) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Give an `__init__(self, *args, **kwargs)` the parameters of `cls`, for help(), editors and type checkers."""

    def decorate(init: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        parameters = inspect.signature(cls).parameters.values()
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        init.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
        return init

    return decorate


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise ValueError unless `value` is one of the values of the Literal `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, get_args(choices)))}")


def check_names(kind: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise ValueError for a name that is not known, with those that are like it, or all."""
    for name in given:
        if name not in known:
            near = get_close_matches(name, known)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the options are {', '.join(sorted(known))}"
            raise ValueError(f"unknown {kind} {name!r}; {hint}")


def check_minimum(config: object, minimum: int, *names: str) -> None:
    """Raise ValueError if one of these fields of `config` is below `minimum`; None is accepted."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}")


def per_axis(size: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Return `image_size` as one int per axis; one number stands for all axes.

    Raises:
        ValueError: another number of values, or one below 1.
    """
    sizes = (size,) * axes if isinstance(size, int) else tuple(size)
    sizes = sizes * axes if len(sizes) == 1 else sizes
    if len(sizes) != axes or min(sizes) < 1:
        raise ValueError(f"image_size={size} must be a positive int, or {axes} of them")
    return sizes


def halve(size: int, times: int = 1) -> int:
    """Halve a size `times` times, rounding up as every downsampling does."""
    return (size + 2**times - 1) // 2**times
