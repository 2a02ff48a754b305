"""The arguments of `sample` as one record, checked before any work starts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from unet_denoiser.config.base import as_plain, per_axis
from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.guidance import as_conditions


class Start(NamedTuple):
    """The start of the reverse process, if not pure noise.

    Args:
        x: (N, C, *spatial), one per seed: data, which get the noise of the first step, or x_t itself.
        first_step: the step to begin with, 0 to `num_inference_steps` - 1.
        add_noise: False if x is x_t, at that step's noise level already.
    """

    x: Tensor
    first_step: int = 0
    add_noise: bool = True


@dataclass(frozen=True)
class SamplingRequest:
    """One call of `sample`, whose documentation has the fields. Conditions have one sample per seed."""

    seeds: Sequence[int]
    config: SamplingConfig
    conditions: Conditions
    negative: Conditions
    image_size: int | Sequence[int] | None = None
    batch_size: int = 64
    start: Start | None = None
    edit: Callable[[Tensor, float, slice], Tensor] | None = None
    loop: Callable[..., Iterator[Any]] | None = None
    guided: Sequence[str] | None = None
    guide: UNet | None = None
    classifier: Callable[..., Tensor] | None = None
    classifier_scale: float = 1.0

    @classmethod
    def parse(cls, seeds: Sequence[int] | int, options: Mapping[str, Any], **defaults: Any) -> Self:
        """Sort the keywords of `sample` into configuration, conditions and the rest; ValueError for unknown ones.

        `defaults` are those of `SamplingConfig` for the process.
        """
        options, names, seeds = dict(options), Conditions.names(), as_seeds(seeds)
        config = pop_config(options, **defaults)
        given = {name: options.pop(name) for name in names if name in options}
        label = given.get("class_labels")
        if getattr(label, "ndim", 0) == 0 and isinstance(label := as_plain(label), int):  # one class for all samples
            given["class_labels"] = torch.full((len(seeds),), label)
        conditions = as_conditions("conditions", given)
        negative = as_conditions("negative", options.pop("negative", None)).expand(len(seeds))
        known = {field.name for field in fields(cls)} - {"conditions"}
        if unknown := [name for name in options if name not in known]:
            known |= {field.name for field in fields(SamplingConfig)}
            raise ValueError(
                f"{unknown[0]} is neither a condition ({', '.join(names)}) nor an option ({', '.join(sorted(known))})"
            )
        return cls(seeds, config, conditions, negative, **options)

    def check(self, model: UNet, process: Diffusion) -> tuple[int, ...]:
        """Return the shape of one sample, (C, *spatial), after checking the request against network and process.

        Raises:
            ValueError: a field that does not fit, with its name, its value and a valid one.
        """
        concat, count = self.conditions.concat, len(self.seeds)
        like = concat if concat is not None or self.start is None else self.start.x
        sizes = sample_sizes(model.config, self.image_size, like)
        check_process(process)
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size!r} must be an int of at least 1")
        if not count:
            raise ValueError("seeds is empty; give one per sample")
        for prefix, conditions in (("", self.conditions), ("negative ", self.negative)):
            for name, value in conditions.given().items():
                if len(value) != count:
                    raise ValueError(f"{prefix}{name} has {len(value)} samples for {count} seeds; give one per seed")
        if concat is not None and tuple(concat.shape[2:]) != sizes:
            raise ValueError(f"concat has size {tuple(concat.shape[2:])}; the samples have {sizes}")
        if self.start is not None and (len(self.start.x), *self.start.x.shape[2:]) != (count, *sizes):
            raise ValueError(f"start has shape {tuple(self.start.x.shape)}; there are {count} seeds of size {sizes}")
        if process.distillation is not None:
            beside = {"negative": self.negative.given(), "guide": self.guide, "classifier": self.classifier}
            if given := [name for name, value in beside.items() if value or callable(value)]:
                raise ValueError(f"{given[0]} needs guidance, and {process.distillation.describe()}; leave it out")
        channels = self._check_channels(model.config, process)
        if self.guide is not None and self._check_channels(self.guide.config, process) != channels:
            found, wanted = self.guide.config.out_channels, model.config.out_channels
            raise ValueError(f"guide makes {found} channels; the network {wanted}")
        if self.start is not None and self.start.x.shape[1] != channels:
            raise ValueError(f"start has {self.start.x.shape[1]} channels; the samples have {channels}")
        if self.config.reuse is not None and self.loop is not None:
            raise ValueError(
                f"reuse={self.config.reuse} does not go with resampling and inversion, which repeat their steps"
            )
        return channels, *sizes

    def _check_channels(self, config: UNetConfig, process: Diffusion) -> int:
        """Return the channels of a network's samples, after checking that it fits the process and `concat`."""
        given = 0 if self.conditions.concat is None else self.conditions.concat.shape[1]
        channels, needed = process.data_channels(config), process.concat_channels(config)
        if 0 <= needed != given:
            perhaps = ", or for self_conditioning=True" if needed == channels and not process.self_conditioning else ""
            raise ValueError(f"concat has {given} channels; this network was built for {needed}{perhaps}")
        return process.check_channels(config, concat_channels=given)


def as_seeds(seeds: Any) -> Sequence[int]:
    """Return seeds as a sequence of ints; a single int is the one seed, and arrays, tensors and iterators are taken.

    Raises:
        TypeError, ValueError: values that are no ints, or that torch.Generator does not take.
    """
    plain = as_plain(seeds)
    if isinstance(plain, range):
        return plain
    if isinstance(plain, str | bytes | Mapping) or not isinstance(plain, int | Iterable) or isinstance(plain, bool):
        raise TypeError(f"seeds={seeds!r} must be ints, one per sample, for example range(4)")
    values = [plain] if isinstance(plain, int) else [as_plain(seed) for seed in plain]
    for seed in values:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seeds has {seed!r}; give ints, one per sample, for example range(4)")
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seeds has {seed}, which does not fit 64 bits")
    return values


def pop_config(options: dict[str, Any], **defaults: Any) -> SamplingConfig:
    """Take `config` (else `defaults`) and the fields of `SamplingConfig`, which override it, out of `options`."""
    config = options.pop("config", None)
    if config is None or isinstance(config, Mapping):
        config = SamplingConfig(**defaults | dict(config or {}))
    if not isinstance(config, SamplingConfig):
        raise TypeError(f"config is a {type(config).__name__}; give a SamplingConfig")
    names = [field.name for field in fields(SamplingConfig) if field.name in options]
    return replace(config, **{name: options.pop(name) for name in names})


def sample_sizes(config: UNetConfig, image_size: int | Sequence[int] | None, like: Tensor | None) -> tuple[int, ...]:
    """Return the size of the samples, one int per axis: `image_size`, else the size of `like`, else the network's."""
    if image_size is None:
        image_size = config.sizes if like is None else tuple(like.shape[2:])
    return per_axis(image_size, config.dims)


def check_process(process: Any) -> None:
    """Raise TypeError for what is no process, such as its options."""
    if not isinstance(process, Diffusion):
        raise TypeError(f"process is a {type(process).__name__}; give a Diffusion, such as Diffusion(**options)")
